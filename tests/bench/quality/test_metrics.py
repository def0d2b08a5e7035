from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import accuracy_score, label_ranking_average_precision_score, ndcg_score

from bench.quality import metrics
from vqkernels.errors import BackendError, TensorError

# Values of few kinds, so that ties come up; and of many.
KINDS = (3, 1_000_000)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("k", [None, 1, 4, 50])
def test_ndcg_is_scikit_learns(kinds: int, k: int | None) -> None:
    rng = np.random.default_rng(kinds)
    relevance, scores = rng.integers(0, 4, (9, 12)), rng.integers(0, kinds, (9, 12)) / 7
    relevance[3] = 0
    assert metrics.ndcg(relevance, scores, k) == pytest.approx(
        ndcg_score(relevance, scores, k=k), abs=1e-12
    )


def test_ndcg_by_hand() -> None:
    # found at ranks 2 and 3, where ranks 1 and 2 were the best
    gain = 1 / np.log2(3) + 1 / 2
    assert metrics.ndcg([[0, 1, 1, 0]], [[4, 3, 2, 1]]) == pytest.approx(
        gain / (1 + 1 / np.log2(3))
    )


def test_mrr_is_scikit_learns_where_one_item_is_relevant() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (30, 8))
    relevance = np.eye(8)[rng.integers(0, 8, 30)]
    # with one relevant item, its precision is 1 / its rank, the last of its tie
    expected = label_ranking_average_precision_score(relevance, scores)
    assert metrics.mrr(relevance, scores) == pytest.approx(expected)


def test_mrr_of_several_relevant_items_is_of_the_first() -> None:
    assert metrics.mrr([[0, 2, 1], [0, 0, 0]], [[3, 2, 1], [3, 2, 1]]) == 0.25
    assert metrics.mrr([[0, 2, 1]], [[0, 0, 0]]) == 0.5  # behind what ties with it


@pytest.mark.parametrize("kinds", KINDS)
def test_rank_correlations_are_scipys(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    for _ in range(5):
        one, other = rng.integers(0, kinds, (2, 30))
        other = one + other // 2
        assert metrics.spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
        assert metrics.kendall(one, other) == pytest.approx(kendalltau(one, other).statistic)


def test_rank_correlations_of_a_constant_are_none() -> None:
    assert metrics.spearman([1, 1, 1], [1, 2, 3]) == 0
    assert metrics.kendall([1, 2, 3], [1, 1, 1]) == 0


def test_orders_that_are_the_same_or_turned_round() -> None:
    values = np.random.default_rng(0).standard_normal(40)
    for correlation in (metrics.spearman, metrics.kendall):
        assert correlation(values, values**3) == pytest.approx(1, abs=1e-15)
        assert correlation(values, -values) == pytest.approx(-1, abs=1e-15)
    assert metrics.top_overlap(values, values**3, 5) == 1
    assert metrics.top_overlap(values, -values, 5) == 0


def test_top_overlap_counts_shared_items() -> None:
    assert metrics.top_overlap([5, 4, 3, 2, 1], [1, 5, 4, 3, 2], 3) == pytest.approx(2 / 3)
    assert metrics.top_overlap([5, 4, 3, 2, 1], [4, 5, 1, 2, 3], 2) == 1
    assert metrics.top_overlap([2, 1], [1, 2], 5) == 1


def test_accuracy_is_scikit_learns() -> None:
    one, other = np.random.default_rng(0).integers(0, 3, (2, 50))
    assert metrics.accuracy(one, other) == accuracy_score(one, other)


def test_exact_match_looks_past_white_space_alone() -> None:
    found, wanted = [" Paris", "paris", "Rome", "Oslo\n"], ["Paris ", "Paris", "Bern", "Oslo"]
    assert metrics.exact_match(found, wanted) == 0.5


def test_bleu_and_rouge_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    same = ["the cat sat on the mat today"]
    assert metrics.bleu(same, same) == pytest.approx(100)
    # 7 words, 6 of them kept: n-gram precisions 6/7, 5/6, 4/5, 3/4, nothing too short
    other = ["the cat sat on the mat yesterday"]
    assert metrics.bleu(other, same) == pytest.approx(100 * (6 * 5 * 4 * 3 / 7 / 6 / 5 / 4) ** 0.25)
    pytest.importorskip("rouge_score")
    assert metrics.rouge(other, same) == pytest.approx(
        {"rouge1": 6 / 7, "rouge2": 5 / 6, "rougeL": 6 / 7}
    )
    assert metrics.rouge(["cats sit"], ["cat sit"])["rouge2"] == 1  # by their stems


@pytest.mark.parametrize("name", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_told_with_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    figure = {"sacrebleu": metrics.bleu, "rouge_score": metrics.rouge}[name]
    with pytest.raises(BackendError, match=rf"^{name} can't be imported .*; run: .*pip install"):
        figure(["a"], ["a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy([1, 2], [1]), "predictions and references are"),
        (lambda: metrics.exact_match([], []), "one at least"),
        (lambda: metrics.bleu(["a"], ["a", "b"]), "bleu: "),
        (lambda: metrics.rouge([], []), "rouge: "),
        (lambda: metrics.mrr([1, 0], [1, 0]), r"\[queries, items\]"),
        (lambda: metrics.ndcg([[1, 0]], [[1, np.nan]]), "finite"),
        (lambda: metrics.ndcg([[-1, 0]], [[1, 2]]), "0 and more"),
        (lambda: metrics.spearman([1, np.nan], [1, 2]), "without NaN"),
        (lambda: metrics.kendall([[1]], [[1]]), "two lists"),
    ],
)
def test_what_is_no_pair_is_refused(call, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        call()
