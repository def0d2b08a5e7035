// Operations of a whole warp, block or cluster, and what they order.
#pragma once

#include "faults.h"
#include "fragments.h"

namespace vq::harness {

// All these threads know what any of them knows, and what each did before now.
inline void order(const std::vector<Thread*>& threads) {
    auto all = std::make_shared<Clocks>();
    const Clocks* last = nullptr;
    for (const Thread* thread : threads) {
        if (thread->known.get() != last) join_into(*all, thread->known);
        last = thread->known.get();
    }
    raise_to(*all, u32(threads.back()->index), 0);
    for (const Thread* thread : threads) (*all)[thread->index] = thread->clock;
    for (Thread* thread : threads) {
        thread->clock++;
        thread->known = all;
    }
}

inline void flush_counts(const Block& block) {
    if (!state.launch->counting) return;
    for (const Thread* thread : block.threads) {
        if (thread->lane == 0) state.warps[thread->warp]->log.flush(state.sites);
    }
}

inline bool same_place(At a, At b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

inline bool check_same_place(const std::vector<Thread*>& threads, const char* kind,
                             const char* what) {
    for (const Thread* thread : threads) {
        const At first = threads[0]->at;
        if (same_place(thread->at, first) && thread->collective == threads[0]->collective) continue;
        fault(kind, *thread, thread->at, {threads[0], first},
              "%s is at %s:%d here, and at %s:%d for thread %d", what, base_name(thread->at.file),
              thread->at.line, base_name(first.file), first.line, threads[0]->in_block);
        return false;
    }
    return true;
}

inline void finish_collective(Warp& warp, Deposit& deposit, Collective what) {
    const auto widen_half = [](u32 bits) { return half_table()[bits]; };
    switch (what) {
        case Collective::sync_warp: order(warp.lanes); break;
        case Collective::shuffle:
        case Collective::shuffle_xor:
            for (int lane = 0; lane < LANES; lane++) {
                const u32 operand = deposit.in[lane][1];
                const u32 from = what == Collective::shuffle ? operand : u32(lane) ^ operand;
                deposit.out[lane][0] = deposit.in[from % LANES][0];
            }
            break;
        case Collective::ballot: {
            u32 votes = 0;
            for (int lane = 0; lane < LANES; lane++) votes |= deposit.in[lane][0] << lane;
            for (auto& out : deposit.out) out[0] = votes;
            break;
        }
        case Collective::mma_half: multiply_16bit(deposit, widen_half, false); break;
        case Collective::mma_half_sums: multiply_16bit(deposit, widen_half, true); break;
        case Collective::mma_bfloat16: multiply_16bit(deposit, widen_bfloat16, false); break;
        case Collective::mma_bytes: multiply_bytes(deposit); break;
        case Collective::matrices: spread_matrices(deposit, false); break;
        case Collective::matrices_transposed: spread_matrices(deposit, true); break;
    }
}

// Everyone goes on, and the running thread with them, in the launch's order.
inline void wake_all(std::vector<Thread*> threads) {
    if (state.launch->seed == 1) std::reverse(threads.begin(), threads.end());
    for (Thread* thread : threads) wake(*thread);
    leave();
}

inline void warp_collective(Collective what, const u32* in, int words_in, u32* out, int words_out,
                            At called) {
    Thread& thread = *state.running;
    Warp& warp = *state.warps[thread.warp];
    Deposit& deposit = warp.deposits[thread.collectives++ % 2];
    if (words_in) std::memcpy(deposit.in[thread.lane], in, std::size_t(words_in) * 4);
    thread.at = called;
    thread.collective = what;
    if (++warp.arrived < LANES) {
        wait_for(Waits::warp, called);
    } else {
        warp.arrived = 0;
        check_same_place(warp.lanes, kind::DIVERGENT_WARP, "the lanes' operation");
        finish_collective(warp, deposit, what);
        wake_all(warp.lanes);
    }
    if (words_out) std::memcpy(out, deposit.out[thread.lane], std::size_t(words_out) * 4);
}

inline void block_barrier(At called) {
    Thread& thread = *state.running;
    Block& block = block_of(thread);
    thread.at = called;
    thread.collective = {};
    if (++block.arrived < int(block.threads.size())) {
        wait_for(Waits::block, called);
        return;
    }
    block.arrived = 0;
    check_same_place(block.threads, kind::DIVERGENT_BARRIER, "the block's barrier");
    order(block.threads);
    flush_counts(block);
    wake_all(block.threads);
}

inline void cluster_barrier(At called) {
    Thread& thread = *state.running;
    thread.at = called;
    thread.collective = {};
    if (++state.cluster_arrived < int(state.threads.size())) {
        wait_for(Waits::cluster, called);
        return;
    }
    state.cluster_arrived = 0;
    std::vector<Thread*> threads;
    for (const auto& each : state.threads) threads.push_back(each.get());
    order(threads);
    for (const Block& block : state.blocks) flush_counts(block);
    wake_all(threads);
}

// ------------------------------------------------------------------------------------ deadlocks

inline std::string whereabouts(const Thread& thread) {
    const char* what = thread.waits == Waits::exited    ? " has ended"
                       : thread.waits == Waits::block   ? " waits for its block"
                       : thread.waits == Waits::warp    ? " waits for its warp"
                       : thread.waits == Waits::cluster ? " waits for its cluster"
                                                        : " waits for a barrier";
    std::string text = "thread " + std::to_string(thread.in_block) + what;
    if (thread.waits == Waits::exited) return text;
    return text + " at " + base_name(thread.at.file) + ":" + std::to_string(thread.at.line);
}

// One of those that `thread` waits for and that does something else.
inline const Thread* missing(const Thread& thread) {
    for (const auto& other : state.threads) {
        const bool awaited = thread.waits == Waits::warp    ? other->warp == thread.warp
                             : thread.waits == Waits::block ? other->block == thread.block
                                                            : true;
        if (awaited && other->waits != thread.waits) return other.get();
    }
    return nullptr;
}

// Nobody can run on: says who waits for whom.
inline void report_deadlock() {
    for (const auto& owned : state.threads) {
        const Thread& thread = *owned;
        if (thread.waits == Waits::exited || state.stopped) continue;
        if (thread.waits == Waits::barrier) {
            fault(kind::DEADLOCK, thread, thread.at, {},
                  "waits for the barrier at %s, which does not end", thread.waits_for.c_str());
            continue;
        }
        const Thread* other = missing(thread);
        const bool warp = thread.waits == Waits::warp;
        const At at = other && other->waits != Waits::exited ? other->at : At{};
        fault(warp ? kind::DIVERGENT_WARP : kind::DIVERGENT_BARRIER, thread, thread.at, {other, at},
              "waits for its %s, and %s", warp ? "warp" : "block or cluster",
              other ? whereabouts(*other).c_str() : "some lanes of the warp are not there");
    }
}

}  // namespace vq::harness
