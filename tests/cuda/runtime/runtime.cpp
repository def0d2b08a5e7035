// The scheduler, and the functions that device.cuh and Python call.
#include "collectives.h"
#include "copies.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace vq::harness {

void leave() { Fiber::change(state.running->fiber, state.scheduler); }

void report_spinning() {
    fault(kind::DEADLOCK, *state.running, {}, {}, "the thread accesses memory without end");
    state.stopped = true;
    leave();
}

// -------------------------------------------------------------------------------- the scheduler

static void run_thread() {
    state.kernel(state.launch->argument);
    Thread& thread = *state.running;
    thread.waits = Waits::exited;
    block_of(thread).exited++;
    leave();
}

static void make_cluster() {
    const VqLaunch& launch = *state.launch;
    const int warps = (launch.threads + LANES - 1) / LANES;
    for (int index = 0; index < launch.threads * launch.cluster; index++) {
        auto thread = std::make_unique<Thread>();
        thread->index = index;
        thread->block = index / launch.threads;
        thread->in_block = index % launch.threads;
        thread->warp = thread->block * warps + thread->in_block / LANES;
        thread->lane = thread->in_block % LANES;
        state.threads.push_back(std::move(thread));
    }
    for (int index = 0; index < warps * launch.cluster; index++) {
        state.warps.push_back(std::make_unique<Warp>());
    }
    // a block's shared memory begins at a multiple of 1,024 bytes
    const std::size_t pitch = (std::size_t(launch.shared_bytes) + 2047) / 1024 * 1024;
    state.memory.resize(pitch * std::size_t(launch.cluster) + 1024);
    auto memory = reinterpret_cast<std::uintptr_t>(state.memory.data());
    memory = (memory + 1023) / 1024 * 1024;
    state.blocks.resize(std::size_t(launch.cluster));
    for (int rank = 0; rank < launch.cluster; rank++) {
        state.blocks[rank].memory = reinterpret_cast<u8*>(memory + pitch * std::size_t(rank));
    }
    for (const auto& thread : state.threads) {
        state.blocks[thread->block].threads.push_back(thread.get());
        state.warps[thread->warp]->lanes.push_back(thread.get());
    }
}

// As it is when a cluster starts, `first` being its first block.
static void reset_cluster(u64 first) {
    const VqLaunch& launch = *state.launch;
    state.first_block = first;
    state.cluster_arrived = 0;
    state.barriers.clear();
    state.barrier_count = 0;
    for (std::size_t rank = 0; rank < state.blocks.size(); rank++) {
        Block& block = state.blocks[rank];
        const u64 number = first + rank;
        const auto x = u64(launch.grid[0]), y = u64(launch.grid[1]);
        block.id = {u32(number % x), u32(number / x % y), u32(number / x / y)};
        block.shadow.assign(std::size_t(launch.shared_bytes), Shadow{});
        std::memset(block.memory, 0xff, std::size_t(launch.shared_bytes));
        block.readers.clear();
        block.remote.clear();
        block.arrived = block.exited = 0;
    }
    for (const auto& warp : state.warps) warp->arrived = 0;
    state.ready.clear();
    for (std::size_t number = 0; number < state.threads.size(); number++) {
        Thread& thread = *state.threads[number];
        thread.fiber.start(state.stacks.at(number), run_thread);
        thread.collectives = 0;
        thread.accesses = 0;
        thread.clock = 1;
        thread.known.reset();
        thread.open.clear();
        thread.groups.clear();
        wake(thread);
    }
    if (launch.seed == 1) std::reverse(state.ready.begin(), state.ready.end());
    if (launch.seed > 1) std::shuffle(state.ready.begin(), state.ready.end(), state.random);
}

static void resume(Thread& thread) {
    state.running = &thread;
    threadIdx = {u32(thread.in_block), 0, 0};
    blockIdx = block_of(thread).id;
    Fiber::change(state.scheduler, thread.fiber);
    state.running = nullptr;
}

// A block's shared memory is there until its last thread ends: one of them must end after every
// read from it by another block.
static void check_remote_reads() {
    for (const Block& block : state.blocks) {
        for (const Reader& read : block.remote) {
            bool held = false;
            for (const Thread* thread : block.threads) {
                held |= came_before(read.who, read.clock, *thread);
            }
            if (held) continue;
            fault(kind::BLOCK_EXITED, *thread_of(read.who), state.sites.at(read.site), {},
                  "block %u of the cluster may have ended before its shared memory is read",
                  u32(&block - state.blocks.data()));
        }
    }
}

static void run_cluster(u64 first) {
    reset_cluster(first);
    while (!state.stopped && (!state.ready.empty() || land_all())) {
        if (state.launch->seed > 1) {
            std::swap(state.ready.front(), state.ready[state.random() % state.ready.size()]);
        }
        Thread& thread = *state.ready.front();
        state.ready.pop_front();
        resume(thread);
    }
    if (state.stopped) return;
    int exited = 0;
    for (const Block& block : state.blocks) exited += block.exited;
    if (exited < int(state.threads.size())) {
        report_deadlock();
        state.stopped = true;
        return;
    }
    check_landed();
    check_remote_reads();
    for (const Block& block : state.blocks) flush_counts(block);
}

static void register_buffers() {
    state.buffers.clear();
    for (int i = 0; i < state.launch->buffer_count; i++) {
        const VqBuffer& from = state.launch->buffers[i];
        Buffer buffer;
        buffer.name = from.name;
        buffer.begin = static_cast<u8*>(from.data);
        buffer.bytes = from.bytes;
        buffer.writable = from.writable != 0;
        if (buffer.writable) {
            buffer.writer.resize(buffer.bytes);
            buffer.site.resize(buffer.bytes);
            buffer.flags.assign(buffer.bytes, from.initialised ? GLOBAL_WRITTEN : 0);
        }
        state.buffers.push_back(std::move(buffer));
    }
}

static void run_launch(const VqLaunch& launch, Kernel kernel) {
    state.launch = &launch;
    state.kernel = kernel;
    state.stopped = false;
    state.faults.clear();
    state.sites.clear();
    state.threads.clear();
    state.warps.clear();
    state.blocks.clear();
    state.random.seed(launch.seed);
    state.preempt_in = launch.seed > 1;
    register_buffers();
    make_cluster();
    blockDim = {u32(launch.threads), 1, 1};
    gridDim = {u32(launch.grid[0]), u32(launch.grid[1]), u32(launch.grid[2])};
    const u64 blocks = u64(launch.grid[0]) * u64(launch.grid[1]) * u64(launch.grid[2]);
    for (u64 first = 0; first < blocks && !state.stopped; first += u64(launch.cluster)) {
        run_cluster(first);
    }
    for (const Block& block : state.blocks) flush_counts(block);
}

// --------------------------------------------------------------------------- what device.cuh calls

const void* global_load(const void* base, const void* at, int bytes, At called) {
    return read_global(base, at, bytes, called);
}
void* global_store(const void* base, const void* at, int bytes, At called) {
    return global_write(base, at, bytes, false, called);
}
void* global_atomic(const void* base, const void* at, int bytes, At called) {
    return global_write(base, at, bytes, true, called);
}

void* shared_base() { return block_of(*state.running).memory; }
const void* shared_load(const void* at, int bytes, At called) {
    return shared_access(block_of(*state.running), at, bytes, Access::read, "shared_load", called);
}
void* shared_store(const void* at, int bytes, At called) {
    return shared_access(block_of(*state.running), at, bytes, Access::write, "shared_store",
                         called);
}
void* shared_atomic(const void* at, int bytes, At called) {
    return shared_access(block_of(*state.running), at, bytes, Access::atomic, "shared_atomic",
                         called);
}

void sync_block(At called) { block_barrier(called); }
void collect(Collective what, const u32* in, int words_in, u32* out, int words_out, At called) {
    warp_collective(what, in, words_in, out, words_out, called);
}

void copy_async(const void* to, const void* base, const void* from, int bytes, At called) {
    start_copy(to, base, from, bytes, called);
}
void copy_commit() { commit_copies(); }
void copy_wait(int pending) { wait_for_copies(pending); }

void barrier_init(const void* barrier, int arrivals, At called) {
    init_barrier(barrier, arrivals, called);
}
void barrier_publish() { publish_barriers(); }
void barrier_arrive(const void* at, At called) {
    if (Barrier* barrier = barrier_at(at, called)) arrive(*barrier, called);
}
void barrier_expect(const void* at, u32 bytes, At called) {
    if (Barrier* barrier = barrier_at(at, called)) expect_bytes(*barrier, bytes, called);
}
void barrier_wait(const void* at, u32 parity, At called) {
    if (Barrier* barrier = barrier_at(at, called)) wait_for_phase(*barrier, parity, called);
}
void copy_bulk(const void* to, const void* base, const void* from, u32 bytes, const void* barrier,
               At called) {
    start_bulk_copy(to, base, from, bytes, barrier, called);
}

int cluster_rank() { return state.running->block; }
int cluster_size() { return state.launch->cluster; }
void cluster_sync(At called) { cluster_barrier(called); }
const void* cluster_load(const void* at, int bytes, int rank, At called) {
    const Thread& thread = *state.running;
    const Block& own = block_of(thread);
    const i64 offset = shared_offset(own, at, bytes, called);
    if (offset < 0) return scratch();
    if (rank < 0 || rank >= cluster_size()) {
        fault(kind::OUT_OF_BOUNDS, thread, called, {}, "block %d of a cluster of %d", rank,
              cluster_size());
        return scratch();
    }
    Block& target = state.blocks[std::size_t(rank)];
    if (rank != thread.block) {
        const int site = state.sites.find("cluster_load", called, bytes);
        const auto reader = std::size_t(thread.index);
        if (target.remote.size() <= reader) target.remote.resize(reader + 1);
        target.remote[reader] = {u32(thread.index), thread.clock, u16(site), false};
    }
    return shared_access(target, target.memory + offset, bytes, Access::read, "cluster_load",
                         called);
}

float half_to_float(u16 bits) { return half_table()[bits]; }
u16 float_to_half(float value) { return round_to_half(value); }
float bfloat16_to_float(u16 bits) { return widen_bfloat16(bits); }
u16 float_to_bfloat16(float value) { return round_to_bfloat16(value); }

}  // namespace vq::harness

// ------------------------------------------------------------------------------ what Python calls

extern "C" {

void vq_launch(vq::harness::Kernel kernel, const VqLaunch* launch) {
    vq::harness::run_launch(*launch, kernel);
}
int vq_faults(const VqFault** faults) {
    *faults = vq::harness::state.faults.data();
    return int(vq::harness::state.faults.size());
}
int vq_sites(const VqSite** sites) {
    // number 0 is none
    *sites = vq::harness::state.sites.all().data() + 1;
    return int(vq::harness::state.sites.all().size()) - 1;
}
}
