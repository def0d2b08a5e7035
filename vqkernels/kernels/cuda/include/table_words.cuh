// Dot-product tables in shared memory: where their words lie, and how looked-up words become sums.
//
// A word holds the products of one entry with the inputs of one column of codes, as fp16. Lane l of
// every warp looks up words of column l alone, and keeps to the bank of its number: no gather ever
// meets another in a bank, whatever the codes are. A word is two products side by side:
//
//     TOKENS = 1    columns l and l + 32 of a tile of 64, for one token
//     TOKENS = 2    column l of a tile of 32, for two tokens
//     TOKENS = 4    the same, for four tokens in 8 bytes
//
// The address of a word is 256 * code + 4 * lane (8 * lane), so one byte permutation makes it of a
// register of codes and one of the lane's place. A region of 64 KB holds the tables of two stages,
// 128 bytes of each 256, or of one stage with four tokens.
//
// Sums are taken by tensor cores: looked-up words are the operand A as they come, and B holds ones
// that send a word's products to the right column of D and zeros elsewhere. Summed in fp32.
//
// T names, beside what linear.cuh lists: TOKENS (1, 2, 4); BLOCKS of 32 rows a warp; REGIONS, at
// most so many at once; TABLE_BYTES, of the regions in use.
#pragma once

#include <linear.cuh>

namespace vq {

constexpr int ROWS_A_BLOCK = 32;
constexpr int REGION_BYTES = 1 << 16;
constexpr int BLOCK_BYTES = 1024;  // codes of a stage: 32 rows by 32 columns

template <class T>
struct TableShape {
    static constexpr int WARPS = T::THREADS / WARP;
    static constexpr int ROWS = WARPS * T::BLOCKS * ROWS_A_BLOCK;  // of a thread block
    // halves of a word that stand for columns of their own
    static constexpr int HALVES = T::TOKENS == 1 ? 2 : 1;
    static constexpr int COLUMNS = WARP * HALVES;
    static constexpr int PAIRS = T::TOKENS == 4 ? 2 : 1;  // 4-byte words of an entry and a column
    static constexpr int A_REGION = 2 / PAIRS;            // stages
    static constexpr int FITTING = T::REGIONS * A_REGION;
    static constexpr int AT_ONCE = T::STAGES < FITTING ? T::STAGES : FITTING;
    static constexpr int PASSES = (T::STAGES + AT_ONCE - 1) / AT_ONCE;
    static constexpr int SUMS = 2 * T::TOKENS;  // fragments of 4 a block of rows
    static constexpr int ROUTES = T::TOKENS == 1 ? 4 : 2;
};

// Byte of the tables, which dynamic shared memory begins with, where lane `lane`'s words of stage
// number `stage` (of those at hand) begin.
template <class T>
VQ_INLINE u32 table_place(int stage, int lane) {
    using S = TableShape<T>;
    const int within = S::PAIRS == 2 ? 8 * lane : 4 * lane + 128 * (stage % 2);
    return u32(stage / S::A_REGION * REGION_BYTES + within);
}

// The ones of operand B, for each word (or two) of a load of codes.
template <class T>
struct Routes {
    u32 b[TableShape<T>::ROUTES][2];

    // For the lower half of words, where one counts.
    VQ_INLINE Routes() {
        const int column = lane_id() / 4;
        const u32 one = 0x3c00u;  // 1.0
#pragma unroll
        for (int route = 0; route < TableShape<T>::ROUTES; route++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if constexpr (T::TOKENS == 1) {
                    b[route][r] = kept(column == 2 * route + r ? one : 0u);
                } else {
                    const int first = 4 * route + 2 * r;
                    b[route][r] =
                        kept(column == first ? one : column == first + 1 ? one << 16 : 0u);
                }
            }
        }
    }
    // The same for the other half.
    VQ_INLINE void turn() {
#pragma unroll
        for (int route = 0; route < TableShape<T>::ROUTES; route++) {
            b[route][0] = kept(permute_bytes(b[route][0], 0u, 0x1032u));
            b[route][1] = kept(permute_bytes(b[route][1], 0u, 0x1032u));
        }
    }
};

template <class T>
using BlockSums = float[TableShape<T>::SUMS][4];

// Where byte `BYTE` of a word of codes points, in one instruction: {lane's place, code, region, 0}.
template <int BYTE>
VQ_INLINE u32 word_address(u32 codes, u32 place) {
    return permute_bytes(codes, place, 0x7604u | u32(BYTE) << 4);
}

// 16 looked-up words a lane: 16 rows of 32 columns, number `part` of a block's two.
template <class T, int PART>
VQ_INLINE void add_words(BlockSums<T>& sums, const Pack<u32, 4>& codes, u32 place,
                         const Routes<T>& routes) {
    const auto word = [](u32 at) { return SharedWindow::load<u32>(at); };
    if constexpr (T::TOKENS == 1) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 from = codes.at[i];
            const u32 a[4] = {word(word_address<0>(from, place)), word(word_address<1>(from, place)),
                              word(word_address<2>(from, place)), word(word_address<3>(from, place))};
            mma_m16n8k16<__half>(sums[PART], a, routes.b[i]);
        }
    } else if constexpr (T::TOKENS == 2) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 one = codes.at[i], two = codes.at[i + 1];
            const u32 a[4] = {word(word_address<0>(one, place)), word(word_address<1>(one, place)),
                              word(word_address<0>(two, place)), word(word_address<1>(two, place))};
            mma_m16n8k16<__half>(sums[2 * PART], a, routes.b[i / 2]);
            const u32 b[4] = {word(word_address<2>(one, place)), word(word_address<3>(one, place)),
                              word(word_address<2>(two, place)), word(word_address<3>(two, place))};
            mma_m16n8k16<__half>(sums[2 * PART + 1], b, routes.b[i / 2]);
        }
    } else {
        const auto add = [&](BlockSums<T>& to, int set, u32 left, u32 right, int route) {
            const auto one = SharedWindow::load<Pack<u32, 2>>(left);
            const auto two = SharedWindow::load<Pack<u32, 2>>(right);
            const u32 a[4] = {one.at[0], one.at[1], two.at[0], two.at[1]};
            mma_m16n8k16<__half>(to[set], a, routes.b[route]);
        };
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 one = codes.at[i], two = codes.at[i + 1];
            constexpr int FIRST = 4 * PART;
            add(sums, FIRST, word_address<0>(one, place), word_address<0>(two, place), i / 2);
            add(sums, FIRST + 1, word_address<1>(one, place), word_address<1>(two, place), i / 2);
            add(sums, FIRST + 2, word_address<2>(one, place), word_address<2>(two, place), i / 2);
            add(sums, FIRST + 3, word_address<3>(one, place), word_address<3>(two, place), i / 2);
        }
    }
}

// What the fragments of a lane hold for row 4 * (slot ^ lane / 4) + lane % 4: its four columns' sum.
template <class T>
VQ_INLINE float slot_sum(const BlockSums<T>& sums, int token, int slot) {
    const int part = slot / 4, low = slot % 2, high = slot / 2 % 2;
    if constexpr (T::TOKENS == 1) return sums[part][slot % 4];
    if constexpr (T::TOKENS == 2) return sums[2 * part + low][2 * high + token];
    return sums[4 * part + 2 * low + high][token];
}

// The sum over all lanes of the block's row number `lane`. Slots are numbered by the exclusive or of
// row and lane, so that each lane keeps its lower half at every level: nothing is selected.
template <class T>
VQ_INLINE float row_sum(const BlockSums<T>& sums, int token) {
    float slots[8];
#pragma unroll
    for (int slot = 0; slot < 8; slot++) slots[slot] = slot_sum<T>(sums, token, slot);
#pragma unroll
    for (int slot = 0; slot < 4; slot++) slots[slot] += shuffle_xor(slots[slot + 4], 16);
#pragma unroll
    for (int slot = 0; slot < 2; slot++) slots[slot] += shuffle_xor(slots[slot + 2], 8);
    return slots[0] + shuffle_xor(slots[1], 4);
}

}  // namespace vq
