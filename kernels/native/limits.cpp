// What this machine can do at best, for the benches to measure themselves against.
#include "common.h"

#ifdef ARB_X86
#include <immintrin.h>

// Reads `bytes` (a multiple of 512) once with all threads; returns a checksum so that nothing is optimised away.
__attribute__((target("avx2"))) static int64_t read_range(const uint8_t* data, int64_t bytes) {
    __m256i sum[4] = {};
    for (int64_t i = 0; i < bytes; i += 128)
        for (int j = 0; j < 4; ++j)
            sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256((const __m256i*)(data + i + 32 * j)));
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    return _mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^ _mm256_extract_epi64(all, 2) ^
           _mm256_extract_epi64(all, 3);
}

ARB_API int64_t arb_read_memory(const uint8_t* data, int64_t bytes) {
    constexpr int64_t PIECE = 1 << 20;
    int64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(^ : sum)
    for (int64_t start = 0; start < bytes; start += PIECE)
        sum ^= read_range(data + start, bytes - start < PIECE ? bytes - start : PIECE);
    return sum;
}

__attribute__((target("avx512f,avx512vnni"))) static int32_t multiply_avx512(int64_t rounds) {
    __m512i sum[16];
    const __m512i x = _mm512_set1_epi32(0x01020301);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(x));
#pragma GCC unroll 16
    for (int i = 1; i < 16; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    return _mm512_reduce_add_epi32(sum[0]);
}

__attribute__((target("avx2"))) static int32_t multiply_avx2(int64_t rounds) {
    __m256i sum[8];
    __m256i x = _mm256_set1_epi32(0x01020301);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            asm volatile("" : "+x"(x));
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
        }
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) sum[0] = _mm256_add_epi32(sum[0], sum[i]);
    return _mm256_extract_epi32(sum[0], 0);
}

// Int8 multiplies and adds from registers on every thread: `rounds` x 16 vectors (AVX-512) or x 8 (AVX2) each. Returns
// the operations done, one multiply or one add being one.
ARB_API int64_t arb_multiply_registers(int isa, int64_t rounds) {
    int64_t operations = 0;
    int32_t sum = 0;
#pragma omp parallel reduction(+ : operations) reduction(^ : sum)
    {
        sum ^= isa == AVX512_VNNI ? multiply_avx512(rounds) : multiply_avx2(rounds);
        operations += rounds * (isa == AVX512_VNNI ? 16 * 64 : 8 * 32) * 2;
    }
    return sum == 1 ? operations + 1 : operations;
}
#endif
