/* The dialect that our kernels are written in: blocks, threads, shared memory, shuffles, barriers
 * and matrix products of a warp. With nvcc these are the hardware's; with any other compiler
 * tests/cuda/emulate.h runs the same code on the CPU, one fiber a thread. */
#ifndef QIE_COMPUTE_CUDA_CU_DEVICE_HPP
#define QIE_COMPUTE_CUDA_CU_DEVICE_HPP

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_kernels.hpp"
#include "compute/cuda/cu_rt.h"

#ifdef __CUDACC__
#include "compute/cuda/cu_native.cuh"
#else
#include <emulate.hpp> /* tests/cuda */
#endif

/* ---- numbers; host versions of the bf16 conversions are those of base/dtype.h */

typedef uint16_t cu_bf16;

CU_INLINE float cu_bf16_to_f32(cu_bf16 h) {
    return cu_bits_f32((uint32_t)h << 16);
}
CU_INLINE cu_bf16 cu_f32_to_bf16(float f) {
    uint32_t u = cu_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (cu_bf16)((u >> 16) | 0x40u);
    return (cu_bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
CU_INLINE uint32_t cu_pack_bf16(float lo, float hi) {
    return (uint32_t)cu_f32_to_bf16(lo) | (uint32_t)cu_f32_to_bf16(hi) << 16;
}

/* Element i of a row of plain floating values, and its store. */
template <typename T> struct cu_num;
template <> struct cu_num<float> {
    static CU_INLINE float get(const float *p) {
        return *p;
    }
    static CU_INLINE void put(float *p, float v) {
        *p = v;
    }
};
template <> struct cu_num<cu_bf16> {
    static CU_INLINE float get(const cu_bf16 *p) {
        return cu_bf16_to_f32(*p);
    }
    static CU_INLINE void put(cu_bf16 *p, float v) {
        *p = cu_f32_to_bf16(v);
    }
};
/* N neighbours, read or written in one access: the address is a multiple of their size. */
template <typename T, int N> struct alignas(sizeof(T) * N) cu_some { T v[N]; };
CU_INLINE float cu_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (uint32_t)(h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31)
        return cu_bits_f32(sign | 0x7f800000u | (m << 13));
    if (e)
        return cu_bits_f32(sign | ((e + 112) << 23) | (m << 13));
    float f = (float)m * 5.9604644775390625e-8f; /* 2^-24: subnormal step of binary16 */
    return sign ? -f : f;
}
/* Parameters come in any plain type. */
CU_INLINE float cu_load(const void *p, int dtype, int64_t i) {
    if (dtype == QIE_F32)
        return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == QIE_BF16 ? cu_bf16_to_f32(h) : cu_f16_to_f32(h);
}

/* V neighbouring values from element i on, of any type that products and parameters have. */
template <int V> CU_INLINE void cu_load_some(const void *p, int type, int64_t i, float v[V]) {
    if (type == QIE_F32) {
        cu_some<float, V> x = *(const cu_some<float, V> *)((const float *)p + i);
        for (int j = 0; j < V; j++)
            v[j] = x.v[j];
    } else if (type == QIE_I32) {
        cu_some<int32_t, V> x = *(const cu_some<int32_t, V> *)((const int32_t *)p + i);
        for (int j = 0; j < V; j++)
            v[j] = (float)x.v[j];
    } else {
        cu_some<uint16_t, V> x = *(const cu_some<uint16_t, V> *)((const uint16_t *)p + i);
        for (int j = 0; j < V; j++)
            v[j] = type == QIE_BF16 ? cu_bf16_to_f32(x.v[j]) : cu_f16_to_f32(x.v[j]);
    }
}
/* Has the host four values of this type there that cu_load_some<4> may read? */
static inline bool cu_in_fours(const void *p, int dtype) {
    return ((uintptr_t)p << (dtype == QIE_BF16 || dtype == QIE_F16)) % 16 == 0;
}

/* A product [.., n] and what belongs to it before an activation: scales of rows and columns
 * (products in 8 bits; NULL: 1), the bias (NULL: none). */
struct cu_product {
    const void *y, *bias;
    int y_type, bias_type;
    int64_t n, n_col_scale;
    const float *row_scale, *col_scale;
};
/* V neighbouring values of it, from column c of row r on. */
template <int V>
CU_INLINE void cu_product_some(const cu_product &p, int64_t r, int64_t c, float v[V]) {
    float a[V];
    cu_load_some<V>(p.y, p.y_type, r * p.n + c, v);
    if (p.row_scale)
        for (int j = 0; j < V; j++)
            v[j] *= p.row_scale[r];
    if (p.col_scale && p.n_col_scale > 1) {
        cu_load_some<V>(p.col_scale, QIE_F32, c, a);
        for (int j = 0; j < V; j++)
            v[j] *= a[j];
    } else if (p.col_scale)
        for (int j = 0; j < V; j++)
            v[j] *= p.col_scale[0];
    if (p.bias) {
        cu_load_some<V>(p.bias, p.bias_type, c, a);
        for (int j = 0; j < V; j++)
            v[j] += a[j];
    }
}
/* Of the host: that of an epilogue, and whether its parts may be read by fours. */
static inline cu_product cu_product_of(const cu_epilogue_args *e) {
    return {e->y, e->bias.data,   (int)e->y_type, (int)e->bias.dtype,
            e->n, e->n_col_scale, e->row_scale,   e->col_scale};
}
static inline bool cu_product_in_fours(const cu_product &p) {
    return p.n % 4 == 0 && cu_in_fours(p.y, p.y_type) && cu_in_fours(p.bias, p.bias_type) &&
           cu_in_fours(p.col_scale, QIE_F32);
}

CU_INLINE float cu_silu(float v) {
    return v / (1.0f + expf(-v));
}
CU_INLINE float cu_act(int act, float v) { /* qie_act */
    if (act == 1)
        return cu_silu(v);
    if (act == 2)
        return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    if (act == 3)
        return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    return v;
}

/* Sum over the 32 lanes, the same in all of them: always added in the same order. */
CU_INLINE float cu_warp_sum(float v) {
    for (int m = 16; m; m >>= 1)
        v += cu_shfl_xor(v, m);
    return v;
}
CU_INLINE float cu_warp_max(float v) {
    for (int m = 16; m; m >>= 1)
        v = fmaxf(v, cu_shfl_xor(v, m));
    return v;
}

#endif
