/* What the drivers of the back end "cpu" share: the chosen kernels and the division of the scratch
 * memory. Scratch = one area that all threads read (packed convolution weights), then one area a
 * thread. */
#ifndef QIE_COMPUTE_CPU_CPU_STATE_H
#define QIE_COMPUTE_CPU_CPU_STATE_H

#include "compute/cpu/kernels.h"
#include "compute/cpu/lowrank.h"

enum {
    QIE_TASK_COLS =
        128, /* columns that one task computes: its packed B stays in the core's cache */
    QIE_TASK_ROWS = 512, /* rows that share one packing of B */
    QIE_A_BYTES = (QIE_MR_MAX * QIE_A_STRIDE + 63) / 64 * 64,
    QIE_B_BYTES = QIE_TASK_COLS * QIE_K_BYTES,
    QIE_C_BYTES = QIE_TASK_COLS * QIE_TASK_ROWS * 4,
};

typedef struct qie_cpu_state {
    const qie_kernels *kernels;
    const qie_gemm *bf16;              /* NULL: bf16 is widened and takes the float kernels */
    qie_gemm amx;                      /* what bf16 points to at that level */
    const qie_i8_gemm *i8, *i8_groups; /* for one group a block; for many */
    size_t shared_bytes, thread_bytes;
    int64_t max_int8_k;
} qie_cpu_state;

static inline const qie_cpu_state *qie_cpu_state_of(const qie_compute *c) {
    return (const qie_cpu_state *)c->state;
}
/* Kernels for activations of this type. */
static inline const qie_gemm *qie_cpu_gemm(const qie_compute *c, qie_dtype act) {
    const qie_cpu_state *s = qie_cpu_state_of(c);
    return act == QIE_BF16 && s->bf16 ? s->bf16 : s->kernels->f32;
}
static inline void qie_gemm_begin(const qie_gemm *g) {
    if (g->begin)
        g->begin();
}
static inline void qie_gemm_end(const qie_gemm *g) {
    if (g->end)
        g->end();
}
static inline unsigned char *qie_cpu_thread_scratch(const qie_compute *c, int i_thread) {
    const qie_cpu_state *s = qie_cpu_state_of(c);
    return c->scratch + s->shared_bytes + (size_t)i_thread * s->thread_bytes;
}
static inline int64_t qie_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* B of one task for one block of k, in panels of two vectors of columns, the last of one or two. */
typedef struct qie_panels {
    int n; /* panels */
    int vectors[QIE_TASK_COLS / 8];
    int col[QIE_TASK_COLS / 8]; /* first column */
    int cols;                   /* of C, padded */
} qie_panels;
static inline qie_panels qie_panels_make(int64_t cols, int vw) {
    qie_panels p = {.n = 0};
    for (int c = 0; c < cols; p.n++) {
        p.col[p.n] = c;
        p.vectors[p.n] = cols - c > vw ? 2 : 1;
        c += p.vectors[p.n] * vw;
        p.cols = c;
    }
    return p;
}

/* Bytes a thread that attention needs for heads of up to this size. */
size_t qie_cpu_attention_bytes(int max_head_dim);
/* Bytes of the shared area that a convolution needs. */
size_t qie_cpu_conv_bytes(int64_t max_conv_k, int64_t max_conv_n);

/* Bytes of the shared area and a thread that int8 products need for up to max_k inputs. */
size_t qie_cpu_int8_shared_bytes(int64_t max_k);
size_t qie_cpu_int8_thread_bytes(void);

/* The same for its form by Winograd: shared area, area a thread. */
size_t qie_cpu_winograd_shared_bytes(int64_t in, int64_t out);
size_t qie_cpu_winograd_thread_bytes(int64_t max_in);
bool qie_cpu_winograd_takes(const qie_compute *c, const qie_conv2d_args *a);
void qie_cpu_winograd(qie_compute *c, const qie_conv2d_args *a);

void qie_cpu_linear(qie_compute *c, const qie_linear_args *a);
/* Low-rank terms, see lowrank.c. Rows [m0, m0 + m) and columns [n0, n0 + n <= QIE_TASK_COLS) of
 * them to sums (ld floats apart, panels as qie_panels_make pads them), which the layer's own
 * product is then added to. The blocks hold QIE_A_BYTES and QIE_B_BYTES. */
void qie_cpu_lowrank_begin(const qie_compute *c, const qie_linear_args *a, unsigned char *block_a,
                           unsigned char *block_b, int64_t m0, int64_t m, int64_t n0, int64_t n,
                           float *sums, int64_t ld);
/* For few rows: all of them, columns [n0, n0 + n), added to sums. */
void qie_cpu_lowrank_dots(const qie_compute *c, const qie_linear_args *a, int64_t n0, int64_t n,
                          float *sums, int64_t ld);
/* A layer in 8-bit integers; it must fit. */
bool qie_cpu_int8_fits(const qie_compute *c, const qie_linear_args *a);
void qie_cpu_linear_int8(qie_compute *c, const qie_linear_args *a);
void qie_cpu_conv2d(qie_compute *c, const qie_conv2d_args *a);
void qie_cpu_attention(qie_compute *c, const qie_attention_args *a);
/* rms_norm, layer_norm, qk_norm_rope, channel_norm, embed, convert, cfg_combine */
void qie_cpu_fill_rows(qie_ops *ops);

/* Parts of a linear layer that the float and the integer driver share. */
/* Elements [n0, n0 + n) of the bias in `out`; NULL if there is none. */
const float *qie_cpu_load_bias(const qie_compute *c, const qie_vec *bias, int64_t n0, int64_t n,
                               float *out);
/* Rows [row0, row0 + n_rows) of sums (ld floats apart), columns [n0, n0 + n) of the result. */
void qie_cpu_finish_rows(const qie_compute *c, const qie_linear_args *a, const float *bias,
                         const float *sums, int64_t ld, int64_t row0, int64_t n_rows, int64_t n0,
                         int64_t n);
/* Ask for share i of n of `rows` pieces of `bytes`, `step` bytes apart: a kilobyte here and there
 * is too short for the processor to guess, and x and the weights come from far away. */
static inline void qie_cpu_prefetch(const unsigned char *p, size_t step, int64_t rows,
                                    int64_t bytes, int64_t i, int64_t n) {
    for (int64_t r = rows * i / n; r < rows * (i + 1) / n; r++)
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(p + (size_t)r * step + b, 0, 2);
}

#endif
