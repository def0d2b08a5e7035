"""AQLM's own kernels, from its wheel (Egiazarian et al., "Extreme Compression of Large Language
Models via Additive Quantization", 2024; `aqlm` 1.1.7), called as its QuantizedLinear calls them.

Up to 6 tokens the wheel multiplies from codes, token by token; above, it decodes the weight and
calls the BLAS. Layout: `codes: [n, k/d, stages]` as signed integers (`[k/d, n, stages]` on a CPU),
`codebooks: [stages, entries, 1, d]` and `scales: [n, 1, 1, 1]` in x's dtype. Each call makes a
tensor of its own, so a copy into `out` is in the time: about a microsecond on a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.available import PACKAGES, install_command
from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Space
from vqkernels.tensor import QuantizedTensor, scaled_codebook

__all__ = ["KERNELS"]

SPACE = Space()

# QuantizedLinear.prepare_matmul_op
MOST_TOKENS = 6

# What the CUDA kernels are written for: (stages, entries) to lengths.
_CUDA = {(1, 1 << 16): (8, 16), (2, 256): (8,), (1, 256): (8,)}


def _refused(problem: Problem) -> str | None:
    """What no kernel of AQLM takes, or that there is none."""
    if importlib.util.find_spec("aqlm") is None:
        return f"aqlm is not installed; run: {install_command(PACKAGES['aqlm'].requirement)}"
    spec = problem.spec
    plain = not (
        spec.side_columns
        or spec.permuted
        or spec.rotation_size
        or spec.zero_axis != "none"
        or spec.scale_axis not in ("none", "row")
    )
    if spec.vector_axis != "in" or spec.stride > 1 or not plain:
        return "AQLM's format is vectors along in with a scale a row, and nothing else"
    if spec.group_axis != "tensor" or spec.subspaces > 1:
        return "several codebook sets: AQLM has one"
    if len(set(spec.stages)) > 1:
        return f"stages of {spec.stages} entries: AQLM's codebooks are one size"
    if problem.k % spec.vector_length:
        return f"k = {problem.k} is no multiple of AQLM's vectors of {spec.vector_length}"
    return None


def supports_numba(problem: Problem, device: Device) -> str | None:
    """256 entries on one CPU thread."""
    if device.kind != "cpu":
        return f"AQLM's numba kernel runs on a CPU, not on {device.name}"
    if reason := _refused(problem):
        return reason
    if problem.dtype != "float32" or problem.spec.max_entries != 256:
        return "AQLM's numba kernel takes float32 activations and 256 entries"
    if device.units > 1:
        return "AQLM's threads add into one vector without a lock: right on one; use --threads 1"
    return None


def supports_triton(problem: Problem, device: Device) -> str | None:
    """Powers of two, on a GPU."""
    if device.kind != "cuda":
        return f"AQLM's Triton kernel runs on a GPU, not on {device.name}"
    if reason := _refused(problem):
        return reason
    spec = problem.spec
    if any(size & (size - 1) for size in (len(spec.stages), *spec.stages[:1], spec.vector_length)):
        return "AQLM's Triton kernel takes stages, entries and lengths that are powers of two"
    return None


def supports_cuda(problem: Problem, device: Device) -> str | None:
    """1x16, 2x8 and 1x8 with vectors of 8 (1x16: 16 too), on a GPU."""
    if device.kind != "cuda":
        return f"AQLM's CUDA kernels run on a GPU, not on {device.name}"
    if reason := _refused(problem):
        return reason
    spec, length = problem.spec, problem.spec.vector_length
    if length not in _CUDA.get((len(spec.stages), spec.stages[0]), ()):
        return "AQLM's CUDA kernels take 1x16, 2x8 and 1x8 bits with vectors of 8 (1x16: 16 too)"
    if problem.dtype == "float32":
        return "AQLM's CUDA kernels take float16 and bfloat16, not float32"
    if problem.k % (8 * length):
        return f"k = {problem.k}: AQLM's CUDA kernels read {8 * length} inputs' codes at a time"
    return None


def default(problem: Problem, device: Device) -> Config:
    """There is nothing to choose: the wheel chooses."""
    return Config()


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Codes, codebooks and scales; the outputs that a call makes, or its dense weight."""
    spec, size = problem.spec, problem.torch_dtype.itemsize
    rows, columns = code_grid(spec, problem.n, problem.k)
    codes = rows * columns * len(spec.stages)
    weight = codes * (1 if spec.max_entries <= 256 else 2) + size * problem.n * (1 + problem.bias)
    weight += size * sum(spec.stages) * spec.vector_length
    workspace = 4 * problem.m * problem.n * size
    if problem.m > MOST_TOKENS:
        # dequantize_gemm: int64 codes and their bags, and the weight summed, scaled and in order
        workspace += 40 * codes + 4 * problem.n * problem.k * size
    elif device.kind == "cpu":
        workspace += 8 * columns * sum(spec.stages)  # its table
    return Footprint(weight, workspace, problem.flops)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """AQLM's own tensors for a GPU."""
    spec, dtype = tensor.spec, problem.torch_dtype
    codes = tensor.parts["codes"].to(torch.int32)
    # as utils.pack_int_data: the upper half of the codes are negative numbers
    signed = torch.where(codes >= spec.max_entries // 2, codes - spec.max_entries, codes)
    stages = range(len(spec.stages))
    books = [scaled_codebook(spec, tensor.parts, stage, torch.float32)[0, 0] for stage in stages]
    if spec.scale_axis == "row":
        scales = tensor.parts["scale"].to(dtype)
    else:
        scales = torch.ones(tensor.n, dtype=dtype, device=codes.device)
    arrays = {
        "codes": signed.to(torch.int8 if spec.max_entries <= 256 else torch.int16),
        "codebooks": torch.stack(books)[:, :, None].to(dtype),
        "scales": scales.view(-1, 1, 1, 1),
    }
    if tensor.bias is not None:
        arrays["bias"] = tensor.bias.to(dtype)
    return Packed(arrays)


def pack_numba(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """The same with codes of a column beside each other, as the wheel turns them on a CPU."""
    arrays = dict(pack(tensor, config, problem).arrays)
    arrays["codes"] = arrays["codes"].transpose(0, 1).contiguous()
    return Packed(arrays)


def compile_numba(config: Config, problem: Problem, device: Device) -> Run:
    """numba_gemm_lut, for any m."""
    with _quiet():
        from aqlm.inference_kernels.numba_kernel import numba_gemm_lut
    return _run(numba_gemm_lut)


def compile_triton(config: Config, problem: Problem, device: Device) -> Run:
    """triton_matmul, or dequantize_gemm: what the wheel takes where it has no CUDA kernel."""
    with _quiet():
        from aqlm.inference_kernels.dequantization import dequantize_gemm
        from aqlm.inference_kernels.triton_kernel import triton_matmul
    return _run(triton_matmul if problem.m <= MOST_TOKENS else dequantize_gemm)


def compile_cuda(config: Config, problem: Problem, device: Device) -> Run:
    """An operator of the extension, which torch builds at its first use: a minute of nvcc."""
    with _quiet():
        import aqlm.inference_kernels.cuda_kernel  # noqa: F401  # defines the operators
    stages, bits = len(problem.spec.stages), problem.spec.max_entries.bit_length() - 1
    suffix = "" if problem.m <= MOST_TOKENS else "_dequant"
    return _run(getattr(torch.ops.aqlm, f"code{stages}x{bits}_matmat{suffix}"))


def _run(product: Callable[..., Tensor]) -> Run:
    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        given = (packed["codes"], packed["codebooks"], packed["scales"])
        out.copy_(product(x, *given, packed.arrays.get("bias")))

    return run


def _quiet() -> Any:
    """Without the warnings that the import of aqlm 1.1.7 raises."""
    return warnings.catch_warnings(action="ignore")


def _kernel(name: str, **fields: Any) -> Kernel:
    return Kernel(
        name=name,
        op="linear",
        backend="aqlm",
        space=SPACE,
        default=default,
        footprint=footprint,
        # codebooks and scales in x's dtype, and above 6 tokens the weight
        rounds_weights=True,
        packs_anywhere=True,
        **fields,
    )


KERNELS = (
    _kernel(
        "numba",
        supports=supports_numba,
        pack=pack_numba,
        compile=compile_numba,
        about="AQLM's table kernel for CPUs",
        runs_on=("cpu",),
    ),
    _kernel(
        "triton",
        supports=supports_triton,
        pack=pack,
        compile=compile_triton,
        about="AQLM's Triton kernel, a row a program",
        runs_on=("cuda",),
    ),
    _kernel(
        "cuda",
        supports=supports_cuda,
        pack=pack,
        compile=compile_cuda,
        about="AQLM's CUDA kernels, and decode + BLAS above 6 tokens",
        # half2 sums down a vector: at most 8 products of an element pair, for vectors of 16
        half_chain=8,
        runs_on=("cuda",),
    ),
)
