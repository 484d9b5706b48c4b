/* Weights that are no plain floats, a few rows at a time as floats: what the matrix drivers call
 * before they pack. A panel lives in the thread's scratch only as long as it is packed. */
#ifndef QIE_COMPUTE_CPU_QUANTISED_H
#define QIE_COMPUTE_CPU_QUANTISED_H

#include "compute/cpu/kernels.h"

enum {
    QIE_PANEL_K = QIE_K_UNITS * 2, /* the longest block of k: two elements a unit */
    QIE_PANEL_BYTES = QIE_NR_MAX * QIE_PANEL_K * 4,
};

/* F32, BF16 or F16 without a scale: the kernels read them as they are. */
static inline bool qie_weights_are_plain(const qie_wmat *w) {
    return !w->scale && (w->dtype == QIE_F32 || w->dtype == QIE_BF16 || w->dtype == QIE_F16);
}
/* Element (n, k) of a weight; k at a block's begin. */
static inline const unsigned char *qie_weight_at(const qie_wmat *w, int64_t n, int64_t k) {
    return (const unsigned char *)w->data + (size_t)n * qie_dtype_row_bytes(w->dtype, w->k) +
           qie_dtype_row_bytes(w->dtype, k);
}
/* Rows [n0, n0 + n), elements [k0, k0 + k) as floats, rows ld apart. Whole blocks. */
void qie_load_panel(const qie_kernels *kernels, const qie_wmat *w, int64_t n0, int64_t n,
                    int64_t k0, int64_t k, float *dst, int64_t ld);
/* y[i][j] = x row i (i < m) times weight row n0 + j (j < n <= 4); y rows ldy apart. */
void qie_quantised_dots(const qie_kernels *kernels, const qie_gemm *g, const qie_mat *x,
                        const qie_wmat *w, int64_t n0, int64_t n, float *y, int64_t ldy);

#endif
