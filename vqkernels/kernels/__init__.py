"""Kernels by backend: one folder a backend, one file a kernel; `vqkernels.kernel` finds them."""
