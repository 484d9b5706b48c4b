/* y = x W^T with everything that follows it, by tiles.
 *
 * A task owns QIE_TASK_COLS columns and up to QIE_TASK_ROWS rows of the result. It walks k in
 * blocks of 1 KiB a row: packs that block of its weights (they come as [N, K] from the file and are
 * never copied whole), then for each tile of rows copies the block of x next to each other and
 * multiplies. A block's sum starts at zero and is added to the task's sums: shorter chains of
 * additions, smaller error. The rows leave through the epilogue.
 *
 * Up to SMALL_M rows the packing would cost more than it saves: dot products straight from the
 * weights' rows, whose sums differ in their last bits (as_many forbids it).
 *
 * Arithmetic: bf16 activations use bf16 products where the processor has them (weights of other
 * types are rounded to bf16 while packing) and float elsewhere; float activations always use float.
 */
#include <assert.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"
#include "compute/cpu/quantised.h"

enum {
    SMALL_M = 8,
    SMALL_COLS = 64,       /* weight rows a task */
    MIN_ROWS = 112,        /* below, packing is felt */
    SERIAL_MACS = 1 << 19, /* less than this is done before other threads have woken */
    TASK_MACS = 1 << 20,
    MAX_TASKS_WANTED = 64,
};

typedef struct linear_job {
    qie_compute *c;
    const qie_linear_args *a;
    const qie_gemm *g;
    int64_t task_cols, n_row_tasks;
} linear_job;

static void *mat_at(const qie_mat *m, int64_t row, int64_t col) {
    return (unsigned char *)m->data + (size_t)(row * m->ld + col) * qie_dtype_size(m->dtype);
}

const float *qie_cpu_load_bias(const qie_compute *c, const qie_vec *bias, int64_t n0, int64_t n,
                               float *out) {
    if (!bias->data)
        return NULL;
    qie_cpu_state_of(c)->kernels->convert(
        out, QIE_F32, (const unsigned char *)bias->data + (size_t)n0 * qie_dtype_size(bias->dtype),
        bias->dtype, n);
    return out;
}

void qie_cpu_finish_rows(const qie_compute *c, const qie_linear_args *a, const float *bias,
                         const float *sums, int64_t ld, int64_t row0, int64_t n_rows, int64_t n0,
                         int64_t n) {
    qie_epilogue e = {.bias = bias, .act = a->act, .store = a->store, .ldy = ld, .ldd = a->dst.ld};
    int64_t end = row0 + n_rows;
    for (int64_t from = row0, to; from < end; from = to) {
        to = end;
        if (a->store == QIE_STORE_GATED_ADD) {
            e.gate = a->gate[from >= a->split] + n0;
            if (from < a->split && a->split < end)
                to = a->split;
        }
        qie_cpu_state_of(c)->kernels->epilogue(
            &e, sums + (from - row0) * ld, mat_at(&a->dst, from, n0), a->dst.dtype, n, to - from);
    }
}

/* Up to n columns from n0 on, as one packed panel of nv vectors; `panel` is room for them. */
static void pack_weights(const linear_job *job, int64_t n0, int64_t n, int64_t k0, int64_t k,
                         int nv, void *packed, float *panel) {
    const qie_wmat *w = &job->a->w;
    const qie_gemm *g = job->g;
    if (qie_weights_are_plain(w)) {
        g->pack_b(packed, nv, qie_weight_at(w, n0, k0), w->dtype, w->k, n, k);
        return;
    }
    int64_t most = (int64_t)nv * g->vw;
    n = n < most ? n : most;
    qie_load_panel(qie_cpu_state_of(job->c)->kernels, w, n0, n, k0, k, panel, k);
    g->pack_b(packed, nv, panel, QIE_F32, k, n, k);
}

static void linear_task(void *arg, size_t index, int i_thread) {
    const linear_job *job = arg;
    const qie_linear_args *a = job->a;
    const qie_gemm *g = job->g;
    int64_t i_rows = (int64_t)index % job->n_row_tasks,
            n0 = (int64_t)index / job->n_row_tasks * job->task_cols;
    int64_t m_all = a->x.rows, m0 = m_all * i_rows / job->n_row_tasks;
    int64_t m = m_all * (i_rows + 1) / job->n_row_tasks - m0;
    int64_t n = a->w.n - n0 < job->task_cols ? a->w.n - n0 : job->task_cols, k_all = a->w.k;
    unsigned char *scratch = qie_cpu_thread_scratch(job->c, i_thread);
    unsigned char *block_a = scratch, *block_b = scratch + QIE_A_BYTES;
    float *panel = (float *)(block_b + QIE_B_BYTES);
    float *sums = panel + QIE_PANEL_BYTES / 4, room[QIE_TASK_COLS];
    qie_panels panels = qie_panels_make(n, g->vw);
    const float *bias = qie_cpu_load_bias(job->c, &a->bias, n0, n, room);

    qie_gemm_begin(g);
    int64_t block = (int64_t)QIE_K_UNITS * g->unit, n_tiles = qie_ceil_div(m, g->mr);
    int64_t x_size = (int64_t)qie_dtype_size(a->x.dtype);
    size_t x_step = (size_t)(a->x.ld * x_size), w_step = qie_dtype_row_bytes(a->w.dtype, k_all);
    if (a->n_lowrank)
        qie_cpu_lowrank_begin(job->c, a, block_a, block_b, m0, m, n0, n, sums, panels.cols);
    for (int64_t k0 = 0; k0 < k_all; k0 += block) {
        int64_t k = k_all - k0 < block ? k_all - k0 : block, steps = qie_ceil_div(k, g->unit);
        int64_t next_k = k_all - k0 - k < block ? k_all - k0 - k : block;
        for (int p = 0; p < panels.n; p++)
            pack_weights(job, n0 + panels.col[p], n - panels.col[p], k0, k, panels.vectors[p],
                         block_b + panels.col[p] * steps * 4, panel);
        for (int64_t t = 0; t < n_tiles; t++) {
            int64_t r0 = m * t / n_tiles, rows = m * (t + 1) / n_tiles - r0;
            float *c = sums + r0 * panels.cols;
            g->copy_a(block_a, mat_at(&a->x, m0 + r0, k0), a->x.dtype, a->x.ld, rows, k);
            int64_t next_rows = t + 1 < n_tiles ? m * (t + 2) / n_tiles - (r0 + rows) : 0;
            for (int p = 0; p < panels.n; p++) {
                qie_cpu_prefetch(mat_at(&a->x, m0 + r0 + rows, k0), x_step, next_rows, k * x_size,
                                 p, panels.n);
                qie_cpu_prefetch(qie_weight_at(&a->w, n0, k0 + k), w_step, n,
                                 (int64_t)qie_dtype_row_bytes(a->w.dtype, next_k), t * panels.n + p,
                                 n_tiles * panels.n);
                g->tile[QIE_A_ROWS][panels.vectors[p] - 1][rows](
                    steps, block_a, 0, block_b + panels.col[p] * steps * 4, c + panels.col[p],
                    panels.cols, NULL, k0 > 0 || a->n_lowrank);
            }
            if (k0 + k == k_all)
                qie_cpu_finish_rows(job->c, a, bias, c, panels.cols, m0 + r0, rows, n0, n);
        }
    }
    qie_gemm_end(g);
}

static void small_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const linear_job *job = arg;
    const qie_linear_args *a = job->a;
    int64_t n0 = (int64_t)index * SMALL_COLS,
            n = a->w.n - n0 < SMALL_COLS ? a->w.n - n0 : SMALL_COLS;
    float sums[SMALL_M][SMALL_COLS], room[SMALL_COLS];
    const float *bias = qie_cpu_load_bias(job->c, &a->bias, n0, n, room);
    bool plain = qie_weights_are_plain(&a->w);
    for (int64_t j = 0; j < n && !plain; j += 4)
        qie_quantised_dots(qie_cpu_state_of(job->c)->kernels, job->g, &a->x, &a->w, n0 + j,
                           n - j < 4 ? n - j : 4, &sums[0][j], SMALL_COLS);
    for (int64_t j = 0; j < n && plain; j += 4)
        for (int64_t r = 0; r < a->x.rows; r += 4)
            job->g->dots(mat_at(&a->x, r, 0), a->x.dtype, a->x.ld,
                         a->x.rows - r < 4 ? a->x.rows - r : 4, qie_weight_at(&a->w, n0 + j, 0),
                         a->w.dtype, n - j < 4 ? n - j : 4, a->w.k, &sums[r][j], SMALL_COLS);
    if (a->n_lowrank)
        qie_cpu_lowrank_dots(job->c, a, n0, n, sums[0], SMALL_COLS);
    qie_cpu_finish_rows(job->c, a, bias, sums[0], SMALL_COLS, 0, a->x.rows, n0, n);
}

void qie_cpu_linear(qie_compute *c, const qie_linear_args *a) {
    assert(a->x.cols == a->w.k && a->dst.cols == a->w.n && a->x.rows == a->dst.rows);
    int64_t m = a->x.rows, n = a->w.n, macs = m * n * a->w.k;
    if (m <= 0 || n <= 0)
        return;
    if (a->n_lowrank)
        qie_lowrank_project(c, a);
    if (qie_cpu_int8_fits(c, a)) {
        qie_cpu_linear_int8(c, a);
        return;
    }
    linear_job job = {.c = c, .a = a, .g = qie_cpu_gemm(c, a->x.dtype)};
    int n_threads = macs < SERIAL_MACS ? 1 : c->n_threads;
    if (m <= SMALL_M && !a->as_many) {
        qie_parallel_for(n_threads, (size_t)qie_ceil_div(n, SMALL_COLS), small_task, &job);
        return;
    }
    /* Enough tasks for a machine with many cores, decided by the shape alone. */
    int64_t wanted = macs / TASK_MACS;
    if (wanted > MAX_TASKS_WANTED)
        wanted = MAX_TASKS_WANTED;
    job.task_cols = QIE_TASK_COLS;
    job.n_row_tasks = qie_ceil_div(m, QIE_TASK_ROWS);
    if (qie_ceil_div(n, job.task_cols) * job.n_row_tasks < wanted)
        job.task_cols = QIE_TASK_COLS / 2;
    int64_t n_col_tasks = qie_ceil_div(n, job.task_cols);
    if (n_col_tasks * job.n_row_tasks < wanted) {
        int64_t most = m / MIN_ROWS, more = qie_ceil_div(wanted, n_col_tasks);
        if (more > most)
            more = most;
        if (more > job.n_row_tasks)
            job.n_row_tasks = more;
    }
    qie_parallel_for(n_threads, (size_t)(n_col_tasks * job.n_row_tasks), linear_task, &job);
}
