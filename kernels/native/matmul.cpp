// int8 matmuls with int32 sums: out[r, c] = (sum_k rows[r, k] * columns[c, k]) * row_scale[r] * column_scale[c].
//
// One operand stays in its row-major int8 form and is broadcast four bytes at a time; the other is laid out in panels
// of 16 columns x 4 depths, as unsigned bytes (value + offset): the offset is the largest level, or 128 for any int8.
// The instruction multiplies unsigned by signed, and offset * (sum of the row) is taken off at the end, so every sum is
// exact.
// AVX2 has that instruction with 16-bit sums of two products only, enough for levels. Two int8 codes would saturate it:
// there both operands are widened to 16 bits, two depths in four bytes, and multiplied with 32-bit sums.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "matvec.h"
#include "quantise.h"
#include "trits.h"

#ifdef ARB_X86
#include <immintrin.h>

namespace {

constexpr int64_t LANES = decode_layout::ROWS, PANEL = 2 * LANES, DEPTH = 4, TILE_ROWS = 12, TILES_PER_TASK = 40;
constexpr int64_t WORDS = DEPTH / 2;  // depths in a step of 16-bit numbers
constexpr int ANY_INT8 = 128;         // the offset of codes
constexpr int64_t PREFETCH = 1024;    // bytes ahead in a panel, which streams from the second-level cache
enum Source { ROW_MAJOR, TRANSPOSED, LAYOUT };

struct Matmul {
    const int8_t* rows;      // (R, K)
    const uint8_t* columns;  // what Source says
    Source source;
    int64_t R, C, K, steps;  // steps: groups of four depths, or of two if wide
    int offset;
    int bits;                   // of a weight in the decode layout
    bool wide;                  // whether both operands are laid out in 16-bit numbers
    const float* row_scale;     // (R)
    const float* column_scale;  // (C) or null
    float* out;                 // (R, C)
};

ARB_CLONES int32_t sum_row(const int8_t* row, int64_t K) {
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += row[k];
    return sum;
}

// The first `count` of `places` rows of K codes, two depths of each row together: (steps, places, 2) 16-bit numbers.
ARB_CLONES void widen_rows(const int8_t* rows, int64_t count, int64_t places, int64_t K, int32_t* words) {
    const int64_t steps = (K + WORDS - 1) / WORDS;
    if (count < places) memset(words, 0, steps * places * DEPTH);
    for (int64_t i = 0; i < count; ++i) {
        const int8_t* row = rows + i * K;
        for (int64_t step = 0; step < steps; ++step) {
            const int32_t low = (uint16_t)row[2 * step], high = 2 * step + 1 < K ? row[2 * step + 1] : 0;
            words[step * places + i] = low | (int32_t)((uint32_t)high << 16);
        }
    }
}

// Rows r0 .. r0 + 11, four depths of each row together: (steps, 12, 4) bytes, and their sums; (steps, 12, 2) 16-bit
// numbers if wide, which need no sums.
void pack_rows(const Matmul& m, int64_t r0, int8_t* packed, int32_t* row_sums) {
    const int64_t count = m.R - r0 < TILE_ROWS ? m.R - r0 : TILE_ROWS, whole = m.K / DEPTH;
    if (m.wide) return widen_rows(m.rows + r0 * m.K, count, TILE_ROWS, m.K, (int32_t*)packed);
    if (count < TILE_ROWS || whole < m.steps) memset(packed, 0, m.steps * TILE_ROWS * DEPTH);
    for (int64_t i = 0; i < count; ++i) {
        const int8_t* row = m.rows + (r0 + i) * m.K;
        for (int64_t step = 0; step < whole; ++step)
            memcpy(packed + (step * TILE_ROWS + i) * DEPTH, row + step * DEPTH, DEPTH);
        for (int64_t k = whole * DEPTH; k < m.K; ++k) packed[(whole * TILE_ROWS + i) * DEPTH + k % DEPTH] = row[k];
        row_sums[r0 + i] = sum_row(row, m.K);
    }
}

// Columns c0 .. c0 + 15 of a (C, K) matrix.
ARB_CLONES void panel_from_rows(const Matmul& m, int64_t c0, uint8_t* panel) {
    const int64_t lanes = m.C - c0 < LANES ? m.C - c0 : LANES, whole = m.K / DEPTH;
    if (lanes < LANES || whole < m.steps) memset(panel, 0, m.steps * LANES * DEPTH);
    const uint32_t shift = 0x01010101u * (uint32_t)m.offset;
    for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint8_t* source = m.columns + (c0 + lane) * m.K;
        for (int64_t step = 0; step < whole; ++step) {
            uint32_t four;
            memcpy(&four, source + step * DEPTH, 4);
            if (m.offset < ANY_INT8)
                four = ((four & 0x7F7F7F7Fu) + shift) ^ (four & 0x80808080u);  // four byte sums, no carry between
            else
                four ^= 0x80808080u;
            memcpy(panel + (step * LANES + lane) * DEPTH, &four, 4);
        }
        for (int64_t k = whole * DEPTH; k < m.K; ++k)
            panel[(whole * LANES + lane) * DEPTH + k % DEPTH] = (uint8_t)(source[k] + m.offset);
    }
}

// Columns c0 .. c0 + 15 of a (K, C) matrix.
void panel_from_columns(const Matmul& m, int64_t c0, uint8_t* panel) {
    const int64_t lanes = m.C - c0 < LANES ? m.C - c0 : LANES;
    const __m128i offset = _mm_set1_epi8((char)m.offset);
    for (int64_t step = 0; step < m.steps; ++step) {
        __m128i four[DEPTH];
        for (int j = 0; j < DEPTH; ++j) {
            const int64_t k = step * DEPTH + j;
            alignas(16) uint8_t edge[LANES] = {};
            const uint8_t* source = m.columns + k * m.C + c0;
            if (k >= m.K) {
                four[j] = _mm_setzero_si128();
                continue;
            }
            if (lanes < LANES) memcpy(edge, source, lanes);
            const void* sixteen = lanes < LANES ? edge : source;
            four[j] = _mm_add_epi8(_mm_loadu_si128((const __m128i*)sixteen), offset);
        }
        const __m128i low01 = _mm_unpacklo_epi8(four[0], four[1]), high01 = _mm_unpackhi_epi8(four[0], four[1]);
        const __m128i low23 = _mm_unpacklo_epi8(four[2], four[3]), high23 = _mm_unpackhi_epi8(four[2], four[3]);
        __m128i* out = (__m128i*)(panel + step * LANES * DEPTH);
        _mm_storeu_si128(out + 0, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
    }
}

// Columns c0 .. c0 + 15 of the decode layout: 64 bytes hold 16 columns x 16 depths, two bits each, or x 8 depths of
// four.
template <int BITS>
inline __attribute__((always_inline)) void panel_from_bits(const Matmul& m, int64_t c0, uint8_t* panel) {
    constexpr int PLACES = 8 / BITS;
    constexpr uint64_t MASK = 0x0101010101010101u * ((1 << BITS) - 1);
    const uint64_t* source = (const uint64_t*)(m.columns + c0 * m.steps * BITS / 2);
    uint64_t* out = (uint64_t*)panel;
    for (int64_t vector = 0; vector < m.steps / PLACES; ++vector, source += 8, out += 8 * PLACES)
        for (int word = 0; word < 8; ++word)
            for (int part = 0; part < PLACES; ++part) out[part * 8 + word] = source[word] >> (BITS * part) & MASK;
}

ARB_CLONES void panel_from_layout(const Matmul& m, int64_t c0, uint8_t* panel) {
    if (m.bits == 2) return panel_from_bits<2>(m, c0, panel);
    panel_from_bits<4>(m, c0, panel);
}

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))

// Columns c0 .. c0 + 15 of a (K, C) matrix as (steps, 16, 2) 16-bit numbers.
AVX2 void widen_columns(const Matmul& m, int64_t c0, __m256i* words) {
    const int64_t lanes = m.C - c0 < LANES ? m.C - c0 : LANES;
    for (int64_t step = 0; step < m.steps; ++step) {
        alignas(16) int8_t edge[WORDS][LANES] = {};
        __m128i depth[WORDS];
        for (int64_t j = 0; j < WORDS; ++j) {
            const int64_t k = step * WORDS + j;
            const uint8_t* source = m.columns + k * m.C + c0;
            if (k < m.K && lanes < LANES) memcpy(edge[j], source, lanes);
            depth[j] = _mm_loadu_si128((const __m128i*)(k < m.K && lanes == LANES ? source : (uint8_t*)edge[j]));
        }
        _mm256_store_si256(words + 2 * step, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(depth[0], depth[1])));
        _mm256_store_si256(words + 2 * step + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(depth[0], depth[1])));
    }
}

void fill_panel(const Matmul& m, int64_t c0, uint8_t* panel) {
    if (c0 >= m.C) return;
    const int8_t* first = (const int8_t*)m.columns + c0 * m.K;
    if (m.wide && m.source == TRANSPOSED) return widen_columns(m, c0, (__m256i*)panel);
    if (m.wide) return widen_rows(first, std::min(LANES, m.C - c0), LANES, m.K, (int32_t*)panel);
    if (m.source == ROW_MAJOR) panel_from_rows(m, c0, panel);
    if (m.source == TRANSPOSED) panel_from_columns(m, c0, panel);
    if (m.source == LAYOUT) panel_from_layout(m, c0, panel);
}

AVX512 inline void store_lanes(const Matmul& m, int64_t r, int64_t c, __m512i sum, int32_t row_sum) {
    const __mmask16 mask = m.C - c >= LANES ? 0xFFFF : (__mmask16)((1u << (m.C - c)) - 1);
    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(m.offset * row_sum));
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(m.row_scale[r]));
    if (m.column_scale) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, m.column_scale + c));
    _mm512_mask_storeu_ps(m.out + r * m.C + c, mask, value);
}

// sum += panel * x in place; the compiler's own intrinsic copies and spills the 24 sums
AVX512 inline __attribute__((always_inline)) void dot(__m512i& sum, __m512i panel, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(panel), "v"(x));
}

template <int ROWS>
AVX512 void tile_avx512(const Matmul& m, int64_t r, int64_t c, const int8_t* rows, const uint8_t* left,
                        const uint8_t* right, const int32_t* row_sums) {
    __m512i left_sums[ROWS], right_sums[ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) left_sums[i] = right_sums[i] = _mm512_setzero_si512();
    for (int64_t step = 0; step < m.steps; ++step) {
        const __m512i w0 = _mm512_load_si512(left + step * LANES * DEPTH);
        const __m512i w1 = _mm512_load_si512(right + step * LANES * DEPTH);
        _mm_prefetch(left + step * LANES * DEPTH + PREFETCH, _MM_HINT_T0);
        _mm_prefetch(right + step * LANES * DEPTH + PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            int32_t four;
            memcpy(&four, rows + (step * TILE_ROWS + i) * DEPTH, 4);
            const __m512i x = _mm512_set1_epi32(four);
            dot(left_sums[i], w0, x);
            dot(right_sums[i], w1, x);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        store_lanes(m, r + i, c, left_sums[i], row_sums[r + i]);
        if (c + LANES < m.C) store_lanes(m, r + i, c + LANES, right_sums[i], row_sums[r + i]);
    }
}

AVX2 inline void store_half(const Matmul& m, int64_t r, int64_t c, __m256i sum, int32_t row_sum) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, sum);
    for (int64_t i = 0; i < 8 && c + i < m.C; ++i) {
        float value = (float)(lanes[i] - m.offset * row_sum) * m.row_scale[r];
        if (m.column_scale) value *= m.column_scale[c + i];
        m.out[r * m.C + c + i] = value;
    }
}

// sum += panel * x, eight columns and one step
template <bool WIDE>
AVX2 inline __attribute__((always_inline)) __m256i add_dot(__m256i sum, __m256i panel, __m256i x) {
    if (WIDE) return _mm256_add_epi32(sum, _mm256_madd_epi16(panel, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(panel, x), _mm256_set1_epi16(1)));
}

template <bool WIDE, int ROWS>
AVX2 void tile_avx2(const Matmul& m, int64_t r, int64_t c, const int8_t* rows, const uint8_t* panel,
                    const int32_t* row_sums) {
    __m256i sums[ROWS][2];
    for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (int64_t step = 0; step < m.steps; ++step) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)(panel + step * LANES * DEPTH));
        const __m256i w1 = _mm256_loadu_si256((const __m256i*)(panel + step * LANES * DEPTH + 32));
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            int32_t four;
            memcpy(&four, rows + (step * TILE_ROWS + i) * DEPTH, 4);
            const __m256i x = _mm256_set1_epi32(four);
            sums[i][0] = add_dot<WIDE>(sums[i][0], w0, x);
            sums[i][1] = add_dot<WIDE>(sums[i][1], w1, x);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int half = 0; half < 2; ++half) store_half(m, r + i, c + 8 * half, sums[i][half], row_sums[r + i]);
}

// The last tile may have fewer rows than the others.
template <int ROWS>
void tile_of(int64_t count, const Matmul& m, int64_t r, int64_t c, const int8_t* rows, const uint8_t* left,
             const uint8_t* right, const int32_t* row_sums) {
    if constexpr (ROWS > 0) {
        if (count == ROWS) return tile_avx512<ROWS>(m, r, c, rows, left, right, row_sums);
        tile_of<ROWS - 1>(count, m, r, c, rows, left, right, row_sums);
    }
}

template <bool WIDE>
void tile_of_avx2(int64_t count, const Matmul& m, int64_t r, int64_t c, const int8_t* rows, const uint8_t* panel,
                  const int32_t* row_sums) {
    if (c >= m.C) return;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) tile_avx2<WIDE, 4>(m, r + i, c, rows + i * DEPTH, panel, row_sums);
    for (; i < count; ++i) tile_avx2<WIDE, 1>(m, r + i, c, rows + i * DEPTH, panel, row_sums);
}

struct Free {
    void operator()(void* memory) const { free(memory); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer allocate(int64_t bytes) { return Buffer((uint8_t*)aligned_alloc(64, (bytes + 63) / 64 * 64)); }

void multiply(const Matmul& m, int isa) {
    const int64_t tiles = (m.R + TILE_ROWS - 1) / TILE_ROWS, panels = (m.C + PANEL - 1) / PANEL;
    const int64_t tile_bytes = m.steps * TILE_ROWS * DEPTH, panel_bytes = m.steps * LANES * DEPTH;
    const int64_t chunks = (tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
    const Buffer rows = allocate(tiles * tile_bytes);
    std::vector<int32_t> row_sums(m.R);
#pragma omp parallel if (m.R * m.C * m.K >= (1 << 20))
    {
        const Buffer panel = allocate(2 * panel_bytes);
        uint8_t *left = panel.get(), *right = left + panel_bytes;
#pragma omp for
        for (int64_t tile = 0; tile < tiles; ++tile)
            pack_rows(m, tile * TILE_ROWS, (int8_t*)rows.get() + tile * tile_bytes, row_sums.data());
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * chunks; ++task) {
            const int64_t c = task % panels * PANEL, first = task / panels * TILES_PER_TASK;
            fill_panel(m, c, left);
            fill_panel(m, c + LANES, right);
            for (int64_t tile = first; tile < tiles && tile < first + TILES_PER_TASK; ++tile) {
                const int64_t r = tile * TILE_ROWS, count = m.R - r < TILE_ROWS ? m.R - r : TILE_ROWS;
                const int8_t* packed = (int8_t*)rows.get() + tile * tile_bytes;
                if (isa == AVX512_VNNI) {
                    tile_of<TILE_ROWS>(count, m, r, c, packed, left, right, row_sums.data());
                    continue;
                }
                const auto avx2_tile = m.wide ? tile_of_avx2<true> : tile_of_avx2<false>;
                avx2_tile(count, m, r, c, packed, left, row_sums.data());
                avx2_tile(count, m, r, c + LANES, packed, right, row_sums.data());
            }
        }
    }
}

}  // namespace

// AVX512_VNNI, AVX2_ONLY, or 0: neither, and no matmul here.
ARB_API int arb_instruction_set() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512_VNNI;
    return __builtin_cpu_supports("avx2") ? AVX2_ONLY : 0;
}

// columns: int8 (C, K), or (K, C) if `transposed`; offset: the largest magnitude in them, ANY_INT8 for any int8.
// column_scale may be null.
ARB_API void arb_int8_matmul(int isa, const int8_t* rows, const int8_t* columns, int transposed, int offset, int64_t R,
                             int64_t C, int64_t K, const float* row_scale, const float* column_scale, float* out) {
    const Source source = transposed ? TRANSPOSED : ROW_MAJOR;
    const bool wide = isa == AVX2_ONLY && offset == ANY_INT8;
    const int64_t depths = wide ? WORDS : DEPTH, steps = (K + depths - 1) / depths;
    const uint8_t* bytes = (const uint8_t*)columns;
    multiply({rows, bytes, source, R, C, K, steps, wide ? 0 : offset, 0, wide, row_scale, column_scale, out}, isa);
}

// codes int8 (M, K) against the decode layout of N weight rows (decode_layout.py), trits 1 or 2.
ARB_API void arb_layout_matmul(int isa, int trits, const int8_t* codes, const uint8_t* layout, int64_t M, int64_t N,
                               int64_t K, const float* token_scale, const float* row_scale, float* out) {
    const int64_t steps = (K + 15) / 16 * 4;
    const int offset = largest_level(trits), bits = 2 * trits;
    multiply({codes, layout, LAYOUT, M, N, K, steps, offset, bits, false, token_scale, row_scale, out}, isa);
}

// The same for at most MATVEC_ROWS tokens, from float activations: one call a layer, as generation makes thousands.
ARB_API void arb_layout_matvec(int isa, int trits, const float* values, const uint8_t* layout, int64_t M, int64_t N,
                               int64_t K, const float* row_scale, float* out) {
    const int64_t chunks = (K + 15) / 16;
    const Buffer codes = allocate(M * chunks * 16);
    int32_t sums[MATVEC_ROWS];
    float token_scale[MATVEC_ROWS];
    for (int64_t m = 0; m < M; ++m) {
        int8_t* row = (int8_t*)codes.get() + m * chunks * 16;
        token_scale[m] = quantise_row(values + m * K, K, row);
        memset(row + K, 0, chunks * 16 - K);
        sums[m] = sum_row(row, K);
    }
    layout_matvec(isa, trits, (int8_t*)codes.get(), layout, M, N, chunks, sums, token_scale, row_scale, out);
}
#else
ARB_API int arb_instruction_set() { return 0; }
#endif
