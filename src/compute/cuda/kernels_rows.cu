/* Kernels that need a whole row at a time: norms, rotary embedding, guidance. One warp a row, eight
 * rows a block: a row is read from memory once and again from L1, written once. */
#include "compute/cuda/cu_device.hpp"
#include "compute/cuda/cu_kernels.hpp"

#define WARPS 8
#define THREADS (WARPS * 32)

CU_INLINE int64_t cu_row() {
    return cu_bx() * WARPS + cu_tid() / 32;
}
static int64_t blocks_for(int64_t rows) {
    return (rows + WARPS - 1) / WARPS;
}

template <typename D>
CU_KERNEL(THREADS)
layer_norm(const float *CU_RESTRICT x, int64_t ldx, int64_t rows, int64_t cols,
           const float *CU_RESTRICT scale0, const float *CU_RESTRICT shift0,
           const float *CU_RESTRICT scale1, const float *CU_RESTRICT shift1, int64_t split,
           float eps, D *CU_RESTRICT dst, int64_t ldd) {
    int64_t r = cu_row();
    if (r >= rows)
        return;
    int lane = cu_tid() & 31;
    const float *p = x + r * ldx;
    float sum = 0;
    for (int64_t i = lane; i < cols; i += 32)
        sum += p[i];
    float mean = cu_warp_sum(sum) / (float)cols, var = 0;
    for (int64_t i = lane; i < cols; i += 32)
        var += (p[i] - mean) * (p[i] - mean);
    float s = 1.0f / sqrtf(cu_warp_sum(var) / (float)cols + eps);
    const float *scale = r < split ? scale0 : scale1, *shift = r < split ? shift0 : shift1;
    for (int64_t i = lane; i < cols; i += 32) {
        float v = (p[i] - mean) * s;
        if (scale)
            v = v * (1.0f + scale[i]) + shift[i];
        cu_num<D>::put(dst + r * ldd + i, v);
    }
}

template <typename S, typename D>
CU_KERNEL(THREADS)
rms_norm(const S *x, int64_t ldx, int64_t rows, int64_t cols, const void *CU_RESTRICT w, int w_type,
         float eps, D *dst, int64_t ldd) {
    int64_t r = cu_row();
    if (r >= rows)
        return;
    int lane = cu_tid() & 31;
    const S *p = x + r * ldx;
    float sum = 0;
    for (int64_t i = lane; i < cols; i += 32) {
        float v = cu_num<S>::get(p + i);
        sum += v * v;
    }
    float s = 1.0f / sqrtf(cu_warp_sum(sum) / (float)cols + eps);
    for (int64_t i = lane; i < cols; i += 32) {
        float v = cu_num<S>::get(p + i) * s;
        if (w)
            v *= cu_load(w, w_type, i);
        cu_num<D>::put(dst + r * ldd + i, v);
    }
}

/* One warp a head. Both halves of a pair are in the same lane. */
template <typename T>
CU_KERNEL(THREADS)
qk_norm_rope(T *x, int64_t ldx, int64_t rows, int n_heads, int d, const void *CU_RESTRICT w,
             int w_type, float eps, const float *CU_RESTRICT cosine, const float *CU_RESTRICT sine,
             int interleaved) {
    int64_t at = cu_row();
    if (at >= rows * n_heads)
        return;
    int lane = cu_tid() & 31, half = d / 2;
    int64_t r = at / n_heads;
    T *p = x + r * ldx + at % n_heads * d;
    float s = 1;
    if (w) {
        float sum = 0;
        for (int i = lane; i < d; i += 32) {
            float v = cu_num<T>::get(p + i);
            sum += v * v;
        }
        s = 1.0f / sqrtf(cu_warp_sum(sum) / (float)d + eps);
    }
    for (int j = lane; j < half; j += 32) {
        int i0 = interleaved ? 2 * j : j, i1 = interleaved ? 2 * j + 1 : j + half;
        float a = cu_num<T>::get(p + i0), b = cu_num<T>::get(p + i1);
        if (w) {
            a *= s * cu_load(w, w_type, i0);
            b *= s * cu_load(w, w_type, i1);
        }
        float cs = cosine ? cosine[r * half + j] : 1, sn = cosine ? sine[r * half + j] : 0;
        cu_num<T>::put(p + i0, a * cs - b * sn);
        cu_num<T>::put(p + i1, b * cs + a * sn);
    }
}

template <typename S, typename D>
CU_KERNEL(THREADS)
channel_norm(const S *x, int64_t pixels, int c, const void *CU_RESTRICT gamma, int gamma_type,
             int silu, D *dst) {
    int64_t r = cu_row();
    if (r >= pixels)
        return;
    int lane = cu_tid() & 31;
    const S *p = x + r * c;
    float sum = 0;
    for (int i = lane; i < c; i += 32) {
        float v = cu_num<S>::get(p + i);
        sum += v * v;
    }
    float n = sqrtf(cu_warp_sum(sum));
    float s = sqrtf((float)c) / (n > 1e-12f ? n : 1e-12f); /* 1e-12: torch's normalize */
    for (int i = lane; i < c; i += 32) {
        float v = cu_num<S>::get(p + i) * s * cu_load(gamma, gamma_type, i);
        cu_num<D>::put(dst + r * c + i, silu ? cu_silu(v) : v);
    }
}

CU_KERNEL(THREADS)
cfg_combine(const float *cond, const float *CU_RESTRICT uncond, float scale, int64_t rows,
            int64_t cols, float *v) {
    int64_t r = cu_row();
    if (r >= rows)
        return;
    int lane = cu_tid() & 31;
    const float *p = cond + r * cols, *q = uncond + r * cols;
    float nc = 0, nm = 0;
    for (int64_t i = lane; i < cols; i += 32) {
        float m = q[i] + scale * (p[i] - q[i]);
        nc += p[i] * p[i];
        nm += m * m;
    }
    nc = cu_warp_sum(nc);
    nm = cu_warp_sum(nm);
    float f = nm > 0 ? sqrtf(nc) / sqrtf(nm) : 1.0f;
    for (int64_t i = lane; i < cols; i += 32)
        v[r * cols + i] = (q[i] + scale * (p[i] - q[i])) * f;
}

void cu_k_layer_norm(cu_stream s, const qie_layer_norm_args *a) {
    const float *x = (const float *)a->x.data;
    int64_t ldx = a->x.ld, rows = a->x.rows, cols = a->x.cols, split = a->split, ldd = a->dst.ld;
    const float *c0 = a->scale[0], *c1 = a->scale[1], *h0 = a->shift[0], *h1 = a->shift[1];
    float eps = a->eps;
    if (rows < 1)
        return;
    if (a->dst.dtype == QIE_BF16) {
        cu_bf16 *d = (cu_bf16 *)a->dst.data;
        auto k = layer_norm<cu_bf16>;
        CU_LAUNCH(s, k, blocks_for(rows), 1, THREADS, 0, x, ldx, rows, cols, c0, h0, c1, h1, split,
                  eps, d, ldd);
    } else {
        float *d = (float *)a->dst.data;
        auto k = layer_norm<float>;
        CU_LAUNCH(s, k, blocks_for(rows), 1, THREADS, 0, x, ldx, rows, cols, c0, h0, c1, h1, split,
                  eps, d, ldd);
    }
}

template <typename S, typename D>
static void launch_rms(cu_stream s, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    const S *p = (const S *)x.data;
    D *d = (D *)dst.data;
    const void *wd = w.data;
    int wt = (int)w.dtype;
    int64_t ldx = x.ld, rows = x.rows, cols = x.cols, ldd = dst.ld;
    auto k = rms_norm<S, D>;
    CU_LAUNCH(s, k, blocks_for(rows), 1, THREADS, 0, p, ldx, rows, cols, wd, wt, eps, d, ldd);
}

void cu_k_rms_norm(cu_stream s, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    if (x.rows < 1)
        return;
    bool xb = x.dtype == QIE_BF16, db = dst.dtype == QIE_BF16;
    if (xb && db)
        launch_rms<cu_bf16, cu_bf16>(s, x, w, eps, dst);
    else if (xb)
        launch_rms<cu_bf16, float>(s, x, w, eps, dst);
    else if (db)
        launch_rms<float, cu_bf16>(s, x, w, eps, dst);
    else
        launch_rms<float, float>(s, x, w, eps, dst);
}

template <typename T> static void launch_qk(cu_stream s, const qie_qk_norm_rope_args *a) {
    T *x = (T *)a->x.data;
    int64_t ldx = a->x.ld, rows = a->x.rows;
    int heads = a->n_heads, d = a->head_dim, wt = (int)a->norm.dtype, inter = a->interleaved;
    const void *w = a->norm.data;
    const float *c = a->cos, *n = a->sin;
    float eps = a->eps;
    auto k = qk_norm_rope<T>;
    CU_LAUNCH(s, k, blocks_for(rows * heads), 1, THREADS, 0, x, ldx, rows, heads, d, w, wt, eps, c,
              n, inter);
}

void cu_k_qk_norm_rope(cu_stream s, const qie_qk_norm_rope_args *a) {
    if (a->x.rows < 1)
        return;
    if (a->x.dtype == QIE_BF16)
        launch_qk<cu_bf16>(s, a);
    else
        launch_qk<float>(s, a);
}

template <typename S, typename D>
static void launch_channel(cu_stream s, qie_fmap x, qie_vec g, bool silu, qie_fmap dst) {
    const S *p = (const S *)x.data;
    D *d = (D *)dst.data;
    const void *gd = g.data;
    int gt = (int)g.dtype, c = x.c, act = silu;
    int64_t pixels = (int64_t)x.h * x.w;
    auto k = channel_norm<S, D>;
    CU_LAUNCH(s, k, blocks_for(pixels), 1, THREADS, 0, p, pixels, c, gd, gt, act, d);
}

void cu_k_channel_norm(cu_stream s, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst) {
    bool xb = x.dtype == QIE_BF16, db = dst.dtype == QIE_BF16;
    if (xb && db)
        launch_channel<cu_bf16, cu_bf16>(s, x, gamma, silu, dst);
    else if (xb)
        launch_channel<cu_bf16, float>(s, x, gamma, silu, dst);
    else if (db)
        launch_channel<float, cu_bf16>(s, x, gamma, silu, dst);
    else
        launch_channel<float, float>(s, x, gamma, silu, dst);
}

void cu_k_cfg_combine(cu_stream s, const float *cond, const float *uncond, float scale,
                      int64_t rows, int64_t cols, float *v) {
    CU_LAUNCH(s, cfg_combine, blocks_for(rows), 1, THREADS, 0, cond, uncond, scale, rows, cols, v);
}
