// Happens-before by vector clocks: which accesses of other threads a thread's own come after.
//
// A thread's clock counts what it has released: barriers, arrivals. What it knows of the others is
// shared by all threads that left the same barrier, and copied when one learns more. A barrier in
// shared memory has a clock too, its completed phases: what a bulk copy wrote is as old as that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace vq::harness {

using Clock = std::uint32_t;
using Clocks = std::vector<Clock>;
using Known = std::shared_ptr<const Clocks>;

inline Clock known_clock(const Known& known, std::uint32_t who) {
    return known && who < known->size() ? (*known)[who] : 0;
}

inline void join_into(Clocks& into, const Known& from) {
    if (!from) return;
    if (into.size() < from->size()) into.resize(from->size());
    for (std::size_t i = 0; i < from->size(); i++) into[i] = std::max(into[i], (*from)[i]);
}

inline void raise_to(Clocks& clocks, std::uint32_t who, Clock clock) {
    if (clocks.size() <= who) clocks.resize(who + 1);
    clocks[who] = std::max(clocks[who], clock);
}

// What joins two of these, kept: the lanes of a warp ask for the same two in turn.
struct Joined {
    Known a, b, both;
};

// Both; the one that is already known to the other is not copied.
inline Known joined(const Known& a, const Known& b, Joined& last) {
    if (!b || a == b) return a;
    if (!a) return b;
    if (a != last.a || b != last.b) {
        auto both = std::make_shared<Clocks>(*a);
        join_into(*both, b);
        last = {a, b, both};
    }
    return last.both;
}

}  // namespace vq::harness
