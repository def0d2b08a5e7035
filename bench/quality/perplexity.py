"""A causal language model before and after: how well it foretells a text, and canaries.

The text is one row of tokens, read in windows that overlap: a window gives each token that none
before it has scored the context of all tokens before it in the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotune.verdict import t_quantile
from bench.conversion import progress
from bench.quality.canaries import OWN as OWN_CANARIES
from bench.quality.canaries import CanaryResult, Continuation, load_canaries
from bench.quality.loading import (
    LoadedModel,
    dense_config,
    load_model,
    load_tokenizer,
    max_positions,
)
from vqkernels.errors import ConfigError, ContainerError, SpecError, TensorError
from vqkernels.tensor import QuantizedTensor

__all__ = ["Mean", "PerplexityReport", "Window", "compare", "windows"]

LEVEL = 0.95

_WINDOW = 1024  # tokens, where the model was made for as many
_PIECE = 256  # tokens whose logits are widened at once: 128 MiB at 128 Ki tokens in float32


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens `start..stop-1`, of which `first..stop-1` are scored."""

    start: int
    first: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over tokens, in nats, and its standard error: None of a single window.

    Windows, not tokens, are taken as independent: the error is that of a ratio of two sums over
    windows (Cochran, "Sampling Techniques", 1977, section 6.4).
    """

    value: float
    error: float | None
    windows: int

    def interval(self) -> tuple[float, float] | None:
        """Bounds of 95 %, by Student's t; None of a single window."""
        if self.error is None:
            return None
        reach = t_quantile((1 + LEVEL) / 2, self.windows - 1) * self.error
        return self.value - reach, self.value + reach


@dataclasses.dataclass(frozen=True)
class PerplexityReport:
    """Mean negative log-likelihood of a token, in nats, and what follows from it.

    model, text: names of the folder and the file.
    weights: how many of the model's matrices are quantised here.
    tokens: how many were scored, each once, in windows of `window` that start `stride` apart.
    difference: quantised minus dense, token by token, so that its error is that of a pair.
    """

    model: str
    text: str
    weights: int
    tokens: int
    window: int
    stride: int
    dense: Mean
    quantised: Mean
    difference: Mean
    canaries: tuple[CanaryResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Dense, quantised, and their difference, whose perplexity is a ratio."""
        return [
            _row("dense", self.dense),
            _row("quantised", self.quantised),
            _row("difference (perplexity: ratio)", self.difference),
        ]

    def canary_rows(self) -> list[dict[str, Any]]:
        """A row a canary."""
        return [canary.to_dict() for canary in self.canaries]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("model", "text", "weights", "tokens", "window", "stride")
        figures = {name: _figures(getattr(self, name)) for name in ("dense", "quantised")}
        return {
            **{name: getattr(self, name) for name in names},
            **figures,
            "difference": _figures(self.difference),
            "canaries": self.canary_rows(),
        }


def compare(
    model_folder: Path,
    quantised: Mapping[str, QuantizedTensor],
    text: Path,
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    canaries: Path = OWN_CANARIES,
    kernels: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PerplexityReport:
    """Perplexity of the UTF-8 file `text` with the dense model and with `quantised` in it.

    model_folder: a dense causal language model's, whose tensors `quantised` names.
    window: tokens that the model reads at once; what it was made for, 1,024 at most, unasked.
    stride: tokens from one window's start to the next one's; half a window unasked.
    tokens: score no more of the text than these first ones.
    canaries: a TOML file; the package's own unasked.
    kernels: run the quantised layers by our kernels, not by their exact decode.
    dtype: of weights and products, on the CPU.

    Changes no file. Raises BackendError without transformers, ConfigError for the canaries,
    ContainerError or UnsupportedError for folder and text, SpecError for a window that does not
    fit, TensorError for tensors that aren't the model's, or a model that gives NaN.
    """
    checks = load_canaries(canaries).continuations
    window, stride = _sizes(model_folder, window, stride)
    tokenizer = load_tokenizer(model_folder)
    ids = _ids(tokenizer, text, tokens)
    limit = max_positions(dense_config(model_folder))
    prompts = [_prompt(tokenizer, one, limit) for one in checks]
    model = load_model(model_folder, "AutoModelForCausalLM", dtype=dtype)
    model.check_vocabulary(int(ids.max()))
    parts = list(windows(len(ids), window, stride))
    with progress(len(parts)) as begin:
        dense = _all_losses(model, ids, parts, "dense", begin)
        greedy = [
            _continued(model, prompt, one.tokens)
            for prompt, one in zip(prompts, checks, strict=True)
        ]
        places = model.put(quantised, kernels=kernels)
        after = _all_losses(model, ids, parts, "quantised", begin)
    return PerplexityReport(
        model=model_folder.resolve().name,
        text=text.name,
        weights=len(places),
        tokens=sum(map(len, dense)),
        window=window,
        stride=stride,
        dense=_mean(dense),
        quantised=_mean(after),
        difference=_mean([two - one for one, two in zip(dense, after, strict=True)]),
        canaries=tuple(
            _kept(model, prompt, found, one)
            for prompt, found, one in zip(prompts, greedy, checks, strict=True)
        ),
    )


def windows(count: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over `count` tokens; each token but the first is scored once, in the first window
    that gives it a context.

    Where `stride` is `window`, the first token of each window has none, and is not scored.
    """
    scored = 0
    for start in range(0, count, stride):
        stop = min(start + window, count)
        first = max(scored, start + 1)
        if first < stop:
            yield Window(start, first, stop)
        scored = stop
        if stop == count:
            return


# ------------------------------------------------------------------------------------------------
# what is read


def _sizes(folder: Path, window: int | None, stride: int | None) -> tuple[int, int]:
    limit = max_positions(dense_config(folder))
    window = min(limit or _WINDOW, _WINDOW) if window is None else window
    if window < 2 or (limit is not None and window > limit):
        raise SpecError(
            f"{folder}: a window of {window} tokens, but the model takes 2 to {limit or 'any'}; "
            f"choose another window"
        )
    stride = max(1, window // 2) if stride is None else stride
    if not 0 < stride <= window:
        raise SpecError(f"a stride of {stride} tokens: it has to be from 1 to the window, {window}")
    return window, stride


def _ids(tokenizer: Any, path: Path, tokens: int | None) -> Tensor:
    """The text's tokens, with the tokenizer's own marks at the ends, as int64."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ContainerError(f"{path}: can't be read ({error}); give a UTF-8 text file") from error
    ids = tokenizer(text, verbose=False)["input_ids"]
    if tokens is not None:
        ids = ids[: tokens + 1]  # the first is scored by nothing
    if len(ids) < 2:
        raise ContainerError(f"{path}: {len(ids)} tokens; give a text of two at least")
    return torch.tensor(ids, dtype=torch.int64)


def _prompt(tokenizer: Any, check: Continuation, limit: int | None) -> list[int]:
    """The prompt's tokens: the last ones, where the model takes no more."""
    ids = list(map(int, tokenizer(check.prompt)["input_ids"]))
    room = len(ids) if limit is None else limit - check.tokens
    if room < 1 or not ids:
        raise ConfigError(
            f"canary {check.name!r}: {len(ids)} tokens to go on from, {check.tokens} to come, but "
            f"the model takes {limit or 'any'}; choose another canary"
        )
    return ids[-room:]


# ------------------------------------------------------------------------------------------------
# what the model says


def _all_losses(
    model: LoadedModel,
    ids: Tensor,
    parts: Sequence[Window],
    which: str,
    begin: Callable[[str], Callable[[str], None]],
) -> list[Tensor]:
    """Those of each window."""
    step, found = begin(which), []
    for part in parts:
        found.append(_losses(model, ids, part, which))
        step(which)
    return found


def _losses(model: LoadedModel, ids: Tensor, part: Window, which: str) -> Tensor:
    """Negative log-likelihood of each scored token of a window, float64."""
    logits = _logits(model, ids[part.start : part.stop - 1])[part.first - part.start - 1 :]
    wanted = ids[part.first : part.stop]
    pieces = zip(torch.split(logits, _PIECE), torch.split(wanted, _PIECE), strict=True)
    losses = torch.cat(
        [nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in pieces]
    )
    if not bool(torch.isfinite(losses).all()):
        raise TensorError(
            f"{model.folder}: the {which} model gives NaN or infinity at token {part.first} and "
            f"on; check its weights, or compute in float32"
        )
    return losses.double()


def _logits(model: LoadedModel, ids: Tensor) -> Tensor:
    """`[tokens, vocabulary]` for one row of tokens."""
    logits: Tensor = model.run(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def _mean(parts: Sequence[Tensor]) -> Mean:
    """The mean over all tokens, with windows as what varies."""
    sums = [math.fsum(part.tolist()) for part in parts]
    counts = [len(part) for part in parts]
    total, size = sum(counts), len(parts)
    value = math.fsum(sums) / total
    if size < 2:
        return Mean(value, None, size)
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Mean(value, math.sqrt(squares * size / (size - 1)) / total, size)


# ------------------------------------------------------------------------------------------------
# canaries


def _continued(model: LoadedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow, each the likeliest."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(_logits(model, torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def _kept(
    model: LoadedModel, prompt: Sequence[int], dense: Sequence[int], check: Continuation
) -> CanaryResult:
    """How many of the dense model's tokens still are the likeliest, up to the first that isn't."""
    # greedy decoding goes the dense way up to there, so that one pass shows all of it
    ids = torch.tensor([*prompt, *dense[:-1]])
    found = _logits(model, ids)[len(prompt) - 1 :].argmax(dim=-1).tolist()
    pairs = list(zip(found, dense, strict=True))
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return CanaryResult(check.name, "continuation", check.tokens, check.tokens, same)


# ------------------------------------------------------------------------------------------------
# what is reported


def _figures(mean: Mean) -> dict[str, Any]:
    bounds = mean.interval() or (None, None)
    return {
        "nll": mean.value,
        "error": mean.error,
        "low": bounds[0],
        "high": bounds[1],
        **{
            f"perplexity{name}": None if value is None else _exp(value)
            for name, value in zip(("", "_low", "_high"), (mean.value, *bounds), strict=True)
        },
    }


def _exp(value: float) -> float | None:
    """None where a float holds no such number: no JSON has infinity."""
    return math.exp(value) if value < 700 else None


def _row(name: str, mean: Mean) -> dict[str, Any]:
    return {"weights": name, **_figures(mean)}
