/* Attention without a matrix of scores: blocks of queries walk over blocks of keys with a running
 * softmax. BF16 on the tensor cores by mma.sync, which every card since Ampere has; F32 for the
 * exact mode, one warp a query. Keys and values are read once per 64 or 128 queries and head. */
#include "compute/cuda/cu_device.hpp"
#include "compute/cuda/cu_kernels.hpp"

#define LOG2E 1.4426950408889634f
#define MASKED (-1e30f) /* below every score, and no infinity to subtract from itself */

struct attention_params {
    const void *q, *k, *v;
    void *dst;
    int64_t ldq, ldk, ldv, ldd, nq, nk;
    int n_heads, group, d, v_chunks; /* group: query heads a key head serves */
    float scale;
    int causal, vectors; /* rows can be read in pieces of 16 bytes */
    const int64_t *bounds;
    int64_t n_segments;
};

/* Keys that a query sees: [*from, *to). */
CU_INLINE void cu_seen(const attention_params &p, int64_t row, int64_t *from, int64_t *to) {
    *from = 0;
    *to = p.causal ? row + 1 + p.nk - p.nq : p.nk;
    if (!p.bounds)
        return;
    int64_t a = 0, b = p.n_segments; /* bounds[a] <= row < bounds[b] */
    while (b - a > 1) {
        int64_t m = (a + b) / 2;
        if (p.bounds[m] <= row)
            a = m;
        else
            b = m;
    }
    *from = p.bounds[a];
    *to = p.bounds[a + 1];
}

/* rows x width elements (width a multiple of 8) to shared rows of `stride`; zeros beyond n_rows and
 * n_cols. */
CU_INLINE void cu_load_tile(cu_bf16 *to, int stride, const cu_bf16 *from, int64_t ld, int rows,
                            int width, int64_t n_rows, int n_cols, int vectors) {
    int pieces = width / 8;
    for (int i = cu_tid(); i < rows * pieces; i += cu_n_threads()) {
        int r = i / pieces, c = i % pieces * 8;
        cu_bf16 *t = to + r * stride + c;
        bool row = r < n_rows;
        if (vectors) {
            bool ok = row && c < n_cols;
            cu_copy16(t, ok ? from + r * ld + c : from, ok);
        } else
            for (int j = 0; j < 8; j++)
                t[j] = row && c + j < n_cols ? from[r * ld + c + j] : (cu_bf16)0;
    }
}

/* MT tiles of 16 queries a warp, BK keys a step, DC columns of the result a block. */
template <int MT, int BK, int DC> CU_KERNEL(128) flash(attention_params p) {
    const int BQ = 4 * 16 * MT, KS = DC + 8, NK = BK / 8, ND = DC / 8;
    int padded = (p.d + 15) / 16 * 16, QS = padded + 8;
    int head = (int)(cu_by() / p.v_chunks), chunk = (int)(cu_by() % p.v_chunks);
    int kv = head / p.group, n_chunks = (padded + DC - 1) / DC;
    cu_bf16 *qs = cu_shared<cu_bf16>(), *ks = qs + BQ * QS, *vs = ks + BK * KS;
    int64_t q0 = cu_bx() * BQ, last = q0 + BQ < p.nq ? q0 + BQ - 1 : p.nq - 1;
    int lane = cu_tid() & 31, g = lane >> 2, t = lane & 3, r0 = cu_tid() / 32 * 16 * MT;
    const cu_bf16 *q = (const cu_bf16 *)p.q + q0 * p.ldq + (int64_t)head * p.d;
    const cu_bf16 *k = (const cu_bf16 *)p.k + (int64_t)kv * p.d;
    const cu_bf16 *v = (const cu_bf16 *)p.v + (int64_t)kv * p.d + chunk * DC;
    int vd = p.d - chunk * DC < DC ? p.d - chunk * DC : DC;

    int64_t from[2 * MT], to[2 * MT], begin, end, unused;
    cu_seen(p, q0, &begin, &unused);
    cu_seen(p, last, &unused, &end);
    float o[MT][ND][4], top[2 * MT], sum[2 * MT];
    for (int m = 0; m < MT; m++) {
        for (int h = 0; h < 2; h++) {
            int64_t row = q0 + r0 + m * 16 + h * 8 + g;
            cu_seen(p, row < p.nq ? row : p.nq - 1, &from[2 * m + h], &to[2 * m + h]);
            top[2 * m + h] = MASKED;
            sum[2 * m + h] = 0;
        }
        for (int n = 0; n < ND; n++)
            for (int i = 0; i < 4; i++)
                o[m][n][i] = 0;
    }
    cu_load_tile(qs, QS, q, p.ldq, BQ, padded, p.nq - q0, p.d, p.vectors);
    if (n_chunks == 1)
        cu_load_tile(ks, KS, k + begin * p.ldk, p.ldk, BK, padded, p.nk - begin, p.d, p.vectors);
    cu_copy_commit();

    float factor = p.scale * LOG2E;
    for (int64_t key = begin; key < end; key += BK) {
        float s[MT][NK][4];
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < NK; n++)
                for (int i = 0; i < 4; i++)
                    s[m][n][i] = 0;
        cu_load_tile(vs, KS, v + key * p.ldv, p.ldv, BK, DC, p.nk - key, vd, p.vectors);
        cu_copy_commit();
        for (int c = 0; c < n_chunks; c++) {
            int width = padded - c * DC < DC ? padded - c * DC : DC;
            if (n_chunks > 1) {
                cu_sync();
                cu_load_tile(ks, KS, k + key * p.ldk + c * DC, p.ldk, BK, width, p.nk - key,
                             p.d - c * DC, p.vectors);
                cu_copy_commit();
                cu_copy_wait<0>();
            } else
                cu_copy_wait<1>();
            cu_sync();
            for (int kk = 0; kk < width; kk += 16) {
                uint32_t a[MT][4];
                for (int m = 0; m < MT; m++)
                    cu_ldmatrix(a[m], qs + (r0 + m * 16 + (lane & 15)) * QS + c * DC + kk +
                                          (lane >> 4) * 8);
#pragma unroll
                for (int n = 0; n < NK; n += 2) {
                    uint32_t b[4];
                    cu_ldmatrix(b, ks + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * KS + kk +
                                       ((lane >> 3) & 1) * 8);
                    for (int m = 0; m < MT; m++) {
                        cu_mma(s[m][n], a[m], b);
                        cu_mma(s[m][n + 1], a[m], b + 2);
                    }
                }
            }
        }
        cu_sync(); /* keys are free */
        if (n_chunks == 1 && key + BK < end) {
            cu_load_tile(ks, KS, k + (key + BK) * p.ldk, p.ldk, BK, padded, p.nk - key - BK, p.d,
                         p.vectors);
            cu_copy_commit();
            cu_copy_wait<1>();
        } else
            cu_copy_wait<0>();
        cu_sync(); /* values are there */

        for (int m = 0; m < MT; m++)
            for (int h = 0; h < 2; h++) {
                int r = 2 * m + h;
                float best = top[r];
                for (int n = 0; n < NK; n++)
                    for (int i = 0; i < 2; i++) {
                        int64_t col = key + n * 8 + 2 * t + i;
                        float x =
                            col >= from[r] && col < to[r] ? s[m][n][2 * h + i] * factor : MASKED;
                        s[m][n][2 * h + i] = x;
                        best = fmaxf(best, x);
                    }
                best = fmaxf(best, cu_shfl_xor(best, 1));
                best = fmaxf(best, cu_shfl_xor(best, 2));
                float shrink = exp2f(top[r] - best), part = 0;
                top[r] = best;
                for (int n = 0; n < NK; n++)
                    for (int i = 0; i < 2; i++) {
                        float x = s[m][n][2 * h + i];
                        x = x > 0.5f * MASKED ? exp2f(x - best) : 0.0f;
                        s[m][n][2 * h + i] = x;
                        part += x;
                    }
                part += cu_shfl_xor(part, 1);
                part += cu_shfl_xor(part, 2);
                sum[r] = sum[r] * shrink + part;
                for (int n = 0; n < ND; n++) {
                    o[m][n][2 * h] *= shrink;
                    o[m][n][2 * h + 1] *= shrink;
                }
            }
#pragma unroll
        for (int kk = 0; kk < NK; kk += 2) {
            uint32_t a[MT][4];
            for (int m = 0; m < MT; m++) {
                a[m][0] = cu_pack_bf16(s[m][kk][0], s[m][kk][1]);
                a[m][1] = cu_pack_bf16(s[m][kk][2], s[m][kk][3]);
                a[m][2] = cu_pack_bf16(s[m][kk + 1][0], s[m][kk + 1][1]);
                a[m][3] = cu_pack_bf16(s[m][kk + 1][2], s[m][kk + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < ND; n += 2) {
                if (n * 8 >= vd)
                    continue;
                uint32_t b[4];
                cu_ldmatrix_trans(b, vs + (kk * 8 + (lane & 15)) * KS + n * 8 + (lane >> 4) * 8);
                for (int m = 0; m < MT; m++) {
                    cu_mma(o[m][n], a[m], b);
                    cu_mma(o[m][n + 1], a[m], b + 2);
                }
            }
        }
        cu_sync(); /* values are free */
    }
    for (int m = 0; m < MT; m++)
        for (int h = 0; h < 2; h++) {
            int64_t row = q0 + r0 + m * 16 + h * 8 + g;
            if (row >= p.nq)
                continue;
            float inverse = 1.0f / sum[2 * m + h];
            cu_bf16 *d = (cu_bf16 *)p.dst + row * p.ldd + (int64_t)head * p.d + chunk * DC;
            for (int n = 0; n < ND; n++)
                for (int i = 0; i < 2; i++)
                    if (n * 8 + 2 * t + i < vd)
                        d[n * 8 + 2 * t + i] = cu_f32_to_bf16(o[m][n][2 * h + i] * inverse);
        }
}

/* One warp a query and head, F32 throughout; up to 512 columns in registers. */
CU_KERNEL(256) exact(attention_params p) {
    int64_t at = cu_bx() * 8 + cu_tid() / 32;
    if (at >= p.nq * p.n_heads)
        return;
    int lane = cu_tid() & 31, head = (int)(at % p.n_heads);
    int64_t row = at / p.n_heads, from, to;
    cu_seen(p, row, &from, &to);
    const float *q = (const float *)p.q + row * p.ldq + (int64_t)head * p.d;
    const float *k = (const float *)p.k + (int64_t)(head / p.group) * p.d;
    const float *v = (const float *)p.v + (int64_t)(head / p.group) * p.d;
    float mine[16], acc[16], top = MASKED, sum = 0;
    for (int i = 0; i < 16; i++) {
        mine[i] = lane + 32 * i < p.d ? q[lane + 32 * i] : 0.0f;
        acc[i] = 0;
    }
    for (int64_t key = from; key < to; key++) {
        float dot = 0;
        for (int i = 0; i < 16; i++)
            if (lane + 32 * i < p.d)
                dot += mine[i] * k[key * p.ldk + lane + 32 * i];
        float s = cu_warp_sum(dot) * p.scale;
        float best = fmaxf(top, s), shrink = expf(top - best), x = expf(s - best);
        top = best;
        sum = sum * shrink + x;
        for (int i = 0; i < 16; i++)
            if (lane + 32 * i < p.d)
                acc[i] = acc[i] * shrink + x * v[key * p.ldv + lane + 32 * i];
    }
    float *d = (float *)p.dst + row * p.ldd + (int64_t)head * p.d;
    for (int i = 0; i < 16; i++)
        if (lane + 32 * i < p.d)
            d[lane + 32 * i] = acc[i] / sum;
}

template <int MT, int BK, int DC> static void launch_flash(cu_stream s, attention_params p) {
    const int BQ = 4 * 16 * MT;
    int padded = (p.d + 15) / 16 * 16;
    p.v_chunks = (p.d + DC - 1) / DC;
    size_t bytes =
        sizeof(cu_bf16) * ((size_t)BQ * (size_t)(padded + 8) + 2 * (size_t)BK * (DC + 8));
    auto k = flash<MT, BK, DC>;
    CU_LAUNCH(s, k, (p.nq + BQ - 1) / BQ, p.n_heads * p.v_chunks, 128, bytes, p);
}

void cu_k_attention(cu_stream s, const qie_attention_args *a, const int64_t *bounds) {
    attention_params p = {a->q.data,
                          a->k.data,
                          a->v.data,
                          a->dst.data,
                          a->q.ld,
                          a->k.ld,
                          a->v.ld,
                          a->dst.ld,
                          a->q.rows,
                          a->k.rows,
                          a->n_heads,
                          a->n_heads / a->n_kv_heads,
                          a->head_dim,
                          1,
                          a->scale,
                          a->causal,
                          0,
                          bounds,
                          (int64_t)a->n_segments};
    if (p.nq < 1)
        return;
    if (a->q.dtype != QIE_BF16) {
        CU_LAUNCH(s, exact, (p.nq * p.n_heads + 7) / 8, 1, 256, 0, p);
        return;
    }
    uintptr_t together = (uintptr_t)p.q | (uintptr_t)p.k | (uintptr_t)p.v;
    p.vectors =
        p.d % 8 == 0 && p.ldq % 8 == 0 && p.ldk % 8 == 0 && p.ldv % 8 == 0 && together % 16 == 0;
    if (p.d <= 64)
        launch_flash<1, 64, 64>(s, p);
    else if (p.d <= 128)
        launch_flash<2, 32, 128>(s, p);
    else
        launch_flash<1, 32, 128>(s, p);
}
