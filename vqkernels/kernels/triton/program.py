"""Program: one Triton kernel with its constants, launched here or compiled for another machine.

The same description serves both, so that what is inspected without a GPU is what runs on one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqkernels.device import Device

__all__ = ["Program", "pointer_dtypes", "shared_bytes"]

# Triton's names of torch's dtypes.
_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.int32: "i32",
}

# Found by `Program.shared_bytes`. A shape shows only in which sizes are 1 or divide by 16, so the
# layers of a model share theirs.
_SHARED: dict[tuple[str, int, int, int], int] = {}


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
        return triton.compile(self._source(), target=_target(arch), options=self._options())

    def shared_bytes(self, arch: int) -> int:
        """Shared memory of a block on `sm_<arch>`, exact, without compiling to machine code."""
        source = self._source()
        key = (source.hash(), arch, self.num_warps, self.num_stages)
        if key not in _SHARED:
            try:
                _SHARED[key] = _allocate(source, _target(arch), self._options())
            except (AttributeError, ImportError, TypeError):
                # stages and passes are Triton's own affair, and another version may differ: as
                # exact, in twice the time
                _SHARED[key] = self.compile(arch).metadata.shared
        return _SHARED[key]

    def _options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def _source(self) -> Any:
        """The function with what the launcher would find out of its arguments.

        In the launcher's own form, empty hints and order too: Triton's disk cache is keyed by it,
        so that what another process compiled is found when it is launched.
        """
        names = self.function.arg_names
        kinds = {name: f"*{dtype}" for name, dtype in self.pointers.items()}
        kinds |= dict.fromkeys(self.numbers, "i32")
        signature = {name: kinds.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        # from the values, as the launcher: torch aligns to 16 bytes and more
        aligned = [*self.pointers, *(n for n, value in self.numbers.items() if value % 16 == 0)]
        # 1 is folded into the code by the launcher, as a constant
        for name, value in self.numbers.items():
            if value == 1:
                signature[name], constants[(names.index(name),)] = "constexpr", 1
        hints = {
            (at,): [["tt.divisibility", 16]] if name in aligned else []
            for at, name in enumerate(names)
        }
        return ASTSource(self.function, signature, dict(sorted(constants.items())), hints)


def shared_bytes(programs: Sequence[Program], device: Device) -> int:
    """Shared memory of the largest block that `programs` launch.

    0 where no compiler can tell: under the interpreter, which replaces the functions, and on what
    isn't an NVIDIA GPU.
    """
    arch = re.fullmatch(r"sm_(\d+)", device.arch)
    compiled = all(isinstance(program.function, triton.JITFunction) for program in programs)
    if device.kind != "cuda" or arch is None or not compiled:
        return 0
    return max(program.shared_bytes(int(arch[1])) for program in programs)


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def _allocate(source: Any, target: GPUTarget, options: Mapping[str, int]) -> int:
    """Bytes that Triton's own passes allocate: its stages up to that point, before LLVM and ptxas.

    What a block needs are copies between layouts, partial sums of warps and pipelined operands, as
    these passes leave them: no formula of tile sizes follows them. Half the time of a whole
    compilation: 0.23 s of 0.46 s on average over configs of all kernels (Triton 3.7.1).
    """
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options
    from triton.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    builtins = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, *builtins, context)
    metadata: dict[str, Any] = {}
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    # the head of the stage `llir`, which goes on to LLVM
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    ptx = get_ptx_version_from_options(parsed, target.arch)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, ptx)
    manager.run(module, "allocate")
    return int(module.get_int_attr("ttg.shared"))


def pointer_dtypes(**tensors: Any) -> dict[str, str]:
    """`pointers` of a Program from torch dtypes."""
    return {name: _DTYPES[dtype] for name, dtype in tensors.items()}
