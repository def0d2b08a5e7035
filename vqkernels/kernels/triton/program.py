"""Program: one Triton kernel with its constants, launched here or compiled for another machine.

The same description serves both, so that what is inspected without a GPU is what runs on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqkernels.kernels.triton.layout import triton_dtype

__all__ = ["Program"]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A `@triton.jit` function, its arguments by name, constants, grid and launch options.

    pointers: dtype of each pointer argument, in Triton's names. numbers: the int32 arguments.
    """

    function: Any
    pointers: Mapping[str, str]
    numbers: Mapping[str, int]
    constants: Mapping[str, Any]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int = 2

    def replace(self, **fields: Any) -> Program:
        """The same program with some fields exchanged."""
        return dataclasses.replace(self, **fields)

    def launch(self, tensors: Mapping[str, Tensor]) -> None:
        """Run on the current stream."""
        self.function[self.grid](
            **{name: tensors[name] for name in self.pointers},
            **self.numbers,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )

    def compile(self, arch: int) -> Any:
        """The compiled kernel for `sm_<arch>`; needs no driver. Holds `asm` and `metadata`."""
        names = self.function.arg_names
        kinds = {name: f"*{dtype}" for name, dtype in self.pointers.items()}
        kinds |= dict.fromkeys(self.numbers, "i32")
        signature = {name: kinds.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        # what the launcher finds out from the values: torch aligns to 16 bytes and more
        aligned = [*self.pointers, *(n for n, value in self.numbers.items() if value % 16 == 0)]
        # 1 is folded into the code by the launcher, as a constant
        for name, value in self.numbers.items():
            if value == 1:
                signature[name], constants[(names.index(name),)] = "constexpr", 1
        hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(self.function, signature, constants, hints)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def pointer_dtypes(**tensors: Any) -> dict[str, str]:
    """`pointers` of a Program from torch dtypes."""
    return {name: triton_dtype(dtype) for name, dtype in tensors.items()}
