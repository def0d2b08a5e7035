"""One matrix over several ranks (tensor parallelism), and whole again, bit for bit.

By row, a rank holds some output features: it computes its part of `y`. By column, it holds some
input features: from its part of `x` it computes a partial sum of `y`, and the ranks' sums add up.
A slice is a QuantizedTensor like any other, for every kernel; vectors, groups of codebooks and
blocks of a rotation are never cut in two, so that shares can be uneven.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vqkernels.errors import SpecError, TensorError, UnsupportedError
from vqkernels.parallel.columns import Columns, column_places, share_sizes
from vqkernels.parts import part_table
from vqkernels.source import Outline
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["Slice", "SplitAxis", "merge", "split"]

SplitAxis = Literal["row", "column"]

_TOGETHER = "give the slices of one matrix, one of each rank"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """What one rank holds of a matrix.

    tensor: the rank's own matrix, `[stop - start, k]` by row and `[n, stop - start]` by column.
    whole: what it is a slice of. The bias goes with the rows; by column, rank 0 has all of it.
    start, stop: the rank's output (row) or input (column) features.
    positions: where the slice's stored columns lie among the whole's, `[stop - start]` ascending,
        int64; only of a column slice of a permuted matrix, otherwise they are start..stop-1.
    """

    tensor: QuantizedTensor
    whole: Outline
    axis: SplitAxis
    rank: int
    ranks: int
    start: int
    stop: int
    positions: Tensor | None = None


def split(tensor: QuantizedTensor, ranks: int, axis: SplitAxis) -> list[Slice]:
    """`tensor` cut for `ranks` ranks, as evenly as its format allows; `merge` is the inverse.

    Parts may share memory with the tensor's. Raises UnsupportedError where the format can't be
    cut so often, or, by column, where a permutation leaves no place for an exact cut.
    """
    if axis not in ("row", "column"):
        raise SpecError(f"a split by {axis!r}; use 'row' or 'column'")
    if ranks < 1:
        raise UnsupportedError(f"a split for {ranks} ranks; use 1 or more")
    whole = Outline(spec=tensor.spec, n=tensor.n, k=tensor.k, bias=tensor.bias is not None)
    shares = _row_shares(tensor, ranks) if axis == "row" else _column_shares(tensor, whole, ranks)
    slices, start = [], 0
    for rank, (part, positions) in enumerate(shares):
        stop = start + (part.n if axis == "row" else part.k)
        slices.append(
            Slice(
                tensor=part,
                whole=whole,
                axis=axis,
                rank=rank,
                ranks=ranks,
                start=start,
                stop=stop,
                positions=positions if axis == "column" and tensor.spec.permuted else None,
            )
        )
        start = stop
    return slices


def merge(slices: Sequence[Slice]) -> QuantizedTensor:
    """The matrix that `split` cut into `slices`, in any order: every part as it was.

    Raises TensorError where they aren't the slices of one matrix, or where ranks differ in what
    all of them have (a codebook, a scale of the tensor).
    """
    ordered = sorted(slices, key=lambda one: one.rank)
    _check_together(ordered)
    whole = ordered[0].whole
    table = part_table(whole.spec, whole.n, whole.k, bias=whole.bias)
    if ordered[0].axis == "row":
        _check_formats(ordered, [whole.spec] * len(ordered))
        parts = {name: _joined_rows(name, ordered) for name in table}
    else:
        columns = [Columns(whole.spec, _positions(one), one.start) for one in ordered]
        _check_positions(ordered, columns)
        parts = {name: _joined_columns(name, ordered, columns) for name in table}
    return QuantizedTensor(whole.spec, whole.n, whole.k, parts)


# ------------------------------------------------------------------------------------------------
# cutting


def _even(places: Sequence[int], ranks: int) -> list[int]:
    """`ranks + 1` of `places` (0 and the size with them), each the next to where it would be."""
    size, last = places[-1], len(places) - 1
    chosen = [0]
    for rank in range(1, ranks):
        ideal = rank * size / ranks
        at = bisect.bisect_left(places, ideal)
        if ideal - places[at - 1] <= places[at] - ideal:
            at -= 1
        chosen.append(min(max(at, chosen[-1] + 1), last - (ranks - rank)))
    return [places[number] for number in chosen] + [size]


def _row_shares(tensor: QuantizedTensor, ranks: int) -> list[tuple[QuantizedTensor, None]]:
    places = [*range(0, tensor.n, row_step(tensor.spec)), tensor.n]
    if ranks >= len(places):
        raise UnsupportedError(
            f"{tensor.n} outputs can't be cut for {ranks} ranks: the format has {len(places) - 1} "
            f"whole vectors or groups of rows; use fewer ranks, or split by column"
        )
    bounds = itertools.pairwise(_even(places, ranks))
    return [(tensor.rows(start, stop), None) for start, stop in bounds]


def _column_shares(
    tensor: QuantizedTensor, whole: Outline, ranks: int
) -> list[tuple[QuantizedTensor, Tensor]]:
    features = _features(tensor)
    shares: list[Columns] = []
    for sizes in share_sizes(tensor.spec):
        places = column_places(tensor.spec, features, sizes)
        if ranks >= len(places):
            mixed = ", mixed by its permutation" if tensor.spec.permuted else ""
            raise UnsupportedError(
                f"{tensor.k} inputs can't be cut for {ranks} ranks: the format's vectors, groups "
                f"or rotation{mixed}, leave {len(places) - 1} whole; use fewer ranks, or split by "
                f"row"
            )
        shares = [
            Columns(tensor.spec, ((features >= start) & (features < stop)).nonzero()[:, 0], start)
            for start, stop in itertools.pairwise(_even(places, ranks))
        ]
        if all(share.exact for share in shares):
            break
    assert all(share.exact for share in shares), "whole blocks and groups lie as they lay"
    return [
        (_column_slice(tensor, whole, share, first=rank == 0), share.positions)
        for rank, share in enumerate(shares)
    ]


def _features(tensor: QuantizedTensor) -> Tensor:
    """The input feature of each stored column."""
    if tensor.spec.permuted:
        return tensor.parts["permutation"].long().cpu()
    return torch.arange(tensor.k)


def _column_slice(
    tensor: QuantizedTensor, whole: Outline, share: Columns, *, first: bool
) -> QuantizedTensor:
    spec, k = share.own_spec, len(share.positions)
    parts = {}
    for name, entry in part_table(spec, whole.n, k, bias=whole.bias and first).items():
        part = tensor.parts[name]
        if name == "permutation":
            part = part.long() - share.start
        if (selected := share.selected(name)) is not None:
            dim, index = selected
            part = part.index_select(dim, index.to(part.device))
        parts[name] = part.to(entry.dtype)
    return QuantizedTensor(spec, whole.n, k, parts)


# ------------------------------------------------------------------------------------------------
# joining


def _positions(one: Slice) -> Tensor:
    return torch.arange(one.start, one.stop) if one.positions is None else one.positions


def _check_together(slices: Sequence[Slice]) -> None:
    if not slices:
        raise TensorError(f"no slices to merge; {_TOGETHER}")
    first, start = slices[0], 0
    if [one.rank for one in slices] != list(range(first.ranks)):
        found = ", ".join(str(one.rank) for one in slices)
        raise TensorError(f"slices of ranks {found}, but there are {first.ranks}; {_TOGETHER}")
    for one in slices:
        if (one.whole, one.axis, one.ranks) != (first.whole, first.axis, first.ranks):
            raise TensorError(f"rank {one.rank} is of another matrix than rank 0; {_TOGETHER}")
        sides = {"row": (one.stop - one.start, first.whole.k)}
        sides["column"] = (first.whole.n, one.stop - one.start)
        if one.start != start or (one.tensor.n, one.tensor.k) != sides[one.axis]:
            raise TensorError(
                f"rank {one.rank} is {one.tensor.n} x {one.tensor.k} and said to be features "
                f"{one.start} to {one.stop}, where {start} is the next; {_TOGETHER}"
            )
        start = one.stop
        has_bias = first.whole.bias and (one.axis == "row" or one.rank == 0)
        if ("bias" in one.tensor.parts) != has_bias:
            raise TensorError(
                f"rank {one.rank} {'lacks the' if has_bias else 'has a'} bias; {_TOGETHER}"
            )
        one.tensor.validate(f"rank {one.rank}")
    if start != (first.whole.n if first.axis == "row" else first.whole.k):
        raise TensorError(f"the slices end at feature {start}, not at the whole's; {_TOGETHER}")


def _check_positions(slices: Sequence[Slice], columns: Sequence[Columns]) -> None:
    every = torch.cat([share.positions for share in columns])
    if not torch.equal(every.sort().values, torch.arange(slices[0].whole.k)):
        raise TensorError(f"the slices' positions name a column twice or not at all; {_TOGETHER}")
    _check_formats(slices, [share.own_spec for share in columns])
    if inexact := [one.rank for one, share in zip(slices, columns, strict=True) if not share.exact]:
        raise TensorError(f"rank {inexact[0]}'s positions cut a group or vector; {_TOGETHER}")


def _check_formats(slices: Sequence[Slice], specs: Sequence[CodebookSpec]) -> None:
    for one, spec in zip(slices, specs, strict=True):
        if one.tensor.spec != spec:
            raise TensorError(f"rank {one.rank} has another format than its share; {_TOGETHER}")


def _joined_rows(name: str, slices: Sequence[Slice]) -> Tensor:
    pieces = [one.tensor.parts[name] for one in slices]
    return torch.cat(pieces) if _is_of_rows(name, slices[0].whole.spec) else _shared(name, slices)


def _is_of_rows(name: str, spec: CodebookSpec) -> bool:
    """Whether each row, vector or group of rows has its own of part `name`."""
    if name.startswith("codebook_"):
        return spec.group_axis == "row"
    if name in ("scale", "zero"):
        return (spec.scale_axis if name == "scale" else spec.zero_axis) == "row"
    return name in ("codes", "outlier_codes", "outliers", "uniform_codes", "bias")


def _joined_columns(name: str, slices: Sequence[Slice], columns: Sequence[Columns]) -> Tensor:
    """Part `name` of the whole, its columns or codebooks back in their order."""
    if columns[0].selected(name) is None:
        return _shared(name, slices)
    pieces, numbers, dim = [], [], 0
    for one, share in zip(slices, columns, strict=True):
        selected, part = share.selected(name), one.tensor.parts.get(name)
        if selected is None or part is None:  # a rank without outliers has no outlier codes
            continue
        dim, index = selected
        pieces.append(part.long() + one.start if name == "permutation" else part)
        numbers.append(index)
    order, repeats = _first_of_each(torch.cat(numbers))
    everything = torch.cat(pieces, dim)
    joined = everything.index_select(dim, order.to(everything.device))
    if repeats:
        for piece, index in zip(pieces, numbers, strict=True):
            if not _same(joined.index_select(dim, index.to(joined.device)), piece):
                raise TensorError(f"two ranks have another {name} of one group; {_TOGETHER}")
    return joined.to(slices[0].whole.table()[name].dtype)


def _first_of_each(numbers: Tensor) -> tuple[Tensor, bool]:
    """Where each of `numbers` stands first, by size, and whether any stands twice.

    Two ranks that share a group of columns both have its codebooks.
    """
    order = numbers.argsort(stable=True)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[1:] = numbers[order][1:] != numbers[order][:-1]
    return order[fresh], not bool(fresh.all())


def _shared(name: str, slices: Sequence[Slice]) -> Tensor:
    """Part `name`, which every rank that has it has whole."""
    # by column, only rank 0 has the bias, and only ranks with outliers have their codebook
    having = [one for one in slices if name in one.tensor.parts]
    first = having[0].tensor.parts[name]
    for one in having[1:]:
        if not _same(one.tensor.parts[name], first):
            raise TensorError(
                f"rank {one.rank} has another {name} than rank {having[0].rank}, where all ranks "
                f"have the same; {_TOGETHER}"
            )
    return first


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two parts of one shape hold the same bits: -0.0 isn't 0.0."""
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )
