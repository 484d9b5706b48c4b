/* LoRA terms of a linear layer: sum over i of scale_i (x down_i^T) up_i^T.
 *
 * The first product is a linear layer of its own, [m, rank], into the caller's room: computed once,
 * whatever the number of tasks that need it. The second one starts the sums of each task, before
 * its own weights are multiplied, so that bias, activation and store see the whole. Both are in
 * float also where the layer itself is computed in bf16 or in integers: they are some percent of
 * its work, and what a LoRA adds is small beside the layer. */
#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"

enum { SCALE_ROWS = 256 };

static const void *up_at(const qie_wmat *up, int64_t row, int64_t col) {
    return (const unsigned char *)up->data +
           (size_t)(row * up->k + col) * qie_dtype_size(up->dtype);
}

int64_t qie_lowrank_total(const qie_linear_args *a) {
    int64_t total = 0;
    for (size_t i = 0; i < a->n_lowrank; i++)
        total += a->lowrank[i].down.n;
    return total;
}

static void scale_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const qie_linear_args *a = arg;
    int64_t total = qie_lowrank_total(a), from = (int64_t)index * SCALE_ROWS,
            to = from + SCALE_ROWS < a->x.rows ? from + SCALE_ROWS : a->x.rows;
    for (int64_t r = from; r < to; r++) {
        float *t = a->lowrank_room + r * total;
        for (size_t i = 0; i < a->n_lowrank; t += a->lowrank[i].down.n, i++)
            for (int64_t k = 0; k < a->lowrank[i].down.n; k++)
                t[k] *= a->lowrank[i].scale;
    }
}

void qie_lowrank_project(qie_compute *c, const qie_linear_args *a) {
    int64_t total = qie_lowrank_total(a), at = 0;
    for (size_t i = 0; i < a->n_lowrank; i++) {
        const qie_wmat *down = &a->lowrank[i].down;
        qie_linear_args t = {.x = a->x,
                             .w = *down,
                             .split = a->x.rows,
                             .as_many = a->as_many,
                             .dst = {a->lowrank_room + at, QIE_F32, a->x.rows, down->n, total}};
        c->ops.linear(c, &t);
        at += down->n;
    }
    qie_parallel_for(c->n_threads, (size_t)qie_ceil_div(a->x.rows, SCALE_ROWS), scale_task,
                     (void *)(uintptr_t)a);
}

void qie_cpu_lowrank_begin(const qie_compute *c, const qie_linear_args *a, unsigned char *block_a,
                           unsigned char *block_b, int64_t m0, int64_t m, int64_t n0, int64_t n,
                           float *sums, int64_t ld) {
    const qie_gemm *g = qie_cpu_state_of(c)->kernels->f32;
    qie_panels panels = qie_panels_make(n, g->vw);
    int64_t total = qie_lowrank_total(a), at = 0, n_tiles = qie_ceil_div(m, g->mr);
    for (size_t i = 0; i < a->n_lowrank; i++) {
        const qie_wmat *up = &a->lowrank[i].up;
        for (int64_t k0 = 0; k0 < up->k; k0 += QIE_K_UNITS) {
            int64_t k = up->k - k0 < QIE_K_UNITS ? up->k - k0 : QIE_K_UNITS;
            for (int p = 0; p < panels.n; p++)
                g->pack_b(block_b + panels.col[p] * k * 4, panels.vectors[p],
                          up_at(up, n0 + panels.col[p], k0), up->dtype, up->k, n - panels.col[p],
                          k);
            for (int64_t t = 0; t < n_tiles; t++) {
                int64_t r0 = m * t / n_tiles, rows = m * (t + 1) / n_tiles - r0;
                g->copy_a(block_a, a->lowrank_room + (m0 + r0) * total + at + k0, QIE_F32, total,
                          rows, k);
                for (int p = 0; p < panels.n; p++)
                    g->tile[QIE_A_ROWS][panels.vectors[p] - 1][rows](
                        k, block_a, 0, block_b + panels.col[p] * k * 4,
                        sums + r0 * ld + panels.col[p], ld, NULL, i > 0 || k0 > 0);
            }
        }
        at += up->k;
    }
}

void qie_cpu_lowrank_dots(const qie_compute *c, const qie_linear_args *a, int64_t n0, int64_t n,
                          float *sums, int64_t ld) {
    const qie_gemm *g = qie_cpu_state_of(c)->kernels->f32;
    int64_t total = qie_lowrank_total(a), at = 0;
    for (size_t i = 0; i < a->n_lowrank; i++) {
        const qie_wmat *up = &a->lowrank[i].up;
        for (int64_t j = 0; j < n; j += 4)
            for (int64_t r = 0; r < a->x.rows; r += 4) {
                float part[4][4];
                int64_t rows = a->x.rows - r < 4 ? a->x.rows - r : 4, cols = n - j < 4 ? n - j : 4;
                g->dots(a->lowrank_room + r * total + at, QIE_F32, total, rows,
                        up_at(up, n0 + j, 0), up->dtype, cols, up->k, part[0], 4);
                for (int64_t y = 0; y < rows; y++)
                    for (int64_t x = 0; x < cols; x++)
                        sums[(r + y) * ld + j + x] += part[y][x];
            }
        at += up->k;
    }
}
