#include "matvec.h"

#ifdef ARB_X86
#include <immintrin.h>

namespace {

constexpr int64_t LANES = two_bit_layout::ROWS, CHUNK = 4 * LANES;  // rows of a chunk, and its bytes
constexpr int64_t PREFETCH = 4096;  // bytes ahead: the hardware's own prefetch stops at the end of a page

// Codes are masked where they lie, so that a sum is PLACE times too large, and shifted back once at the end: shifts and
// multiplies share two of the four vector pipes. Two or four sums a row, so that no multiply waits for the one before.
template <int ROWS>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void block_avx512(const int8_t* rows, int64_t stride,
                                                                                   const uint8_t* layout,
                                                                                   int64_t chunks, int32_t* sums) {
    constexpr int PLACES = ROWS <= 4 ? 4 : 2;  // registers: ROWS x PLACES sums
    __m512i sum[ROWS][PLACES];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < PLACES; ++j) sum[i][j] = _mm512_setzero_si512();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        _mm_prefetch(layout + chunk * CHUNK + PREFETCH, _MM_HINT_T0);
        const __m512i codes = _mm512_loadu_si512(layout + chunk * CHUNK);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512i shifted = j < PLACES ? codes : _mm512_srli_epi16(codes, 4);
            const __m512i depth = _mm512_and_si512(shifted, _mm512_set1_epi8(3 << 2 * (j % PLACES)));
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                int32_t four;
                memcpy(&four, rows + i * stride + chunk * LANES + 4 * j, 4);
                const __m512i x = _mm512_set1_epi32(four);
                asm("vpdpbusd %2, %1, %0" : "+v"(sum[i][j % PLACES]) : "v"(depth), "v"(x));
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        __m512i all = sum[i][0];
        for (int j = 1; j < PLACES; ++j) all = _mm512_add_epi32(all, _mm512_srai_epi32(sum[i][j], 2 * j));
        _mm512_storeu_si512(sums + i * LANES, all);
    }
}

template <int ROWS>
__attribute__((target("avx2"))) void block_avx2(const int8_t* rows, int64_t stride, const uint8_t* layout,
                                                int64_t chunks, int32_t* sums) {
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half) {
        __m256i sum[ROWS];
        for (int i = 0; i < ROWS; ++i) sum[i] = _mm256_setzero_si256();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            __m256i codes = _mm256_loadu_si256((const __m256i*)(layout + chunk * CHUNK + 32 * half));
            for (int j = 0; j < 4; ++j, codes = _mm256_srli_epi16(codes, 2)) {
                const __m256i depth = _mm256_and_si256(codes, mask);
                for (int i = 0; i < ROWS; ++i) {
                    int32_t four;
                    memcpy(&four, rows + i * stride + chunk * LANES + 4 * j, 4);
                    const __m256i pairs = _mm256_maddubs_epi16(depth, _mm256_set1_epi32(four));
                    sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int i = 0; i < ROWS; ++i) _mm256_storeu_si256((__m256i*)(sums + i * LANES + 8 * half), sum[i]);
    }
}

template <int ROWS>
void block(int64_t count, int isa, const int8_t* rows, int64_t stride, const uint8_t* layout, int64_t chunks,
           int32_t* sums) {
    if constexpr (ROWS > 0) {
        if (count < ROWS) return block<ROWS - 1>(count, isa, rows, stride, layout, chunks, sums);
        if (isa == AVX512_VNNI) return block_avx512<ROWS>(rows, stride, layout, chunks, sums);
        block_avx2<ROWS>(rows, stride, layout, chunks, sums);
    }
}

}  // namespace

void two_bit_matvec(int isa, const int8_t* rows, const uint8_t* layout, int64_t R, int64_t C, int64_t chunks,
                    const int32_t* row_sums, const float* row_scale, const float* column_scale, float* out) {
    const int64_t blocks = (C + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) if (C * chunks >= (1 << 13))
    for (int64_t b = 0; b < blocks; ++b) {
        int32_t sums[MATVEC_ROWS * LANES];
        block<MATVEC_ROWS>(R, isa, rows, chunks * LANES, layout + b * chunks * CHUNK, chunks, sums);
        for (int64_t i = 0; i < R; ++i)
            for (int64_t lane = 0; lane < LANES && b * LANES + lane < C; ++lane) {
                const int64_t c = b * LANES + lane;
                out[i * C + c] = (float)(sums[i * LANES + lane] - row_sums[i]) * row_scale[i] * column_scale[c];
            }
    }
}
#endif
