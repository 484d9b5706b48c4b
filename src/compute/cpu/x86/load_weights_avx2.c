#if defined(__x86_64__)
/* Quantised weights to floats, 8 at a time: the same values as base/blocks.c to the bit (products
 * and differences rounded separately, as the formats define them). */
#include "base/blocks.h"
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/vec_avx2.inc"

ALWAYS vf half_all(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
ALWAYS __m128i load16(const uint8_t *p) {
    return _mm_loadu_si128((const __m128i *)p);
}
ALWAYS __m256i load32(const uint8_t *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}
ALWAYS __m128i low_nibbles(__m128i v) {
    return _mm_and_si128(v, _mm_set1_epi8(15));
}
ALWAYS __m128i high_nibbles(__m128i v) {
    return _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15));
}
/* 8 signed bytes */
ALWAYS vf floats8(__m128i bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
/* y = scale * q, 16 signed bytes */
ALWAYS void put16(float *y, __m128i q, vf scale) {
    vf_store(y, vf_mul(scale, floats8(q)));
    vf_store(y + 8, vf_mul(scale, floats8(_mm_srli_si128(q, 8))));
}
/* y = scale * q + add */
ALWAYS void put16_add(float *y, __m128i q, vf scale, vf add) {
    vf_store(y, vf_add(vf_mul(scale, floats8(q)), add));
    vf_store(y + 8, vf_add(vf_mul(scale, floats8(_mm_srli_si128(q, 8))), add));
}
ALWAYS void put32(float *y, __m256i q, vf scale0, vf scale1) {
    put16(y, _mm256_castsi256_si128(q), scale0);
    put16(y + 16, _mm256_extracti128_si256(q, 1), scale1);
}
ALWAYS void put32_sub(float *y, __m256i q, vf scale0, vf scale1, vf min0, vf min1) {
    __m128i a = _mm256_castsi256_si128(q), b = _mm256_extracti128_si256(q, 1);
    vf_store(y, vf_sub(vf_mul(scale0, floats8(a)), min0));
    vf_store(y + 8, vf_sub(vf_mul(scale0, floats8(_mm_srli_si128(a, 8))), min0));
    vf_store(y + 16, vf_sub(vf_mul(scale1, floats8(b)), min1));
    vf_store(y + 24, vf_sub(vf_mul(scale1, floats8(_mm_srli_si128(b, 8))), min1));
}
/* Bits of a shifted right and masked, bytes. n is a constant where inlined. */
ALWAYS __m256i bits(__m256i v, const int n, char mask) {
    return _mm256_and_si256(_mm256_srli_epi16(v, n), _mm256_set1_epi8(mask));
}

ALWAYS void q8_0(float *y, const uint8_t *p) {
    vf d = half_all(p);
    put16(y, load16(p + 2), d);
    put16(y + 16, load16(p + 18), d);
}

ALWAYS void q4_0(float *y, const uint8_t *p) {
    vf d = half_all(p);
    __m128i q = load16(p + 2), eight = _mm_set1_epi8(8);
    put16(y, _mm_sub_epi8(low_nibbles(q), eight), d);
    put16(y + 16, _mm_sub_epi8(high_nibbles(q), eight), d);
}

ALWAYS void q4_1(float *y, const uint8_t *p) {
    vf d = half_all(p), m = half_all(p + 2);
    __m128i q = load16(p + 4);
    put16_add(y, low_nibbles(q), d, m);
    put16_add(y + 16, high_nibbles(q), d, m);
}

/* Sixteen bits as bytes of 16 or 0. */
ALWAYS __m128i fifth_bits(const uint8_t *p) {
    const __m128i spread = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i bit = _mm_set1_epi64x((long long)0x8040201008040201ull);
    uint16_t h;
    memcpy(&h, p, 2);
    __m128i v = _mm_and_si128(_mm_shuffle_epi8(_mm_cvtsi32_si128(h), spread), bit);
    return _mm_and_si128(_mm_cmpeq_epi8(v, bit), _mm_set1_epi8(16));
}

ALWAYS void q5_0(float *y, const uint8_t *p) {
    vf d = half_all(p);
    __m128i q = load16(p + 6), mid = _mm_set1_epi8(16);
    put16(y, _mm_sub_epi8(_mm_or_si128(low_nibbles(q), fifth_bits(p + 2)), mid), d);
    put16(y + 16, _mm_sub_epi8(_mm_or_si128(high_nibbles(q), fifth_bits(p + 4)), mid), d);
}

ALWAYS void q5_1(float *y, const uint8_t *p) {
    vf d = half_all(p), m = half_all(p + 2);
    __m128i q = load16(p + 8);
    put16_add(y, _mm_or_si128(low_nibbles(q), fifth_bits(p + 4)), d, m);
    put16_add(y + 16, _mm_or_si128(high_nibbles(q), fifth_bits(p + 6)), d, m);
}

ALWAYS void iq4_nl(float *y, const uint8_t *p) {
    vf d = half_all(p);
    __m128i q = load16(p + 2), levels = load16((const uint8_t *)QIE_IQ4_LEVELS);
    put16(y, _mm_shuffle_epi8(levels, low_nibbles(q)), d);
    put16(y + 16, _mm_shuffle_epi8(levels, high_nibbles(q)), d);
}

ALWAYS void iq4_xs(float *y, const uint8_t *p) {
    vf d = half_all(p);
    __m128i levels = load16((const uint8_t *)QIE_IQ4_LEVELS);
    unsigned high = (unsigned)p[2] | (unsigned)p[3] << 8;
    for (int s = 0; s < 8; s++) {
        int scale = (p[4 + s / 2] >> 4 * (s % 2) & 15) | (int)(high >> 2 * s & 3) << 4;
        vf ds = vf_mul(d, vf_set1((float)(scale - 32)));
        __m128i q = load16(p + 8 + 16 * s);
        put16(y + 32 * s, _mm_shuffle_epi8(levels, low_nibbles(q)), ds);
        put16(y + 32 * s + 16, _mm_shuffle_epi8(levels, high_nibbles(q)), ds);
    }
}

ALWAYS void q2_k(float *y, const uint8_t *p) {
    vf d = half_all(p + 80), dmin = half_all(p + 82);
    for (int half = 0; half < 2; half++) {
        __m256i q = load32(p + 16 + 32 * half);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const uint8_t *s = p + 8 * half + 2 * r;
            put32_sub(
                y + 128 * half + 32 * r, bits(q, 2 * r, 3), vf_mul(d, vf_set1((float)(s[0] & 15))),
                vf_mul(d, vf_set1((float)(s[1] & 15))), vf_mul(dmin, vf_set1((float)(s[0] >> 4))),
                vf_mul(dmin, vf_set1((float)(s[1] >> 4))));
        }
    }
}

ALWAYS void q3_k(float *y, const uint8_t *p) {
    uint8_t scale[16];
    qie_q3_k_scales(p + 96, scale);
    vf d = half_all(p + 108);
    __m256i high = load32(p);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m256i q = load32(p + 32 + 32 * half);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            /* The high bit set means no 4 to be taken away. */
            __m256i four = _mm256_set1_epi8(4), h = bits(high, 4 * half + r, 1);
            __m256i v = _mm256_add_epi8(bits(q, 2 * r, 3), _mm256_slli_epi16(h, 2));
            const uint8_t *s = scale + 8 * half + 2 * r;
            put32(y + 128 * half + 32 * r, _mm256_sub_epi8(v, four),
                  vf_mul(d, vf_set1((float)(s[0] - 32))), vf_mul(d, vf_set1((float)(s[1] - 32))));
        }
    }
}

/* Sub-blocks s and s + 1 of Q4_K and Q5_K share 32 bytes: low and high nibbles. */
ALWAYS void q45_k(float *y, const uint8_t *p, const bool fifth) {
    vf d = half_all(p), dmin = half_all(p + 2);
    uint8_t scale[8], min[8];
    qie_k_scales(p + 4, scale, min);
    __m256i high = fifth ? load32(p + 16) : _mm256_setzero_si256();
    const uint8_t *data = p + (fifth ? 48 : 16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i q = load32(data + 32 * i);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            int s = 2 * i + j;
            __m256i v = bits(q, 4 * j, 15);
            if (fifth)
                v = _mm256_or_si256(v, _mm256_slli_epi16(bits(high, s, 1), 4));
            vf ds = vf_mul(d, vf_set1((float)scale[s])), m = vf_mul(dmin, vf_set1((float)min[s]));
            put32_sub(y + 32 * s, v, ds, ds, m, m);
        }
    }
}
ALWAYS void q4_k(float *y, const uint8_t *p) {
    q45_k(y, p, false);
}
ALWAYS void q5_k(float *y, const uint8_t *p) {
    q45_k(y, p, true);
}

ALWAYS void q6_k(float *y, const uint8_t *p) {
    vf d = half_all(p + 208);
    const int8_t *scale = (const int8_t *)p + 192;
    for (int half = 0; half < 2; half++) {
        __m256i low[2] = {load32(p + 64 * half), load32(p + 64 * half + 32)};
        __m256i high = load32(p + 128 + 32 * half);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m256i v = _mm256_or_si256(bits(low[r % 2], 4 * (r / 2), 15),
                                        _mm256_slli_epi16(bits(high, 2 * r, 3), 4));
            const int8_t *s = scale + 8 * half + 2 * r;
            put32(y + 128 * half + 32 * r, _mm256_sub_epi8(v, _mm256_set1_epi8(32)),
                  vf_mul(d, vf_set1((float)s[0])), vf_mul(d, vf_set1((float)s[1])));
        }
    }
}

/* 8 bytes of a float with 8 bits, by way of binary16. */
ALWAYS vf f8x8(const uint8_t *p, const qie_dtype t) {
    __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p));
    if (t == QIE_F8_E5M2)
        return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
    __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
    __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    __m128i h = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8),
                             _mm_slli_epi16(magnitude, 7));
    h = _mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
    return vf_mul(_mm256_cvtph_ps(h), vf_set1(256.0f)); /* the exponents' biases differ by 8 */
}
ALWAYS vf i8x8(const uint8_t *p) {
    return floats8(_mm_loadl_epi64((const __m128i *)p));
}

ALWAYS void bytes_body(float *dst, const uint8_t *p, const qie_dtype t, int64_t n, vf scale) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        vf_store(dst + i, vf_mul(t == QIE_I8 ? i8x8(p + i) : f8x8(p + i, t), scale));
    if (i < n) {
        uint8_t part[8] = {0};
        memcpy(part, p + i, (size_t)(n - i));
        vf v = vf_mul(t == QIE_I8 ? i8x8(part) : f8x8(part, t), scale);
        _mm256_maskstore_ps(dst + i, vm_first(n - i), v);
    }
}

void qie_load_weights_avx2(float *dst, const void *src, qie_dtype dtype, int64_t n,
                           const float *scale) {
    const uint8_t *p = src;
    vf s = vf_set1(scale ? *scale : 1.0f);
#define BLOCKS(type, fn, elements, bytes)                         \
    case type:                                                    \
        for (int64_t i = 0; i < n; i += (elements), p += (bytes)) \
            fn(dst + i, p);                                       \
        return;
    switch (dtype) {
    case QIE_F8_E4M3: bytes_body(dst, p, QIE_F8_E4M3, n, s); return;
    case QIE_F8_E5M2: bytes_body(dst, p, QIE_F8_E5M2, n, s); return;
    case QIE_I8:
        bytes_body(dst, p, QIE_I8, n, s);
        return;
        BLOCKS(QIE_Q4_0, q4_0, 32, 18)
        BLOCKS(QIE_Q4_1, q4_1, 32, 20)
        BLOCKS(QIE_Q5_0, q5_0, 32, 22)
        BLOCKS(QIE_Q5_1, q5_1, 32, 24)
        BLOCKS(QIE_Q8_0, q8_0, 32, 34)
        BLOCKS(QIE_IQ4_NL, iq4_nl, 32, 18)
        BLOCKS(QIE_Q2_K, q2_k, 256, 84)
        BLOCKS(QIE_Q3_K, q3_k, 256, 110)
        BLOCKS(QIE_Q4_K, q4_k, 256, 144)
        BLOCKS(QIE_Q5_K, q5_k, 256, 176)
        BLOCKS(QIE_Q6_K, q6_k, 256, 210)
        BLOCKS(QIE_IQ4_XS, iq4_xs, 256, 136)
    default:
        /* Floats with a scale: no file that we know has them. */
        qie_to_f32(dst, src, dtype, (size_t)n);
        for (int64_t i = 0; i < n && scale; i++)
            dst[i] *= *scale;
    }
#undef BLOCKS
}
#else
typedef int qie_empty_translation_unit;
#endif
