/* Convolution as a matrix product whose left side is never stored: each tile of output pixels
 * gathers its inputs (upsampling included) just before it is multiplied.
 *
 * The weights are few and used for every pixel: they are packed once, in (tap y, tap x, channel)
 * order, into the scratch that all threads share. Then tasks of up to QIE_TASK_ROWS pixels by
 * QIE_TASK_COLS channels run as in linear.c. Where winograd.c needs fewer products, it runs. */
#include <assert.h>
#include <string.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"

enum {
    MIN_ROWS = 56, /* pixels a task, when there are few */
    SERIAL_MACS = 1 << 19,
    TASK_MACS = 1 << 20,
    MAX_TASKS_WANTED = 64,
};

size_t qie_cpu_conv_bytes(int64_t max_conv_k, int64_t max_conv_n) {
    return (size_t)(max_conv_k + 1) *
           (size_t)((max_conv_n + QIE_NR_MAX - 1) / QIE_NR_MAX * QIE_NR_MAX) * 4;
}

typedef struct conv_job {
    qie_compute *c;
    const qie_conv2d_args *a;
    const qie_gemm *g;
    qie_gather gather;
    int64_t k, units; /* inputs of a pixel; in units of g */
    int64_t m, task_cols, n_row_tasks;
} conv_job;

/* Elements [k0, k0 + k) of one output channel, in packed order. */
#define REORDER(T)                                                                     \
    do {                                                                               \
        unsigned char *out = dst;                                                      \
        const unsigned char *row =                                                     \
            (const unsigned char *)w->data + (size_t)(o * w->in * taps) * sizeof(T);   \
        for (int64_t i = 0, tap = k0 / w->in, ch = k0 % w->in; i < k; tap++, ch = 0)   \
            for (; ch < w->in && i < k; ch++, i++)                                     \
                memcpy(out + (size_t)i * sizeof(T),                                    \
                       row + (size_t)(ch * taps + last + tap) * sizeof(T), sizeof(T)); \
    } while (0)
static void reorder(void *dst, const qie_conv_weight *w, int64_t o, int64_t k0, int64_t k) {
    int64_t taps = (int64_t)w->kt * w->kh * w->kw, last = (int64_t)(w->kt - 1) * w->kh * w->kw;
    if (w->dtype == QIE_F32)
        REORDER(uint32_t);
    else
        REORDER(uint16_t);
}

/* One panel: two vectors of output channels. */
static void pack_task(void *arg, size_t index, int i_thread) {
    const conv_job *job = arg;
    const qie_conv_weight *w = &job->a->w;
    const qie_gemm *g = job->g;
    int64_t o0 = (int64_t)index * 2 * g->vw, n = w->out - o0 < 2 * g->vw ? w->out - o0 : 2 * g->vw;
    int vectors = n > g->vw ? 2 : 1;
    unsigned char *panel = job->c->scratch + o0 * job->units * 4;
    unsigned char *rows = qie_cpu_thread_scratch(job->c, i_thread);
    size_t size = qie_dtype_size(w->dtype);
    for (int64_t k0 = 0; k0 < job->k; k0 += QIE_K_UNITS) {
        int64_t k = job->k - k0 < QIE_K_UNITS ? job->k - k0 : QIE_K_UNITS;
        for (int64_t i = 0; i < n; i++)
            reorder(rows + (size_t)(i * QIE_K_UNITS) * size, w, o0 + i, k0, k);
        g->pack_b(panel + k0 / g->unit * vectors * g->vw * 4, vectors, rows, w->dtype, QIE_K_UNITS,
                  n, k);
    }
}

static void conv_task(void *arg, size_t index, int i_thread) {
    const conv_job *job = arg;
    const qie_conv2d_args *a = job->a;
    const qie_gemm *g = job->g;
    const qie_kernels *kernels = qie_cpu_state_of(job->c)->kernels;
    int64_t n_all = a->w.out, i_rows = (int64_t)index % job->n_row_tasks;
    int64_t n0 = (int64_t)index / job->n_row_tasks * job->task_cols;
    int64_t n = n_all - n0 < job->task_cols ? n_all - n0 : job->task_cols;
    int64_t m0 = job->m * i_rows / job->n_row_tasks,
            m = job->m * (i_rows + 1) / job->n_row_tasks - m0;
    unsigned char *block_a = qie_cpu_thread_scratch(job->c, i_thread);
    float *sums = (float *)(void *)(block_a + QIE_A_BYTES + QIE_B_BYTES), bias[QIE_TASK_COLS];
    const unsigned char *packed = job->c->scratch + n0 * job->units * 4;
    qie_panels panels = qie_panels_make(n, g->vw);
    size_t size = qie_dtype_size(a->dst.dtype);
    if (a->bias.data)
        kernels->convert(bias, QIE_F32,
                         (const unsigned char *)a->bias.data +
                             (size_t)n0 * qie_dtype_size(a->bias.dtype),
                         a->bias.dtype, n);
    qie_epilogue e = {.bias = a->bias.data ? bias : NULL, .ldy = panels.cols, .ldd = n_all};

    qie_gemm_begin(g);
    int64_t block = (int64_t)QIE_K_UNITS * g->unit, n_tiles = qie_ceil_div(m, g->mr);
    for (int64_t k0 = 0; k0 < job->k; k0 += block) {
        int64_t k = job->k - k0 < block ? job->k - k0 : block, steps = qie_ceil_div(k, g->unit);
        for (int64_t t = 0; t < n_tiles; t++) {
            int64_t r0 = m * t / n_tiles, rows = m * (t + 1) / n_tiles - r0;
            float *c = sums + r0 * panels.cols;
            g->gather_a(block_a, &job->gather, m0 + r0, rows, k0, k);
            for (int p = 0; p < panels.n; p++)
                g->tile[QIE_A_ROWS][panels.vectors[p] - 1][rows](
                    steps, block_a, 0,
                    packed +
                        (panels.col[p] * job->units + k0 / g->unit * panels.vectors[p] * g->vw) * 4,
                    c + panels.col[p], panels.cols, NULL, k0 > 0);
            if (k0 + k < job->k)
                continue;
            size_t i = (size_t)((m0 + r0) * n_all + n0) * size;
            e.residual = a->residual.data ? (const unsigned char *)a->residual.data + i : NULL;
            kernels->epilogue(&e, c, (unsigned char *)a->dst.data + i, a->dst.dtype, n, rows);
        }
    }
    qie_gemm_end(g);
}

void qie_cpu_conv2d(qie_compute *c, const qie_conv2d_args *a) {
    if (qie_cpu_winograd_takes(c, a)) {
        qie_cpu_winograd(c, a);
        return;
    }
    conv_job job = {.c = c, .a = a, .g = qie_cpu_gemm(c, a->x.dtype)};
    assert(a->w.in == a->x.c && a->w.out == a->dst.c && a->w.kh == a->w.kw);
    assert(!a->residual.data || a->residual.dtype == a->dst.dtype);
    job.gather = (qie_gather){.data = a->x.data,
                              .dtype = a->x.dtype,
                              .h = a->x.h,
                              .w = a->x.w,
                              .c = a->x.c,
                              .up = a->upsample ? 2 : 1,
                              .kernel = a->w.kh,
                              .stride = a->stride,
                              .pad = a->stride == 1 ? a->w.kh / 2 : 0,
                              .out_w = a->dst.w};
    job.k = (int64_t)a->w.in * a->w.kh * a->w.kw;
    job.units = qie_ceil_div(job.k, job.g->unit);
    assert(qie_cpu_conv_bytes(job.k, a->w.out) <= qie_cpu_state_of(c)->shared_bytes);
    job.m = (int64_t)a->dst.h * a->dst.w;
    int64_t n = a->w.out, macs = job.m * n * job.k, wanted = macs / TASK_MACS;
    if (wanted > MAX_TASKS_WANTED)
        wanted = MAX_TASKS_WANTED;
    job.task_cols = QIE_TASK_COLS;
    int64_t n_col_tasks = qie_ceil_div(n, job.task_cols), most = job.m / MIN_ROWS;
    job.n_row_tasks = qie_ceil_div(wanted, n_col_tasks);
    if (job.n_row_tasks > most)
        job.n_row_tasks = most;
    if (job.n_row_tasks < qie_ceil_div(job.m, QIE_TASK_ROWS))
        job.n_row_tasks = qie_ceil_div(job.m, QIE_TASK_ROWS);
    int n_threads = macs < SERIAL_MACS ? 1 : c->n_threads;
    qie_parallel_for(n * job.k < 1 << 15 ? 1 : n_threads, (size_t)qie_ceil_div(n, 2 * job.g->vw),
                     pack_task, &job);
    qie_parallel_for(n_threads, (size_t)(n_col_tasks * job.n_row_tasks), conv_task, &job);
}
