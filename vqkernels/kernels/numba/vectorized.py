"""vectorized: eight codes a load, whole entries by SIMD loads, a multiply-add for each stage.

Codes in 64-bit words of four rows side by side (`cells`), codebooks in fp32; the loop is in
`gather`. Per code: a shift, a mask and one FMA whose entry comes straight from memory.
"""

from __future__ import annotations

from vqkernels.kernel import Kernel
from vqkernels.kernels.numba import gather

KERNEL = Kernel(
    name="vectorized",
    op="linear",
    backend="numba",
    runs_on=("cpu",),
    space=gather.SPACE,
    supports=gather.supports,
    default=gather.default,
    footprint=gather.footprint,
    pack=gather.pack,
    compile=gather.compiler(fused=False),
    about="8 codes a load, whole-entry gathers, an FMA a stage",
)
