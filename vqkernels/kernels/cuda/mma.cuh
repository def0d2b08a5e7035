// mma: entries gathered whole from shared memory are operands of tensor cores, k in their order.
//
// A warp walks a share of the columns of its tile of 64 output features, with codes DEPTH chunks
// ahead in registers; the WARPS_K warps of a tile add their sums through shared memory in a fixed
// order, and spans of the grid's z axis are added by a later pass: the same bits on every run. A
// block goes on over units of THREADS / 32 / WARPS_K tiles, so that its codebooks are loaded once,
// and again only where the next unit's rows use another set.
//
// Grid [units or fewer, passes of TOKENS tokens, spans]. T names, beside what operands.cuh lists:
// WARPS_K, ROUND (blocks of sums that warps exchange at once), ROUND_AT (where, in shared memory),
// and SET_ROWS, SET_UNITS (rows of codes and units of a codebook set; 0 where there is one).
#pragma once

#include <operands.cuh>

namespace vq {

// The rows [first, last) of a warp's tile, and the first entry of their codebook set.
template <class T>
struct TileRows {
    int first, last, entry;

    VQ_INLINE TileRows(const Arguments<T>& a, int unit, int tile) : last(a.rows), entry(0) {
        constexpr int ROWS = Tile<T>::ROWS, TILES = T::THREADS / WARP / T::WARPS_K;
        first = (unit * TILES + tile) * ROWS;
        if constexpr (T::SET_UNITS > 0) {
            const int set = unit / T::SET_UNITS;
            first = set * T::SET_ROWS + (unit % T::SET_UNITS * TILES + tile) * ROWS;
            last = (set + 1) * T::SET_ROWS < a.rows ? (set + 1) * T::SET_ROWS : a.rows;
            entry = global(a.row_sets).load(set * T::SET_ROWS) * entries_before<T>(T::STAGES);
        }
    }
};

template <class T>
VQ_CONSTANT int units_of(int rows) {
    constexpr int ROWS = Tile<T>::ROWS * (T::THREADS / WARP / T::WARPS_K);
    if constexpr (T::SET_UNITS > 0) {
        return (rows + T::SET_ROWS - 1) / T::SET_ROWS * T::SET_UNITS;
    } else {
        return (rows + ROWS - 1) / ROWS;
    }
}

template <class T>
VQ_INLINE void store_block(const Arguments<T>& a, const Pack<float, Shape<T>::OUTPUTS>& values,
                           const TileRows<T>& rows, int token, int block) {
#pragma unroll
    for (int i = 0; i < Shape<T>::OUTPUTS; i++) {
        const Place place = place_of<T>(block, i);
        const int row = rows.first + place.row, one = token + place.token;
        if (row < rows.last && one < a.m) {
            store_sum<T>(a, int(blockIdx.z), one, row, place.element, values.at[i]);
        }
    }
}

// Adds the sums of a tile's warps and stores them.
template <class T>
VQ_INLINE void store_tile(const Accumulators<T>& sums, const Arguments<T>& a,
                          const TileRows<T>& rows, int token) {
    using Sums = Pack<float, Shape<T>::OUTPUTS>;
    float scales[T::STAGES] = {};
    if constexpr (Shape<T>::BYTES) {
        const int set = rows.entry / entries_before<T>(T::STAGES);
#pragma unroll
        for (int s = 0; s < T::STAGES; s++) scales[s] = global(a.scales).load(set * T::STAGES + s);
    }
    if constexpr (T::WARPS_K == 1) {
#pragma unroll
        for (int block = 0; block < Shape<T>::BLOCKS; block++) {
            store_block<T>(a, finish<T>(sums, block, scales), rows, token, block);
        }
    } else {
        constexpr int A_WARP = T::ROUND * WARP;  // a pack each
        const auto room = (shared_memory() + T::ROUND_AT).template as<float>();
        const int tile = warp_id() / T::WARPS_K * T::WARPS_K, mine = warp_id() % T::WARPS_K;
#pragma unroll
        for (int round = 0; round < Shape<T>::BLOCKS; round += T::ROUND) {
            sync_block();
#pragma unroll
            for (int b = 0; b < T::ROUND; b++) {
                const int at = warp_id() * A_WARP + b * WARP + lane_id();
                room.store(at * Shape<T>::OUTPUTS, finish<T>(sums, round + b, scales));
            }
            sync_block();
            for (int b = mine; b < T::ROUND; b += T::WARPS_K) {
                Sums sum = {};
                for (int warp = 0; warp < T::WARPS_K; warp++) {
                    const int at = (tile + warp) * A_WARP + b * WARP + lane_id();
                    const Sums one = room.template load<Sums>(at * Shape<T>::OUTPUTS);
#pragma unroll
                    for (int i = 0; i < Shape<T>::OUTPUTS; i++) sum.at[i] += one.at[i];
                }
                store_block<T>(a, sum, rows, token, round + b);
            }
        }
    }
}

// A share of a tile's chunks: [first, last).
struct Span {
    int first, last;
};

// Adds up a tile whose codes of the span begin at `at`, and leaves in `ahead` the first of those
// from `next` on, another tile's.
template <class T>
VQ_INLINE void multiply_tile(Accumulators<T>& sums, ChunkCodes<T> (&ahead)[T::DEPTH],
                             const Arguments<T>& a, const Gathers<T>& from, Rows<T> x,
                             Global<const typename T::Code> at, Global<const typename T::Code> next,
                             Span span) {
    for (int chunk = span.first; chunk < span.last; chunk += T::DEPTH) {
        at.at += T::DEPTH * chunk_words<T>();
        const auto loaded = chunk + T::DEPTH < span.last ? at : next;
#pragma unroll
        for (int j = 0; j < T::DEPTH; j++) {
            if (j == 0 || chunk + j < span.last) {
                if constexpr (T::ALONG_IN) {
                    multiply_along_in<T>(sums, a, x, ahead[j], from, chunk, j);
                } else {
                    multiply_along_out<T>(sums, a, x, ahead[j], from, chunk, j);
                }
            }
            // past the span's last they are loaded for nothing: codes are padded by DEPTH chunks
            ahead[j].load(loaded, j);
        }
        x.advance(T::DEPTH);
    }
}

// A lane's codes of the span, of its warp's tile of a unit.
template <class T>
VQ_INLINE Global<const typename T::Code> codes_of(const Arguments<T>& a, int unit, int tile,
                                                  Span span) {
    constexpr int TILES = T::THREADS / WARP / T::WARPS_K;
    const int chunks = (a.columns + Tile<T>::COLUMNS - 1) / Tile<T>::COLUMNS;
    const i64 chunk = i64(unit * TILES + tile) * chunks + span.first;
    return {a.codes + chunk * chunk_words<T>() + lane_id() * lane_words<T>(0)};
}

template <class T>
VQ_INLINE void mma(const Arguments<T>& a) {
    // the same in all lanes, and known to be: what follows of it stays in uniform registers
    const int warp = shuffle(warp_id(), 0);
    const int token = int(blockIdx.y) * T::TOKENS, tile = warp / T::WARPS_K;
    const i64 units = units_of<T>(a.rows), blocks = gridDim.x;
    const int end = int((blockIdx.x + 1) * units / blocks);
    int unit = int(blockIdx.x * units / blocks);
    const i64 chunks = (a.columns + Tile<T>::COLUMNS - 1) / Tile<T>::COLUMNS;
    const int share = int(blockIdx.z) * T::WARPS_K + warp % T::WARPS_K;
    const int shares = int(gridDim.z) * T::WARPS_K;
    const Span span{int(share * chunks / shares), int((share + 1) * chunks / shares)};

    ChunkCodes<T> ahead[T::DEPTH];
    const auto at = codes_of<T>(a, unit, tile, span);
#pragma unroll
    for (int j = 0; j < T::DEPTH; j++) ahead[j].load(at, j);
    Gathers<T> from{shared_memory(), global(a.books), TileRows<T>(a, unit, 0).entry, 0};
    fill<T>(from);
    sync_block();
    for (; unit < end; unit++) {
        if constexpr (T::SET_UNITS > 0) {
            if (const int entry = TileRows<T>(a, unit, 0).entry; entry != from.first) {
                from.first = entry;
                sync_block();
                fill<T>(from);
                sync_block();
            }
        }
        Accumulators<T> sums = {};
        // the last unit's last loads are its own first chunks again
        multiply_tile<T>(sums, ahead, a, from, Rows<T>(a, token, span.first),
                         codes_of<T>(a, unit, tile, span),
                         codes_of<T>(a, unit + 1 < end ? unit + 1 : unit, tile, span), span);
        store_tile<T>(sums, a, TileRows<T>(a, unit, tile), token);
    }
}

}  // namespace vq
