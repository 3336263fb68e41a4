// The int8 sum of weight gradients over micro-batches (gradient_sum.py).
#include <algorithm>
#include <cmath>

#include "common.h"

namespace {

using namespace gradient_sum_format;

inline __attribute__((always_inline)) float power_of_two(int exponent) { return from_bits((exponent + 127) << 23); }

// The least exponent with 127 * 2^exponent >= the number whose bits these are.
inline int covering_exponent(int32_t absmax_bits) {
    const int exponent = (absmax_bits >> 23) - EXPONENT_OFFSET + ((absmax_bits & 0x7FFFFF) > BEYOND_127);
    return std::min(std::max(exponent, LEAST_EXPONENT), LARGEST_EXPONENT);
}

ARB_CLONES void add_row(int8_t* codes, int8_t* exponents, const float* dW, int64_t columns, uint32_t row_key) {
    for (int64_t start = 0; start < columns; start += BLOCK) {
        const int length = (int)std::min<int64_t>(BLOCK, columns - start);
        int8_t& exponent = exponents[start / BLOCK];
        const float step = power_of_two(exponent);
        float sum[BLOCK];
        int32_t absmax = 0;
        for (int i = 0; i < length; ++i) {
            sum[i] = (float)codes[start + i] * step + dW[start + i];
            absmax = std::max(absmax, magnitude_bits(sum[i]));
        }
        exponent = (int8_t)covering_exponent(absmax);
        const float inverse = power_of_two(-exponent);
        for (int i = 0; i < length; ++i) {
            const uint32_t bits = mix(row_key + (uint32_t)(start + i) * GOLDEN);
            const float code = std::floor(sum[i] * inverse + uniform_low(bits));
            codes[start + i] = (int8_t)(int32_t)(code < -127 ? -127 : code > 127 ? 127 : code);
        }
    }
}

ARB_CLONES void add_value(float* dW, const int8_t* codes, const int8_t* exponents, int64_t columns) {
    for (int64_t start = 0; start < columns; start += BLOCK) {
        const int64_t end = std::min(start + BLOCK, columns);
        const float step = power_of_two(exponents[start / BLOCK]);
        for (int64_t k = start; k < end; ++k) dW[k] = (float)codes[k] * step + dW[k];
    }
}

}  // namespace

// Adds dW (rows, columns) to codes (rows, columns) and exponents (rows, blocks of 64).
ARB_API void arb_add_gradient(int8_t* codes, int8_t* exponents, const float* dW, int64_t rows, int64_t columns,
                              uint32_t key) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (int64_t n = 0; n < rows; ++n)
        add_row(codes + n * columns, exponents + n * blocks, dW + n * columns, columns, mix((uint32_t)n ^ key));
}

// Adds the value of codes and exponents to dW (rows, columns).
ARB_API void arb_add_sum(float* dW, const int8_t* codes, const int8_t* exponents, int64_t rows, int64_t columns) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for if (rows * columns >= PARALLEL_FROM)
    for (int64_t n = 0; n < rows; ++n)
        add_value(dW + n * columns, codes + n * columns, exponents + n * blocks, columns);
}
