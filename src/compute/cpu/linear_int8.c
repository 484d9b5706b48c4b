/* Linear layers in 8-bit integers: the sums are exact, the result has the same bits at every level.
 *
 * Up to CHUNK_ROWS rows of x are scaled to integers first, once for all the weights that they meet,
 * into the shared scratch: [block of k][row], each row with its scale behind it. Then a task owns
 * TASK_COLS columns; for each block of k it scales and packs its weights (from any type, out of the
 * mapped file; nothing of them is kept) and multiplies all rows. One scale a row and block of
 * QIE_INT8_BLOCK values rather than a whole row: an outlier costs its own block precision, and the
 * weights are read once. Weights whose elements are integers with a scale for each group of them
 * are packed as they are; then the scales of x are for the same groups. */
#include <assert.h>
#include <string.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"
#include "compute/cpu/quantised.h"

enum {
    CHUNK_ROWS = 2048,
    TASK_COLS = 128,
    MIN_ROWS = 128, /* below, packing is felt */
    TASK_MACS = 1 << 21,
    MAX_TASKS_WANTED = 64,
    X_TASK_VALUES = 1 << 15,
    B_HEAD = 8, /* bytes a column and group in front of a panel: scale, start */
    B_COL = B_HEAD * QIE_I8_GROUPS + QIE_INT8_BLOCK * 2,   /* of packed B at most */
    ROW_BYTES = QIE_INT8_BLOCK * 2 + 64,                   /* one column before it is packed */
    A_BYTES = QIE_INT8_BLOCK * 2 + QIE_I8_GROUPS * 4 + 64, /* one row of one block at most */
    A_SLACK = QIE_I8_MR_MAX * A_BYTES,                     /* tiles may read whole rows of tiles */
    TEMP_BYTES = QIE_NR_MAX * ROW_BYTES,
    SUMS_BYTES = CHUNK_ROWS * TASK_COLS * 4,
};

_Static_assert(B_COL *(size_t)TASK_COLS + TEMP_BYTES >= QIE_A_BYTES + QIE_B_BYTES,
               "room of the low-rank terms");

size_t qie_cpu_int8_shared_bytes(int64_t max_k) {
    return (size_t)(qie_ceil_div(max_k, QIE_INT8_BLOCK) * CHUNK_ROWS) * A_BYTES + A_SLACK;
}
size_t qie_cpu_int8_thread_bytes(void) {
    return (size_t)TASK_COLS * B_COL + TEMP_BYTES + SUMS_BYTES;
}

typedef struct int8_job {
    qie_compute *c;
    const qie_linear_args *a;
    const qie_i8_gemm *g;
    int64_t group;      /* elements that share a scale: QIE_INT8_BLOCK, or of the weights */
    int64_t row0, rows; /* of x in this chunk */
    int64_t x_rows;     /* a task of the first pass */
    int64_t n_row_tasks;
} int8_job;

static unsigned char *left_at(const int8_job *job, int64_t i_block, int64_t row) {
    return job->c->scratch + (i_block * job->rows + row) * qie_i8_a_stride(job->g);
}
static int64_t block_length(int64_t k_all, int64_t k0) {
    return k_all - k0 < QIE_INT8_BLOCK ? k_all - k0 : QIE_INT8_BLOCK;
}
static int64_t steps_of(const qie_i8_gemm *g, int64_t k) {
    return qie_ceil_div(qie_ceil_div(k, g->unit), g->step_multiple) * g->step_multiple;
}
static int64_t groups_of(const int8_job *job, int64_t k) {
    return qie_ceil_div(k, job->group);
}

/* Rows of x as integers. */
static void x_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const int8_job *job = arg;
    const qie_mat *x = &job->a->x;
    int64_t from = (int64_t)index * job->x_rows, to = from + job->x_rows;
    size_t size = qie_dtype_size(x->dtype);
    for (int64_t r = from; r < to && r < job->rows; r++)
        for (int64_t k0 = 0, b = 0; k0 < x->cols; k0 += QIE_INT8_BLOCK, b++) {
            int64_t k = block_length(x->cols, k0);
            unsigned char *dst = left_at(job, b, r);
            job->g->row_a(
                dst, (const unsigned char *)x->data + (size_t)((job->row0 + r) * x->ld + k0) * size,
                x->dtype, k, steps_of(job->g, k) * job->g->unit, job->group,
                (float *)(void *)(dst + qie_i8_a_scale(job->g)));
        }
}

/* k weights of row n as the kernel takes them: where they lie, or widened into `room`. */
static const void *weights_of(const int8_job *job, const qie_wmat *w, int64_t n, int64_t k0,
                              int64_t k, float *room, qie_dtype *dtype) {
    const unsigned char *p = qie_weight_at(w, n, k0);
    const qie_kernels *kernels = qie_cpu_state_of(job->c)->kernels;
    *dtype = w->dtype;
    if (w->dtype == QIE_F32 || w->dtype == QIE_BF16 || w->dtype == QIE_I8)
        return p;
    if (w->dtype == QIE_F16)
        kernels->convert(room, QIE_F32, p, w->dtype, k);
    else
        kernels->load_weights(room, p, w->dtype, k, NULL);
    *dtype = QIE_F32;
    return room;
}

/* Columns [n0, n0 + n) of B, block [k0, k0 + k), as one panel. */
static void pack_panel(const int8_job *job, const qie_wmat *w, int64_t n0, int64_t n, int vectors,
                       int64_t k0, int64_t k, unsigned char *panel, unsigned char *temp) {
    const qie_i8_gemm *g = job->g;
    int64_t steps = steps_of(g, k), cols = (int64_t)vectors * g->vw, groups = groups_of(job, k);
    float *scales = (float *)(void *)panel, of_column[QIE_I8_GROUPS], room[QIE_INT8_BLOCK];
    int32_t *starts = (int32_t *)(void *)(panel + groups * cols * 4);
    memset(panel, 0, (size_t)(groups * cols * B_HEAD));
    for (int64_t i = 0; i < n; i++) {
        qie_dtype dtype = QIE_I8;
        const void *from = room;
        of_column[0] = 1;
        if (job->group < QIE_INT8_BLOCK)
            qie_blocks_to_int8((int8_t *)room, of_column, qie_weight_at(w, n0 + i, k0), w->dtype,
                               (size_t)k);
        else
            from = weights_of(job, w, n0 + i, k0, k, room, &dtype);
        g->row_b(temp + i * ROW_BYTES, from, dtype, k, steps * g->unit, of_column);
        if (w->scale)
            of_column[0] *= w->scale[w->n_scale > 1 ? n0 + i : 0];
        for (int64_t j = 0; j < groups; j++)
            scales[j * cols + i] = of_column[j];
    }
    /* Units are moved as if they were floats. */
    unsigned char *units = panel + groups * cols * B_HEAD;
    qie_cpu_state_of(job->c)->kernels->f32->pack_b(units, vectors, temp, QIE_F32, ROW_BYTES / 4, n,
                                                   steps);
    if (g->starts)
        g->starts(starts, units, vectors, groups, steps / groups);
}

static void int8_task(void *arg, size_t index, int i_thread) {
    const int8_job *job = arg;
    const qie_i8_gemm *g = job->g;
    const qie_linear_args *a = job->a;
    int64_t i_rows = (int64_t)index % job->n_row_tasks;
    int64_t n0 = (int64_t)index / job->n_row_tasks * TASK_COLS, k_all = a->w.k;
    int64_t n = a->w.n - n0 < TASK_COLS ? a->w.n - n0 : TASK_COLS;
    int64_t m0 = job->rows * i_rows / job->n_row_tasks;
    int64_t m = job->rows * (i_rows + 1) / job->n_row_tasks - m0, n_tiles = qie_ceil_div(m, g->mr);
    unsigned char *block_b = qie_cpu_thread_scratch(job->c, i_thread);
    unsigned char *temp = block_b + TASK_COLS * B_COL;
    float *sums = (float *)(void *)(temp + TEMP_BYTES), room[TASK_COLS];
    const float *bias = qie_cpu_load_bias(job->c, &a->bias, n0, n, room);
    qie_panels panels = qie_panels_make(n, g->vw);
    size_t w_row = qie_dtype_row_bytes(a->w.dtype, k_all);
    if (a->n_lowrank)
        qie_cpu_lowrank_begin(job->c, a, block_b, block_b + QIE_A_BYTES, job->row0 + m0, m, n0, n,
                              sums, panels.cols);
    if (g->begin)
        g->begin();
    for (int64_t k0 = 0, b = 0; k0 < k_all; k0 += QIE_INT8_BLOCK, b++) {
        int64_t k = block_length(k_all, k0), steps = steps_of(g, k), groups = groups_of(job, k);
        int64_t col_bytes = B_HEAD * groups + steps * 4;
        for (int p = 0; p < panels.n; p++) {
            int64_t left = n - panels.col[p], cols = (int64_t)panels.vectors[p] * g->vw;
            pack_panel(job, &a->w, n0 + panels.col[p], left < cols ? left : cols, panels.vectors[p],
                       k0, k, block_b + panels.col[p] * col_bytes, temp);
        }
        const unsigned char *next_w = (const unsigned char *)a->w.data + (size_t)n0 * w_row +
                                      w_row * (size_t)(k0 + k) / (size_t)k_all;
        int64_t next_bytes = (int64_t)(w_row * (size_t)block_length(k_all, k0 + k) / (size_t)k_all);
        for (int64_t t = 0; t < n_tiles; t++) {
            int64_t r0 = m * t / n_tiles, rows = m * (t + 1) / n_tiles - r0;
            float *c = sums + r0 * panels.cols;
            for (int p = 0; p < panels.n; p++) {
                qie_cpu_prefetch(next_w, w_row, n, next_bytes, t * panels.n + p,
                                 n_tiles * panels.n);
                g->tile[panels.vectors[p] - 1][rows](
                    groups, steps / groups, left_at(job, b, m0 + r0),
                    block_b + panels.col[p] * col_bytes, c + panels.col[p], panels.cols,
                    k0 > 0 || a->n_lowrank);
            }
            if (k0 + k == k_all)
                qie_cpu_finish_rows(job->c, a, bias, c, panels.cols, job->row0 + m0 + r0, rows, n0,
                                    n);
        }
    }
    if (g->end)
        g->end();
}

bool qie_cpu_int8_fits(const qie_compute *c, const qie_linear_args *a) {
    return qie_linear_int8_group(a) && a->w.k <= qie_cpu_state_of(c)->max_int8_k;
}

void qie_cpu_linear_int8(qie_compute *c, const qie_linear_args *a) {
    assert(qie_cpu_int8_fits(c, a));
    int8_job job = {.c = c, .a = a, .group = qie_linear_int8_group(a)};
    const qie_cpu_state *state = qie_cpu_state_of(c);
    job.g = job.group < QIE_INT8_BLOCK ? state->i8_groups : state->i8;
    int64_t k = a->x.cols, n_col_tasks = qie_ceil_div(a->w.n, TASK_COLS);
    int64_t n_chunks = qie_ceil_div(a->x.rows, CHUNK_ROWS), rows = a->x.rows / n_chunks;
    int64_t wanted = rows * k * n_col_tasks * TASK_COLS / TASK_MACS, most = rows / MIN_ROWS;
    if (wanted > MAX_TASKS_WANTED)
        wanted = MAX_TASKS_WANTED;
    job.x_rows = k >= X_TASK_VALUES ? 1 : X_TASK_VALUES / k;
    job.n_row_tasks = qie_ceil_div(wanted, n_col_tasks);
    job.n_row_tasks = job.n_row_tasks > most ? most : job.n_row_tasks;
    job.n_row_tasks = job.n_row_tasks < 1 ? 1 : job.n_row_tasks;
    for (int64_t i = 0; i < n_chunks; i++) {
        job.row0 = a->x.rows * i / n_chunks;
        job.rows = a->x.rows * (i + 1) / n_chunks - job.row0;
        qie_parallel_for(c->n_threads, (size_t)qie_ceil_div(job.rows, job.x_rows), x_task, &job);
        qie_parallel_for(c->n_threads, (size_t)(n_col_tasks * job.n_row_tasks), int8_task, &job);
    }
}
