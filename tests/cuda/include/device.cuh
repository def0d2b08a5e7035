// The functions of the kernels' device.cuh for a CPU: the same names, found first on the include
// path. Each has one more parameter, the place of the call, and hands the access to the runtime.
#pragma once

#include <harness.h>

#define VQ_INLINE inline
#define VQ_CONSTANT static constexpr
#ifndef VQ_HAS_BULK_COPIES  // 0: what a kernel does without them, on sm_80
#define VQ_HAS_BULK_COPIES 1
#endif

namespace vq {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T at[COUNT];
};

namespace detail {

template <class T> struct Mutable { using type = T; };
template <class T> struct Mutable<const T> { using type = T; };

// Widths that one instruction moves.
template <class V>
constexpr bool one_access() {
    return sizeof(V) == 1 || sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16;
}

template <class V>
V read(const void* at) {
    static_assert(one_access<V>(), "one instruction");
    V value;
    std::memcpy(static_cast<void*>(&value), at, sizeof(V));
    return value;
}
template <class V>
void write(void* at, const V& value) {
    static_assert(one_access<V>(), "one instruction");
    std::memcpy(at, &value, sizeof(V));
}

}  // namespace detail

// ---------------------------------------------------------------------------------------- memory

template <class T>
struct Global {
    using Value = typename detail::Mutable<T>::type;

    T* at;

    template <class V = Value>
    V load(i64 i, VQ_AT) const {
        return detail::read<V>(harness::global_load(at, at + i, sizeof(V), called));
    }
    template <class V = Value>
    V stream(i64 i, VQ_AT) const {
        return detail::read<V>(harness::global_load(at, at + i, sizeof(V), called));
    }
    template <class V>
    void store(i64 i, V value, VQ_AT) const {
        static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
        detail::write(harness::global_store(at, at + i, sizeof(V), called), value);
    }
};

template <class T>
Global<const T> global(const T* at) {
    return {at};
}
template <class T>
Global<T> global(T* at) {
    return {at};
}

template <class T>
struct Shared {
    T* at;

    template <class V = T>
    V load(int i, VQ_AT) const {
        return detail::read<V>(harness::shared_load(at + i, sizeof(V), called));
    }
    template <class V>
    void store(int i, V value, VQ_AT) const {
        static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
        detail::write(harness::shared_store(at + i, sizeof(V), called), value);
    }
    template <class U>
    Shared<U> as() const {
        return {reinterpret_cast<U*>(at)};
    }
    Shared operator+(int elements) const { return {at + elements}; }
};

inline Shared<u8> shared_memory() { return {static_cast<u8*>(harness::shared_base())}; }

struct SharedWindow {
    static u32 origin() { return 0; }
    template <class V>
    static V load(u32 offset, VQ_AT) {
        const auto at = static_cast<const u8*>(harness::shared_base()) + offset;
        return detail::read<V>(harness::shared_load(at, sizeof(V), called));
    }
};

// Brings nothing that can be seen: a kernel may ask for what isn't there.
template <class T>
void prefetch_l2(Global<const T> from, i64 i) {}

template <class T>
void atomic_add(Global<T> to, i64 i, T value, VQ_AT) {
    void* at = harness::global_atomic(to.at, to.at + i, sizeof(T), called);
    detail::write(at, T(detail::read<T>(at) + value));
}
template <class T>
void atomic_add(Shared<T> to, int i, T value, VQ_AT) {
    void* at = harness::shared_atomic(to.at + i, sizeof(T), called);
    detail::write(at, T(detail::read<T>(at) + value));
}

// --------------------------------------------------------------------------------- other threads

inline int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }
inline int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

inline void sync_block(VQ_AT) { harness::sync_block(called); }
inline void sync_warp(VQ_AT) {
    harness::collect(harness::Collective::sync_warp, nullptr, 0, nullptr, 0, called);
}

namespace detail {

template <class T>
T shuffled(harness::Collective what, T value, int operand, harness::At called) {
    static_assert(sizeof(T) == 4, "one register");
    const u32 in[] = {read<u32>(&value), static_cast<u32>(operand)};
    u32 out;
    harness::collect(what, in, 2, &out, 1, called);
    return read<T>(&out);
}

}  // namespace detail

template <class T>
T shuffle_xor(T value, int lanes, VQ_AT) {
    return detail::shuffled(harness::Collective::shuffle_xor, value, lanes, called);
}
template <class T>
T shuffle(T value, int lane, VQ_AT) {
    return detail::shuffled(harness::Collective::shuffle, value, lane, called);
}
inline u32 ballot(bool vote, VQ_AT) {
    const u32 in = vote;
    u32 out;
    harness::collect(harness::Collective::ballot, &in, 1, &out, 1, called);
    return out;
}

// One launch at a time: the earlier ones have ended.
inline void wait_for_earlier_launches() {}
inline void let_next_launch_begin() {}

// ------------------------------------------------------------------------------------------ bits

inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 from = u64(high) << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i);
        const u32 byte = u32(from >> (8 * (nibble & 7u))) & 0xffu;
        const u32 sign = byte & 0x80u ? 0xffu : 0u;
        result |= (nibble & 8u ? sign : byte) << (8 * i);
    }
    return result;
}
inline u32 funnel(u32 low, u32 high, u32 shift) {
    return u32((u64(high) << 32 | low) >> (shift & 31u));
}

inline u32 add_halves(u32 left, u32 right) {
    u32 sums = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float a = harness::half_to_float(std::uint16_t(left >> shift));
        const float b = harness::half_to_float(std::uint16_t(right >> shift));
        sums |= u32(harness::float_to_half(a + b)) << shift;
    }
    return sums;
}

inline u32 kept(u32 value) { return value; }

inline u32 as_bits(float value) { return detail::read<u32>(&value); }
inline float as_float(u32 bits) { return detail::read<float>(&bits); }

inline float to_float(float value) { return value; }
inline float to_float(__half value) { return harness::half_to_float(value.bits); }
inline float to_float(__nv_bfloat16 value) { return harness::bfloat16_to_float(value.bits); }

template <class T> T from_float(float value);
template <> inline float from_float<float>(float value) { return value; }
template <> inline __half from_float<__half>(float value) {
    return {harness::float_to_half(value)};
}
template <> inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return {harness::float_to_bfloat16(value)};
}
inline u32 pack_halves(float low, float high) {
    return u32(harness::float_to_half(high)) << 16 | harness::float_to_half(low);
}
inline Pack<float, 2> unpack_halves(u32 word) {
    return {harness::half_to_float(std::uint16_t(word)),
            harness::half_to_float(std::uint16_t(word >> 16))};
}

// --------------------------------------------------------------------------- asynchronous copies

template <int BYTES, class T>
void copy_async(Shared<T> to, int i, Global<const T> from, i64 j, VQ_AT) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
    harness::copy_async(to.at + i, from.at, from.at + j, BYTES, called);
}
inline void copy_commit() { harness::copy_commit(); }
template <int PENDING>
void copy_wait() {
    harness::copy_wait(PENDING);
}

inline void barrier_init(Shared<u64> barrier, int arrivals, VQ_AT) {
    harness::barrier_init(barrier.at, arrivals, called);
}
inline void barrier_publish() { harness::barrier_publish(); }
inline void barrier_arrive(Shared<u64> barrier, VQ_AT) {
    harness::barrier_arrive(barrier.at, called);
}
inline void barrier_expect(Shared<u64> barrier, u32 bytes, VQ_AT) {
    harness::barrier_expect(barrier.at, bytes, called);
}
inline void barrier_wait(Shared<u64> barrier, u32 parity, VQ_AT) {
    harness::barrier_wait(barrier.at, parity, called);
}
template <class T>
void copy_bulk(Shared<T> to, int i, Global<const T> from, i64 j, u32 bytes, Shared<u64> barrier,
               VQ_AT) {
    harness::copy_bulk(to.at + i, from.at, from.at + j, bytes, barrier.at, called);
}

inline int cluster_rank() { return harness::cluster_rank(); }
inline int cluster_size() { return harness::cluster_size(); }
inline void cluster_sync(VQ_AT) { harness::cluster_sync(called); }
template <class T>
T cluster_load(Shared<T> at, int i, int rank, VQ_AT) {
    static_assert(sizeof(T) == 4, "one word");
    return detail::read<T>(harness::cluster_load(at.at + i, sizeof(T), rank, called));
}

// ---------------------------------------------------------------------------------- tensor cores

namespace detail {

template <class D, int SUMS>
void mma(harness::Collective what, D (&d)[SUMS], const u32 (&a)[4], const u32 (&b)[2],
         harness::At called) {
    static_assert(sizeof(D) == 4, "registers");
    u32 in[6 + SUMS];
    std::memcpy(in, a, sizeof a);
    std::memcpy(in + 4, b, sizeof b);
    std::memcpy(in + 6, d, sizeof d);
    u32 out[SUMS];
    harness::collect(what, in, 6 + SUMS, out, SUMS, called);
    std::memcpy(d, out, sizeof d);
}

template <class T>
void matrices(harness::Collective what, u32 (&d)[4], const T* row, harness::At called) {
    static_assert(sizeof(T) == 2, "16-bit values");
    u32 in[4];
    std::memcpy(in, harness::shared_load(row, 16, called), 16);
    harness::collect(what, in, 4, d, 4, called);
}

}  // namespace detail

template <class T>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], VQ_AT) {
    static_assert(sizeof(T) == 2, "half or bfloat16");
    constexpr auto what = __is_same(T, __half) ? harness::Collective::mma_half
                                               : harness::Collective::mma_bfloat16;
    detail::mma(what, d, a, b, called);
}
inline void mma_m16n8k16(u32 (&d)[2], const u32 (&a)[4], const u32 (&b)[2], VQ_AT) {
    detail::mma(harness::Collective::mma_half_sums, d, a, b, called);
}
inline void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], VQ_AT) {
    detail::mma(harness::Collective::mma_bytes, d, a, b, called);
}
template <class T>
void load_matrices(u32 (&d)[4], Shared<T> from, int i, VQ_AT) {
    detail::matrices(harness::Collective::matrices, d, from.at + i, called);
}
template <class T>
void load_matrices_transposed(u32 (&d)[4], Shared<T> from, int i, VQ_AT) {
    detail::matrices(harness::Collective::matrices_transposed, d, from.at + i, called);
}

}  // namespace vq
