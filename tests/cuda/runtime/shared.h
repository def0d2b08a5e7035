// Shared memory: bounds, bytes that nobody wrote, and races.
//
// Two accesses to a byte by different threads, one a write, must be ordered by barriers whatever
// order they ran in: sync_block, cluster_sync, a barrier's arrivals and waits, and sync_warp for
// the lanes of a warp. Shuffles, votes and mma order nothing: CUDA says that of them.
#pragma once

#include "faults.h"

namespace vq::harness {

constexpr u8 WRITTEN = 1, BY_ATOMIC = 2, IN_FLIGHT = 4, IS_BARRIER = 8;

inline bool came_before(u32 who, Clock clock, const Thread& thread) {
    return who == u32(thread.index) || clock <= known_clock(thread.known, who);
}

// A thread, or the barrier of a bulk copy (null).
inline const Thread* thread_of(u32 who) {
    return who < state.threads.size() ? state.threads[who].get() : nullptr;
}

inline void report_race(const char* what, u32 offset, u32 who, u16 other_site, const char* other,
                        At called) {
    const Thread* thread = thread_of(who);
    const At at = state.sites.at(other_site);
    char by[64] = "a bulk copy";
    if (thread) std::snprintf(by, sizeof by, "thread %d", thread->in_block);
    fault(kind::RACE, *state.running, called, {thread, at},
          "no barrier lies between this %s of shared byte %u and the %s by %s at %s:%d", what,
          offset, other, by, base_name(at.file), at.line);
}

// Rows of two lanes a warp: of more readers than that in a warp, the first and the last are kept.
inline Reader* readers_at(Block& block, u32 row) {
    return block.readers.data() + std::size_t(row) * state.warps.size() * 2;
}

inline void add_reader(Block& block, Shadow& byte, const Reader& reader, const Thread& thread) {
    if (byte.more == 0) {
        if (block.readers.empty()) block.readers.resize(state.warps.size() * 2);  // row 0: none
        byte.more = u32(block.readers.size() / (state.warps.size() * 2));
        block.readers.resize(block.readers.size() + state.warps.size() * 2);
    }
    Reader* slot = readers_at(block, byte.more) + std::size_t(state.threads[reader.who]->warp) * 2;
    for (int i = 0; i < 2; i++) {
        if (slot[i].who == NOBODY || slot[i].who == reader.who ||
            came_before(slot[i].who, slot[i].clock, thread)) {
            slot[i] = reader;
            return;
        }
    }
    slot[1] = reader;
}

inline bool check_read(Block& block, u32 offset, int site, At called) {
    const Thread& thread = *state.running;
    Shadow& byte = block.shadow[offset];
    if (byte.flags & IN_FLIGHT) {
        fault(kind::IN_FLIGHT, thread, called, {nullptr, state.sites.at(byte.write_site)},
              "shared byte %u is read before the copy to it has been waited for", offset);
        return false;
    }
    if (!(byte.flags & WRITTEN)) {
        fault(kind::UNWRITTEN, thread, called, {}, "shared byte %u is read and was never written",
              offset);
        return false;
    }
    if (!came_before(byte.writer, byte.written, thread)) {
        report_race("read", offset, byte.writer, byte.write_site, "write", called);
        return false;
    }
    if (byte.flags & BY_ATOMIC && byte.more) {
        const Reader* reader = readers_at(block, byte.more);
        for (std::size_t i = 0; i < state.warps.size() * 2; i++) {
            if (reader[i].atomic && !came_before(reader[i].who, reader[i].clock, thread)) {
                report_race("read", offset, reader[i].who, reader[i].site, "addition", called);
                return false;
            }
        }
    }
    if (byte.reader != NOBODY && !came_before(byte.reader, byte.read, thread)) {
        add_reader(block, byte, {byte.reader, byte.read, byte.read_site, false}, thread);
    }
    byte.reader = u32(thread.index);
    byte.read = thread.clock;
    byte.read_site = u16(site);
    return true;
}

// Whether a write by the running thread comes after every access before.
inline bool check_write_order(Block& block, u32 offset, bool atomic, At called) {
    const Thread& thread = *state.running;
    Shadow& byte = block.shadow[offset];
    if (byte.flags & IN_FLIGHT) {
        fault(kind::IN_FLIGHT, thread, called, {nullptr, state.sites.at(byte.write_site)},
              "shared byte %u is written before the copy to it has been waited for", offset);
        return false;
    }
    const bool both_atomic = atomic && byte.flags & BY_ATOMIC;
    if (byte.writer != NOBODY && !both_atomic && !came_before(byte.writer, byte.written, thread)) {
        report_race("write", offset, byte.writer, byte.write_site, "write", called);
        return false;
    }
    if (byte.reader != NOBODY && !came_before(byte.reader, byte.read, thread)) {
        report_race("write", offset, byte.reader, byte.read_site, "read", called);
        return false;
    }
    const std::size_t count = byte.more ? state.warps.size() * 2 : 0;
    const Reader* reader = byte.more ? readers_at(block, byte.more) : nullptr;
    for (std::size_t i = 0; i < count; i++) {
        if (reader[i].who == NOBODY || (reader[i].atomic && atomic)) continue;
        if (!came_before(reader[i].who, reader[i].clock, thread)) {
            report_race("write", offset, reader[i].who, reader[i].site, "read", called);
            return false;
        }
    }
    return true;
}

inline void forget_readers(Block& block, Shadow& byte) {
    byte.reader = NOBODY;
    if (!byte.more) return;
    Reader* row = readers_at(block, byte.more);
    std::fill(row, row + state.warps.size() * 2, Reader{});
}

inline bool check_write(Block& block, u32 offset, bool atomic, int site, At called) {
    if (!check_write_order(block, offset, atomic, called)) return false;
    const Thread& thread = *state.running;
    Shadow& byte = block.shadow[offset];
    if (atomic && !(byte.flags & WRITTEN)) {
        fault(kind::UNWRITTEN, thread, called, {},
              "shared byte %u is added to and was never written", offset);
        return false;
    }
    if (atomic && byte.flags & BY_ATOMIC) {
        if (!came_before(byte.writer, byte.written, thread)) {
            add_reader(block, byte, {byte.writer, byte.written, byte.write_site, true}, thread);
        }
    } else {
        forget_readers(block, byte);
    }
    byte.writer = u32(thread.index);
    byte.written = thread.clock;
    byte.write_site = u16(site);
    byte.flags = u8(WRITTEN | (atomic ? BY_ATOMIC : 0));
    return true;
}

// The offset of `at` in the block's shared memory; -1 after a fault.
inline i64 shared_offset(const Block& block, const void* at, i64 bytes, At called) {
    const i64 offset = static_cast<const u8*>(at) - block.memory;
    const i64 size = state.launch->shared_bytes;
    if (offset >= 0 && offset + bytes <= size) return offset;
    fault(kind::OUT_OF_BOUNDS, *state.running, called, {},
          "shared bytes %lld to %lld, of %lld that the launch asked for", (long long)offset,
          (long long)(offset + bytes), (long long)size);
    return -1;
}

inline bool touches_barrier(const Block& block, i64 offset, int bytes, At called) {
    for (int i = 0; i < bytes; i++) {
        if (!(block.shadow[offset + i].flags & IS_BARRIER)) continue;
        fault(kind::BARRIER_MISUSE, *state.running, called, {},
              "shared byte %lld belongs to a barrier", (long long)(offset + i));
        return true;
    }
    return false;
}

enum class Access { read, write, atomic };

inline u8* shared_access(Block& block, const void* at, int bytes, Access how, const char* name,
                         At called) {
    may_preempt();
    const i64 offset = shared_offset(block, at, bytes, called);
    if (offset < 0 || misaligned(at, bytes, called)) return scratch();
    if (touches_barrier(block, offset, bytes, called)) return scratch();
    const int site = count_access(name, called, bytes, u64(offset));
    for (int i = 0; i < bytes; i++) {
        const bool fine = how == Access::read
                              ? check_read(block, u32(offset + i), site, called)
                              : check_write(block, u32(offset + i), how == Access::atomic, site,
                                            called);
        if (!fine) break;
    }
    return block.memory + offset;
}

}  // namespace vq::harness
