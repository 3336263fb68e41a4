// Planar base-3 rows (packing.py): digit j of byte b is column j * bytes + b; with two trits a weight, two such planes.
#pragma once

#include "common.h"

constexpr int largest_level(int trits) { return trits == 1 ? 1 : 4; }

static inline __attribute__((always_inline)) int64_t packed_width(int64_t columns) {
    return (columns + packing::TRITS_PER_BYTE - 1) / packing::TRITS_PER_BYTE;
}

// Bytes that are unpacked or packed together, one digit of all of them after the other. Their codes lie in a local
// array, which no pointer can alias: over the rows themselves the compiler does not vectorise.
constexpr int64_t TILE_BYTES = 256;

// One row -> 5 * width trits in {-1, 0, 1}; the caller's buffer holds the padding columns too.
static inline __attribute__((always_inline)) void unpack_row(const uint8_t* packed, int64_t width, int8_t* trits) {
    for (int64_t start = 0; start < width; start += TILE_BYTES) {
        const int64_t length = width - start < TILE_BYTES ? width - start : TILE_BYTES;
        uint16_t codes[TILE_BYTES];
        for (int64_t b = 0; b < length; ++b) {
            const uint16_t code = packed[start + b];
            codes[b] = code - (code > packing::LARGEST_BYTE ? packing::LARGEST_BYTE + 1 : 0);
        }
        for (int j = 0; j < packing::TRITS_PER_BYTE; ++j) {
            int8_t* out = trits + j * width + start;
            for (int64_t b = 0; b < length; ++b) {
                const uint16_t third = (uint16_t)(codes[b] * 171) >> 9;
                const uint16_t digit = codes[b] - 3 * third;
                out[b] = (int8_t)((digit & 1) - (digit >> 1));
                codes[b] = third;
            }
        }
    }
}

// The inverse; padding columns must be zero.
static inline __attribute__((always_inline)) void pack_row(const int8_t* trits, int64_t width, uint8_t* packed) {
    for (int64_t start = 0; start < width; start += TILE_BYTES) {
        const int64_t length = width - start < TILE_BYTES ? width - start : TILE_BYTES;
        uint8_t codes[TILE_BYTES] = {};
        for (int j = packing::TRITS_PER_BYTE - 1; j >= 0; --j) {
            const int8_t* in = trits + j * width + start;
            for (int64_t b = 0; b < length; ++b) codes[b] = (uint8_t)(codes[b] * 3 + (in[b] < 0 ? 2 : in[b]));
        }
        memcpy(packed + start, codes, length);
    }
}

// One row of one or two trits a weight -> 5 * width levels; plane holds as many, for the second trits.
static inline __attribute__((always_inline)) void unpack_levels(const uint8_t* packed, int64_t width, int trits,
                                                                int8_t* levels, int8_t* plane) {
    unpack_row(packed, width, levels);
    if (trits == 1) return;
    unpack_row(packed + width, width, plane);
    for (int64_t i = 0; i < packing::TRITS_PER_BYTE * width; ++i) levels[i] = (int8_t)(3 * levels[i] + plane[i]);
}

// The inverse; padding columns must be zero. Levels are overwritten.
static inline __attribute__((always_inline)) void pack_levels(int8_t* levels, int64_t width, int trits, int8_t* plane,
                                                              uint8_t* packed) {
    if (trits == 2) {
        for (int64_t i = 0; i < packing::TRITS_PER_BYTE * width; ++i) {
            const int8_t first = (int8_t)((levels[i] > 1) - (levels[i] < -1));
            plane[i] = (int8_t)(levels[i] - 3 * first);
            levels[i] = first;
        }
        pack_row(plane, width, packed + width);
    }
    pack_row(levels, width, packed);
}
