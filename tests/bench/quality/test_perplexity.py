from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from scipy.stats import t as student

from bench.quality import perplexity
from bench.quality.canaries import Continuation
from bench.quality.perplexity import Mean, Window, windows
from tests.bench.quality import tiny
from vqkernels.errors import (
    BackendError,
    ConfigError,
    ContainerError,
    SpecError,
    TensorError,
    UnsupportedError,
    VqError,
)

DAMAGED = "model.layers.0.mlp.down_proj.weight"

CANARIES = """
[[continuation]]
name = "kettle"
prompt = "The kettle boils. The dog"
tokens = 6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    (folder / "text.txt").write_text(tiny.TEXT)
    (folder / "canaries.toml").write_text(CANARIES)
    return tiny.taught(tiny.make_llama(folder / "llama", positions=160))


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return folder.parent / "text.txt"


@pytest.fixture(scope="module")
def canaries(folder: Path) -> Path:
    return folder.parent / "canaries.toml"


def damaged(folder: Path) -> dict[str, object]:
    tensors = tiny.linears(folder)
    return {**tensors, DAMAGED: tiny.damaged(tensors[DAMAGED])}


def own_losses(folder: Path, text: Path, window: int, stride: int) -> tuple[list, list]:
    """Sum and count of each window by transformers' own loss, which masks what has label -100."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"]])
    sums, counts, before = [], [], 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + window, ids.shape[1])
        labels = ids[:, start:end].clone()
        labels[:, : -(end - before)] = -100
        counts.append(int((labels[:, 1:] != -100).sum()))  # it shifts by one itself
        with torch.no_grad():
            loss = model(input_ids=ids[:, start:end], labels=labels).loss
        sums.append(float(loss) * counts[-1])
        before = end
        if end == ids.shape[1]:
            break
    return sums, counts


@pytest.mark.parametrize(("window", "stride"), [(24, 12), (24, 24), (20, 7), (160, 80)])
def test_loss_is_transformers_own(
    window: int, stride: int, folder: Path, text: Path, canaries: Path
) -> None:
    sums, counts = own_losses(folder, text, window, stride)
    report = perplexity.compare(
        folder, tiny.linears(folder), text, window=window, stride=stride, canaries=canaries
    )
    assert report.tokens == sum(counts)
    assert report.dense.windows == len(counts)
    assert report.dense.value == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_an_exact_quantisation_says_the_same(folder: Path, text: Path, canaries: Path) -> None:
    report = perplexity.compare(folder, tiny.linears(folder), text, window=24, canaries=canaries)
    assert report.quantised == report.dense
    assert report.difference == Mean(0, 0, report.dense.windows)
    assert report.weights == 14
    assert [(one.quantised, one.passed) for one in report.canaries] == [(6, True)]
    ratio = report.rows()[2]
    assert (ratio["perplexity"], ratio["perplexity_low"], ratio["perplexity_high"]) == (1, 1, 1)


def test_damage_shows_in_each_figure(folder: Path, text: Path, canaries: Path) -> None:
    report = perplexity.compare(folder, damaged(folder), text, window=24, canaries=canaries)
    assert report.quantised.value > report.dense.value + 1
    assert report.difference.value == pytest.approx(report.quantised.value - report.dense.value)
    low, _ = report.difference.interval()
    assert low > 0
    assert [(one.dense, one.passed) for one in report.canaries] == [(6, False)]
    assert report.to_dict()["quantised"]["perplexity"] > report.to_dict()["dense"]["perplexity"]


def test_the_folder_is_left_as_it_was(folder: Path, text: Path, canaries: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one, two = (
        perplexity.compare(folder, damaged(folder), text, window=24, canaries=canaries)
        for _ in range(2)
    )
    assert one == two
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.sweep  # compiles a kernel
def test_our_kernels_say_what_the_decode_says(folder: Path, text: Path, canaries: Path) -> None:
    given = {"window": 24, "canaries": canaries}
    exact = perplexity.compare(folder, damaged(folder), text, **given)
    ours = perplexity.compare(folder, damaged(folder), text, kernels=True, **given)
    assert ours.quantised.value == pytest.approx(exact.quantised.value, rel=1e-5)
    assert ours.quantised.value != exact.quantised.value  # other roundings: other code ran


def test_a_difference_is_of_pairs(folder: Path, text: Path, canaries: Path) -> None:
    rounded = {
        name: tiny.exact(one.bfloat16().float())
        for name, one in tiny.weights(folder).items()
        if name in tiny.linears(folder)
    }
    report = perplexity.compare(folder, rounded, text, window=24, canaries=canaries)
    # what is hard to foretell is hard for both
    assert 0 < report.difference.error < 0.1 * report.dense.error


def test_standard_error_is_that_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.exponential(2, count)) for count in (5, 9, 9, 9, 3)]
    mean = perplexity._mean(parts)
    sums, counts = (np.array([f(p) for p in parts], float) for f in (torch.sum, len))
    value = sums.sum() / counts.sum()
    # Taylor's series of a ratio of means: var((s - value c) / mean c) / windows
    error = np.std((sums - value * counts) / counts.mean(), ddof=1) / np.sqrt(5)
    assert mean.value == pytest.approx(value)
    assert mean.error == pytest.approx(error)
    low, high = mean.interval()
    reach = student.ppf(0.975, 4) * error
    assert (low, high) == pytest.approx((value - reach, value + reach))


def test_one_window_has_no_error(folder: Path, text: Path, canaries: Path) -> None:
    report = perplexity.compare(
        folder, tiny.linears(folder), text, window=160, stride=160, tokens=50, canaries=canaries
    )
    assert (report.tokens, report.dense.windows, report.dense.error) == (50, 1, None)
    assert report.dense.interval() is None
    assert report.rows()[0]["perplexity_low"] is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        level = rng.normal(0, 0.3, 12)[:, None]  # tokens of a window go together
        parts = list(torch.from_numpy(rng.normal(3, 1, (12, 20)) + level))
        low, high = perplexity._mean(parts).interval()
        hits += low <= 3 <= high
    # 95 % of 400 with a spread of 4.4: five spreads from there
    assert 358 <= hits <= 400


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(10, 4, 2), (11, 4, 3), (5, 8, 4), (2, 2, 1)]
)
def test_each_token_but_the_first_is_scored_once(count: int, window: int, stride: int) -> None:
    parts = list(windows(count, window, stride))
    scored = [token for part in parts for token in range(part.first, part.stop)]
    assert scored == list(range(1, count))
    for part in parts:
        assert part.start < part.first < part.stop <= part.start + window


def test_windows_side_by_side_do_not_score_their_first() -> None:
    assert list(windows(9, 4, 4)) == [Window(0, 1, 4), Window(4, 5, 8)]


def test_tied_and_transposed_matrices_are_those_of_the_file(tmp_path: Path, text: Path) -> None:
    for number, make in enumerate((tiny.make_gpt2, lambda at: tiny.make_llama(at, tied=True))):
        folder = make(tmp_path / str(number))
        report = perplexity.compare(folder, tiny.linears(folder), text, window=16)
        assert report.difference.value == 0
        whole = {
            name: tiny.exact(one) for name, one in tiny.weights(folder).items() if one.ndim == 2
        }
        assert perplexity.compare(folder, whole, text, window=16).difference.value == 0
        (table,) = (name for name in whole if "embed" in name or "wte" in name)
        assert not any("lm_head" in name for name in whole)
        broken = {table: tiny.damaged(whole[table])}
        assert perplexity.compare(folder, broken, text, window=16).difference.value != 0


class Counting:
    """A model that says the next number after each token."""

    def run(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = torch.nn.functional.one_hot(input_ids + 1, 20).float()
        return types.SimpleNamespace(logits=logits)


def test_canaries_count_the_tokens_before_the_first_other_one() -> None:
    check = Continuation("numbers", "3", 4)
    assert perplexity._continued(Counting(), [2, 3], 4) == [4, 5, 6, 7]
    for dense, same in ([4, 5, 6, 7], 4), ([4, 5, 9, 10], 2), ([5, 6, 7, 8], 0), ([4, 5, 6, 6], 3):
        assert perplexity._kept(Counting(), [2, 3], dense, check).quantised == same


def test_the_end_of_a_long_prompt_is_what_is_gone_on_from() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(one) for one in text.split()]}

    check = Continuation("numbers", "1 2 3 4 5", 4)
    assert perplexity._prompt(tokenizer, check, 7) == [3, 4, 5]
    assert perplexity._prompt(tokenizer, check, None) == [1, 2, 3, 4, 5]


def test_canaries_longer_than_the_model_are_cut_in_front(tmp_path: Path, text: Path) -> None:
    folder = tiny.make_llama(tmp_path / "short", positions=16)
    report = perplexity.compare(folder, tiny.linears(folder), text)
    assert len(report.canaries) == 8
    assert all(one.passed for one in report.canaries)
    (tmp_path / "long.toml").write_text(CANARIES.replace("= 6", "= 16"))
    with pytest.raises(ConfigError, match=r"canary 'kettle': .* the model takes 16"):
        perplexity.compare(folder, tiny.linears(folder), text, canaries=tmp_path / "long.toml")


def test_what_is_wrong_is_one_line(folder: Path, text: Path, tmp_path: Path) -> None:
    tensors = tiny.linears(folder)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    wrong: list[tuple[type[VqError], str, dict[str, object]]] = [
        (ContainerError, "can't be read", {"text": tmp_path / "none.txt"}),
        (ContainerError, "can't be read", {"text": tmp_path / "latin.txt"}),
        (ContainerError, "1 tokens; give a text", {"text": tmp_path / "empty.txt"}),
        (SpecError, "a window of 161 tokens, but the model takes 2 to 160", {"window": 161}),
        (SpecError, "a window of 1 tokens", {"window": 1}),
        (SpecError, "a stride of 9 tokens", {"window": 8, "stride": 9}),
        (TensorError, "no quantised tensor is for this model", {"quantised": {}}),
        (
            TensorError,
            "'elsewhere' names no weight",
            {"quantised": {"elsewhere": tensors[DAMAGED]}},
        ),
        (
            TensorError,
            "two tensors are for the weight",
            {"quantised": {DAMAGED: tensors[DAMAGED], DAMAGED[:-7]: tensors[DAMAGED]}},
        ),
        (
            TensorError,
            "it was made for another model",
            {"quantised": {DAMAGED: tiny.exact(tiny.weights(folder)[DAMAGED].T.contiguous())}},
        ),
        (ContainerError, "is no folder", {"model_folder": tmp_path / "none"}),
    ]
    for kind, message, fields in wrong:
        given = {"model_folder": folder, "quantised": tensors, "text": text, **fields}
        with pytest.raises(kind, match=message) as caught:
            perplexity.compare(**given)
        assert "\n" not in str(caught.value)


def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path, text: Path) -> None:
    folder = tiny.make_llama(tmp_path / "llama")
    tensors = tiny.linears(folder)
    whole = tiny.weights(folder)
    kept = {name: one for name, one in whole.items() if name != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContainerError, match=r"holds no 'lm_head.weight'"):
        perplexity.compare(folder, tensors, text)
    (folder / "model.safetensors").unlink()
    torch.save(whole, folder / "pytorch_model.bin")  # a pickle, which transformers would take
    with pytest.raises(ContainerError, match="can't be loaded as AutoModelForCausalLM"):
        perplexity.compare(folder, tensors, text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(UnsupportedError, match="is quantised already"):
        perplexity.compare(folder, tensors, text)


def test_nan_is_told_and_whose_it_is(folder: Path, text: Path) -> None:
    huge = tiny.exact(torch.full_like(tiny.weights(folder)[DAMAGED], 3e38))
    with pytest.raises(TensorError, match="the quantised model gives NaN or infinity"):
        perplexity.compare(folder, {DAMAGED: huge}, text)


def test_without_transformers_the_command_is_told(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(BackendError, match=r"transformers can't be imported .*pip install"):
        perplexity.compare(folder, {}, text)
