#if defined(__x86_64__)
/* Matrix kernels with bf16 products (VDPBF16PS): pairs along k, sums in float. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/vec_avx512.inc"

#include "compute/cpu/x86/math.inc"

#define MR 14

ALWAYS __m512bh as_bh(__m512 v) {
    return (__m512bh)_mm512_castps_si512(v);
}

/* One tile. mr, nv and layout are constants wherever this is inlined, so the sums live in
 * registers. */
ALWAYS void tile(const int mr, const int nv, const int layout, int64_t steps, const void *a_,
                 int64_t a_step, const void *b_, float *c, int64_t ldc, const float *scale,
                 bool add) {
    const unsigned char *a = a_;
    const float *b = b_;
    vf s[MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++)
            s[r][j] = vf_zero();
    if (add) /* on its way while the sums are made */
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++)
                __builtin_prefetch(c + r * ldc + j * VW, 1, 3);
    for (int64_t i = 0; i < steps; i++) {
        vf b0 = vf_load(b), b1 = nv > 1 ? vf_load(b + VW) : b0;
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            vf x = vf_bcast(a + (layout == QIE_A_ROWS ? r * QIE_A_STRIDE : r * 4));
            s[r][0] = _mm512_dpbf16_ps(s[r][0], as_bh(x), as_bh(b0));
            if (nv > 1)
                s[r][1] = _mm512_dpbf16_ps(s[r][1], as_bh(x), as_bh(b1));
        }
        a += layout == QIE_A_ROWS ? 4 : a_step;
        b += nv * VW;
    }
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) {
            float *p = c + r * ldc + j * VW;
            vf v = s[r][j];
            if (add)
                v = scale ? vf_fma(vf_load(p), vf_load(scale + j * VW), v) : vf_add(vf_load(p), v);
            vf_store(p, v);
        }
}
#define TILE_NAME(layout, nv, mr) bf16_gemm_##layout##_##nv##x##mr##_avx512bf16
#include "compute/cpu/x86/tiles.inc"

/* n <= 32 elements as bf16, the rest zero. dtype is a constant where inlined. */
ALWAYS __m512i load_bf16(const unsigned char *p, const qie_dtype dtype, int64_t n) {
    if (dtype == QIE_BF16)
        return n == 32 ? _mm512_loadu_si512(p)
                       : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
    const size_t size = dtype == QIE_F32 ? 4 : 2;
    vf lo, hi = vf_zero();
    if (n == 32) {
        lo = vf_load_as(p, dtype);
        hi = vf_load_as(p + 16 * size, dtype);
    } else {
        lo = vf_load_part(p, dtype, n < 16 ? n : 16);
        if (n > 16)
            hi = vf_load_part(p + 16 * size, dtype, n - 16);
    }
    return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}

ALWAYS void pack_b_body(unsigned char *dst, int nv, const unsigned char *src, const qie_dtype dtype,
                        int64_t ld, int64_t n, int64_t k) {
    const size_t size = dtype == QIE_F32 ? 4 : 2;
    for (int j = 0; j < nv; j++) {
        const unsigned char *row0 = src + (size_t)(j * VW * ld) * size;
        int64_t rows = n - j * VW;
        for (int64_t i = 0; i < k; i += 32) {
            int64_t len = k - i < 32 ? k - i : 32;
            vf v[VW];
#pragma GCC unroll 16
            for (int r = 0; r < VW; r++)
                v[r] = r < rows ? _mm512_castsi512_ps(
                                      load_bf16(row0 + (size_t)(r * ld + i) * size, dtype, len))
                                : vf_zero();
            vf_transpose(v);
            unsigned char *out = dst + (i / 2 * nv + j) * 64;
            int64_t units = (len + 1) / 2;
            for (int64_t r = 0; r < units; r++)
                vf_store(out + r * nv * 64, v[r]);
        }
    }
}
static void bf16_pack_b_avx512bf16(void *dst, int nv, const void *src, qie_dtype dtype, int64_t ld,
                                   int64_t n, int64_t k) {
    if (dtype == QIE_BF16)
        pack_b_body(dst, nv, src, QIE_BF16, ld, n, k);
    else if (dtype == QIE_F32)
        pack_b_body(dst, nv, src, QIE_F32, ld, n, k);
    else
        pack_b_body(dst, nv, src, QIE_F16, ld, n, k);
}

/* Whole vectors are written: up to 31 elements behind dst + n are zeroed. Rows of A have room for
 * that; partial stores are slow, and small convolutions consist of ends. */
ALWAYS void copy_wide(qie_bf16 *dst, const qie_bf16 *src, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + i));
    if (i < n)
        _mm512_storeu_si512(dst + i,
                            _mm512_maskz_loadu_epi16((__mmask32)((1ull << (n - i)) - 1), src + i));
}

static void bf16_copy_a_avx512bf16(void *dst, const void *src, qie_dtype dtype, int64_t ld,
                                   int64_t n, int64_t k) {
    (void)dtype; /* BF16: other activations take the float kernels */
    for (int64_t r = 0; r < n; r++) {
        qie_bf16 *out = (qie_bf16 *)((unsigned char *)dst + r * QIE_A_STRIDE);
        copy_wide(out, (const qie_bf16 *)src + r * ld, k); /* an odd end gets its zero, too */
    }
}
#define GATHER_COPY(dst, from, n) copy_wide(dst, (const qie_bf16 *)g->data + (from), n)
#define GATHER_ELEMENT qie_bf16
#define GATHER_ZERO(dst, n)                      \
    do {                                         \
        for (int64_t z_ = 0; z_ < (n); z_ += 32) \
            vf_store((dst) + z_, vf_zero());     \
    } while (0)
#define GATHER_UNIT 2
#define GATHER_NAME bf16_gather_a_avx512bf16
#include "compute/cpu/x86/gather.inc"

/* Two keys side by side in each unit. */
static void bf16_pack_v_avx512bf16(void *dst, const void *src, qie_dtype dtype, int64_t ld,
                                   int64_t n, int64_t m) {
    (void)dtype;
    for (int64_t r = 0; r < n; r += 2) {
        const qie_bf16 *v0 = (const qie_bf16 *)src + r * ld, *v1 = v0 + ld;
        uint32_t *out = (uint32_t *)dst + r / 2 * m;
        for (int64_t i = 0; i < m; i += 16) {
            __mmask16 mask = m - i >= 16 ? 0xffff : vm_first(m - i);
            __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v0 + i));
            if (r + 1 < n) {
                __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v1 + i));
                lo = _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
            }
            if (m - i >= 16)
                _mm512_storeu_si512(out + i, lo);
            else
                _mm512_mask_storeu_epi32(out + i, mask, lo);
        }
    }
}

ALWAYS void dots_body(const int m, const qie_dtype wt, const qie_bf16 *x, int64_t ldx,
                      const unsigned char *w, int64_t n, int64_t k, float *y, int64_t ldy) {
    const size_t ws = wt == QIE_F32 ? 4 : 2;
    /* Rows beyond n repeat the last one: the work is there anyway, and nothing outside is read. */
    const unsigned char *w0 = w, *w1 = w + (size_t)(n > 1 ? k : 0) * ws;
    const unsigned char *w2 = n > 2 ? w + (size_t)(2 * k) * ws : w1;
    const unsigned char *w3 = n > 3 ? w + (size_t)(3 * k) * ws : w2;
    vf s[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            s[i][j] = vf_zero();
    for (int64_t at = 0; at < k; at += 32) {
        size_t o = (size_t)at * ws;
        int64_t len = k - at < 32 ? k - at : 32;
        __m512bh b0 = (__m512bh)load_bf16(w0 + o, wt, len),
                 b1 = (__m512bh)load_bf16(w1 + o, wt, len);
        __m512bh b2 = (__m512bh)load_bf16(w2 + o, wt, len),
                 b3 = (__m512bh)load_bf16(w3 + o, wt, len);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            __m512bh v =
                (__m512bh)load_bf16((const unsigned char *)(x + i * ldx + at), QIE_BF16, len);
            s[i][0] = _mm512_dpbf16_ps(s[i][0], v, b0);
            s[i][1] = _mm512_dpbf16_ps(s[i][1], v, b1);
            s[i][2] = _mm512_dpbf16_ps(s[i][2], v, b2);
            s[i][3] = _mm512_dpbf16_ps(s[i][3], v, b3);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (j < n)
                y[i * ldy + j] = vf_sum(s[i][j]);
}
#define DOTS(mm, wt)                                \
    case mm:                                        \
        dots_body(mm, wt, x, ldx, w, n, k, y, ldy); \
        break
#define DOTS_TYPES(wt)   \
    do {                 \
        switch (m) {     \
            DOTS(1, wt); \
            DOTS(2, wt); \
            DOTS(3, wt); \
            DOTS(4, wt); \
        }                \
    } while (0)
static void bf16_dots_avx512bf16(const void *x, qie_dtype x_dtype, int64_t ldx, int64_t m,
                                 const void *w, qie_dtype w_dtype, int64_t n, int64_t k, float *y,
                                 int64_t ldy) {
    (void)x_dtype;
    if (w_dtype == QIE_F32)
        DOTS_TYPES(QIE_F32);
    else if (w_dtype == QIE_BF16)
        DOTS_TYPES(QIE_BF16);
    else
        DOTS_TYPES(QIE_F16);
}

ALWAYS void put_pair(const qie_softmax_args *a, int64_t key, int j, vf p0, vf p1) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    _mm512_storeu_si512((uint32_t *)a->p + key / 2 * a->cols + j, both);
}
#define SOFTMAX_PUT put_pair
#define SOFTMAX_DEGREE 5
#define SOFTMAX_NAME bf16_softmax_avx512bf16
#include "compute/cpu/x86/softmax.inc"

const qie_gemm qie_bf16_gemm_avx512bf16 = {
    .mr = MR,
    .vw = VW,
    .unit = 2,
    .dtype = QIE_BF16,
    .tile = TILE_TABLE,
    .pack_b = bf16_pack_b_avx512bf16,
    .copy_a = bf16_copy_a_avx512bf16,
    .gather_a = bf16_gather_a_avx512bf16,
    .pack_v = bf16_pack_v_avx512bf16,
    .dots = bf16_dots_avx512bf16,
    .softmax = bf16_softmax_avx512bf16,
};
#else
typedef int qie_empty_translation_unit;
#endif
