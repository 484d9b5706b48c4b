/* Element types of tensors, and the conversions between them.
 * bf16 rounding is to nearest, ties to even, as torch does; NaN stays NaN. */
#ifndef QIE_BASE_DTYPE_H
#define QIE_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum qie_dtype {
    QIE_F32 = 0,
    QIE_BF16,
    QIE_F16,
    QIE_U8,
    QIE_I32,
    QIE_I64,
    QIE_F64,
    QIE_BOOL,
    QIE_I8,
    QIE_F8_E4M3, /* "fn": no infinities, 0x7f and 0xff are NaN, largest 448 */
    QIE_F8_E5M2,
    /* Blocks of GGUF files: layouts as in the format's description. */
    QIE_Q4_0,
    QIE_Q4_1,
    QIE_Q5_0,
    QIE_Q5_1,
    QIE_Q8_0,
    QIE_Q2_K,
    QIE_Q3_K,
    QIE_Q4_K,
    QIE_Q5_K,
    QIE_Q6_K,
    QIE_IQ4_NL,
    QIE_IQ4_XS,
    QIE_DTYPE_COUNT
} qie_dtype;

typedef uint16_t qie_bf16;
typedef uint16_t qie_f16;

/* Bytes of one element; 0 for an unknown type and for those stored in blocks. */
size_t qie_dtype_size(qie_dtype dtype);
/* Elements of one block along a row (1: no blocks; 0: unknown type) and its bytes. */
int qie_dtype_block_elements(qie_dtype dtype);
size_t qie_dtype_block_bytes(qie_dtype dtype);
/* Bytes of n elements of a row; n must be a multiple of the block's elements. */
size_t qie_dtype_row_bytes(qie_dtype dtype, int64_t n);
/* Name as in safetensors headers ("F32", "BF16", ...), of blocks as in GGUF ("Q8_0"). */
const char *qie_dtype_name(qie_dtype dtype);
/* -1 if the name is not one of ours. */
int qie_dtype_from_name(const char *name);

static inline float qie_bf16_to_f32(qie_bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline qie_bf16 qie_f32_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (qie_bf16)((u >> 16) | 0x40u);
    return (qie_bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float qie_f16_to_f32(qie_f16 h);
qie_f16 qie_f32_to_f16(float f);

/* Convert n elements of `dtype` at src to f32: F32, BF16, F16, F64, F8_*, I8 or whole blocks
 * (others: returns -1, dst untouched). src needs no alignment. */
int qie_to_f32(float *dst, const void *src, qie_dtype dtype, size_t n);

#endif
