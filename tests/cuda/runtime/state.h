// The running launch: its threads, warps, blocks, buffers, and who runs now.
#pragma once

#include <harness.h>

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "counters.h"
#include "fiber.h"
#include "records.h"

namespace vq::harness {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

constexpr int LANES = 32;
constexpr u32 NOBODY = ~0u;

// A group of cp.async copies that is on its way: data lands when the thread waits for it.
struct AsyncCopy {
    u32 offset;
    int bytes;
    u8 data[16];
    int site;
};

enum class Waits { nothing, block, warp, barrier, cluster, exited };

struct Thread {
    Fiber fiber;
    int index = 0;  // in the cluster
    int block = 0;  // in the cluster
    int in_block = 0;
    int warp = 0;  // in the cluster
    int lane = 0;
    Waits waits = Waits::nothing;
    At at{};  // of what it waits for
    Collective collective{};
    int collectives = 0;
    u64 accesses = 0;
    Clock clock = 1;
    Known known;
    std::vector<AsyncCopy> open;                // not committed yet
    std::deque<std::vector<AsyncCopy>> groups;  // committed, oldest first
    std::string waits_for;                      // a barrier, in words
};

struct Deposit {
    u32 in[LANES][COLLECTIVE_WORDS];
    u32 out[LANES][4];
};

struct Warp {
    std::vector<Thread*> lanes;
    int arrived = 0;
    // a lane may be one collective ahead of those that have not read their result yet
    Deposit deposits[2];
    Joined learned;
    WarpLog log;
};

// Of one byte of shared memory; who and clock say when an access was (see clocks.h).
struct Shadow {
    u32 writer = NOBODY, written = 0;
    u32 reader = NOBODY, read = 0;
    u32 more = 0;  // further readers: a row of Block::readers
    u16 write_site = 0, read_site = 0;
    u8 flags = 0;
};

struct Reader {
    u32 who = NOBODY;
    Clock clock = 0;
    u16 site = 0;
    bool atomic = false;  // an atomic addition that a later one hides
};

struct Block {
    uint3 id{};
    u8* memory = nullptr;
    std::vector<Shadow> shadow;
    std::vector<Reader> readers;
    std::vector<Thread*> threads;
    std::vector<Reader> remote;  // last cluster_load by each thread of the cluster
    int arrived = 0;
    int exited = 0;
};

// A bulk copy on its way.
struct BulkCopy {
    u32 offset, bytes;
    const void* from;
    int site;
};

// A barrier in shared memory.
struct Barrier {
    int block = 0;
    u32 offset = 0;
    u32 who = 0;  // its place among the clocks
    int expected = 0, pending = 0;
    i64 bytes = 0;
    u32 phase = 0;
    bool published = false;
    int initialiser = 0;
    Known gathered, released;
    std::vector<BulkCopy> flying;
    std::vector<Thread*> waiting;
};

struct Buffer {
    std::string name;
    u8* begin = nullptr;
    u64 bytes = 0;
    bool writable = false;
    // of each byte, where writable
    std::vector<u32> writer;
    std::vector<u16> site;
    std::vector<u8> flags;
};

struct State {
    const VqLaunch* launch = nullptr;
    Kernel kernel = nullptr;
    Fiber scheduler;
    Stacks stacks;
    std::mt19937_64 random;
    int preempt_in = 0;  // accesses until the running thread is preempted; 0: never
    bool stopped = false;

    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<Block> blocks;  // of the cluster
    std::deque<Thread*> ready;
    std::unordered_map<u64, std::unique_ptr<Barrier>> barriers;  // by block and offset
    u32 barrier_count = 0;
    u64 first_block = 0;  // linear number of the cluster's first
    int cluster_arrived = 0;
    std::vector<u8> memory;

    std::vector<Buffer> buffers;
    std::vector<VqFault> faults;
    Sites sites;

    Thread* running = nullptr;
};

inline State state;

inline Block& block_of(const Thread& thread) { return state.blocks[thread.block]; }

// Leave the running thread; it goes on when it is ready and chosen.
void leave();
inline void wake(Thread& thread) {
    thread.waits = Waits::nothing;
    state.ready.push_back(&thread);
}
inline void wait_for(Waits what, At at) {
    Thread& thread = *state.running;
    thread.waits = what;
    thread.at = at;
    leave();
}
// A thread that does more is waiting in a loop for what no barrier brings.
constexpr u64 MOST_ACCESSES = 1 << 24;
void report_spinning();

// At every access: another thread may run here, where the seed says so.
inline void may_preempt() {
    if (++state.running->accesses > MOST_ACCESSES) report_spinning();
    if (state.preempt_in == 0 || --state.preempt_in > 0) return;
    state.preempt_in = 1 + int(state.random() % 64);
    state.ready.push_back(state.running);
    leave();
}

}  // namespace vq::harness
