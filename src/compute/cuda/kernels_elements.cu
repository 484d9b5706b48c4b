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
    cu_product product;
    int act, store;
    int64_t m, split, ldd;
    const float *gate0, *gate1;
};

/* V elements of a row a thread. */
template <int V, typename D> CU_KERNEL(THREADS) epilogue(epilogue_params p, D *dst) {
    int64_t groups = p.product.n / V;
    for (int64_t i = cu_first(); i < p.m * groups; i += cu_stride()) {
        int64_t r = i / groups, c = (i - r * groups) * V;
        cu_some<D, V> *to = (cu_some<D, V> *)(dst + r * p.ldd + c);
        float v[V], a[V];
        cu_product_some<V>(p.product, r, c, v);
        for (int j = 0; j < V; j++)
            v[j] = cu_act(p.act, v[j]);
        cu_some<D, V> old = p.store == QIE_STORE_SET ? cu_some<D, V>() : *to;
        if (p.store == QIE_STORE_GATED_ADD) {
            cu_load_some<V>(r < p.split ? p.gate0 : p.gate1, QIE_F32, c, a);
            for (int j = 0; j < V; j++)
                v[j] = a[j] * v[j];
        }
        for (int j = 0; j < V; j++) {
            float x = cu_num<D>::get(&old.v[j]);
            if (p.store == QIE_STORE_MUL)
                v[j] = x * v[j];
            else if (p.store != QIE_STORE_SET)
                v[j] = x + v[j];
            cu_num<D>::put(&old.v[j], v[j]);
        }
        *to = old;
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

template <int V, typename D>
static void launch_epilogue(cu_stream s, const epilogue_params &p, void *dst) {
    epilogue_params q = p;
    D *d = (D *)dst;
    auto k = epilogue<V, D>;
    CU_LAUNCH(s, k, blocks_for(p.m * (p.product.n / V)), 1, THREADS, 0, q, d);
}

void cu_k_epilogue(cu_stream s, const cu_epilogue_args *a) {
    epilogue_params p = {cu_product_of(a), (int)a->act, (int)a->store, a->m,
                         a->split,         a->dst.ld,   a->gate[0],    a->gate[1]};
    bool fours = cu_product_in_fours(p.product) && p.ldd % 4 == 0 &&
                 cu_in_fours(a->dst.data, (int)a->dst.dtype) && cu_in_fours(p.gate0, QIE_F32) &&
                 cu_in_fours(p.gate1, QIE_F32);
    static void (*const launches[2][2])(cu_stream, const epilogue_params &, void *) = {
        {launch_epilogue<1, float>, launch_epilogue<1, cu_bf16>},
        {launch_epilogue<4, float>, launch_epilogue<4, cu_bf16>}};
    launches[fours][a->dst.dtype == QIE_BF16](s, p, a->dst.data);
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
