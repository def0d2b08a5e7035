// The few names of CUDA that kernel text uses, as plain C++: no CUDA header is needed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// 16-bit floats are their bits; to_float and from_float of device.cuh convert them.
struct __half {
    std::uint16_t bits;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};

// Of the thread that runs: set whenever another one is resumed.
extern __attribute__((visibility("default"))) uint3 threadIdx, blockIdx, blockDim, gridDim;
