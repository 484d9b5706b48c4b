/* Kernels that need a whole row at a time: norms, rotary embedding, guidance. Most: one warp a row,
 * eight rows a block; a row is read from memory once and again from L1, written once. Where rows
 * are long, layer norm and rows as bytes: a block a row, which is kept in shared memory. */
#include "compute/cuda/cu_blocks.hpp"
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

struct norm_params {
    float *x;
    int64_t ldx, cols, split, ldd;
    const float *scale[2], *shift[2];
    float eps;
    int kept;           /* the row fits into shared memory */
    cu_product product; /* what is added to x first, times the gate */
    const float *gate[2];
    int64_t gate_split;
};

/* Sum over the block, or its largest value, the same in all of its threads: always in the same
 * order. */
template <bool MAX> CU_INLINE float block_all(float v, float *room) {
    int n = cu_n_threads() / 32;
    v = MAX ? cu_warp_max(v) : cu_warp_sum(v);
    if (cu_tid() % 32 == 0)
        room[cu_tid() / 32] = v;
    cu_sync();
    v = room[0];
    for (int i = 1; i < n; i++)
        v = MAX ? fmaxf(v, room[i]) : v + room[i];
    return v;
}

/* dst = LN(x) * (1 + scale) + shift; JOIN: x += gate * (y + bias) before it, with the arithmetic of
 * `epilogue`. Between its passes over a row each thread keeps what it read. */
template <bool JOIN, int V, typename D> CU_KERNEL(THREADS) layer_norm(norm_params p, D *dst) {
    float *room = cu_shared<float>(), *kept = room + 2 * WARPS;
    int64_t r = cu_bx(), step = (int64_t)cu_n_threads() * V, first = (int64_t)cu_tid() * V;
    float *row = p.x + r * p.ldx, sum = 0, var = 0, v[V], a[V];
    if (!p.kept)
        kept = row;
    for (int64_t i = first; i < p.cols; i += step) {
        cu_load_some<V>(row, QIE_F32, i, v);
        if (JOIN) {
            float y[V];
            cu_product_some<V>(p.product, r, i, y);
            cu_load_some<V>(r < p.gate_split ? p.gate[0] : p.gate[1], QIE_F32, i, a);
            for (int j = 0; j < V; j++) {
                float g = a[j] * y[j];
                v[j] = v[j] + g;
            }
        }
        cu_some<float, V> x;
        for (int j = 0; j < V; j++) {
            x.v[j] = v[j];
            sum += v[j];
        }
        if (JOIN)
            *(cu_some<float, V> *)(row + i) = x;
        if (p.kept)
            *(cu_some<float, V> *)(kept + i) = x;
    }
    float mean = block_all<false>(sum, room) / (float)p.cols;
    for (int64_t i = first; i < p.cols; i += step) {
        cu_load_some<V>(kept, QIE_F32, i, v);
        for (int j = 0; j < V; j++)
            var += (v[j] - mean) * (v[j] - mean);
    }
    float s = 1.0f / sqrtf(block_all<false>(var, room + WARPS) / (float)p.cols + p.eps);
    const float *scale = p.scale[r >= p.split], *shift = p.shift[r >= p.split];
    for (int64_t i = first; i < p.cols; i += step) {
        cu_some<D, V> out;
        cu_load_some<V>(kept, QIE_F32, i, v);
        for (int j = 0; j < V; j++)
            v[j] = (v[j] - mean) * s;
        if (scale) {
            cu_load_some<V>(scale, QIE_F32, i, a);
            for (int j = 0; j < V; j++)
                v[j] *= 1.0f + a[j];
            cu_load_some<V>(shift, QIE_F32, i, a);
            for (int j = 0; j < V; j++)
                v[j] += a[j];
        }
        for (int j = 0; j < V; j++)
            cu_num<D>::put(&out.v[j], v[j]);
        *(cu_some<D, V> *)(dst + r * p.ldd + i) = out;
    }
}

/* The largest value of the row meets the largest of the type. */
template <bool FP8, int V>
CU_KERNEL(THREADS)
to_bytes(const cu_bf16 *x, int64_t ldx, int64_t cols, int in_shared, float *CU_RESTRICT row_scale,
         unsigned char *CU_RESTRICT dst) {
    float *room = cu_shared<float>(), m = 0;
    const cu_bf16 *row = x + cu_bx() * ldx;
    cu_bf16 *kept = (cu_bf16 *)(room + WARPS);
    int64_t step = (int64_t)cu_n_threads() * V, first = (int64_t)cu_tid() * V;
    for (int64_t i = first; i < cols; i += step) {
        cu_some<cu_bf16, V> v = *(const cu_some<cu_bf16, V> *)(row + i);
        for (int j = 0; j < V; j++)
            m = fmaxf(m, fabsf(cu_bf16_to_f32(v.v[j])));
        if (in_shared)
            *(cu_some<cu_bf16, V> *)(kept + i) = v;
    }
    m = block_all<true>(m, room);
    float s = m > 0 ? m / (FP8 ? 448.0f : 127.0f) : 1.0f;
    if (cu_tid() == 0)
        row_scale[cu_bx()] = s;
    for (int64_t i = first; i < cols; i += step) {
        cu_some<cu_bf16, V> v = *(const cu_some<cu_bf16, V> *)((in_shared ? kept : row) + i);
        cu_some<unsigned char, V> out;
        for (int j = 0; j < V; j++) {
            float y = cu_bf16_to_f32(v.v[j]) / s;
            out.v[j] = FP8 ? cu_f32_to_e4m3(y) : (unsigned char)(signed char)rintf(y);
        }
        *(cu_some<unsigned char, V> *)(dst + cu_bx() * cols + i) = out;
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

#define KEPT ((size_t)48 << 10) /* shared memory that is had without asking */

/* Threads for a row, `each` elements or more to one of them. */
static int64_t threads_for(int64_t cols, int64_t each) {
    int64_t n = (cols + each * 32 - 1) / (each * 32) * 32;
    return n < THREADS ? n : THREADS;
}

template <bool JOIN, int V, typename D>
static void launch_norm(cu_stream s, const norm_params &p, int64_t rows, void *dst) {
    norm_params q = p;
    D *d = (D *)dst;
    size_t room = sizeof(float) * 2 * WARPS, bytes = room + sizeof(float) * (size_t)p.cols;
    q.kept = bytes <= KEPT;
    auto k = layer_norm<JOIN, V, D>;
    CU_LAUNCH(s, k, rows, 1, threads_for(p.cols, 12), q.kept ? bytes : room, q, d);
}

/* May four elements at a time be read and written? */
static bool in_fours(const norm_params &p, const void *dst, qie_dtype type) {
    const void *words[] = {p.x,        p.scale[0], p.scale[1], p.shift[0],
                           p.shift[1], p.gate[0],  p.gate[1]};
    bool ok = cu_in_fours(dst, (int)type) && cu_product_in_fours(p.product) &&
              (p.cols | p.ldx | p.ldd) % 4 == 0;
    for (const void *a : words)
        ok = ok && cu_in_fours(a, QIE_F32);
    return ok;
}

void cu_k_layer_norm(cu_stream s, const qie_layer_norm_args *a, const cu_epilogue_args *join) {
    norm_params p;
    memset(&p, 0, sizeof p);
    p.x = (float *)a->x.data;
    p.ldx = a->x.ld;
    p.cols = a->x.cols;
    p.split = a->split;
    p.ldd = a->dst.ld;
    p.eps = a->eps;
    for (int i = 0; i < 2; i++) {
        p.scale[i] = a->scale[i];
        p.shift[i] = a->shift[i];
    }
    if (join) {
        p.product = cu_product_of(join);
        p.gate[0] = join->gate[0];
        p.gate[1] = join->gate[1];
        p.gate_split = join->split;
    }
    if (a->x.rows < 1)
        return;
    static void (*const launches[2][2][2])(cu_stream, const norm_params &, int64_t, void *) = {
        {{launch_norm<false, 1, float>, launch_norm<false, 1, cu_bf16>},
         {launch_norm<false, 4, float>, launch_norm<false, 4, cu_bf16>}},
        {{launch_norm<true, 1, float>, launch_norm<true, 1, cu_bf16>},
         {launch_norm<true, 4, float>, launch_norm<true, 4, cu_bf16>}}};
    launches[join != NULL][in_fours(p, a->dst.data, a->dst.dtype)][a->dst.dtype == QIE_BF16](
        s, p, a->x.rows, a->dst.data);
}

template <bool FP8, int V>
static void launch_to_bytes(cu_stream s, qie_mat x, void *dst, float *row_scale) {
    const cu_bf16 *p = (const cu_bf16 *)x.data;
    unsigned char *d = (unsigned char *)dst;
    int64_t ld = x.ld, cols = x.cols;
    size_t room = sizeof(float) * WARPS, bytes = room + sizeof(cu_bf16) * (size_t)cols;
    int in_shared = bytes <= KEPT;
    auto k = to_bytes<FP8, V>;
    CU_LAUNCH(s, k, x.rows, 1, threads_for(cols, 24), in_shared ? bytes : room, p, ld, cols,
              in_shared, row_scale, d);
}

void cu_k_quantize_rows(cu_stream s, qie_mat x, void *dst, qie_dtype type, float *row_scale) {
    static void (*const launches[2][2])(cu_stream, qie_mat, void *, float *) = {
        {launch_to_bytes<false, 1>, launch_to_bytes<false, 8>},
        {launch_to_bytes<true, 1>, launch_to_bytes<true, 8>}};
    bool eights =
        (uintptr_t)x.data % 16 == 0 && (uintptr_t)dst % 8 == 0 && x.cols % 8 == 0 && x.ld % 8 == 0;
    if (x.rows > 0)
        launches[type == QIE_F8_E4M3][eights](s, x, dst, row_scale);
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
