#include "base/blocks.h"

#include <string.h>

const int8_t QIE_IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};

static float half_at(const uint8_t *p) {
    qie_f16 h;
    memcpy(&h, p, 2);
    return qie_f16_to_f32(h);
}

float qie_f8_e4m3_to_f32(uint8_t b) {
    if ((b & 0x7f) == 0x7f)
        return b & 0x80 ? -__builtin_nanf("") : __builtin_nanf("");
    /* As binary16, whose exponent is biased by 8 more. */
    return qie_f16_to_f32((qie_f16)((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
}

float qie_f8_e5m2_to_f32(uint8_t b) {
    return qie_f16_to_f32((qie_f16)(b << 8));
}

uint8_t qie_f32_to_f8_e4m3(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint8_t sign = (uint8_t)(u >> 24 & 0x80);
    uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint8_t)(sign | 0x7f);
    if (a >= 0x43e00000u) /* 448 */
        return (uint8_t)(sign | 0x7e);
    if (a < 0x3c800000u) { /* below 2^-6: adding 2^14 leaves steps of 2^-9 */
        float x;
        memcpy(&x, &a, sizeof x);
        x += 16384.0f;
        memcpy(&a, &x, sizeof a);
        return (uint8_t)(sign | (a - 0x46800000u));
    }
    a += 0x7ffffu + (a >> 20 & 1u);
    uint32_t b = (a >> 20) - (120u << 3); /* bias 127 to 7, three bits of mantissa */
    return (uint8_t)(sign | (b > 0x7e ? 0x7e : b));
}

void qie_k_scales(const uint8_t packed[12], uint8_t scale[8], uint8_t min[8]) {
    for (int i = 0; i < 4; i++) {
        scale[i] = packed[i] & 63;
        min[i] = packed[4 + i] & 63;
        scale[4 + i] = (uint8_t)((packed[8 + i] & 15) | packed[i] >> 6 << 4);
        min[4 + i] = (uint8_t)(packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4);
    }
}

void qie_q3_k_scales(const uint8_t packed[12], uint8_t scale[16]) {
    for (int i = 0; i < 16; i++) {
        int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
        int high = packed[8 + i % 4] >> 2 * (i / 4) & 3;
        scale[i] = (uint8_t)(low | high << 4);
    }
}

/* Blocks of integers, their factors apart: `scaled` below makes the values. */
static void q4_0(int8_t *q, float *scale, const uint8_t *p) {
    scale[0] = half_at(p);
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)((p[2 + i] & 15) - 8);
        q[16 + i] = (int8_t)((p[2 + i] >> 4) - 8);
    }
}

static void q4_1(float *y, const uint8_t *p) {
    float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)(p[4 + i] & 15) + m;
        y[16 + i] = d * (float)(p[4 + i] >> 4) + m;
    }
}

/* The fifth bits of 32 elements, low byte first. */
static uint32_t high_bits(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void q5_0(int8_t *q, float *scale, const uint8_t *p) {
    uint32_t h = high_bits(p + 2);
    scale[0] = half_at(p);
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)((int)((p[6 + i] & 15) | (h >> i & 1) << 4) - 16);
        q[16 + i] = (int8_t)((int)((uint32_t)(p[6 + i] >> 4) | (h >> (i + 16) & 1) << 4) - 16);
    }
}

static void q5_1(float *y, const uint8_t *p) {
    float d = half_at(p), m = half_at(p + 2);
    uint32_t h = high_bits(p + 4);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)((p[8 + i] & 15) | (h >> i & 1) << 4) + m;
        y[16 + i] = d * (float)((uint32_t)(p[8 + i] >> 4) | (h >> (i + 16) & 1) << 4) + m;
    }
}

static void q8_0(int8_t *q, float *scale, const uint8_t *p) {
    scale[0] = half_at(p);
    memcpy(q, p + 2, 32);
}

static void q2_k(float *y, const uint8_t *p) {
    const uint8_t *q = p + 16;
    float d = half_at(p + 80), dmin = half_at(p + 82);
    for (int e = 0; e < 256; e++) {
        int half = e / 128, shift = e % 128 / 32, c = e % 32;
        uint8_t s = p[e / 16];
        y[e] = d * (float)(s & 15) * (float)(q[32 * half + c] >> 2 * shift & 3) -
               dmin * (float)(s >> 4);
    }
}

static void q3_k(float *y, const uint8_t *p) {
    const uint8_t *high = p, *q = p + 32;
    uint8_t scale[16];
    qie_q3_k_scales(p + 96, scale);
    float d = half_at(p + 108);
    for (int e = 0; e < 256; e++) {
        int half = e / 128, shift = e % 128 / 32, c = e % 32;
        int v = (q[32 * half + c] >> 2 * shift & 3) - (high[c] >> e / 32 & 1 ? 0 : 4);
        y[e] = d * (float)(scale[e / 16] - 32) * (float)v;
    }
}

static void q4_k(float *y, const uint8_t *p) {
    float d = half_at(p), dmin = half_at(p + 2);
    uint8_t scale[8], min[8];
    qie_k_scales(p + 4, scale, min);
    for (int e = 0; e < 256; e++) {
        int s = e / 32, v = p[16 + 32 * (s / 2) + e % 32] >> 4 * (s % 2) & 15;
        y[e] = d * (float)scale[s] * (float)v - dmin * (float)min[s];
    }
}

static void q5_k(float *y, const uint8_t *p) {
    float d = half_at(p), dmin = half_at(p + 2);
    uint8_t scale[8], min[8];
    qie_k_scales(p + 4, scale, min);
    for (int e = 0; e < 256; e++) {
        int s = e / 32, v = p[48 + 32 * (s / 2) + e % 32] >> 4 * (s % 2) & 15;
        v |= (p[16 + e % 32] >> s & 1) << 4;
        y[e] = d * (float)scale[s] * (float)v - dmin * (float)min[s];
    }
}

static void q6_k(float *y, const uint8_t *p) {
    float d = half_at(p + 208);
    for (int e = 0; e < 256; e++) {
        int half = e / 128, r = e % 128 / 32, c = e % 32;
        int low = p[64 * half + 32 * (r % 2) + c] >> 4 * (r / 2) & 15;
        int high = p[128 + 32 * half + c] >> 2 * r & 3;
        y[e] = d * (float)(int8_t)p[192 + e / 16] * (float)((low | high << 4) - 32);
    }
}

static void iq4_nl(int8_t *q, float *scale, const uint8_t *p) {
    scale[0] = half_at(p);
    for (int i = 0; i < 16; i++) {
        q[i] = QIE_IQ4_LEVELS[p[2 + i] & 15];
        q[16 + i] = QIE_IQ4_LEVELS[p[2 + i] >> 4];
    }
}

static void iq4_xs(int8_t *q, float *scale, const uint8_t *p) {
    float d = half_at(p);
    unsigned high = (unsigned)p[2] | (unsigned)p[3] << 8;
    for (int s = 0; s < 8; s++) {
        int six = (p[4 + s / 2] >> 4 * (s % 2) & 15) | (int)(high >> 2 * s & 3) << 4;
        scale[s] = d * (float)(six - 32);
        for (int i = 0; i < 16; i++) {
            uint8_t b = p[8 + 16 * s + i];
            q[32 * s + i] = QIE_IQ4_LEVELS[b & 15];
            q[32 * s + 16 + i] = QIE_IQ4_LEVELS[b >> 4];
        }
    }
}

static void (*const INT8[QIE_DTYPE_COUNT])(int8_t *q, float *scale, const uint8_t *p) = {
    [QIE_Q4_0] = q4_0,     [QIE_Q5_0] = q5_0,     [QIE_Q8_0] = q8_0,
    [QIE_IQ4_NL] = iq4_nl, [QIE_IQ4_XS] = iq4_xs,
};

bool qie_blocks_are_int8(qie_dtype dtype) {
    return (unsigned)dtype < QIE_DTYPE_COUNT && INT8[dtype];
}

void qie_blocks_to_int8(int8_t *q, float *scale, const void *src, qie_dtype dtype, size_t n) {
    const uint8_t *p = src;
    size_t elements = (size_t)qie_dtype_block_elements(dtype), bytes = qie_dtype_block_bytes(dtype);
    for (size_t i = 0; i < n; i += elements, p += bytes, scale += elements / QIE_INT8_GROUP)
        INT8[dtype](q + i, scale, p);
}

/* One block of integers as floats. */
static void scaled(float *y, const uint8_t *p, qie_dtype dtype) {
    int8_t q[256];
    float scale[256 / QIE_INT8_GROUP];
    INT8[dtype](q, scale, p);
    for (int i = 0; i < qie_dtype_block_elements(dtype); i++)
        y[i] = scale[i / QIE_INT8_GROUP] * (float)q[i];
}

int qie_blocks_to_f32(float *dst, const void *src, qie_dtype dtype, size_t n) {
    static void (*const BLOCK[QIE_DTYPE_COUNT])(float *, const uint8_t *) = {
        [QIE_Q4_1] = q4_1, [QIE_Q5_1] = q5_1, [QIE_Q2_K] = q2_k, [QIE_Q3_K] = q3_k,
        [QIE_Q4_K] = q4_k, [QIE_Q5_K] = q5_k, [QIE_Q6_K] = q6_k,
    };
    const uint8_t *p = src;
    if (dtype == QIE_F8_E4M3 || dtype == QIE_F8_E5M2 || dtype == QIE_I8) {
        for (size_t i = 0; i < n; i++)
            dst[i] = dtype == QIE_I8        ? (float)(int8_t)p[i]
                     : dtype == QIE_F8_E4M3 ? qie_f8_e4m3_to_f32(p[i])
                                            : qie_f8_e5m2_to_f32(p[i]);
        return 0;
    }
    bool integers = qie_blocks_are_int8(dtype);
    if (!integers && ((unsigned)dtype >= QIE_DTYPE_COUNT || !BLOCK[dtype]))
        return -1;
    size_t elements = (size_t)qie_dtype_block_elements(dtype), bytes = qie_dtype_block_bytes(dtype);
    for (size_t i = 0; i < n; i += elements, p += bytes)
        if (integers)
            scaled(dst + i, p, dtype);
        else
            BLOCK[dtype](dst + i, p);
    return 0;
}
