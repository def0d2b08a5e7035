// table: each code is looked up in a table of its entry's products with x, built beforehand.
//
// A block holds ROWS rows, the sums of which stay in registers, and walks the tiles of its span of
// columns: it builds the tables of a tile, then every warp looks up the codes of its rows. Codes are
// packed [tiles of 32 columns, stages, blocks of 32 rows, 1 KB]; in a block's 1 KB lane l's 16 bytes
// at 512 * part + 16 * l are codes of column lane_column(l): byte q of word i is of row
// 4 * (slot ^ l / 4) + i, slot = 4 * part + q / 2 + 2 * (q % 2).
//
// A code's way to a warp is through registers, loaded again as soon as they are used, or (RING, on
// sm_90) a ring of its own in shared memory that the copy engine fills. Spans of columns are the
// blocks of a cluster (CLUSTER), which then add up their sums, or blocks of the grid's z that store
// their own. Either way sums are added in the order of the spans.
//
// T names, beside what table_build.cuh lists: RING (slots, 0: registers), RING_AT (its byte), CLUSTER,
// SET_ROWS (rows of a codebook set; 0: one for all), DEPENDENT (see wait_for_earlier_launches).
#pragma once

#include <table_build.cuh>

namespace vq {

// Codes of a warp, a unit at a time: one stage of its rows in 32 columns.
template <class T>
struct CodeWalk {
    using S = TableShape<T>;
    static constexpr int UNIT_BYTES = T::BLOCKS * BLOCK_BYTES;

    const u8* from;   // the warp's first unit
    u32 next;         // bytes from there to the next unit, while any is left; then to the last
    u32 step;         // bytes of a stage of 32 columns
    u32 last;
    int left;         // units from `next` on
    int stage, tile;  // of `next`, where a pass doesn't have all stages
    int tiles;        // of 32 columns, in the span

    // The units of columns [first, last) for the warp's rows from `row` on.
    VQ_INLINE CodeWalk(const Arguments<T>& a, int row, int begin, int end, bool active) {
        const int warps = (a.rows + T::BLOCKS * ROWS_A_BLOCK - 1) / (T::BLOCKS * ROWS_A_BLOCK);
        step = u32(warps) * UNIT_BYTES;
        tiles = begin < end ? (end - begin + S::COLUMNS - 1) / S::COLUMNS * S::HALVES : 0;
        from = a.codes + i64(begin / WARP * T::STAGES) * step + row / ROWS_A_BLOCK * BLOCK_BYTES;
        left = active ? tiles * T::STAGES : 0;
        last = left > 0 ? (left - 1) * step : 0;
        next = 0;
        stage = tile = 0;
    }

    VQ_INLINE void advance() {
        left--;
        if constexpr (S::PASSES == 1) {
            next = next + step < last ? next + step : last;
            return;
        }
        if (left <= 0) return;
        const int first = stage / S::AT_ONCE * S::AT_ONCE;
        const int end = first + S::AT_ONCE < T::STAGES ? first + S::AT_ONCE : T::STAGES;
        stage++;
        if (stage == end) {
            // on to the pass's first stage in the next tile, or to the next pass
            tile++;
            stage = first;
            if (tile == tiles) {
                tile = 0;
                stage = end;
            }
        }
        next = u32(tile * T::STAGES + stage) * step;
    }

    // Ask that the first units come to L2.
    VQ_INLINE void prefetch() const {
        constexpr int UNITS = 4;
        for (int unit = 0; unit < UNITS && unit < left; unit++) {
            for (int line = lane_id(); line < UNIT_BYTES / 128; line += WARP) {
                prefetch_l2(global(from), unit * i64(step) + line * 128);
            }
        }
    }
};

// The unit at hand in registers; what is used up is loaded again from the next unit.
template <class T>
struct CodesInRegisters {
    CodeWalk<T> walk;
    Pack<u32, 4> at[T::BLOCKS][2];

    VQ_INLINE CodesInRegisters(const CodeWalk<T>& from, Shared<u8>) : walk(from) {
        walk.from += lane_id() * 16;
    }

    VQ_INLINE void start() {
        if (walk.left == 0) return;
#pragma unroll
        for (int block = 0; block < T::BLOCKS; block++) {
            used(block, 0);
            used(block, 1);
        }
        walk.advance();
    }
    VQ_INLINE void begin() {}
    VQ_INLINE Pack<u32, 4> take(int block, int part) const { return at[block][part]; }
    // After the last unit it is loaded once more: a load on condition would hold both in registers.
    VQ_INLINE void used(int block, int part) {
        const auto unit = global(walk.from + walk.next);
        at[block][part] = unit.template stream<Pack<u32, 4>>(block * BLOCK_BYTES + part * 512);
    }
    VQ_INLINE void end() { walk.advance(); }
};

#if VQ_HAS_BULK_COPIES

// RING units on their way to shared memory: a ring for each warp, which no other waits for.
template <class T>
struct CodesInRing {
    static constexpr int WARPS = TableShape<T>::WARPS;
    static constexpr int UNIT_BYTES = CodeWalk<T>::UNIT_BYTES;

    CodeWalk<T> walk;
    Shared<u8> slots;
    Shared<u64> barriers;
    int slot = 0;
    u32 parity = 0;

    VQ_INLINE CodesInRing(const CodeWalk<T>& from, Shared<u8> at)
        : walk(from),
          slots(at + (T::RING_AT + warp_id() * T::RING * UNIT_BYTES)),
          barriers((at + (T::RING_AT + WARPS * T::RING * UNIT_BYTES)).template as<u64>() +
                   warp_id() * T::RING) {
        if (lane_id() == 0) {
            for (int i = 0; i < T::RING; i++) barrier_init(barriers + i, 1);
            barrier_publish();
        }
        sync_warp();
    }

    VQ_INLINE void start() {
        for (int i = 0; i < T::RING; i++) fill(i);
    }
    VQ_INLINE void begin() { barrier_wait(barriers + slot, parity); }
    VQ_INLINE Pack<u32, 4> take(int block, int part) const {
        const int at = slot * UNIT_BYTES + block * BLOCK_BYTES + part * 512 + lane_id() * 16;
        return slots.template load<Pack<u32, 4>>(at);
    }
    VQ_INLINE void used(int, int) {}
    VQ_INLINE void end() {
        sync_warp();  // every lane has read the slot
        fill(slot);
        slot++;
        if (slot == T::RING) {
            slot = 0;
            parity ^= 1;
        }
    }

private:
    VQ_INLINE void fill(int to) {
        if (walk.left <= 0) return;
        if (lane_id() == 0) {
            barrier_expect(barriers + to, UNIT_BYTES);
            copy_bulk(slots, to * UNIT_BYTES, global(walk.from), walk.next, UNIT_BYTES,
                      barriers + to);
        }
        walk.advance();
    }
};

#endif

// Look up the codes of stages [0, count) of those at hand, in one tile. first: where the lane's words
// of the first stage begin in SharedWindow.
template <class T, class Codes>
VQ_INLINE void look_up(BlockSums<T> (&sums)[T::BLOCKS], Codes& codes, u32 first, Routes<T>& routes,
                       int count) {
    using S = TableShape<T>;
    // one block a warp: two stages a turn, so that the loop itself is a small part
    constexpr int TURNS = T::BLOCKS == 1 ? 2 : 1;
#pragma unroll 1
    for (int half = 0; half < S::HALVES; half++) {
#pragma unroll TURNS
        for (int stage = 0; stage < count; stage++) {
            const u32 place = first + table_place<T>(stage, 0);
            codes.begin();
#pragma unroll
            for (int block = 0; block < T::BLOCKS; block++) {
                add_words<T, 0>(sums[block], codes.take(block, 0), place, routes);
                codes.used(block, 0);
                add_words<T, 1>(sums[block], codes.take(block, 1), place, routes);
                codes.used(block, 1);
            }
            codes.end();
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

// The warp's sums to `out`, or, in a cluster, to shared memory, where the blocks add them up.
template <class T>
VQ_INLINE void store_rows(const Arguments<T>& a, const BlockSums<T> (&sums)[T::BLOCKS],
                          const TableInputs<T>& x, const TableSpan<T>& span, Shared<u8> memory) {
    using S = TableShape<T>;
    const int own = warp_id() * T::BLOCKS * ROWS_A_BLOCK + lane_id();
    const float factor = global(a.scales).load(0);
    const auto together = memory.template as<float>();
    const auto out = global(a.out);
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
                const i64 start = (i64(span.number) * a.m + span.token + token) * a.width;
                out.store(start + span.row + row, from_float<typename T::Out>(sum));
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
            const i64 at = i64(span.token + token) * a.width + row;
            global(a.out).store(at, from_float<typename T::Out>(sum));
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
    const CodeWalk<T> walk(a, row, span.first, span.last, active);
    if constexpr (T::DEPENDENT) {
        walk.prefetch();
        wait_for_earlier_launches();
        let_next_launch_begin();
    }
    typename CodeSource<T, T::RING>::type codes(walk, memory);
    codes.start();
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
