// The loop of fused_rq, vectorized and staged: a warp decodes ROWS rows of codes for TOKENS tokens.
//
// The lanes of a warp lie along the columns of a span, CODES neighbouring codes each, so that what x
// holds for a column stays in registers for all rows. Every lane keeps its own sums; lanes meet once
// a tile, in a butterfly of fixed order, and spans are added by a later pass: the same bits on every
// run. Grid [tiles of rows or fewer, tiles of tokens, spans]; a block goes on to further tiles of
// rows, so that what it keeps in shared memory is loaded once.
//
// T names, beside what linear.cuh lists: ROWS, TOKENS, FUSED (stages are summed before the product),
// and LOAD_BYTES of codes a lane where LAYOUT is words.
#pragma once

#include <linear.cuh>

namespace vq {

// Bytes of a code in the layout `words`.
template <class T>
VQ_CONSTANT int code_bytes() {
    for (int stage = 0; stage < T::STAGES; stage++) {
        if (T::entries(stage) > 256) return 2;
    }
    return 1;
}

// 32-bit words of a stage's codes that a lane takes at once; 1 for a single code.
template <class T>
VQ_CONSTANT int lane_words() {
    if constexpr (T::LAYOUT == Layout::words) {
        return T::LOAD_BYTES / 4;
    } else {
        return 1;
    }
}

// Neighbouring codes that a lane takes at once.
template <class T>
VQ_CONSTANT int lane_codes() {
    return T::LAYOUT == Layout::words ? 4 * lane_words<T>() / code_bytes<T>() : 1;
}

// The codes of a lane in one row: all stages of `lane_codes` columns.
template <class T>
struct LaneCodes {
    static constexpr bool WIDE = T::LAYOUT == Layout::words;
    static constexpr int WORDS = lane_words<T>();

    u32 words[T::STAGES][WORDS];

    VQ_INLINE void load(const Arguments<T>& a, int row, int column) {
#pragma unroll
        for (int stage = 0; stage < T::STAGES; stage++) {
            if constexpr (WIDE) {
                // rows are padded to 16 bytes: a load that begins inside one ends inside it
                const i64 at = (i64(stage) * a.rows + row) * a.words + column / (4 / code_bytes<T>());
                const auto loaded = global(a.codes).template stream<Pack<u32, WORDS>>(at);
#pragma unroll
                for (int word = 0; word < WORDS; word++) words[stage][word] = loaded.at[word];
            } else {
                words[stage][0] = u32(load_code<T>(a, row, column, stage));
            }
        }
    }

    // `number` is a constant once the loop over it is unrolled, and so is the shift.
    VQ_INLINE int code(int stage, int number) const {
        if constexpr (!WIDE) return int(words[stage][0]);
        constexpr int BITS = 8 * code_bytes<T>(), A_WORD = 32 / BITS;
        const u32 word = words[stage][number / A_WORD] >> (BITS * (number % A_WORD));
        return int(word & ((1u << BITS) - 1u));
    }
};

// What a column of cells multiplies, for each token: LENGTH inputs, or one along out.
template <class T>
struct Inputs {
    static constexpr int COUNT = T::ALONG_IN ? T::LENGTH : 1;

    float at[T::TOKENS][COUNT];

    VQ_INLINE void load(const Arguments<T>& a, int token, int column) {
        using X = typename T::X;
        constexpr int WIDE = wide<X>(COUNT);
#pragma unroll
        for (int t = 0; t < T::TOKENS; t++) {
            // tokens past the last repeat it and are not stored
            const i64 start = i64(token + t < a.m ? token + t : a.m - 1) * a.k + i64(column) * COUNT;
#pragma unroll
            for (int part = 0; part < COUNT; part += WIDE) {
                const auto loaded = global(a.x).template load<Pack<X, WIDE>>(start + part);
#pragma unroll
                for (int e = 0; e < WIDE; e++) at[t][part + e] = to_float(loaded.at[e]);
            }
        }
    }
};

// sums[token] += vector * x: one sum along in, LENGTH along out.
template <class T, int OUTPUTS>
VQ_INLINE void multiply(float (&sums)[T::TOKENS][OUTPUTS], const float (&vector)[T::LENGTH],
                        const Inputs<T>& x) {
#pragma unroll
    for (int t = 0; t < T::TOKENS; t++) {
#pragma unroll
        for (int e = 0; e < T::LENGTH; e++) {
            if constexpr (T::ALONG_IN) {
                sums[t][0] += vector[e] * x.at[t][e];
            } else {
                sums[t][e] += vector[e] * x.at[t][0];
            }
        }
    }
}

template <class T, class Source, int OUTPUTS>
VQ_INLINE void add_cell(float (&sums)[T::TOKENS][OUTPUTS], const LaneCodes<T>& codes, int number,
                        i64 first, const Source& source, const Inputs<T>& x) {
    float vector[T::LENGTH];
#pragma unroll
    for (int stage = 0; stage < T::STAGES; stage++) {
        float entry[T::LENGTH];
        source.load(entry, first, stage, codes.code(stage, number));
        if constexpr (T::FUSED) {
#pragma unroll
            for (int e = 0; e < T::LENGTH; e++) {
                vector[e] = stage == 0 ? entry[e] : vector[e] + entry[e];
            }
        } else {
            multiply<T, OUTPUTS>(sums, entry, x);
        }
    }
    if constexpr (T::FUSED) multiply<T, OUTPUTS>(sums, vector, x);
}

// Adds up the lanes' sums; each result is stored by a lane of its own.
template <class T, int OUTPUTS>
VQ_INLINE void store_sums(float (&sums)[T::ROWS][T::TOKENS][OUTPUTS], const Arguments<T>& a, int row,
                          int token, int number) {
#pragma unroll
    for (int r = 0; r < T::ROWS; r++) {
#pragma unroll
        for (int t = 0; t < T::TOKENS; t++) {
#pragma unroll
            for (int e = 0; e < OUTPUTS; e++) {
                float sum = sums[r][t][e];
#pragma unroll
                for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
                const int owner = ((r * T::TOKENS + t) * OUTPUTS + e) % WARP;
                if (lane_id() == owner && row + r < a.rows && token + t < a.m) {
                    store_sum<T>(a, number, token + t, row + r, e, sum);
                }
            }
        }
    }
}

template <class T, class Source>
VQ_INLINE void sweep(const Arguments<T>& a, const Source& source) {
    constexpr int OUTPUTS = T::ALONG_IN ? 1 : T::LENGTH;
    constexpr int CODES = lane_codes<T>();
    constexpr int WARPS = T::THREADS / WARP;
    const int token = int(blockIdx.y) * T::TOKENS;
    const int number = int(blockIdx.z);
    const int last = span_last(a, number);
    const int step = int(gridDim.x) * WARPS * T::ROWS;
    for (int row = (int(blockIdx.x) * WARPS + warp_id()) * T::ROWS; row < a.rows; row += step) {
        float sums[T::ROWS][T::TOKENS][OUTPUTS] = {};
        for (int column = span_first(a, number) + lane_id() * CODES; column < last;
             column += WARP * CODES) {
            LaneCodes<T> codes[T::ROWS];
#pragma unroll
            for (int r = 0; r < T::ROWS; r++) {
                // rows past the last repeat it and are not stored
                codes[r].load(a, row + r < a.rows ? row + r : a.rows - 1, column);
            }
#pragma unroll
            for (int c = 0; c < CODES; c++) {
                if (column + c >= last) break;
                Inputs<T> x;
                x.load(a, token, column + c);
#pragma unroll
                for (int r = 0; r < T::ROWS; r++) {
                    const int inside = row + r < a.rows ? row + r : a.rows - 1;
                    const i64 first = first_entry<T>(a, inside, column + c);
                    add_cell<T, Source, OUTPUTS>(sums[r], codes[r], c, first, source, x);
                }
            }
        }
        store_sums<T, OUTPUTS>(sums, a, row, token, number);
    }
}

}  // namespace vq
