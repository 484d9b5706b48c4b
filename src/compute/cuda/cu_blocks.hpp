/* One element of a stored weight: the blocks of GGUF files, fp8, int8 and the plain types. Layouts:
 * docs/MODEL.md and the format's description; checked against the CPU's dequantiser. */
#ifndef QIE_COMPUTE_CUDA_CU_BLOCKS_HPP
#define QIE_COMPUTE_CUDA_CU_BLOCKS_HPP

#include "compute/cuda/cu_device.hpp"

#ifdef __CUDACC__
#define CU_BOTH __host__ __device__ inline
#else
#define CU_BOTH inline
#endif

CU_BOTH int cu_block_elements(int type) {
    switch (type) {
    case QIE_Q4_0:
    case QIE_Q4_1:
    case QIE_Q5_0:
    case QIE_Q5_1:
    case QIE_Q8_0:
    case QIE_IQ4_NL: return 32;
    case QIE_Q2_K:
    case QIE_Q3_K:
    case QIE_Q4_K:
    case QIE_Q5_K:
    case QIE_Q6_K:
    case QIE_IQ4_XS: return 256;
    default: return 1;
    }
}
CU_BOTH int cu_block_bytes(int type) {
    switch (type) {
    case QIE_F32: return 4;
    case QIE_BF16:
    case QIE_F16: return 2;
    case QIE_Q4_0:
    case QIE_IQ4_NL: return 18;
    case QIE_Q4_1: return 20;
    case QIE_Q5_0: return 22;
    case QIE_Q5_1: return 24;
    case QIE_Q8_0: return 34;
    case QIE_Q2_K: return 84;
    case QIE_Q3_K: return 110;
    case QIE_Q4_K: return 144;
    case QIE_Q5_K: return 176;
    case QIE_Q6_K: return 210;
    case QIE_IQ4_XS: return 136;
    default: return 1;
    }
}

CU_INLINE uint32_t cu_u16(const unsigned char *p) { /* blocks have any alignment */
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}
CU_INLINE float cu_half(const unsigned char *p) {
    return cu_f16_to_f32((uint16_t)cu_u16(p));
}
CU_INLINE uint32_t cu_u32(const unsigned char *p) {
    return cu_u16(p) | cu_u16(p + 2) << 16;
}

CU_INLINE float cu_e4m3_to_f32(unsigned char b) {
    uint32_t sign = (uint32_t)(b & 0x80u) << 24, e = (uint32_t)(b >> 3) & 15u, m = b & 7u;
    if (e == 15 && m == 7)
        return cu_bits_f32(0x7fc00000u);
    if (e == 0) {
        float f = (float)m * 0.001953125f; /* 2^-9 */
        return sign ? -f : f;
    }
    return cu_bits_f32(sign | (e + 120) << 23 | m << 20);
}
/* To nearest, ties to even; beyond 448 to 448. */
CU_INLINE unsigned char cu_f32_to_e4m3(float f) {
    uint32_t u = cu_f32_bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (unsigned char)(sign | 0x7fu);
    if (a >= 0x43e00000u) /* 448 */
        return (unsigned char)(sign | 0x7eu);
    if (a < 0x3c800000u) {                   /* 2^-6: below it in steps of 2^-9 */
        float x = cu_bits_f32(a) + 16384.0f; /* one unit of 2^14 is 2^-9 */
        return (unsigned char)(sign | (cu_f32_bits(x) - 0x46800000u));
    }
    a += 0x7ffffu + ((a >> 20) & 1u);
    uint32_t r = (a >> 20) - (120u << 3);
    return (unsigned char)(sign | (r > 0x7eu ? 0x7eu : r));
}

/* kvalues of IQ4: the format's sixteen levels. */
CU_INLINE float cu_iq4(uint32_t q) {
    switch (q) {
    case 0: return -127;
    case 1: return -104;
    case 2: return -83;
    case 3: return -65;
    case 4: return -49;
    case 5: return -35;
    case 6: return -22;
    case 7: return -10;
    case 8: return 1;
    case 9: return 13;
    case 10: return 25;
    case 11: return 38;
    case 12: return 53;
    case 13: return 69;
    case 14: return 89;
    default: return 113;
    }
}

/* Scale and minimum of sub-block s in the twelve bytes of Q4_K and Q5_K. */
CU_INLINE void cu_k_scales(const unsigned char *p, int s, float *scale, float *low) {
    if (s < 4) {
        *scale = (float)(p[s] & 63);
        *low = (float)(p[s + 4] & 63);
    } else {
        *scale = (float)((p[s + 4] & 15) | (p[s - 4] >> 6) << 4);
        *low = (float)((p[s + 4] >> 4) | (p[s] >> 6) << 4);
    }
}

CU_INLINE float cu_small_block(const unsigned char *b, int type, int e) {
    int at = e & 15, shift = e < 16 ? 0 : 4;
    float d = cu_half(b);
    switch (type) {
    case QIE_Q4_0: return d * (float)((int)((b[2 + at] >> shift) & 15) - 8);
    case QIE_Q4_1: return d * (float)((b[4 + at] >> shift) & 15) + cu_half(b + 2);
    case QIE_Q5_0: {
        uint32_t q = ((b[6 + at] >> shift) & 15u) | ((cu_u32(b + 2) >> e) & 1u) << 4;
        return d * (float)((int)q - 16);
    }
    case QIE_Q5_1: {
        uint32_t q = ((b[8 + at] >> shift) & 15u) | ((cu_u32(b + 4) >> e) & 1u) << 4;
        return d * (float)q + cu_half(b + 2);
    }
    case QIE_IQ4_NL: return d * cu_iq4((b[2 + at] >> shift) & 15u);
    default: return d * (float)(signed char)b[2 + e]; /* Q8_0 */
    }
}

CU_INLINE float cu_large_block(const unsigned char *b, int type, int e) {
    int half = e >> 7, j = (e & 127) >> 5, l = e & 31, sub = e >> 5;
    switch (type) {
    case QIE_Q2_K: {
        uint32_t q = (b[16 + 32 * half + l] >> (2 * j)) & 3u, sc = b[half * 8 + j * 2 + l / 16];
        return cu_half(b + 80) * (float)(sc & 15u) * (float)q - cu_half(b + 82) * (float)(sc >> 4);
    }
    case QIE_Q3_K: {
        int q = (int)((b[32 + 32 * half + l] >> (2 * j)) & 3u);
        q -= (b[l] >> (half * 4 + j)) & 1 ? 0 : 4;
        int i = half * 8 + j * 2 + l / 16;
        const unsigned char *s = b + 96;
        int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4, high = (s[8 + i % 4] >> (2 * (i / 4))) & 3;
        return cu_half(b + 108) * (float)((low | high << 4) - 32) * (float)q;
    }
    case QIE_Q4_K:
    case QIE_Q5_K: {
        float sc, low;
        cu_k_scales(b + 4, sub, &sc, &low);
        int five = type == QIE_Q5_K;
        const unsigned char *qs = b + (five ? 48 : 16);
        uint32_t q = (qs[32 * (sub >> 1) + l] >> (4 * (sub & 1))) & 15u;
        if (five)
            q |= ((b[16 + l] >> sub) & 1u) << 4;
        return cu_half(b) * sc * (float)q - cu_half(b + 2) * low;
    }
    case QIE_Q6_K: {
        uint32_t low = (b[64 * half + 32 * (j & 1) + l] >> (4 * (j >> 1))) & 15u;
        uint32_t high = (b[128 + 32 * half + l] >> (2 * j)) & 3u;
        int sc = (signed char)b[192 + 8 * half + (e & 127) / 16];
        return cu_half(b + 208) * (float)sc * (float)((int)(low | high << 4) - 32);
    }
    default: { /* IQ4_XS */
        int low = (b[4 + sub / 2] >> (4 * (sub & 1))) & 15;
        int high = (int)((cu_u16(b + 2) >> (2 * sub)) & 3u);
        uint32_t q = (b[8 + 16 * sub + (e & 15)] >> ((e & 31) < 16 ? 0 : 4)) & 15u;
        return cu_half(b) * (float)((low | high << 4) - 32) * cu_iq4(q);
    }
    }
}

/* Element i of a row. */
CU_INLINE float cu_weight(const unsigned char *row, int type, int64_t i) {
    switch (type) {
    case QIE_F32: return ((const float *)row)[i];
    case QIE_BF16: return cu_bf16_to_f32(((const uint16_t *)row)[i]);
    case QIE_F16: return cu_f16_to_f32(((const uint16_t *)row)[i]);
    case QIE_I8: return (float)(signed char)row[i];
    case QIE_F8_E4M3: return cu_e4m3_to_f32(row[i]);
    case QIE_F8_E5M2: return cu_f16_to_f32((uint16_t)(row[i] << 8));
    default: break;
    }
    if (cu_block_elements(type) == 32)
        return cu_small_block(row + i / 32 * cu_block_bytes(type), type, (int)(i % 32));
    return cu_large_block(row + i / 256 * cu_block_bytes(type), type, (int)(i % 256));
}

#endif
