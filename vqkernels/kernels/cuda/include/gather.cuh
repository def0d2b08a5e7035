// Codes as tiles, and entries gathered whole: as many registers as a tensor core's operand takes.
//
// A warp's tile is 64 output features by a chunk of columns. Lane 4g + t holds, of each stage,
//
//     along in    the codes of rows 8r + g and columns 4q + t, number r * QUADS + q
//     along out   the codes of row g and of CODES neighbouring columns from t * CODES on
//
// as one load: codes are stored [tile, chunk, stage, lane, bytes]. An entry is cut into pieces of at
// most 16 bytes. In shared memory each piece has a slot and is there COPIES times side by side; lane
// l reads copy l % COPIES, so that with 128 bytes of copies lanes served together never meet in a
// bank. Entries of a stage lie STRIDE bytes apart, which slots of several pieces and stages share.
//
// T names, beside what linear.cuh lists:
//
//     VARIANT, CODES, DEPTH             codes of a lane in a chunk; chunks loaded ahead
//     CODE_BYTES(stage), HOT(stage)     bytes of a stored code; entries in shared memory
//     SLOT(piece of a stage), STRIDE(stage), COPIES(stage), BY_BYTE(stage)
//     BEFORE(stage)                     entries of a codebook set before the stage's
//     SETS, SET_BYTES                   codebooks that a row of codes uses, and the bytes of each
#pragma once

#include <linear.cuh>

namespace vq {

// Which operand of an mma the weight is.
enum class Variant {
    a,      // rows of A: 8 tokens an mma
    b,      // columns of B: 16 tokens an mma
    split,  // A, a vector's halves in both halves of the rows: 4 tokens an mma
    bytes,  // B, int8 entries; a token's high and low bytes are two rows of A
};

template <class T>
struct Tile {
    static constexpr bool BYTES = T::VARIANT == Variant::bytes;
    static constexpr int ENTRY_BYTES = T::LENGTH * int(sizeof(typename T::Entry));
    static constexpr int GATHER = ENTRY_BYTES < 16 ? ENTRY_BYTES : 16;
    static constexpr int PIECES = ENTRY_BYTES / GATHER;
    static constexpr int WORDS = GATHER / 4;  // of a piece
    static constexpr int STEPS = WORDS / 2;   // mma instructions that use it up, along in
    static constexpr int PIECE = GATHER / int(sizeof(typename T::Entry));  // elements
    static constexpr int QUADS = T::CODES / 8;
    static constexpr int ROWS = T::ALONG_IN ? 64 : 8;                     // of codes
    static constexpr int COLUMNS = T::ALONG_IN ? 4 * QUADS : 4 * T::CODES;  // of a chunk
};

// 32-bit words of a stage's codes that a lane has in a chunk, and of all stages before.
template <class T>
VQ_CONSTANT int lane_words(int stage) {
    return T::CODES * T::CODE_BYTES(stage) / 4;
}
template <class T>
VQ_CONSTANT int words_before(int stage) {
    int sum = 0;
    // a loop to STAGES: one to `stage` stays a loop where it is called for four stages, and keeps
    // what calls it from being unrolled
#pragma unroll
    for (int s = 0; s < T::STAGES; s++) sum += s < stage ? lane_words<T>(s) : 0;
    return sum;
}
template <class T>
VQ_CONSTANT int chunk_words() {
    return WARP * words_before<T>(T::STAGES);
}

// A lane's codes of a chunk.
template <class T>
struct ChunkCodes {
    u32 words[words_before<T>(T::STAGES)];

    // from: the lane's words of the chunk's first stage.
    VQ_INLINE void load(Global<const typename T::Code> from, int chunk) {
        load_stage<0>(from, chunk);
    }
    template <int STAGE>
    VQ_INLINE void load_stage(Global<const typename T::Code> from, int chunk) {
        constexpr int WORDS = lane_words<T>(STAGE), BEFORE = words_before<T>(STAGE);
        const int further = WORDS - lane_words<T>(0);
        const int at = chunk * chunk_words<T>() + WARP * BEFORE + lane_id() * further;
        const auto loaded = from.template stream<Pack<u32, WORDS>>(at);
#pragma unroll
        for (int word = 0; word < WORDS; word++) words[BEFORE + word] = loaded.at[word];
        if constexpr (STAGE + 1 < T::STAGES) load_stage<STAGE + 1>(from, chunk);
    }
};

// Entries of one codebook set in shared memory, the rest of its entries in global memory.
template <class T>
struct Gathers {
    static constexpr int WORDS = Tile<T>::WORDS;
    using Piece = Pack<u32, WORDS>;

    Shared<u8> books;
    Global<const typename T::Entry> cold;
    int first;  // entry of the set that the rows use
    int set;    // of the columns at hand

    // Byte offset of a piece of the entry that code `number` of a stage names.
    VQ_INLINE int place(const ChunkCodes<T>& codes, int stage, int number, int piece) const {
        const u32 copy = u32(set * T::SET_BYTES + T::SLOT(stage * Tile<T>::PIECES + piece)) +
                         u32(lane_id() % T::COPIES(stage)) * u32(Tile<T>::GATHER);
        // a code times 256 is its byte one place up: no shift, no addition
        if (T::BY_BYTE(stage)) {
            const int byte = number * T::CODE_BYTES(stage);
            const u32 word = codes.words[words_before<T>(stage) + byte / 4];
            return int(permute_bytes(word, copy, 0x7604u | u32(byte % 4) << 4));
        }
        return int(u32(code(codes, stage, number) * T::STRIDE(stage)) + copy);
    }
    VQ_INLINE int code(const ChunkCodes<T>& codes, int stage, int number) const {
        const int bytes = T::CODE_BYTES(stage);
        const u32 word = codes.words[words_before<T>(stage) + number * bytes / 4];
        return int(word >> (8 * (number * bytes % 4)) & (bytes == 1 ? 0xffu : 0xffffu));
    }

    // Piece `piece` of the entry. Stage, number and piece are constants once loops are unrolled.
    VQ_INLINE Piece load(const ChunkCodes<T>& codes, int stage, int number, int piece) const {
        if (T::HOT(stage) < T::entries(stage)) {
            const int entry = code(codes, stage, number);
            if (T::HOT(stage) == 0 || entry >= T::HOT(stage)) {
                const int before = first + set * entries_before<T>(T::STAGES);
                const int at = before + T::BEFORE(stage) + entry;
                return cold.template load<Piece>(i64(at) * T::LENGTH + piece * Tile<T>::PIECE);
            }
        }
        return books.template load<Piece>(place(codes, stage, number, piece));
    }
};

// Copies the codebooks from `first` on to shared memory.
template <class T>
VQ_INLINE void fill(const Gathers<T>& to) {
    constexpr int PIECES = Tile<T>::PIECES, GATHER = Tile<T>::GATHER;
    using Piece = typename Gathers<T>::Piece;
    for (int set = 0; set < T::SETS; set++) {
#pragma unroll
        for (int stage = 0; stage < T::STAGES; stage++) {
            const int copies = T::COPIES(stage);
            const int before = to.first + set * entries_before<T>(T::STAGES);
            // neighbouring threads write neighbouring copies: no two in one bank
            for (int i = int(threadIdx.x); i < T::HOT(stage) * PIECES * copies; i += T::THREADS) {
                const int entry = i / (PIECES * copies), piece = i / copies % PIECES;
                const int from = before + T::BEFORE(stage) + entry;
                const int at = set * T::SET_BYTES + T::SLOT(stage * PIECES + piece) +
                               entry * T::STRIDE(stage) + i % copies * GATHER;
                to.books.store(at, to.cold.template load<Piece>(i64(from) * T::LENGTH +
                                                                piece * Tile<T>::PIECE));
            }
        }
    }
}

}  // namespace vq
