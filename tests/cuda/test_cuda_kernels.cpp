/* Every kernel of ours, run thread by thread on the CPU, against the plain C of its operation: odd
 * sizes, rows that are no multiple of a tile, all types. Bounds: F32 results differ by the order of
 * sums only; BF16 ones by one rounding of the result and, in attention, of the weights. */
#include <dlfcn.h>
#include <stdlib.h>

#include <functional>
#include <vector>

#include "qtest.h"

extern "C" {
#include "compute/cpu/ref.h"
}
#include "compute/cuda/cu_blocks.hpp"
#include "compute/cuda/cu_cudnn.hpp"
#include "compute/cuda/cu_kernels.hpp"
#include "compute/cuda/cu_libs.hpp"
#include "double.h"
#include "fake_cudnn.h"

static const double F32 = 1e-11, B16 = 1e-5; /* NMSE; bf16: 2^-9 relative, squared, with room */

static uint64_t dice = 1;
static float rnd() {
    float s = 0;
    for (int i = 0; i < 4; i++) {
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        s += (float)(dice >> 48) / 65536.0f - 0.5f;
    }
    return s * 1.7320508f;
}

/* A buffer with a pattern behind it that nobody may touch; the sanitizer sees who reads there, too.
 */
#ifdef __SANITIZE_ADDRESS__
static const size_t GUARD = 0;
#else
static const size_t GUARD = 64;
#endif
struct buf {
    std::vector<unsigned char> bytes;
    size_t n;
    qie_dtype type;
    buf(qie_dtype t, size_t count, float scale = 1)
        : bytes(count * qie_dtype_size(t) + GUARD), type(t) {
        n = count;
        for (size_t i = 0; i < n; i++)
            put(i, rnd() * scale);
        memset(bytes.data() + n * qie_dtype_size(t), 0xa5, GUARD);
    }
    void put(size_t i, float v) {
        if (type == QIE_F16) {
            uint16_t h = qie_f32_to_f16(v);
            memcpy(&bytes[2 * i], &h, 2);
        } else
            qie_ref_store(bytes.data(), type, (int64_t)i, v);
    }
    void *data() {
        return bytes.data();
    }
    bool guarded() const {
        for (size_t i = 0; i < GUARD; i++)
            if (bytes[n * qie_dtype_size(type) + i] != 0xa5)
                return false;
        return true;
    }
};

static double nmse(const buf &a, const buf &b) {
    double num = 0, den = 0;
    for (size_t i = 0; i < a.n; i++) {
        double x = (double)qie_ref_load(a.bytes.data(), a.type, (int64_t)i);
        double y = (double)qie_ref_load(b.bytes.data(), b.type, (int64_t)i);
        if (!std::isfinite(x))
            return INFINITY;
        num += (x - y) * (x - y);
        den += y * y;
    }
    return den > 0 ? num / den : num;
}

static double bound(qie_dtype t) {
    return t == QIE_BF16 ? B16 : F32;
}

static qie_compute reference() {
    qie_compute c = {};
    c.n_threads = 2;
    qie_ref_fill(&c.ops);
    return c;
}

/* Launches are queued on a stream of the double; its memory is not needed for plain pointers. */
static void run(const std::function<void(cu_stream)> &f) {
    cu_stream s;
    if (cu_stream_create(0, &s) != CU_OK)
        abort();
    f(s);
    if (cu_stream_sync(s) != CU_OK)
        abort();
    cu_stream_destroy(s);
}

static const qie_dtype ACT[2] = {QIE_F32, QIE_BF16};
static const qie_dtype PARAM[3] = {QIE_F32, QIE_BF16, QIE_F16};
static const int64_t ROWS[] = {1, 7, 33}, COLS[] = {2, 31, 64, 130};

/* Widths of a warp and of several, in fours and not, and one that shared memory has no room for. */
static const int64_t WIDE[] = {2, 31, 64, 130, 1030, 1036, 12500};

QTEST(test_cuda_kernels_layer_norm_equals_plain_c) {
    qie_compute c = reference();
    for (int64_t rows : {1, 7})
        for (int64_t cols : WIDE)
            for (int form = 0; form < 8; form++) {
                qie_dtype t = ACT[form & 1];
                int64_t ld = cols + (form & 4 ? 4 : 3);
                buf x(QIE_F32, (size_t)(rows * ld)), p(QIE_F32, (size_t)(4 * cols), 0.5f);
                buf a(t, (size_t)(rows * ld)), b = a;
                const float *f = (const float *)p.data();
                qie_layer_norm_args g = {};
                g.x = {x.data(), QIE_F32, rows, cols, ld};
                if (form & 2)
                    for (int i = 0; i < 2; i++) {
                        g.scale[i] = f + i * cols;
                        g.shift[i] = f + (2 + i) * cols;
                    }
                g.split = rows / 2;
                g.eps = 1e-6f;
                g.dst = {a.data(), t, rows, cols, ld};
                c.ops.layer_norm(&c, &g);
                g.dst.data = b.data();
                buf before = x;
                run([&](cu_stream s) { cu_k_layer_norm(s, &g, NULL); });
                ASSERT_LE(nmse(b, a), bound(t));
                ASSERT(b.guarded());
                ASSERT(x.bytes == before.bytes);
            }
}

QTEST(test_cuda_kernels_rms_norm_equals_plain_c) {
    qie_compute c = reference();
    for (int64_t rows : ROWS)
        for (int64_t cols : COLS)
            for (int form = 0; form < 12; form++) {
                qie_dtype tx = ACT[form & 1], td = ACT[form >> 1 & 1], tw = PARAM[form / 4];
                buf x(tx, (size_t)(rows * cols)), w(tw, (size_t)cols), a(td, (size_t)(rows * cols)),
                    b = a;
                qie_vec v = {form == 5 ? NULL : w.data(), tw, cols};
                qie_mat mx = qie_mat_make(x.data(), tx, rows, cols);
                c.ops.rms_norm(&c, mx, v, 1e-6f, qie_mat_make(a.data(), td, rows, cols));
                run([&](cu_stream s) {
                    cu_k_rms_norm(s, mx, v, 1e-6f, qie_mat_make(b.data(), td, rows, cols));
                });
                ASSERT_LE(nmse(b, a), bound(td));
                ASSERT(b.guarded());
            }
}

QTEST(test_cuda_kernels_qk_norm_rope_equals_plain_c) {
    qie_compute c = reference();
    const int dims[] = {2, 32, 80, 128};
    for (int64_t rows : ROWS)
        for (int d : dims)
            for (int form = 0; form < 16; form++) {
                int heads = 3;
                qie_dtype t = ACT[form & 1], tw = PARAM[form % 3];
                int64_t ld = (int64_t)heads * d * 2;
                buf a(t, (size_t)(rows * ld)), b = a, w(tw, (size_t)d);
                buf cs(QIE_F32, (size_t)(rows * d / 2)), sn(QIE_F32, (size_t)(rows * d / 2));
                qie_qk_norm_rope_args g = {};
                g.x = {a.data(), t, rows, (int64_t)heads * d, ld};
                g.n_heads = heads;
                g.head_dim = d;
                g.eps = 1e-6f;
                if (form & 2)
                    g.norm = {w.data(), tw, d};
                if (form & 4) {
                    g.cos = (const float *)cs.data();
                    g.sin = (const float *)sn.data();
                }
                g.interleaved = form & 8;
                c.ops.qk_norm_rope(&c, &g);
                g.x.data = b.data();
                run([&](cu_stream s) { cu_k_qk_norm_rope(s, &g); });
                ASSERT_LE(nmse(b, a), bound(t));
                ASSERT(b.guarded());
            }
}

QTEST(test_cuda_kernels_channel_norm_equals_plain_c) {
    qie_compute c = reference();
    const int channels[] = {1, 3, 16, 96, 129};
    for (int ch : channels)
        for (int form = 0; form < 8; form++) {
            qie_dtype tx = ACT[form & 1], td = ACT[form >> 1 & 1];
            int h = 3, w = 5;
            buf x(tx, (size_t)(h * w * ch)), g(QIE_BF16, (size_t)ch), a(td, (size_t)(h * w * ch)),
                b = a;
            for (int i = 0; i < ch; i++)
                x.put((size_t)i, 0); /* a pixel of zeros */
            qie_fmap mx = {x.data(), tx, h, w, ch}, ma = {a.data(), td, h, w, ch},
                     mb = {b.data(), td, h, w, ch};
            qie_vec v = {g.data(), QIE_BF16, ch};
            c.ops.channel_norm(&c, mx, v, form & 4, ma);
            run([&](cu_stream s) { cu_k_channel_norm(s, mx, v, form & 4, mb); });
            ASSERT_LE(nmse(b, a), bound(td));
            ASSERT(b.guarded());
        }
}

QTEST(test_cuda_kernels_sampler_equals_plain_c) {
    qie_compute c = reference();
    for (int64_t rows : ROWS) {
        int64_t cols = 64, n = rows * cols;
        buf p(QIE_F32, (size_t)n), q(QIE_F32, (size_t)n), a(QIE_F32, (size_t)n), b = a;
        for (int i = 0; i < 64; i++) {
            p.put((size_t)i, 0);
            q.put((size_t)i, 0);
        }
        const float *fp = (const float *)p.data(), *fq = (const float *)q.data();
        c.ops.cfg_combine(&c, fp, fq, 4, rows, cols, (float *)a.data());
        run([&](cu_stream s) { cu_k_cfg_combine(s, fp, fq, 4, rows, cols, (float *)b.data()); });
        ASSERT_LE(nmse(b, a), F32);
        c.ops.axpy(&c, -0.37f, fp, (float *)a.data(), n);
        run([&](cu_stream s) { cu_k_axpy(s, -0.37f, fp, (float *)b.data(), n); });
        ASSERT_LE(nmse(b, a), F32);
        for (int bad = 0; bad < 3; bad++) {
            unsigned flag = 0;
            b.put((size_t)n - 1, bad == 1 ? INFINITY : bad == 2 ? NAN : 1);
            run([&](cu_stream s) { cu_k_find_bad(s, (const float *)b.data(), n, &flag); });
            ASSERT_INT(flag, bad ? 1 : 0);
        }
    }
}

/* The product is the reference's own: what is tested is what becomes of it. */
QTEST(test_cuda_kernels_epilogue_equals_plain_c) {
    qie_compute c = reference();
    for (int form = 0; form < 128; form++) {
        int64_t m = 9, n = form & 64 ? 40 : 37, k = 5, ld = form & 64 ? 44 : n + 2;
        qie_dtype td = ACT[form & 1];
        qie_act act = (qie_act)(form >> 1 & 3);
        qie_store store = (qie_store)(form >> 3 & 3);
        bool bias = form & 32;
        buf x(QIE_F32, (size_t)(m * k)), w(QIE_F32, (size_t)(n * k)), bv(QIE_BF16, (size_t)n);
        buf gates(QIE_F32, (size_t)(2 * n)), y(QIE_F32, (size_t)(m * n)), a(td, (size_t)(m * ld)),
            b = a;
        qie_linear_args l = {};
        l.x = qie_mat_make(x.data(), QIE_F32, m, k);
        l.w.data = w.data();
        l.w.dtype = QIE_F32;
        l.w.n = n;
        l.w.k = k;
        l.dst = qie_mat_make(y.data(), QIE_F32, m, n);
        c.ops.linear(&c, &l);
        if (bias)
            l.bias = {bv.data(), QIE_BF16, n};
        l.act = act;
        l.store = store;
        l.gate[0] = (const float *)gates.data();
        l.gate[1] = l.gate[0] + n;
        l.split = 4;
        l.dst = {a.data(), td, m, n, ld};
        c.ops.linear(&c, &l);
        cu_epilogue_args e = {};
        e.y = y.data();
        e.y_type = QIE_F32;
        e.m = m;
        e.n = n;
        e.bias = l.bias;
        e.act = act;
        e.store = store;
        e.gate[0] = l.gate[0];
        e.gate[1] = l.gate[1];
        e.split = 4;
        e.dst = {b.data(), td, m, n, ld};
        run([&](cu_stream s) { cu_k_epilogue(s, &e); });
        ASSERT_LE(nmse(b, a), bound(td));
        ASSERT(b.guarded());
    }
}

/* Gate, sum and norm in one go: the bits of one after the other, whatever the types, scales and
 * addresses are, and the residual's as well. */
QTEST(test_cuda_kernels_joined_norm_equals_epilogue_and_norm) {
    qie_compute c = reference();
    for (int64_t n : WIDE)
        for (int form = 0; form < 96; form++) {
            int64_t m = 5, ld = n + (form & 1 ? 4 : 0), off = form & 32 ? 1 : 0;
            qie_dtype td = ACT[form >> 1 & 1], ty = form % 3 ? ACT[form % 3 - 1] : QIE_I32,
                      tb = PARAM[form / 2 % 3];
            if (n > 2000 && form % 32 > 2)
                continue;
            buf y(ty == QIE_BF16 ? ty : QIE_F32, (size_t)(m * n)), bias(tb, (size_t)(n + off)),
                p(QIE_F32, (size_t)(7 * n + off)), row(QIE_F32, (size_t)m),
                x(QIE_F32, (size_t)(m * ld)), x2 = x, a(td, (size_t)(m * ld)), b = a;
            if (ty == QIE_I32)
                for (int64_t i = 0; i < m * n; i++) {
                    int32_t v = (int32_t)(rnd() * 1000);
                    memcpy((int32_t *)y.data() + i, &v, sizeof v);
                }
            const float *f = (const float *)p.data() + off;
            cu_epilogue_args e = {};
            e.y = y.data();
            e.y_type = ty;
            e.m = m;
            e.n = n;
            if (form & 8)
                e.bias = {(unsigned char *)bias.data() + (size_t)off * qie_dtype_size(tb), tb, n};
            e.store = QIE_STORE_GATED_ADD;
            e.split = 2;
            if (form & 16)
                e.row_scale = (const float *)row.data();
            if (form & 4) {
                e.col_scale = f + 6 * n;
                e.n_col_scale = form & 64 ? 1 : n;
            }
            e.dst = {x.data(), QIE_F32, m, n, ld};
            qie_layer_norm_args g = {};
            for (int i = 0; i < 2; i++) {
                e.gate[i] = f + i * n;
                g.scale[i] = f + (2 + i) * n;
                g.shift[i] = f + (4 + i) * n;
            }
            g.x = e.dst;
            g.split = 3;
            g.eps = 1e-6f;
            g.dst = {a.data(), td, m, n, ld};
            run([&](cu_stream s) { cu_k_epilogue(s, &e); });
            c.ops.layer_norm(&c, &g);
            ASSERT(x.bytes != x2.bytes);
            buf apart = b;
            g.dst.data = apart.data();
            run([&](cu_stream s) { cu_k_layer_norm(s, &g, NULL); });
            g.x.data = e.dst.data = x2.data();
            g.dst.data = b.data();
            run([&](cu_stream s) { cu_k_layer_norm(s, &g, &e); });
            ASSERT(x.bytes == x2.bytes);
            ASSERT(b.bytes == apart.bytes);
            ASSERT_LE(nmse(b, a), bound(td));
        }
}

QTEST(test_cuda_kernels_attention_equals_plain_c) {
    qie_compute c = reference();
    struct {
        int64_t nq, nk;
        int heads, kv, d;
        bool causal;
        int segments;
    } cases[] = {{1, 1, 1, 1, 16, false, 0},     {5, 70, 2, 1, 32, false, 0},
                 {67, 67, 2, 2, 32, true, 0},    {33, 90, 2, 1, 32, true, 0},
                 {70, 70, 2, 2, 20, false, 3},   {130, 45, 1, 1, 128, false, 0},
                 {150, 150, 1, 1, 80, false, 5}, {66, 40, 1, 1, 200, false, 0},
                 {20, 36, 1, 1, 384, false, 0},  {40, 40, 3, 1, 72, true, 0}};
    for (auto &k : cases)
        for (qie_dtype t : ACT) {
            int64_t w = (int64_t)k.heads * k.d, wk = (int64_t)k.kv * k.d;
            buf q(t, (size_t)(k.nq * w)), kk(t, (size_t)(k.nk * wk)), v(t, (size_t)(k.nk * wk));
            buf a(t, (size_t)(k.nq * w)), b = a;
            std::vector<int64_t> bounds;
            for (int s = 0; s <= k.segments; s++)
                bounds.push_back(s == k.segments ? k.nq : k.nq * s / k.segments + (s ? 1 : 0));
            qie_attention_args g = {};
            g.q = qie_mat_make(q.data(), t, k.nq, w);
            g.k = qie_mat_make(kk.data(), t, k.nk, wk);
            g.v = qie_mat_make(v.data(), t, k.nk, wk);
            g.n_heads = k.heads;
            g.n_kv_heads = k.kv;
            g.head_dim = k.d;
            g.scale = 1.0f / sqrtf((float)k.d);
            g.causal = k.causal;
            g.segments = k.segments ? bounds.data() : NULL;
            g.n_segments = (size_t)k.segments;
            g.dst = qie_mat_make(a.data(), t, k.nq, w);
            c.ops.attention(&c, &g);
            g.dst.data = b.data();
            run([&](cu_stream s) { cu_k_attention(s, &g, g.segments); });
            /* bf16: the weights are rounded to bf16 before they meet the values */
            double most = t == QIE_BF16 ? 4 * B16 : F32;
            if (!(nmse(b, a) <= most))
                printf("  nq %lld nk %lld heads %d d %d causal %d segments %d %s\n",
                       (long long)k.nq, (long long)k.nk, k.heads, k.d, k.causal, k.segments,
                       qie_dtype_name(t));
            ASSERT_LE(nmse(b, a), most);
            ASSERT(b.guarded());
        }
}

QTEST(test_cuda_kernels_conv2d_equals_plain_c) {
    qie_compute c = reference();
    struct {
        int h, w, in, out, kernel, stride;
        bool up, residual;
        int kt;
    } cases[] = {{1, 1, 1, 1, 1, 1, false, false, 1},   {5, 7, 3, 9, 3, 1, false, false, 3},
                 {6, 8, 16, 70, 3, 1, false, true, 3},  {9, 13, 24, 33, 3, 1, true, false, 1},
                 {8, 10, 8, 12, 3, 2, false, false, 1}, {12, 14, 40, 65, 1, 1, false, true, 1},
                 {7, 6, 12, 20, 3, 2, false, false, 1}};
    for (auto &k : cases)
        for (qie_dtype t : ACT)
            for (qie_dtype tw : PARAM) {
                int oh = k.up            ? 2 * k.h
                         : k.stride == 2 ? k.h / 2
                                         : k.h,
                    ow = k.up            ? 2 * k.w
                         : k.stride == 2 ? k.w / 2
                                         : k.w;
                buf x(t, (size_t)(k.h * k.w * k.in)),
                    w(tw, (size_t)(k.out * k.in * k.kt * k.kernel * k.kernel), 0.3f);
                buf bias(QIE_F32, (size_t)k.out), a(t, (size_t)(oh * ow * k.out)), b = a;
                qie_conv2d_args g = {};
                g.x = {x.data(), t, k.h, k.w, k.in};
                g.w = {w.data(), tw, k.out, k.in, k.kt, k.kernel, k.kernel};
                g.bias = {bias.data(), QIE_F32, k.out};
                g.stride = k.stride;
                g.upsample = k.up;
                g.dst = {a.data(), t, oh, ow, k.out};
                if (k.residual)
                    g.residual = g.dst;
                c.ops.conv2d(&c, &g);
                buf packed(t, (size_t)(k.out * k.in * k.kernel * k.kernel));
                g.dst.data = b.data();
                if (k.residual)
                    g.residual = g.dst;
                run([&](cu_stream s) {
                    cu_k_conv_weights(s, g.w, packed.data(), t);
                    cu_k_conv2d(s, &g, packed.data());
                });
                /* bf16: weights of another type are rounded to it */
                double most = t == QIE_BF16 ? 4 * B16 : F32;
                if (!(nmse(b, a) <= most))
                    printf("  %d x %d, %d -> %d, kernel %d stride %d up %d %s, weights %s\n", k.h,
                           k.w, k.in, k.out, k.kernel, k.stride, k.up, qie_dtype_name(t),
                           qie_dtype_name(tw));
                ASSERT_LE(nmse(b, a), most);
                ASSERT(b.guarded() && packed.guarded());
            }
}

QTEST(test_cuda_kernels_convert_equals_plain_c) {
    qie_compute c = reference();
    for (int form = 0; form < 4; form++) {
        qie_dtype ts = ACT[form & 1], td = ACT[form >> 1];
        int64_t rows = 5, cols = 300;
        buf x(ts, (size_t)(rows * (cols + 4))), a(td, (size_t)(rows * (cols + 1))), b = a;
        qie_mat mx = {x.data(), ts, rows, cols, cols + 4},
                ma = {a.data(), td, rows, cols, cols + 1}, mb = ma;
        mb.data = b.data();
        c.ops.convert(&c, mx, ma);
        run([&](cu_stream s) { cu_k_convert(s, mx, mb); });
        ASSERT(a.bytes == b.bytes);
    }
}

/* Weights of every type, blocks of random bytes included, against the decoders of the CPU; what is
 * not finite there need not be the same here. */
QTEST(test_cuda_kernels_dequantize_equals_plain_c) {
    static const qie_dtype types[] = {QIE_F32,     QIE_BF16,   QIE_F16,   QIE_I8,   QIE_F8_E4M3,
                                      QIE_F8_E5M2, QIE_Q4_0,   QIE_Q4_1,  QIE_Q5_0, QIE_Q5_1,
                                      QIE_Q8_0,    QIE_Q2_K,   QIE_Q3_K,  QIE_Q4_K, QIE_Q5_K,
                                      QIE_Q6_K,    QIE_IQ4_NL, QIE_IQ4_XS};
    for (qie_dtype t : types) {
        int64_t block = qie_dtype_block_elements(t);
        for (int64_t k : {block > 1 ? block : 1, 3 * block, block > 1 ? 5 * block : 37})
            for (int scales = 0; scales < (t == QIE_I8 || t == QIE_F8_E4M3 ? 3 : 1); scales++)
                for (qie_dtype to : ACT) {
                    int64_t rows = 7, row0 = 2, n = 4;
                    size_t row = qie_dtype_row_bytes(t, k);
                    std::vector<unsigned char> bytes(row * (size_t)rows);
                    for (auto &x : bytes) {
                        rnd();
                        x = (unsigned char)(dice >> 40);
                    }
                    if (t == QIE_F32)
                        for (size_t i = 3; i < bytes.size(); i += 4)
                            bytes[i] &= 0xbf; /* below 2: no bf16 overflow on the way */
                    std::vector<float> scale((size_t)rows), want((size_t)k);
                    for (auto &x : scale)
                        x = rnd();
                    buf out(to, (size_t)(n * k));
                    qie_wmat w = {bytes.data(),
                                  t,
                                  rows,
                                  k,
                                  scales ? scale.data() : NULL,
                                  scales == 2 ? rows : scales};
                    run([&](cu_stream s) { cu_k_dequantize(s, w, row0, n, out.data(), to); });
                    for (int64_t r = 0; r < n; r++) {
                        qie_to_f32(want.data(), bytes.data() + row * (size_t)(row0 + r), t,
                                   (size_t)k);
                        for (int64_t i = 0; i < k; i++) {
                            float y = want[(size_t)i];
                            if (scales)
                                y *= scale[scales == 2 ? (size_t)(row0 + r) : 0];
                            if (to == QIE_BF16)
                                y = qie_bf16_to_f32(qie_f32_to_bf16(y));
                            float x = qie_ref_load(out.data(), to, r * k + i);
                            if (std::isfinite(y) ? x != y : std::isfinite(x)) {
                                printf("  %s, k %lld, row %lld, element %lld\n", qie_dtype_name(t),
                                       (long long)k, (long long)r, (long long)i);
                                ASSERT(x == y);
                            }
                        }
                    }
                    ASSERT(out.guarded());
                }
    }
}

/* Rows as 8-bit integers with a scale each, and what a product of them is worth: within half a step
 * of every value, and exactly the value that the scales say. */
QTEST(test_cuda_kernels_int8_rows_and_products) {
    /* in eights and not, and a row that shared memory has no room for */
    static const int64_t sizes[][2] = {
        {16, 18}, {33, 35}, {130, 132}, {1000, 1008}, {30000, 30000}};
    for (const auto &size : sizes) {
        int64_t m = 5, n = 7, k = size[0], ld = size[1];
        buf x(QIE_BF16, (size_t)(m * ld));
        std::vector<signed char> q((size_t)(m * k) + 1, 99);
        std::vector<float> row((size_t)m), col((size_t)n);
        for (int64_t i = 0; i < k; i++)
            x.put((size_t)(2 * ld + i), 0); /* a row of zeros */
        qie_mat mx = {x.data(), QIE_BF16, m, k, ld};
        run([&](cu_stream s) { cu_k_quantize_rows(s, mx, q.data(), QIE_I8, row.data()); });
        for (int64_t r = 0; r < m; r++)
            for (int64_t i = 0; i < k; i++) {
                float v = qie_ref_load(x.data(), QIE_BF16, r * ld + i),
                      got = (float)q[(size_t)(r * k + i)] * row[(size_t)r];
                ASSERT_LE(fabs((double)(got - v)), 0.5001 * (double)row[(size_t)r]);
            }
        ASSERT_INT(q[(size_t)(m * k)], 99);
        std::vector<int32_t> y((size_t)(m * n));
        for (auto &v : y) {
            rnd();
            v = (int32_t)(dice >> 44) - 500000;
        }
        for (auto &v : col)
            v = rnd();
        for (int64_t n_col : {(int64_t)1, n})
            for (int bf = 0; bf < 2; bf++) {
                qie_dtype t = bf ? QIE_BF16 : QIE_F32;
                buf bias(QIE_F32, (size_t)n), dst(t, (size_t)(m * n));
                cu_epilogue_args e = {};
                e.y = y.data();
                e.y_type = QIE_I32;
                e.m = m;
                e.n = n;
                e.bias = {bias.data(), QIE_F32, n};
                e.dst = {dst.data(), t, m, n, n};
                e.row_scale = row.data();
                e.col_scale = col.data();
                e.n_col_scale = n_col;
                run([&](cu_stream s) { cu_k_epilogue(s, &e); });
                for (int64_t i = 0; i < m * n; i++) {
                    float v = (float)y[(size_t)i] * row[(size_t)(i / n)] *
                                  col[n_col == 1 ? 0 : (size_t)(i % n)] +
                              qie_ref_load(bias.data(), QIE_F32, i % n);
                    v = bf ? qie_bf16_to_f32(qie_f32_to_bf16(v)) : v;
                    ASSERT(v == qie_ref_load(dst.data(), t, i));
                }
                ASSERT(dst.guarded());
            }
    }
}

/* Rows as fp8 with a scale each: the largest value meets 448, every other is the nearest of its
 * size. */
QTEST(test_cuda_kernels_fp8_rows) {
    for (int64_t k : {70, 720}) {
        int64_t m = 3, ld = k == 720 ? 720 : 75;
        buf x(QIE_BF16, (size_t)(m * ld), 3);
        std::vector<unsigned char> q((size_t)(m * k) + 1, 99);
        std::vector<float> scale((size_t)m);
        qie_mat mx = {x.data(), QIE_BF16, m, k, ld};
        for (int64_t i = 0; i < k; i++)
            x.put((size_t)(ld + i), 0); /* a row of zeros */
        run([&](cu_stream s) { cu_k_quantize_rows(s, mx, q.data(), QIE_F8_E4M3, scale.data()); });
        ASSERT_INT(q[(size_t)(m * k)], 99);
        for (int64_t r = 0; r < m; r++) {
            float most = 0;
            for (int64_t i = 0; i < k; i++)
                most = fmaxf(most, fabsf(qie_ref_load(x.data(), QIE_BF16, r * ld + i)));
            float s = scale[(size_t)r];
            ASSERT_LE(fabs((double)(most > 0 ? s * 448 / most - 1 : s - 1)), 1e-5);
            for (int64_t i = 0; i < k; i++) {
                float v = qie_ref_load(x.data(), QIE_BF16, r * ld + i),
                      got = cu_e4m3_to_f32(q[(size_t)(r * k + i)]) * s;
                /* half a step of 3 bits of mantissa, or of the smallest number */
                ASSERT_LE(fabs((double)(got - v)),
                          fmax(fabs((double)v) / 16, (double)s / 1024) * 1.01);
            }
        }
    }
}

/* A product in floats and its scales: of rows, of columns, one for all columns, none. */
QTEST(test_cuda_kernels_scales_of_a_float_product) {
    for (qie_dtype type : ACT)
        for (int form = 0; form < 8; form++) {
            int64_t m = 5, n = form & 4 ? 20 : 19;
            int scaled = form & 3;
            buf y(type, (size_t)(m * n)), dst(QIE_F32, (size_t)(m * n)), row(QIE_F32, (size_t)m),
                col(QIE_F32, (size_t)n);
            int64_t n_col = scaled == 2 ? 1 : n;
            cu_epilogue_args e = {};
            e.y = y.data();
            e.y_type = type;
            e.m = m;
            e.n = n;
            e.dst = {dst.data(), QIE_F32, m, n, n};
            e.row_scale = scaled ? (const float *)row.data() : NULL;
            e.col_scale = scaled > 1 ? (const float *)col.data() : NULL;
            e.n_col_scale = n_col;
            run([&](cu_stream s) { cu_k_epilogue(s, &e); });
            for (int64_t i = 0; i < m * n; i++) {
                float v = qie_ref_load(y.data(), type, i);
                if (scaled)
                    v *= qie_ref_load(row.data(), QIE_F32, i / n);
                if (scaled > 1)
                    v *= qie_ref_load(col.data(), QIE_F32, n_col == 1 ? 0 : i % n);
                ASSERT(v == qie_ref_load(dst.data(), QIE_F32, i));
            }
            ASSERT(dst.guarded());
        }
}

/* Every byte of fp8 against the value by its definition. */
QTEST(test_cuda_kernels_fp8_equals_its_definition) {
    for (int i = 0; i < 256; i++) {
        int e = i >> 3 & 15, m = i & 7;
        float v = e == 15 && m == 7 ? NAN
                  : e               ? ldexpf(1 + (float)m / 8, e - 7)
                                    : ldexpf((float)m, -9);
        v = i & 128 ? -v : v;
        float got = cu_e4m3_to_f32((unsigned char)i);
        ASSERT(std::isnan(v) ? std::isnan(got) : got == v);
        if (!std::isnan(v) && i != 128)
            ASSERT_INT(cu_f32_to_e4m3(v), i);
    }
    ASSERT_INT(cu_f32_to_e4m3(1e6f), 0x7e);
    /* half-way cases go to the even neighbour */
    for (int i = 0; i < 125; i++) {
        float a = cu_e4m3_to_f32((unsigned char)i), b = cu_e4m3_to_f32((unsigned char)(i + 1));
        ASSERT_INT(cu_f32_to_e4m3((a + b) / 2), i & 1 ? i + 1 : i);
    }
}

/* ------------------------------------------------------------------ cuDNN */

/* Memory of a device of the double, freed at the end. */
struct device_memory {
    void *p;
    explicit device_memory(size_t n) {
        if (cu_malloc(0, n, &p) != CU_OK)
            abort();
    }
    ~device_memory() {
        cu_free(0, p);
    }
};

static fake_cudnn_control *fake() {
    void *lib = dlopen(FAKE_CUDNN, RTLD_NOW | RTLD_LOCAL);
    void *p = lib ? dlsym(lib, "fake_cudnn") : NULL;
    if (!p)
        abort();
    fake_cudnn_control *f = (fake_cudnn_control *)p;
    f->fault = FAKE_CUDNN_NONE;
    f->real = NULL;
    f->idle = false;
    f->live = f->plans = f->runs = 0;
    f->queue = [](void *s, std::function<void()> work) {
        cu_double_queue((cu_stream)s, std::move(work), NULL, 0);
    };
    setenv("QIE_CUDA_CUDNN", FAKE_CUDNN, 1);
    return f;
}

/* Attention of these rows by the library, with leading dimensions that are no widths. Returns
 * whether it took it; the result is compared. */
static bool by_cudnn(cu_cudnn *c, int64_t nq, int64_t nk, int heads, int kv_heads, double *error) {
    enum { D = 128 };
    qie_compute ref = reference();
    int64_t ldq = heads * D + 8, ldk = kv_heads * D + 16, ldv = ldk + 8, ldd = ldq + 24;
    buf q(QIE_BF16, (size_t)(nq * ldq)), k(QIE_BF16, (size_t)(nk * ldk)),
        v(QIE_BF16, (size_t)(nk * ldv)), expected(QIE_BF16, (size_t)(nq * ldd)), got = expected;
    device_memory work(QIE_CU_LIBS_WORKSPACE),
        room((size_t)(2 * (nq * (ldq + ldd) + nk * (ldk + ldv))));
    qie_attention_args a = {};
    a.q = {q.data(), QIE_BF16, nq, heads * D, ldq};
    a.k = {k.data(), QIE_BF16, nk, kv_heads * D, ldk};
    a.v = {v.data(), QIE_BF16, nk, kv_heads * D, ldv};
    a.dst = {expected.data(), QIE_BF16, nq, heads * D, ldd};
    a.n_heads = heads;
    a.n_kv_heads = kv_heads;
    a.head_dim = D;
    a.scale = 0.3f;
    ref.ops.attention(&ref, &a);
    uint16_t *at = (uint16_t *)room.p;
    buf *from[] = {&q, &k, &v, &got};
    qie_mat *to[] = {&a.q, &a.k, &a.v, &a.dst};
    for (int i = 0; i < 4; i++) {
        memcpy(at, from[i]->data(), 2 * from[i]->n);
        to[i]->data = at;
        at += from[i]->n;
    }
    cu_stream s;
    if (cu_stream_create(0, &s) != CU_OK)
        abort();
    bool took = cu_cudnn_sdpa(c, s, &a, work.p);
    if (cu_stream_sync(s) != CU_OK)
        abort();
    memcpy(got.data(), a.dst.data, 2 * got.n);
    *error = nmse(got, expected);
    cu_stream_destroy(s);
    return took;
}

/* The calls are the library's (the stand-in is strict), the result is that of plain C; a plan for
 * each shape, kept; nothing is left. */
QTEST(test_cuda_cudnn_attention_equals_plain_c) {
    fake_cudnn_control *f = fake();
    cu_cudnn *c = cu_cudnn_open();
    ASSERT(c != NULL);
    double error;
    ASSERT(by_cudnn(c, 5, 70, 2, 2, &error));
    ASSERT_LE(error, B16);
    ASSERT(by_cudnn(c, 33, 9, 6, 2, &error));
    ASSERT_LE(error, B16);
    ASSERT_INT(f->plans, 6); /* with the check's own; each time the first one takes too much */
    ASSERT(by_cudnn(c, 5, 70, 2, 2, &error));
    ASSERT_INT(f->plans, 6);
    ASSERT_INT(f->runs, 4);
    for (int64_t n = 1; n < 60; n++) { /* more shapes than are kept */
        ASSERT(by_cudnn(c, n, 3, 1, 1, &error));
        ASSERT_LE(error, B16);
    }
    ASSERT(cu_cudnn_note(c) == NULL);
    /* not its kind */
    device_memory work(QIE_CU_LIBS_WORKSPACE);
    qie_attention_args a = {};
    a.head_dim = 128;
    a.q = a.k = a.v = a.dst = qie_mat_make(work.p, QIE_BF16, 1, 128);
    int runs = f->runs;
    a.causal = true;
    ASSERT(!cu_cudnn_sdpa(c, NULL, &a, work.p));
    a.causal = false;
    a.head_dim = 64;
    ASSERT(!cu_cudnn_sdpa(c, NULL, &a, work.p));
    a.head_dim = 128;
    a.k.ld = 129;
    ASSERT(!cu_cudnn_sdpa(c, NULL, &a, work.p));
    a.k.ld = 128;
    a.v.dtype = QIE_F32;
    ASSERT(!cu_cudnn_sdpa(c, NULL, &a, work.p));
    ASSERT_INT(f->runs, runs);
    cu_cudnn_close(c);
    ASSERT_INT(f->live, 0);
}

struct conv_case {
    int h, w, in, out, kernel, stride;
    bool bias, residual;
};

/* The same for a convolution; a residual is the result's own memory, as the VAE's are. */
static bool conv_by_cudnn(cu_cudnn *c, const conv_case &t, double *error) {
    qie_compute ref = reference();
    int ho = t.h / t.stride, wo = t.w / t.stride, taps = t.kernel * t.kernel;
    buf x(QIE_BF16, (size_t)(t.h * t.w * t.in)), w(QIE_BF16, (size_t)(t.out * t.in * taps)),
        bias(QIE_BF16, (size_t)t.out), expected(QIE_BF16, (size_t)(ho * wo * t.out)),
        got = expected;
    device_memory work(QIE_CU_LIBS_WORKSPACE), room(2 * (x.n + w.n + bias.n + got.n) + 64);
    qie_conv2d_args a = {};
    a.x = {x.data(), QIE_BF16, t.h, t.w, t.in};
    a.w = {w.data(), QIE_BF16, t.out, t.in, 1, t.kernel, t.kernel};
    if (t.bias)
        a.bias = {bias.data(), QIE_BF16, t.out};
    a.stride = t.stride;
    a.dst = {expected.data(), QIE_BF16, ho, wo, t.out};
    if (t.residual)
        a.residual = a.dst;
    ref.ops.conv2d(&ref, &a);
    unsigned char *at = (unsigned char *)room.p;
    auto put = [&at](const buf &b) {
        unsigned char *p = at;
        memcpy(p, b.bytes.data(), 2 * b.n);
        at += 2 * b.n;
        return p;
    };
    a.x.data = put(x);
    unsigned char *packed = at;
    at += 2 * w.n;
    if (t.bias)
        a.bias.data = put(bias);
    a.dst.data = put(got);
    if (t.residual)
        a.residual = a.dst;
    bool took;
    run([&](cu_stream s) {
        cu_k_conv_weights(s, a.w, packed, QIE_BF16);
        took = cu_cudnn_conv(c, s, &a, packed, work.p);
    });
    memcpy(got.bytes.data(), a.dst.data, 2 * got.n);
    *error = nmse(got, expected);
    return took;
}

/* 3 x 3 and 1 x 1, stride 2 with its edges, odd sides, with and without bias and residual. */
QTEST(test_cuda_cudnn_convolution_equals_plain_c) {
    static const conv_case cases[] = {
        {9, 13, 16, 24, 3, 1, true, false}, {9, 13, 16, 24, 3, 1, true, true},
        {8, 6, 24, 8, 3, 2, true, false},   {9, 13, 8, 16, 3, 2, true, false},
        {5, 7, 16, 40, 1, 1, true, false},  {5, 7, 40, 16, 1, 1, true, true},
        {1, 1, 8, 8, 3, 1, false, false},
    };
    fake_cudnn_control *f = fake();
    cu_cudnn *c = cu_cudnn_open();
    ASSERT(c != NULL);
    double error;
    int first = 0;
    for (int turn = 0; turn < 2; turn++) {
        for (const conv_case &t : cases) {
            ASSERT(conv_by_cudnn(c, t, &error));
            ASSERT_LE(error, B16);
        }
        first = turn ? first : f->plans;
    }
    ASSERT_INT(f->plans, first); /* of each shape, kept */
    ASSERT_INT(f->runs, 2 + 14); /* with the check's own */
    ASSERT(cu_cudnn_note(c) == NULL);
    /* not its kind */
    device_memory work(QIE_CU_LIBS_WORKSPACE);
    unsigned char *at = (unsigned char *)work.p + 65536;
    qie_conv2d_args a = {}, other;
    a.x = {at, QIE_BF16, 4, 4, 8};
    a.w = {at, QIE_BF16, 8, 8, 1, 3, 3};
    a.bias = {at, QIE_BF16, 8};
    a.dst = {at + 4096, QIE_BF16, 4, 4, 8};
    a.stride = 1;
    for (int what = 0; what < 7; what++) {
        other = a;
        if (what == 1)
            other.upsample = true;
        if (what == 2)
            other.x.dtype = QIE_F32;
        if (what == 3)
            other.dst.dtype = QIE_F32;
        if (what == 4)
            other.bias.dtype = QIE_F32;
        if (what == 5)
            other.w.in = other.x.c = 3;
        if (what == 6)
            other.dst.data = at + 2;
        run([&](cu_stream s) { ASSERT_INT(cu_cudnn_conv(c, s, &other, at, work.p), !what); });
    }
    ASSERT_INT(f->runs, 2 + 14 + 1);
    cu_cudnn_close(c);
    ASSERT_INT(f->live, 0);
}

/* cuDNN itself, where it is installed, makes a plan of each convolution of the released VAE at 1024
 * x 1024, for an H100. */
QTEST(test_cuda_cudnn_itself_accepts_the_released_convolutions) {
    static const conv_case cases[] = {
        /* encoder */
        {1024, 1024, 96, 96, 3, 1, true, false},
        {1024, 1024, 96, 96, 3, 1, true, true},
        {1024, 1024, 96, 96, 3, 2, true, false},
        {512, 512, 96, 192, 3, 1, true, false},
        {512, 512, 96, 192, 1, 1, true, false},
        {512, 512, 192, 192, 3, 1, true, true},
        {512, 512, 192, 192, 3, 2, true, false},
        {256, 256, 192, 384, 3, 1, true, false},
        {256, 256, 192, 384, 1, 1, true, false},
        {256, 256, 384, 384, 3, 1, true, true},
        {256, 256, 384, 384, 3, 2, true, false},
        {128, 128, 384, 384, 3, 1, true, false},
        {128, 128, 384, 384, 3, 1, true, true},
        {128, 128, 384, 32, 3, 1, true, false},
        /* decoder */
        {128, 128, 16, 16, 1, 1, true, false},
        {128, 128, 16, 384, 3, 1, true, false},
        {256, 256, 384, 384, 3, 1, true, false},
        {512, 512, 192, 192, 3, 1, true, false},
    };
    fake_cudnn_control *f = fake();
    f->real = REAL_CUDNN;
    cu_cudnn *c = *f->real ? cu_cudnn_open() : NULL;
    if (!c)
        QTEST_SKIP("no cuDNN is installed, or it cannot be loaded");
    device_memory work(QIE_CU_LIBS_WORKSPACE);
    double error;
    ASSERT(conv_by_cudnn(c, {8, 8, 8, 8, 3, 1, true, true}, &error)); /* and the check's */
    ASSERT_LE(error, B16);
    f->idle = true;
    for (const conv_case &t : cases) {
        qie_conv2d_args a = {};
        a.x = {work.p, QIE_BF16, t.h, t.w, t.in};
        a.w = {work.p, QIE_BF16, t.out, t.in, 1, t.kernel, t.kernel};
        a.bias = {work.p, QIE_BF16, t.out};
        a.stride = t.stride;
        a.dst = {work.p, QIE_BF16, t.h / t.stride, t.w / t.stride, t.out};
        if (t.residual)
            a.residual = a.dst;
        ASSERT(cu_cudnn_conv(c, NULL, &a, work.p, work.p));
    }
    cu_cudnn_close(c);
    ASSERT_INT(f->live, 0);
}

/* Whatever is wrong with it: our own kernel, and a reason that is told once. */
QTEST(test_cuda_cudnn_that_fails_is_not_used) {
    fake_cudnn_control *f = fake();
    for (int fault = FAKE_CUDNN_NO_CARD; fault <= FAKE_CUDNN_NO_RUN; fault++) {
        double error;
        f->fault = (fake_cudnn_fault)fault;
        cu_cudnn *c = cu_cudnn_open();
        ASSERT(c != NULL);
        const conv_case conv = {8, 8, 8, 8, 3, 1, true, true};
        /* what is wrong with one does not keep from the other */
        bool attends = fault == FAKE_CUDNN_PADDING, convolves = fault == FAKE_CUDNN_NO_SCALE;
        for (int turn = 0; turn < 2; turn++) {
            ASSERT_INT(by_cudnn(c, 5, 70, 2, 2, &error), attends);
            ASSERT_INT(conv_by_cudnn(c, conv, &error), convolves);
        }
        for (int told = attends + convolves; told < 2; told++) {
            const char *why = cu_cudnn_note(c);
            ASSERT(why && *why);
            printf("  %s\n", why);
        }
        ASSERT(cu_cudnn_note(c) == NULL);
        cu_cudnn_close(c);
        ASSERT_INT(f->live, 0);
    }
    f->fault = FAKE_CUDNN_OLD;
    ASSERT(cu_cudnn_open() == NULL);
    f->fault = FAKE_CUDNN_NONE;
    setenv("QIE_CUDA_CUDNN", "0", 1);
    ASSERT(cu_cudnn_open() == NULL);
    setenv("QIE_CUDA_CUDNN", "/nowhere/libcudnn.so.9", 1);
    ASSERT(cu_cudnn_open() == NULL);
    unsetenv("QIE_CUDA_CUDNN");
}

int main(int argc, char **argv) {
    cu_double_options o = cu_double_options_default();
    cu_double_configure(&o);
    return qtest_main(argc, argv);
}
