/* Kernels that treat every element on its own: conversions, epilogues, dequantisation. Neighbouring
 * threads take neighbouring elements, so that each 32-byte sector is read and written once. */
#include "compute/cuda/cu_blocks.hpp"
#include "compute/cuda/cu_device.hpp"
#include "compute/cuda/cu_kernels.hpp"

#define THREADS 256
#define MOST_BLOCKS 65535

static int64_t blocks_for(int64_t n) {
    int64_t b = (n + THREADS - 1) / THREADS;
    return b < 1 ? 1 : b < MOST_BLOCKS ? b : MOST_BLOCKS;
}
CU_INLINE int64_t cu_first() {
    return cu_bx() * THREADS + cu_tid();
}
CU_INLINE int64_t cu_stride() {
    return cu_gx() * THREADS;
}

template <typename S, typename D>
CU_KERNEL(THREADS)
convert(const S *CU_RESTRICT src, int64_t lds, D *CU_RESTRICT dst, int64_t ldd, int64_t rows,
        int64_t cols) {
    for (int64_t i = cu_first(); i < rows * cols; i += cu_stride()) {
        int64_t r = i / cols, c = i - r * cols;
        cu_num<D>::put(dst + r * ldd + c, cu_num<S>::get(src + r * lds + c));
    }
}

CU_KERNEL(THREADS) axpy(float a, const float *CU_RESTRICT x, float *y, int64_t n) {
    for (int64_t i = cu_first(); i < n; i += cu_stride()) {
        float p = a * x[i];
        y[i] = y[i] + p;
    }
}

CU_KERNEL(THREADS) find_bad(const float *CU_RESTRICT v, int64_t n, unsigned *flag) {
    unsigned bad = 0;
    for (int64_t i = cu_first(); i < n; i += cu_stride())
        bad |= (cu_f32_bits(v[i]) & 0x7f800000u) == 0x7f800000u;
    if (bad)
        cu_atomic_or(flag, 1u);
}

struct epilogue_params {
    const void *y;
    int y_type, act, store, bias_type;
    int64_t m, n, split, ldd, n_col_scale;
    const void *bias;
    const float *gate0, *gate1, *row_scale, *col_scale;
};

template <typename D> CU_KERNEL(THREADS) epilogue(epilogue_params p, D *dst) {
    for (int64_t i = cu_first(); i < p.m * p.n; i += cu_stride()) {
        int64_t r = i / p.n, c = i - r * p.n;
        float v =
            p.y_type == QIE_I32 ? (float)((const int32_t *)p.y)[i] : cu_load(p.y, p.y_type, i);
        if (p.row_scale)
            v *= p.row_scale[r];
        if (p.col_scale)
            v *= p.col_scale[p.n_col_scale == 1 ? 0 : c];
        if (p.bias)
            v += cu_load(p.bias, p.bias_type, c);
        v = cu_act(p.act, v);
        D *to = dst + r * p.ldd + c;
        if (p.store == QIE_STORE_MUL)
            v = cu_num<D>::get(to) * v;
        else if (p.store == QIE_STORE_ADD)
            v = cu_num<D>::get(to) + v;
        else if (p.store == QIE_STORE_GATED_ADD) {
            float g = (r < p.split ? p.gate0 : p.gate1)[c] * v;
            v = cu_num<D>::get(to) + g;
        }
        cu_num<D>::put(to, v);
    }
}

/* Eight elements of a row a thread: blocks of GGUF hold multiples of that. */
template <typename D>
CU_KERNEL(THREADS)
dequantize(const unsigned char *CU_RESTRICT w, int type, int64_t row_bytes, int64_t k, int64_t row0,
           int64_t rows, const float *CU_RESTRICT scale, int64_t n_scale, D *CU_RESTRICT dst) {
    int64_t groups = (k + 7) / 8;
    for (int64_t i = cu_first(); i < rows * groups; i += cu_stride()) {
        int64_t r = i / groups, c = (i - r * groups) * 8;
        const unsigned char *row = w + (row0 + r) * row_bytes;
        float s = !scale ? 1.0f : scale[n_scale == 1 ? 0 : row0 + r];
        for (int64_t j = c; j < c + 8 && j < k; j++)
            cu_num<D>::put(dst + r * k + j, cu_weight(row, type, j) * s);
    }
}

template <typename D>
CU_KERNEL(THREADS)
conv_weights(const void *CU_RESTRICT w, int type, int64_t in, int64_t taps, int64_t all_taps,
             int64_t n, D *CU_RESTRICT dst) {
    for (int64_t i = cu_first(); i < n; i += cu_stride()) {
        int64_t c = i % in, t = i / in % taps, o = i / in / taps;
        cu_num<D>::put(dst + i, cu_load(w, type, (o * in + c) * all_taps + all_taps - taps + t));
    }
}

/* One warp a row: the largest value of the row meets the largest of the type. */
template <bool FP8>
CU_KERNEL(THREADS)
to_bytes(const cu_bf16 *CU_RESTRICT x, int64_t ldx, int64_t rows, int64_t cols,
         float *CU_RESTRICT row_scale, unsigned char *CU_RESTRICT dst) {
    int64_t r = cu_bx() * (THREADS / 32) + cu_tid() / 32;
    if (r >= rows)
        return;
    int lane = cu_tid() & 31;
    float m = 0;
    for (int64_t i = lane; i < cols; i += 32)
        m = fmaxf(m, fabsf(cu_bf16_to_f32(x[r * ldx + i])));
    m = cu_warp_max(m);
    float s = m > 0 ? m / (FP8 ? 448.0f : 127.0f) : 1.0f;
    if (lane == 0)
        row_scale[r] = s;
    for (int64_t i = lane; i < cols; i += 32) {
        float v = cu_bf16_to_f32(x[r * ldx + i]) / s;
        dst[r * cols + i] = FP8 ? cu_f32_to_e4m3(v) : (unsigned char)(signed char)rintf(v);
    }
}

template <typename S, typename D> static void launch_convert(cu_stream s, qie_mat a, qie_mat b) {
    const S *p = (const S *)a.data;
    D *d = (D *)b.data;
    int64_t lds = a.ld, ldd = b.ld, rows = a.rows, cols = a.cols;
    auto k = convert<S, D>;
    CU_LAUNCH(s, k, blocks_for(rows * cols), 1, THREADS, 0, p, lds, d, ldd, rows, cols);
}

void cu_k_convert(cu_stream s, qie_mat src, qie_mat dst) {
    bool sb = src.dtype == QIE_BF16, db = dst.dtype == QIE_BF16;
    if (sb && db)
        launch_convert<cu_bf16, cu_bf16>(s, src, dst);
    else if (sb)
        launch_convert<cu_bf16, float>(s, src, dst);
    else if (db)
        launch_convert<float, cu_bf16>(s, src, dst);
    else
        launch_convert<float, float>(s, src, dst);
}

CU_KERNEL(THREADS)
fill_random(cu_bf16 *dst, int64_t n, uint32_t seed) {
    for (int64_t i = cu_first(); i < n; i += cu_stride()) {
        uint32_t h = (uint32_t)i * 2654435761u + seed;
        h = (h ^ (h >> 15)) * 2246822519u;
        h ^= h >> 13;
        cu_bf16 v = cu_f32_to_bf16(((float)(h & 0xffffu) * (1.0f / 65536.0f) - 0.5f) * 0.04f);
        dst[i] = v & 0xffbfu; /* bytes that are numbers as fp8, too */
    }
}

void cu_k_fill_random(cu_stream s, void *dst, int64_t n, uint32_t seed) {
    cu_bf16 *d = (cu_bf16 *)dst;
    int64_t blocks = blocks_for(n);
    if (n > 0)
        CU_LAUNCH(s, fill_random, blocks, 1, THREADS, 0, d, n, seed);
}

void cu_k_axpy(cu_stream s, float a, const float *x, float *y, int64_t n) {
    CU_LAUNCH(s, axpy, blocks_for(n), 1, THREADS, 0, a, x, y, n);
}

void cu_k_find_bad(cu_stream s, const float *v, int64_t n, unsigned *flag) {
    CU_LAUNCH(s, find_bad, blocks_for(n), 1, THREADS, 0, v, n, flag);
}

void cu_k_epilogue(cu_stream s, const cu_epilogue_args *a) {
    epilogue_params p = {
        a->y,         (int)a->y_type, (int)a->act, (int)a->store, (int)a->bias.dtype,
        a->m,         a->n,           a->split,    a->dst.ld,     a->n_col_scale,
        a->bias.data, a->gate[0],     a->gate[1],  a->row_scale,  a->col_scale};
    if (a->dst.dtype == QIE_BF16) {
        cu_bf16 *d = (cu_bf16 *)a->dst.data;
        auto k = epilogue<cu_bf16>;
        CU_LAUNCH(s, k, blocks_for(p.m * p.n), 1, THREADS, 0, p, d);
    } else {
        float *d = (float *)a->dst.data;
        auto k = epilogue<float>;
        CU_LAUNCH(s, k, blocks_for(p.m * p.n), 1, THREADS, 0, p, d);
    }
}

void cu_k_dequantize(cu_stream s, qie_wmat w, int64_t row0, int64_t n, void *dst, qie_dtype type) {
    const unsigned char *p = (const unsigned char *)w.data;
    const float *scale = w.scale;
    int64_t k = w.k, n_scale = w.n_scale;
    int64_t bytes = k / cu_block_elements((int)w.dtype) * cu_block_bytes((int)w.dtype);
    int t = (int)w.dtype;
    int64_t blocks = blocks_for(n * ((k + 7) / 8));
    if (type == QIE_BF16) {
        cu_bf16 *d = (cu_bf16 *)dst;
        auto f = dequantize<cu_bf16>;
        CU_LAUNCH(s, f, blocks, 1, THREADS, 0, p, t, bytes, k, row0, n, scale, n_scale, d);
    } else {
        float *d = (float *)dst;
        auto f = dequantize<float>;
        CU_LAUNCH(s, f, blocks, 1, THREADS, 0, p, t, bytes, k, row0, n, scale, n_scale, d);
    }
}

void cu_k_conv_weights(cu_stream s, qie_conv_weight w, void *dst, qie_dtype type) {
    int64_t in = w.in, taps = (int64_t)w.kh * w.kw, all = taps * w.kt, n = in * taps * w.out;
    const void *p = w.data;
    int t = (int)w.dtype;
    if (type == QIE_BF16) {
        cu_bf16 *d = (cu_bf16 *)dst;
        auto k = conv_weights<cu_bf16>;
        CU_LAUNCH(s, k, blocks_for(n), 1, THREADS, 0, p, t, in, taps, all, n, d);
    } else {
        float *d = (float *)dst;
        auto k = conv_weights<float>;
        CU_LAUNCH(s, k, blocks_for(n), 1, THREADS, 0, p, t, in, taps, all, n, d);
    }
}

void cu_k_quantize_rows(cu_stream s, qie_mat x, void *dst, qie_dtype type, float *row_scale) {
    const cu_bf16 *p = (const cu_bf16 *)x.data;
    unsigned char *d = (unsigned char *)dst;
    int64_t ld = x.ld, rows = x.rows, cols = x.cols;
    auto k = type == QIE_F8_E4M3 ? to_bytes<true> : to_bytes<false>;
    CU_LAUNCH(s, k, (rows + THREADS / 32 - 1) / (THREADS / 32), 1, THREADS, 0, p, ld, rows, cols,
              row_scale, d);
}
