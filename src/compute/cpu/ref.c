#include "compute/cpu/ref.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "base/parallel.h"
#include "compute/cpu/kernels.h"
#include "compute/cpu/lowrank.h"

float qie_ref_load(const void *data, qie_dtype dtype, int64_t i) {
    float v = 0;
    qie_to_f32(&v, (const unsigned char *)data + (size_t)i * qie_dtype_size(dtype), dtype, 1);
    return v;
}

enum { REF_PIECE = 256 }; /* whole blocks of every type */

void qie_ref_load_weights(float *dst, const qie_wmat *w, int64_t row, int64_t from, int64_t n) {
    const unsigned char *p = w->data;
    p += (size_t)row * qie_dtype_row_bytes(w->dtype, w->k) + qie_dtype_row_bytes(w->dtype, from);
    qie_to_f32(dst, p, w->dtype, (size_t)n);
    if (w->scale)
        for (int64_t i = 0; i < n; i++)
            dst[i] *= w->scale[w->n_scale > 1 ? row : 0];
}

void qie_ref_store(void *data, qie_dtype dtype, int64_t i, float v) {
    if (dtype == QIE_BF16)
        ((qie_bf16 *)data)[i] = qie_f32_to_bf16(v);
    else
        ((float *)data)[i] = v;
}

float qie_ref_act(qie_act act, float v) {
    switch (act) {
    case QIE_ACT_SILU: return v / (1.0f + expf(-v));
    case QIE_ACT_GELU_TANH: /* sqrt(2/pi), 0.044715: torch gelu(approximate="tanh") */
        return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    case QIE_ACT_GELU_ERF: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case QIE_ACT_NONE: break;
    }
    return v;
}

static float store_value(qie_store store, float old, float y, float gate) {
    switch (store) {
    case QIE_STORE_MUL: return old * y;
    case QIE_STORE_ADD: return old + y;
    case QIE_STORE_GATED_ADD: return old + gate * y;
    case QIE_STORE_SET: break;
    }
    return y;
}

/* Column n of the low-rank terms of row r; the room holds x down^T. */
static double lowrank_sum(const qie_linear_args *a, int64_t r, int64_t n) {
    double sum = 0;
    const float *t = a->lowrank_room + r * qie_lowrank_total(a);
    for (size_t i = 0; i < a->n_lowrank; i++) {
        const qie_wmat *up = &a->lowrank[i].up;
        for (int64_t k = 0; k < up->k; k++)
            sum += (double)t[k] * (double)qie_ref_load(up->data, up->dtype, n * up->k + k);
        t += up->k;
    }
    return sum;
}

/* n <= QIE_INT8_BLOCK values as integers; the scale that they were divided by. */
static float int8_block(const void *data, qie_dtype dtype, int64_t from, int64_t n, int32_t *q) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = fabsf(qie_ref_load(data, dtype, from + i));
        if (!isfinite(v))
            return NAN;
        largest = v > largest ? v : largest;
    }
    float inverse = largest >= QIE_I8_LEAST ? 127.0f / largest : 0;
    for (int64_t i = 0; i < n; i++)
        q[i] = (int32_t)lrintf(qie_ref_load(data, dtype, from + i) * inverse);
    return largest >= QIE_I8_LEAST ? largest / 127.0f : 0;
}

/* k weights of row n as integers, a scale for each group of them. */
static void int8_weights(const qie_wmat *w, int64_t n, int64_t k0, int64_t k, int group, int32_t *q,
                         float *scale) {
    int8_t bytes[QIE_INT8_BLOCK];
    const unsigned char *from = (const unsigned char *)w->data +
                                (size_t)n * qie_dtype_row_bytes(w->dtype, w->k) +
                                qie_dtype_row_bytes(w->dtype, k0);
    *scale = 1;
    if (group < QIE_INT8_BLOCK)
        qie_blocks_to_int8(bytes, scale, from, w->dtype, (size_t)k);
    else if (w->dtype == QIE_I8)
        memcpy(bytes, from, (size_t)k);
    else {
        qie_wmat plain = *w; /* its scale comes below */
        float values[QIE_INT8_BLOCK];
        plain.scale = NULL;
        qie_ref_load_weights(values, &plain, n, k0, k);
        *scale = int8_block(values, QIE_F32, 0, k, q);
    }
    if (group < QIE_INT8_BLOCK || w->dtype == QIE_I8)
        for (int64_t i = 0; i < k; i++)
            q[i] = bytes[i]; // NOLINT(bugprone-signed-char-misuse): a number, no character
    if (w->scale)
        *scale *= w->scale[w->n_scale > 1 ? n : 0];
}

/* The definition that every variant meets bit by bit: see kernels.h. */
static float int8_dot(const qie_linear_args *a, int64_t r, int64_t n, int group) {
    float y = 0, w_scale[QIE_I8_GROUPS];
    int32_t x[QIE_INT8_BLOCK] = {0}, w[QIE_INT8_BLOCK] = {0};
    for (int64_t k0 = 0; k0 < a->w.k; k0 += QIE_INT8_BLOCK) {
        int64_t left = a->w.k - k0 < QIE_INT8_BLOCK ? a->w.k - k0 : QIE_INT8_BLOCK;
        int8_weights(&a->w, n, k0, left, group, w, w_scale);
        for (int64_t at = 0; at < left; at += group) {
            int64_t k = left - at < group ? left - at : group;
            float x_scale = int8_block(a->x.data, a->x.dtype, r * a->x.ld + k0 + at, k, x);
            float scale = w_scale[at / group];
            int32_t sum = 0;
            for (int64_t i = 0; i < k && isfinite(x_scale) && isfinite(scale); i++)
                sum += x[i] * w[at + i];
            scale *= x_scale;
            y = k0 + at ? fmaf((float)sum, scale, y) : (float)sum * scale;
        }
    }
    return y;
}

static double float_dot(const qie_linear_args *a, int64_t r, int64_t n) {
    double sum = 0;
    float w[REF_PIECE];
    int64_t k = a->w.k;
    for (int64_t i = 0; i < k; i++) {
        if (i % REF_PIECE == 0)
            qie_ref_load_weights(w, &a->w, n, i, k - i < REF_PIECE ? k - i : REF_PIECE);
        sum +=
            (double)qie_ref_load(a->x.data, a->x.dtype, r * a->x.ld + i) * (double)w[i % REF_PIECE];
    }
    return sum;
}

static void linear_row(void *arg, size_t row, int i_thread) {
    (void)i_thread;
    const qie_linear_args *a = arg;
    int64_t r = (int64_t)row;
    int group = qie_linear_int8_group(a);
    const float *gate = a->gate[r >= a->split];
    for (int64_t n = 0; n < a->w.n; n++) {
        double sum = group ? (double)int8_dot(a, r, n, group) : float_dot(a, r, n);
        if (a->n_lowrank)
            sum += lowrank_sum(a, r, n);
        float y = (float)sum;
        if (a->bias.data)
            y += qie_ref_load(a->bias.data, a->bias.dtype, n);
        y = qie_ref_act(a->act, y);
        int64_t at = r * a->dst.ld + n;
        float old = a->store == QIE_STORE_SET ? 0 : qie_ref_load(a->dst.data, a->dst.dtype, at);
        float g = a->store == QIE_STORE_GATED_ADD ? gate[n] : 0;
        qie_ref_store(a->dst.data, a->dst.dtype, at, store_value(a->store, old, y, g));
    }
}

static void ref_linear(qie_compute *c, const qie_linear_args *a) {
    assert(a->x.cols == a->w.k && a->dst.cols == a->w.n && a->x.rows == a->dst.rows);
    qie_linear_args copy = *a;
    if (a->n_lowrank)
        qie_lowrank_project(c, a);
    qie_parallel_for(c->n_threads, (size_t)a->x.rows, linear_row, &copy);
}

static void ref_rms_norm(qie_compute *c, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    (void)c;
    for (int64_t r = 0; r < x.rows; r++) {
        double sum = 0;
        for (int64_t i = 0; i < x.cols; i++) {
            double v = qie_ref_load(x.data, x.dtype, r * x.ld + i);
            sum += v * v;
        }
        float s = 1.0f / sqrtf((float)(sum / (double)x.cols) + eps);
        for (int64_t i = 0; i < x.cols; i++) {
            float v = qie_ref_load(x.data, x.dtype, r * x.ld + i) * s;
            if (w.data)
                v *= qie_ref_load(w.data, w.dtype, i);
            qie_ref_store(dst.data, dst.dtype, r * dst.ld + i, v);
        }
    }
}

static void ref_layer_norm(qie_compute *c, const qie_layer_norm_args *a) {
    (void)c;
    for (int64_t r = 0; r < a->x.rows; r++) {
        const float *x = (const float *)a->x.data + r * a->x.ld;
        double mean = 0, var = 0;
        for (int64_t i = 0; i < a->x.cols; i++)
            mean += (double)x[i];
        mean /= (double)a->x.cols;
        for (int64_t i = 0; i < a->x.cols; i++)
            var += ((double)x[i] - mean) * ((double)x[i] - mean);
        float s = 1.0f / sqrtf((float)(var / (double)a->x.cols) + a->eps), m = (float)mean;
        const float *scale = a->scale[r >= a->split], *shift = a->shift[r >= a->split];
        for (int64_t i = 0; i < a->x.cols; i++) {
            float v = (x[i] - m) * s;
            if (scale)
                v = v * (1.0f + scale[i]) + shift[i];
            qie_ref_store(a->dst.data, a->dst.dtype, r * a->dst.ld + i, v);
        }
    }
}

static void ref_qk_norm_rope(qie_compute *c, const qie_qk_norm_rope_args *a) {
    (void)c;
    int d = a->head_dim, half = d / 2;
    for (int64_t r = 0; r < a->x.rows; r++)
        for (int h = 0; h < a->n_heads; h++) {
            int64_t base = r * a->x.ld + (int64_t)h * d;
            float s = 1;
            if (a->norm.data) {
                double sum = 0;
                for (int i = 0; i < d; i++) {
                    double v = qie_ref_load(a->x.data, a->x.dtype, base + i);
                    sum += v * v;
                }
                s = 1.0f / sqrtf((float)(sum / d) + a->eps);
            }
            for (int j = 0; j < half; j++) {
                int i0 = a->interleaved ? 2 * j : j, i1 = a->interleaved ? 2 * j + 1 : j + half;
                float x0 = qie_ref_load(a->x.data, a->x.dtype, base + i0);
                float x1 = qie_ref_load(a->x.data, a->x.dtype, base + i1);
                if (a->norm.data) {
                    x0 *= s * qie_ref_load(a->norm.data, a->norm.dtype, i0);
                    x1 *= s * qie_ref_load(a->norm.data, a->norm.dtype, i1);
                }
                float cs = a->cos ? a->cos[r * half + j] : 1,
                      sn = a->cos ? a->sin[r * half + j] : 0;
                qie_ref_store(a->x.data, a->x.dtype, base + i0, x0 * cs - x1 * sn);
                qie_ref_store(a->x.data, a->x.dtype, base + i1, x1 * cs + x0 * sn);
            }
        }
}

/* One query row of one head with a running softmax over keys [from, to): no row of scores is kept.
 */
static void attend(const qie_attention_args *a, int64_t row, int head, int64_t from, int64_t to) {
    enum { MAX_D = 512 };
    int d = a->head_dim, kv = head / (a->n_heads / a->n_kv_heads);
    assert(d <= MAX_D);
    double acc[MAX_D] = {0}, sum = 0;
    float max = -INFINITY;
    for (int64_t key = from; key < to; key++) {
        double dot = 0;
        for (int i = 0; i < d; i++)
            dot +=
                (double)qie_ref_load(a->q.data, a->q.dtype, row * a->q.ld + (int64_t)head * d + i) *
                (double)qie_ref_load(a->k.data, a->k.dtype, key * a->k.ld + (int64_t)kv * d + i);
        float s = (float)dot * a->scale;
        if (s > max) {
            double f = exp((double)max - (double)s);
            sum *= f;
            for (int i = 0; i < d; i++)
                acc[i] *= f;
            max = s;
        }
        double p = exp((double)s - (double)max);
        sum += p;
        for (int i = 0; i < d; i++)
            acc[i] += p * (double)qie_ref_load(a->v.data, a->v.dtype,
                                               key * a->v.ld + (int64_t)kv * d + i);
    }
    for (int i = 0; i < d; i++)
        qie_ref_store(a->dst.data, a->dst.dtype, row * a->dst.ld + (int64_t)head * d + i,
                      (float)(acc[i] / sum));
}

static void attention_row(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const qie_attention_args *a = arg;
    int64_t row = (int64_t)index, from = 0, to = a->k.rows;
    if (a->causal)
        to = row + 1 + a->k.rows - a->q.rows;
    for (size_t s = 0; a->segments && s < a->n_segments; s++)
        if (row >= a->segments[s] && row < a->segments[s + 1]) {
            from = a->segments[s];
            to = a->segments[s + 1];
        }
    for (int h = 0; h < a->n_heads; h++)
        attend(a, row, h, from, to);
}

static void ref_attention(qie_compute *c, const qie_attention_args *a) {
    qie_attention_args copy = *a;
    qie_parallel_for(c->n_threads, (size_t)a->q.rows, attention_row, &copy);
}

static void conv_row(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const qie_conv2d_args *a = arg;
    const qie_conv_weight *w = &a->w;
    int y = (int)index, up = a->upsample ? 2 : 1, pad = a->stride == 1 ? w->kh / 2 : 0;
    int h = a->x.h * up, width = a->x.w * up;
    int64_t taps = (int64_t)w->kt * w->kh * w->kw, last = (int64_t)(w->kt - 1) * w->kh * w->kw;
    for (int x = 0; x < a->dst.w; x++)
        for (int o = 0; o < w->out; o++) {
            double sum = 0;
            for (int ky = 0; ky < w->kh; ky++)
                for (int kx = 0; kx < w->kw; kx++) {
                    int sy = y * a->stride + ky - pad, sx = x * a->stride + kx - pad;
                    if (sy < 0 || sx < 0 || sy >= h || sx >= width)
                        continue;
                    int64_t px = ((int64_t)(sy / up) * a->x.w + sx / up) * a->x.c;
                    for (int i = 0; i < w->in; i++)
                        sum += (double)qie_ref_load(a->x.data, a->x.dtype, px + i) *
                               (double)qie_ref_load(w->data, w->dtype,
                                                    ((int64_t)o * w->in + i) * taps + last +
                                                        (int64_t)ky * w->kw + kx);
                }
            float v = (float)sum;
            if (a->bias.data)
                v += qie_ref_load(a->bias.data, a->bias.dtype, o);
            int64_t at = ((int64_t)y * a->dst.w + x) * w->out + o;
            if (a->residual.data)
                v += qie_ref_load(a->residual.data, a->residual.dtype, at);
            qie_ref_store(a->dst.data, a->dst.dtype, at, v);
        }
}

static void ref_conv2d(qie_compute *c, const qie_conv2d_args *a) {
    qie_conv2d_args copy = *a;
    qie_parallel_for(c->n_threads, (size_t)a->dst.h, conv_row, &copy);
}

static void ref_channel_norm(qie_compute *c, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst) {
    (void)c;
    float root = sqrtf((float)x.c);
    for (int64_t p = 0; p < (int64_t)x.h * x.w; p++) {
        double sum = 0;
        for (int i = 0; i < x.c; i++) {
            double v = qie_ref_load(x.data, x.dtype, p * x.c + i);
            sum += v * v;
        }
        float n = sqrtf((float)sum);
        float s = root / (n > 1e-12f ? n : 1e-12f); /* 1e-12: torch.nn.functional.normalize */
        for (int i = 0; i < x.c; i++) {
            float v = qie_ref_load(x.data, x.dtype, p * x.c + i) * s *
                      qie_ref_load(gamma.data, gamma.dtype, i);
            qie_ref_store(dst.data, dst.dtype, p * x.c + i,
                          silu ? qie_ref_act(QIE_ACT_SILU, v) : v);
        }
    }
}

static void ref_embed(qie_compute *c, qie_wmat table, const int32_t *ids, qie_mat dst) {
    (void)c;
    float w[REF_PIECE];
    for (int64_t r = 0; r < dst.rows; r++)
        for (int64_t i = 0; i < table.k; i++) {
            if (i % REF_PIECE == 0)
                qie_ref_load_weights(w, &table, ids[r], i,
                                     table.k - i < REF_PIECE ? table.k - i : REF_PIECE);
            qie_ref_store(dst.data, dst.dtype, r * dst.ld + i, w[i % REF_PIECE]);
        }
}

static void ref_convert(qie_compute *c, qie_mat src, qie_mat dst) {
    (void)c;
    for (int64_t r = 0; r < src.rows; r++)
        for (int64_t i = 0; i < src.cols; i++)
            qie_ref_store(dst.data, dst.dtype, r * dst.ld + i,
                          qie_ref_load(src.data, src.dtype, r * src.ld + i));
}

static void ref_cfg_combine(qie_compute *c, const float *cond, const float *uncond, float scale,
                            int64_t rows, int64_t cols, float *v) {
    (void)c;
    for (int64_t r = 0; r < rows; r++) {
        const float *p = cond + r * cols, *q = uncond + r * cols;
        float *o = v + r * cols;
        double nc = 0, nm = 0;
        for (int64_t i = 0; i < cols; i++) {
            float m = q[i] + scale * (p[i] - q[i]);
            nc += (double)p[i] * (double)p[i];
            nm += (double)m * (double)m;
        }
        /* The reference divides by zero for an all-zero row; its limit of no guidance is the row
         * itself. */
        float f = nm > 0 ? (float)(sqrt(nc) / sqrt(nm)) : 1.0f;
        for (int64_t i = 0; i < cols; i++)
            o[i] = (q[i] + scale * (p[i] - q[i])) * f;
    }
}

static void ref_axpy(qie_compute *c, float a, const float *x, float *y, int64_t n) {
    (void)c;
    for (int64_t i = 0; i < n; i++)
        y[i] += a * x[i];
}

static bool ref_all_finite(qie_compute *c, const float *v, int64_t n) {
    (void)c;
    /* x * 0 is 0 for finite values only: one pass that the compiler vectorises */
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += v[i] * 0.0f;
    return sum == 0;
}

static void ref_copy(qie_compute *c, void *dst, const void *src, size_t n_bytes) {
    (void)c;
    memcpy(dst, src, n_bytes);
}

void qie_ref_fill(qie_ops *ops) {
    ops->linear = ref_linear;
    ops->rms_norm = ref_rms_norm;
    ops->layer_norm = ref_layer_norm;
    ops->qk_norm_rope = ref_qk_norm_rope;
    ops->attention = ref_attention;
    ops->conv2d = ref_conv2d;
    ops->channel_norm = ref_channel_norm;
    ops->embed = ref_embed;
    ops->convert = ref_convert;
    ops->cfg_combine = ref_cfg_combine;
    ops->axpy = ref_axpy;
    ops->all_finite = ref_all_finite;
    ops->copy = ref_copy;
}
