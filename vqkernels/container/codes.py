"""Codes to stored parts and back: bitstreams, ANS streams and usage (see `stored`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.container import entropy
from vqkernels.container.manifest import Coding, TensorInfo
from vqkernels.container.stored import (
    CODES_PER_WORD,
    packed_bytes,
    stage_bits,
    stored_grid,
)
from vqkernels.errors import ContainerError, TensorError
from vqkernels.packing import pack_codes, unpack_codes
from vqkernels.source import Outline
from vqkernels.spec import CodebookSpec

__all__ = ["check_expansion", "check_usage", "restore_codes", "store_codes"]

_PIECE = 1 << 19  # code bits worked on at once: less than 1 MB of temporary numbers

# Bytes that one part more takes at most: 63 of padding, and the entries of part, pad and checksum.
_PART_COST = 320

_MAX_CELLS = 1 << 31

_AGAIN = "copy the file again from its source, or quantise again"


def store_codes(
    codes: Tensor, outline: Outline, *, usage: bool, ans: bool
) -> tuple[tuple[Coding, ...], dict[str, Tensor]]:
    """How each stage of `codes: [rows, columns, stages]` is coded, and the parts that hold them.

    usage: whether each stage's usage is stored. ans: whether stages that get smaller by it are
    coded by ANS, counting what that needs besides. Raises BackendError for `ans` without
    constriction.
    """
    grid = _in_order(codes, outline.spec)
    counts = [_count(grid[..., s], entries) for s, entries in enumerate(outline.spec.stages)]
    streams = _streams(grid, counts, outline, usage=usage) if ans else {}
    packed = [stage for stage in range(len(counts)) if stage not in streams]
    parts = {}
    if packed:
        parts["codes"] = _pack(grid, packed, outline.spec)
    parts |= {f"ans_{stage}": torch.from_numpy(words) for stage, words in streams.items()}
    for stage, count in enumerate(counts):
        if usage or stage in streams:
            parts[f"usage_{stage}"] = torch.from_numpy(_narrow(count))
    coding = tuple[Coding, ...]("ans" if s in streams else "packed" for s in range(len(counts)))
    return coding, parts


def restore_codes(parts: Mapping[str, Tensor], info: TensorInfo, where: str) -> Tensor:
    """The codes of `part_table` from stored parts, whose checksums, shapes and dtypes are right.

    Raises ContainerError and TensorError, which start with `where`, and BackendError for ANS
    without constriction.
    """
    rows, columns = stored_grid(info)
    part = info.table()["codes"]
    kind: Any = np.uint8 if part.dtype == torch.uint8 else np.uint16
    grid = np.empty((rows, columns, len(info.spec.stages)), kind)
    counts = _stored_counts(parts, info, where)
    packed = [stage for stage, coding in enumerate(info.coding) if coding == "packed"]
    if packed:
        _unpack(parts["codes"], grid, packed, info.spec, where)
    for stage, coding in enumerate(info.coding):
        if coding == "ans":
            words = parts[f"ans_{stage}"].numpy()
            name = f"{where}: ans_{stage}"
            symbols = entropy.decode(words, counts[stage], rows * columns, name)
            grid[..., stage] = symbols.reshape(rows, columns)
            # a state of 0 gives the first entry for ever, so a stream may end too early
            _check_counts(grid[..., stage], counts[stage], stage, where)
    turned = grid.transpose(1, 0, 2) if info.spec.traversal == "column" else grid
    return torch.from_numpy(np.ascontiguousarray(turned))


def check_expansion(info: TensorInfo, sizes: Mapping[str, int]) -> None:
    """Raise ContainerError where ANS streams of these bytes are too short for their codes.

    What is allocated for codes is bounded by the file's size so.
    """
    cells = math.prod(stored_grid(info))
    for stage, coding in enumerate(info.coding):
        words = sizes.get(f"ans_{stage}", 0) // 4
        if coding == "ans" and not cells <= min(words * CODES_PER_WORD, _MAX_CELLS - 1):
            raise ContainerError(f"ans_{stage} has {words:,} words for {cells:,} codes")


def check_usage(parts: Mapping[str, Tensor], codes: Tensor, where: str) -> None:
    """Raise ContainerError, which starts with `where`, where the stored usage isn't of `codes`."""
    for stage in range(codes.shape[2]):
        if (stored := parts.get(f"usage_{stage}")) is not None:
            _check_counts(codes[..., stage].numpy(), stored.numpy(), stage, where)


# ------------------------------------------------------------------------------------------------


def _in_order(codes: Tensor, spec: CodebookSpec) -> NDArray[Any]:
    """Codes as they are stored, row after row."""
    grid: NDArray[Any] = codes.numpy()
    return grid.transpose(1, 0, 2) if spec.traversal == "column" else grid


def _count(stage: NDArray[Any], entries: int) -> NDArray[np.int64]:
    """How often each entry occurs in `stage: [rows, columns]`."""
    step = max(1, _PIECE // (stage.shape[1] * 64))  # bincount widens to 64 bits
    counts = np.zeros(entries, np.int64)
    for start in range(0, len(stage), step):
        counts += np.bincount(stage[start : start + step].reshape(-1), minlength=entries)
    return counts


def _check_counts(stage: NDArray[Any], counts: NDArray[Any], number: int, where: str) -> None:
    if not np.array_equal(_count(stage, len(counts)), counts):
        raise ContainerError(f"{where}: usage_{number} is not of its codes; {_AGAIN}")


def _narrow(counts: NDArray[np.int64]) -> NDArray[Any]:
    kinds: tuple[Any, ...] = (np.uint8, np.uint16, np.uint32)
    return counts.astype(next(kind for kind in kinds if counts.max() <= np.iinfo(kind).max))


def _streams(
    grid: NDArray[Any], counts: Sequence[NDArray[np.int64]], outline: Outline, *, usage: bool
) -> dict[int, NDArray[np.uint32]]:
    """ANS streams of the stages that take fewer bytes so."""
    cells = math.prod(grid.shape[:2])
    packed, streams = list(range(grid.shape[2])), {}
    for stage, count in enumerate(counts):
        if len(count) < 2 or cells >= _MAX_CELLS:
            continue
        words = entropy.encode(np.ascontiguousarray(grid[..., stage], np.int32).reshape(-1), count)
        needs = words.nbytes + _PART_COST
        if not usage:
            needs += _narrow(count).nbytes + _PART_COST
        others = [other for other in packed if other != stage]
        saves = packed_bytes(outline, packed) - packed_bytes(outline, others)
        if needs < saves and cells <= len(words) * CODES_PER_WORD:
            streams[stage], packed = words, others
    return streams


def _pack(grid: NDArray[Any], stages: Sequence[int], spec: CodebookSpec) -> Tensor:
    bits = stage_bits(spec, stages)
    # packing spreads each bit over a byte, so a few rows at a time
    step = max(1, _PIECE // (grid.shape[1] * sum(bits)))
    pieces = (grid[start : start + step] for start in range(0, len(grid), step))
    return torch.cat([pack_codes(torch.from_numpy(piece[..., stages]), bits) for piece in pieces])


def _unpack(
    words: Tensor, grid: NDArray[Any], stages: Sequence[int], spec: CodebookSpec, where: str
) -> None:
    """Fill `stages` of `grid`; their range is checked first, which a narrower dtype would hide."""
    columns, bits = grid.shape[1], stage_bits(spec, stages)
    step = max(1, _PIECE // (columns * sum(bits)))
    for start in range(0, len(grid), step):
        codes = unpack_codes(words[start : start + step], columns, bits).numpy()
        if (top := int(codes.max())) >= spec.max_entries:
            raise TensorError(
                f"{where}: codes reach {top}, but the largest codebook has {spec.max_entries} "
                f"entries; the file was made for another codebook: quantise again"
            )
        grid[start : start + step][..., stages] = codes


def _stored_counts(
    parts: Mapping[str, Tensor], info: TensorInfo, where: str
) -> dict[int, NDArray[np.int64]]:
    """The stored usage by stage, once its sum and its dtype are right."""
    found = {}
    for stage in range(len(info.spec.stages)):
        if (stored := parts.get(f"usage_{stage}")) is None:
            continue
        counts = stored.numpy().astype(np.int64)
        cells = math.prod(stored_grid(info))
        if (total := int(counts.sum())) != cells:
            raise ContainerError(
                f"{where}: usage_{stage} counts {total:,} codes, but there are {cells:,}; {_AGAIN}"
            )
        if _narrow(counts).dtype != stored.numpy().dtype:
            raise ContainerError(
                f"{where}: usage_{stage} is wider than its largest count needs; {_AGAIN}"
            )
        found[stage] = counts
    return found
