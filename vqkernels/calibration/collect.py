"""Moments from a torch module that runs over batches: forward hooks on its linear layers."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.calibration.moments import (
    Calibration,
    CalibrationWarning,
    check_holdout,
    moments_of,
    warn_of_few,
)
from vqkernels.calibration.sums import Sums
from vqkernels.errors import TensorError
from vqkernels.nn import VQLinear

__all__ = ["collect"]

Forward = Callable[[nn.Module, Any], object]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    full: bool = True,
    holdout: float = 0.1,
    forward: Forward | None = None,
) -> Calibration:
    """Moments of what each `nn.Linear` and VQLinear of `model` is given while it runs `batches`.

    batches: each a tensor (`model(x)`), a tuple or list (`model(*batch)`) or a mapping, as
        tokenisers give (`model(**batch)`); moved to where the model is. In a mapping, tokens where
        `attention_mask: [batch, tokens]` is 0 don't count.
    layers: modules, or their weights, by glob (`*.query`, `*.query.weight`); None: all.
    full: whether to keep X^T X, 8 bytes for each of `[k, k]` while the model runs, or the diagonal
        alone.
    holdout: share of the samples (rows of a batch's first axis) that count in no moment and that
        `inputs` is drawn from: every tenth for 0.1.
    forward: how to run a batch, instead: `forward(model, batch)`.

    The model runs in evaluation mode without gradients, and is left as it was, whatever happens.
    Sums are float64 and the same on any number of threads; what the model computes need not be.
    A layer that sees its input in another order than the batch's (an expert of several) counts
    every token, and holds out none.

    Raises TensorError for a glob that names no linear layer, an input that isn't finite, and a
    batch without tensors. Warns (CalibrationWarning) of layers that no token reached, and where
    there are fewer tokens than inputs.
    """
    check_holdout(holdout)
    sites = _sites(model, layers)
    sums = {module: Sums(module.in_features, full=full) for module in sites}
    place = next((one.device for one in (*model.parameters(), *model.buffers())), None)
    run = forward or _forward
    split = _Split(holdout)
    with _evaluating(model), contextlib.ExitStack() as hooks, torch.no_grad():
        for module, names in sites.items():
            hook = _hook(sums[module], split, names[0])
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            moved = batch if place is None else _moved(batch, place)
            split.enter(moved)
            run(model, moved)
    named = {name: sums[module] for module, names in sites.items() for name in names}
    _warn_of_unreached([name for name, one in named.items() if not one.count], len(named))
    found = moments_of(named)
    warn_of_few(found)
    return Calibration(found)


class _Split:
    """Which rows of a batch count, and which are held out: by sample and token."""

    def __init__(self, holdout: float) -> None:
        self._holdout, self._samples = holdout, 0
        self._held = torch.zeros(0, dtype=torch.bool)
        self._mask = torch.ones(0, 0, dtype=torch.bool)

    def enter(self, batch: Any) -> None:
        """Take up the next batch."""
        self._mask = _mask(batch)
        samples = len(self._mask)
        ends = torch.arange(self._samples, self._samples + samples + 1) * self._holdout + 0.5
        # a part of 1e-9 for what 0.1 * 10 loses to rounding
        self._held = (ends + 1e-9).double().floor().diff() > 0
        self._samples += samples

    def rows(self, lead: torch.Size) -> tuple[Tensor, Tensor]:
        """Of inputs `[*lead, k]`, as rows: which count, and which are held out."""
        count, (samples, tokens) = math.prod(lead), self._mask.shape
        if lead == (samples * tokens,) or lead[:2] == (samples, tokens):
            mask = self._mask.flatten()
            held = self._held.repeat_interleave(tokens)
        elif lead[:1] == (samples,):
            mask, held = torch.ones(samples, dtype=torch.bool), self._held
        else:
            mask, held = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        each = count // max(1, len(mask))
        mask, held = mask.repeat_interleave(each), held.repeat_interleave(each)
        return mask & ~held, mask & held


def _hook(
    sums: Sums, split: _Split, name: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = x.detach().reshape(-1, x.shape[-1])
        count, held = split.rows(x.shape[:-1])
        sums.add(rows[count.to(rows.device)], name)
        sums.hold(rows[held.to(rows.device)], name)

    return hook


def _mask(batch: Any) -> Tensor:
    """Which tokens of a batch count: `[samples, tokens]`, on the CPU."""
    if isinstance(batch, Tensor):
        found: list[Any] = [batch]
    else:
        found = list(batch.values() if isinstance(batch, Mapping) else batch)
    tensors = [one for one in found if isinstance(one, Tensor) and one.ndim]
    if not tensors:
        raise TensorError(
            "collect: a batch holds no tensor; give tensors (a tokeniser's return_tensors='pt')"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.cpu() != 0
    return torch.ones(tensors[0].shape[:2] + (1,) * (2 - tensors[0].ndim), dtype=torch.bool)


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def _moved(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(place)
    if isinstance(batch, Mapping):
        return {name: _moved(one, place) for name, one in batch.items()}
    if isinstance(batch, tuple | list):
        return [_moved(one, place) for one in batch]
    return batch


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module is put back into its own."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _sites(model: nn.Module, layers: Sequence[str] | None) -> dict[nn.Linear | VQLinear, list[str]]:
    """Linear layers, each with every name that it has."""
    names: dict[nn.Linear | VQLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | VQLinear):
            names.setdefault(module, []).append(name)
    if not names:
        raise TensorError("collect: the model has no linear layer; give one that has")
    if layers is None:
        return names
    every = [name for own in names.values() for name in own]
    wanted = set()
    for glob in layers:
        found = {name for name in every if _matches(name, glob)}
        if not found:
            raise TensorError(
                f"collect: {glob!r} names no linear layer; there are {every[0]!r} and "
                f"{len(every) - 1} more"
            )
        wanted |= found
    chosen = {module: [n for n in own if n in wanted] for module, own in names.items()}
    return {module: own for module, own in chosen.items() if own}


def _matches(module: str, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in (module, f"{module}.weight"))


def _warn_of_unreached(names: Sequence[str], layers: int) -> None:
    if len(names) == layers:
        raise TensorError("collect: no token reached any layer; give batches that do")
    if names:
        warnings.warn(
            f"collect: no token reached {len(names)} of {layers} layers ({names[0]}); they are "
            f"left out",
            CalibrationWarning,
            stacklevel=3,
        )
