"""What surrounds a product on a GPU, in at most two launches: prologue.cuh and epilogue.cuh.

    prologue   core_x from x, where the format changes x; what a zero and side columns need of x
    epilogue   y from the spans of a product: side columns, scale, zero, bias, cell order, padding

The values are those of `vqkernels.kernels.linear`, in fp32 until the store. A product whose text
ends in `store_sum` (include/linear.cuh) stores y itself where one span, scale and bias are all that
is left: `store` says so, and no epilogue is launched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Packed, Run
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import C_TYPES, Program
from vqkernels.kernels.linear import core_shape
from vqkernels.problem import Problem
from vqkernels.spec import ScaleAxis

__all__ = [
    "aligned",
    "changes_x",
    "epilogue",
    "prologue",
    "store",
    "surround",
    "workspace_bytes",
]

Core = Callable[[Packed, Tensor, Tensor], None]
Constants = dict[str, int | bool | str | tuple[int, ...]]

_WARP = 32
_THREADS = 128
# Tokens of a block where it reads what all of them need: a rotation, or the side columns' weights.
_SHARED_BY = 4
# Enough for a sum over x, few enough for every thread of the epilogue to add up.
_MOST_SUMS = 16
# Blocks of a prologue on a multiprocessor; with more, a thread takes several elements.
_WAVES = 16

_BEFORE = ("x_scale", "x_zero", "permutation", "rotation")
_AFTER = ("side", "y_scale", "y_zero", "bias")
_DENSE = torch.contiguous_format


def changes_x(problem: Problem) -> bool:
    """Whether a product reads anything but x itself."""
    spec = problem.spec
    if spec.permuted or spec.rotation_size or spec.side_columns or spec.scale_axis == "column":
        return True
    width, _ = core_shape(spec, problem.n, problem.k)
    return spec.vector_axis == "in" and (spec.stride > 1 or width != problem.k)


def workspace_bytes(problem: Problem, parts: int) -> int:
    """Bytes of core_x, of what is set apart of x, and of the sums before the epilogue, at most."""
    spec = problem.spec
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    core = problem.torch_dtype.itemsize * width_x
    return problem.m * (core + 4 * (spec.side_columns + _MOST_SUMS + parts * width_y))


# ------------------------------------------------------------------------------------------------
# programs


def store(problem: Problem, parts: int) -> Constants:
    """Constants of a product whose text ends in `store_sum`: what it stores y with, if it does."""
    spec = problem.spec
    if parts > 1 or spec.side_columns or spec.zero_axis != "none":
        return {"FINAL": False}
    return {"FINAL": True} | _scale_and_bias(problem)


def prologue(problem: Problem, device: Device) -> Program | None:
    """The launch before a product; None where that reads x itself and no zero sums over x."""
    spec, changes = problem.spec, changes_x(problem)
    summed = spec.zero_axis != "none"
    if not (changes or summed):
        return None
    x, tokens = C_TYPES[problem.torch_dtype], _tokens(problem)
    width, _ = core_shape(spec, problem.n, problem.k)
    # a float for each warp and token of a sum, and for each thread and token of a rotation
    floats = tokens * (_THREADS // _WARP + (_THREADS if spec.rotation_size else 0))
    written = {"out": changes, "apart": bool(spec.side_columns or summed)}
    return Program(
        kernel="prologue",
        types={"X": x, "Entry": "float", "Code": "vq::u8", "Out": x},
        constants=_cells(problem)
        | {
            "TOKENS": tokens,
            "CORE": changes,
            "PERMUTED": spec.permuted,
            "X_SCALE": spec.scale_axis == "column",
            "X_ZERO": spec.zero_axis == "column",
            "SUMS": summed,
            "ROTATION": spec.rotation_size,
        },
        numbers=_numbers(problem, device) | {"width": width},
        grid=(-(-problem.m // tokens), _blocks(problem, device), 1),
        threads=_THREADS,
        shared_bytes=4 * floats,
        writes=tuple(name for name, writes in written.items() if writes),
    )


def epilogue(
    problem: Problem, device: Device, parts: int, sums: torch.dtype | None = None
) -> Program | None:
    """The launch after a product that leaves `parts` spans of `sums`; None where these are y.

    sums: None for a product that can leave either y's dtype or fp32.
    """
    spec, left = problem.spec, sums or torch.float32
    summed = spec.zero_axis != "none"
    _, width = core_shape(spec, problem.n, problem.k)
    reordered = width != problem.n or (spec.vector_axis == "out" and spec.stride > 1)
    scaled = spec.scale_axis in ("tensor", "row")
    is_y = parts == 1 and sums in (None, problem.torch_dtype)
    if is_y and not (reordered or scaled or summed or spec.side_columns or problem.bias):
        return None
    tokens = min(_SHARED_BY, problem.m) if spec.side_columns else 1
    x, y = C_TYPES[left], C_TYPES[problem.torch_dtype]
    return Program(
        kernel="epilogue",
        types={"X": x, "Entry": "float", "Code": "vq::u8", "Out": y},
        constants=_cells(problem)
        | _scale_and_bias(problem)
        | {"TOKENS": tokens, "SUMS": summed, "Y_ZERO": _along(spec.zero_axis)},
        numbers=_numbers(problem, device) | {"width": width, "spans": parts},
        grid=(-(-problem.m // tokens), -(-problem.n // _THREADS), 1),
        threads=_THREADS,
    )


def _cells(problem: Problem) -> Constants:
    spec = problem.spec
    return {
        "LENGTH": spec.vector_length,
        "CELL_STRIDE": spec.stride,
        "ALONG_IN": spec.vector_axis == "in",
        "SIDE": spec.side_columns,
    }


def _scale_and_bias(problem: Problem) -> Constants:
    spec = problem.spec
    return {"CELL_STRIDE": spec.stride, "Y_SCALE": _along(spec.scale_axis), "BIAS": problem.bias}


def _along(axis: ScaleAxis) -> str:
    return f"vq::Along::{axis if axis in ('tensor', 'row') else 'none'}"


def _numbers(problem: Problem, device: Device) -> dict[str, int]:
    summed = problem.spec.zero_axis != "none"
    sums = min(_MOST_SUMS, _blocks(problem, device)) if summed else 0
    return {"m": problem.m, "n": problem.n, "k": problem.k, "sums": sums}


def _tokens(problem: Problem) -> int:
    """Tokens of a block of the prologue."""
    return min(_SHARED_BY, problem.m) if problem.spec.rotation_size else 1


def _blocks(problem: Problem, device: Device) -> int:
    """Blocks of the prologue along the columns: with a rotation, one for each warp of them."""
    width, _ = core_shape(problem.spec, problem.n, problem.k)
    if problem.spec.rotation_size:
        return -(-width // _WARP)
    enough = -(-_WAVES * device.units // problem.m)
    return min(-(-max(width, problem.k) // _THREADS), enough)


# ------------------------------------------------------------------------------------------------
# launches


def surround(
    core: Core,
    problem: Problem,
    device: Device,
    *,
    parts: int = 1,
    sums: torch.dtype | None = None,
    final: bool = False,
) -> Run:
    """A Run from a core, as `linear.surround` makes one of torch's operations.

    core: `core(packed, x, y)` with x whole cells, contiguous and aligned to 16 bytes. y is out,
    [m, n], where nothing comes after or the core stores y itself (`final`); else
    `[parts, m, width]`, which the epilogue adds, of dtype `sums`: None, which is fp32 here, for a
    core that can leave out's dtype too.
    """
    before = prologue(problem, device)
    after = None if final else epilogue(problem, device, parts, sums)
    prepare = None if before is None else _preparing(before, problem, device)
    finish = None if after is None else Launcher(after, device)
    _, width = core_shape(problem.spec, problem.n, problem.k)
    dtype = sums or torch.float32

    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        x = x.contiguous()
        apart: dict[str, Tensor] = {}
        if prepare is not None:
            x, apart = prepare(packed, x)
        y = out if out.is_contiguous() else torch.empty_like(out, memory_format=_DENSE)
        if finish is None:
            core(packed, aligned(x), y)
        else:
            left = torch.empty(parts, problem.m, width, dtype=dtype, device=out.device)
            core(packed, aligned(x), left)
            finish({**arrays_of(packed, _AFTER), **apart, "x": left, "out": y})
        if y is not out:
            out.copy_(y)

    return run


def _preparing(
    before: Program, problem: Problem, device: Device
) -> Callable[[Packed, Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """The prologue's launch: core_x (x itself where it stays), and what is set apart by name."""
    launch = Launcher(before, device)
    m, dtype = problem.m, problem.torch_dtype
    width, columns = before.numbers["width"], problem.spec.side_columns + before.numbers["sums"]

    def prepare(packed: Packed, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        written: dict[str, Tensor] = {}
        if "out" in before.writes:
            written["out"] = torch.empty(m, width, dtype=dtype, device=x.device)
        if "apart" in before.writes:
            written["apart"] = torch.empty(m, columns, dtype=torch.float32, device=x.device)
        launch({**arrays_of(packed, _BEFORE), **written, "x": x})
        return written.pop("out", x), written

    return prepare


def aligned(x: Tensor) -> Tensor:
    """`x` where 16-byte loads can read it: a view into another tensor may begin anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def arrays_of(packed: Packed, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of a packed weight's arrays that a launch passes."""
    return {name: packed[name] for name in names if name in packed}
