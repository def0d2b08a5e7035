// Copies behind a thread's back, and the barriers in shared memory that count them.
//
// Data lands as late as it may: cp.async when its thread waits for the group, a bulk copy when its
// barrier is waited for and nothing else can run. Until then, nobody may touch the bytes.
#pragma once

#include "global.h"
#include "shared.h"

namespace vq::harness {

// From here on the bytes belong to the copy.
inline bool begin_flight(Block& block, i64 offset, u32 bytes, int site, At called) {
    for (u32 i = 0; i < bytes; i++) {
        if (!check_write_order(block, u32(offset) + i, false, called)) return false;
    }
    for (u32 i = 0; i < bytes; i++) {
        Shadow& byte = block.shadow[offset + i];
        forget_readers(block, byte);
        byte.flags = IN_FLIGHT;
        byte.write_site = u16(site);
    }
    std::memset(block.memory + offset, 0xff, bytes);  // what was there is lost
    return true;
}

inline void end_flight(Block& block, u32 offset, u32 bytes, const void* data, u32 who,
                       Clock clock) {
    std::memcpy(block.memory + offset, data, bytes);
    for (u32 i = 0; i < bytes; i++) {
        Shadow& byte = block.shadow[offset + i];
        byte.writer = who;
        byte.written = clock;
        byte.flags = WRITTEN;
    }
}

inline void start_copy(const void* to, const void* base, const void* from, int bytes, At called) {
    may_preempt();
    Thread& thread = *state.running;
    Block& block = block_of(thread);
    const void* data = global_read(base, from, bytes, "global_copy", called);
    const i64 offset = shared_offset(block, to, bytes, called);
    if (offset < 0 || misaligned(to, bytes, called)) return;
    if (touches_barrier(block, offset, bytes, called)) return;
    const int site = state.sites.find("copy", called, bytes);
    if (!begin_flight(block, offset, u32(bytes), site, called)) return;
    AsyncCopy copy{u32(offset), bytes, {}, site};
    std::memcpy(copy.data, data, std::size_t(bytes));
    thread.open.push_back(copy);
}

inline void commit_copies() {
    Thread& thread = *state.running;
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

inline void wait_for_copies(int pending) {
    Thread& thread = *state.running;
    while (int(thread.groups.size()) > pending) {
        for (const AsyncCopy& copy : thread.groups.front()) {
            end_flight(block_of(thread), copy.offset, u32(copy.bytes), copy.data,
                       u32(thread.index), thread.clock);
        }
        thread.groups.pop_front();
    }
}

// ------------------------------------------------------------------------------------- barriers

inline u64 barrier_key(int block, u32 offset) { return u64(block) << 32 | offset; }

// The barrier at an address, which must have been initialised before. Null after a fault.
inline Barrier* barrier_at(const void* at, At called) {
    may_preempt();
    const Thread& thread = *state.running;
    Block& block = block_of(thread);
    const i64 offset = shared_offset(block, at, 8, called);
    if (offset < 0 || misaligned(at, 8, called)) return nullptr;
    const auto found = state.barriers.find(barrier_key(thread.block, u32(offset)));
    if (found == state.barriers.end()) {
        fault(kind::BARRIER_MISUSE, thread, called, {}, "no barrier was initialised at byte %lld",
              (long long)offset);
        return nullptr;
    }
    const Shadow& byte = block.shadow[offset];
    if (!came_before(byte.writer, byte.written, thread)) {
        report_race("use", u32(offset), byte.writer, byte.write_site, "initialisation", called);
    }
    return found->second.get();
}

inline void init_barrier(const void* at, int arrivals, At called) {
    Thread& thread = *state.running;
    Block& block = block_of(thread);
    const i64 offset = shared_offset(block, at, 8, called);
    if (offset < 0 || misaligned(at, 8, called)) return;
    if (arrivals < 1 || arrivals > (1 << 20) - 1) {
        fault(kind::BARRIER_MISUSE, thread, called, {}, "a barrier of %d arrivals", arrivals);
        return;
    }
    if (touches_barrier(block, offset, 8, called)) return;
    const int site = state.sites.find("barrier", called, 8);
    for (u32 i = 0; i < 8; i++) {
        if (!check_write(block, u32(offset) + i, false, site, called)) return;
        block.shadow[offset + i].flags |= IS_BARRIER;
    }
    auto barrier = std::make_unique<Barrier>();
    barrier->block = thread.block;
    barrier->offset = u32(offset);
    barrier->who = u32(state.threads.size()) + state.barrier_count++;
    barrier->expected = barrier->pending = arrivals;
    barrier->initialiser = thread.index;
    state.barriers[barrier_key(thread.block, u32(offset))] = std::move(barrier);
}

inline void publish_barriers() {
    for (auto& [key, barrier] : state.barriers) {
        if (barrier->initialiser == state.running->index) barrier->published = true;
    }
}

// Past a phase, a thread knows what those knew that arrived.
inline void learn(Thread& thread, const Barrier& barrier) {
    thread.known = joined(thread.known, barrier.released, state.warps[thread.warp]->learned);
}

inline void complete_phase(Barrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    auto released = barrier.gathered ? std::make_shared<Clocks>(*barrier.gathered)
                                     : std::make_shared<Clocks>();
    raise_to(*released, barrier.who, ++barrier.phase);
    barrier.gathered = barrier.released = released;
    barrier.pending = barrier.expected;
    for (Thread* thread : barrier.waiting) {
        learn(*thread, barrier);
        wake(*thread);
    }
    barrier.waiting.clear();
}

inline void land(Barrier& barrier) {
    for (const BulkCopy& copy : barrier.flying) {
        end_flight(state.blocks[barrier.block], copy.offset, copy.bytes, copy.from, barrier.who,
                   barrier.phase + 1);
        barrier.bytes -= copy.bytes;
    }
    barrier.flying.clear();
    complete_phase(barrier);
}

inline void arrive(Barrier& barrier, At called) {
    Thread& thread = *state.running;
    if (barrier.pending == 0) {
        fault(kind::BARRIER_MISUSE, thread, called, {},
              "the barrier at byte %u takes %d arrivals a phase, and this is one more",
              barrier.offset, barrier.expected);
        return;
    }
    auto gathered = barrier.gathered ? std::make_shared<Clocks>(*barrier.gathered)
                                     : std::make_shared<Clocks>();
    join_into(*gathered, thread.known);
    raise_to(*gathered, u32(thread.index), thread.clock++);
    barrier.gathered = gathered;
    barrier.pending--;
    complete_phase(barrier);
}

inline void expect_bytes(Barrier& barrier, u32 bytes, At called) {
    barrier.bytes += bytes;
    arrive(barrier, called);
}

inline void wait_for_phase(Barrier& barrier, u32 parity, At called) {
    Thread& thread = *state.running;
    // an early landing is as good as a late one: random orders try both
    if (state.launch->seed > 1 && state.random() % 2) land(barrier);
    if ((barrier.phase & 1) != (parity & 1)) {
        learn(thread, barrier);
        return;
    }
    barrier.waiting.push_back(&thread);
    thread.waits_for = "byte " + std::to_string(barrier.offset) + ", phase " +
                       std::to_string(barrier.phase);
    wait_for(Waits::barrier, called);
}

// Once nothing else can run, copies land. Whether a thread can go on now.
inline bool land_all() {
    for (auto& [key, barrier] : state.barriers) {
        if (!barrier->waiting.empty() && !barrier->flying.empty()) land(*barrier);
    }
    return !state.ready.empty();
}

inline void start_bulk_copy(const void* to, const void* base, const void* from, u32 bytes,
                            const void* barrier_pointer, At called) {
    Barrier* barrier = barrier_at(barrier_pointer, called);
    if (!barrier) return;
    const Thread& thread = *state.running;
    Block& block = block_of(thread);
    if (!barrier->published) {
        fault(kind::BARRIER_MISUSE, thread, called, {},
              "the barrier at byte %u was not published to the copy engine", barrier->offset);
    }
    if (bytes % 16 || bytes == 0) {
        fault(kind::MISALIGNED, thread, called, {}, "a bulk copy of %u bytes, no multiple of 16",
              bytes);
        return;
    }
    const Place place = place_of(base, from, bytes, called);
    const i64 offset = shared_offset(block, to, bytes, called);
    if (!place.buffer || offset < 0) return;
    if (misaligned(from, 16, called) || misaligned(to, 16, called)) return;
    if (touches_barrier(block, offset, int(bytes), called)) return;
    const int site = state.sites.find("global_bulk_copy", called, 16);
    if (place.buffer->writable) {
        check_global_read(*place.buffer, place.offset, int(bytes), site, called);
    }
    VqSite& counts = state.sites[site];
    counts.lanes++;
    counts.requests++;
    counts.bytes += bytes;
    counts.sectors += (reinterpret_cast<std::uintptr_t>(from) % 32 + bytes + 31) / 32;
    if (!begin_flight(block, offset, bytes, site, called)) return;
    barrier->flying.push_back({u32(offset), bytes, from, site});
}

// What is still on its way when a cluster has ended.
inline void check_landed() {
    for (const auto& thread : state.threads) {
        auto left = thread->open;
        for (const auto& group : thread->groups) {
            left.insert(left.end(), group.begin(), group.end());
        }
        if (left.empty()) continue;
        fault(kind::UNFINISHED_COPY, *thread, state.sites.at(left[0].site), {},
              "the thread ends and has not waited for its copy to shared byte %u", left[0].offset);
    }
    for (const auto& [key, barrier] : state.barriers) {
        if (barrier->flying.empty()) continue;
        fault(kind::UNFINISHED_COPY, *state.threads[barrier->initialiser],
              state.sites.at(barrier->flying[0].site), {},
              "the block ends and nobody has waited for the copy to shared byte %u",
              barrier->flying[0].offset);
    }
}

}  // namespace vq::harness
