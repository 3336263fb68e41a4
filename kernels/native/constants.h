// Written by rules/native_constants.py from the Python modules that the namespaces are named after; not to be edited.
#pragma once

#include <cstdint>

namespace native_library {
constexpr int ABI_VERSION = 5, AVX2 = 1, AVX512_VNNI = 2;
}

namespace random_bits {
constexpr int MULTIPLIER_1 = 0x7FEB352D;
constexpr uint32_t MULTIPLIER_2 = 0x846CA68B, GOLDEN_STEP = 0x9E3779B9;
}

namespace packing {
constexpr int TRITS_PER_BYTE = 5, LARGEST_BYTE = 242;
}

namespace decode_layout {
constexpr int ROWS = 16, COLUMNS = 16, PARTS = 4, VECTOR = 64;
}

namespace exponents {
constexpr double SQRT_HALF = 0.7071067811865476;
}

namespace momentum_format {
constexpr int BITS = 4, CELL = 16, LARGEST_CODE = 7, BLOCK = 64, STATISTIC_BITS = 15, STATISTIC_OCTAVES = 64;
constexpr double CLIP_RMS = 2.5, UPDATE_STEPS = 1024.0, UPDATE_LIMIT = 31744.0;
}

namespace gradient_sum_format {
constexpr int BLOCK = 64, LEAST_EXPONENT = -126, LARGEST_EXPONENT = 121, EXPONENT_OFFSET = 133, BEYOND_127 = 0x7E0000;
}
