// vectorized: 4, 8 or 16 bytes of codes a load, entries gathered whole, an FMA a stage.
//
// HOT entries of the first stage (of the first codebook set) are kept in shared memory; the launcher
// numbers entries by how often they are used, so these serve as large a share of the lookups as that
// many can. Codes below HOT are gathered from there, the others from global memory.
#pragma once

#include <sweep.cuh>

namespace vq {

template <class T>
struct HotEntries {
    Shared<typename T::Entry> hot;
    GlobalEntries<T> cold;

    VQ_INLINE void load(float (&values)[T::LENGTH], i64 first, int stage, int code) const {
        if (stage != 0 || first != 0 || code >= T::HOT) {
            cold.load(values, first, stage, code);
            return;
        }
        constexpr int WIDE = wide<typename T::Entry>(T::LENGTH);
#pragma unroll
        for (int part = 0; part < T::LENGTH; part += WIDE) {
            using Some = Pack<typename T::Entry, WIDE>;
            const auto loaded = hot.template load<Some>(code * T::LENGTH + part);
#pragma unroll
            for (int e = 0; e < WIDE; e++) values[part + e] = to_float(loaded.at[e]);
        }
    }
};

template <class T>
VQ_INLINE void vectorized(const Arguments<T>& a) {
    const GlobalEntries<T> cold{global(a.books)};
    if constexpr (T::HOT == 0) {
        sweep<T>(a, cold);
    } else {
        using E = typename T::Entry;
        constexpr int WIDE = wide<typename T::Entry>(T::LENGTH);
        const auto hot = shared_memory().template as<E>();
        for (int i = int(threadIdx.x) * WIDE; i < T::HOT * T::LENGTH; i += T::THREADS * WIDE) {
            hot.store(i, cold.books.template load<Pack<E, WIDE>>(i));
        }
        sync_block();
        sweep<T>(a, HotEntries<T>{hot, cold});
    }
}

}  // namespace vq
