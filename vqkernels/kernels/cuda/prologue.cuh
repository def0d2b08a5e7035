// prologue: x as the product reads it, and what the epilogue needs of x, in one launch.
//
// `x` is [m, k] as it was given. `out` (where CORE) is [m, width]: scaled, permuted, without the side
// columns, rotated, in cell order, padded with zeros; fp32 until it is stored. `apart` is
// [m, SIDE + sums], fp32: x of the side columns, and parts of the sum over x that a zero multiplies.
// Grid [tiles of TOKENS tokens, blocks along the columns].
//
// Every sum has its order: a thread's columns, the butterfly of a warp, then the warps.
#pragma once

#include <linear.cuh>

namespace vq {

// The input that a stored column holds; side columns come first.
template <class T>
VQ_INLINE int source_column(const Arguments<T>& a, int column) {
    return T::PERMUTED ? global(a.permutation).load(column) : column;
}
template <class T>
VQ_INLINE float scaled_input(const Arguments<T>& a, int token, int source) {
    const float value = to_float(global(a.x).load(i64(token) * a.k + source));
    return T::X_SCALE ? value * global(a.x_scale).load(source) : value;
}

// Main column that a position of `out` holds; a.k - SIDE and more for padding.
template <class T>
VQ_INLINE int main_column(int position) {
    return T::ALONG_IN ? cell_feature<T>(position) : position;
}

template <class T>
VQ_INLINE void reorder(const Arguments<T>& a, int token) {
    const int step = int(gridDim.y) * T::THREADS;
    const auto out = global(a.out);
    for (int position = int(blockIdx.y) * T::THREADS + int(threadIdx.x); position < a.width;
         position += step) {
        const int column = main_column<T>(position);
        float value = 0;
        if (column < a.k - T::SIDE) {
            value = scaled_input<T>(a, token, source_column<T>(a, T::SIDE + column));
        }
        out.store(i64(token) * a.width + position, from_float<typename T::Out>(value));
    }
}

// A block makes WARP columns of TOKENS tokens. Its warps share out the columns of the rotation's
// block: enough loads on their way, whatever its size. `sums`: [warps, TOKENS, WARP].
template <class T>
VQ_INLINE void rotate(const Arguments<T>& a, int token, Shared<float> sums) {
    constexpr int WARPS = T::THREADS / WARP, SIZE = T::ROTATION;
    const int position = int(blockIdx.y) * WARP + lane_id();
    const int column = main_column<T>(position);
    float own[T::TOKENS] = {};
    if (position < a.width && column < a.k - T::SIDE) {
        const int first = T::SIDE + column / SIZE * SIZE;
#pragma unroll 8
        for (int j = warp_id(); j < SIZE; j += WARPS) {
            const float weight = global(a.rotation).load(i64(j) * SIZE + column % SIZE);
            const int source = source_column<T>(a, first + j);
#pragma unroll
            for (int t = 0; t < T::TOKENS; t++) {
                // tokens past the last repeat it and are not stored
                const int one = token + t < a.m ? token + t : a.m - 1;
                own[t] += weight * scaled_input<T>(a, one, source);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T::TOKENS; t++) {
        sums.store((warp_id() * T::TOKENS + t) * WARP + lane_id(), own[t]);
    }
    sync_block();
    for (int t = warp_id(); t < T::TOKENS && token + t < a.m; t += WARPS) {
        if (position >= a.width) break;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums.load((w * T::TOKENS + t) * WARP + lane_id());
        const i64 at = i64(token + t) * a.width + position;
        global(a.out).store(at, from_float<typename T::Out>(sum));
    }
}

template <class T>
VQ_INLINE void set_sides_apart(const Arguments<T>& a, int token) {
    const int step = int(gridDim.y) * T::THREADS;
    for (int column = int(blockIdx.y) * T::THREADS + int(threadIdx.x); column < T::SIDE;
         column += step) {
        const float value = scaled_input<T>(a, token, source_column<T>(a, column));
        global(a.apart).store(i64(token) * (T::SIDE + a.sums) + column, value);
    }
}

// This block's part of the sum over x, or over x * x_zero. `warps`: [TOKENS, warps].
template <class T>
VQ_INLINE void sum_inputs(const Arguments<T>& a, int token, Shared<float> warps) {
    constexpr int WARPS = T::THREADS / WARP;
    const int number = int(blockIdx.y);
    if (number >= a.sums) return;
    for (int t = 0; t < T::TOKENS && token + t < a.m; t++) {
        float sum = 0;
        for (int j = number * T::THREADS + int(threadIdx.x); j < a.k; j += a.sums * T::THREADS) {
            const float value = to_float(global(a.x).load(i64(token + t) * a.k + j));
            sum += T::X_ZERO ? value * global(a.x_zero).load(j) : value;
        }
#pragma unroll
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
        if (lane_id() == 0) warps.store(t * WARPS + warp_id(), sum);
    }
    sync_block();
    const int t = int(threadIdx.x);
    if (t < T::TOKENS && token + t < a.m) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += warps.load(t * WARPS + w);
        global(a.apart).store(i64(token + t) * (T::SIDE + a.sums) + T::SIDE + number, sum);
    }
}

template <class T>
VQ_INLINE void prologue(const Arguments<T>& a) {
    const auto shared = shared_memory().template as<float>();
    const int token = int(blockIdx.x) * T::TOKENS;
    for (int t = 0; t < T::TOKENS && token + t < a.m; t++) {
        if constexpr (T::SIDE > 0) set_sides_apart<T>(a, token + t);
        if constexpr (T::CORE && T::ROTATION == 0) reorder<T>(a, token + t);
    }
    if constexpr (T::SUMS) sum_inputs<T>(a, token, shared);
    if constexpr (T::ROTATION > 0) rotate<T>(a, token, shared + T::TOKENS * (T::THREADS / WARP));
}

}  // namespace vq
