#if defined(__x86_64__)
/* VPDPBUSD: four bytes a unit. It wants one side without sign: A is stored with 128 added, and the
 * sums of a column start at -128 times the sum of its elements. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/vec_avx512.inc"

#define MR 14
#define UNIT 4
#define STARTS true
#include "compute/cpu/x86/vi_avx512.inc"

ALWAYS vi vi_mac(vi s, vi a, vi b) {
    s = _mm512_dpbusd_epi32(s, a, b);
    vi_keep(&s);
    return s;
}
/* A vector of rounded values as elements i .. i + VW - 1. */
ALWAYS void put_elements(unsigned char *dst, int64_t i, vf v, const bool left) {
    __m128i q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v));
    if (left)
        q = _mm_xor_si128(q, _mm_set1_epi8((char)0x80));
    _mm_storeu_si128((__m128i *)(void *)(dst + i), q);
}
ALWAYS void put_bytes(unsigned char *dst, const unsigned char *w, int64_t k) {
    for (int64_t i = 0; i < k; i += 16)
        _mm_storeu_si128((__m128i *)(void *)(dst + i), load_bytes(w + i, k - i));
}
#include "compute/cpu/x86/i8_gemm.inc"

static void i8_starts_avx512bf16(int32_t *start, const void *units, int vectors, int64_t groups,
                                 int64_t steps) {
    const unsigned char *b = units;
    const vi offset = _mm512_set1_epi32((int32_t)0x80808080);
    for (int64_t g = 0; g < groups; g++, b += steps * vectors * VW * 4)
        for (int j = 0; j < vectors; j++, start += VW) {
            vi sum = vi_zero();
            for (int64_t i = 0; i < steps; i++)
                sum = _mm512_dpbusd_epi32(sum, offset, vi_load(b + (i * vectors + j) * VW * 4));
            vi_store(start, sum);
            for (int i = 0; i < VW; i++)
                start[i] = -start[i];
        }
}

const qie_i8_gemm qie_i8_gemm_avx512bf16 = {
    .mr = MR,
    .vw = VW,
    .unit = UNIT,
    .step_multiple = 1,
    .tile = I8_TILE_TABLE,
    .row_a = i8_row_a_avx512bf16,
    .row_b = i8_row_b_avx512bf16,
    .starts = i8_starts_avx512bf16,
};
#else
typedef int qie_empty_translation_unit;
#endif
