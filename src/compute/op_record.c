#include "compute/op_record.h"

#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/trace.h"

static qie_op_shape shape_of(const char *op, qie_dtype act, qie_dtype weight) {
    qie_op_shape s;
    memset(&s, 0, sizeof s);
    snprintf(s.op, sizeof s.op, "%s", op);
    s.act = act;
    s.weight = weight;
    return s;
}

static void trace(const qie_op_shape *s, double started) {
    char dims[8 * QIE_OP_DIMS] = "";
    size_t n = 0;
    for (int i = 0; i < qie_op_n_dims(s->op) && n < sizeof dims; i++)
        n += (size_t)snprintf(dims + n, sizeof dims - n, " %lld", (long long)s->dims[i]);
    qie_trace_span("operation", started, "%s%s", s->op, dims);
}

static void note(qie_op_record *r, const qie_op_shape *s, double started) {
    double seconds = qie_now_s() - started;
    if (qie_trace_on())
        trace(s, started);
    for (size_t i = 0; i < r->n; i++)
        if (r->uses[i].group == r->group && qie_op_equal(&r->uses[i].shape, s)) {
            r->uses[i].calls++;
            r->uses[i].seconds += seconds;
            return;
        }
    if (r->n == QIE_MAX_OP_USES) {
        r->n_lost++;
        return;
    }
    r->uses[r->n++] = (qie_op_use){.shape = *s, .group = r->group, .calls = 1, .seconds = seconds};
}

static void note_rows(qie_op_record *r, const char *op, qie_dtype act, int64_t rows, int64_t cols,
                      double started) {
    qie_op_shape s = shape_of(op, act, act);
    s.dims[0] = rows;
    s.dims[1] = cols;
    note(r, &s, started);
}

static void note_linear(qie_op_record *r, const qie_linear_args *a, double started) {
    qie_op_shape s = shape_of("linear", a->x.dtype, a->w.dtype);
    s.dims[0] = a->x.rows;
    s.dims[1] = a->w.n;
    s.dims[2] = a->w.k;
    s.int8 = qie_linear_int8_group(a) > 0;
    note(r, &s, started);
}

static void linear(qie_compute *c, const qie_linear_args *a) {
    double t = qie_now_s();
    c->record->own.linear(c, a);
    note_linear(c->record, a, t);
}

/* As the product that it mostly is. */
static void linear_norm(qie_compute *c, const qie_linear_args *a, const qie_layer_norm_args *n) {
    double t = qie_now_s();
    c->record->own.linear_norm(c, a, n);
    note_linear(c->record, a, t);
}

static void attention(qie_compute *c, const qie_attention_args *a) {
    double t = qie_now_s();
    c->record->own.attention(c, a);
    qie_op_shape s = shape_of("attention", a->q.dtype, a->q.dtype);
    int64_t dims[QIE_OP_DIMS] = {
        a->q.rows, a->k.rows, a->n_heads, a->n_kv_heads, a->head_dim, a->causal,
        /* windows differ by a cell at the edges: their mean tells the work */
        a->segments && a->n_segments > 1 ? a->q.rows / (int64_t)a->n_segments : 0};
    memcpy(s.dims, dims, sizeof dims);
    note(c->record, &s, t);
}

static void conv2d(qie_compute *c, const qie_conv2d_args *a) {
    double t = qie_now_s();
    c->record->own.conv2d(c, a);
    qie_op_shape s = shape_of("conv2d", a->x.dtype, a->w.dtype);
    int64_t dims[QIE_OP_DIMS] = {a->x.h,  a->x.w,    a->w.in,    a->w.out,
                                 a->w.kh, a->stride, a->upsample};
    memcpy(s.dims, dims, sizeof dims);
    note(c->record, &s, t);
}

static void rms_norm(qie_compute *c, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    double t = qie_now_s();
    c->record->own.rms_norm(c, x, w, eps, dst);
    note_rows(c->record, "rms_norm", x.dtype, x.rows, x.cols, t);
}

static void layer_norm(qie_compute *c, const qie_layer_norm_args *a) {
    double t = qie_now_s();
    c->record->own.layer_norm(c, a);
    note_rows(c->record, "layer_norm", a->x.dtype, a->x.rows, a->x.cols, t);
}

static void qk_norm_rope(qie_compute *c, const qie_qk_norm_rope_args *a) {
    double t = qie_now_s();
    c->record->own.qk_norm_rope(c, a);
    note_rows(c->record, "qk_norm_rope", a->x.dtype, a->x.rows, (int64_t)a->n_heads * a->head_dim,
              t);
}

static void channel_norm(qie_compute *c, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst) {
    double t = qie_now_s();
    c->record->own.channel_norm(c, x, gamma, silu, dst);
    note_rows(c->record, "channel_norm", x.dtype, (int64_t)x.h * x.w, x.c, t);
}

static void embed(qie_compute *c, qie_wmat table, const int32_t *ids, qie_mat dst) {
    double t = qie_now_s();
    c->record->own.embed(c, table, ids, dst);
    note_rows(c->record, "embed", table.dtype, dst.rows, dst.cols, t);
}

static void convert(qie_compute *c, qie_mat src, qie_mat dst) {
    double t = qie_now_s();
    c->record->own.convert(c, src, dst);
    note_rows(c->record, "convert", src.dtype, src.rows, src.cols, t);
}

static void cfg_combine(qie_compute *c, const float *cond, const float *uncond, float scale,
                        int64_t rows, int64_t cols, float *v) {
    double t = qie_now_s();
    c->record->own.cfg_combine(c, cond, uncond, scale, rows, cols, v);
    note_rows(c->record, "cfg_combine", QIE_F32, rows, cols, t);
}

void qie_op_record_begin(qie_compute *c, qie_op_record *r) {
    memset(r, 0, sizeof *r);
    r->own = c->ops;
    c->record = r;
    /* What a back end adds to the table without a line here is called as before, unnoted. */
    c->ops.linear = linear;
    if (r->own.linear_norm)
        c->ops.linear_norm = linear_norm;
    c->ops.attention = attention;
    c->ops.conv2d = conv2d;
    c->ops.rms_norm = rms_norm;
    c->ops.layer_norm = layer_norm;
    c->ops.qk_norm_rope = qk_norm_rope;
    c->ops.channel_norm = channel_norm;
    c->ops.embed = embed;
    c->ops.convert = convert;
    c->ops.cfg_combine = cfg_combine;
}

void qie_op_record_end(qie_compute *c) {
    if (c->record)
        c->ops = c->record->own;
    c->record = NULL;
}
