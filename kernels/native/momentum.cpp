// The momentum rule (momentum.py) in four passes over dW and state, with no temporary longer than a row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "trits.h"

namespace {

using namespace momentum_format;

constexpr int LOW_HALF = CELL - 1;  // of accum: the residual; the momentum code lies above it
constexpr float CLIP = (float)((CLIP_RMS / LARGEST_CODE) * (CLIP_RMS / LARGEST_CODE));
constexpr float STEPS = (float)UPDATE_STEPS, LIMIT = (float)UPDATE_LIMIT;

struct Rule {
    int64_t columns;
    const float* power;  // 256 quarter octaves, exponent + 128
    float beta, share;  // m * beta + dW * share: the new momentum, then with it the direction
    uint32_t key;
};

// quarter_octaves_covering: the least e with 2^(e / 4) >= sqrt(square)
int covering_exponent(float square) {
    if (!(square > 0)) return -127;
    if (std::isinf(square)) return 127;
    int octave;
    const float mantissa = std::frexp(square, &octave);
    const int half = 2 * (octave - 1) + (mantissa > 0.5f) + (mantissa > (float)exponents::SQRT_HALF);
    return half < -127 ? -127 : half > 127 ? 127 : half;
}

// log2 of fixed_point_scale
int fixed_point_shift(int32_t absmax_bits) {
    const float absmax = from_bits(absmax_bits);
    if (!(absmax > 0)) return 0;
    int octave;
    std::frexp(absmax, &octave);
    return std::clamp(STATISTIC_BITS - octave, -126, 126);
}

float power_of_two(int octave) { return std::ldexp(1.0f, octave); }

float square_root(int64_t total) { return (float)std::sqrt((double)(float)total); }

inline __attribute__((always_inline)) void direction_of(const Rule& rule, const uint8_t* accum, float step,
                                                        const float* dW, int length, float* direction) {
    for (int i = 0; i < length; ++i)
        direction[i] = (float)((int8_t)accum[i] >> BITS) * step * rule.beta + dW[i] * rule.share;
}

// The update of a block before it is set to unit RMS; returns the block's length.
inline __attribute__((always_inline)) int unit_of(const Rule& rule, int64_t start, const uint8_t* accum,
                                                  const int8_t* exponents, const float* dW, float row_scale,
                                                  const float* column_scale, float* unit) {
    const int length = rule.columns - start < BLOCK ? (int)(rule.columns - start) : BLOCK;
    direction_of(rule, accum + start, rule.power[exponents[start / BLOCK] + 128], dW + start, length, unit);
    for (int i = 0; i < length; ++i) unit[i] = unit[i] * row_scale * column_scale[start + i];
    return length;
}

// Folds one row.
ARB_CLONES void fold_row(const Rule& rule, int64_t row, uint8_t* accum, int8_t* exponents, const float* dW) {
    const uint32_t row_key = mix((uint32_t)row ^ rule.key);
    for (int64_t start = 0; start < rule.columns; start += BLOCK) {
        const int length = rule.columns - start < BLOCK ? (int)(rule.columns - start) : BLOCK;
        int8_t& exponent = exponents[start / BLOCK];
        const float step = rule.power[exponent + 128];
        float momentum[BLOCK], square[BLOCK] = {};
        for (int i = 0; i < length; ++i) {
            momentum[i] = (float)((int8_t)accum[start + i] >> BITS) * step * rule.beta + dW[start + i] * rule.share;
            square[i] = momentum[i] * momentum[i];
        }
        for (int half = BLOCK / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) square[i] += square[i + half];
        const float mean = square[0] / (float)length;
        exponent = (int8_t)covering_exponent(mean * CLIP);
        const float inverse = rule.power[128 - exponent];
        for (int i = 0; i < length; ++i) {
            const uint32_t bits = mix(row_key + (uint32_t)(start + i) * GOLDEN);
            float code = std::floor(momentum[i] * inverse + uniform_low(bits));
            code = code < -LARGEST_CODE ? -LARGEST_CODE : code > LARGEST_CODE ? LARGEST_CODE : code;
            accum[start + i] = (uint8_t)((int)code << BITS | (accum[start + i] & LOW_HALF));
        }
    }
}

inline __attribute__((always_inline)) int32_t square_of(float fixed_point) {
    const int32_t steps = (int32_t)std::nearbyint(fixed_point);
    return steps * steps;
}

// The folded row's direction; returns the largest of it, as ordered bits, and raises each column's largest.
ARB_CLONES int32_t measure_row(const Rule& rule, const uint8_t* accum, const int8_t* exponents, const float* dW,
                               float* direction, int32_t* column_max) {
    int32_t absmax = 0;
    for (int64_t start = 0; start < rule.columns; start += BLOCK) {
        const int length = rule.columns - start < BLOCK ? (int)(rule.columns - start) : BLOCK;
        const float step = rule.power[exponents[start / BLOCK] + 128];
        direction_of(rule, accum + start, step, dW + start, length, direction + start);
        for (int i = 0; i < length; ++i) {
            const int32_t bits = magnitude_bits(direction[start + i]);
            absmax = std::max(absmax, bits);
            column_max[start + i] = std::max(column_max[start + i], bits);
        }
    }
    return absmax;
}

ARB_CLONES int64_t sum_squares(const float* direction, int64_t length, float scale) {
    int64_t total = 0;
    for (int64_t i = 0; i < length; ++i) total += square_of(direction[i] * scale);
    return total;
}

// Adds the row's squares, each in fixed point of its column's scale, to the columns' sums.
ARB_CLONES void add_squares(const Rule& rule, const uint8_t* accum, const int8_t* exponents, const float* dW,
                            const float* scale, int64_t* column_sum) {
    for (int64_t start = 0; start < rule.columns; start += BLOCK) {
        const int length = rule.columns - start < BLOCK ? (int)(rule.columns - start) : BLOCK;
        float direction[BLOCK];
        direction_of(rule, accum + start, rule.power[exponents[start / BLOCK] + 128], dW + start, length, direction);
        for (int i = 0; i < length; ++i) column_sum[start + i] += square_of(direction[i] * scale[start + i]);
    }
}

inline __attribute__((always_inline)) float clamp(float x, float limit) {
    return x < -limit ? -limit : x > limit ? limit : x;
}

// The row's sum of squares of the update before it is set to unit RMS, in fixed point of UPDATE_STEPS.
ARB_CLONES int64_t power_row(const Rule& rule, const uint8_t* accum, const int8_t* exponents, const float* dW,
                             float row_scale, const float* column_scale) {
    int64_t total = 0;
    for (int64_t start = 0; start < rule.columns; start += BLOCK) {
        float unit[BLOCK];
        const int length = unit_of(rule, start, accum, exponents, dW, row_scale, column_scale, unit);
        for (int i = 0; i < length; ++i) {
            const int32_t steps = (int32_t)std::nearbyint(clamp(unit[i] * STEPS, LIMIT));
            total += (int64_t)(steps * steps);
        }
    }
    return total;
}

// Moves one row's latents; levels and plane hold the row, unpacked. Returns how many levels changed.
ARB_CLONES int64_t move_row(const Rule& rule, int64_t row, uint8_t* accum, const int8_t* exponents, const float* dW,
                            float row_scale, const float* column_scale, float inverse_rms, float max_update,
                            float rate, int trits, uint8_t* packed, int8_t* levels, int8_t* plane) {
    const uint32_t row_key = mix((uint32_t)row ^ rule.key);
    const int64_t width = packed_width(rule.columns);
    const int32_t end = (2 * largest_level(trits) + 1) * CELL / 2;
    unpack_levels(packed, width, trits, levels, plane);
    int32_t flips = 0;
    for (int64_t start = 0; start < rule.columns; start += BLOCK) {
        float unit[BLOCK];
        const int length = unit_of(rule, start, accum, exponents, dW, row_scale, column_scale, unit);
        for (int i = 0; i < length; ++i) {
            const float update = clamp(unit[i] * inverse_rms, max_update);
            const uint32_t bits = mix(row_key + (uint32_t)(start + i) * GOLDEN);
            const int32_t shift = (int32_t)std::floor(update * rate + uniform_high(bits));
            const int32_t old_level = levels[start + i];
            const int32_t residual = (int8_t)(accum[start + i] << BITS) >> BITS;
            int32_t latent = shift + old_level * CELL + residual;
            latent = latent < -end ? -end : latent > end - 1 ? end - 1 : latent;
            const int32_t level = (latent + CELL / 2) >> BITS;
            levels[start + i] = (int8_t)level;
            accum[start + i] = (uint8_t)((accum[start + i] & ~LOW_HALF) | ((latent - level * CELL) & LOW_HALF));
            flips += level != old_level;
        }
    }
    pack_levels(levels, width, trits, plane, packed);
    return flips;
}

}  // namespace

// Fold, then move every weight by `rate` residual steps per unit of update. Returns how many levels changed.
// packed (rows, trits * ceil(columns / 5)), trits 1 or 2; power: 256 floats, 2^(e / 4) for e from -128.
ARB_API int64_t arb_momentum_update(uint8_t* packed, uint8_t* accum, int8_t* exponents, const float* dW, int64_t rows,
                                    int64_t columns, int trits, uint32_t key, const float* power, float beta,
                                    float share, float max_update, float rate) {
    const Rule rule{columns, power, beta, share, key};
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, width = packed_width(columns);
    const bool parallel = rows * columns >= PARALLEL_FROM;
    std::vector<int32_t> column_max(columns);
    std::vector<int64_t> row_sum(rows), column_sum(columns);
    std::vector<int> row_shift(rows);
    std::vector<float> row_scale(rows), column_scale(columns);  // first of the statistics, then of the update
    int least = 126;  // the largest row's shift
    int64_t total = 0, power_sum = 0, flips = 0;
    const auto state = [&](int64_t n) { return accum + n * columns; };
    const auto steps = [&](int64_t n) { return exponents + n * blocks; };
    const auto gradient = [&](int64_t n) { return dW + n * columns; };

#pragma omp parallel if (parallel) reduction(min : least)
    {
        std::vector<int32_t> own(columns);
        std::vector<float> direction(columns);
#pragma omp for
        for (int64_t n = 0; n < rows; ++n) {
            fold_row(rule, n, state(n), steps(n), gradient(n));
            const int32_t absmax = measure_row(rule, state(n), steps(n), gradient(n), direction.data(), own.data());
            row_shift[n] = fixed_point_shift(absmax);
            if (absmax) least = std::min(least, row_shift[n]);
            row_scale[n] = power_of_two(row_shift[n]);
            row_sum[n] = sum_squares(direction.data(), columns, row_scale[n]);
        }
#pragma omp critical
        for (int64_t k = 0; k < columns; ++k) column_max[k] = std::max(column_max[k], own[k]);
    }
    for (int64_t k = 0; k < columns; ++k) column_scale[k] = power_of_two(fixed_point_shift(column_max[k]));

#pragma omp parallel if (parallel)
    {
        std::vector<int64_t> own(columns);
#pragma omp for
        for (int64_t n = 0; n < rows; ++n)
            add_squares(rule, state(n), steps(n), gradient(n), column_scale.data(), own.data());
#pragma omp critical
        for (int64_t k = 0; k < columns; ++k) column_sum[k] += own[k];
    }
    for (int64_t n = 0; n < rows; ++n) {
        total += row_sum[n] >> std::clamp(2 * (row_shift[n] - least), 0, 63);
        row_scale[n] = row_sum[n] > 0 ? row_scale[n] / square_root(row_sum[n]) : 0.0f;
    }
    const float root = square_root(total);
    for (int64_t k = 0; k < columns; ++k) {
        const int octaves = std::clamp(fixed_point_shift(column_max[k]) - least, 0, STATISTIC_OCTAVES);
        column_scale[k] = column_sum[k] > 0 ? root / square_root(column_sum[k]) * power_of_two(octaves) : 0.0f;
    }

#pragma omp parallel for if (parallel) reduction(+ : power_sum)
    for (int64_t n = 0; n < rows; ++n)
        power_sum += power_row(rule, state(n), steps(n), gradient(n), row_scale[n], column_scale.data());
    const float size_root = (float)(UPDATE_STEPS * std::sqrt((double)(rows * columns)));
    const float inverse_rms = power_sum > 0 ? 1.0f / square_root(power_sum) * size_root : 0.0f;

#pragma omp parallel if (parallel) reduction(+ : flips)
    {
        std::vector<int8_t> levels(packing::TRITS_PER_BYTE * width), plane(packing::TRITS_PER_BYTE * width);
#pragma omp for
        for (int64_t n = 0; n < rows; ++n)
            flips += move_row(rule, n, state(n), steps(n), gradient(n), row_scale[n], column_scale.data(), inverse_rms,
                              max_update, rate, trits, packed + n * trits * width, levels.data(), plane.data());
    }
    return flips;
}
