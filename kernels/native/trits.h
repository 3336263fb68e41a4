// Planar base-3 rows (packing.py): digit j of byte b is column j * bytes + b; with two trits a weight, two such planes.
#pragma once

#include "common.h"

constexpr int largest_level(int trits) { return trits == 1 ? 1 : 4; }

static inline __attribute__((always_inline)) int64_t packed_width(int64_t columns) {
    return (columns + packing::TRITS_PER_BYTE - 1) / packing::TRITS_PER_BYTE;
}

// One row -> 5 * width trits in {-1, 0, 1}; the caller's buffer holds the padding columns too. The compiler cannot see
// that the five runs of columns do not overlap.
static inline __attribute__((always_inline)) void unpack_row(const uint8_t* packed, int64_t width, int8_t* trits) {
#pragma GCC ivdep
    for (int64_t b = 0; b < width; ++b) {
        uint16_t code = packed[b];
        code -= code > packing::LARGEST_BYTE ? packing::LARGEST_BYTE + 1 : 0;
        for (int j = 0; j < packing::TRITS_PER_BYTE; ++j) {
            const uint16_t third = (uint16_t)(code * 171) >> 9;
            const uint16_t digit = code - 3 * third;
            trits[j * width + b] = (int8_t)((digit & 1) - (digit >> 1));
            code = third;
        }
    }
}

// The inverse; padding columns must be zero.
static inline __attribute__((always_inline)) void pack_row(const int8_t* trits, int64_t width, uint8_t* packed) {
#pragma GCC ivdep
    for (int64_t b = 0; b < width; ++b) {
        uint8_t code = 0;
        for (int j = packing::TRITS_PER_BYTE - 1; j >= 0; --j) {
            const int8_t trit = trits[j * width + b];
            code = (uint8_t)(code * 3 + (trit < 0 ? 2 : trit));
        }
        packed[b] = code;
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
