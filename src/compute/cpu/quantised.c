#include "compute/cpu/quantised.h"

void qie_load_panel(const qie_kernels *kernels, const qie_wmat *w, int64_t n0, int64_t n,
                    int64_t k0, int64_t k, float *dst, int64_t ld) {
    for (int64_t r = 0; r < n; r++)
        kernels->load_weights(dst + r * ld, qie_weight_at(w, n0 + r, k0), w->dtype, k,
                              !w->scale ? NULL : &w->scale[w->n_scale > 1 ? n0 + r : 0]);
}

void qie_quantised_dots(const qie_kernels *kernels, const qie_gemm *g, const qie_mat *x,
                        const qie_wmat *w, int64_t n0, int64_t n, float *y, int64_t ldy) {
    enum { PIECE = 1024, ROWS = 4 };
    float panel[ROWS * PIECE], part[ROWS][ROWS];
    size_t x_size = qie_dtype_size(x->dtype);
    for (int64_t k0 = 0; k0 < w->k; k0 += PIECE) {
        int64_t k = w->k - k0 < PIECE ? w->k - k0 : PIECE;
        qie_load_panel(kernels, w, n0, n, k0, k, panel, k);
        for (int64_t r = 0; r < x->rows; r += ROWS) {
            int64_t rows = x->rows - r < ROWS ? x->rows - r : ROWS;
            g->dots((const unsigned char *)x->data + (size_t)(r * x->ld + k0) * x_size, x->dtype,
                    x->ld, rows, panel, QIE_F32, n, k, part[0], ROWS);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < n; j++)
                    y[(r + i) * ldy + j] = k0 ? y[(r + i) * ldy + j] + part[i][j] : part[i][j];
        }
    }
}
