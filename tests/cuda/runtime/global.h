// Global memory: bounds of the launch's buffers, and who wrote what.
#pragma once

#include "faults.h"

namespace vq::harness {

constexpr u8 GLOBAL_WRITTEN = 1, GLOBAL_READ = 2;
constexpr u32 ATOMIC = 1u << 31;  // a writer that adds atomically

// The running thread's number in the grid, from 1 on.
inline u32 grid_thread() {
    const Thread& thread = *state.running;
    return u32((state.first_block + u64(thread.block)) * u64(state.launch->threads)) +
           u32(thread.in_block) + 1;
}

inline Buffer* buffer_around(const void* at) {
    const auto address = static_cast<const u8*>(at);
    for (Buffer& buffer : state.buffers) {
        if (address >= buffer.begin && address < buffer.begin + buffer.bytes) return &buffer;
    }
    return nullptr;
}

struct Place {
    Buffer* buffer = nullptr;
    u64 offset = 0;
};

// The buffer that `base` points into, and `at` within it. Null after a fault.
inline Place place_of(const void* base, const void* at, u64 bytes, At called) {
    const Thread& thread = *state.running;
    Buffer* buffer = buffer_around(base);
    if (!buffer) {
        const i64 off = static_cast<const u8*>(at) - static_cast<const u8*>(base);
        fault(kind::OUT_OF_BOUNDS, thread, called, {},
              base ? "%llu bytes at %+lld of a pointer into no buffer"
                   : "%llu bytes at %+lld of a null pointer",
              (unsigned long long)bytes, (long long)off);
        return {};
    }
    const i64 offset = static_cast<const u8*>(at) - buffer->begin;
    if (offset < 0 || u64(offset) + bytes > buffer->bytes) {
        fault(kind::OUT_OF_BOUNDS, thread, called, {},
              "bytes %lld to %lld of buffer %s, which has %llu", (long long)offset,
              (long long)(offset + i64(bytes)), buffer->name.c_str(),
              (unsigned long long)buffer->bytes);
        return {};
    }
    return {buffer, u64(offset)};
}

// Another thread's mark on a byte of a buffer, in words.
inline Other writer_of(const Buffer& buffer, u64 byte) {
    return {nullptr, state.sites.at(buffer.site[byte])};
}

inline void describe_race(const Buffer& buffer, u64 byte, At called, const char* what) {
    const u32 writer = buffer.writer[byte];
    const u32 threads = u32(state.launch->threads);
    const u32 by = (writer & ~ATOMIC) - 1;
    if (writer == 0) {
        fault(kind::RACE, *state.running, called, writer_of(buffer, byte),
              "byte %llu of buffer %s is %s, and another access of the launch reads it",
              (unsigned long long)byte, buffer.name.c_str(), what);
        return;
    }
    fault(kind::RACE, *state.running, called, writer_of(buffer, byte),
          "byte %llu of buffer %s is %s, and thread %u of block %u (linear) writes it at %s:%d",
          (unsigned long long)byte, buffer.name.c_str(), what, by % threads, by / threads,
          base_name(writer_of(buffer, byte).at.file), writer_of(buffer, byte).at.line);
}

inline void check_global_read(Buffer& buffer, u64 offset, int bytes, int site, At called) {
    for (u64 byte = offset; byte < offset + u64(bytes); byte++) {
        if (buffer.writer[byte]) {
            // the read-only path may give what was there before, whoever wrote
            describe_race(buffer, byte, called, "read by the read-only path");
            return;
        }
        if (!(buffer.flags[byte] & GLOBAL_WRITTEN)) {
            fault(kind::UNWRITTEN, *state.running, called, {},
                  "byte %llu of buffer %s is read and was never written",
                  (unsigned long long)byte, buffer.name.c_str());
            return;
        }
        buffer.flags[byte] |= GLOBAL_READ;
        buffer.site[byte] = u16(site);
    }
}

inline void check_global_write(Buffer& buffer, u64 offset, int bytes, bool atomic, int site,
                               At called) {
    const u32 mine = grid_thread() | (atomic ? ATOMIC : 0);
    for (u64 byte = offset; byte < offset + u64(bytes); byte++) {
        const u32 writer = buffer.writer[byte];
        const bool both_atomic = atomic && (writer & ATOMIC);
        if (buffer.flags[byte] & GLOBAL_READ ||
            (writer && (writer & ~ATOMIC) != (mine & ~ATOMIC) && !both_atomic)) {
            describe_race(buffer, byte, called, atomic ? "added to" : "written");
            return;
        }
        if (atomic && !(buffer.flags[byte] & GLOBAL_WRITTEN)) {
            fault(kind::UNWRITTEN, *state.running, called, {},
                  "byte %llu of buffer %s is added to and was never written",
                  (unsigned long long)byte, buffer.name.c_str());
            return;
        }
        buffer.flags[byte] |= GLOBAL_WRITTEN;
        buffer.writer[byte] = mine;
        buffer.site[byte] = u16(site);
    }
}

inline void* global_write(const void* base, const void* at, int bytes, bool atomic, At called) {
    may_preempt();
    const Place place = place_of(base, at, u64(bytes), called);
    if (!place.buffer || misaligned(at, bytes, called)) return scratch();
    if (!place.buffer->writable) {
        fault(kind::READ_ONLY, *state.running, called, {}, "a write to byte %llu of buffer %s",
              (unsigned long long)place.offset, place.buffer->name.c_str());
        return scratch();
    }
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    const char* name = atomic ? "global_atomic" : "global_store";
    const int site = count_access(name, called, bytes, address);
    check_global_write(*place.buffer, place.offset, bytes, atomic, site, called);
    return place.buffer->begin + place.offset;
}

// `kind` as the counters have it.
inline const void* global_read(const void* base, const void* at, int bytes, const char* kind,
                               At called) {
    const Place place = place_of(base, at, u64(bytes), called);
    if (!place.buffer || misaligned(at, bytes, called)) return scratch();
    const int site = count_access(kind, called, bytes, reinterpret_cast<std::uintptr_t>(at));
    if (place.buffer->writable) check_global_read(*place.buffer, place.offset, bytes, site, called);
    return at;
}

inline const void* read_global(const void* base, const void* at, int bytes, At called) {
    may_preempt();
    return global_read(base, at, bytes, "global_load", called);
}

}  // namespace vq::harness
