// What the host version of device.cuh asks of the runtime. Each function checks one access of the
// running thread; a pointer that comes back is good to read or write, also after a fault.
#pragma once

#include <host_types.h>

#define VQ_EXPORTED __attribute__((visibility("default")))

// A unit hides its own functions: another may have others of these names.
#pragma GCC visibility push(default)

namespace vq::harness {

// Where in the kernel's text.
struct At {
    const char* file;
    int line;
};

// As the last parameter: the place of the call.
#define VQ_AT ::vq::harness::At called = {__builtin_FILE(), __builtin_LINE()}

// `base` is the pointer that the kernel was given and `at` the element, so that a read past the
// end is one even where another buffer begins there.
const void* global_load(const void* base, const void* at, int bytes, At);
void* global_store(const void* base, const void* at, int bytes, At);
void* global_atomic(const void* base, const void* at, int bytes, At);

void* shared_base();
const void* shared_load(const void* at, int bytes, At);
void* shared_store(const void* at, int bytes, At);
void* shared_atomic(const void* at, int bytes, At);

void sync_block(At);

// Every lane hands in words and gets the words that are its part of the result.
enum class Collective {
    sync_warp,
    shuffle,         // value, lane -> value
    shuffle_xor,     // value, mask -> value
    ballot,          // 0 or 1 -> votes
    mma_half,        // a[4], b[2], d[4] -> d[4]
    mma_bfloat16,    // the same
    mma_half_sums,   // a[4], b[2], d[2] -> d[2]
    mma_bytes,       // a[4], b[2], d[4] -> d[4]
    matrices,        // the 16 bytes of a row -> d[4]
    matrices_transposed,
};
constexpr int COLLECTIVE_WORDS = 10;
void collect(Collective what, const std::uint32_t* in, int words_in, std::uint32_t* out,
             int words_out, At);

void copy_async(const void* to, const void* base, const void* from, int bytes, At);
void copy_commit();
void copy_wait(int pending);

void barrier_init(const void* barrier, int arrivals, At);
void barrier_publish();
void barrier_arrive(const void* barrier, At);
void barrier_expect(const void* barrier, std::uint32_t bytes, At);
void barrier_wait(const void* barrier, std::uint32_t parity, At);
void copy_bulk(const void* to, const void* base, const void* from, std::uint32_t bytes,
               const void* barrier, At);

int cluster_rank();
int cluster_size();
void cluster_sync(At);
const void* cluster_load(const void* at, int bytes, int rank, At);

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float value);
float bfloat16_to_float(std::uint16_t bits);
std::uint16_t float_to_bfloat16(float value);

#pragma GCC visibility pop

// A kernel of a unit, called with a pointer to its argument.
using Kernel = void (*)(const void* argument);
template <class A>
void invoke(void (*kernel)(A), const void* argument) {
    A copy;
    std::memcpy(static_cast<void*>(&copy), argument, sizeof(A));
    kernel(copy);
}

}  // namespace vq::harness
