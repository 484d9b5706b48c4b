#include "compute/op_bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "compute/cpu/onednn_roof.h"

int qie_op_n_dims(const char *op) {
    return !strcmp(op, "linear") ? 3 : !strcmp(op, "attention") || !strcmp(op, "conv2d") ? 7 : 2;
}

double qie_op_gflop(const qie_op_shape *s) {
    const int64_t *d = s->dims;
    if (!strcmp(s->op, "linear"))
        return 2e-9 * (double)d[0] * (double)d[1] * (double)d[2];
    if (!strcmp(s->op, "attention")) {
        double seen = (double)(d[6] ? d[6] : d[1]); /* keys that a query sees, on average */
        if (d[5])
            seen -= (double)(d[0] - 1) / 2;
        return 4e-9 * (double)d[0] * seen * (double)(d[2] * d[4]);
    }
    if (!strcmp(s->op, "conv2d")) {
        int64_t stride = d[5] > 0 ? d[5] : 1;
        double up = d[6] ? 4 : 1, pixels = (double)(d[0] / stride) * (double)(d[1] / stride) * up;
        return 2e-9 * pixels * (double)(d[2] * d[3] * d[4] * d[4]);
    }
    return 0;
}

bool qie_op_equal(const qie_op_shape *a, const qie_op_shape *b) {
    return !strcmp(a->op, b->op) && a->act == b->act && a->weight == b->weight &&
           a->int8 == b->int8 && !memcmp(a->dims, b->dims, sizeof a->dims);
}

/* ---- made-up operands */

static bool floating(qie_dtype t) {
    return t == QIE_F32 || t == QIE_BF16 || t == QIE_F16;
}
static bool quantised(qie_dtype t) {
    return t == QIE_I8 || t == QIE_F8_E4M3 || t == QIE_F8_E5M2 || qie_dtype_block_elements(t) > 1;
}

static void *filled(int64_t n, qie_dtype t) {
    size_t size = qie_dtype_size(t), bytes = qie_dtype_row_bytes(t, n);
    unsigned char *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    uint32_t seed = 1;
    /* Any bytes are weights; these are normal numbers where a block has its scale. */
    for (size_t i = 0; p && quantised(t) && i < bytes; i++) {
        seed = seed * 1664525u + 1013904223u;
        p[i] = (unsigned char)(0x28 | (seed >> 24 & 7));
    }
    if (quantised(t))
        return p;
    for (int64_t i = 0; p && i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        float v = (float)(seed >> 8) / 8388608.0f - 1.0f;
        qie_bf16 h = qie_f32_to_bf16(v);
        /* F16: bits of a bf16 in [-1, 1) are a normal number there, too */
        memcpy(p + (size_t)i * size, t == QIE_F32 ? (void *)&v : (void *)&h, size);
    }
    return p;
}

typedef struct bench {
    qie_compute *c;
    const qie_op_bench_options *o;
    double (*clock_s)(void);
    qie_op_time *out;
} bench;

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static qie_status measure(const bench *b, void (*run)(qie_compute *c, const void *args),
                          const void *args, qie_error *err) {
    int n = b->o->repeats;
    double *t = malloc((size_t)n * sizeof *t);
    QIE_FAIL_IF(!t, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    run(b->c, args);
    for (int i = 0; i < n; i++) {
        double start = b->clock_s();
        run(b->c, args);
        t[i] = b->clock_s() - start;
    }
    qsort(t, (size_t)n, sizeof *t, compare);
    b->out->fastest = t[0];
    b->out->median = t[n / 2];
    free(t);
    return QIE_OK;
}

static void run_linear(qie_compute *c, const void *args) {
    c->ops.linear(c, args);
}
static void run_attention(qie_compute *c, const void *args) {
    c->ops.attention(c, args);
}
static void run_conv2d(qie_compute *c, const void *args) {
    c->ops.conv2d(c, args);
}

static qie_status bench_linear(const bench *b, const qie_op_shape *s, qie_error *err) {
    int64_t m = s->dims[0], n = s->dims[1], k = s->dims[2];
    qie_linear_args a = {
        .x = qie_mat_make(filled(m * k, s->act), s->act, m, k),
        .w = {.data = filled(n * k, s->weight), .dtype = s->weight, .n = n, .k = k},
        .dst = qie_mat_make(filled(m * n, s->act), s->act, m, n),
        .int8 = s->int8,
        .int8_blocks = s->int8};
    double median;
    qie_status st = QIE_OK;
    float *scale = qie_dtype_block_elements(s->weight) == 1 && quantised(s->weight)
                       ? filled(n, QIE_F32)
                       : NULL;
    a.w.scale = scale;
    a.w.n_scale = scale ? n : 0;
    if (!a.x.data || !a.w.data || !a.dst.data)
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (st == QIE_OK && b->o->roof &&
        qie_onednn_time_matmul(s->act, m, n, k, b->c->n_threads, b->o->repeats, b->clock_s,
                               &b->out->roof, &median))
        b->out->roof = 0;
    if (st == QIE_OK)
        st = measure(b, run_linear, &a, err);
    free(scale);
    free(a.x.data);
    free((void *)(uintptr_t)a.w.data);
    free(a.dst.data);
    return st;
}

static qie_status bench_attention(const bench *b, const qie_op_shape *s, qie_error *err) {
    int64_t nq = s->dims[0], nk = s->dims[1], d = s->dims[4], segment = s->dims[6];
    int64_t q_cols = s->dims[2] * d, k_cols = s->dims[3] * d;
    size_t n_segments = segment ? (size_t)((nq + segment - 1) / segment) : 0;
    int64_t *bounds = calloc(n_segments + 1, sizeof *bounds);
    qie_attention_args a = {.q = qie_mat_make(filled(nq * q_cols, s->act), s->act, nq, q_cols),
                            .k = qie_mat_make(filled(nk * k_cols, s->act), s->act, nk, k_cols),
                            .v = qie_mat_make(filled(nk * k_cols, s->act), s->act, nk, k_cols),
                            .n_heads = (int)s->dims[2],
                            .n_kv_heads = (int)s->dims[3],
                            .head_dim = (int)d,
                            .scale = 1.0f / sqrtf((float)d),
                            .causal = s->dims[5] != 0,
                            .segments = segment ? bounds : NULL,
                            .n_segments = n_segments,
                            .dst = qie_mat_make(filled(nq * q_cols, s->act), s->act, nq, q_cols)};
    double fastest, median;
    qie_status st = QIE_OK;
    if (!a.q.data || !a.k.data || !a.v.data || !a.dst.data || !bounds)
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    for (size_t i = 0; st == QIE_OK && i <= n_segments; i++)
        bounds[i] = (int64_t)i * segment < nq ? (int64_t)i * segment : nq;
    if (st == QIE_OK && b->o->roof &&
        !qie_onednn_time_matmul(s->act, 1024, 1024, 1024, b->c->n_threads, b->o->repeats,
                                b->clock_s, &fastest, &median))
        b->out->roof = fastest * qie_op_gflop(s) / (2e-9 * 1024 * 1024 * 1024);
    if (st == QIE_OK)
        st = measure(b, run_attention, &a, err);
    free(bounds);
    free(a.q.data);
    free(a.k.data);
    free(a.v.data);
    free(a.dst.data);
    return st;
}

static qie_status bench_conv2d(const bench *b, const qie_op_shape *s, qie_error *err) {
    int h = (int)s->dims[0], w = (int)s->dims[1], in = (int)s->dims[2], out = (int)s->dims[3];
    int kernel = (int)s->dims[4], stride = (int)s->dims[5], up = s->dims[6] ? 2 : 1;
    int ho = h * up / stride, wo = w * up / stride;
    qie_conv2d_args a = {.x = {filled((int64_t)h * w * in, s->act), s->act, h, w, in},
                         .w = {filled((int64_t)out * in * kernel * kernel, s->weight), s->weight,
                               out, in, 1, kernel, kernel},
                         .stride = stride,
                         .upsample = up == 2,
                         .dst = {filled((int64_t)ho * wo * out, s->act), s->act, ho, wo, out}};
    double median;
    qie_status st = QIE_OK;
    if (!a.x.data || !a.w.data || !a.dst.data)
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (st == QIE_OK && b->o->roof &&
        qie_onednn_time_conv(s->act, h * up, w * up, in, out, kernel, stride, b->c->n_threads,
                             b->o->repeats, b->clock_s, &b->out->roof, &median))
        b->out->roof = 0;
    if (st == QIE_OK)
        st = measure(b, run_conv2d, &a, err);
    free(a.x.data);
    free((void *)(uintptr_t)a.w.data);
    free(a.dst.data);
    return st;
}

qie_status qie_op_bench(qie_compute *c, const qie_op_shape *s, const qie_op_bench_options *o,
                        qie_op_time *out, qie_error *err) {
    static const struct {
        const char *op;
        qie_status (*bench)(const bench *b, const qie_op_shape *s, qie_error *err);
    } ops[] = {{"linear", bench_linear}, {"attention", bench_attention}, {"conv2d", bench_conv2d}};
    memset(out, 0, sizeof *out);
    bench b = {c, o, o->clock_s ? o->clock_s : qie_now_s, out};
    bool weighs = !strcmp(s->op, "linear") && quantised(s->weight) &&
                  s->dims[2] % qie_dtype_block_elements(s->weight) == 0;
    QIE_FAIL_IF((!floating(s->weight) && !weighs) || (s->act != QIE_F32 && s->act != QIE_BF16),
                QIE_E_UNSUPPORTED, err, "dtype", "no made-up values of these types");
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (!strcmp(s->op, ops[i].op))
            return ops[i].bench(&b, s, err);
    return qie_fail(err, QIE_E_UNSUPPORTED, "op", "'%s' is not timed alone", s->op);
}
