/* Random weights of every stored type, finite ones. */
#ifndef RANDOM_BLOCKS_H
#define RANDOM_BLOCKS_H

#include "op_test.h"

/* Where a block keeps its binary16 scales; -1: none. */
static inline void blocks_halves_of(qie_dtype t, int at[2]) {
    at[0] = at[1] = -1;
    switch (t) {
    case QIE_Q2_K: at[0] = 80, at[1] = 82; break;
    case QIE_Q3_K: at[0] = 108; break;
    case QIE_Q6_K: at[0] = 208; break;
    case QIE_Q4_1:
    case QIE_Q5_1:
    case QIE_Q4_K:
    case QIE_Q5_K: at[0] = 0, at[1] = 2; break;
    case QIE_F8_E4M3:
    case QIE_F8_E5M2:
    case QIE_I8: break;
    default: at[0] = 0;
    }
}

/* Random weights of n rows of k elements. */
static inline op_buf random_weights(qie_dtype t, int64_t n, int64_t k, bool at_start) {
    size_t bytes = (size_t)n * qie_dtype_row_bytes(t, k), block = qie_dtype_block_bytes(t);
    op_buf b = op_alloc(bytes, at_start);
    int halves[2];
    blocks_halves_of(t, halves);
    for (size_t i = 0; i < bytes; i++)
        b.data[i] = (unsigned char)op_u32();
    for (size_t i = 0; i < bytes; i += block) {
        for (int j = 0; j < 2; j++)
            if (halves[j] >= 0) {
                qie_f16 h = qie_f32_to_f16(op_normal() * 0.02f);
                memcpy(b.data + i + halves[j], &h, 2);
            }
        if (t == QIE_F8_E4M3 && (b.data[i] & 0x7f) == 0x7f)
            b.data[i] = 0x38;
        if (t == QIE_F8_E5M2 && (b.data[i] & 0x7c) == 0x7c)
            b.data[i] = 0x3c;
    }
    return b;
}

#endif
