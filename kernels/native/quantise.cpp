// Quantisation to int8 (quantise.py): activations per token, gradients per token and per column, in two passes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "quantise.h"

namespace {

constexpr int64_t TILE = 64;

ARB_CLONES int32_t largest(const float* row, int64_t length) {
    int32_t absmax = 0;
    for (int64_t i = 0; i < length; ++i) absmax = std::max(absmax, magnitude_bits(row[i]));
    return absmax;
}

ARB_CLONES void round_row(const float* row, int64_t length, float inverse, int8_t* codes) {
    for (int64_t i = 0; i < length; ++i) codes[i] = (int8_t)(int32_t)std::nearbyint(row[i] * inverse);
}

// Largest |g * column_factor| of the row; raises each column's largest |g * row_factor|.
ARB_CLONES int32_t gradient_maxima(const float* row, int64_t length, const float* column_factor, float row_factor,
                                   int32_t* column_max) {
    int32_t absmax = 0;
    for (int64_t i = 0; i < length; ++i) absmax = std::max(absmax, magnitude_bits(row[i] * column_factor[i]));
    for (int64_t i = 0; i < length; ++i) column_max[i] = std::max(column_max[i], magnitude_bits(row[i] * row_factor));
    return absmax;
}

inline __attribute__((always_inline)) int8_t stochastic(float value, float uniform) {
    const float code = std::floor(value + uniform);
    return (int8_t)(int32_t)(code < -127 ? -127 : code > 127 ? 127 : code);
}

ARB_CLONES void round_gradient(const float* row, int64_t start, int64_t length, const float* column_factor,
                               float row_factor, float token_inverse, const float* column_inverse, uint32_t row_key,
                               int8_t* by_token, int8_t* by_column) {
    for (int64_t i = start; i < start + length; ++i) {
        const uint32_t bits = mix(row_key + (uint32_t)i * GOLDEN);
        by_token[i] = stochastic(row[i] * column_factor[i] * token_inverse, uniform_low(bits));
        by_column[i - start] = stochastic(row[i] * row_factor * column_inverse[i], uniform_high(bits));
    }
}

float scale_of(int32_t absmax_bits) { return from_bits(absmax_bits) * (1.0f / 127.0f); }

float inverse_of(int32_t absmax_bits) {
    const float absmax = from_bits(absmax_bits);
    return absmax > 0 ? 127.0f / absmax : 0.0f;
}

}  // namespace

float quantise_row(const float* row, int64_t length, int8_t* codes) {
    const int32_t absmax = largest(row, length);
    round_row(row, length, inverse_of(absmax), codes);
    return scale_of(absmax);
}

// values (M, K) -> codes int8 (M, K), scale (M): values ~ codes * scale.
ARB_API void arb_quantise_tokens(const float* values, int64_t M, int64_t K, int8_t* codes, float* scale) {
#pragma omp parallel for if (M * K >= PARALLEL_FROM)
    for (int64_t m = 0; m < M; ++m) scale[m] = quantise_row(values + m * K, K, codes + m * K);
}

// gradient (M, N), column_factor (N), row_factor (M) -> gradient * column_factor as by_token int8 (M, N) with token_scale
// (M), and gradient * row_factor as by_column int8 (N, M) with column_scale (N), both rounded stochastically. Without a
// row_factor the second is left out.
ARB_API void arb_quantise_gradient(const float* gradient, int64_t M, int64_t N, const float* column_factor,
                                   const float* row_factor, int8_t* by_token, float* token_scale, int8_t* by_column,
                                   float* column_scale) {
    const bool parallel = M * N >= PARALLEL_FROM;
    std::vector<int32_t> token_max(M), column_max(N);
    std::vector<float> column_inverse(N);
#pragma omp parallel if (parallel)
    {
        std::vector<int32_t> own(N);
#pragma omp for
        for (int64_t m = 0; m < M; ++m)
            token_max[m] = gradient_maxima(gradient + m * N, N, column_factor, row_factor ? row_factor[m] : 0.0f,
                                           own.data());
#pragma omp critical
        for (int64_t n = 0; n < N; ++n) column_max[n] = std::max(column_max[n], own[n]);
    }
    int32_t key = 0;
    for (int64_t m = 0; m < M; ++m) {
        token_scale[m] = scale_of(token_max[m]);
        key = std::max(key, token_max[m]);
    }
    for (int64_t n = 0; n < N && row_factor; ++n) {
        column_scale[n] = scale_of(column_max[n]);
        column_inverse[n] = inverse_of(column_max[n]);
    }
    // tiles, so that the transposed codes are written a cache line at a time
#pragma omp parallel for if (parallel)
    for (int64_t first = 0; first < M; first += TILE) {
        const int64_t rows = std::min(TILE, M - first);
        int8_t tile[TILE][TILE];
        for (int64_t start = 0; start < N; start += TILE) {
            const int64_t length = std::min(TILE, N - start);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t m = first + i;
                round_gradient(gradient + m * N, start, length, column_factor, row_factor ? row_factor[m] : 0.0f,
                               inverse_of(token_max[m]), column_inverse.data(), mix((uint32_t)m ^ (uint32_t)key), by_token + m * N, tile[i]);
            }
            for (int64_t j = 0; j < length && row_factor; ++j)
                for (int64_t i = 0; i < rows; ++i) by_column[(start + j) * M + first + i] = tile[i][j];
        }
    }
}
