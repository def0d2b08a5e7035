// Counts per line: bytes, 32-byte sectors, and shared-memory wavefronts of each warp access.
//
// Lanes run one after another, so a warp access is put together afterwards: the n-th time that a
// lane runs an access belongs with the n-th time of the others, between two barriers of the block.
#pragma once

#include <harness.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "records.h"

namespace vq::harness {

constexpr std::uint64_t INACTIVE = ~std::uint64_t{0};

// Distinct 32-byte sectors of global addresses; the accesses are aligned, so each lies in one.
inline int count_sectors(const std::uint64_t* address, int lanes) {
    std::uint64_t seen[32];
    int count = 0;
    for (int lane = 0; lane < lanes; lane++) {
        if (address[lane] == INACTIVE) continue;
        const std::uint64_t sector = address[lane] / 32;
        if (std::find(seen, seen + count, sector) == seen + count) seen[count++] = sector;
    }
    return count;
}

struct Wavefronts {
    int taken = 0, ideal = 0;
};

// 32 banks of 4 bytes: 32 lanes of 4 bytes, 16 of 8 or 8 of 16 are served together, in as many
// wavefronts as a bank has different words to give.
inline Wavefronts count_wavefronts(const std::uint64_t* address, int width) {
    const int together = width <= 4 ? 32 : 128 / width;
    Wavefronts sum;
    for (int first = 0; first < 32; first += together) {
        std::uint64_t words[32][32];
        int depth[32] = {};
        int most = 0;
        for (int lane = first; lane < first + together; lane++) {
            if (address[lane] == INACTIVE) continue;
            for (int part = 0; part < std::max(width / 4, 1); part++) {
                const std::uint64_t word = address[lane] / 4 + part;
                auto& bank = words[word % 32];
                int& used = depth[word % 32];
                if (std::find(bank, bank + used, word) == bank + used) bank[used++] = word;
                most = std::max(most, used);
            }
        }
        sum.taken += most;
        sum.ideal += most > 0;
    }
    return sum;
}

// The lines that accessed memory. Number 0 is none.
class Sites {
public:
    Sites() { clear(); }

    void clear() {
        records.assign(1, VqSite{});
        slots.assign(SLOTS, 0);
    }

    int find(const char* kind, At at, int width) {
        // literals of one unit: equal pointers are equal names
        const auto mixed = reinterpret_cast<std::uintptr_t>(at.file) * 31 +
                           reinterpret_cast<std::uintptr_t>(kind) * 17 + at.line * 64 + width;
        for (auto slot = (mixed * 0x9E3779B97F4A7C15u) >> 52;; slot = (slot + 1) % SLOTS) {
            const int number = slots[slot];
            if (number == 0) return slots[slot] = add(kind, at, width);
            const Key& key = keys[number];
            if (key.kind == kind && key.at.file == at.file && key.at.line == at.line &&
                key.width == width) {
                return number;
            }
        }
    }

    At at(int number) const { return keys[number].at; }
    VqSite& operator[](int number) { return records[number]; }
    const std::vector<VqSite>& all() const { return records; }

private:
    static constexpr std::size_t SLOTS = 4096;
    struct Key {
        const char* kind = nullptr;
        At at{};
        int width = 0;
    };

    int add(const char* kind, At at, int width) {
        VqSite site{};
        std::strncpy(site.kind, kind, sizeof site.kind - 1);
        std::strncpy(site.file, at.file, sizeof site.file - 1);
        site.line = at.line;
        site.width = width;
        records.push_back(site);
        if (records.size() > SLOTS / 2) std::abort();  // no kernel has so many lines
        keys.resize(records.size());
        keys.back() = {kind, at, width};
        return int(records.size()) - 1;
    }

    std::vector<VqSite> records;
    std::vector<Key> keys;
    std::vector<int> slots;
};

// The addresses that the lanes of a warp accessed since the last barrier of their block.
class WarpLog {
public:
    void add(int site, int lane, std::uint64_t address) {
        if (lines.size() <= std::size_t(site)) lines.resize(site + 1);
        Line& line = lines[site];
        const std::size_t place = std::size_t(line.executed[lane]++) * 32 + lane;
        if (line.address.size() <= place) line.address.resize((place / 32 + 1) * 32, INACTIVE);
        line.address[place] = address;
    }

    void flush(Sites& sites) {
        for (std::size_t number = 0; number < lines.size(); number++) {
            Line& line = lines[number];
            if (line.address.empty()) continue;
            VqSite& site = sites[int(number)];
            const bool shared = site.kind[0] == 's', global = site.kind[0] == 'g';
            for (std::size_t at = 0; at < line.address.size(); at += 32) {
                site.requests++;
                if (shared) {
                    const Wavefronts wavefronts = count_wavefronts(&line.address[at], site.width);
                    site.wavefronts += wavefronts.taken;
                    site.ideal += wavefronts.ideal;
                } else if (global) {
                    site.sectors += count_sectors(&line.address[at], 32);
                }
            }
            line.address.clear();
            line.executed.fill(0);
        }
    }

private:
    struct Line {
        std::array<std::uint32_t, 32> executed{};
        std::vector<std::uint64_t> address;
    };
    std::vector<Line> lines;
};

}  // namespace vq::harness
