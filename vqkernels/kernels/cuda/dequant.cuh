// dequant: a thread a cell; the whole weight decoded to a dense matrix in x's type.
//
// `out` is [rows, columns, LENGTH], or [columns, rows, LENGTH] along out: entries stay whole, and
// neighbouring threads store side by side.
#pragma once

#include <linear.cuh>

namespace vq {

template <class T>
VQ_INLINE void dequant(const Arguments<T>& a) {
    using Out = typename T::Out;
    const i64 cell = i64(blockIdx.x) * T::THREADS + int(threadIdx.x);
    if (cell >= i64(a.rows) * a.columns) return;
    const int inner = T::ALONG_IN ? a.columns : a.rows;
    const int across = int(cell / inner), along = int(cell % inner);
    float sum[T::LENGTH];
    decode<T>(sum, a, T::ALONG_IN ? across : along, T::ALONG_IN ? along : across);
    constexpr int WIDE = wide<Out>(T::LENGTH);
#pragma unroll
    for (int part = 0; part < T::LENGTH; part += WIDE) {
        Pack<Out, WIDE> some;
#pragma unroll
        for (int e = 0; e < WIDE; e++) some.at[e] = from_float<Out>(sum[part + e]);
        global(a.out).store(cell * T::LENGTH + part, some);
    }
}

}  // namespace vq
