#include "matvec.h"

#include "trits.h"

#ifdef ARB_X86
#include <immintrin.h>

namespace {

constexpr int64_t LANES = decode_layout::ROWS, VECTOR = decode_layout::VECTOR;  // rows of a chunk, bytes of a vector
constexpr int PARTS = decode_layout::PARTS;  // a chunk's columns in fours
constexpr int64_t PREFETCH = 4096;  // bytes ahead: the hardware's own prefetch stops at the end of a page

// Codes are masked where they lie, so that a sum is up to 2^6 times too large, and shifted back once at the end: shifts
// and multiplies share two of the four vector pipes. Two or four sums a row, so that no multiply waits for the one
// before.
template <int ROWS, int BITS>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void block_avx512(const int8_t* rows, int64_t stride,
                                                                                   const uint8_t* layout,
                                                                                   int64_t chunks, int32_t* sums) {
    constexpr int SUMS = ROWS <= 4 ? 4 : 2;  // registers: ROWS x SUMS
    constexpr int PLACES = 8 / BITS, UNSHIFTED = SUMS < PLACES ? SUMS : PLACES;
    __m512i sum[ROWS][SUMS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < SUMS; ++j) sum[i][j] = _mm512_setzero_si512();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint8_t* bytes = layout + chunk * VECTOR * BITS / 2;
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            const uint8_t* vector = bytes + part / PLACES * VECTOR;
            if (part % PLACES == 0) _mm_prefetch(vector + PREFETCH, _MM_HINT_T0);
            const __m512i codes = _mm512_loadu_si512(vector);
            const int place = part % PLACES;
            const __m512i shifted = place < UNSHIFTED ? codes : _mm512_srli_epi16(codes, UNSHIFTED * BITS);
            const __m512i mask = _mm512_set1_epi8((char)(((1 << BITS) - 1) << BITS * (place % UNSHIFTED)));
            const __m512i depth = _mm512_and_si512(shifted, mask);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                int32_t four;
                memcpy(&four, rows + i * stride + chunk * LANES + 4 * part, 4);
                const __m512i x = _mm512_set1_epi32(four);
                asm("vpdpbusd %2, %1, %0" : "+v"(sum[i][part % SUMS]) : "v"(depth), "v"(x));
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        __m512i all = sum[i][0];
        for (int j = 1; j < SUMS; ++j)
            all = _mm512_add_epi32(all, _mm512_srai_epi32(sum[i][j], BITS * (j % UNSHIFTED)));
        _mm512_storeu_si512(sums + i * LANES, all);
    }
}

template <int ROWS, int BITS>
__attribute__((target("avx2"))) void block_avx2(const int8_t* rows, int64_t stride, const uint8_t* layout,
                                                int64_t chunks, int32_t* sums) {
    constexpr int PLACES = 8 / BITS;
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half) {
        __m256i sum[ROWS];
        for (int i = 0; i < ROWS; ++i) sum[i] = _mm256_setzero_si256();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const uint8_t* bytes = layout + chunk * VECTOR * BITS / 2 + 32 * half;
            for (int part = 0; part < PARTS; ++part) {
                const __m256i codes = _mm256_loadu_si256((const __m256i*)(bytes + part / PLACES * VECTOR));
                const __m256i depth = _mm256_and_si256(_mm256_srli_epi16(codes, BITS * (part % PLACES)), mask);
                for (int i = 0; i < ROWS; ++i) {
                    int32_t four;
                    memcpy(&four, rows + i * stride + chunk * LANES + 4 * part, 4);
                    const __m256i pairs = _mm256_maddubs_epi16(depth, _mm256_set1_epi32(four));
                    sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int i = 0; i < ROWS; ++i) _mm256_storeu_si256((__m256i*)(sums + i * LANES + 8 * half), sum[i]);
    }
}

template <int ROWS, int BITS>
void block(int64_t count, int isa, const int8_t* rows, int64_t stride, const uint8_t* layout, int64_t chunks,
           int32_t* sums) {
    if constexpr (ROWS > 0) {
        if (count < ROWS) return block<ROWS - 1, BITS>(count, isa, rows, stride, layout, chunks, sums);
        if (isa == AVX512_VNNI) return block_avx512<ROWS, BITS>(rows, stride, layout, chunks, sums);
        block_avx2<ROWS, BITS>(rows, stride, layout, chunks, sums);
    }
}

}  // namespace

void layout_matvec(int isa, int trits, const int8_t* rows, const uint8_t* layout, int64_t R, int64_t C, int64_t chunks,
                   const int32_t* row_sums, const float* row_scale, const float* column_scale, float* out) {
    const int64_t blocks = (C + LANES - 1) / LANES, block_bytes = chunks * VECTOR * trits;
    const auto multiply = trits == 1 ? block<MATVEC_ROWS, 2> : block<MATVEC_ROWS, 4>;
#pragma omp parallel for schedule(static) if (C * chunks >= (1 << 13))
    for (int64_t b = 0; b < blocks; ++b) {
        int32_t sums[MATVEC_ROWS * LANES];
        multiply(R, isa, rows, chunks * LANES, layout + b * block_bytes, chunks, sums);
        for (int64_t i = 0; i < R; ++i)
            for (int64_t lane = 0; lane < LANES && b * LANES + lane < C; ++lane) {
                const int64_t c = b * LANES + lane;
                const int32_t sum = sums[i * LANES + lane] - largest_level(trits) * row_sums[i];
                out[i * C + c] = (float)sum * row_scale[i] * column_scale[c];
            }
    }
}
#endif
