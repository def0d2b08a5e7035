// What a warp's tensor-core instructions compute, on fragments as the PTX ISA lays them out: lane =
// 4 * group + thread.
#pragma once

#include <cmath>

#include "state.h"

namespace vq::harness {

// Every half as a float.
inline const float* half_table() {
    static const std::vector<float> table = [] {
        std::vector<float> values(1 << 16);
        for (u32 bits = 0; bits < values.size(); bits++) {
            const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
            float value = exponent == 0    ? std::ldexp(float(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(float(1024 + fraction), exponent - 25);
            values[bits] = bits >> 15 ? -value : value;
        }
        return values;
    }();
    return table.data();
}

inline float widen_bfloat16(u32 bits) {
    const u32 word = bits << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Nearest, ties to even.
inline u16 round_to_half(float value) {
    u32 word;
    std::memcpy(&word, &value, 4);
    const u16 sign = u16(word >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) return u16(0x7fff);
    if (size >= 65520.0f) return u16(sign | 0x7c00);
    if (size < 0x1p-14f) return u16(sign | u16(std::nearbyint(size * 0x1p24f)));
    word &= 0x7fffffff;
    word += 0xfff + (word >> 13 & 1);
    return u16(sign | ((word >> 13) - (112 << 10)));
}
inline u16 round_to_bfloat16(float value) {
    u32 word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return u16(0x7fff);
    return u16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// d[16][8] += a[16][16] * b[16][8], summed in double and rounded once.
template <class Widen>
void multiply_16bit(Deposit& warp, Widen widen, bool half_sums) {
    const float* halves = half_table();
    float a[16][16], b[8][16];
    for (int lane = 0; lane < LANES; lane++) {
        const int group = lane / 4, pair = lane % 4 * 2;
        const u32* in = warp.in[lane];
        for (int e = 0; e < 2; e++) {
            // a0: upper left, a1: lower left, a2: upper right, a3: lower right
            for (int r = 0; r < 4; r++) {
                a[group + r % 2 * 8][pair + r / 2 * 8 + e] = widen(in[r] >> (16 * e) & 0xffff);
            }
            for (int r = 0; r < 2; r++) {
                b[group][pair + r * 8 + e] = widen(in[4 + r] >> (16 * e) & 0xffff);
            }
        }
    }
    const auto product = [&](int row, int column) {
        double sum = 0;
        for (int k = 0; k < 16; k++) sum += double(a[row][k]) * double(b[column][k]);
        return sum;
    };
    for (int lane = 0; lane < LANES; lane++) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int r = 0; r < 2; r++) {
            const int row = group + 8 * r;
            const double sums[2] = {product(row, pair), product(row, pair + 1)};
            if (half_sums) {
                const u32 before = warp.in[lane][6 + r];
                const u32 low = round_to_half(float(sums[0] + halves[before & 0xffff]));
                const u32 high = round_to_half(float(sums[1] + halves[before >> 16]));
                warp.out[lane][r] = high << 16 | low;
                continue;
            }
            for (int e = 0; e < 2; e++) {
                float sum;
                std::memcpy(&sum, &warp.in[lane][6 + 2 * r + e], 4);
                sum = float(sums[e] + double(sum));
                std::memcpy(&warp.out[lane][2 * r + e], &sum, 4);
            }
        }
    }
}

// d[16][8] += a[16][32] * b[32][8] of signed bytes; sums wrap.
inline void multiply_bytes(Deposit& warp) {
    int a[16][32], b[8][32];
    for (int lane = 0; lane < LANES; lane++) {
        const int group = lane / 4, first = lane % 4 * 4;
        const u32* in = warp.in[lane];
        for (int e = 0; e < 4; e++) {
            for (int r = 0; r < 4; r++) {
                a[group + r % 2 * 8][first + r / 2 * 16 + e] = std::int8_t(in[r] >> (8 * e));
            }
            for (int r = 0; r < 2; r++) {
                b[group][first + r * 16 + e] = std::int8_t(in[4 + r] >> (8 * e));
            }
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        for (int r = 0; r < 4; r++) {
            const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += a[row][k] * b[column][k];
            warp.out[lane][r] = warp.in[lane][6 + r] + u32(sum);
        }
    }
}

// Lane 8m + r holds row r of matrix m; register m of a lane gets two neighbours of row lane / 4.
inline void spread_matrices(Deposit& warp, bool transposed) {
    for (int lane = 0; lane < LANES; lane++) {
        for (int m = 0; m < 4; m++) {
            u16 pair[2];
            for (int e = 0; e < 2; e++) {
                const int along = lane / 4, across = lane % 4 * 2 + e;
                const int row = transposed ? across : along;
                const int column = transposed ? along : across;
                const u32 word = warp.in[8 * m + row][column / 2];
                pair[e] = u16(word >> (16 * (column % 2)));
            }
            warp.out[lane][m] = u32(pair[1]) << 16 | pair[0];
        }
    }
}

}  // namespace vq::harness
