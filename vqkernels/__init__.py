"""Codebook-quantised matrices and the kernels that multiply by them.

What a serving stack imports. It knows nothing of tuning or benchmarks, and importing it needs
no driver, CUDA, Triton or numba: a kernel's backend is imported when the registry is asked.
"""

from vqkernels.dispatch import select, use_tables, vq_linear
from vqkernels.errors import (
    BackendError,
    ConfigError,
    ContainerError,
    SpecError,
    TensorError,
    UnsupportedError,
    VqError,
)
from vqkernels.fuse import fuse
from vqkernels.models import load_dense, without_weights
from vqkernels.nn import FusedVQLinear, VQLinear, replace_linears
from vqkernels.parts import BitCount, effective_bits
from vqkernels.spec import CodebookSpec
from vqkernels.tuned_lookup import TunedTableWarning

__all__ = [
    "BackendError",
    "BitCount",
    "CodebookSpec",
    "ConfigError",
    "ContainerError",
    "FusedVQLinear",
    "SpecError",
    "TensorError",
    "TunedTableWarning",
    "UnsupportedError",
    "VQLinear",
    "VqError",
    "effective_bits",
    "fuse",
    "load_dense",
    "replace_linears",
    "select",
    "use_tables",
    "vq_linear",
    "without_weights",
]

__version__ = "0.1.0"
