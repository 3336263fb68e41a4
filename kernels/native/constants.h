// Written by rules/native_constants.py from the Python modules that the namespaces are named after; not to be edited.
#pragma once

#include <cstdint>

namespace native_library {
constexpr int ABI_VERSION = 4;
constexpr int AVX2 = 1;
constexpr int AVX512_VNNI = 2;
}  // namespace native_library

namespace random_bits {
constexpr int MULTIPLIER_1 = 0x7FEB352D;
constexpr uint32_t MULTIPLIER_2 = 0x846CA68B;
constexpr uint32_t GOLDEN = 0x9E3779B9;
}  // namespace random_bits

namespace packing {
constexpr int TRITS_PER_BYTE = 5;
constexpr int LARGEST_BYTE = 242;
}  // namespace packing

namespace two_bit_layout {
constexpr int ROWS = 16;
constexpr int COLUMNS = 16;
}  // namespace two_bit_layout

namespace exponents {
constexpr double SQRT_HALF = 0.7071067811865476;
}  // namespace exponents

namespace momentum_format {
constexpr int BITS = 4;
constexpr int CELL = 16;
constexpr int LEVELS = 7;
constexpr int BLOCK = 64;
constexpr double CLIP_RMS = 2.5;
constexpr int STATISTIC_BITS = 15;
constexpr int STATISTIC_OCTAVES = 64;
constexpr double UPDATE_STEPS = 1024.0;
constexpr double UPDATE_LIMIT = 31.0;
}  // namespace momentum_format

namespace gradient_sum_format {
constexpr int BLOCK = 64;
constexpr int LEAST_EXPONENT = -126;
constexpr int LARGEST_EXPONENT = 121;
constexpr int EXPONENT_OFFSET = 133;
constexpr int BEYOND_127 = 0x7E0000;
}  // namespace gradient_sum_format
