#if defined(__x86_64__)
/* 8-bit integers in AMX tiles (TDPBSSD): 32 x 32 sums in four tiles, 64 elements along k a step. A
 * block of k is summed in the tiles, then scaled into the float sums, so nothing of 32 bits lives
 * longer than a block. The panels of B are tiles as they lie; steps come in whole tiles (zeros
 * behind the end), rows beyond the end are computed and dropped: the driver leaves room for
 * reading them. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/x86/amx.h"
#include "compute/cpu/x86/vec_avx512.inc"

#define MR 32
#define UNIT 4
#define STARTS false
#define I8_ROWS_ONLY
#include "compute/cpu/x86/vi_avx512.inc"

/* A vector of rounded values as elements i .. i + VW - 1; both sides are signed. */
ALWAYS void put_elements(unsigned char *dst, int64_t i, vf v, const bool left) {
    (void)left;
    _mm_storeu_si128((__m128i *)(void *)(dst + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
ALWAYS void put_bytes(unsigned char *dst, const unsigned char *w, int64_t k) {
    for (int64_t i = 0; i < k; i += 16)
        _mm_storeu_si128((__m128i *)(void *)(dst + i), load_bytes(w + i, k - i));
}
#include "compute/cpu/x86/i8_gemm.inc"

enum { SUMS_LD = 32 };

/* nv and two_rows are constants where inlined. */
ALWAYS void products(const int nv, const bool two_rows, int64_t steps, const unsigned char *a,
                     const unsigned char *b, int32_t *sums) {
    const int64_t b_row = nv * QIE_TILE_BYTES;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (; steps > 0; steps -= QIE_TILE_ROWS) {
        TILE_LOAD(4, a, A_STRIDE);
        TILE_LOAD(6, b, b_row);
        TILE_DP_I8(0, 4, 6);
        if (nv > 1) {
            TILE_LOAD(7, b + QIE_TILE_BYTES, b_row);
            TILE_DP_I8(1, 4, 7);
        }
        if (two_rows) {
            TILE_LOAD(5, a + QIE_TILE_ROWS * A_STRIDE, A_STRIDE);
            TILE_DP_I8(2, 5, 6);
            if (nv > 1)
                TILE_DP_I8(3, 5, 7);
        }
        a += QIE_TILE_BYTES;
        b += QIE_TILE_ROWS * b_row;
    }
    TILE_STORE(0, sums, SUMS_LD * 4);
    if (nv > 1)
        TILE_STORE(1, sums + 16, SUMS_LD * 4);
    if (two_rows) {
        TILE_STORE(2, sums + 16 * SUMS_LD, SUMS_LD * 4);
        if (nv > 1)
            TILE_STORE(3, sums + 16 * SUMS_LD + 16, SUMS_LD * 4);
    }
}

/* One group only: short ones would spend their time on storing tiles. */
ALWAYS void tile(const int nv, int rows, int64_t steps, const void *a_, const void *b_, float *c,
                 int64_t ldc, bool add) {
    const unsigned char *a = a_, *b = (const unsigned char *)b_ + nv * VW * 8;
    const float *scale = b_;
    _Alignas(64) int32_t sums[MR * SUMS_LD];
    if (rows > QIE_TILE_ROWS)
        products(nv, true, steps, a, b, sums);
    else
        products(nv, false, steps, a, b, sums);
    for (int r = 0; r < rows; r++) {
        const vf x_scale = vf_bcast(a + r * A_STRIDE + A_SCALE);
        for (int j = 0; j < nv; j++) {
            float *p = c + r * ldc + j * VW;
            vf f = vf_mul(x_scale, vf_load(scale + j * VW));
            vf v = vi_to_f32(vi_load(sums + r * SUMS_LD + j * VW));
            vf_store(p, add ? vf_fma(v, f, vf_load(p)) : vf_mul(v, f));
        }
    }
}
/* One function a number of rows, as the table asks; the work is in two bodies that they share. */
static void tile_1(int rows, int64_t steps, const void *a, const void *b, float *c, int64_t ldc,
                   bool add) {
    tile(1, rows, steps, a, b, c, ldc, add);
}
static void tile_2(int rows, int64_t steps, const void *a, const void *b, float *c, int64_t ldc,
                   bool add) {
    tile(2, rows, steps, a, b, c, ldc, add);
}
#define ROWS_OF(nv, rows)                                                                     \
    static void i8_gemm_##nv##x##rows##_amx(int64_t groups, int64_t steps, const void *a,     \
                                            const void *b, float *c, int64_t ldc, bool add) { \
        (void)groups;                                                                         \
        tile_##nv(rows, steps, a, b, c, ldc, add);                                            \
    }
#define ENTRY(nv, rows) i8_gemm_##nv##x##rows##_amx,
#define SOME_ROWS(X, nv, a, b, c, d, e, f, g, h) \
    X(nv, a) X(nv, b) X(nv, c) X(nv, d) X(nv, e) X(nv, f) X(nv, g) X(nv, h)
#define EACH_ROWS(X, nv)                             \
    SOME_ROWS(X, nv, 1, 2, 3, 4, 5, 6, 7, 8)         \
    SOME_ROWS(X, nv, 9, 10, 11, 12, 13, 14, 15, 16)  \
    SOME_ROWS(X, nv, 17, 18, 19, 20, 21, 22, 23, 24) \
    SOME_ROWS(X, nv, 25, 26, 27, 28, 29, 30, 31, 32)
EACH_ROWS(ROWS_OF, 1)
EACH_ROWS(ROWS_OF, 2)

static void tiles_begin(void) {
    qie_tiles_begin();
}
static void tiles_end(void) {
    qie_tiles_end();
}

const qie_i8_gemm qie_i8_gemm_amx = {
    .mr = MR,
    .vw = VW,
    .unit = UNIT,
    .step_multiple = QIE_TILE_ROWS,
    .tile = {{NULL, EACH_ROWS(ENTRY, 1)}, {NULL, EACH_ROWS(ENTRY, 2)}},
    .row_a = ISA(i8_row_a),
    .row_b = ISA(i8_row_b),
    .begin = tiles_begin,
    .end = tiles_end,
};
#else
typedef int qie_empty_translation_unit;
#endif
