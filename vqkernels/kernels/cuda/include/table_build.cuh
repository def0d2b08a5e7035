// Filling dot-product tables: x in the range of fp16, and its products with every entry.
//
// The largest product of a table must stay finite in fp16, or a zero of the reducing operand would
// make a NaN of it. Entries are packed so that no L1 norm exceeds 8; a token's x is multiplied by
// the power of two that brings its largest element to 2^11 at least and below 2^12, and sums by its
// inverse. A token that holds a NaN or an infinity is taken as zero, and its inverse as NaN.
//
// x of a tile lies in shared memory as tensor cores want it: a word of two neighbouring elements for
// each pair, chunk of 8 elements, j and lane, where lane 4 * (2 * q + v) + t has elements 2t, 2t + 1
// of column j + 8q (of lane 4j + q), for half v of the table's words.
//
// T names, beside what table_words.cuh lists: TENSOR_BUILD, X_AT (the byte where x begins).
#pragma once

#include <table_words.cuh>

namespace vq {

template <class T>
struct TableInputs {
    using S = TableShape<T>;
    using X = typename T::X;
    static constexpr int CHUNKS = (T::LENGTH + 7) / 8;
    static constexpr int WORDS = S::PAIRS * CHUNKS * 256;
    static constexpr int EACH = (WORDS + T::THREADS - 1) / T::THREADS;  // words a thread brings

    Shared<u32> words;
    Shared<float> factors;   // [TOKENS], 0 for a token that is taken as zero
    Shared<float> inverses;  // [TOKENS], of the factors, or NaN
    Shared<u32> maxima;      // [WARPS, TOKENS]
    Pack<X, 2> coming[EACH];

    VQ_INLINE explicit TableInputs(Shared<u8> at)
        : words((at + T::X_AT).template as<u32>()),
          factors((at + T::X_AT + 4 * WORDS).template as<float>()),
          inverses(factors + T::TOKENS),
          maxima((inverses + T::TOKENS).template as<u32>()) {}

    // Factors of the tokens from `token` on, over columns [first, last); ends in a barrier.
    VQ_INLINE void find_factors(const Arguments<T>& a, int token, int first, int last) const {
        constexpr int WIDE = wide<X>(T::LENGTH);
#pragma unroll
        for (int v = 0; v < T::TOKENS; v++) {
            u32 largest = 0;
            const i64 start = i64(token + v) * a.k;
            const int end = token + v < a.m ? last * T::LENGTH : 0;
            for (int i = first * T::LENGTH + int(threadIdx.x) * WIDE; i < end;
                 i += T::THREADS * WIDE) {
                const auto some = global(a.x).template load<Pack<X, WIDE>>(start + i);
#pragma unroll
                for (int e = 0; e < WIDE; e++) {
                    // as bits, so that a NaN is larger than an infinity, and both than the rest
                    const u32 size = as_bits(to_float(some.at[e])) & 0x7fffffffu;
                    largest = size > largest ? size : largest;
                }
            }
#pragma unroll
            for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
                const u32 other = shuffle_xor(largest, lanes);
                largest = other > largest ? other : largest;
            }
            if (lane_id() == 0) maxima.store(warp_id() * T::TOKENS + v, largest);
        }
        sync_block();
        if (int(threadIdx.x) < T::TOKENS) set_factor(int(threadIdx.x), token, a.m);
        sync_block();
    }

    // Load the thread's words of the tile from column `first` on; past the last column zeros.
    VQ_INLINE void load(const Arguments<T>& a, int token, int first) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const Place at = place(int(threadIdx.x) + i * T::THREADS);
            const int column = first + at.column;
            const bool there = WORDS % T::THREADS == 0 || at.pair < S::PAIRS;
            coming[i] = {};
            if (there && column < a.columns && token + at.token < a.m && at.element < T::LENGTH) {
                const i64 start = i64(token + at.token) * a.k + i64(column) * T::LENGTH;
                coming[i] = global(a.x).template load<Pack<X, 2>>(start + at.element);
            }
        }
    }

    // Put what was loaded where the build reads it.
    VQ_INLINE void store() const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int number = int(threadIdx.x) + i * T::THREADS;
            if (WORDS % T::THREADS != 0 && number >= WORDS) return;
            const float factor = factors.load(place(number).token);
            const float low = to_float(coming[i].at[0]) * factor;
            const float high = to_float(coming[i].at[1]) * factor;
            // an infinity times 0 is none
            words.store(number, factor == 0.0f ? 0u : pack_halves(low, high));
        }
    }

    // Words j and j + 1 to j + 3 of a lane, j = 0 or 4.
    VQ_INLINE Pack<u32, 4> fragment(int pair, int chunk, int j) const {
        const int at = ((pair * CHUNKS + chunk) * 2 + j / 4) * 128 + lane_id() * 4;
        return words.template load<Pack<u32, 4>>(at);
    }

    // All elements of the lane's own column.
    VQ_INLINE void load_own(u32 (&own)[S::PAIRS][2][T::LENGTH / 2]) const {
        const int j = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < S::PAIRS * T::LENGTH; i++) {
            const int pair = i / T::LENGTH, v = i % 2, two = i / 2 % (T::LENGTH / 2);
            const int at = ((pair * CHUNKS + two / 4) * 2 + j / 4) * 128 + j % 4;
            own[pair][v][two] = words.load(at + (8 * q + 4 * v + two % 4) * 4);
        }
    }

private:
    struct Place {
        int pair, column, token, element;
    };

    // What word `number` stands for.
    VQ_INLINE static Place place(int number) {
        const int lane = number / 4 % WARP, j = number % 4 + number / 128 % 2 * 4;
        const int pair = number / 256 / CHUNKS, chunk = number / 256 % CHUNKS;
        const int v = lane / 4 % 2;
        const int column = j + 8 * (lane / 8) + (S::HALVES == 2 ? WARP * v : 0);
        return {pair, column, S::HALVES == 2 ? 0 : 2 * pair + v, 8 * chunk + 2 * (lane % 4)};
    }

    VQ_INLINE void set_factor(int v, int token, int m) const {
        u32 largest = 0;
        for (int warp = 0; warp < S::WARPS; warp++) {
            const u32 size = maxima.load(warp * T::TOKENS + v);
            largest = size > largest ? size : largest;
        }
        const u32 exponent = largest >> 23;
        // both powers must be normal; what is smaller than 2^-115 needs no more than that
        const u32 usable = exponent < 12 ? 12 : exponent;
        const bool finite = exponent < 255;
        factors.store(v, finite && token + v < m ? as_float((265 - usable) << 23) : 0.0f);
        inverses.store(v, finite ? as_float((usable - 11) << 23) : as_float(0x7fffffffu));
    }
};

// Column of a tile whose words lane `lane` looks up. Lanes 4j to 4j + 3 have every eighth column from
// j on, which use one codebook where there are 1, 2, 4 or 8 of them in turn.
VQ_INLINE int lane_column(int lane) { return lane / 4 + 8 * (lane % 4); }

// Two neighbouring elements of an entry; zeros past the end of either.
template <class T>
VQ_INLINE u32 two_elements(const Arguments<T>& a, i64 first, int stage_entries, int entry,
                           int element) {
    const bool whole = T::LENGTH % 8 == 0;
    if (entry >= stage_entries || (!whole && element >= T::LENGTH)) return 0u;
    return global(a.books).template load<Pack<u32, 1>>((first + entry) * T::LENGTH + element).at[0];
}

// 16 entries from `entry` on: their products with a tile, by tensor cores.
//
// An entry's 8 elements take half of the instruction's 16: the lower half for rows whose number has
// bit 2 clear, the upper for the others. With x of j in the one half of B and of j ^ 4 in the other,
// rows with that bit get the products of j ^ 4. Exchanging two more bits gives lane (g, t) in place
// `slot` the products of j = slot ^ g, and each store reaches every bank once.
template <class T>
struct EntryBuild {
    using S = TableShape<T>;
    using Inputs = TableInputs<T>;

    const Arguments<T>& a;
    const Inputs& x;
    Shared<u8> table;
    i64 first;      // of the stage's entries
    int count;      // of these
    int entry;
    int g = lane_id() / 4, t = lane_id() % 4;

    VQ_INLINE void run() const {
        u32 elements[Inputs::CHUNKS][2];
#pragma unroll
        for (int chunk = 0; chunk < Inputs::CHUNKS; chunk++) {
#pragma unroll
            for (int r = 0; r < 2; r++) elements[chunk][r] = load(chunk, r, 0);
        }
        // j of 0 to 3, then of 4 to 7: the two never exchange
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            u32 words[S::PAIRS][4][2];
#pragma unroll
            for (int pair = 0; pair < S::PAIRS; pair++) {
                multiply(words[pair], elements, pair, j);
                exchange<1>(words[pair]);
                exchange<2>(words[pair]);
            }
            store(words, j);
        }
    }

private:
    // Two elements of entry number g (+ 8, where r) that row g's products number j take.
    VQ_INLINE u32 load(int chunk, int r, int j) const {
        i64 start = first;
        if constexpr (T::COLUMN_SETS) {
            const int column = j ^ (g & 4);
            const int inside = column < a.columns ? column : a.columns - 1;
            start += i64(global(a.column_sets).load(inside)) * entries_before<T>(T::STAGES);
        }
        return two_elements<T>(a, start, count, entry + g + 8 * r, 8 * chunk + 2 * t);
    }

    // Products of j to j + 3 as words: of rows g and g + 8.
    VQ_INLINE void multiply(u32 (&words)[4][2], const u32 (&elements)[Inputs::CHUNKS][2], int pair,
                            int j) const {
        const bool upper = g & 4;
        float sums[4][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < Inputs::CHUNKS; chunk++) {
            const auto own = x.fragment(pair, chunk, j), other = x.fragment(pair, chunk, j ^ 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 b[2] = {own.at[i], other.at[i]};
                const u32 top = T::COLUMN_SETS ? load(chunk, 0, j + i) : elements[chunk][0];
                const u32 bottom = T::COLUMN_SETS ? load(chunk, 1, j + i) : elements[chunk][1];
                const u32 e[4] = {upper ? 0u : top, upper ? 0u : bottom, upper ? top : 0u,
                                  upper ? bottom : 0u};
                if constexpr (Inputs::CHUNKS == 1) {
                    u32 d[2] = {0u, 0u};
                    mma_m16n8k16(d, e, b);
                    words[i][0] = d[0];
                    words[i][1] = d[1];
                } else {
                    mma_m16n8k16<__half>(sums[i], e, b);
                }
            }
        }
        if constexpr (Inputs::CHUNKS == 1) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i][0] = pack_halves(sums[i][0], sums[i][1]);
            words[i][1] = pack_halves(sums[i][2], sums[i][3]);
        }
    }

    // Lanes whose g has BIT set exchange words whose numbers differ in it.
    template <int BIT>
    VQ_INLINE void exchange(u32 (&words)[4][2]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & BIT) continue;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 one = words[i][r], two = words[i | BIT][r];
                words[i][r] = g & BIT ? two : one;
                words[i | BIT][r] = g & BIT ? one : two;
            }
        }
    }

    VQ_INLINE void store(const u32 (&words)[S::PAIRS][4][2], int j) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int lane = 4 * ((j + i) ^ g) + t;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = 256 * (entry + g + 8 * r);
                if constexpr (S::PAIRS == 2) {
                    table.store(row + 8 * lane, Pack<u32, 2>{words[0][i][r], words[1][i][r]});
                } else {
                    table.store(row + 4 * lane, words[0][i][r]);
                }
            }
        }
    }
};

// x of a lane's own column, for each word and half of it two elements at a time.
template <class T>
using OwnInputs = u32[TableShape<T>::PAIRS][2][T::LENGTH / 2];

// The product of one entry with a tile, a lane its own column's, in fp32: any codebook a column.
template <class T>
VQ_INLINE void build_entry(const Arguments<T>& a, const OwnInputs<T>& x, Shared<u8> table,
                           const i64 (&first)[2], int stage_entries, int entry) {
    using S = TableShape<T>;
    constexpr bool APART = T::COLUMN_SETS && S::HALVES == 2;  // a codebook for each half
    float sums[S::PAIRS][2] = {};
#pragma unroll
    for (int element = 0; element < T::LENGTH; element += 2) {
        const u32 one = two_elements<T>(a, first[0], stage_entries, entry, element);
        const u32 two = APART ? two_elements<T>(a, first[1], stage_entries, entry, element) : one;
#pragma unroll
        for (int pair = 0; pair < S::PAIRS; pair++) {
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const auto e = unpack_halves(v ? two : one);
                const auto by = unpack_halves(x[pair][v][element / 2]);
                sums[pair][v] += e.at[0] * by.at[0];
                sums[pair][v] += e.at[1] * by.at[1];
            }
        }
    }
    const int at = 256 * entry;
    if constexpr (S::PAIRS == 2) {
        table.store(at + 8 * lane_id(), Pack<u32, 2>{pack_halves(sums[0][0], sums[0][1]),
                                                     pack_halves(sums[1][0], sums[1][1])});
    } else {
        table.store(at + 4 * lane_id(), pack_halves(sums[0][0], sums[0][1]));
    }
}

// The tables of stages [stage, stage + count) for the tile from column `column` on, whose x is
// stored; the entries of their set begin at `first`.
template <class T>
VQ_INLINE void build_tables(const Arguments<T>& a, const TableInputs<T>& x, Shared<u8> tables,
                            i64 first, int stage, int count, int column) {
    using S = TableShape<T>;
    constexpr int STEP = T::TENSOR_BUILD ? 16 : 1;
    i64 starts[2] = {first, first};
    OwnInputs<T> own_x;
    if constexpr (!T::TENSOR_BUILD) x.load_own(own_x);
    if constexpr (!T::TENSOR_BUILD && T::COLUMN_SETS) {
#pragma unroll
        for (int v = 0; v < S::HALVES; v++) {
            const int own = column + lane_column(lane_id()) + WARP * v;
            const int inside = own < a.columns ? own : a.columns - 1;
            starts[v] += i64(global(a.column_sets).load(inside)) * entries_before<T>(T::STAGES);
        }
    }
    // the stages' entries go round the warps, so that short stages leave none idle
    // one piece at a time: sums and codes hold most registers
    int turn = warp_id();
#pragma unroll 1
    for (int s = 0; s < count; s++) {
        const int entries = T::entries(stage + s), before = entries_before<T>(stage + s);
        const auto table = tables + int(table_place<T>(s, 0));
        const int pieces = (entries + STEP - 1) / STEP;
#pragma unroll 1
        for (; turn < pieces; turn += S::WARPS) {
            if constexpr (T::TENSOR_BUILD) {
                EntryBuild<T>{a, x, table, first + before, entries, turn * STEP}.run();
            } else {
                const i64 own[2] = {starts[0] + before, starts[1] + before};
                build_entry<T>(a, own_x, table, own, entries, turn);
            }
        }
        turn -= pieces;
    }
}

}  // namespace vq
