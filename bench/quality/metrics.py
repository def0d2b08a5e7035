"""Figures of what a model answers: for evaluators of one's own, and for ranks before and after.

Arrays are anything that numpy takes. Raises TensorError for shapes that don't go together, for
nothing at all, and for NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.available import load_package
from vqkernels.errors import TensorError

__all__ = [
    "accuracy",
    "bleu",
    "exact_match",
    "kendall",
    "mrr",
    "ndcg",
    "rouge",
    "spearman",
    "top_overlap",
]

_Floats = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------
# answers


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predictions that are the reference: both of one shape, of anything comparable."""
    found, wanted = np.asarray(predictions), np.asarray(references)
    _check_pair(found, wanted, "accuracy: predictions and references")
    return float(np.mean(found == wanted))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are the reference's, but for white space at both ends."""
    return accuracy([one.strip() for one in predictions], [one.strip() for one in references])


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """sacrebleu's corpus BLEU, 0 to 100. Raises BackendError without the package."""
    _check_pair(np.asarray(predictions), np.asarray(references), "bleu: predictions and references")
    sacrebleu = load_package("sacrebleu")
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of rouge1, rouge2 and rougeL, 0 to 1, by Google's rouge-score, with its stemmer.

    Raises BackendError without the package.
    """
    _check_pair(
        np.asarray(predictions), np.asarray(references), "rouge: predictions and references"
    )
    names = ("rouge1", "rouge2", "rougeL")
    load_package("rouge_score")
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(
        names, use_stemmer=True
    )
    scores = [
        scorer.score(wanted, found) for found, wanted in zip(predictions, references, strict=True)
    ]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


# ------------------------------------------------------------------------------------------------
# ranked items


def mrr(relevance: ArrayLike, scores: ArrayLike) -> float:
    """Mean over queries of 1 / the rank of the first relevant item; 0 where there is none.

    relevance, scores: `[queries, items]`; what has a relevance above 0 is relevant. An irrelevant
    item with the same score ranks before it, so that equal scores for all earn nothing.
    """
    gains, values = _queries(relevance, scores, "mrr")
    best = np.where(gains > 0, values, -np.inf).max(axis=1, keepdims=True)
    before = ((gains <= 0) & (values >= best)).sum(axis=1)
    return float(np.where(np.isinf(best[:, 0]), 0.0, 1 / (1 + before)).mean())


def ndcg(relevance: ArrayLike, scores: ArrayLike, k: int | None = None) -> float:
    """Mean over queries of the discounted gain over that of the best order; first `k` items alone.

    relevance, scores: `[queries, items]`; gain is the relevance itself, discounted by log2 of
    rank + 1 (Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002).
    Items of equal scores share their places, each with their mean gain (McSherry and Najork,
    "Computing information retrieval performance measures efficiently in the presence of tied
    scores", 2008). A query without a relevant item counts 0.
    """
    gains, values = _queries(relevance, scores, "ndcg")
    discount = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    if k is not None:
        discount[k:] = 0
    found = np.array([_tied_gain(*query, discount) for query in zip(gains, values, strict=True)])
    ideal = -np.sort(-gains, axis=1) @ discount
    return float(np.divide(found, ideal, out=np.zeros_like(found), where=ideal > 0).mean())


def _tied_gain(gains: _Floats, values: _Floats, discount: _Floats) -> float:
    _, tie, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    places = np.add.reduceat(discount, starts)  # discounts that a tie's items share
    return float(np.bincount(tie, gains) / sizes @ places)


# ------------------------------------------------------------------------------------------------
# two orders of the same items


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation of two lists of numbers; 0 where either is all the same.

    Equal values share their mean rank.
    """
    first, second = _lists(one, other, "spearman")
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    size = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(np.clip(a @ b / size, -1, 1)) if size else 0.0


def kendall(one: ArrayLike, other: ArrayLike) -> float:
    """Kendall's tau-b of two lists of numbers (corrected for ties); 0 where one is all the same.

    Compares every pair, row by row: 2,000 items take some 30 ms.
    """
    first, second = _lists(one, other, "kendall")
    agreeing = firsts = seconds = 0
    for at in range(1, len(first)):
        a, b = np.sign(first[:at] - first[at]), np.sign(second[:at] - second[at])
        agreeing += int(a @ b)
        firsts, seconds = firsts + int(np.abs(a).sum()), seconds + int(np.abs(b).sum())
    return float(agreeing / np.sqrt(firsts * seconds)) if firsts and seconds else 0.0


def top_overlap(one: ArrayLike, other: ArrayLike, k: int) -> float:
    """Share of the `k` items with the largest values that both lists have (all, of fewer than k).

    Of equal values the first item counts as the larger.
    """
    first, second = _lists(one, other, "top_overlap")
    k = min(k, len(first))
    tops = (set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (first, second))
    return len(set.intersection(*tops)) / k


def _ranks(values: _Floats) -> _Floats:
    _, tie, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - (sizes + 1) / 2
    ranks: _Floats = middle[tie]
    return ranks


# ------------------------------------------------------------------------------------------------
# what is given


def _lists(one: ArrayLike, other: ArrayLike, name: str) -> tuple[_Floats, _Floats]:
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    _check_pair(first, second, f"{name}: the two lists")
    if first.ndim != 1 or np.isnan(first).any() or np.isnan(second).any():
        raise TensorError(f"{name}: takes two lists of numbers without NaN")
    return first, second


def _queries(relevance: ArrayLike, scores: ArrayLike, name: str) -> tuple[_Floats, _Floats]:
    gains, values = np.asarray(relevance, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    _check_pair(gains, values, f"{name}: relevance and scores")
    if gains.ndim != 2 or not np.isfinite(values).all() or not (gains >= 0).all():
        raise TensorError(
            f"{name}: takes relevance of 0 and more and finite scores, both [queries, items]"
        )
    return gains, values


def _check_pair(one: NDArray[np.generic], other: NDArray[np.generic], what: str) -> None:
    if one.shape != other.shape or one.size == 0:
        raise TensorError(
            f"{what} are {list(one.shape)} and {list(other.shape)}; give as many of each, one at "
            f"least"
        )
