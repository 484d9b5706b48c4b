/* What NVIDIA's libraries do for us, behind three calls: cu_libs.cpp stands on cuBLASLt and cuDNN,
 * tests/cuda/double_libs.cpp computes the same on the CPU.
 *
 * All work is queued on the stream; operands are device memory. False: this card or library cannot
 * do it, nothing was queued, the caller takes its own kernel. */
#ifndef QIE_COMPUTE_CUDA_CU_LIBS_HPP
#define QIE_COMPUTE_CUDA_CU_LIBS_HPP

#include <stdbool.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_rt.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qie_cu_libs qie_cu_libs;

int qie_cu_libs_create(int device, qie_cu_libs **out);
void qie_cu_libs_destroy(qie_cu_libs *l);
/* Bytes of device memory that every call may use as `workspace`. */
#define QIE_CU_LIBS_WORKSPACE ((size_t)32 << 20)

typedef enum qie_cu_epilogue {
    QIE_CU_EPI_NONE = 0,
    QIE_CU_EPI_BIAS,
    QIE_CU_EPI_GELU_TANH,     /* without bias */
    QIE_CU_EPI_BIAS_GELU_TANH /* bias, then gelu */
} qie_cu_epilogue;

/* y [m, n] = alpha * x [m, k] w [n, k]^T + beta * y, then the epilogue. Leading dimensions in
 * elements. */
typedef struct qie_cu_gemm_args {
    int64_t m, n, k;
    const void *x, *w;
    void *y;
    int64_t ldx, ldw, ldy;
    qie_dtype type;   /* of x and w: F32, BF16, F8_E4M3 or I8 */
    qie_dtype y_type; /* F32, BF16; I32 for I8 */
    float alpha, beta;
    qie_cu_epilogue epilogue;
    const void *bias; /* [n], of y_type */
    void *workspace;
    /* F8_E4M3: what row r of x and row c of w are to be multiplied by, [m] and [n] in device
     * memory, before the epilogue; both NULL: 1 */
    const float *x_scale, *w_scale;
} qie_cu_gemm_args;
bool qie_cu_gemm(qie_cu_libs *l, cu_stream s, const qie_cu_gemm_args *a);

/* Attention as compute/backend.h says, with the segments also in device memory (or NULL). */
bool qie_cu_sdpa(qie_cu_libs *l, cu_stream s, const qie_attention_args *a, const int64_t *bounds,
                 void *workspace);

/* What people should know of the libraries, each thing once: why one that is there is not used.
 * NULL: nothing. */
const char *qie_cu_libs_note(qie_cu_libs *l);

/* Convolution as compute/backend.h says; w: [out][kernel y][kernel x][in] of x's type. */
bool qie_cu_conv(qie_cu_libs *l, cu_stream s, const qie_conv2d_args *a, const void *w,
                 void *workspace);

#ifdef __cplusplus
}
#endif
#endif
