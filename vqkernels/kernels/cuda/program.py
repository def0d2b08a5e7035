"""Program: one CUDA kernel with its constants; its text and its machine code.

The text is a handful of lines: the kernel's header, a struct of constants and types, and one
`extern "C"` function. So a compiler without a GPU, a CPU and the driver all get the same kernel.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vqkernels.kernels.cuda import compiler
from vqkernels.kernels.cuda.compiler import Compiled

__all__ = ["C_TYPES", "Arguments", "Program"]

ENTRY = "vq_kernel"  # the function's name in every text

C_TYPES = MappingProxyType(
    {
        torch.float32: "float",
        torch.float16: "__half",
        torch.bfloat16: "__nv_bfloat16",
        torch.uint8: "vq::u8",
        torch.uint16: "vq::u16",
        torch.int32: "vq::u32",
    }
)


class Arguments(ctypes.Structure):
    """`vq::Arguments` of include/linear.cuh, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "books")),
        *((name, ctypes.c_void_p) for name in ("row_sets", "column_sets")),
        *((name, ctypes.c_void_p) for name in ("scales", "out")),
        *((name, ctypes.c_int32) for name in ("m", "k", "width", "rows", "columns")),
        *((name, ctypes.c_int32) for name in ("words", "span")),
        *((name, ctypes.c_void_p) for name in ("x_scale", "x_zero", "permutation", "rotation")),
        *((name, ctypes.c_void_p) for name in ("side", "y_scale", "y_zero", "bias", "apart")),
        *((name, ctypes.c_int32) for name in ("n", "spans", "sums")),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """`vq::<kernel>` of `<kernel>.cuh`, for one struct of constants.

    types: X, Entry, Code, Out in C++. constants: int and bool constants, enumerators, and tuples,
    which become functions of a stage. numbers: fields of Arguments that a problem fixes.
    shared_bytes: dynamic shared memory of a block. resident: the argument, if any, that the launch
    asks L2 to keep. cluster: blocks along x that run together, sm_90 on. dependent: the launch may
    begin before the one ahead of it has ended, and waits where it says so; sm_90 on.
    asks L2 to keep. writes: the arguments that it writes, from the first element to the last.
    """

    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, int | bool | str | tuple[int, ...]]
    numbers: Mapping[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    resident: str = ""
    cluster: int = 1
    dependent: bool = False
    writes: tuple[str, ...] = ("out",)

    def replace(self, **fields: Any) -> Program:
        """The same program with some fields exchanged."""
        return dataclasses.replace(self, **fields)

    def declaration(self, entry: str = ENTRY) -> str:
        """The struct of constants and the function `entry`, without includes."""
        types = [f"    using {name} = {kind};" for name, kind in self.types.items()]
        constants = [_constant(name, value) for name, value in self.constants.items()]
        return "\n".join(
            (
                f"struct {entry}_constants {{",
                *types,
                *constants,
                f"    static constexpr int THREADS = {self.threads};",
                "};",
                f'extern "C" __global__ void __launch_bounds__({self.threads}, 1)',
                f"{entry}(const vq::Arguments<{entry}_constants> a) {{ vq::{self.kernel}(a); }}",
                "",
            )
        )

    def text(self) -> str:
        """A whole translation unit."""
        return f"#include <{self.kernel}.cuh>\n\n{self.declaration()}"

    def compile(self, arch: int) -> Compiled:
        """Machine code for `sm_<arch>`; needs no driver. Raises BackendError."""
        return dataclasses.replace(
            compiler.compile_text(self.text(), arch), shared_bytes=self.shared_bytes
        )

    def arguments(self, tensors: Mapping[str, Tensor]) -> Arguments:
        """The buffer that a launch passes; a tensor that isn't there is null."""
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        return Arguments(**pointers, **self.numbers)


def _constant(name: str, value: int | bool | str | tuple[int, ...]) -> str:
    if isinstance(value, tuple):
        cases = "".join(f"stage == {s} ? {v} : " for s, v in enumerate(value[:-1]))
        return f"    VQ_CONSTANT int {name}(int stage) {{ return {cases}{value[-1]}; }}"
    if isinstance(value, bool):
        return f"    static constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"    static constexpr int {name} = {value};"
    return f"    static constexpr auto {name} = {value};"
