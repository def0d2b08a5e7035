// What a launch is told and what it tells, as Python's ctypes sees them (harness.py).
#pragma once

#include <cstdint>

extern "C" {

struct VqBuffer {
    const char* name;
    void* data;
    std::uint64_t bytes;
    std::int32_t writable;
    std::int32_t initialised;  // whether a writable buffer may be read before it is written
};

struct VqLaunch {
    const void* argument;
    const VqBuffer* buffers;
    std::int32_t buffer_count;
    std::int32_t grid[3];
    std::int32_t threads;
    std::int32_t cluster;
    std::int32_t shared_bytes;
    std::int32_t counting;
    std::int32_t max_faults;
    std::uint64_t seed;
};

struct VqFault {
    char kind[24];
    char message[400];
    char file[256];
    std::int32_t line;
    std::int32_t thread;
    std::int32_t block[3];
    char other_file[256];  // the access before, of a race
    std::int32_t other_line;
    std::int32_t other_thread;
};

// One line's accesses of one kind and width.
struct VqSite {
    char kind[24];
    char file[256];
    std::int32_t line;
    std::int32_t width;        // bytes that a lane moves at once
    std::uint64_t lanes;       // accesses
    std::uint64_t bytes;       // of all lanes
    std::uint64_t requests;    // warp accesses
    std::uint64_t sectors;     // of 32 bytes, global
    std::uint64_t wavefronts;  // shared
    std::uint64_t ideal;       // wavefronts without any bank conflict
};

}  // extern "C"
