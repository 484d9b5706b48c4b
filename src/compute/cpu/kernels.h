/* The kernels that one instruction set offers, as tables of functions: the drivers (linear.c,
 * conv2d.c, attention.c, rows.c) are written once against them.
 *
 * Matrix products compute tiles of mr rows by up to two vectors of columns:
 *   C[r][j] = sum over steps of A[r][step] B[step][j]
 * where an element of A and B is one 32-bit unit: a float, or two bf16 neighbours along k whose
 * products are both added. B is packed [step][column]; A comes in one of two layouts. Sums run over
 * the steps in order. */
#ifndef QIE_COMPUTE_CPU_KERNELS_H
#define QIE_COMPUTE_CPU_KERNELS_H

#include <stdbool.h>

#include "compute/backend.h"

enum {
    QIE_MR_MAX = 32,
    QIE_NR_MAX = 32,
    QIE_K_BYTES = 1024,            /* of A and B handled before a sum is put away */
    QIE_K_UNITS = QIE_K_BYTES / 4, /* steps of one such block */
    QIE_A_STRIDE = QIE_K_BYTES +
                   64, /* between rows of A: not a power of two, or all rows share one cache set */
};

typedef enum qie_a_layout {
    QIE_A_ROWS = 0, /* unit (r, step) at r * QIE_A_STRIDE + 4 * step; a_step ignored */
    QIE_A_STEPS     /* unit (r, step) at step * a_step + 4 * r */
} qie_a_layout;

/* C (rows ldc floats apart) = A B, or with `add`: C * scale[column] + A B (scale NULL: 1). */
typedef void (*qie_tile_fn)(int64_t steps, const void *a, int64_t a_step, const void *b, float *c,
                            int64_t ldc, const float *scale, bool add);

/* Input of a convolution as the rows of a matrix: row = output pixel, column = (tap y, tap x,
 * channel). */
typedef struct qie_gather {
    const void *data;
    qie_dtype dtype;
    int h, w, c; /* of the stored map */
    int up;      /* 1 or 2: each stored pixel stands for up x up */
    int kernel, stride, pad, out_w;
} qie_gather;

typedef struct qie_softmax_args {
    float *s;         /* [n][cols] scores before scaling; destroyed */
    void *p;          /* packed weights; may be s for float */
    float *max, *sum; /* [cols] running, of scaled scores */
    float *factor;    /* [cols] out: what earlier sums are to be multiplied by */
    float scale;
    int64_t n;
    int cols;
    /* Query j sees keys of index < limit + j, n >= limit + j meaning all; INT64_MAX: no mask. */
    int64_t limit;
} qie_softmax_args;

typedef struct qie_gemm {
    int mr, vw;      /* rows of a full tile; floats in a vector */
    int unit;        /* elements along k in one unit: 1 (float) or 2 (bf16) */
    qie_dtype dtype; /* of the packed elements: F32 or BF16 */
    qie_tile_fn tile[2][2][QIE_MR_MAX + 1]; /* [layout][vectors - 1][rows] */
    bool v_rows;                            /* pack_v and the product with it use QIE_A_ROWS */
    /* Around all tiles of a task, on its thread; NULL: nothing to do. */
    void (*begin)(void);
    void (*end)(void);
    /* n rows of k elements, ld elements apart, of type dtype, to B columns: [units][nv * vw],
     * zero-filled. */
    void (*pack_b)(void *dst, int nv, const void *src, qie_dtype dtype, int64_t ld, int64_t n,
                   int64_t k);
    /* n rows of k elements to rows of QIE_A_STRIDE bytes, the last unit zero-filled. */
    void (*copy_a)(void *dst, const void *src, qie_dtype dtype, int64_t ld, int64_t n, int64_t k);
    /* Columns [k0, k0 + k) of rows [row0, row0 + n) of a convolution's matrix, likewise. */
    void (*gather_a)(void *dst, const qie_gather *g, int64_t row0, int64_t n, int64_t k0,
                     int64_t k);
    /* Winograd transforms, n 4 or 3 (winograd.c); NULL: none. Inputs: n x n pixels of c channels ->
     * as many rows of floats, `step` floats apart, whole vectors written. Results: n x n rows of
     * cols sums -> 2 x 2 pixels: y, y + cols, and the same `row` floats further. Weights: 9 vectors
     * -> n x n vectors. */
    void (*winograd_in)(void *out, int64_t step, const void *const *px, int n, qie_dtype dtype,
                        int64_t c);
    void (*winograd_out)(float *y, int64_t row, const float *m, int64_t step, int n, int64_t cols);
    void (*winograd_weights)(float *u, int64_t step, const float *g, int n);
    /* Rows of n x m keys' values as A in QIE_A_STEPS layout: [ceil(n / unit)][m] units,
     * zero-filled; with v_rows as m rows of ceil(n / unit) units, QIE_A_STRIDE apart. */
    void (*pack_v)(void *dst, const void *src, qie_dtype dtype, int64_t ld, int64_t n, int64_t m);
    /* y[i][j] = x row i (i < m <= 4) times w row j (j < n <= 4). y rows are ldy floats apart. */
    void (*dots)(const void *x, qie_dtype x_dtype, int64_t ldx, int64_t m, const void *w,
                 qie_dtype w_dtype, int64_t n, int64_t k, float *y, int64_t ldy);
    /* One block of scores S [n keys][nv * vw queries] (in place) to weights P packed as B: see
     * attention.c. */
    void (*softmax)(const qie_softmax_args *a);
} qie_gemm;

/* Products of 8-bit integers, exact in 32 bits within a group of k; then
 *   C[r][j] += float(sum) * (scale of A's row * scale of B's column), one rounding each.
 * A group is a block of QIE_INT8_BLOCK elements or, where the weights have scales of their own,
 * QIE_INT8_GROUP. Every level computes the same bits, those of
 * ref.c.
 *
 * A row of A: QIE_INT8_BLOCK elements, then the scales of its groups (float). A panel of B of n
 * columns: [group][column] scales, [group][column] integers that the sums start from, then units
 * packed [step][column]. Units are 32 bits: two elements widened to 16 bits, or four bytes. */
enum {
    QIE_I8_MR_MAX = 32,
    QIE_I8_GROUPS = QIE_INT8_BLOCK / QIE_INT8_GROUP, /* of a block, at most */
};
typedef void (*qie_i8_tile_fn)(int64_t groups, int64_t steps /* of a group */, const void *a,
                               const void *b, float *c, int64_t ldc, bool add);
typedef struct qie_i8_gemm {
    int mr, vw;
    int unit;                                  /* elements in a unit: 2 or 4 */
    int step_multiple;                         /* steps come in multiples of this */
    qie_i8_tile_fn tile[2][QIE_I8_MR_MAX + 1]; /* [vectors - 1][rows] */
    /* k values (F32 or BF16) as elements of A, zeros up to `padded`; a scale for each `group` of
     * them: largest / 127. */
    void (*row_a)(void *dst, const void *x, qie_dtype dtype, int64_t k, int64_t padded,
                  int64_t group, float *scale);
    /* The same for a column of B, as one group; I8 is taken as it is, scale untouched. */
    void (*row_b)(void *dst, const void *w, qie_dtype dtype, int64_t k, int64_t padded,
                  float *scale);
    /* What the sums of a packed panel start from; NULL: from zero. */
    void (*starts)(int32_t *start, const void *units, int vectors, int64_t groups, int64_t steps);
    /* For kernels with state of their own in the processor; NULL: none. */
    void (*begin)(void);
    void (*end)(void);
} qie_i8_gemm;
static inline int64_t qie_i8_a_scale(const qie_i8_gemm *g) { /* bytes from a row to its scales */
    return QIE_INT8_BLOCK * 4 / g->unit;
}
static inline int64_t qie_i8_a_stride(const qie_i8_gemm *g) { /* not a power of two */
    return qie_i8_a_scale(g) + QIE_I8_GROUPS * 4 + 64;
}
/* A largest magnitude below this counts as zero: its reciprocal would overflow. */
#define QIE_I8_LEAST 1e-36f

/* What happens to finished rows of sums. */
typedef struct qie_epilogue {
    const float *bias; /* NULL: none */
    qie_act act;
    qie_store store;
    const float *gate;
    const void *residual; /* NULL: none; type and layout of dst */
    int64_t ldy, ldd;     /* elements between rows of sums; of dst and residual */
} qie_epilogue;

typedef struct qie_kernels {
    const char *name;
    const qie_gemm *f32;
    /* Rows of n sums at y to rows of n elements of type dtype at dst. */
    void (*epilogue)(const qie_epilogue *e, const float *y, void *dst, qie_dtype dtype, int64_t n,
                     int64_t rows);
    /* O[j][0 .. d) = acc[0 .. d)[j] / sum[j] for j < n: acc [d][cols]; rows of dst ld elements
     * apart. */
    void (*finish_attention)(const float *acc, const float *sum, int cols, int64_t d, int64_t n,
                             void *dst, qie_dtype dtype, int64_t ld);
    /* n elements, any type to F32 or BF16. */
    void (*convert)(void *dst, qie_dtype dst_dtype, const void *src, qie_dtype src_dtype,
                    int64_t n);
    /* n elements of a weight's row, of any type and whole blocks, times *scale (NULL: 1). */
    void (*load_weights)(float *dst, const void *src, qie_dtype dtype, int64_t n,
                         const float *scale);
    void (*rms_norm)(const void *x, qie_dtype x_dtype, qie_vec w, float eps, int64_t n, void *dst,
                     qie_dtype dst_dtype);
    void (*layer_norm)(const float *x, const float *scale, const float *shift, float eps, int64_t n,
                       void *dst, qie_dtype dst_dtype);
    /* One row: all heads. norm and cos/sin may be NULL. */
    void (*qk_norm_rope)(void *x, qie_dtype dtype, int n_heads, int head_dim, const float *norm,
                         float eps, const float *cos, const float *sin, bool interleaved);
    /* n pixels of c channels */
    void (*channel_norm)(const void *x, qie_dtype x_dtype, const float *gamma, bool silu, int c,
                         int64_t n, void *dst, qie_dtype dst_dtype);
    void (*cfg_combine)(const float *cond, const float *uncond, float scale, int64_t n, float *v);
} qie_kernels;

#if defined(__x86_64__)
extern const qie_gemm qie_f32_gemm_avx2, qie_f32_gemm_avx512, qie_bf16_gemm_avx512bf16;
/* The tile kernels share all else with those of the level below. */
void qie_bf16_gemm_amx_make(qie_gemm *out);
extern const qie_i8_gemm qie_i8_gemm_avx2, qie_i8_gemm_avx512, qie_i8_gemm_avx512bf16,
    qie_i8_gemm_amx;
void qie_load_weights_avx2(float *dst, const void *src, qie_dtype dtype, int64_t n,
                           const float *scale);
extern const qie_kernels qie_kernels_avx2, qie_kernels_avx512, qie_kernels_avx512bf16;
#endif

#endif
