"""QuantizedTensor: a matrix as named parts, checked against its spec, and its exact decode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.parts import (
    BitCount,
    check_fit,
    check_shape,
    code_grid,
    effective_bits,
    part_table,
)
from vqkernels.spec import CodebookSpec

__all__ = ["QuantizedTensor", "random_tensor"]

_PIECE = 1 << 18  # codes that are checked at once


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantised `W[n, k]`: its spec and the parts that `part_table` names, on one device."""

    spec: CodebookSpec
    n: int
    k: int
    parts: Mapping[str, Tensor]

    @property
    def bits(self) -> BitCount:
        """Bits of the stored matrix, by role."""
        return effective_bits([(self.spec, self.n, self.k)])

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias `[n]`, if it has one."""
        return self.parts.get("bias")

    def validate(self, name: str = "tensor") -> None:
        """Raise TensorError unless every part is present, well-shaped, finite and in range.

        An unchecked code is an out-of-bounds read on a GPU, so kernels only ever see tensors
        that passed here.
        """
        try:
            check_shape(self.spec, self.n, self.k)
        except UnsupportedError as error:
            raise TensorError(f"{name}: {error}") from error
        table = part_table(self.spec, self.n, self.k, bias="bias" in self.parts)
        if missing := sorted(set(table) - set(self.parts)):
            raise TensorError(f"{name}: part {missing[0]!r} is missing; quantise the layer again")
        if extra := sorted(set(self.parts) - set(table)):
            raise TensorError(f"{name}: part {extra[0]!r} is not part of its format; remove it")
        for part_name, part in table.items():
            value = self.parts[part_name]
            if tuple(value.shape) != part.shape or value.dtype != part.dtype:
                raise TensorError(
                    f"{name}: {part_name} is {value.dtype} {list(value.shape)}, but the format "
                    f"needs {part.dtype} {list(part.shape)}"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise TensorError(f"{name}: {part_name} holds NaN or infinity; re-quantise it")
        self._check_codes(name)

    def _check_codes(self, name: str) -> None:
        limits = {"outlier_codes": self.spec.outlier_entries}
        limits["uniform_codes"] = 1 << self.spec.uniform_bits
        for stage, entries in enumerate(self.spec.stages):
            _check_range(name, f"codes of stage {stage}", self.parts["codes"][..., stage], entries)
        for part, entries in limits.items():
            if part in self.parts:
                _check_range(name, part, self.parts[part], entries)
        if "permutation" in self.parts:
            order = self.parts["permutation"].long().sort().values
            if not torch.equal(order, torch.arange(self.k, device=order.device)):
                raise TensorError(
                    f"{name}: permutation names an input twice or out of 0..{self.k - 1}; "
                    f"copy or make it again"
                )

    def main_rows(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The main columns `[n, k - side_columns]`, before rotation: sums of stored entries."""
        return decode_main(self.spec, self.n, self.k, self.parts, dtype)

    def side_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Outlier and uniform columns `[n, side_columns]`, in stored order."""
        if self.spec.side_columns:
            return decode_sides(self.n, self.parts, dtype)
        return torch.zeros(self.n, 0, dtype=dtype, device=self.parts["codes"].device)

    def stored_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """`[side columns | main columns]` before rotation, permutation, scale and zero.

        Sums in a fixed order, element by element: the same bits on every machine, which a
        rotation (a matrix product) couldn't promise. The container's checksum is taken of it.
        """
        return torch.cat([self.side_weight(dtype), self.main_rows(dtype)], dim=1)

    def decode(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The exact decode `[n, k]`: every stored entry as it is, summed in `dtype`."""
        spec, parts = self.spec, self.parts
        main = self.main_rows(dtype)
        if spec.rotation_size:
            rotation = parts["rotation"].to(dtype)
            main = (main.reshape(self.n, -1, spec.rotation_size) @ rotation).reshape(self.n, -1)
        weight = torch.cat([self.side_weight(dtype), main], dim=1)
        if spec.permuted:
            restored = torch.empty_like(weight)
            restored[:, parts["permutation"].long()] = weight
            weight = restored
        if spec.scale_axis != "none":
            weight = weight * _along(parts["scale"].to(dtype), spec.scale_axis)
        if spec.zero_axis != "none":
            weight = weight + _along(parts["zero"].to(dtype), spec.zero_axis)
        return weight

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor with its parts on `device`."""
        moved = {name: part.to(device) for name, part in self.parts.items()}
        return dataclasses.replace(self, parts=moved)

    def widened(self) -> QuantizedTensor:
        """The same tensor with 16-bit codes as int32: CUDA has few operations on uint16."""
        wide = {
            name: part.to(torch.int32) if part.dtype == torch.uint16 else part
            for name, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=wide)

    def replace_parts(self, **parts: Tensor) -> QuantizedTensor:
        """The same tensor with some parts exchanged."""
        return dataclasses.replace(self, parts={**self.parts, **parts})

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Output rows `start..stop-1` as a tensor of their own.

        `start` must be a multiple of `row_step`, so that no vector, group of codebooks or cycle
        of subspaces is cut; so must `stop`, or be `n`.
        """
        spec, parts = self.spec, dict(self.parts)
        step = row_step(spec)
        assert start % step == 0 and (stop % step == 0 or stop == self.n), (start, stop, step)
        # rows of codes for every `block` rows of the matrix
        block, lanes = spec.vector_width, 1
        if spec.vector_axis == "out":
            block, lanes = spec.vector_length * spec.stride, spec.stride
        parts["codes"] = parts["codes"][start // block * lanes : -(-stop // block) * lanes]
        if spec.group_axis == "row":
            sets = slice(start // spec.group_size, -(-stop // spec.group_size))
            for name in parts:
                if name.startswith("codebook_"):
                    parts[name] = parts[name][sets]
        if "outlier_codes" in parts:
            length = spec.outlier_vector_length
            parts["outlier_codes"] = parts["outlier_codes"][start // length : -(-stop // length)]
        for name in ("outliers", "uniform_codes", "bias"):
            if name in parts:
                parts[name] = parts[name][start:stop]
        for name, axis in (("scale", spec.scale_axis), ("zero", spec.zero_axis)):
            if axis == "row":
                parts[name] = parts[name][start:stop]
        return QuantizedTensor(spec, stop - start, self.k, parts)


def row_step(spec: CodebookSpec) -> int:
    """The smallest number of output rows at which `QuantizedTensor.rows` can cut."""
    steps = [spec.vector_width]
    if spec.vector_axis == "out":
        block = spec.vector_length * spec.stride
        # a block holds `stride` vectors; the next one must start at subspace 0 again
        steps.append(block * (spec.subspaces // math.gcd(spec.subspaces, spec.stride)))
    if spec.group_axis == "row":
        steps.append(spec.group_size)
    if spec.outlier_vector_length:
        steps.append(spec.outlier_vector_length)
    return math.lcm(*steps)


def _check_range(name: str, part: str, codes: Tensor, entries: int) -> None:
    # torch compares uint16 on no backend yet; int32 holds every code, but all of them at once
    # would be as large as the matrix
    pieces = torch.split(codes, max(1, _PIECE // codes.shape[1]))
    top = max(int(piece.to(torch.int32).max()) for piece in pieces)
    if top >= entries:
        raise TensorError(
            f"{name}: {part} reach {top}, but the codebook has {entries} entries; "
            f"its codes or codebook were damaged or are another's: copy or make it again"
        )


def _along(values: Tensor, axis: str) -> Tensor:
    return values[:, None] if axis == "row" else values


def set_index(spec: CodebookSpec, n: int, k: int) -> Tensor:
    """Number of the codebook in `[sets * subspaces]` for each cell: `[rows, columns]`, int64.

    Either side may be 1 where the number doesn't depend on it.
    """
    rows, columns = code_grid(spec, n, k)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    along, other = (column, row * spec.vector_width) if spec.vector_axis == "in" else (row, column)
    # with a stride, `stride` interleaved vectors share one block of vector_length * stride
    feature = along // spec.stride * spec.stride * spec.vector_length
    if spec.group_axis == "tensor":
        group = torch.zeros(1, 1, dtype=torch.int64)
    else:
        inside = (spec.group_axis == "column") == (spec.vector_axis == "in")
        group = (feature if inside else other) // spec.group_size
    if spec.subspaces == 1:
        return group
    return group * spec.subspaces + along % spec.subspaces


def scaled_codebook(
    spec: CodebookSpec, parts: Mapping[str, Tensor], stage: int, dtype: torch.dtype
) -> Tensor:
    """Codebook of `stage` times coefficient and int8 scale: `[sets, subspaces, entries, size]`."""
    book = parts[f"codebook_{stage}"].to(dtype)
    if spec.codebook_dtype == "int8":
        book = book * parts["codebook_scale"][:, :, stage, None, None].to(dtype)
    return book * spec.coefficient(stage)


def unblock(spec: CodebookSpec, vectors: Tensor) -> Tensor:
    """`[rows, columns, vector_size]` decoded cells as a matrix, padding still on."""
    rows, columns, _ = vectors.shape
    width, length = spec.vector_width, spec.vector_length
    if spec.vector_axis == "out":
        blocks = vectors.reshape(rows // spec.stride, spec.stride, columns, length)
        return blocks.permute(0, 3, 1, 2).reshape(rows * length, columns)
    blocks = vectors.reshape(rows, columns // spec.stride, spec.stride, width, length)
    return blocks.permute(0, 3, 1, 4, 2).reshape(rows * width, columns * length)


def decode_main(
    spec: CodebookSpec, n: int, k: int, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """Main columns `[n, k - side_columns]` from codes and codebooks, summed in stage order."""
    codes = parts["codes"]
    which = set_index(spec, n, k).to(codes.device)
    total: Tensor | None = None
    for stage, entries in enumerate(spec.stages):
        book = scaled_codebook(spec, parts, stage, dtype).reshape(-1, spec.vector_size)
        vectors = book[which * entries + codes[..., stage].long()]
        total = vectors if total is None else total + vectors
    assert total is not None, "a spec has a stage at least"
    return unblock(spec, total)[:n, : k - spec.side_columns]


def decode_sides(n: int, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Side columns `[n, side_columns]` from their parts, at least one column."""
    columns = []
    if "outliers" in parts:
        columns.append(parts["outliers"].to(dtype))
    if "outlier_codes" in parts:
        vectors = parts["outlier_codebook"].to(dtype)[parts["outlier_codes"].long()]
        columns.append(vectors.transpose(1, 2).reshape(-1, vectors.shape[1])[:n])
    if "uniform_codes" in parts:
        scale, zero = parts["uniform_scale"].to(dtype), parts["uniform_zero"].to(dtype)
        columns.append(parts["uniform_codes"].to(dtype) * scale + zero)
    return torch.cat(columns, dim=1)


def random_tensor(
    spec: CodebookSpec, n: int, k: int, *, seed: int = 0, bias: bool = False, fit: bool = True
) -> QuantizedTensor:
    """A tensor of uniformly random codes and normal codebooks, for shapes without weights.

    Later stages shrink by 4, as residuals do; a decoded weight has a spread of about 1. Raises
    UnsupportedError where the layer can't hold the format; with `fit` off, a small matrix may
    have fewer vectors than entries.
    """
    if fit:
        check_fit(spec, n, k)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Tensor] = {}
    for name, part in part_table(spec, n, k, bias=bias).items():
        if part.limit:
            parts[name] = _random_codes(spec, name, part.shape, part.dtype, generator)
        elif name == "permutation":
            parts[name] = torch.randperm(k, generator=generator).to(part.dtype)
        elif name == "rotation":
            square = torch.randn(part.shape, generator=generator)
            parts[name] = torch.linalg.qr(square).Q.to(part.dtype).contiguous()
        else:
            parts[name] = _random_values(name, part.shape, part.dtype, generator)
    return QuantizedTensor(spec, n, k, parts)


def _random_codes(
    spec: CodebookSpec,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    if name != "codes":
        entries = spec.outlier_entries if name == "outlier_codes" else 1 << spec.uniform_bits
        return torch.randint(entries, shape, generator=generator, dtype=torch.int32).to(dtype)
    stages = [
        torch.randint(entries, shape[:2], generator=generator, dtype=torch.int32)
        for entries in spec.stages
    ]
    return torch.stack(stages, dim=-1).to(dtype)


def _random_values(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int32).to(dtype)
    values = torch.randn(shape, generator=generator)
    if name == "codebook_scale":
        return 2.0 ** -torch.arange(shape[-1]).expand(shape) * (values.abs() + 1) / 128
    if name == "scale":
        return (0.5 + values.abs()).to(dtype)
    if name == "uniform_scale":
        return ((0.5 + values.abs()) / 128).to(dtype)
    if name.startswith("codebook_"):
        return (values / 4.0 ** int(name.removeprefix("codebook_"))).to(dtype)
    return values.to(dtype)
