#if defined(__x86_64__)
/* Matrix kernels with bf16 products in tiles (TDPBF16PS): 32 x 32 sums in four tiles, two tiles of
 * A and two of B for each 32 elements of k. A as it is copied for the other kernels and B as it is
 * packed for them are the layouts that tiles want; everything but the products is theirs.
 *
 * Rows are 16 to 32: the lower tiles are the last 16 rows, so they overlap the upper ones when
 * there are fewer than 32. An overlapping row is computed twice from the same sums, and stored
 * twice alike. Fewer than 16 rows pass through a buffer. Either way a row's value does not depend
 * on how many others there are. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/amx.h"
#include "compute/cpu/x86/vec_avx512.inc"

#define MR 32

/* The operands of the last, incomplete 32 elements of k, padded with zeros. */
typedef struct tail {
    _Alignas(64) unsigned char a[MR][QIE_TILE_BYTES];
    _Alignas(64) unsigned char b[QIE_TILE_ROWS][2 * QIE_TILE_BYTES];
} tail;

static void tail_fill(tail *t, int nv, int64_t steps, int64_t rows, const unsigned char *a,
                      const unsigned char *b) {
    const __mmask16 mask = vm_first(steps);
    for (int64_t r = 0; r < rows; r++)
        vf_store(t->a[r], _mm512_maskz_loadu_ps(mask, a + r * QIE_A_STRIDE));
    for (int r = 0; r < QIE_TILE_ROWS; r++)
        for (int j = 0; j < nv; j++)
            vf_store(t->b[r] + j * QIE_TILE_BYTES,
                     r < steps ? vf_load(b + (r * nv + j) * QIE_TILE_BYTES) : vf_zero());
}

/* Products of 16 (two_rows: or 16 and the last 16) rows by nv x 16 columns, added to the tiles. */
#define MULTIPLY(a0, a1, a_stride, b, b_stride)           \
    do {                                                  \
        TILE_LOAD(4, a0, a_stride);                       \
        TILE_LOAD(6, b, b_stride);                        \
        TILE_DP_BF16(0, 4, 6);                            \
        if (nv > 1) {                                     \
            TILE_LOAD(7, (b) + QIE_TILE_BYTES, b_stride); \
            TILE_DP_BF16(1, 4, 7);                        \
        }                                                 \
        if (two_rows) {                                   \
            TILE_LOAD(5, a1, a_stride);                   \
            TILE_DP_BF16(2, 5, 6);                        \
            if (nv > 1)                                   \
                TILE_DP_BF16(3, 5, 7);                    \
        }                                                 \
    } while (0)

/* c: rows (16 .. 32, or any number of rows padded to 16 when !two_rows) ldc floats apart. */
ALWAYS void products(const int nv, const bool two_rows, int64_t rows, int64_t valid, int64_t steps,
                     const unsigned char *a, const unsigned char *b, float *c, int64_t ldc,
                     bool add) {
    const int64_t lower = two_rows ? rows - QIE_TILE_ROWS : 0, c_stride = ldc * 4;
    float *c1 = c + lower * ldc;
    const unsigned char *a1 = a + lower * QIE_A_STRIDE;
    if (add) {
        TILE_LOAD(0, c, c_stride);
        if (nv > 1)
            TILE_LOAD(1, c + 16, c_stride);
        if (two_rows) {
            TILE_LOAD(2, c1, c_stride);
            if (nv > 1)
                TILE_LOAD(3, c1 + 16, c_stride);
        }
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    const int64_t b_row = nv * QIE_TILE_BYTES;
    for (; steps >= QIE_TILE_ROWS; steps -= QIE_TILE_ROWS) {
        MULTIPLY(a, a1, QIE_A_STRIDE, b, b_row);
        a += QIE_TILE_BYTES;
        a1 += QIE_TILE_BYTES;
        b += QIE_TILE_ROWS * b_row;
    }
    if (steps > 0) {
        tail t;
        tail_fill(&t, nv, steps, valid, a, b);
        MULTIPLY(t.a[0], t.a[lower], QIE_TILE_BYTES, t.b[0], 2 * QIE_TILE_BYTES);
    }
    TILE_STORE(0, c, c_stride);
    if (nv > 1)
        TILE_STORE(1, c + 16, c_stride);
    if (two_rows) {
        TILE_STORE(2, c1, c_stride);
        if (nv > 1)
            TILE_STORE(3, c1 + 16, c_stride);
    }
}

ALWAYS void tile(const int rows, const int nv, int64_t steps, const void *a, const void *b,
                 float *c, int64_t ldc, const float *scale, bool add) {
    if (add && scale)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < nv; j++) {
                float *p = c + r * ldc + j * VW;
                vf_store(p, vf_mul(vf_load(p), vf_load(scale + j * VW)));
            }
    if (rows > QIE_TILE_ROWS)
        products(nv, true, rows, rows, steps, a, b, c, ldc, add);
    else if (rows == QIE_TILE_ROWS)
        products(nv, false, rows, rows, steps, a, b, c, ldc, add);
    else {
        _Alignas(64) float padded[QIE_TILE_ROWS][2 * VW];
        for (int r = 0; r < QIE_TILE_ROWS; r++)
            for (int j = 0; j < nv; j++)
                vf_store(padded[r] + j * VW,
                         add && r < rows ? vf_load(c + r * ldc + j * VW) : vf_zero());
        products(nv, false, rows, rows, steps, a, b, padded[0], 2 * VW, add);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < nv; j++)
                vf_store(c + r * ldc + j * VW, vf_load(padded[r] + j * VW));
    }
}

/* One function a number of rows, as the table asks; the work is in a few bodies that they share. */
static void tile_1(int rows, int64_t steps, const void *a, const void *b, float *c, int64_t ldc,
                   const float *scale, bool add) {
    tile(rows, 1, steps, a, b, c, ldc, scale, add);
}
static void tile_2(int rows, int64_t steps, const void *a, const void *b, float *c, int64_t ldc,
                   const float *scale, bool add) {
    tile(rows, 2, steps, a, b, c, ldc, scale, add);
}
#define ROWS_OF(nv, rows)                                                                   \
    static void bf16_gemm_##nv##x##rows##_amx(int64_t steps, const void *a, int64_t a_step, \
                                              const void *b, float *c, int64_t ldc,         \
                                              const float *scale, bool add) {               \
        (void)a_step;                                                                       \
        tile_##nv(rows, steps, a, b, c, ldc, scale, add);                                   \
    }
#define SOME_ROWS(X, nv, a, b, c, d, e, f, g, h) \
    X(nv, a) X(nv, b) X(nv, c) X(nv, d) X(nv, e) X(nv, f) X(nv, g) X(nv, h)
#define EACH_ROWS(X, nv)                             \
    SOME_ROWS(X, nv, 1, 2, 3, 4, 5, 6, 7, 8)         \
    SOME_ROWS(X, nv, 9, 10, 11, 12, 13, 14, 15, 16)  \
    SOME_ROWS(X, nv, 17, 18, 19, 20, 21, 22, 23, 24) \
    SOME_ROWS(X, nv, 25, 26, 27, 28, 29, 30, 31, 32)
EACH_ROWS(ROWS_OF, 1)
EACH_ROWS(ROWS_OF, 2)
#define ENTRY(nv, rows) bf16_gemm_##nv##x##rows##_amx,

/* Values as rows of channels, two keys a unit: [m][ceil(n / 2)], rows QIE_A_STRIDE apart. */
static void bf16_pack_v_amx(void *dst, const void *src, qie_dtype dtype, int64_t ld, int64_t n,
                            int64_t m) {
    (void)dtype;
    for (int64_t r0 = 0; r0 < n; r0 += 32)
        for (int64_t i = 0; i < m; i += 16) {
            const __mmask16 mask = m - i >= 16 ? 0xffff : vm_first(m - i);
            vf v[16];
#pragma GCC unroll 16
            for (int p = 0; p < 16; p++) {
                const int64_t r = r0 + 2 * p;
                const qie_bf16 *row = (const qie_bf16 *)src + r * ld + i;
                v[p] = vf_zero();
                if (r < n) {
                    __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
                    if (r + 1 < n) {
                        __m512i hi =
                            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + ld));
                        both = _mm512_or_si512(both, _mm512_slli_epi32(hi, 16));
                    }
                    v[p] = _mm512_castsi512_ps(both);
                }
            }
            vf_transpose(v);
            unsigned char *out = (unsigned char *)dst + i * QIE_A_STRIDE + r0 * 2;
            const int64_t rows = m - i < 16 ? m - i : 16;
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                if (r < rows)
                    vf_store(out + r * QIE_A_STRIDE, v[r]);
        }
}

static void tiles_begin(void) {
    qie_tiles_begin();
}
static void tiles_end(void) {
    qie_tiles_end();
}

void qie_bf16_gemm_amx_make(qie_gemm *out) {
    static const qie_tile_fn ROWS[2][MR + 1] = {{NULL, EACH_ROWS(ENTRY, 1)},
                                                {NULL, EACH_ROWS(ENTRY, 2)}};
    *out = qie_bf16_gemm_avx512bf16;
    out->mr = MR;
    memset(out->tile, 0, sizeof out->tile);
    for (int nv = 0; nv < 2; nv++)
        memcpy(out->tile[QIE_A_ROWS][nv], ROWS[nv], sizeof ROWS[nv]);
    out->v_rows = true;
    out->pack_v = bf16_pack_v_amx;
    out->begin = tiles_begin;
    out->end = tiles_end;
}
#else
typedef int qie_empty_translation_unit;
#endif
