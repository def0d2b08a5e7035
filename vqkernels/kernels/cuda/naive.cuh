// naive: a thread a row of codes and token, every lookup from global memory.
//
// Grid [rows / THREADS, tokens, spans]. Neighbouring threads read neighbouring codes where the codes
// lie in columns.
#pragma once

#include <linear.cuh>

namespace vq {

template <class T>
VQ_INLINE void naive(const Arguments<T>& a) {
    constexpr int OUTPUTS = T::ALONG_IN ? 1 : T::LENGTH;
    const int row = int(blockIdx.x) * T::THREADS + int(threadIdx.x);
    const int token = int(blockIdx.y);
    const int number = int(blockIdx.z);
    if (row >= a.rows) return;
    const auto x = global(a.x);
    float sums[OUTPUTS] = {};
    for (int column = span_first(a, number); column < span_last(a, number); column++) {
        float weight[T::LENGTH];
        decode<T>(weight, a, row, column);
        if constexpr (T::ALONG_IN) {
#pragma unroll
            for (int e = 0; e < T::LENGTH; e++) {
                const i64 at = i64(token) * a.k + i64(column) * T::LENGTH + e;
                sums[0] += weight[e] * to_float(x.load(at));
            }
        } else {
            const float value = to_float(x.load(i64(token) * a.k + column));
#pragma unroll
            for (int e = 0; e < T::LENGTH; e++) sums[e] += weight[e] * value;
        }
    }
#pragma unroll
    for (int e = 0; e < OUTPUTS; e++) store_sum<T>(a, number, token, row, e, sums[e]);
}

}  // namespace vq
