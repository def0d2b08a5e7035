// fused_rq: all residual stages summed in registers, one pass over x, codes in any layout.
#pragma once

#include <sweep.cuh>

namespace vq {

template <class T>
VQ_INLINE void fused_rq(const Arguments<T>& a) {
    sweep<T>(a, GlobalEntries<T>{global(a.books)});
}

}  // namespace vq
