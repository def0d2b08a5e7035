// What the kernels of a linear layer share: their arguments, codes in every layout, entries.
//
// Weights are rows of codes. A cell is one code a stage; its vector is LENGTH elements of one output
// feature along the inputs (ALONG_IN), or of LENGTH output features at one input. T is the struct of
// constants and types that the launcher writes for a format and a config:
//
//     X, Entry, Code, Out   types of x, codebooks, codes and the output
//     STAGES, LENGTH, ALONG_IN, LAYOUT, ROW_SETS, COLUMN_SETS
//     entries(stage), bits(stage)   entries and stored bits of a stage's codes
//     FINAL                 whether sums are stored as y itself; then also CELL_STRIDE, Y_SCALE, BIAS
//
// and what the kernel at hand names beside these.
#pragma once

#include <device.cuh>

namespace vq {

// Order of the codes.
enum class Layout {
    cells,    // [rows, columns, stages]: the stages of a cell side by side
    planes,   // [stages, rows, columns]: a stage's codes of a row side by side
    columns,  // [stages, columns, rows]: a stage's codes of a column side by side
    packed,   // [rows, words]: a bitstream a row, first stage in the low bits
    words,    // [stages, rows, words]: planes, each row padded to 16 bytes
};

// What a value of y is scaled or shifted by: nothing, one number, or one for each output feature.
enum class Along { none, tensor, row };

// One struct for all kernels, so that a launch fills one buffer; what a kernel doesn't read is null.
template <class T>
struct Arguments {
    const typename T::X* x;          // [m, k]
    const typename T::Code* codes;   // as LAYOUT says
    const typename T::Entry* books;  // [sets, all entries, LENGTH]
    const int* row_sets;             // [rows], where ROW_SETS
    const int* column_sets;          // [columns], where COLUMN_SETS
    const float* scales;             // of entries: [sets, stages] of int8 ones, or a kernel's own
    typename T::Out* out;            // [spans, m, width]
    int m, k, width;
    int rows, columns;  // of codes
    int words;          // 32-bit words of a packed row
    int span;           // columns of codes that one span walks
    // what surrounds a product: prologue.cuh, epilogue.cuh and, where FINAL, the product's own store
    const float* x_scale;    // [k]
    const float* x_zero;     // [k]
    const int* permutation;  // [k]: the input of each stored column
    const float* rotation;   // [ROTATION, ROTATION], transposed
    const float* side;       // [SIDE, n]: the side columns' weights
    const float* y_scale;    // [n], or one
    const float* y_zero;     // [n], or one
    const float* bias;       // [n]
    float* apart;            // [m, SIDE + sums]: x of the side columns, parts of the sum over x
    int n, spans, sums;
};

// Entries before `stage` in a codebook set; of all stages: the size of a set.
template <class T>
VQ_CONSTANT int entries_before(int stage) {
    int sum = 0;
    for (int s = 0; s < stage; s++) sum += T::entries(s);
    return sum;
}
template <class T>
VQ_CONSTANT int bits_before(int stage) {
    int sum = 0;
    for (int s = 0; s < stage; s++) sum += T::bits(s);
    return sum;
}

// The code of `stage` at (row, column), both inside the grid of codes.
template <class T>
VQ_INLINE int load_code(const Arguments<T>& a, int row, int column, int stage) {
    const auto codes = global(a.codes);
    if constexpr (T::LAYOUT == Layout::packed) {
        const i64 bit = i64(column) * bits_before<T>(T::STAGES) + bits_before<T>(stage);
        const i64 at = i64(row) * a.words + (bit >> 5);
        const u32 low = codes.load(at);
        // a code may straddle two words; the last word of a row has no next
        const u32 high = (bit >> 5) + 1 < a.words ? codes.load(at + 1) : 0u;
        return int(funnel(low, high, u32(bit) & 31u) & ((1u << T::bits(stage)) - 1u));
    } else if constexpr (T::LAYOUT == Layout::cells) {
        return int(codes.load((i64(row) * a.columns + column) * T::STAGES + stage));
    } else if constexpr (T::LAYOUT == Layout::planes) {
        return int(codes.load((i64(stage) * a.rows + row) * a.columns + column));
    } else {
        static_assert(T::LAYOUT == Layout::columns, "words are loaded by the word");
        return int(codes.load((i64(stage) * a.columns + column) * a.rows + row));
    }
}

// First entry of the codebook set of (row, column).
template <class T>
VQ_INLINE i64 first_entry(const Arguments<T>& a, int row, int column) {
    int set = 0;
    if constexpr (T::ROW_SETS) set += global(a.row_sets).load(row);
    if constexpr (T::COLUMN_SETS) set += global(a.column_sets).load(column);
    return i64(set) * entries_before<T>(T::STAGES);
}

// Elements that one access may bring of `length` in a row: a power of two that divides it, `bytes`
// at most.
template <class E>
VQ_CONSTANT int wide(int length, int bytes = 16) {
    int count = 1;
    while (length % (2 * count) == 0 && 2 * count * int(sizeof(E)) <= bytes) count *= 2;
    return count;
}

// Where entries come from; `books` is the whole of all codebooks in global memory. Others have the
// same `load`.
template <class T>
struct GlobalEntries {
    Global<const typename T::Entry> books;

    // values = entry number `code` of `stage`, in the set whose first entry is `first`.
    VQ_INLINE void load(float (&values)[T::LENGTH], i64 first, int stage, int code) const {
        constexpr int WIDE = wide<typename T::Entry>(T::LENGTH);
        const i64 at = (first + entries_before<T>(stage) + code) * T::LENGTH;
#pragma unroll
        for (int part = 0; part < T::LENGTH; part += WIDE) {
            const auto loaded = books.template load<Pack<typename T::Entry, WIDE>>(at + part);
#pragma unroll
            for (int e = 0; e < WIDE; e++) values[part + e] = to_float(loaded.at[e]);
        }
    }
};

// The vector at (row, column): all stages, summed in fp32.
template <class T>
VQ_INLINE void decode(float (&sum)[T::LENGTH], const Arguments<T>& a, int row, int column) {
    const GlobalEntries<T> source{global(a.books)};
    const i64 first = first_entry<T>(a, row, column);
#pragma unroll
    for (int stage = 0; stage < T::STAGES; stage++) {
        float entry[T::LENGTH];
        source.load(entry, first, stage, load_code<T>(a, row, column, stage));
#pragma unroll
        for (int e = 0; e < T::LENGTH; e++) sum[e] = stage == 0 ? entry[e] : sum[e] + entry[e];
    }
}

// Feature that an element of whole cells stands for, padding from the last feature on; its inverse.
template <class T>
VQ_INLINE int cell_feature(int position) {
    const int cell = position / T::LENGTH, element = position % T::LENGTH;
    return (cell / T::CELL_STRIDE * T::LENGTH + element) * T::CELL_STRIDE + cell % T::CELL_STRIDE;
}
template <class T>
VQ_INLINE int cell_position(int feature) {
    constexpr int BLOCK = T::LENGTH * T::CELL_STRIDE;
    const int block = feature / BLOCK, inside = feature % BLOCK;
    return (block * T::CELL_STRIDE + inside % T::CELL_STRIDE) * T::LENGTH + inside / T::CELL_STRIDE;
}

template <Along ALONG>
VQ_INLINE float of_feature(const float* values, int feature) {
    static_assert(ALONG != Along::none, "there are values");
    return global(values).load(ALONG == Along::row ? feature : 0);
}
template <class T>
VQ_INLINE float scaled(const Arguments<T>& a, float value, int feature) {
    if constexpr (T::Y_SCALE == Along::none) {
        return value;
    } else {
        return value * of_feature<T::Y_SCALE>(a.y_scale, feature);
    }
}
template <class T>
VQ_INLINE float biased(const Arguments<T>& a, float value, int feature) {
    return T::BIAS ? value + global(a.bias).load(feature) : value;
}

// Stores the sum of `element` of a row of codes over span `number`: as y where FINAL, else as a part
// of it in cell order.
template <class T>
VQ_INLINE void store_sum(const Arguments<T>& a, int number, int token, int row, int element,
                         float sum) {
    constexpr int OUTPUTS = T::ALONG_IN ? 1 : T::LENGTH;
    const auto out = global(a.out);
    const int position = row * OUTPUTS + element;
    if constexpr (T::FINAL) {
        const int feature = T::ALONG_IN ? position : cell_feature<T>(position);
        if (feature >= a.n) return;
        const float y = biased<T>(a, scaled<T>(a, sum, feature), feature);
        out.store(i64(token) * a.n + feature, from_float<typename T::Out>(y));
    } else {
        const i64 start = (i64(number) * a.m + token) * a.width;
        out.store(start + position, from_float<typename T::Out>(sum));
    }
}

// Columns of codes that span `number` walks: [first, last).
template <class T>
VQ_INLINE int span_first(const Arguments<T>& a, int number) {
    return number * a.span;
}
template <class T>
VQ_INLINE int span_last(const Arguments<T>& a, int number) {
    const int end = (number + 1) * a.span;
    return end < a.columns ? end : a.columns;
}

}  // namespace vq
