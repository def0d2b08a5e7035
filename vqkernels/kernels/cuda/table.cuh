// table: each code is looked up in a table of its entry's products with x, built beforehand.
//
// A block holds ROWS rows, the sums of which stay in registers, and walks the tiles of its span of
// columns: it builds the tables of a tile, then every warp looks up the codes of its rows.
//
// A warp's codes are one stream: [groups of BLOCKS blocks of 32 rows, passes over stages, tiles of 32
// columns, stages of the pass, blocks, 1 KB]. In a block's 1 KB lane l's 16 bytes at 512 * part + 16 *
// l are codes of column lane_column(l): byte q of word i is of row 4 * (slot ^ l / 4) + i, slot = 4 *
// part + q / 2 + 2 * (q % 2).
//
// A code's way to a warp is through registers, loaded again as soon as they are used up, or (RING, on
// sm_90) a ring of its own in shared memory that the copy engine fills. Spans of columns are the
// blocks of a cluster (CLUSTER), which then add up their sums, or blocks of the grid's z that store
// their own. Either way sums are added in the order of the spans.
//
// T names, beside what table_build.cuh lists: RING (slots, 0: registers), SLOT_BYTES, RING_AT (its
// byte); AHEAD, units that L2 is asked for before they are loaded; CLUSTER; SET_ROWS, of a codebook
// set (0: one for all); DEPENDENT (see wait_for_earlier_launches).
#pragma once

#include <table_build.cuh>

namespace vq {

// Where a warp's codes of a pass lie: a unit, one stage of its rows in 32 columns, after another.
template <class T>
struct CodeStream {
    using S = TableShape<T>;
    static constexpr int UNIT_BYTES = T::BLOCKS * BLOCK_BYTES;

    const u8* from;    // the row group's first unit
    int tile;          // the span's first, of 32 columns
    int tiles, total;  // in the span, and in all
    bool active;       // whether the warp has any rows

    VQ_INLINE CodeStream(const Arguments<T>& a, int row, int first, int last, bool has_rows) {
        total = (a.columns + S::COLUMNS - 1) / S::COLUMNS * S::HALVES;
        tile = first / WARP;
        tiles = first < last ? (last - first + S::COLUMNS - 1) / S::COLUMNS * S::HALVES : 0;
        from = a.codes + i64(row / (T::BLOCKS * ROWS_A_BLOCK)) * total * (T::STAGES * UNIT_BYTES);
        active = has_rows;
    }
    // The first unit of the pass over stages [stage, stage + count), and the number of units.
    VQ_INLINE const u8* first(int stage, int count) const {
        return from + (i64(total) * stage + tile * count) * UNIT_BYTES;
    }
    VQ_INLINE int units(int count) const { return active ? tiles * count : 0; }
};

// Ask that units come to L2. from: the first one's line of 128 bytes that is the lane's.
template <class T>
VQ_INLINE void prefetch_units(const u8* from, int units) {
    constexpr int BYTES = CodeStream<T>::UNIT_BYTES, LINES = BYTES / 128;
    if (LINES < WARP && lane_id() >= LINES) return;
    for (int unit = 0; unit < units; unit++) prefetch_l2(global(from), unit * BYTES);
}

// The unit at hand in registers. What is used up is loaded again from the next unit, also after the
// last one: a load on condition would keep both in registers, and what it reads is there.
template <class T>
struct CodesInRegisters {
    using Stream = CodeStream<T>;

    const Stream& stream;
    const u8* next;  // the lane's first 16 bytes of the unit to be loaded
    const u8* line;  // the lane's 128 bytes of the unit that L2 is to be asked for
    Pack<u32, 4> at[T::BLOCKS][2];

    VQ_INLINE CodesInRegisters(const Stream& all, Shared<u8>) : stream(all) {}

    VQ_INLINE void start(int stage, int count) {
        if (stream.units(count) == 0) return;
        next = stream.first(stage, count) + lane_id() * 16;
        line = stream.first(stage, count) + lane_id() * 128;
        prefetch_units<T>(line, T::AHEAD);
        line += T::AHEAD * Stream::UNIT_BYTES;
#pragma unroll
        for (int block = 0; block < T::BLOCKS; block++) {
            used(block, 0);
            used(block, 1);
        }
        next += Stream::UNIT_BYTES;
    }
    VQ_INLINE void begin() {
        if constexpr (T::AHEAD > 0) prefetch_units<T>(line, 1);
    }
    VQ_INLINE Pack<u32, 4> take(int block, int part) const { return at[block][part]; }
    VQ_INLINE void used(int block, int part) {
        const int byte = block * BLOCK_BYTES + part * 512;
        at[block][part] = global(next).template stream<Pack<u32, 4>>(byte);
    }
    VQ_INLINE void end() {
        next += Stream::UNIT_BYTES;
        line += Stream::UNIT_BYTES;
    }
};

#if VQ_HAS_BULK_COPIES

// RING slots on their way to shared memory: a ring for each warp, which no other waits for.
template <class T>
struct CodesInRing {
    using Stream = CodeStream<T>;
    static constexpr int WARPS = TableShape<T>::WARPS;
    static constexpr int UNITS = T::SLOT_BYTES / Stream::UNIT_BYTES;  // of a slot

    const Stream& stream;
    const u8* next;
    int left;  // bytes from there on
    Shared<u8> slots;
    Shared<u64> barriers;
    int slot = 0, unit = 0;
    u32 parity = 0;

    VQ_INLINE CodesInRing(const Stream& all, Shared<u8> at)
        : stream(all),
          slots(at + (T::RING_AT + warp_id() * T::RING * T::SLOT_BYTES)),
          barriers((at + (T::RING_AT + WARPS * T::RING * T::SLOT_BYTES)).template as<u64>() +
                   warp_id() * T::RING) {
        if (lane_id() == 0) {
            for (int i = 0; i < T::RING; i++) barrier_init(barriers + i, 1);
            barrier_publish();
        }
        sync_warp();
    }

    // All units before have been used up; their last slot may not have been full.
    VQ_INLINE void start(int stage, int count) {
        if (UNITS > 1 && unit > 0) end_slot();
        sync_warp();
        next = stream.first(stage, count);
        left = stream.units(count) * Stream::UNIT_BYTES;
        for (int i = 0, to = slot; i < T::RING; i++, to = to + 1 < T::RING ? to + 1 : 0) fill(to);
    }
    VQ_INLINE void begin() {
        if (UNITS == 1 || unit == 0) barrier_wait(barriers + slot, parity);
    }
    VQ_INLINE Pack<u32, 4> take(int block, int part) const {
        const int inside = unit * Stream::UNIT_BYTES + block * BLOCK_BYTES + part * 512;
        return slots.template load<Pack<u32, 4>>(slot * T::SLOT_BYTES + inside + lane_id() * 16);
    }
    VQ_INLINE void used(int, int) {}
    VQ_INLINE void end() {
        unit++;
        if (unit < UNITS) return;
        sync_warp();  // every lane has read the slot
        fill(slot);
        end_slot();
    }

private:
    VQ_INLINE void end_slot() {
        unit = 0;
        slot++;
        if (slot == T::RING) {
            slot = 0;
            parity ^= 1;
        }
    }
    VQ_INLINE void fill(int to) {
        if (left <= 0) return;
        const u32 bytes = left < T::SLOT_BYTES ? left : T::SLOT_BYTES;
        if (lane_id() == 0) {
            barrier_expect(barriers + to, bytes);
            copy_bulk(slots, to * T::SLOT_BYTES, global(next), 0, bytes, barriers + to);
        }
        next += T::SLOT_BYTES;
        left -= T::SLOT_BYTES;
    }
};

#endif

// Look up the codes of stages [0, count) of those at hand, in one tile. first: where the lane's words
// of the first stage begin in SharedWindow.
template <class T, class Codes>
VQ_INLINE void look_up(BlockSums<T> (&sums)[T::BLOCKS], Codes& codes, u32 first, Routes<T>& routes,
                       int count) {
    using S = TableShape<T>;
    // one block a warp: two stages a turn, so that turning is a small part
    constexpr int TURNS = T::BLOCKS == 1 ? 2 : 1;
    constexpr bool EVEN = S::AT_ONCE <= 2 || S::A_REGION == 1;  // tables at equal distances
    constexpr int STEP = S::A_REGION == 1 ? REGION_BYTES : 128;
#pragma unroll 1
    for (int half = 0; half < S::HALVES; half++) {
        u32 place = first;
#pragma unroll TURNS
        for (int stage = 0; stage < count; stage++) {
            if constexpr (!EVEN) place = first + table_place<T>(stage, 0);
            codes.begin();
#pragma unroll
            for (int block = 0; block < T::BLOCKS; block++) {
                add_words<T, 0>(sums[block], codes.take(block, 0), place, routes);
                codes.used(block, 0);
                add_words<T, 1>(sums[block], codes.take(block, 1), place, routes);
                codes.used(block, 1);
            }
            codes.end();
            if constexpr (EVEN) place += u32(STEP);
        }
        if constexpr (S::HALVES == 2) routes.turn();
    }
}

// Rows of a block and columns of its span.
template <class T>
struct TableSpan {
    using S = TableShape<T>;
    int row, rows;  // first row, and the end of those that share its codebooks
    int number, first, last;
    int token;

    VQ_INLINE explicit TableSpan(const Arguments<T>& a) {
        const int tile = int(blockIdx.x) / T::CLUSTER;
        if constexpr (T::SET_ROWS > 0) {
            constexpr int TILES = (T::SET_ROWS + S::ROWS - 1) / S::ROWS;
            row = tile / TILES * T::SET_ROWS + tile % TILES * S::ROWS;
            rows = (tile / TILES + 1) * T::SET_ROWS;
            if (rows > a.rows) rows = a.rows;
        } else {
            row = tile * S::ROWS;
            rows = a.rows;
        }
        token = int(blockIdx.y) * T::TOKENS;
        number = T::CLUSTER > 1 ? int(blockIdx.x) % T::CLUSTER : int(blockIdx.z);
        first = span_first(a, number);
        last = span_last(a, number);
    }
};

template <class T>
VQ_INLINE void store_row(const Arguments<T>& a, int number, int token, int row, float sum) {
    const i64 start = (i64(number) * a.m + token) * a.width;
    global(a.out).store(start + row, from_float<typename T::Out>(sum));
}

// The warp's sums to `out`, or, in a cluster, to shared memory, where the blocks add them up.
template <class T>
VQ_INLINE void store_rows(const Arguments<T>& a, const BlockSums<T> (&sums)[T::BLOCKS],
                          const TableInputs<T>& x, const TableSpan<T>& span, Shared<u8> memory) {
    using S = TableShape<T>;
    const int own = warp_id() * T::BLOCKS * ROWS_A_BLOCK + lane_id();
    const float factor = global(a.scales).load(0);
    const auto together = memory.template as<float>();
    if constexpr (T::CLUSTER > 1) sync_block();  // the tables have been read
#pragma unroll
    for (int token = 0; token < T::TOKENS; token++) {
        const float inverse = x.inverses.load(token);
#pragma unroll
        for (int block = 0; block < T::BLOCKS; block++) {
            const float sum = row_sum<T>(sums[block], token) * inverse * factor;
            const int row = own + block * ROWS_A_BLOCK;
            if constexpr (T::CLUSTER > 1) {
                together.store(token * S::ROWS + row, sum);
            } else if (span.row + row < span.rows && span.token + token < a.m) {
                store_row(a, span.number, span.token + token, span.row + row, sum);
            }
        }
    }
}

#if VQ_HAS_BULK_COPIES

// Each block of the cluster adds up its share of the rows over all blocks, in their order.
template <class T>
VQ_INLINE void add_cluster(const Arguments<T>& a, const TableSpan<T>& span, Shared<u8> memory) {
    using S = TableShape<T>;
    const auto sums = memory.template as<float>();
    cluster_sync();
    for (int i = span.number * T::THREADS + int(threadIdx.x); i < T::TOKENS * S::ROWS;
         i += T::CLUSTER * T::THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int rank = 0; rank < T::CLUSTER; rank++) sum += cluster_load(sums, i, rank);
        const int token = i / S::ROWS, row = span.row + i % S::ROWS;
        if (row < span.rows && span.token + token < a.m) {
            store_row(a, 0, span.token + token, row, sum);
        }
    }
    cluster_sync();  // others may still read this block's sums
}

template <class T, int RING>
struct CodeSource {
    using type = CodesInRing<T>;
};
template <class T>
struct CodeSource<T, 0> {
    using type = CodesInRegisters<T>;
};

#else

template <class T, int RING>
struct CodeSource {
    using type = CodesInRegisters<T>;
};

#endif

template <class T>
VQ_INLINE void table(const Arguments<T>& a) {
    using S = TableShape<T>;
    const auto memory = shared_memory();
    const TableSpan<T> span(a);
    const int row = span.row + warp_id() * T::BLOCKS * ROWS_A_BLOCK;
    const bool active = row < span.rows;
    const CodeStream<T> stream(a, row, span.first, span.last, active);
    if constexpr (T::DEPENDENT) {
        // what may be asked for while earlier launches run, even where they have just written it
        const int units = stream.units(S::AT_ONCE);
        prefetch_units<T>(stream.first(0, S::AT_ONCE) + lane_id() * 128, units < 4 ? units : 4);
        wait_for_earlier_launches();
        let_next_launch_begin();
    }
    typename CodeSource<T, T::RING>::type codes(stream, memory);
    codes.start(0, S::AT_ONCE);
    TableInputs<T> x(memory);
    x.load(a, span.token, span.first);
    x.find_factors(a, span.token, span.first, span.last);
    x.store();
    const i64 first = T::SET_ROWS > 0 && span.row < a.rows
                          ? i64(global(a.row_sets).load(span.row)) * entries_before<T>(T::STAGES)
                          : 0;
    Routes<T> routes;
    const u32 place = kept(SharedWindow::origin() + table_place<T>(0, lane_id()));
    BlockSums<T> sums[T::BLOCKS] = {};
#pragma unroll 1
    for (int stage = 0; stage < T::STAGES; stage += S::AT_ONCE) {
        const int count = stage + S::AT_ONCE < T::STAGES ? S::AT_ONCE : T::STAGES - stage;
        if (stage > 0) codes.start(stage, count);
#pragma unroll 1
        for (int column = span.first; column < span.last; column += S::COLUMNS) {
            sync_block();  // x is there, and the tables before have been read
            build_tables<T>(a, x, memory, first, stage, count, column);
            sync_block();
            const int next = column + S::COLUMNS;
            x.load(a, span.token, next < span.last ? next : span.first);
            if (active) look_up<T>(sums, codes, place, routes, count);
            x.store();
        }
    }
    store_rows<T>(a, sums, x, span, memory);
#if VQ_HAS_BULK_COPIES
    if constexpr (T::CLUSTER > 1) add_cluster<T>(a, span, memory);
#endif
}

}  // namespace vq
