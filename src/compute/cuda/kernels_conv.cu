/* Convolution of a channels-last map as a product of matrices that is never written down: rows are
 * output pixels, columns (tap, channel). BF16 on the tensor cores, F32 for the exact mode and the
 * three-channel ends. The input is read once per tile of 64 output channels (taps hit in L2),
 * weights once per 128 pixels. */
#include "compute/cuda/cu_device.hpp"
#include "compute/cuda/cu_kernels.hpp"

struct conv_params {
    const void *x, *w;
    void *dst;
    const void *bias, *residual;
    int bias_type, h, width, in, out, kernel, stride, pad, up, out_h, out_w, dst_bf16, vectors;
    int64_t k; /* kernel^2 x in */
};

/* Element of input for output pixel (y, x), tap (ky, kx): index of its first channel, or -1. */
CU_INLINE int64_t cu_source(const conv_params &p, int y, int x, int ky, int kx) {
    int sy = y * p.stride + ky - p.pad, sx = x * p.stride + kx - p.pad;
    if (sy < 0 || sx < 0 || sy >= p.h * p.up || sx >= p.width * p.up)
        return -1;
    return ((int64_t)(sy / p.up) * p.width + sx / p.up) * p.in;
}

CU_INLINE void cu_finish(const conv_params &p, int64_t pixel, int o, float v) {
    if (p.bias)
        v += cu_load(p.bias, p.bias_type, o);
    int64_t at = pixel * p.out + o;
    if (p.residual)
        v += cu_load(p.residual, p.dst_bf16 ? QIE_BF16 : QIE_F32, at);
    if (p.dst_bf16)
        ((cu_bf16 *)p.dst)[at] = cu_f32_to_bf16(v);
    else
        ((float *)p.dst)[at] = v;
}

#define BM 128
#define BN 64
#define BK 32
#define ROW (BK + 8)

/* One step of k of both operands to shared memory. */
CU_INLINE void cu_conv_tiles(const conv_params &p, cu_bf16 *as, cu_bf16 *bs, int64_t m0, int n0,
                             int64_t k0) {
    const cu_bf16 *x = (const cu_bf16 *)p.x, *w = (const cu_bf16 *)p.w;
    int64_t pixels = (int64_t)p.out_h * p.out_w;
    for (int i = cu_tid(); i < BM * BK / 8; i += cu_n_threads()) {
        int r = i / (BK / 8), c = i % (BK / 8) * 8;
        int64_t m = m0 + r, k = k0 + c;
        int y = (int)(m / p.out_w), px = (int)(m - (int64_t)y * p.out_w);
        cu_bf16 *t = as + r * ROW + c;
        if (p.vectors) {
            int tap = (int)(k / p.in);
            int64_t at =
                m < pixels && k < p.k ? cu_source(p, y, px, tap / p.kernel, tap % p.kernel) : -1;
            cu_copy16(t, at >= 0 ? x + at + (k - (int64_t)tap * p.in) : x, at >= 0);
        } else
            for (int j = 0; j < 8; j++) {
                int tap = (int)((k + j) / p.in);
                int64_t at = m < pixels && k + j < p.k
                                 ? cu_source(p, y, px, tap / p.kernel, tap % p.kernel)
                                 : -1;
                t[j] = at >= 0 ? x[at + (k + j - (int64_t)tap * p.in)] : (cu_bf16)0;
            }
    }
    for (int i = cu_tid(); i < BN * BK / 8; i += cu_n_threads()) {
        int r = i / (BK / 8), c = i % (BK / 8) * 8;
        int64_t k = k0 + c, at = (int64_t)(n0 + r) * p.k + k;
        cu_bf16 *t = bs + r * ROW + c;
        if (p.vectors) {
            bool ok = n0 + r < p.out && k < p.k;
            cu_copy16(t, ok ? w + at : w, ok);
        } else
            for (int j = 0; j < 8; j++)
                t[j] = n0 + r < p.out && k + j < p.k ? w[at + j] : (cu_bf16)0;
    }
}

/* Eight warps, four along the pixels, two along the channels, 32 x 32 each; the next step of k
 * arrives while this one is multiplied. */
CU_KERNEL(256) conv_bf16(conv_params p) {
    cu_bf16 *as = cu_shared<cu_bf16>(), *bs = as + 2 * BM * ROW;
    int64_t m0 = cu_bx() * BM;
    int n0 = (int)cu_by() * BN, lane = cu_tid() & 31, warp = cu_tid() / 32;
    int wm = warp / 2 * 32, wn = warp % 2 * 32, g = lane >> 2, t = lane & 3;
    float c[2][4][4];
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++)
                c[m][n][i] = 0;
    cu_conv_tiles(p, as, bs, m0, n0, 0);
    cu_copy_commit();
    int turn = 0;
    for (int64_t k0 = 0; k0 < p.k; k0 += BK, turn ^= 1) {
        if (k0 + BK < p.k) {
            cu_conv_tiles(p, as + (turn ^ 1) * BM * ROW, bs + (turn ^ 1) * BN * ROW, m0, n0,
                          k0 + BK);
            cu_copy_commit();
            cu_copy_wait<1>();
        } else
            cu_copy_wait<0>();
        cu_sync();
        const cu_bf16 *a0 = as + turn * BM * ROW, *b0 = bs + turn * BN * ROW;
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            uint32_t a[2][4], b[2][4];
            for (int m = 0; m < 2; m++)
                cu_ldmatrix(a[m], a0 + (wm + m * 16 + (lane & 15)) * ROW + kk + (lane >> 4) * 8);
            for (int n = 0; n < 2; n++)
                cu_ldmatrix(b[n], b0 + (wn + n * 16 + (lane >> 4) * 8 + (lane & 7)) * ROW + kk +
                                      ((lane >> 3) & 1) * 8);
            for (int m = 0; m < 2; m++)
                for (int n = 0; n < 4; n++)
                    cu_mma(c[m][n], a[m], b[n >> 1] + 2 * (n & 1));
        }
        cu_sync();
    }
    int64_t pixels = (int64_t)p.out_h * p.out_w;
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++) {
                int64_t pixel = m0 + wm + m * 16 + g + (i >> 1) * 8;
                int o = n0 + wn + n * 8 + 2 * t + (i & 1);
                if (pixel < pixels && o < p.out)
                    cu_finish(p, pixel, o, c[m][n][i]);
            }
}

#define FM 64
#define FN 64
#define FK 16

/* 16 x 16 threads, 4 pixels by 4 channels each. */
CU_KERNEL(256) conv_f32(conv_params p) {
    float *as = cu_shared<float>(), *bs = as + FK * (FM + 1);
    const float *x = (const float *)p.x, *w = (const float *)p.w;
    int64_t m0 = cu_bx() * FM, pixels = (int64_t)p.out_h * p.out_w;
    int n0 = (int)cu_by() * FN, tx = cu_tid() % 16, ty = cu_tid() / 16;
    float c[4][4];
    for (int i = 0; i < 16; i++)
        c[i / 4][i % 4] = 0;
    for (int64_t k0 = 0; k0 < p.k; k0 += FK) {
        for (int i = cu_tid(); i < FM * FK; i += cu_n_threads()) {
            int64_t m = m0 + i / FK, k = k0 + i % FK, at = -1;
            int tap = (int)(k / p.in);
            if (m < pixels && k < p.k)
                at = cu_source(p, (int)(m / p.out_w), (int)(m % p.out_w), tap / p.kernel,
                               tap % p.kernel);
            as[i % FK * (FM + 1) + i / FK] = at >= 0 ? x[at + (k - (int64_t)tap * p.in)] : 0.0f;
        }
        for (int i = cu_tid(); i < FN * FK; i += cu_n_threads()) {
            int64_t o = n0 + i / FK, k = k0 + i % FK;
            bs[i % FK * (FN + 1) + i / FK] = o < p.out && k < p.k ? w[o * p.k + k] : 0.0f;
        }
        cu_sync();
        for (int k = 0; k < FK; k++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    c[i][j] += as[k * (FM + 1) + ty + 16 * i] * bs[k * (FN + 1) + tx + 16 * j];
        cu_sync();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int64_t pixel = m0 + ty + 16 * i;
            int o = n0 + tx + 16 * j;
            if (pixel < pixels && o < p.out)
                cu_finish(p, pixel, o, c[i][j]);
        }
}

void cu_k_conv2d(cu_stream s, const qie_conv2d_args *a, const void *w) {
    conv_params p = {a->x.data,
                     w,
                     a->dst.data,
                     a->bias.data,
                     a->residual.data,
                     (int)a->bias.dtype,
                     a->x.h,
                     a->x.w,
                     a->w.in,
                     a->w.out,
                     a->w.kh,
                     a->stride,
                     a->stride == 1 ? a->w.kh / 2 : 0,
                     a->upsample ? 2 : 1,
                     a->dst.h,
                     a->dst.w,
                     a->dst.dtype == QIE_BF16,
                     a->w.in % 8 == 0 && (uintptr_t)a->x.data % 16 == 0,
                     (int64_t)a->w.kh * a->w.kw * a->w.in};
    int64_t pixels = (int64_t)p.out_h * p.out_w;
    if (a->x.dtype == QIE_BF16) {
        size_t bytes = sizeof(cu_bf16) * 2 * (BM + BN) * ROW;
        CU_LAUNCH(s, conv_bf16, (pixels + BM - 1) / BM, (p.out + BN - 1) / BN, 256, bytes, p);
    } else {
        size_t bytes = sizeof(float) * FK * (FM + 1 + FN + 1);
        CU_LAUNCH(s, conv_f32, (pixels + FM - 1) / FM, (p.out + FN - 1) / FN, 256, bytes, p);
    }
}
