#include "base/dtype.h"

#include <stdbool.h>

#include "base/blocks.h"

/* A type without blocks has blocks of one element. */
static const struct {
    const char *name;
    int elements;
    size_t bytes;
} DTYPES[QIE_DTYPE_COUNT] = {
    [QIE_F32] = {"F32", 1, 4},
    [QIE_BF16] = {"BF16", 1, 2},
    [QIE_F16] = {"F16", 1, 2},
    [QIE_U8] = {"U8", 1, 1},
    [QIE_I32] = {"I32", 1, 4},
    [QIE_I64] = {"I64", 1, 8},
    [QIE_F64] = {"F64", 1, 8},
    [QIE_BOOL] = {"BOOL", 1, 1},
    [QIE_I8] = {"I8", 1, 1},
    [QIE_F8_E4M3] = {"F8_E4M3", 1, 1},
    [QIE_F8_E5M2] = {"F8_E5M2", 1, 1},
    [QIE_Q4_0] = {"Q4_0", 32, 18},
    [QIE_Q4_1] = {"Q4_1", 32, 20},
    [QIE_Q5_0] = {"Q5_0", 32, 22},
    [QIE_Q5_1] = {"Q5_1", 32, 24},
    [QIE_Q8_0] = {"Q8_0", 32, 34},
    [QIE_Q2_K] = {"Q2_K", 256, 84},
    [QIE_Q3_K] = {"Q3_K", 256, 110},
    [QIE_Q4_K] = {"Q4_K", 256, 144},
    [QIE_Q5_K] = {"Q5_K", 256, 176},
    [QIE_Q6_K] = {"Q6_K", 256, 210},
    [QIE_IQ4_NL] = {"IQ4_NL", 32, 18},
    [QIE_IQ4_XS] = {"IQ4_XS", 256, 136},
};

static bool known(qie_dtype dtype) {
    return (unsigned)dtype < QIE_DTYPE_COUNT;
}

size_t qie_dtype_size(qie_dtype dtype) {
    return known(dtype) && DTYPES[dtype].elements == 1 ? DTYPES[dtype].bytes : 0;
}

int qie_dtype_block_elements(qie_dtype dtype) {
    return known(dtype) ? DTYPES[dtype].elements : 0;
}

size_t qie_dtype_block_bytes(qie_dtype dtype) {
    return known(dtype) ? DTYPES[dtype].bytes : 0;
}

size_t qie_dtype_row_bytes(qie_dtype dtype, int64_t n) {
    return known(dtype) ? (size_t)n / (size_t)DTYPES[dtype].elements * DTYPES[dtype].bytes : 0;
}

const char *qie_dtype_name(qie_dtype dtype) {
    return known(dtype) ? DTYPES[dtype].name : "?";
}

int qie_dtype_from_name(const char *name) {
    for (int i = 0; i < QIE_DTYPE_COUNT; i++)
        if (!strcmp(DTYPES[i].name, name))
            return i;
    return -1;
}

float qie_f16_to_f32(qie_f16 h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu, u;
    if (e == 31)
        u = sign | 0x7f800000u | (m << 13);
    else if (e)
        u = sign | ((e + 112) << 23) | (m << 13);
    else {
        float f = (float)m * 5.9604644775390625e-8f; /* 2^-24: subnormal step of binary16 */
        memcpy(&u, &f, sizeof u);
        u |= sign;
    }
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

qie_f16 qie_f32_to_f16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (qie_f16)(sign | 0x7e00u);
    if (a >= 0x477ff000u) /* rounds to 65536 or more */
        return (qie_f16)(sign | 0x7c00u);
    if (a <
        0x38800000u) { /* below 2^-14: subnormal; adding 0.5 lets the FPU round to 2^-24 steps */
        float x;
        memcpy(&x, &a, sizeof x);
        x += 0.5f;
        memcpy(&a, &x, sizeof a);
        return (qie_f16)(sign | (a - 0x3f000000u));
    }
    return (qie_f16)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

int qie_to_f32(float *dst, const void *src, qie_dtype dtype, size_t n) {
    const unsigned char *p = src;
    switch (dtype) {
    case QIE_F32: memcpy(dst, src, n * sizeof *dst); return 0;
    case QIE_BF16:
        for (size_t i = 0; i < n; i++) {
            qie_bf16 h;
            memcpy(&h, p + 2 * i, 2);
            dst[i] = qie_bf16_to_f32(h);
        }
        return 0;
    case QIE_F16:
        for (size_t i = 0; i < n; i++) {
            qie_f16 h;
            memcpy(&h, p + 2 * i, 2);
            dst[i] = qie_f16_to_f32(h);
        }
        return 0;
    case QIE_F64:
        for (size_t i = 0; i < n; i++) {
            double d;
            memcpy(&d, p + 8 * i, 8);
            dst[i] = (float)d;
        }
        return 0;
    default: return qie_blocks_to_f32(dst, src, dtype, n);
    }
}
