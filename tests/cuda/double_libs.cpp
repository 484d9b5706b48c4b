/* The libraries' three calls on the CPU: the definition of what they are worth, queued on the
 * double's streams. QIE_CUDA_OWN=1 refuses attention, convolution and scales of rows, so that our
 * own kernels run.
 */
#include <math.h>
#include <stdlib.h>

#include <vector>

extern "C" {
#include "compute/cpu/ref.h"
}
#include "compute/cuda/cu_blocks.hpp"
#include "compute/cuda/cu_libs.hpp"
#include "double.h"

struct qie_cu_libs {
    int device;
    bool own;
};

int qie_cu_libs_create(int device, qie_cu_libs **out) {
    const char *own = getenv("QIE_CUDA_OWN");
    *out = new qie_cu_libs{device, own && *own == '1'};
    return CU_OK;
}

void qie_cu_libs_destroy(qie_cu_libs *l) {
    delete l;
}

static size_t rows_bytes(int64_t rows, int64_t ld, int64_t cols, qie_dtype t) {
    return (size_t)((rows - 1) * ld + cols) * qie_dtype_size(t);
}

static float element(const void *p, qie_dtype t, int64_t i) {
    return cu_weight(static_cast<const unsigned char *>(p), t, i);
}

static void run_gemm(const qie_cu_gemm_args &a) {
    std::vector<float> w((size_t)(a.n * a.k)), x((size_t)a.k);
    for (int64_t c = 0; c < a.n; c++)
        for (int64_t i = 0; i < a.k; i++)
            w[(size_t)(c * a.k + i)] = element(a.w, a.type, c * a.ldw + i);
    for (int64_t r = 0; r < a.m; r++) {
        for (int64_t i = 0; i < a.k; i++)
            x[(size_t)i] = element(a.x, a.type, r * a.ldx + i);
        for (int64_t c = 0; c < a.n; c++) {
            const float *wc = &w[(size_t)(c * a.k)];
            double sum[4] = {0, 0, 0, 0};
            int64_t i = 0;
            for (; i + 4 <= a.k; i += 4)
                for (int j = 0; j < 4; j++)
                    sum[j] += (double)x[(size_t)(i + j)] * (double)wc[i + j];
            for (; i < a.k; i++)
                sum[0] += (double)x[(size_t)i] * (double)wc[i];
            float v = a.alpha * (float)(sum[0] + sum[1] + sum[2] + sum[3]);
            if (a.x_scale)
                v *= a.x_scale[r] * a.w_scale[c];
            int64_t at = r * a.ldy + c;
            if (a.y_type == QIE_I32) {
                static_cast<int32_t *>(a.y)[at] = (int32_t)v;
                continue;
            }
            if (a.beta != 0)
                v += a.beta * qie_ref_load(a.y, a.y_type, at);
            if (a.epilogue == QIE_CU_EPI_BIAS || a.epilogue == QIE_CU_EPI_BIAS_GELU_TANH)
                v += qie_ref_load(a.bias, a.y_type, c);
            if (a.epilogue == QIE_CU_EPI_GELU_TANH || a.epilogue == QIE_CU_EPI_BIAS_GELU_TANH)
                v = qie_ref_act(QIE_ACT_GELU_TANH, v);
            qie_ref_store(a.y, a.y_type, at, v);
        }
    }
}

bool qie_cu_gemm(qie_cu_libs *l, cu_stream s, const qie_cu_gemm_args *a) {
    if ((a->type == QIE_I8 && a->y_type != QIE_I32) ||
        (a->x_scale && (a->type != QIE_F8_E4M3 || !a->w_scale || l->own)))
        return false;
    cu_double_range r[] = {{a->x, rows_bytes(a->m, a->ldx, a->k, a->type)},
                           {a->w, rows_bytes(a->n, a->ldw, a->k, a->type)},
                           {a->y, rows_bytes(a->m, a->ldy, a->n, a->y_type)},
                           {a->workspace, QIE_CU_LIBS_WORKSPACE},
                           {a->x_scale, sizeof(float) * (size_t)a->m},
                           {a->w_scale, sizeof(float) * (size_t)a->n}};
    qie_cu_gemm_args copy = *a;
    cu_double_queue(
        s, [copy]() { run_gemm(copy); }, r, a->x_scale ? 6 : 4);
    return true;
}

static std::vector<float> widen(qie_mat m) {
    std::vector<float> v((size_t)(m.rows * m.cols));
    for (int64_t r = 0; r < m.rows; r++)
        qie_to_f32(&v[(size_t)(r * m.cols)],
                   static_cast<const unsigned char *>(m.data) +
                       (size_t)(r * m.ld) * qie_dtype_size(m.dtype),
                   m.dtype, (size_t)m.cols);
    return v;
}

static void run_sdpa(const qie_attention_args &a) {
    std::vector<float> q = widen(a.q), k = widen(a.k), v = widen(a.v);
    int d = a.head_dim;
    std::vector<double> weights((size_t)a.k.rows), sum((size_t)d);
    for (int64_t r = 0; r < a.q.rows; r++) {
        int64_t from = 0, to = a.causal ? r + 1 + a.k.rows - a.q.rows : a.k.rows;
        for (size_t s = 0; a.segments && s < a.n_segments; s++)
            if (r >= a.segments[s] && r < a.segments[s + 1]) {
                from = a.segments[s];
                to = a.segments[s + 1];
            }
        for (int h = 0; h < a.n_heads; h++) {
            int64_t qa = r * a.q.cols + (int64_t)h * d,
                    ka = (int64_t)(h / (a.n_heads / a.n_kv_heads)) * d;
            double most = -INFINITY, total = 0;
            for (int64_t i = from; i < to; i++) {
                const float *x = &q[(size_t)qa], *y = &k[(size_t)(i * a.k.cols + ka)];
                double dot = 0;
                for (int c = 0; c < d; c++)
                    dot += (double)x[c] * (double)y[c];
                weights[(size_t)i] = dot * (double)a.scale;
                most = weights[(size_t)i] > most ? weights[(size_t)i] : most;
            }
            for (int c = 0; c < d; c++)
                sum[(size_t)c] = 0;
            for (int64_t i = from; i < to; i++) {
                double p = exp(weights[(size_t)i] - most);
                const float *y = &v[(size_t)(i * a.v.cols + ka)];
                total += p;
                for (int c = 0; c < d; c++)
                    sum[(size_t)c] += p * (double)y[c];
            }
            for (int c = 0; c < d; c++)
                qie_ref_store(a.dst.data, a.dst.dtype, r * a.dst.ld + (int64_t)h * d + c,
                              (float)(sum[(size_t)c] / total));
        }
    }
}

bool qie_cu_sdpa(qie_cu_libs *l, cu_stream s, const qie_attention_args *a, const int64_t *bounds,
                 void *workspace) {
    if (l->own)
        return false;
    qie_dtype t = a->q.dtype;
    cu_double_range r[] = {{a->q.data, rows_bytes(a->q.rows, a->q.ld, a->q.cols, t)},
                           {a->k.data, rows_bytes(a->k.rows, a->k.ld, a->k.cols, t)},
                           {a->v.data, rows_bytes(a->v.rows, a->v.ld, a->v.cols, t)},
                           {a->dst.data, rows_bytes(a->dst.rows, a->dst.ld, a->dst.cols, t)},
                           {workspace, QIE_CU_LIBS_WORKSPACE}};
    qie_attention_args copy = *a;
    copy.segments = bounds;
    cu_double_queue(
        s, [copy]() { run_sdpa(copy); }, r, 5);
    return true;
}

const char *qie_cu_libs_note(qie_cu_libs *l) {
    (void)l;
    return NULL;
}

static void run_conv(const qie_conv2d_args &a, const void *weights) {
    int up = a.upsample ? 2 : 1, pad = a.stride == 1 ? a.w.kh / 2 : 0;
    int64_t taps = (int64_t)a.w.kh * a.w.kw;
    std::vector<float> w((size_t)(a.w.out * taps * a.w.in)), x((size_t)a.x.h * a.x.w * a.x.c);
    for (size_t i = 0; i < w.size(); i++)
        w[i] = qie_ref_load(weights, a.x.dtype, (int64_t)i);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = qie_ref_load(a.x.data, a.x.dtype, (int64_t)i);
    for (int y = 0; y < a.dst.h; y++)
        for (int px = 0; px < a.dst.w; px++)
            for (int o = 0; o < a.w.out; o++) {
                double sum = 0;
                for (int ky = 0; ky < a.w.kh; ky++)
                    for (int kx = 0; kx < a.w.kw; kx++) {
                        int sy = y * a.stride + ky - pad, sx = px * a.stride + kx - pad;
                        if (sy < 0 || sx < 0 || sy >= a.x.h * up || sx >= a.x.w * up)
                            continue;
                        const float *xs = &x[((size_t)(sy / up) * a.x.w + sx / up) * a.x.c];
                        const float *ws = &w[((size_t)o * taps + ky * a.w.kw + kx) * a.w.in];
                        float part = 0;
                        for (int i = 0; i < a.w.in; i++)
                            part += xs[i] * ws[i];
                        sum += (double)part;
                    }
                int64_t at = ((int64_t)y * a.dst.w + px) * a.w.out + o;
                float v = (float)sum;
                if (a.bias.data)
                    v += qie_ref_load(a.bias.data, a.bias.dtype, o);
                if (a.residual.data)
                    v += qie_ref_load(a.residual.data, a.residual.dtype, at);
                qie_ref_store(a.dst.data, a.dst.dtype, at, v);
            }
}

bool qie_cu_conv(qie_cu_libs *l, cu_stream s, const qie_conv2d_args *a, const void *w,
                 void *workspace) {
    if (l->own)
        return false;
    size_t n = (size_t)a->w.out * (size_t)a->w.in * (size_t)(a->w.kh * a->w.kw);
    cu_double_range r[] = {
        {a->x.data, (size_t)a->x.h * (size_t)a->x.w * (size_t)a->x.c * qie_dtype_size(a->x.dtype)},
        {a->dst.data,
         (size_t)a->dst.h * (size_t)a->dst.w * (size_t)a->dst.c * qie_dtype_size(a->dst.dtype)},
        {w, n * qie_dtype_size(a->x.dtype)},
        {workspace, QIE_CU_LIBS_WORKSPACE}};
    qie_conv2d_args copy = *a;
    cu_double_queue(
        s, [copy, w]() { run_conv(copy, w); }, r, 4);
    return true;
}
