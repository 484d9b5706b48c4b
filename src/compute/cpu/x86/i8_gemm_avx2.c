#if defined(__x86_64__)
/* Elements widened to 16 bits: VPMADDWD multiplies and adds pairs exactly, twice as many a cycle as
 * floats. (VPMADDUBSW takes bytes, but its sums of two saturate; what makes it exact costs as many
 * instructions.) */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/vec_avx2.inc"

#define MR 6
#define UNIT 2
#define STARTS false

typedef __m256i vi;
ALWAYS vi vi_zero(void) {
    return _mm256_setzero_si256();
}
ALWAYS vi vi_load(const void *p) {
    return _mm256_loadu_si256(p);
}
ALWAYS void vi_store(void *p, vi v) {
    _mm256_storeu_si256(p, v);
}
ALWAYS vi vi_bcast(const void *p) {
    return _mm256_castps_si256(vf_bcast(p));
}
ALWAYS vi vi_mac(vi s, vi a, vi b) {
    s = _mm256_add_epi32(s, _mm256_madd_epi16(a, b));
    /* Kept in this order: GCC 12 gathers the products first and spills the sums, 2.5 times slower.
     */
    __asm__ volatile("" : "+x"(s));
    return s;
}
ALWAYS vf vi_to_f32(vi v) {
    return _mm256_cvtepi32_ps(v);
}
ALWAYS vi vi_max(vi a, vi b) {
    return _mm256_max_epi32(a, b);
}
ALWAYS vi vi_abs_bits(vf v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
/* A vector of rounded values as elements i .. i + VW - 1. */
ALWAYS void put_elements(unsigned char *dst, int64_t i, vf v, const bool left) {
    (void)left;
    __m256i q = _mm256_cvtps_epi32(v);
    _mm_storeu_si128((__m128i *)(void *)(dst + 2 * i),
                     _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
}
ALWAYS void put_bytes(unsigned char *dst, const unsigned char *w, int64_t k) {
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        _mm_storeu_si128(
            (__m128i *)(void *)(dst + 2 * i),
            _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)(w + i))));
    if (i < k) {
        unsigned char part[8] = {0};
        memcpy(part, w + i, (size_t)(k - i));
        _mm_storeu_si128((__m128i *)(void *)(dst + 2 * i),
                         _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)part)));
    }
}
#include "compute/cpu/x86/i8_gemm.inc"

const qie_i8_gemm qie_i8_gemm_avx2 = {
    .mr = MR,
    .vw = VW,
    .unit = UNIT,
    .step_multiple = 1,
    .tile = I8_TILE_TABLE,
    .row_a = i8_row_a_avx2,
    .row_b = i8_row_b_avx2,
};
#else
typedef int qie_empty_translation_unit;
#endif
