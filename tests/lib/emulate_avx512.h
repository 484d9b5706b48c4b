/* The AVX-512 instructions that src/compute/cpu/x86 uses, written with the compiler's vector types,
 * so that the kernels of every level are tested on processors that lack them. Included before the
 * first line of a kernel file (-include); with QIE_EMULATE_BF16 also for the bf16 level.
 *
 * A masked load or store touches only the lanes of its mask, as on the processor: tests place
 * operands against guard pages. Rounding follows the instructions; where the processor treats
 * denormal bf16 inputs as zero, so does this. */
#ifndef EMULATE_AVX512_H
#define EMULATE_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef QIE_EMULATE_BF16
#define __AVX512BF16__ 1
#endif

#define EMU static inline __attribute__((always_inline, unused))
#define EMU_LANES(n) _Pragma("GCC unroll 1") for (int i = 0; i < (n); i++)

typedef float emu_f __attribute__((vector_size(64), may_alias));
typedef int32_t emu_i __attribute__((vector_size(64), may_alias));
typedef uint32_t emu_u __attribute__((vector_size(64), may_alias));

/* ---- memory */
EMU __m512 emu_loadu_ps(const void *p) {
    __m512 v;
    memcpy(&v, p, 64);
    return v;
}
EMU void emu_storeu_ps(void *p, __m512 v) {
    memcpy(p, &v, 64);
}
EMU __m512i emu_loadu_si512(const void *p) {
    __m512i v;
    memcpy(&v, p, 64);
    return v;
}
EMU void emu_storeu_si512(void *p, __m512i v) {
    memcpy(p, &v, 64);
}
EMU void emu_masked(void *dst, const void *src, uint64_t mask, size_t size, int n) {
    for (int i = 0; i < n; i++)
        if (mask >> i & 1)
            memcpy((char *)dst + (size_t)i * size, (const char *)src + (size_t)i * size, size);
}
EMU __m512 emu_maskz_loadu_ps(__mmask16 m, const void *p) {
    __m512 v = {0};
    emu_masked(&v, p, m, 4, 16);
    return v;
}
EMU void emu_mask_storeu_ps(void *p, __mmask16 m, __m512 v) {
    emu_masked(p, &v, m, 4, 16);
}
EMU __m512i emu_maskz_loadu_epi16(__mmask32 m, const void *p) {
    __m512i v = {0};
    emu_masked(&v, p, m, 2, 32);
    return v;
}
EMU __m512i emu_maskz_loadu_epi8(__mmask64 m, const void *p) {
    __m512i v = {0};
    emu_masked(&v, p, m, 1, 64);
    return v;
}
EMU void emu_mask_storeu_epi32(void *p, __mmask16 m, __m512i v) {
    emu_masked(p, &v, m, 4, 16);
}
EMU __m256i emu_256_maskz_loadu_epi16(__mmask16 m, const void *p) {
    __m256i v = {0};
    emu_masked(&v, p, m, 2, 16);
    return v;
}
EMU void emu_256_mask_storeu_epi16(void *p, __mmask16 m, __m256i v) {
    emu_masked(p, &v, m, 2, 16);
}

/* ---- constants, casts */
EMU __m512 emu_set1_ps(float x) {
    return (__m512)(emu_f){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
EMU __m512 emu_setzero_ps(void) {
    return (__m512){0};
}
EMU __m512i emu_set1_epi32(int x) {
    emu_i v = {0};
    return (__m512i)(v + x);
}
#define emu_setr_epi32(...) ((__m512i)(emu_i){__VA_ARGS__})
EMU __m512i emu_set_epi16(short a0, short a1, short a2, short a3, short a4, short a5, short a6,
                          short a7, short a8, short a9, short a10, short a11, short a12, short a13,
                          short a14, short a15, short a16, short a17, short a18, short a19,
                          short a20, short a21, short a22, short a23, short a24, short a25,
                          short a26, short a27, short a28, short a29, short a30, short a31) {
    const short v[32] = {a31, a30, a29, a28, a27, a26, a25, a24, a23, a22, a21,
                         a20, a19, a18, a17, a16, a15, a14, a13, a12, a11, a10,
                         a9,  a8,  a7,  a6,  a5,  a4,  a3,  a2,  a1,  a0};
    return emu_loadu_si512(v);
}
#define emu_castps_si512(v) ((__m512i)(v))
#define emu_castsi512_ps(v) ((__m512)(v))
#define emu_castps_pd(v) ((__m512d)(v))
#define emu_castpd_ps(v) ((__m512)(v))
EMU __m256 emu_castps512_ps256(__m512 v) {
    __m256 r;
    memcpy(&r, &v, 32);
    return r;
}
EMU __m256 emu_extractf32x8_ps(__m512 v, int half) {
    __m256 r;
    memcpy(&r, (const char *)&v + 32 * half, 32);
    return r;
}

/* ---- arithmetic in float */
#define emu_add_ps(a, b) ((__m512)((emu_f)(a) + (emu_f)(b)))
#define emu_sub_ps(a, b) ((__m512)((emu_f)(a) - (emu_f)(b)))
#define emu_mul_ps(a, b) ((__m512)((emu_f)(a) * (emu_f)(b)))
#define emu_div_ps(a, b) ((__m512)((emu_f)(a) / (emu_f)(b)))
typedef struct emu_halves {
    __m256 h[2];
} emu_halves;
EMU emu_halves emu_split(__m512 v) {
    emu_halves r;
    memcpy(&r, &v, 64);
    return r;
}
EMU __m512 emu_join(__m256 a, __m256 b) {
    emu_halves r = {{a, b}};
    __m512 v;
    memcpy(&v, &r, 64);
    return v;
}
#define EMU_HALVES_1(name, op)                   \
    EMU __m512 name(__m512 a) {                  \
        emu_halves x = emu_split(a);             \
        return emu_join(op(x.h[0]), op(x.h[1])); \
    }
#define EMU_HALVES_2(name, op)                                   \
    EMU __m512 name(__m512 a, __m512 b) {                        \
        emu_halves x = emu_split(a), y = emu_split(b);           \
        return emu_join(op(x.h[0], y.h[0]), op(x.h[1], y.h[1])); \
    }
#define EMU_HALVES_3(name, op)                                                   \
    EMU __m512 name(__m512 a, __m512 b, __m512 c) {                              \
        emu_halves x = emu_split(a), y = emu_split(b), z = emu_split(c);         \
        return emu_join(op(x.h[0], y.h[0], z.h[0]), op(x.h[1], y.h[1], z.h[1])); \
    }
EMU_HALVES_1(emu_sqrt_ps, _mm256_sqrt_ps)
EMU_HALVES_2(emu_max_ps, _mm256_max_ps)
EMU_HALVES_2(emu_min_ps, _mm256_min_ps)
EMU_HALVES_3(emu_fmadd_ps, _mm256_fmadd_ps)
EMU_HALVES_3(emu_fnmadd_ps, _mm256_fnmadd_ps)
EMU __m512 emu_roundscale_ps(__m512 a, int how) {
    (void)how; /* to nearest, no scale: all that is used */
    emu_halves x = emu_split(a);
    return emu_join(_mm256_round_ps(x.h[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(x.h[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EMU __m512 emu_scalef_ps(__m512 a, __m512 n) {
    float x[16], e[16];
    memcpy(x, &a, 64);
    memcpy(e, &n, 64);
    EMU_LANES(16)
    x[i] = isnan(e[i]) ? e[i] : ldexpf(x[i], (int)fminf(2000, fmaxf(-2000, floorf(e[i]))));
    return emu_loadu_ps(x);
}
#define emu_and_ps(a, b) ((__m512)((emu_u)(a) & (emu_u)(b)))
#define emu_or_ps(a, b) ((__m512)((emu_u)(a) | (emu_u)(b)))
EMU __m512 emu_abs_ps(__m512 a) {
    return (__m512)((emu_u)a & 0x7fffffffu);
}
EMU __mmask16 emu_mask_of(emu_i m) {
    unsigned r = 0;
    EMU_LANES(16)
    r |= (unsigned)(m[i] & 1) << i;
    return (__mmask16)r;
}
EMU __mmask16 emu_cmp_ps_mask(__m512 a, __m512 b, int how) {
    emu_i lt = (emu_f)a < (emu_f)b, unordered = ((emu_f)a != (emu_f)a) | ((emu_f)b != (emu_f)b);
    return emu_mask_of(how == _CMP_LT_OQ ? lt : unordered);
}
EMU __m512 emu_mask_blend_ps(__mmask16 m, __m512 a, __m512 b) {
    emu_f x = (emu_f)a, y = (emu_f)b;
    EMU_LANES(16)
    x[i] = m >> i & 1 ? y[i] : x[i];
    return (__m512)x;
}

/* ---- integers */
#define emu_add_epi32(a, b) ((__m512i)((emu_u)(a) + (emu_u)(b)))
#define emu_and_si512(a, b) ((__m512i)((emu_u)(a) & (emu_u)(b)))
#define emu_or_si512(a, b) ((__m512i)((emu_u)(a) | (emu_u)(b)))
#define emu_slli_epi32(a, n) ((__m512i)((emu_u)(a) << (n)))
#define emu_srli_epi32(a, n) ((__m512i)((emu_u)(a) >> (n)))
EMU __m512i emu_mask_or_epi32(__m512i src, __mmask16 m, __m512i a, __m512i b) {
    emu_u s = (emu_u)src, r = (emu_u)a | (emu_u)b;
    EMU_LANES(16)
    s[i] = m >> i & 1 ? r[i] : s[i];
    return (__m512i)s;
}
EMU __m512i emu_cvtepu16_epi32(__m256i a) {
    uint16_t h[16];
    memcpy(h, &a, 32);
    emu_u r;
    EMU_LANES(16)
    r[i] = h[i];
    return (__m512i)r;
}
EMU __m256i emu_cvtepi32_epi16(__m512i a) {
    emu_u v = (emu_u)a;
    uint16_t h[16];
    EMU_LANES(16)
    h[i] = (uint16_t)v[i];
    __m256i r;
    memcpy(&r, h, 32);
    return r;
}
EMU __m512 emu_cvtph_ps(__m256i a) {
    __m128i h[2];
    memcpy(h, &a, 32);
    return emu_join(_mm256_cvtph_ps(h[0]), _mm256_cvtph_ps(h[1]));
}
EMU __m512i emu_permutexvar_epi16(__m512i order, __m512i a) {
    uint16_t o[32], x[32], r[32];
    memcpy(o, &order, 64);
    memcpy(x, &a, 64);
    EMU_LANES(32)
    r[i] = x[o[i] & 31];
    return emu_loadu_si512(r);
}
EMU __m512 emu_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
    float x[32], r[16];
    int32_t o[16];
    memcpy(x, &a, 64);
    memcpy(x + 16, &b, 64);
    memcpy(o, &order, 64);
    EMU_LANES(16)
    r[i] = x[o[i] & 31];
    return emu_loadu_ps(r);
}
EMU_HALVES_2(emu_unpacklo_ps, _mm256_unpacklo_ps)
EMU_HALVES_2(emu_unpackhi_ps, _mm256_unpackhi_ps)
EMU __m512d emu_unpack_pd(__m512d a, __m512d b, int high) {
    double x[8], y[8], r[8];
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    for (int i = 0; i < 8; i += 2) {
        r[i] = x[i + high];
        r[i + 1] = y[i + high];
    }
    __m512d v;
    memcpy(&v, r, 64);
    return v;
}
#define emu_unpacklo_pd(a, b) emu_unpack_pd(a, b, 0)
#define emu_unpackhi_pd(a, b) emu_unpack_pd(a, b, 1)
EMU __m512 emu_shuffle_f32x4(__m512 a, __m512 b, int how) {
    __m128 x[4], y[4], r[4];
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    r[0] = x[how & 3];
    r[1] = x[how >> 2 & 3];
    r[2] = y[how >> 4 & 3];
    r[3] = y[how >> 6 & 3];
    __m512 v;
    memcpy(&v, r, 64);
    return v;
}

/* ---- bf16: round to nearest even; numbers below 2^-126 count as zero */
EMU uint16_t emu_to_bf16(uint32_t u) {
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    if (!(u & 0x7f800000u))
        return (uint16_t)(u >> 16 & 0x8000u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
EMU __m256i emu_cvtneps_pbh(__m512 a) {
    uint32_t u[16];
    uint16_t h[16];
    memcpy(u, &a, 64);
    EMU_LANES(16)
    h[i] = emu_to_bf16(u[i]);
    __m256i r;
    memcpy(&r, h, 32);
    return r;
}
EMU __m512i emu_cvtne2ps_pbh(__m512 hi, __m512 lo) {
    __m256i r[2] = {emu_cvtneps_pbh(lo), emu_cvtneps_pbh(hi)};
    return emu_loadu_si512(r);
}
EMU __m512 emu_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    emu_u x = (emu_u)a, y = (emu_u)b;
    emu_f r = (emu_f)c;
    r += (emu_f)(x & 0xffff0000u) * (emu_f)(y & 0xffff0000u);
    r += (emu_f)(x << 16) * (emu_f)(y << 16);
    return (__m512)r;
}

/* ---- 8-bit integers */
EMU __m512i emu_max_epi32(__m512i a, __m512i b) {
    emu_i x = (emu_i)a, y = (emu_i)b;
    EMU_LANES(16)
    x[i] = x[i] > y[i] ? x[i] : y[i];
    return (__m512i)x;
}
EMU __m512 emu_cvtepi32_ps(__m512i a) {
    __m256i h[2];
    memcpy(h, &a, 64);
    return emu_join(_mm256_cvtepi32_ps(h[0]), _mm256_cvtepi32_ps(h[1]));
}
EMU __m512i emu_cvtps_epi32(__m512 a) {
    emu_halves x = emu_split(a);
    __m256i h[2] = {_mm256_cvtps_epi32(x.h[0]), _mm256_cvtps_epi32(x.h[1])};
    return emu_loadu_si512(h);
}
EMU __m256i emu_cvtsepi32_epi16(__m512i a) {
    emu_i v = (emu_i)a;
    int16_t h[16];
    EMU_LANES(16)
    h[i] = (int16_t)(v[i] < -32768 ? -32768 : v[i] > 32767 ? 32767 : v[i]);
    __m256i r;
    memcpy(&r, h, 32);
    return r;
}
EMU __m128i emu_cvtsepi32_epi8(__m512i a) {
    emu_i v = (emu_i)a;
    int8_t b[16];
    EMU_LANES(16)
    b[i] = (int8_t)(v[i] < -128 ? -128 : v[i] > 127 ? 127 : v[i]);
    __m128i r;
    memcpy(&r, b, 16);
    return r;
}
EMU __m512i emu_madd_epi16(__m512i a, __m512i b) {
    __m256i x[2], y[2];
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    __m256i h[2] = {_mm256_madd_epi16(x[0], y[0]), _mm256_madd_epi16(x[1], y[1])};
    return emu_loadu_si512(h);
}
EMU __m512i emu_dpbusd_epi32(__m512i s, __m512i a, __m512i b) {
    uint8_t x[64];
    int8_t y[64];
    emu_i r = (emu_i)s;
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    EMU_LANES(16)
    for (int j = 0; j < 4; j++)
        r[i] += (int32_t)x[4 * i + j] * y[4 * i + j];
    return (__m512i)r;
}
EMU __m128i emu_128_maskz_loadu_epi8(__mmask16 m, const void *p) {
    __m128i v = {0};
    emu_masked(&v, p, m, 1, 16);
    return v;
}
#undef _mm512_max_epi32
#define _mm512_max_epi32 emu_max_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emu_cvtepi32_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emu_cvtps_epi32
#undef _mm512_cvtsepi32_epi16
#define _mm512_cvtsepi32_epi16 emu_cvtsepi32_epi16
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8 emu_cvtsepi32_epi8
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emu_madd_epi16
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emu_128_maskz_loadu_epi8

#undef _mm512_loadu_ps
#define _mm512_loadu_ps emu_loadu_ps
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emu_storeu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emu_loadu_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emu_storeu_si512
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emu_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emu_mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emu_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emu_maskz_loadu_epi8
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 emu_mask_storeu_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps emu_set1_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emu_setzero_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emu_set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emu_setr_epi32
#undef _mm512_set_epi16
#define _mm512_set_epi16 emu_set_epi16
#undef _mm512_castps_si512
#define _mm512_castps_si512 emu_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emu_castsi512_ps
#undef _mm512_castps_pd
#define _mm512_castps_pd emu_castps_pd
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emu_castpd_ps
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emu_castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emu_extractf32x8_ps
#undef _mm512_add_ps
#define _mm512_add_ps emu_add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps emu_sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emu_mul_ps
#undef _mm512_div_ps
#define _mm512_div_ps emu_div_ps
#undef _mm512_sqrt_ps
#define _mm512_sqrt_ps emu_sqrt_ps
#undef _mm512_max_ps
#define _mm512_max_ps emu_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emu_min_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emu_fmadd_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps emu_fnmadd_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emu_roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emu_scalef_ps
#undef _mm512_and_ps
#define _mm512_and_ps emu_and_ps
#undef _mm512_or_ps
#define _mm512_or_ps emu_or_ps
#undef _mm512_abs_ps
#define _mm512_abs_ps emu_abs_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emu_cmp_ps_mask
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emu_mask_blend_ps
#undef _mm512_add_epi32
#define _mm512_add_epi32 emu_add_epi32
#undef _mm512_and_si512
#define _mm512_and_si512 emu_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 emu_or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emu_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emu_srli_epi32
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 emu_mask_or_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emu_cvtph_ps
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emu_permutexvar_epi16
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps emu_permutex2var_ps
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emu_unpacklo_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emu_unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd emu_unpacklo_pd
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd emu_unpackhi_pd
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emu_shuffle_f32x4
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emu_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emu_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emu_dpbf16_ps
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emu_256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emu_256_mask_storeu_epi16

#endif
