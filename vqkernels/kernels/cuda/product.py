"""The host half that the launchers of lookup products share: constants, footprint, launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Packed, Run
from vqkernels.kernels import layout
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.linear import books_bytes, core_shape, set_axes, sides_bytes, surround
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

_TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.uint8: "vq::u8",
    torch.uint16: "vq::u16",
    torch.int32: "vq::u32",
}


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
        "X": _TYPES[problem.torch_dtype],
        "Entry": _TYPES[layout.books_dtype(problem)],
        "Code": _TYPES[layout.code_dtype(problem, code_layout)],
        "Out": _TYPES[torch.float32 if parts > 1 else problem.torch_dtype],
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
    """Codes, codebooks and sides; x and y in fp32 while they are transformed, and partial sums."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    weight = layout.codes_bytes(problem, config.text("layout")) + sides_bytes(problem)
    weight += books_bytes(problem) + 4 * (rows + columns)
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    workspace = 4 * problem.m * (2 * width_x + (2 + (parts if parts > 1 else 0)) * width_y)
    return Footprint(weight, workspace, problem.flops, shared_bytes)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes in the config's layout."""
    return Packed(layout.arrays(tensor, config.text("layout"), problem))


def compiler(programs: Callable[[Config, Problem], tuple[Program, ...]]) -> Compile:
    """The `compile` of a kernel file whose one program writes spans of fp32 sums, or `out`."""

    def compile(config: Config, problem: Problem, device: Device) -> Run:
        (product,) = programs(config, problem)
        parts = product.grid[2]
        # y in x's type, or in fp32 where it goes on: a launcher each, the first made now
        usual = torch.float32 if parts > 1 else problem.torch_dtype
        launchers = {usual: Launcher(product, device)}

        def launcher(dtype: torch.dtype) -> Launcher:
            if dtype not in launchers:
                launchers[dtype] = Launcher(writing(product, dtype), device)
            return launchers[dtype]

        def core(packed: Packed, x: Tensor, out: Tensor) -> None:
            given = {**arrays_of(packed), "x": aligned(x)}
            if parts == 1:
                launcher(out.dtype)({**given, "out": out})
                return
            partial = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
            launcher(torch.float32)({**given, "out": partial})
            out.copy_(partial.sum(dim=0))

        return surround(core, problem)

    return compile


def writing(program: Program, dtype: torch.dtype) -> Program:
    """The same program with an output of `dtype`."""
    return program.replace(types={**program.types, "Out": _TYPES[dtype]})


def aligned(x: Tensor) -> Tensor:
    """`x` where 16-byte loads can read it: a view into another tensor may begin anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def arrays_of(packed: Packed) -> Mapping[str, Tensor]:
    """What a launch passes of the packed weight."""
    names = ("codes", "books", "row_sets", "column_sets", "scales")
    return {name: packed[name] for name in names if name in packed}
