"""CPU kernels in numba: explicit SIMD on the thread pool that torch already runs."""
