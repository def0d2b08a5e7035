// x and entries as operands of tensor cores, for each Variant: the products of a chunk, and which
// output an accumulator is.
//
// The inner dimension of a product may be in any order that both operands share, so a lane takes
// entries as they are: of its own four (along in) or its four codes' (along out) elements a step,
// x is what lies at the same place. T names, beside what gather.cuh lists: TOKENS of a pass, HADD2
// (stages are summed in fp16 before the product), CHECKED (the last chunk has columns past the end),
// X_WHOLE (x can be read 16 bytes at a time).
#pragma once

#include <gather.cuh>

namespace vq {

template <class T>
struct Shape {
    static constexpr bool BYTES = Tile<T>::BYTES;
    // Groups of tokens that an mma takes at once, and tokens of a group that a lane loads.
    static constexpr int TOKENS_A_TILE =
        T::VARIANT == Variant::b ? 16 : T::VARIANT == Variant::split ? 4 : 8;
    static constexpr int TOKEN_TILES = T::TOKENS / TOKENS_A_TILE;
    static constexpr int HALVES = T::VARIANT == Variant::b ? 2 : 1;
    // Accumulators of a token tile.
    static constexpr int FEATURE_TILES =
        T::ALONG_IN ? (T::VARIANT == Variant::a ? 4 : 8)
                    : (T::VARIANT == Variant::b ? 8 : T::VARIANT == Variant::a ? 4 : 2) *
                          Tile<T>::PIECES;
    static constexpr int BLOCKS = TOKEN_TILES * FEATURE_TILES;
    // Sums that a lane has of a block in the end.
    static constexpr int OUTPUTS =
        BYTES ? 2 : T::VARIANT == Variant::split && T::ALONG_IN ? 1 : 4;
    // Integer sums of stages have scales of their own.
    static constexpr int SUMS = BYTES ? T::STAGES : 1;
    // Words of x beside a piece of an entry; bytes come as a high and a low one each.
    static constexpr int X_WORDS = !T::ALONG_IN ? 4 : BYTES ? 2 * Tile<T>::WORDS : Tile<T>::WORDS;
};

template <bool BYTES> struct Number { using type = float; };
template <> struct Number<true> { using type = int; };

template <class T>
struct Accumulators {
    using N = typename Number<Shape<T>::BYTES>::type;
    N at[Shape<T>::SUMS][Shape<T>::BLOCKS][4];
};

VQ_INLINE int group_id() { return lane_id() / 4; }
VQ_INLINE int thread_in_group() { return lane_id() % 4; }

// The rows of x that a lane reads, from its first column of the chunk at hand on; tokens past the
// last repeat it.
template <class T>
struct Rows {
    using X = typename T::X;
    // Elements of x beside a chunk, and beside what lane t + 1 has of it but lane t hasn't.
    static constexpr int WIDTH = Tile<T>::BYTES ? 2 * T::LENGTH : T::ALONG_IN ? T::LENGTH : 1;
    static constexpr int CHUNK = Tile<T>::COLUMNS * WIDTH;
    static constexpr int LANE = T::ALONG_IN ? WIDTH : T::CODES;

    Global<const X> at[Shape<T>::TOKEN_TILES][Shape<T>::HALVES];
    u32 ones;  // all bits, for the pass has a token: not that a compiler can tell

    VQ_INLINE Rows(const Arguments<T>& a, int token, int chunk) : ones(u32((token - a.m) >> 31)) {
        const int mine = T::VARIANT == Variant::split ? group_id() / 2 : group_id();
        const i64 width = i64(a.k) * (Tile<T>::BYTES ? 2 : 1);
#pragma unroll
        for (int tile = 0; tile < Shape<T>::TOKEN_TILES; tile++) {
#pragma unroll
            for (int half = 0; half < Shape<T>::HALVES; half++) {
                const int one = token + tile * Shape<T>::TOKENS_A_TILE + 8 * half + mine;
                const i64 row = i64(one < a.m ? one : a.m - 1) * width;
                at[tile][half] = {a.x + row + i64(chunk) * CHUNK + thread_in_group() * LANE};
            }
        }
    }
    VQ_INLINE void advance(int chunks) {
#pragma unroll
        for (int tile = 0; tile < Shape<T>::TOKEN_TILES; tile++) {
#pragma unroll
            for (int half = 0; half < Shape<T>::HALVES; half++) at[tile][half].at += chunks * CHUNK;
        }
    }
};

// x beside one piece of the entries at a column (along in), or at 8 columns (along out).
template <class T>
struct Inputs {
    static constexpr int WORDS = Shape<T>::X_WORDS, TILES = Shape<T>::TOKEN_TILES;

    u32 words[TILES][Shape<T>::HALVES][WORDS];
    u32 quads[TILES][WORDS / 2][4];  // of Variant::b: operands of each step

    // number: of columns after the lane's first, `column` is that. Columns past the last count as
    // zero, whatever their codes name.
    VQ_INLINE void load(const Arguments<T>& a, const Rows<T>& rows, int number, int column,
                        int piece) {
        constexpr int PIECE = Tile<T>::PIECE * (Shape<T>::BYTES ? 2 : 1);
        const int left = a.columns - column;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int half = 0; half < Shape<T>::HALVES; half++) {
                u32(&to)[WORDS] = words[tile][half];
                const auto row = rows.at[tile][half];
                if constexpr (T::ALONG_IN || T::X_WHOLE) {
                    load_whole(to, row, number * Rows<T>::WIDTH + piece * PIECE,
                               !T::CHECKED || left > 0);
                } else {
                    load_single(to, row, number, left);
                }
            }
            if constexpr (T::VARIANT == Variant::b) {
                // a quad that is only moved from two loads is moved anew for each mma
#pragma unroll
                for (int s = 0; s < WORDS / 2; s++) {
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        quads[tile][s][w] = words[tile][w % 2][2 * s + w / 2] & rows.ones;
                    }
                }
            }
        }
    }

    VQ_INLINE void load_whole(u32 (&to)[WORDS], Global<const typename T::X> row, int at,
                              bool inside) {
        constexpr int A_LOAD = WORDS < 4 ? WORDS : 4;
#pragma unroll
        for (int word = 0; word < WORDS; word += A_LOAD) {
            Pack<u32, A_LOAD> loaded = {};
            if (inside) {
                loaded = row.template load<Pack<u32, A_LOAD>>(
                    at + word * (4 / int(sizeof(typename T::X))));
            }
#pragma unroll
            for (int w = 0; w < A_LOAD; w++) to[word + w] = loaded.at[w];
        }
    }
    VQ_INLINE void load_single(u32 (&to)[WORDS], Global<const typename T::X> row, int at,
                               int left) {
#pragma unroll
        for (int word = 0; word < WORDS; word++) {
            u32 halves[2] = {0u, 0u};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int one = 2 * word + h;
                if (one < left) halves[h] = row.template load<u16>(at + one);
            }
            to[word] = halves[0] | halves[1] << 16;
        }
    }
};

// The codebook set of a lane's column.
template <class T>
VQ_INLINE void find_set(Gathers<T>& from, const Arguments<T>& a, int column) {
    if constexpr (T::COLUMN_SETS) {
        from.set = global(a.column_sets).load(column < a.columns ? column : a.columns - 1);
    }
}

// ------------------------------------------------------------------------------------- along in

// Adds a piece's product, of one row of codes or of two for Variant::a: `number` of those among the
// tile's.
template <class T, int COUNT>
VQ_INLINE void multiply_piece(Accumulators<T>& sums, const Pack<u32, Tile<T>::WORDS> (&e)[COUNT],
                              const Inputs<T>& x, int number, int stage) {
    using X = typename T::X;
#pragma unroll
    for (int tile = 0; tile < Shape<T>::TOKEN_TILES; tile++) {
        const int block = tile * Shape<T>::FEATURE_TILES + number;
        const auto& w = x.words[tile];
        if constexpr (T::VARIANT == Variant::split) {
            // column c of B is token c / 2's, its even words for even c: c0 and c3 are wanted
            const bool odd = group_id() % 2;
            mma_m16n8k16<X>(sums.at[0][block], e[0].at,
                            {odd ? w[0][1] : w[0][0], odd ? w[0][3] : w[0][2]});
        } else {
#pragma unroll
            for (int s = 0; s < Tile<T>::STEPS; s++) {
                const u32 low = e[0].at[2 * s], high = e[0].at[2 * s + 1];
                if constexpr (T::VARIANT == Variant::b) {
                    mma_m16n8k16<X>(sums.at[0][block], x.quads[tile][s], {low, high});
                } else if constexpr (T::VARIANT == Variant::a) {
                    mma_m16n8k16<X>(sums.at[0][block],
                                    {low, e[COUNT - 1].at[2 * s], high, e[COUNT - 1].at[2 * s + 1]},
                                    {w[0][2 * s], w[0][2 * s + 1]});
                } else {
                    mma_m16n8k32(
                        sums.at[stage][block],
                        {w[0][4 * s], w[0][4 * s + 1], w[0][4 * s + 2], w[0][4 * s + 3]},
                        {low, high});
                }
            }
        }
    }
}

template <class T, int COUNT>
VQ_INLINE void add_stage(Pack<u32, Tile<T>::WORDS> (&sum)[COUNT],
                         const Pack<u32, Tile<T>::WORDS> (&e)[COUNT], int stage) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
#pragma unroll
        for (int w = 0; w < Tile<T>::WORDS; w++) {
            const u32 one = e[c].at[w];
            sum[c].at[w] = stage == 0 || !T::HADD2 ? one : add_halves(sum[c].at[w], one);
        }
    }
}

// Adds the products of the chunk `ahead` of `chunk`, where `rows` are.
template <class T>
VQ_INLINE void multiply_along_in(Accumulators<T>& sums, const Arguments<T>& a, const Rows<T>& rows,
                                 const ChunkCodes<T>& codes, Gathers<T> from, int chunk,
                                 int ahead) {
    constexpr int COUNT = T::VARIANT == Variant::a ? 2 : 1;
#pragma unroll
    for (int quad = 0; quad < Tile<T>::QUADS; quad++) {
        const int number = ahead * Tile<T>::COLUMNS + 4 * quad;
        const int column = chunk * Tile<T>::COLUMNS + thread_in_group() + number;
        find_set(from, a, column);
#pragma unroll
        for (int piece = 0; piece < Tile<T>::PIECES; piece++) {
            Inputs<T> x;
            x.load(a, rows, number, column, piece);
#pragma unroll
            for (int r = 0; r < 8; r += COUNT) {
                Pack<u32, Tile<T>::WORDS> e[COUNT], sum[COUNT];
#pragma unroll
                for (int stage = 0; stage < T::STAGES; stage++) {
#pragma unroll
                    for (int c = 0; c < COUNT; c++) {
                        e[c] = from.load(codes, stage, (r + c) * Tile<T>::QUADS + quad, piece);
                    }
                    add_stage<T, COUNT>(sum, e, stage);
                    if (!T::HADD2 || stage + 1 == T::STAGES) {
                        multiply_piece<T, COUNT>(sums, sum, x, r / COUNT, stage);
                    }
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------ along out

// Adds the product of a piece of four neighbouring codes' entries with their columns of x: words
// 2 * step and the next.
template <class T>
VQ_INLINE void multiply_four(Accumulators<T>& sums, const Pack<u32, Tile<T>::WORDS> (&e)[4],
                             const Inputs<T>& x, int piece, int step) {
    using X = typename T::X;
    constexpr u32 LOW = 0x5410u, HIGH = 0x7632u;  // halves of two words
    constexpr int A_PIECE = Shape<T>::FEATURE_TILES / Tile<T>::PIECES;
#pragma unroll
    for (int tile = 0; tile < Shape<T>::TOKEN_TILES; tile++) {
        const auto& w = x.words[tile];
        const int block = tile * Shape<T>::FEATURE_TILES + piece * A_PIECE;
        if constexpr (T::VARIANT == Variant::split) {
            // column c of B is token c / 2's, x in its low half for even c and in its high half
            // for odd: no entry has to be taken apart
            const bool odd = group_id() % 2;
            const u32 first = odd ? 0x1044u : 0x4410u, second = odd ? 0x3244u : 0x4432u;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const u32 both = w[0][2 * step + pair];
                const u32 b[2] = {permute_bytes(both, 0u, first), permute_bytes(both, 0u, second)};
                const auto &e0 = e[2 * pair], &e1 = e[2 * pair + 1];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    mma_m16n8k16<X>(sums.at[0][block + half],
                                    {e0.at[2 * half], e0.at[2 * half + 1], e1.at[2 * half],
                                     e1.at[2 * half + 1]},
                                    b);
                }
            }
        } else {
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const u32 e0 = e[0].at[pair], e1 = e[1].at[pair];
                const u32 e2 = e[2].at[pair], e3 = e[3].at[pair];
                const u32 low[2] = {permute_bytes(e0, e1, LOW), permute_bytes(e2, e3, LOW)};
                const u32 high[2] = {permute_bytes(e0, e1, HIGH), permute_bytes(e2, e3, HIGH)};
                if constexpr (T::VARIANT == Variant::b) {
                    const auto& both = x.quads[tile][step];
                    mma_m16n8k16<X>(sums.at[0][block + 2 * pair], both, low);
                    mma_m16n8k16<X>(sums.at[0][block + 2 * pair + 1], both, high);
                } else {
                    mma_m16n8k16<X>(sums.at[0][block + pair], {low[0], high[0], low[1], high[1]},
                                    {w[0][2 * step], w[0][2 * step + 1]});
                }
            }
        }
    }
}

template <class T>
VQ_INLINE void multiply_along_out(Accumulators<T>& sums, const Arguments<T>& a,
                                  const Rows<T>& rows, const ChunkCodes<T>& codes, Gathers<T> from,
                                  int chunk, int ahead) {
#pragma unroll
    for (int eight = 0; eight < T::CODES / 8; eight++) {
        const int number = ahead * Tile<T>::COLUMNS + 8 * eight;
        const int column = chunk * Tile<T>::COLUMNS + thread_in_group() * T::CODES + number;
        find_set(from, a, column);
        Inputs<T> x;
        x.load(a, rows, number, column, 0);
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
            for (int piece = 0; piece < Tile<T>::PIECES; piece++) {
                Pack<u32, Tile<T>::WORDS> e[4], sum[4];
#pragma unroll
                for (int stage = 0; stage < T::STAGES; stage++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        e[c] = from.load(codes, stage, 8 * eight + 4 * step + c, piece);
                    }
                    add_stage<T, 4>(sum, e, stage);
                    if (!T::HADD2 || stage + 1 == T::STAGES) {
                        multiply_four<T>(sums, sum, x, piece, step);
                    }
                }
            }
        }
    }
}

// --------------------------------------------------------------------------------------- outputs

// Where sum `i` of a block lies: a token of the pass, a row of codes of the tile, and an element of
// its vectors.
struct Place {
    int token, row, element;
};

template <class T>
VQ_INLINE Place place_of(int block, int i) {
    const int g = group_id(), t = thread_in_group();
    const int token = block / Shape<T>::FEATURE_TILES * Shape<T>::TOKENS_A_TILE;
    const int number = block % Shape<T>::FEATURE_TILES;
    if constexpr (T::VARIANT == Variant::b || T::VARIANT == Variant::bytes) {
        const int one = token + g + 8 * (i / 2), column = 2 * t + i % 2;
        if constexpr (T::ALONG_IN) return {one, 8 * number + column, 0};
        return {one, column, number};
    } else if constexpr (T::VARIANT == Variant::a) {
        const int one = token + 2 * t + i % 2;
        if constexpr (T::ALONG_IN) return {one, 16 * number + g + 8 * (i / 2), 0};
        return {one, g, 2 * number + i / 2};
    } else {
        if constexpr (T::ALONG_IN) return {token + t, 8 * number + g, 0};
        return {token + t, g, 4 * number + i};
    }
}

// The OUTPUTS sums of a block in fp32. scales: of the entries, a stage each.
template <class T>
VQ_INLINE Pack<float, Shape<T>::OUTPUTS> finish(const Accumulators<T>& sums, int block,
                                                const float (&scales)[T::STAGES]) {
    Pack<float, Shape<T>::OUTPUTS> out = {};
#pragma unroll
    for (int i = 0; i < Shape<T>::OUTPUTS; i++) {
        if constexpr (Shape<T>::BYTES) {
#pragma unroll
            for (int stage = 0; stage < T::STAGES; stage++) {
                const auto& c = sums.at[stage][block];
                // 256 times an int32 sum of high bytes would overflow
                out.at[i] += scales[stage] * (256.0f * float(c[i]) + float(c[2 + i]));
            }
        } else if constexpr (Shape<T>::OUTPUTS == 1) {
            out.at[i] = sums.at[0][block][0] + sums.at[0][block][3];
        } else {
            out.at[i] = sums.at[0][block][i];
        }
    }
    return out;
}

}  // namespace vq
