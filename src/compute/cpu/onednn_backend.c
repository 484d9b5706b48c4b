/* oneDNN primitives run on fixed tiles, each on one thread, so that results do not depend on how
 * many there are: left to itself oneDNN cuts the work by the number of threads. Scratch is ours
 * (user mode), because a primitive made on one thread and run on another must not use the library's
 * thread-local one. Whatever oneDNN refuses (bf16 on old processors) falls back to plain C. */
#include "compute/cpu/onednn_backend.h"

#include <stdlib.h>
#include <string.h>

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include "base/error.h"
#include "base/parallel.h"
#include "compute/cpu/lowrank.h"
#include "compute/cpu/ref.h"

enum {
    ROWS = 256, /* tile of linear */
    COLS = 64,
    PIXELS = 16,      /* side of a convolution's tile */
    LIBRARY = 8 << 20 /* bytes a thread for oneDNN's own scratch */
};

typedef struct onednn_state {
    dnnl_engine_t engine;
    size_t shared_bytes, input_bytes, sums_bytes, thread_bytes;
} onednn_state;

/* A primitive and what it wants to know about memory. */
typedef struct kernel {
    dnnl_primitive_desc_t pd;
    dnnl_primitive_t primitive;
} kernel;

static size_t round_up(size_t n) {
    return (n + 63) / 64 * 64;
}

static onednn_state plan(const qie_compute_limits *l) {
    onednn_state s = {0};
    size_t conv_weights = (size_t)(l->max_conv_k + 64 * 9) * (size_t)(l->max_conv_n + 64) * 4;
    s.shared_bytes = 2 * round_up(conv_weights);
    size_t side = 2 * PIXELS + 1, weights = (size_t)l->max_k * COLS * 4;
    size_t tile3 = side * side * (size_t)(l->max_conv_k / 9 + 1) * 4;
    size_t tile1 = (size_t)(PIXELS * PIXELS) * (size_t)l->max_conv_k * 4;
    s.input_bytes = weights > tile3 ? weights : tile3;
    s.input_bytes = round_up(s.input_bytes > tile1 ? s.input_bytes : tile1);
    s.sums_bytes = round_up((size_t)(PIXELS * PIXELS) *
                            (size_t)(l->max_conv_n > COLS ? l->max_conv_n : COLS) * 4);
    s.thread_bytes = s.input_bytes + s.sums_bytes + LIBRARY;
    return s;
}

size_t qie_onednn_scratch_bytes(int n_threads, const qie_compute_limits *limits) {
    onednn_state s = plan(limits);
    return s.shared_bytes + (size_t)(n_threads < 1 ? 1 : n_threads) * s.thread_bytes;
}

static dnnl_data_type_t type_of(qie_dtype t) {
    return t == QIE_BF16 ? dnnl_bf16 : dnnl_f32;
}

static void kernel_release(kernel *k) {
    if (k->primitive)
        dnnl_primitive_destroy(k->primitive);
    if (k->pd)
        dnnl_primitive_desc_destroy(k->pd);
    memset(k, 0, sizeof *k);
}

static bool kernel_create(kernel *k, const onednn_state *s, const_dnnl_op_desc_t op) {
    dnnl_primitive_attr_t attr = NULL;
    memset(k, 0, sizeof *k);
    bool ok =
        dnnl_primitive_attr_create(&attr) == dnnl_success &&
        dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user) == dnnl_success &&
        dnnl_primitive_desc_create(&k->pd, op, attr, s->engine, NULL) == dnnl_success &&
        dnnl_primitive_create(&k->primitive, k->pd) == dnnl_success &&
        dnnl_memory_desc_get_size(
            dnnl_primitive_desc_query_md(k->pd, dnnl_query_scratchpad_md, 0)) <= LIBRARY;
    if (attr)
        dnnl_primitive_attr_destroy(attr);
    if (!ok)
        kernel_release(k);
    return ok;
}

/* Run on this thread. Failure here would be a broken promise of oneDNN's (it accepted the shape):
 * give up. */
static void kernel_run(const kernel *k, const onednn_state *s, void *src, void *weights, void *dst,
                       void *library) {
    dnnl_memory_t memory[4];
    dnnl_stream_t stream;
    void *data[4] = {src, weights, dst, library};
    const dnnl_query_t what[4] = {dnnl_query_src_md, dnnl_query_weights_md, dnnl_query_dst_md,
                                  dnnl_query_scratchpad_md};
    const int arg[4] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST, DNNL_ARG_SCRATCHPAD};
    dnnl_exec_arg_t args[4];
    if (dnnl_stream_create(&stream, s->engine, dnnl_stream_default_flags) != dnnl_success)
        abort();
    for (int i = 0; i < 4; i++) {
        if (dnnl_memory_create(&memory[i], dnnl_primitive_desc_query_md(k->pd, what[i], 0),
                               s->engine, data[i]) != dnnl_success)
            abort();
        args[i] = (dnnl_exec_arg_t){arg[i], memory[i]};
    }
    if (dnnl_primitive_execute(k->primitive, stream, 4, args) != dnnl_success ||
        dnnl_stream_wait(stream) != dnnl_success)
        abort();
    for (int i = 0; i < 4; i++)
        dnnl_memory_destroy(memory[i]);
    dnnl_stream_destroy(stream);
}

/* oneDNN looks at OpenMP's setting when it makes and when it runs a primitive outside a parallel
 * region. */
static int one_thread_begin(void) {
    int before = omp_get_max_threads();
    omp_set_num_threads(1);
    return before;
}

/* n elements of any type to F32 or BF16. */
static void convert(void *dst, qie_dtype to, const void *src, qie_dtype from, int64_t n) {
    if (to == from)
        memcpy(dst, src, (size_t)n * qie_dtype_size(to));
    else
        for (int64_t i = 0; i < n; i++)
            qie_ref_store(dst, to, i, qie_ref_load(src, from, i));
}

/* Rows [n0, n0 + n) of a weight as F32 or BF16, dense. */
static void load_rows(void *dst, qie_dtype to, const qie_wmat *w, int64_t n0, int64_t n) {
    enum { PIECE = 256 };
    float v[PIECE];
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < w->k; i += PIECE) {
            int64_t len = w->k - i < PIECE ? w->k - i : PIECE;
            qie_ref_load_weights(v, w, n0 + r, i, len);
            convert((unsigned char *)dst + (size_t)(r * w->k + i) * qie_dtype_size(to), to, v,
                    QIE_F32, len);
        }
}

typedef struct linear_job {
    qie_compute *c;
    const onednn_state *s;
    const qie_linear_args *a;
    kernel kernels[2][2]; /* [last rows][last columns] */
    int64_t n_row_tasks;
} linear_job;

/* Low-rank terms of a tile; `room` holds COLS floats at least. */
static void add_lowrank(const qie_linear_args *a, float *room, int64_t m0, int64_t m, int64_t n0,
                        int64_t n, float *sums) {
    int64_t total = qie_lowrank_total(a), at = 0;
    for (size_t l = 0; l < a->n_lowrank; l++) {
        const qie_wmat *up = &a->lowrank[l].up;
        for (int64_t k = 0; k < up->k; k++) {
            for (int64_t i = 0; i < n; i++)
                room[i] = qie_ref_load(up->data, up->dtype, (n0 + i) * up->k + k);
            for (int64_t r = 0; r < m; r++) {
                float t = a->lowrank_room[(m0 + r) * total + at + k];
                for (int64_t i = 0; i < n; i++)
                    sums[r * n + i] += t * room[i];
            }
        }
        at += up->k;
    }
}

static void linear_task(void *arg, size_t index, int i_thread) {
    const linear_job *job = arg;
    const qie_linear_args *a = job->a;
    const onednn_state *s = job->s;
    int64_t m0 = (int64_t)index % job->n_row_tasks * ROWS,
            n0 = (int64_t)index / job->n_row_tasks * COLS;
    int64_t m = a->x.rows - m0 < ROWS ? a->x.rows - m0 : ROWS,
            n = a->w.n - n0 < COLS ? a->w.n - n0 : COLS;
    unsigned char *scratch = job->c->scratch + s->shared_bytes + (size_t)i_thread * s->thread_bytes;
    float *sums = (float *)(void *)(scratch + s->input_bytes);
    const unsigned char *w =
        (const unsigned char *)a->w.data + (size_t)n0 * qie_dtype_row_bytes(a->w.dtype, a->w.k);
    /* Unaligned mappings are copied too: oneDNN wants whole elements at least. */
    if (a->w.dtype != a->x.dtype || (uintptr_t)w % qie_dtype_size(a->w.dtype)) {
        load_rows(scratch, a->x.dtype, &a->w, n0, n);
        w = scratch;
    }
    kernel_run(&job->kernels[m < ROWS][n < COLS], s,
               (unsigned char *)a->x.data + (size_t)(m0 * a->x.ld) * qie_dtype_size(a->x.dtype),
               (void *)w, sums, scratch + s->input_bytes + s->sums_bytes);
    if (a->n_lowrank)
        add_lowrank(a, (float *)(void *)scratch, m0, m, n0, n, sums);
    for (int64_t r = m0; r < m0 + m; r++)
        for (int64_t i = 0; i < n; i++) {
            float y = sums[(r - m0) * n + i];
            if (a->bias.data)
                y += qie_ref_load(a->bias.data, a->bias.dtype, n0 + i);
            y = qie_ref_act(a->act, y);
            int64_t at = r * a->dst.ld + n0 + i;
            if (a->store == QIE_STORE_MUL)
                y *= qie_ref_load(a->dst.data, a->dst.dtype, at);
            else if (a->store == QIE_STORE_ADD)
                y += qie_ref_load(a->dst.data, a->dst.dtype, at);
            else if (a->store == QIE_STORE_GATED_ADD)
                y = qie_ref_load(a->dst.data, a->dst.dtype, at) +
                    a->gate[r >= a->split][n0 + i] * y;
            qie_ref_store(a->dst.data, a->dst.dtype, at, y);
        }
}

static bool make_matmul(kernel *k, const onednn_state *s, const qie_linear_args *a, int64_t m,
                        int64_t n) {
    dnnl_dims_t src_dims = {m, a->w.k}, weight_dims = {a->w.k, n}, dst_dims = {m, n};
    dnnl_dims_t src_strides = {a->x.ld, 1}, weight_strides = {1, a->w.k}, dst_strides = {n, 1};
    dnnl_memory_desc_t src, weights, dst;
    dnnl_matmul_desc_t op;
    dnnl_data_type_t t = type_of(a->x.dtype);
    return dnnl_memory_desc_init_by_strides(&src, 2, src_dims, t, src_strides) == dnnl_success &&
           dnnl_memory_desc_init_by_strides(&weights, 2, weight_dims, t, weight_strides) ==
               dnnl_success &&
           dnnl_memory_desc_init_by_strides(&dst, 2, dst_dims, dnnl_f32, dst_strides) ==
               dnnl_success &&
           dnnl_matmul_desc_init(&op, &src, &weights, NULL, &dst) == dnnl_success &&
           kernel_create(k, s, &op);
}

static void plain(qie_compute *c, const qie_linear_args *linear, const qie_conv2d_args *conv) {
    qie_ops ref;
    qie_ref_fill(&ref);
    if (linear)
        ref.linear(c, linear);
    else
        ref.conv2d(c, conv);
}

static void onednn_linear(qie_compute *c, const qie_linear_args *a) {
    linear_job job = {.c = c, .s = c->state, .a = a, .n_row_tasks = (a->x.rows + ROWS - 1) / ROWS};
    int64_t n_col_tasks = (a->w.n + COLS - 1) / COLS;
    if (a->n_lowrank && a->x.rows > 0)
        qie_lowrank_project(c, a);
    int before = one_thread_begin();
    bool ok = a->x.rows > 0;
    for (int i = 0; i < 4 && ok; i++) {
        int64_t m = i & 1 ? a->x.rows % ROWS : ROWS, n = i & 2 ? a->w.n % COLS : COLS;
        if (m && n && m <= a->x.rows && n <= a->w.n)
            ok = make_matmul(&job.kernels[i & 1][i >> 1], job.s, a, m, n);
    }
    if (ok)
        qie_parallel_for(c->n_threads, (size_t)(job.n_row_tasks * n_col_tasks), linear_task, &job);
    else
        plain(c, a, NULL);
    omp_set_num_threads(before);
    for (int i = 0; i < 4; i++)
        kernel_release(&job.kernels[i & 1][i >> 1]);
}

typedef struct conv_job {
    qie_compute *c;
    const onednn_state *s;
    const qie_conv2d_args *a;
    kernel kernel;
    void *weights;
    int side, n_x; /* of an input tile; tiles in a row */
} conv_job;

static void conv_task(void *arg, size_t index, int i_thread) {
    const conv_job *job = arg;
    const qie_conv2d_args *a = job->a;
    const onednn_state *s = job->s;
    int y0 = (int)index / job->n_x * PIXELS, x0 = (int)index % job->n_x * PIXELS,
        up = a->upsample ? 2 : 1;
    int pad = a->stride == 1 ? a->w.kh / 2 : 0, n = a->w.out;
    unsigned char *input = job->c->scratch + s->shared_bytes + (size_t)i_thread * s->thread_bytes;
    float *sums = (float *)(void *)(input + s->input_bytes);
    size_t pixel = (size_t)a->x.c * qie_dtype_size(a->x.dtype);
    for (int y = 0; y < job->side; y++)
        for (int x = 0; x < job->side; x++) {
            int sy = y0 * a->stride + y - pad, sx = x0 * a->stride + x - pad;
            unsigned char *to = input + (size_t)(y * job->side + x) * pixel;
            if (sy < 0 || sx < 0 || sy >= a->x.h * up || sx >= a->x.w * up)
                memset(to, 0, pixel);
            else
                memcpy(to,
                       (const unsigned char *)a->x.data +
                           (size_t)((sy / up) * a->x.w + sx / up) * pixel,
                       pixel);
        }
    kernel_run(&job->kernel, s, input, job->weights, sums, input + s->input_bytes + s->sums_bytes);
    for (int y = y0; y < y0 + PIXELS && y < a->dst.h; y++)
        for (int x = x0; x < x0 + PIXELS && x < a->dst.w; x++)
            for (int o = 0; o < n; o++) {
                float v = sums[((y - y0) * PIXELS + x - x0) * n + o];
                int64_t at = ((int64_t)y * a->dst.w + x) * n + o;
                if (a->bias.data)
                    v += qie_ref_load(a->bias.data, a->bias.dtype, o);
                if (a->residual.data)
                    v += qie_ref_load(a->residual.data, a->residual.dtype, at);
                qie_ref_store(a->dst.data, a->dst.dtype, at, v);
            }
}

/* The used slice of the weights to `plain_weights`, then to the primitive's layout. */
static bool load_weights(conv_job *job, unsigned char *plain_weights, unsigned char *packed,
                         size_t room) {
    const qie_conv_weight *w = &job->a->w;
    const dnnl_memory_desc_t *want =
        dnnl_primitive_desc_query_md(job->kernel.pd, dnnl_query_weights_md, 0);
    qie_dtype t = job->a->x.dtype;
    int64_t slice = (int64_t)w->kh * w->kw;
    for (int64_t i = 0; i < (int64_t)w->out * w->in; i++)
        convert(plain_weights + (size_t)(i * slice) * qie_dtype_size(t), t,
                (const unsigned char *)w->data +
                    (size_t)((i * w->kt + w->kt - 1) * slice) * qie_dtype_size(w->dtype),
                w->dtype, slice);
    if (dnnl_memory_desc_get_size(want) > room)
        return false;
    dnnl_dims_t dims = {w->out, w->in, w->kh, w->kw};
    dnnl_memory_desc_t md;
    dnnl_memory_t from = NULL, to = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t reorder = NULL;
    dnnl_stream_t stream = NULL;
    bool ok =
        dnnl_memory_desc_init_by_tag(&md, 4, dims, type_of(t), dnnl_oihw) == dnnl_success &&
        dnnl_memory_create(&from, &md, job->s->engine, plain_weights) == dnnl_success &&
        dnnl_memory_create(&to, want, job->s->engine, packed) == dnnl_success &&
        dnnl_reorder_primitive_desc_create(&pd, &md, job->s->engine, want, job->s->engine, NULL) ==
            dnnl_success &&
        dnnl_primitive_create(&reorder, pd) == dnnl_success &&
        dnnl_stream_create(&stream, job->s->engine, dnnl_stream_default_flags) == dnnl_success;
    if (ok) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
        ok = dnnl_primitive_execute(reorder, stream, 2, args) == dnnl_success &&
             dnnl_stream_wait(stream) == dnnl_success;
    }
    if (stream)
        dnnl_stream_destroy(stream);
    if (reorder)
        dnnl_primitive_destroy(reorder);
    if (pd)
        dnnl_primitive_desc_destroy(pd);
    if (to)
        dnnl_memory_destroy(to);
    if (from)
        dnnl_memory_destroy(from);
    job->weights = packed;
    return ok;
}

static bool make_conv(conv_job *job) {
    const qie_conv2d_args *a = job->a;
    job->side = (PIXELS - 1) * a->stride + a->w.kh;
    dnnl_dims_t src_dims = {1, a->w.in, job->side, job->side};
    dnnl_dims_t weight_dims = {a->w.out, a->w.in, a->w.kh, a->w.kw},
                dst_dims = {1, a->w.out, PIXELS, PIXELS};
    dnnl_dims_t strides = {a->stride, a->stride}, none = {0, 0};
    dnnl_memory_desc_t src, weights, dst;
    dnnl_convolution_desc_t op;
    dnnl_data_type_t t = type_of(a->x.dtype);
    return dnnl_memory_desc_init_by_tag(&src, 4, src_dims, t, dnnl_nhwc) == dnnl_success &&
           dnnl_memory_desc_init_by_tag(&weights, 4, weight_dims, t, dnnl_format_tag_any) ==
               dnnl_success &&
           dnnl_memory_desc_init_by_tag(&dst, 4, dst_dims, dnnl_f32, dnnl_nhwc) == dnnl_success &&
           dnnl_convolution_forward_desc_init(&op, dnnl_forward_inference, dnnl_convolution_direct,
                                              &src, &weights, NULL, &dst, strides, none,
                                              none) == dnnl_success &&
           kernel_create(&job->kernel, job->s, &op);
}

static void onednn_conv2d(qie_compute *c, const qie_conv2d_args *a) {
    conv_job job = {.c = c, .s = c->state, .a = a, .n_x = (a->dst.w + PIXELS - 1) / PIXELS};
    size_t half = job.s->shared_bytes / 2, pixel = (size_t)a->x.c * qie_dtype_size(a->x.dtype);
    int n_y = (a->dst.h + PIXELS - 1) / PIXELS, before = one_thread_begin();
    bool ok = make_conv(&job) && (size_t)(job.side * job.side) * pixel <= job.s->input_bytes &&
              load_weights(&job, c->scratch, c->scratch + half, half);
    if (ok)
        qie_parallel_for(c->n_threads, (size_t)(job.n_x * n_y), conv_task, &job);
    else
        plain(c, NULL, a);
    omp_set_num_threads(before);
    kernel_release(&job.kernel);
}

static void release(void *state) {
    onednn_state *s = state;
    if (s && s->engine)
        dnnl_engine_destroy(s->engine);
    free(s);
}

qie_status qie_onednn_init(qie_compute *c, const qie_compute_limits *limits, qie_error *err) {
    onednn_state *s = malloc(sizeof *s);
    QIE_FAIL_IF(!s, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    *s = plan(limits);
    c->state = s;
    c->release_state = release;
    QIE_FAIL_IF(dnnl_engine_create(&s->engine, dnnl_cpu, 0) != dnnl_success, QIE_E_INTERNAL, err,
                NULL, "oneDNN has no engine for this processor");
    c->ops.linear = onednn_linear;
    c->ops.conv2d = onednn_conv2d;
    return QIE_OK;
}
