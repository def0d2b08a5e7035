// Reports: what was wrong, in which thread, at which line.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace vq::harness {

// Names of faults, as Python's Kind has them.
namespace kind {
constexpr const char* OUT_OF_BOUNDS = "out_of_bounds";
constexpr const char* MISALIGNED = "misaligned";
constexpr const char* READ_ONLY = "read_only";
constexpr const char* UNWRITTEN = "unwritten";
constexpr const char* RACE = "race";
constexpr const char* IN_FLIGHT = "in_flight";
constexpr const char* DIVERGENT_BARRIER = "divergent_barrier";
constexpr const char* DIVERGENT_WARP = "divergent_warp";
constexpr const char* DEADLOCK = "deadlock";
constexpr const char* BARRIER_MISUSE = "barrier_misuse";
constexpr const char* UNFINISHED_COPY = "unfinished_copy";
constexpr const char* BLOCK_EXITED = "block_exited";
}  // namespace kind

// Another access that a fault is about.
struct Other {
    const Thread* thread = nullptr;
    At at{};
};

inline const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

inline void copy_text(char* to, std::size_t size, const char* from) {
    std::snprintf(to, size, "%s", from);
}

// Records one fault a kind and line. After the last that the launch has room for, nothing runs on.
[[gnu::format(printf, 5, 6)]] inline void fault(const char* kind, const Thread& thread, At at,
                                                Other other, const char* format, ...) {
    const char* file = at.file ? at.file : "";
    bool known = false;
    for (const VqFault& old : state.faults) {
        known |= old.line == at.line && !std::strcmp(old.kind, kind) &&
                 !std::strcmp(old.file, file);
    }
    if (known) return;
    VqFault record{};
    copy_text(record.kind, sizeof record.kind, kind);
    copy_text(record.file, sizeof record.file, file);
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(record.message, sizeof record.message, format, values);
    va_end(values);
    const uint3 block = block_of(thread).id;
    record.line = at.line;
    record.thread = thread.in_block;
    record.block[0] = int(block.x);
    record.block[1] = int(block.y);
    record.block[2] = int(block.z);
    record.other_thread = -1;
    if (other.at.file) {
        copy_text(record.other_file, sizeof record.other_file, other.at.file);
        record.other_line = other.at.line;
        if (other.thread) record.other_thread = other.thread->in_block;
    }
    state.faults.push_back(record);
    if (int(state.faults.size()) < state.launch->max_faults) return;
    state.stopped = true;
    // from a thread: away for good; its stack is used again
    if (state.running) leave();
}

// What a faulty access reads and writes instead.
inline u8* scratch() {
    alignas(16) static u8 bytes[16];
    std::memset(bytes, 0, sizeof bytes);
    return bytes;
}

inline bool misaligned(const void* at, int width, At called) {
    const auto rest = reinterpret_cast<std::uintptr_t>(at) % width;
    if (rest == 0) return false;
    fault(kind::MISALIGNED, *state.running, called, {},
          "an access of %d bytes lies %d bytes past a multiple of %d", width, int(rest), width);
    return true;
}

// Counts an access of the running thread, and names its line.
inline int count_access(const char* kind, At at, int width, u64 address) {
    const int number = state.sites.find(kind, at, width);
    if (state.launch->counting) {
        VqSite& site = state.sites[number];
        site.lanes++;
        site.bytes += u64(width);
        const Thread& thread = *state.running;
        state.warps[thread.warp]->log.add(number, thread.lane, address);
    }
    return number;
}

}  // namespace vq::harness
