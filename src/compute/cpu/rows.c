/* Operations that treat rows one by one: groups of rows are the tasks. */
#include <assert.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"
#include "compute/cpu/quantised.h"

enum {
    TASK_VALUES = 1 << 15,   /* a task's worth of elements: 10 us and more */
    SERIAL_VALUES = 1 << 15, /* less is not worth waking a thread */
};

typedef struct rows_job {
    const qie_kernels *kernels;
    int64_t n_rows, rows_per_task;
    void (*run)(const struct rows_job *job, int64_t from, int64_t to);
    const void *args;
} rows_job;

static void rows_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const rows_job *job = arg;
    int64_t from = (int64_t)index * job->rows_per_task, to = from + job->rows_per_task;
    job->run(job, from, to < job->n_rows ? to : job->n_rows);
}

static void run_rows(qie_compute *c, void (*run)(const rows_job *, int64_t, int64_t),
                     const void *args, int64_t n_rows, int64_t cols) {
    rows_job job = {
        .kernels = qie_cpu_state_of(c)->kernels, .n_rows = n_rows, .run = run, .args = args};
    job.rows_per_task = cols >= TASK_VALUES ? 1 : TASK_VALUES / (cols > 0 ? cols : 1);
    qie_parallel_for(n_rows * cols < SERIAL_VALUES ? 1 : c->n_threads,
                     (size_t)qie_ceil_div(n_rows, job.rows_per_task), rows_task, &job);
}

static void *row_of(const qie_mat *m, int64_t r) {
    return (unsigned char *)m->data + (size_t)(r * m->ld) * qie_dtype_size(m->dtype);
}

typedef struct rms_args {
    qie_mat x, dst;
    qie_vec w;
    float eps;
} rms_args;
static void rms_rows(const rows_job *job, int64_t from, int64_t to) {
    const rms_args *a = job->args;
    for (int64_t r = from; r < to; r++)
        job->kernels->rms_norm(row_of(&a->x, r), a->x.dtype, a->w, a->eps, a->x.cols,
                               row_of(&a->dst, r), a->dst.dtype);
}
static void cpu_rms_norm(qie_compute *c, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    rms_args a = {x, dst, w, eps};
    run_rows(c, rms_rows, &a, x.rows, x.cols);
}

static void layer_norm_rows(const rows_job *job, int64_t from, int64_t to) {
    const qie_layer_norm_args *a = job->args;
    for (int64_t r = from; r < to; r++) {
        int side = r >= a->split;
        job->kernels->layer_norm(row_of(&a->x, r), a->scale[side], a->shift[side], a->eps,
                                 a->x.cols, row_of(&a->dst, r), a->dst.dtype);
    }
}
static void cpu_layer_norm(qie_compute *c, const qie_layer_norm_args *a) {
    run_rows(c, layer_norm_rows, a, a->x.rows, a->x.cols);
}

typedef struct rope_args {
    const qie_qk_norm_rope_args *a;
    const float *norm;
} rope_args;
static void rope_rows(const rows_job *job, int64_t from, int64_t to) {
    const rope_args *p = job->args;
    const qie_qk_norm_rope_args *a = p->a;
    int64_t half = a->head_dim / 2;
    for (int64_t r = from; r < to; r++)
        job->kernels->qk_norm_rope(row_of(&a->x, r), a->x.dtype, a->n_heads, a->head_dim, p->norm,
                                   a->eps, a->cos ? a->cos + r * half : NULL,
                                   a->cos ? a->sin + r * half : NULL, a->interleaved);
}
static void cpu_qk_norm_rope(qie_compute *c, const qie_qk_norm_rope_args *a) {
    float norm[512]; /* largest head */
    assert(a->head_dim <= 512 && a->head_dim % 2 == 0);
    if (a->norm.data)
        qie_cpu_state_of(c)->kernels->convert(norm, QIE_F32, a->norm.data, a->norm.dtype,
                                              a->head_dim);
    rope_args p = {a, a->norm.data ? norm : NULL};
    run_rows(c, rope_rows, &p, a->x.rows, (int64_t)a->n_heads * a->head_dim);
}

typedef struct channel_args {
    qie_fmap x, dst;
    const float *gamma;
    bool silu;
} channel_args;
static void channel_rows(const rows_job *job, int64_t from, int64_t to) {
    const channel_args *a = job->args;
    size_t at = (size_t)(from * a->x.c);
    job->kernels->channel_norm((const unsigned char *)a->x.data + at * qie_dtype_size(a->x.dtype),
                               a->x.dtype, a->gamma, a->silu, a->x.c, to - from,
                               (unsigned char *)a->dst.data + at * qie_dtype_size(a->dst.dtype),
                               a->dst.dtype);
}
static void cpu_channel_norm(qie_compute *c, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst) {
    float *g = (float *)qie_cpu_thread_scratch(c, 0);
    assert((size_t)x.c * 4 <= qie_cpu_state_of(c)->thread_bytes);
    qie_cpu_state_of(c)->kernels->convert(g, QIE_F32, gamma.data, gamma.dtype, x.c);
    channel_args a = {x, dst, g, silu};
    run_rows(c, channel_rows, &a, (int64_t)x.h * x.w, x.c);
}

typedef struct embed_args {
    qie_wmat table;
    const int32_t *ids;
    qie_mat dst;
} embed_args;
static void embed_rows(const rows_job *job, int64_t from, int64_t to) {
    const embed_args *a = job->args;
    bool plain = qie_weights_are_plain(&a->table);
    enum { PIECE = 1024 };
    float piece[PIECE];
    for (int64_t r = from; r < to; r++)
        for (int64_t k0 = 0, k; k0 < a->table.k; k0 += k) {
            const void *src = qie_weight_at(&a->table, a->ids[r], k0);
            unsigned char *dst = row_of(&a->dst, r);
            dst += (size_t)k0 * qie_dtype_size(a->dst.dtype);
            k = plain || a->table.k - k0 < PIECE ? a->table.k - k0 : PIECE;
            if (!plain)
                qie_load_panel(job->kernels, &a->table, a->ids[r], 1, k0, k, piece, k);
            job->kernels->convert(dst, a->dst.dtype, plain ? src : piece,
                                  plain ? a->table.dtype : QIE_F32, k);
        }
}
static void cpu_embed(qie_compute *c, qie_wmat table, const int32_t *ids, qie_mat dst) {
    embed_args a = {table, ids, dst};
    run_rows(c, embed_rows, &a, dst.rows, table.k);
}

typedef struct convert_args {
    qie_mat src, dst;
} convert_args;
static void convert_rows(const rows_job *job, int64_t from, int64_t to) {
    const convert_args *a = job->args;
    for (int64_t r = from; r < to; r++)
        job->kernels->convert(row_of(&a->dst, r), a->dst.dtype, row_of(&a->src, r), a->src.dtype,
                              a->src.cols);
}
static void cpu_convert(qie_compute *c, qie_mat src, qie_mat dst) {
    convert_args a = {src, dst};
    run_rows(c, convert_rows, &a, src.rows, src.cols);
}

typedef struct cfg_args {
    const float *cond, *uncond;
    float scale, *v;
    int64_t cols;
} cfg_args;
static void cfg_rows(const rows_job *job, int64_t from, int64_t to) {
    const cfg_args *a = job->args;
    for (int64_t r = from; r < to; r++)
        job->kernels->cfg_combine(a->cond + r * a->cols, a->uncond + r * a->cols, a->scale, a->cols,
                                  a->v + r * a->cols);
}
static void cpu_cfg_combine(qie_compute *c, const float *cond, const float *uncond, float scale,
                            int64_t rows, int64_t cols, float *v) {
    cfg_args a = {cond, uncond, scale, v, cols};
    run_rows(c, cfg_rows, &a, rows, cols);
}

void qie_cpu_fill_rows(qie_ops *ops) {
    ops->rms_norm = cpu_rms_norm;
    ops->layer_norm = cpu_layer_norm;
    ops->qk_norm_rope = cpu_qk_norm_rope;
    ops->channel_norm = cpu_channel_norm;
    ops->embed = cpu_embed;
    ops->convert = cpu_convert;
    ops->cfg_combine = cpu_cfg_combine;
}
