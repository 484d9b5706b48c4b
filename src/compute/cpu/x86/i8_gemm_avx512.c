#if defined(__x86_64__)
/* As i8_gemm_avx2.c, for processors without VNNI. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/vec_avx512.inc"

#define MR 14
#define UNIT 2
#define STARTS false
#include "compute/cpu/x86/vi_avx512.inc"

ALWAYS vi vi_mac(vi s, vi a, vi b) {
    s = _mm512_add_epi32(s, _mm512_madd_epi16(a, b));
    vi_keep(&s);
    return s;
}
/* A vector of rounded values as elements i .. i + VW - 1. */
ALWAYS void put_elements(unsigned char *dst, int64_t i, vf v, const bool left) {
    (void)left;
    _mm256_storeu_si256((__m256i *)(void *)(dst + 2 * i),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
ALWAYS void put_bytes(unsigned char *dst, const unsigned char *w, int64_t k) {
    for (int64_t i = 0; i < k; i += 16)
        _mm256_storeu_si256((__m256i *)(void *)(dst + 2 * i),
                            _mm256_cvtepi8_epi16(load_bytes(w + i, k - i)));
}
#include "compute/cpu/x86/i8_gemm.inc"

const qie_i8_gemm qie_i8_gemm_avx512 = {
    .mr = MR,
    .vw = VW,
    .unit = UNIT,
    .step_multiple = 1,
    .tile = I8_TILE_TABLE,
    .row_a = i8_row_a_avx512,
    .row_b = i8_row_b_avx512,
};
#else
typedef int qie_empty_translation_unit;
#endif
