// epilogue: y from the sums that a product left, in one launch.
//
// `x` is [spans, m, width], the parts of the lookups' sums in cell order; `out` is y, [m, n]. A thread
// has one output feature of TOKENS tokens: spans in their order, side columns, scale, zero, bias; fp32
// until it is stored. `apart` is what the prologue left. Grid [tiles of TOKENS tokens, blocks of
// THREADS features].
#pragma once

#include <linear.cuh>

namespace vq {

template <class T>
VQ_INLINE float add_spans(const Arguments<T>& a, int token, int position) {
    float sum = 0;
#pragma unroll 8
    for (int number = 0; number < a.spans; number++) {
        const i64 at = (i64(number) * a.m + token) * a.width + position;
        sum += to_float(global(a.x).stream(at));
    }
    return sum;
}

// What the zero adds to an output feature of a token.
template <class T>
VQ_INLINE float zero_of(const Arguments<T>& a, int token, int feature) {
    float sum = 0;
    for (int number = 0; number < a.sums; number++) {
        sum += global(a.apart).load(i64(token) * (T::SIDE + a.sums) + T::SIDE + number);
    }
    if constexpr (T::Y_ZERO == Along::none) {
        return sum;  // of x * x_zero
    } else {
        return sum * of_feature<T::Y_ZERO>(a.y_zero, feature);
    }
}

template <class T>
VQ_INLINE void epilogue(const Arguments<T>& a) {
    const int feature = int(blockIdx.y) * T::THREADS + int(threadIdx.x);
    const int first = int(blockIdx.x) * T::TOKENS;
    if (feature >= a.n) return;
    const int position = T::ALONG_IN ? feature : cell_position<T>(feature);
    float y[T::TOKENS];
#pragma unroll
    for (int t = 0; t < T::TOKENS; t++) {
        // tokens past the last repeat it and are not stored
        y[t] = add_spans<T>(a, first + t < a.m ? first + t : a.m - 1, position);
    }
#pragma unroll 4
    for (int column = 0; column < T::SIDE; column++) {
        const float weight = global(a.side).load(i64(column) * a.n + feature);
#pragma unroll
        for (int t = 0; t < T::TOKENS; t++) {
            const int token = first + t < a.m ? first + t : a.m - 1;
            y[t] += weight * global(a.apart).load(i64(token) * (T::SIDE + a.sums) + column);
        }
    }
#pragma unroll
    for (int t = 0; t < T::TOKENS; t++) {
        const int token = first + t;
        if (token >= a.m) break;
        float value = scaled<T>(a, y[t], feature);
        if constexpr (T::SUMS) value += zero_of<T>(a, token, feature);
        value = biased<T>(a, value, feature);
        global(a.out).store(i64(token) * a.n + feature, from_float<typename T::Out>(value));
    }
}

}  // namespace vq
