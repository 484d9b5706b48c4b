/* Our own kernels, as calls that queue them. Pointers are device memory; types are qie_dtype. */
#ifndef QIE_COMPUTE_CUDA_CU_KERNELS_HPP
#define QIE_COMPUTE_CUDA_CU_KERNELS_HPP

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_rt.h"

typedef struct cu_epilogue_args cu_epilogue_args;

/* kernels_rows.cu: whole rows */
/* join: an epilogue on a->x before the norm, GATED_ADD without an activation; or NULL. Each value
 * is read and written once for both. */
void cu_k_layer_norm(cu_stream s, const qie_layer_norm_args *a, const cu_epilogue_args *join);
/* x [m, k] BF16 to bytes, F8_E4M3 or I8, with a scale for each row. */
void cu_k_quantize_rows(cu_stream s, qie_mat x, void *dst, qie_dtype type, float *row_scale);
void cu_k_rms_norm(cu_stream s, qie_mat x, qie_vec w, float eps, qie_mat dst);
void cu_k_qk_norm_rope(cu_stream s, const qie_qk_norm_rope_args *a);
void cu_k_channel_norm(cu_stream s, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst);
void cu_k_cfg_combine(cu_stream s, const float *cond, const float *uncond, float scale,
                      int64_t rows, int64_t cols, float *v);

/* kernels_elements.cu: every element on its own */
void cu_k_convert(cu_stream s, qie_mat src, qie_mat dst);
void cu_k_axpy(cu_stream s, float a, const float *x, float *y, int64_t n);
/* n BF16 values within +-0.02, drawn by position: weights for measurements */
void cu_k_fill_random(cu_stream s, void *dst, int64_t n, uint32_t seed);
/* *flag |= 1 if a value is infinite or NaN */
void cu_k_find_bad(cu_stream s, const float *v, int64_t n, unsigned *flag);
/* What a product is worth: dst = store(act(y + bias)). y [m, n] F32, BF16 or I32, ld n. gate and
 * split as qie_linear_args. */
struct cu_epilogue_args {
    const void *y;
    qie_dtype y_type;
    int64_t m, n;
    qie_vec bias;
    qie_act act;
    qie_store store;
    const float *gate[2];
    int64_t split; /* relative to the first row here */
    qie_mat dst;
    /* products in 8 bits: value = y * row_scale[row] * col_scale[col]; NULL: 1 */
    const float *row_scale, *col_scale;
    int64_t n_col_scale;
};
void cu_k_epilogue(cu_stream s, const cu_epilogue_args *a);
/* Rows [row0, row0 + n) of a weight of any type to F32 or BF16, dense. */
void cu_k_dequantize(cu_stream s, qie_wmat w, int64_t row0, int64_t n, void *dst, qie_dtype type);
/* The last slice of a convolution's weights to [out][kh][kw][in]. */
void cu_k_conv_weights(cu_stream s, qie_conv_weight w, void *dst, qie_dtype type);

/* kernels_attention.cu. F32 or BF16; segments as bounds in device memory, or NULL. */
void cu_k_attention(cu_stream s, const qie_attention_args *a, const int64_t *bounds);

/* kernels_conv.cu. w: as cu_k_conv_weights left it, of x's type. */
void cu_k_conv2d(cu_stream s, const qie_conv2d_args *a, const void *w);

#endif
