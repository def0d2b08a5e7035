"""What surrounds the lookups of a linear layer: everything of a spec that isn't a codebook sum.

A kernel computes `core_y = core_x @ main.T` on whole cells (vectors). The rest is applied here,
around it, in torch:

    core_x   permutation, column scale, rotation, and cell order with its padding, applied to x
    core_y   cell order undone and padding dropped; then side columns, scale, zero and bias

so that a kernel knows only axis, stages, groups and subspaces. Where a format has none of these,
the kernel reads x and writes `out` itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vqkernels.kernel import Packed, Run
from vqkernels.parts import code_grid, codebook_sets
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, scaled_codebook, set_index

__all__ = [
    "books_bytes",
    "cell_columns",
    "core_shape",
    "pack_books",
    "pack_sets",
    "pack_sides",
    "set_axes",
    "share_books",
    "sides_bytes",
    "surround",
]

Core = Callable[[Packed, Tensor, Tensor], None]

# Arrays that change y after the core has written it.
_AFTER = frozenset({"side", "y_scale", "x_zero", "y_zero", "bias", "y_cells"})


def core_shape(spec: CodebookSpec, n: int, k: int) -> tuple[int, int]:
    """Columns of core_x and core_y: whole cells, padding included."""
    rows, columns = code_grid(spec, n, k)
    if spec.vector_axis == "in":
        return columns * spec.vector_length, rows * spec.vector_width
    return columns, rows * spec.vector_length


def cell_columns(spec: CodebookSpec, features: int) -> Tensor:
    """Feature that each element of the cells along the vector axis stands for, in cell order.

    Padding elements name `features`, one past the end.
    """
    block = spec.vector_length * spec.stride
    cells = -(-features // block) * spec.stride
    cell, element = torch.arange(cells)[:, None], torch.arange(spec.vector_length)
    feature = cell // spec.stride * block + cell % spec.stride + element * spec.stride
    return feature.flatten().clamp_max(features)


def pack_books(tensor: QuantizedTensor) -> Tensor:
    """All codebooks, `[sets * subspaces, sum of entries, vector_size]`, fp32, stages in order."""
    spec = tensor.spec
    stages = range(len(spec.stages))
    books = [scaled_codebook(spec, tensor.parts, stage, torch.float32) for stage in stages]
    return torch.cat(books, dim=2).flatten(0, 1).contiguous()


def set_axes(spec: CodebookSpec) -> tuple[bool, bool]:
    """Whether a cell's codebook number depends on its row, and on its column."""
    subspaces = spec.subspaces > 1
    along_in = spec.vector_axis == "in"
    return (
        spec.group_axis == "row" or (subspaces and not along_in),
        spec.group_axis == "column" or (subspaces and along_in),
    )


def pack_sets(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """`row_sets: [rows]` and `column_sets: [columns]`, whose sum is a cell's codebook number.

    Only those that `set_axes` names: each depends on one side alone.
    """
    spec = tensor.spec
    rows, columns = code_grid(spec, tensor.n, tensor.k)
    which = set_index(spec, tensor.n, tensor.k)
    by_row, by_column = set_axes(spec)
    arrays = {}
    if by_row:
        arrays["row_sets"] = which[:, 0].expand(rows).contiguous()
    if by_column:
        arrays["column_sets"] = (which[0] - which[0, 0]).expand(columns).contiguous()
    return arrays


def share_books(
    spec: CodebookSpec, books: Tensor, sets: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `pack_books` and `pack_sets` give, with equal sets kept once: fused weights repeat them.

    Only groups of rows are looked through; `row_sets` names what is kept.
    """
    if spec.group_axis != "row":
        return books, dict(sets)
    groups = books.view(-1, spec.subspaces, *books.shape[1:])
    kept: list[int] = []
    places: list[int] = []
    place_of: dict[bytes, int] = {}
    for number, group in enumerate(groups):
        digest = hashlib.sha256(group.numpy().tobytes()).digest()
        if place_of.setdefault(digest, len(kept)) == len(kept):
            kept.append(number)
        places.append(place_of[digest])
    if len(kept) == len(groups):
        return books, dict(sets)
    group, subspace = sets["row_sets"] // spec.subspaces, sets["row_sets"] % spec.subspaces
    row_sets = torch.tensor(places)[group] * spec.subspaces + subspace
    return groups[kept].flatten(0, 1), {**sets, "row_sets": row_sets}


def pack_sides(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The arrays that `surround` applies, in fp32; empty for a plain codebook format.

    Side columns `[side_columns, n]` and the rotation lie transposed: what a GPU's neighbouring
    threads read, one output each, is side by side.
    """
    spec, parts, k = tensor.spec, tensor.parts, tensor.k
    arrays: dict[str, Tensor] = {}
    for name, axis in (("scale", spec.scale_axis), ("zero", spec.zero_axis)):
        if axis != "none":
            side = "x" if axis == "column" else "y"
            arrays[f"{side}_{name}"] = parts[name].float()
    if spec.permuted:
        arrays["permutation"] = parts["permutation"].int()
    if spec.rotation_size:
        arrays["rotation"] = parts["rotation"].float().T.contiguous()
    if spec.side_columns:
        arrays["side"] = tensor.side_weight(torch.float32).T.contiguous()
    inside = spec.vector_axis == "in"
    features = k - spec.side_columns if inside else tensor.n
    cells = cell_columns(spec, features)
    if not torch.equal(cells, torch.arange(features)):
        arrays["x_cells" if inside else "y_cells"] = cells if inside else _inverse(cells, features)
    if tensor.bias is not None:
        arrays["bias"] = tensor.bias.float()
    return arrays


def books_bytes(problem: Problem) -> int:
    """Bytes of all codebooks in fp32."""
    spec = problem.spec
    sets = codebook_sets(spec, problem.n, problem.k) * spec.subspaces
    return sets * sum(spec.stages) * spec.vector_size * 4


def sides_bytes(problem: Problem) -> int:
    """Bytes of everything in `pack_sides`, bounded above: fp32 sides and 8-byte indices."""
    spec, n, k = problem.spec, problem.n, problem.k
    total = 4 * (n * spec.side_columns + spec.rotation_size**2 + n * problem.bias)
    total += 4 * sum(
        {"none": 0, "tensor": 1, "row": n, "column": k}[axis]
        for axis in (spec.scale_axis, spec.zero_axis)
    )
    padding = spec.vector_length * spec.stride
    # cell order names an int64 a feature, and is kept only where stride or padding change it
    return total + 8 * (k * spec.permuted + n + k + 2 * padding)


def surround(core: Core, problem: Problem) -> Run:
    """A Run from a core: whole cells, contiguous, x in the problem's dtype, y in that or fp32."""
    spec, n = problem.spec, problem.n
    _, width = core_shape(spec, n, problem.k)
    bare = _bare(problem)

    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        if bare and out.is_contiguous():
            core(packed, x.contiguous(), out)
            return
        core_x, side_x = _before(packed, spec, x)
        # y that has further to go is kept in fp32, so that it is rounded once
        whole = width == n and out.is_contiguous() and _AFTER.isdisjoint(packed.arrays)
        if whole or (width == n and out.is_contiguous() and out.dtype == torch.float32):
            core(packed, core_x, out)
            y = out
        else:
            y = torch.empty(x.shape[0], width, dtype=torch.float32, device=out.device)
            core(packed, core_x, y)
        if "y_cells" in packed:
            y = y[:, packed["y_cells"]]
        elif width != n:
            y = y[:, :n]
        _after(packed, x, side_x, y, out)

    return run


def _bare(problem: Problem) -> bool:
    """Whether nothing surrounds the lookups: 2 us of a launch's 15 are saved where one knows."""
    spec, n, k = problem.spec, problem.n, problem.k
    around = (spec.permuted, spec.rotation_size, spec.side_columns, spec.stride > 1, problem.bias)
    scaled = (spec.scale_axis, spec.zero_axis) != ("none", "none")
    return not any(around) and not scaled and core_shape(spec, n, k) == (k, n)


def _inverse(cells: Tensor, features: int) -> Tensor:
    """Position in cell order of each feature."""
    positions = torch.empty(features + 1, dtype=torch.int64)
    positions[cells] = torch.arange(len(cells))
    return positions[:features]


def _before(packed: Packed, spec: CodebookSpec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """core_x in x's dtype, and the side columns of x; what multiplies x does so in fp32."""
    side_x, dtype = None, x.dtype
    if "x_scale" in packed:
        x = x.float() * packed["x_scale"]
    if "permutation" in packed:
        x = x[:, packed["permutation"]]
    if "side" in packed:
        side_x, x = x[:, : spec.side_columns].float(), x[:, spec.side_columns :]
    if "rotation" in packed:
        blocks = x.float().reshape(x.shape[0], -1, spec.rotation_size)
        x = (blocks @ packed["rotation"]).reshape(x.shape[0], -1)
    if "x_cells" in packed:
        x = torch.nn.functional.pad(x, (0, 1))[:, packed["x_cells"]]
    return x.to(dtype).contiguous(), side_x


def _after(packed: Packed, x: Tensor, side_x: Tensor | None, y: Tensor, out: Tensor) -> None:
    """From core_y to `out`; in fp32 until the last store."""
    if side_x is not None:
        y = torch.addmm(y, side_x, packed["side"])
    if "y_scale" in packed:
        y = y * packed["y_scale"]
    if "x_zero" in packed:
        y = y + (x.float() @ packed["x_zero"])[:, None]
    if "y_zero" in packed:
        y = y + x.float().sum(dim=1, keepdim=True) * packed["y_zero"]
    if "bias" in packed:
        y = y + packed["bias"]
    if y is not out:
        out.copy_(y)
