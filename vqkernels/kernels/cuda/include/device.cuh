// What a kernel asks of the machine: memory, other threads, tensor cores. Nothing else in a kernel's
// text is more than C++, so another file of this name and these functions runs kernels elsewhere.
//
// Global and Shared are pointers with named accesses. Sizes are template arguments: one access is
// one instruction. Indices count elements of T, and an access of a wider type V must be aligned to
// sizeof(V).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VQ_HAS_BULK_COPIES 1  // and barriers in shared memory, and clusters
#else
#define VQ_HAS_BULK_COPIES 0
#endif
#define VQ_INLINE __device__ __forceinline__
#define VQ_CONSTANT __host__ __device__ static constexpr

namespace vq {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// COUNT values that are loaded and stored at once.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T at[COUNT];
};

namespace detail {

template <class T> struct Mutable { using type = T; };
template <class T> struct Mutable<const T> { using type = T; };

// NVRTC has neither <type_traits> nor g++'s __is_same.
template <class T> constexpr bool is_half = false;
template <> constexpr bool is_half<__half> = true;

template <int BYTES> struct Word;
template <> struct Word<1> { using type = u8; };
template <> struct Word<2> { using type = u16; };
template <> struct Word<4> { using type = u32; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <class V, class W>
VQ_INLINE V bits_as(const W& word) {
    static_assert(sizeof(V) == sizeof(W), "one register for another");
    V value;
    memcpy(&value, &word, sizeof(V));
    return value;
}

VQ_INLINE u32 shared_address(const void* at) {
    return static_cast<u32>(__cvta_generic_to_shared(at));
}

// Streamed once: kept out of L1, whose lines the codebooks need.
VQ_INLINE u8 stream(const u8* at) { return __ldg(at); }
VQ_INLINE u16 stream(const u16* at) { return __ldg(at); }
VQ_INLINE u32 stream(const u32* at) {
    u32 word;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(at));
    return word;
}
VQ_INLINE uint2 stream(const uint2* at) {
    uint2 word;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y)
        : "l"(at));
    return word;
}
VQ_INLINE uint4 stream(const uint4* at) {
    uint4 word;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
        : "l"(at));
    return word;
}

}  // namespace detail

// ---------------------------------------------------------------------------------------- memory

// Global memory that no thread of the launch writes (`load`, `stream`: the read-only path), or that
// the kernel alone writes (`store`).
template <class T>
struct Global {
    using Value = typename detail::Mutable<T>::type;

    T* at;

    template <class V = Value>
    VQ_INLINE V load(i64 i) const {
        using W = typename detail::Word<sizeof(V)>::type;
        return detail::bits_as<V>(__ldg(reinterpret_cast<const W*>(at + i)));
    }
    template <class V = Value>
    VQ_INLINE V stream(i64 i) const {
        using W = typename detail::Word<sizeof(V)>::type;
        return detail::bits_as<V>(detail::stream(reinterpret_cast<const W*>(at + i)));
    }
    template <class V>
    VQ_INLINE void store(i64 i, V value) const {
        static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
        using W = typename detail::Word<sizeof(V)>::type;
        *reinterpret_cast<W*>(at + i) = detail::bits_as<W>(value);
    }
};

template <class T>
VQ_INLINE Global<const T> global(const T* at) {
    return {at};
}
template <class T>
VQ_INLINE Global<T> global(T* at) {
    return {at};
}

// Shared memory of the block.
template <class T>
struct Shared {
    T* at;

    template <class V = T>
    VQ_INLINE V load(int i) const {
        using W = typename detail::Word<sizeof(V)>::type;
        // by value: what is copied through a reference is read byte by byte, W's alignment lost
        const W word = *reinterpret_cast<const W*>(at + i);
        return detail::bits_as<V>(word);
    }
    template <class V>
    VQ_INLINE void store(int i, V value) const {
        static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
        using W = typename detail::Word<sizeof(V)>::type;
        *reinterpret_cast<W*>(at + i) = detail::bits_as<W>(value);
    }
    template <class U>
    VQ_INLINE Shared<U> as() const {
        return {reinterpret_cast<U*>(at)};
    }
    VQ_INLINE Shared operator+(int elements) const { return {at + elements}; }
};

// The block's dynamic shared memory, as many bytes as the launch asked for; aligned to 128 bytes.
VQ_INLINE Shared<u8> shared_memory() {
    extern __shared__ __align__(128) u8 vq_shared_memory[];
    return {vq_shared_memory};
}

// Dynamic shared memory where each lane reads at an offset of its own, computed in one instruction:
// the constant part of the address is the load's immediate, the block's rank in its cluster is part of
// `origin()`, which the offset includes. Loads name no pointer that a compiler would add.
struct SharedWindow {
    // Where dynamic shared memory begins in a kernel that has no static: behind what the system keeps.
#if VQ_HAS_BULK_COPIES
    static constexpr u32 BEGIN = 1024;
#else
    static constexpr u32 BEGIN = 0;
#endif

    // The address of dynamic shared memory less BEGIN: its lower 24 bits are zero, or the launch fails.
    VQ_INLINE static u32 origin() {
        const u32 address = detail::shared_address(shared_memory().at) - BEGIN;
        if (address & 0xffffffu) __trap();
        return address;
    }
    template <class V>
    VQ_INLINE static V load(u32 offset) {
        using W = typename detail::Word<sizeof(V)>::type;
        const W word = *static_cast<const W*>(__cvta_shared_to_generic(offset + BEGIN));
        return detail::bits_as<V>(word);
    }
};

// Ask that the 128 bytes around an element come to L2. L2 is where all of the device's writes meet,
// so unlike a load this is right also while another launch writes there.
template <class T>
VQ_INLINE void prefetch_l2(Global<const T> from, i64 i) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from.at + i));
}

template <class T>
VQ_INLINE void atomic_add(Global<T> to, i64 i, T value) {
    atomicAdd(to.at + i, value);
}
template <class T>
VQ_INLINE void atomic_add(Shared<T> to, int i, T value) {
    atomicAdd(to.at + i, value);
}

// --------------------------------------------------------------------------------- other threads

VQ_INLINE int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }
VQ_INLINE int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

VQ_INLINE void sync_block() { __syncthreads(); }
VQ_INLINE void sync_warp() { __syncwarp(); }

// Of 4-byte values; every lane of the warp takes part.
template <class T>
VQ_INLINE T shuffle_xor(T value, int lanes) {
    return __shfl_xor_sync(ALL_LANES, value, lanes);
}
template <class T>
VQ_INLINE T shuffle(T value, int lane) {
    return __shfl_sync(ALL_LANES, value, lane);
}
VQ_INLINE u32 ballot(bool vote) { return __ballot_sync(ALL_LANES, vote); }

// Of a launch that may begin before the one ahead of it in the stream has ended; on sm_90 and later.
// Until this returns, nothing that an earlier launch writes may be read, nor what it reads written.
VQ_INLINE void wait_for_earlier_launches() {
#if VQ_HAS_BULK_COPIES
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch may begin, as far as it doesn't wait for this one.
VQ_INLINE void let_next_launch_begin() {
#if VQ_HAS_BULK_COPIES
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------ bits

// Byte i of the result is byte (selector >> 4i) & 7 of `high:low`, or its sign bit eight times where
// the fourth bit of that nibble is set. One instruction: __byte_perm clears that bit with another.
VQ_INLINE u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}
// 32 bits of `high:low` from bit `shift & 31` on.
VQ_INLINE u32 funnel(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }

// Sums of the two fp16 values in each word.
VQ_INLINE u32 add_halves(u32 left, u32 right) {
    return detail::bits_as<u32>(
        __hadd2(detail::bits_as<__half2>(left), detail::bits_as<__half2>(right)));
}

// The same value, which stays in a register: a compiler that could compute it again would.
VQ_INLINE u32 kept(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

VQ_INLINE u32 as_bits(float value) { return __float_as_uint(value); }
VQ_INLINE float as_float(u32 bits) { return __uint_as_float(bits); }

VQ_INLINE float to_float(float value) { return value; }
VQ_INLINE float to_float(__half value) { return __half2float(value); }
VQ_INLINE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T> VQ_INLINE T from_float(float value);
template <> VQ_INLINE float from_float<float>(float value) { return value; }
template <> VQ_INLINE __half from_float<__half>(float value) { return __float2half_rn(value); }
template <> VQ_INLINE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
// Two fp16 values in a word, `low` in the low half; one instruction.
VQ_INLINE u32 pack_halves(float low, float high) {
    return detail::bits_as<u32>(__floats2half2_rn(low, high));
}
VQ_INLINE Pack<float, 2> unpack_halves(u32 word) {
    const float2 both = __half22float2(detail::bits_as<__half2>(word));
    return {both.x, both.y};
}

// --------------------------------------------------------------------------- asynchronous copies

// BYTES (4, 8 or 16) from global to shared memory behind the thread's back; sm_80 on.
template <int BYTES, class T>
VQ_INLINE void copy_async(Shared<T> to, int i, Global<const T> from, i64 j) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
    const u32 target = detail::shared_address(to.at + i);
    if constexpr (BYTES == 16) {
        // 16 bytes may pass L1 by
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from.at + j)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(from.at + j),
                     "n"(BYTES)
                     : "memory");
    }
}
VQ_INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most PENDING of this thread's groups are on their way.
template <int PENDING>
VQ_INLINE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if VQ_HAS_BULK_COPIES

// A barrier in shared memory that counts arrivals and bytes; sm_90 on.
VQ_INLINE void barrier_init(Shared<u64> barrier, int arrivals) {
    const u32 at = detail::shared_address(barrier.at);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine; before sync_block.
VQ_INLINE void barrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
VQ_INLINE void barrier_arrive(Shared<u64> barrier) {
    const u32 at = detail::shared_address(barrier.at);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Arrive, and let the phase wait for `bytes` of bulk copies too.
VQ_INLINE void barrier_expect(Shared<u64> barrier, u32 bytes) {
    const u32 at = detail::shared_address(barrier.at);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}
// Wait for the end of the phase of this parity (0 for the first).
VQ_INLINE void barrier_wait(Shared<u64> barrier, u32 parity) {
    const u32 at = detail::shared_address(barrier.at);
    u32 done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(at), "r"(parity)
            : "memory");
    }
}
// One thread starts a copy of `bytes`, a multiple of 16, both ends aligned to 16.
template <class T>
VQ_INLINE void copy_bulk(Shared<T> to, int i, Global<const T> from, i64 j, u32 bytes,
                         Shared<u64> barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(detail::shared_address(to.at + i)),
        "l"(from.at + j), "r"(bytes), "r"(detail::shared_address(barrier.at))
        : "memory");
}

VQ_INLINE int cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
VQ_INLINE int cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
}
VQ_INLINE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// A 4-byte value from the shared memory of the cluster's block `rank`, where `at` is this block's.
template <class T>
VQ_INLINE T cluster_load(Shared<T> at, int i, int rank) {
    static_assert(sizeof(T) == 4, "one word");
    u32 word, remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote)
        : "r"(detail::shared_address(at.at + i)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(remote) : "memory");
    return detail::bits_as<T>(word);
}

#endif

// ---------------------------------------------------------------------------------- tensor cores
// Fragments as PTX numbers them; lane = 4 * group + thread.

// d[16, 8] += a[16, 16] * b[16, 8]; 16-bit operands, fp32 sums.
template <class T>
VQ_INLINE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    static_assert(sizeof(T) == 2, "half or bfloat16");
    if constexpr (detail::is_half<T>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}
// The same with fp16 operands and fp16 sums: two packed registers.
VQ_INLINE void mma_m16n8k16(u32 (&d)[2], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16, 8] += a[16, 32] * b[32, 8]; signed bytes, int32 sums.
VQ_INLINE void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8 by the index of its
// first element, 16-byte aligned.
template <class T>
VQ_INLINE void load_matrices(u32 (&d)[4], Shared<T> from, int i) {
    static_assert(sizeof(T) == 2, "16-bit values");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(detail::shared_address(from.at + i))
                 : "memory");
}
// Each matrix transposed.
template <class T>
VQ_INLINE void load_matrices_transposed(u32 (&d)[4], Shared<T> from, int i) {
    static_assert(sizeof(T) == 2, "16-bit values");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(detail::shared_address(from.at + i))
                 : "memory");
}

}  // namespace vq
