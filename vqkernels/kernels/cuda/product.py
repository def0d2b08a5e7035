"""The host half that the launchers of lookup products share: constants, footprint, launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Packed, Run
from vqkernels.kernels import layout, linear
from vqkernels.kernels.cuda import around
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import C_TYPES, Program
from vqkernels.kernels.linear import books_bytes, core_shape, set_axes, sides_bytes
from vqkernels.parts import code_grid, codebook_sets
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "Compile",
    "arch",
    "book_entries",
    "compiler",
    "constants",
    "entry_bytes",
    "footprint",
    "numbers",
    "pack",
    "pack_sides",
    "spans",
    "types",
    "unsupported",
    "unsupported_product",
]

Compile = Callable[[Config, Problem, Device], Run]

# A vector lives in registers, fp32, for each row and token that a thread has in hand.
LONGEST = 32
MOST_STAGES = 4
MOST_TOKENS = 65_535  # blocks along y, on every architecture


def arch(device: Device) -> int:
    """Its compute capability, 90 for `sm_90`."""
    return int(device.arch.removeprefix("sm_"))


def unsupported(problem: Problem, device: Device) -> str | None:
    """The sentence that rules out what no CUDA kernel takes, or None."""
    if device.kind != "cuda":
        return f"CUDA kernels run on a GPU, not on {device.name}"
    if arch(device) < 80:
        return f"{device.name} is {device.arch}: the CUDA kernels need sm_80 or newer"
    if problem.spec.vector_length > LONGEST:
        return f"vectors of {problem.spec.vector_length}: the CUDA kernels hold up to {LONGEST}"
    if len(problem.spec.stages) > MOST_STAGES:
        return f"{len(problem.spec.stages)} stages: the kernels unroll up to {MOST_STAGES}"
    return None


def unsupported_product(problem: Problem, device: Device) -> str | None:
    """As `unsupported`, of the kernels whose grid has tokens on its second axis."""
    if problem.m > MOST_TOKENS:
        return (
            f"{problem.m:,} tokens: a grid's second axis ends at {MOST_TOKENS:,}; use cuda/dequant"
        )
    return unsupported(problem, device)


def types(problem: Problem, code_layout: str, parts: int) -> dict[str, str]:
    """C++ types of the arrays; `out` is in x's type, or fp32 where it holds several spans."""
    return {
        "X": C_TYPES[problem.torch_dtype],
        "Entry": C_TYPES[layout.books_dtype(problem)],
        "Code": C_TYPES[layout.code_dtype(problem, code_layout)],
        "Out": C_TYPES[torch.float32 if parts > 1 else problem.torch_dtype],
    }


def constants(problem: Problem, code_layout: str) -> dict[str, int | bool | str | tuple[int, ...]]:
    """The spec as constants of a kernel."""
    spec = problem.spec
    row_sets, column_sets = set_axes(spec)
    return {
        "STAGES": len(spec.stages),
        "LENGTH": spec.vector_length,
        "ALONG_IN": spec.vector_axis == "in",
        "ROW_SETS": row_sets,
        "COLUMN_SETS": column_sets,
        "LAYOUT": f"vq::Layout::{code_layout}",
        "entries": spec.stages,
        "bits": spec.code_bits,
    }


def numbers(problem: Problem, code_layout: str, span: int) -> dict[str, int]:
    """The sizes that every kernel takes."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    words = layout.numbers(problem)["WORDS"]
    return {
        "m": problem.m,
        "n": problem.n,
        "k": width_x,
        "width": width_y,
        "rows": rows,
        "columns": columns,
        "words": layout.row_words(problem) if code_layout == "words" else words,
        "span": span,
    }


def book_entries(problem: Problem) -> int:
    """Entries of all codebooks together."""
    spec = problem.spec
    return codebook_sets(spec, problem.n, problem.k) * spec.subspaces * sum(spec.stages)


def entry_bytes(problem: Problem) -> int:
    """Bytes of one entry as packed."""
    return problem.spec.vector_length * layout.books_dtype(problem).itemsize


def spans(problem: Problem, splits: int, unit: int) -> tuple[int, int]:
    """Spans that have any columns, and the columns of each: whole `unit`s, as even as they come."""
    _, columns = code_grid(problem.spec, problem.n, problem.k)
    units = -(-columns // unit)
    span = -(-units // splits) * unit
    return -(-columns // span), span


def footprint(config: Config, problem: Problem, parts: int, shared_bytes: int = 0) -> Footprint:
    """Codes, codebooks and sides; what surrounds the product, and partial sums."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    weight = layout.codes_bytes(problem, config.text("layout")) + sides_bytes(problem)
    weight += books_bytes(problem) + 4 * (rows + columns)
    workspace = around.workspace_bytes(problem, parts)
    return Footprint(weight, workspace, problem.flops, shared_bytes)


def pack(
    tensor: QuantizedTensor, config: Config, problem: Problem, *, shared: bool = True
) -> Packed:
    """Codes in the config's layout; equal codebook sets once, unless `shared` is off."""
    return Packed(_ordered(layout.arrays(tensor, config.text("layout"), problem, shared=shared)))


def pack_sides(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What the launches around a product read."""
    return _ordered(linear.pack_sides(tensor))


def _ordered(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the order of cells, which the launches around a product compute."""
    return {name: one for name, one in arrays.items() if not name.endswith("_cells")}


def compiler(programs: Callable[[Config, Problem], tuple[Program, ...]]) -> Compile:
    """The `compile` of a kernel file whose one program writes spans of fp32 sums, or `out`.

    A program with the constant FINAL stores y itself, as `around.store` says.
    """

    def compile(config: Config, problem: Problem, device: Device) -> Run:
        (product,) = programs(config, problem)
        parts, final = product.grid[2], bool(product.constants.get("FINAL"))
        if not final and around.epilogue(problem, device, parts) is not None:
            product = writing(product, torch.float32)
        launch = Launcher(product, device)

        def core(packed: Packed, x: Tensor, y: Tensor) -> None:
            launch({**arrays_of(packed), "x": x, "out": y})

        return around.surround(core, problem, device, parts=parts, final=final)

    return compile


def writing(program: Program, dtype: torch.dtype) -> Program:
    """The same program with an output of `dtype`."""
    return program.replace(types={**program.types, "Out": C_TYPES[dtype]})


def arrays_of(packed: Packed) -> Mapping[str, Tensor]:
    """What a launch passes of the packed weight."""
    names = ("codes", "books", "row_sets", "column_sets", "scales", "y_scale", "bias")
    return {name: packed[name] for name in names if name in packed}
