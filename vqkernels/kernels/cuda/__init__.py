"""CUDA C++ kernels, compiled at run time: a launcher beside each `.cuh`."""
