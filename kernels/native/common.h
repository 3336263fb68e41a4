// What every native kernel shares: run-time choice of instruction set, the counter-based hash, thread ranges.
//
// Plain loops are compiled once per instruction set (target_clones) and chosen by the loader; contraction is off, so
// that each float operation rounds as the torch reference does. Threads come from the OpenMP runtime torch has loaded.
#pragma once

#include <cstdint>
#include <cstring>

#include "constants.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ARB_X86 1
#define ARB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ARB_CLONES
#endif
#define ARB_API extern "C" __attribute__((visibility("default")))

// What arb_instruction_set returns and the matmuls take.
constexpr int AVX2_ONLY = native_library::AVX2, AVX512_VNNI = native_library::AVX512_VNNI;

// Below this many elements a second thread costs more than it brings.
constexpr int64_t PARALLEL_FROM = 1 << 15;

constexpr uint32_t GOLDEN = random_bits::GOLDEN_STEP;

// lowbias32 of random_bits.py
static inline __attribute__((always_inline)) uint32_t mix(uint32_t word) {
    word ^= word >> 16;
    word *= random_bits::MULTIPLIER_1;
    word ^= word >> 15;
    word *= random_bits::MULTIPLIER_2;
    return word ^ (word >> 16);
}

static inline __attribute__((always_inline)) float uniform_low(uint32_t bits) {
    return (float)(int32_t)(bits & 0xFFFFu) * 0x1p-16f;
}

static inline __attribute__((always_inline)) float uniform_high(uint32_t bits) {
    return (float)(int32_t)(bits >> 16) * 0x1p-16f;
}

// |x| as the integer that orders like it: maxima then need no float comparison rules.
static inline __attribute__((always_inline)) int32_t magnitude_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7FFFFFFF;
}

static inline float from_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
