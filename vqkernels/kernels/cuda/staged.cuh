// staged: all codebooks in shared memory, loaded once a block, gathered from there.
//
// An entry is cut into chunks of GATHER bytes, and each chunk is there REPLICAS times side by side:
// [entry, chunk, replica]. Lane l reads replica l % REPLICAS, so with REPLICAS * GATHER = 128 bytes
// the lanes that the hardware serves together never meet in a bank, whatever the codes are.
#pragma once

#include <sweep.cuh>

namespace vq {

template <class T>
struct StagedEntries {
    using E = typename T::Entry;
    static constexpr int WIDE = wide<E>(T::LENGTH, T::GATHER);
    static constexpr int CHUNKS = T::LENGTH / WIDE;

    Shared<E> copies;

    VQ_INLINE void load(float (&values)[T::LENGTH], i64 first, int stage, int code) const {
        const int entry = int(first) + entries_before<T>(stage) + code;
        const int replica = lane_id() % T::REPLICAS;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int at = ((entry * CHUNKS + chunk) * T::REPLICAS + replica) * WIDE;
            const auto loaded = copies.template load<Pack<E, WIDE>>(at);
#pragma unroll
            for (int e = 0; e < WIDE; e++) values[chunk * WIDE + e] = to_float(loaded.at[e]);
        }
    }
};

// One copy: straight from global to shared memory, past the registers.
template <class T>
VQ_INLINE void stage_once(Shared<typename T::Entry> to, Global<const typename T::Entry> from) {
    using E = typename T::Entry;
    constexpr int ELEMENTS = T::BOOK_ENTRIES * T::LENGTH;
    constexpr int A_COPY = 16 / int(sizeof(E));
    constexpr int WHOLE = ELEMENTS / A_COPY * A_COPY;
    for (int i = WHOLE + int(threadIdx.x); i < ELEMENTS; i += T::THREADS) to.store(i, from.load(i));
#if VQ_HAS_BULK_COPIES
    if constexpr (WHOLE > 0) {
        // behind the codebooks; the copy engine moves them while the threads wait
        constexpr int BEHIND = (ELEMENTS * int(sizeof(E)) + 15) / 16 * 16;
        const auto barrier = (shared_memory() + BEHIND).template as<u64>();
        if (threadIdx.x == 0) {
            barrier_init(barrier, 1);
            barrier_publish();
        }
        sync_block();
        if (threadIdx.x == 0) {
            barrier_expect(barrier, WHOLE * u32(sizeof(E)));
            copy_bulk(to, 0, from, 0, WHOLE * u32(sizeof(E)), barrier);
        }
        barrier_wait(barrier, 0);
        sync_block();
        return;
    }
#endif
    for (int i = int(threadIdx.x) * A_COPY; i < WHOLE; i += T::THREADS * A_COPY) {
        copy_async<16>(to, i, from, i);
    }
    copy_commit();
    copy_wait<0>();
    sync_block();
}

template <class T>
VQ_INLINE void stage_copies(Shared<typename T::Entry> to, Global<const typename T::Entry> from) {
    using Chunk = Pack<typename T::Entry, StagedEntries<T>::WIDE>;
    constexpr int WIDE = StagedEntries<T>::WIDE;
    constexpr int CHUNKS = T::BOOK_ENTRIES * StagedEntries<T>::CHUNKS;
    // neighbouring threads write neighbouring copies: no two in one bank
    for (int i = int(threadIdx.x); i < CHUNKS * T::REPLICAS; i += T::THREADS) {
        to.store(i * WIDE, from.template load<Chunk>(i64(i / T::REPLICAS) * WIDE));
    }
    sync_block();
}

template <class T>
VQ_INLINE void staged(const Arguments<T>& a) {
    const auto copies = shared_memory().template as<typename T::Entry>();
    if constexpr (T::REPLICAS == 1) {
        stage_once<T>(copies, global(a.books));
    } else {
        stage_copies<T>(copies, global(a.books));
    }
    sweep<T>(a, StagedEntries<T>{copies});
}

}  // namespace vq
