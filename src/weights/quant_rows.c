/* Each scale is a least squares fit: for given integers q the best scale of w (s q - x)^2 is known
 * in closed form, so a start is one rounding of the values, four sums and the error that follows
 * from them. Several starts around the plain answer, then the scales are rounded as the format
 * stores them, and the integers are rounded once more for what is stored. */
#include "weights/quant_rows.h"

#include <math.h>
#include <string.h>

#include "base/blocks.h"

#define INLINE static inline __attribute__((always_inline))

/* Four lanes, summed in an order that does not depend on the machine. */
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

enum { LANES = 4, SUPER = 256 };

INLINE v4 v_load(const float *p) {
    v4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE v4 v_all(float f) {
    return (v4){f, f, f, f};
}
INLINE v4 v_select(i4 mask, v4 yes, v4 no) {
    return (v4)((mask & (i4)yes) | (~mask & (i4)no));
}
INLINE v4 v_clamp(v4 v, float low, float high) {
    v = v_select(v < v_all(low), v_all(low), v);
    return v_select(v > v_all(high), v_all(high), v);
}
/* Nearest, ties to even, of |v| < 2^22. */
INLINE v4 v_round(v4 v) {
    const v4 magic = v_all(12582912.0f);
    return (v + magic) - magic;
}
INLINE float v_sum(v4 v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}

static float nearest(float v) {
    return (v + 12582912.0f) - 12582912.0f;
}
static float clamp(float v, float low, float high) {
    return v < low ? low : v > high ? high : v;
}

static bool all_finite(const float *x, int64_t n) {
    uint32_t worst = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], sizeof u);
        u &= 0x7fffffffu;
        worst = u > worst ? u : worst;
    }
    return worst < 0x7f800000u;
}

/* A scale as it is stored; false if it does not fit. */
static bool put_half(uint8_t *p, float scale, float *stored) {
    qie_f16 h = qie_f32_to_f16(scale);
    memcpy(p, &h, 2);
    *stored = qie_f16_to_f32(h);
    return (h & 0x7c00u) != 0x7c00u;
}

/* The common factor of integer scales up to `levels`. Near the lower end of binary16 a rounding
 * down would leave the largest scale without an integer: then the next number up. */
static bool put_factor(uint8_t *p, float most, float levels, float *stored) {
    bool fits = put_half(p, most / levels, stored);
    if (fits && *stored * levels < most * 0.998f) {
        qie_f16 h = (qie_f16)(qie_f32_to_f16(most / levels) + 1);
        memcpy(p, &h, 2);
        *stored = qie_f16_to_f32(h);
        fits = (h & 0x7c00u) != 0x7c00u;
    }
    return fits;
}

/* -------------------------------------------------------------- symmetric: x = scale q */

/* q = round(x inverse) within [low, high]; the sums of w x q and w q q. */
INLINE void sums_symmetric(const float *x, const float *w, int n, float inverse, float low,
                           float high, float *xq, float *qq) {
    v4 a = v_all(0), b = v_all(0);
    for (int i = 0; i < n; i += LANES) {
        v4 v = v_load(x + i), q = v_round(v_clamp(v * v_all(inverse), low, high));
        v4 wq = v_load(w + i) * q;
        a += wq * v;
        b += wq * q;
    }
    *xq = v_sum(a);
    *qq = v_sum(b);
}

/* The value furthest from zero, with its sign. */
static float extreme(const float *x, int64_t n) {
    float most = 0, value = 0;
    for (int64_t i = 0; i < n; i++)
        if (fabsf(x[i]) > most) {
            most = fabsf(x[i]);
            value = x[i];
        }
    return value;
}

/* Best scale for integers in [-levels, levels - 1]; the extreme value gets the sign that has one
 * level more, and some starts cut it. */
INLINE float fit_symmetric(const float *x, const float *w, int n, float levels) {
    float most = extreme(x, n), best = 0, scale = 0;
    if (most == 0)
        return 0;
    scale = -most / levels;
    for (int turn = 0; turn < 2;
         turn++) /* the other sign wastes a level, and may still fit better */
        for (int i = -4; i <= 4; i++) {
            float xq, qq, inverse = (levels - (float)turn + 0.15f * levels / 8 * (float)i) / most;
            sums_symmetric(x, w, n, turn ? inverse : -inverse, -levels, levels - 1, &xq, &qq);
            /* the error is the sum of w x x less this */
            if (qq > 0 && xq * xq > best * qq) {
                best = xq * xq / qq;
                scale = xq / qq;
            }
        }
    return scale;
}

/* Error of a scale that is given: sum of w (scale q - x)^2. */
INLINE float error_symmetric(const float *x, const float *w, int n, float scale, float levels) {
    float inverse = scale == 0 ? 0 : 1 / scale;
    v4 e = v_all(0);
    if (!isfinite(inverse))
        inverse = 0;
    for (int i = 0; i < n; i += LANES) {
        v4 v = v_load(x + i);
        v4 d = v_round(v_clamp(v * v_all(inverse), -levels, levels - 1)) * v_all(scale) - v;
        e += v_load(w + i) * d * d;
    }
    return v_sum(e);
}

/* Integers for a scale that is given, 0 .. 2 levels - 1. */
static void round_symmetric(const float *x, int n, float scale, float levels, uint8_t *q) {
    float inverse = scale == 0 ? 0 : 1 / scale;
    if (!isfinite(inverse))
        inverse = 0;
    for (int i = 0; i < n; i++)
        q[i] = (uint8_t)(nearest(clamp(x[i] * inverse, -levels, levels - 1)) + levels);
}

static bool make_q8_0(const float *x, const float *w, uint8_t *out) {
    (void)w; /* at 8 bits the rounding of the largest value is what counts */
    float d;
    if (!put_half(out, fabsf(extreme(x, 32)) / 127, &d))
        return false;
    float inverse = d > 0 ? 1 / d : 0;
    for (int i = 0; i < 32; i++)
        out[2 + i] = (uint8_t)(int8_t)nearest(clamp(x[i] * inverse, -127, 127));
    return true;
}

static bool make_q4_0(const float *x, const float *w, uint8_t *out) {
    float d;
    uint8_t q[32];
    if (!put_half(out, fit_symmetric(x, w, 32, 8), &d))
        return false;
    round_symmetric(x, 32, d, 8, q);
    for (int i = 0; i < 16; i++)
        out[2 + i] = (uint8_t)(q[i] | q[16 + i] << 4);
    return true;
}

static bool make_q6_k(const float *x, const float *w, uint8_t *out) {
    enum { PARTS = 16, N = 16 };
    float scale[PARTS], d;
    uint8_t q[SUPER];
    int8_t stored[PARTS];
    for (int s = 0; s < PARTS; s++)
        scale[s] = fit_symmetric(x + N * s, w + N * s, N, 32);
    if (!put_factor(out + 208, fabsf(extreme(scale, PARTS)), 127, &d))
        return false;
    for (int s = 0; s < PARTS; s++) {
        float best = INFINITY, middle = d > 0 ? nearest(clamp(scale[s] / d, -127, 127)) : 0;
        for (int i = -1; i <= 1; i++) {
            float k = clamp(middle + (float)i, -127, 127);
            float e = error_symmetric(x + N * s, w + N * s, N, d * k, 32);
            if (e < best) {
                best = e;
                stored[s] = (int8_t)k;
            }
        }
        if (best == INFINITY) /* errors beyond float: keep the plain answer */
            stored[s] = (int8_t)middle;
        round_symmetric(x + N * s, N, d * (float)stored[s], 32, q + N * s);
    }
    memcpy(out + 192, stored, PARTS);
    for (int half = 0; half < 2; half++)
        for (int c = 0; c < 32; c++) {
            const uint8_t *e = q + 128 * half + c;
            out[64 * half + c] = (uint8_t)((e[0] & 15) | (e[64] & 15) << 4);
            out[64 * half + 32 + c] = (uint8_t)((e[32] & 15) | (e[96] & 15) << 4);
            out[128 + 32 * half + c] =
                (uint8_t)(e[0] >> 4 | e[32] >> 4 << 2 | e[64] >> 4 << 4 | e[96] >> 4 << 6);
        }
    return true;
}

/* -------------------------------------------------------------- affine: x = scale q - min */

enum { PART = 32, PARTS = 8 }; /* of Q4_K and Q5_K */

/* Least squares scale and minimum (scale >= 0, min >= 0) for q = round((x + min) inverse). Returns
 * how much smaller than the sum of w x x the error is. */
INLINE float refit_affine(const float *x, const float *w, float inverse, float min, float top,
                          float *scale_out, float *min_out) {
    v4 sw = v_all(0), sx = sw, sq = sw, sxq = sw, sqq = sw;
    for (int i = 0; i < PART; i += LANES) {
        v4 v = v_load(x + i), k = v_load(w + i);
        v4 q = v_round(v_clamp((v + v_all(min)) * v_all(inverse), 0, top)), kq = k * q;
        sw += k;
        sx += k * v;
        sq += kq;
        sxq += kq * v;
        sqq += kq * q;
    }
    float n = v_sum(sw), a = v_sum(sx), b = v_sum(sq), c = v_sum(sxq), d = v_sum(sqq);
    float det = n * d - b * b, s = 0, m = 0;
    if (det > 1e-6f * n * d) {
        s = (n * c - a * b) / det;
        m = (b * c - d * a) / det;
    }
    if (s <= 0 && c <= 0 && n > 0) { /* one level for all */
        s = 0;
        m = a < 0 ? -a / n : 0;
    } else if (m < 0 || s <= 0) {
        m = 0;
        s = d > 0 && c > 0 ? c / d : 0;
    }
    *scale_out = s;
    *min_out = m;
    return 2 * (s * c - m * a) - (s * s * d - 2 * s * m * b + m * m * n);
}

INLINE void fit_affine(const float *x, const float *w, float top, float *scale, float *min) {
    float low = 0, high = 0, best = -INFINITY;
    for (int i = 0; i < PART; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    *scale = (high - low) / top;
    *min = -low;
    if (!(high > low))
        return;
    for (int i = -3; i <= 3; i++) { /* starts that cut and starts that spread */
        float s, m,
            gain = refit_affine(x, w, (top + 0.3f * (float)i) / (high - low), -low, top, &s, &m);
        if (gain > best) {
            best = gain;
            *scale = s;
            *min = m;
        }
    }
    for (int i = 0; i < 3 && *scale > 0; i++) {
        float s, m, gain = refit_affine(x, w, 1 / *scale, *min, top, &s, &m);
        if (!(gain > best))
            break;
        best = gain;
        *scale = s;
        *min = m;
    }
}

INLINE float error_affine(const float *x, const float *w, float scale, float min, float top) {
    float inverse = scale > 0 ? 1 / scale : 0;
    v4 e = v_all(0);
    if (!isfinite(inverse))
        inverse = 0;
    for (int i = 0; i < PART; i += LANES) {
        v4 v = v_load(x + i) + v_all(min);
        v4 d = v_round(v_clamp(v * v_all(inverse), 0, top)) * v_all(scale) - v;
        e += v_load(w + i) * d * d;
    }
    return v_sum(e);
}

/* The stored scale and minimum of a part: the rounded ones or a neighbour that fits better. */
INLINE void choose_affine(const float *x, const float *w, float d, float dmin, float top,
                          uint8_t *scale, uint8_t *min) {
    static const signed char NEAR[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}, {1, 1}, {-1, -1}};
    float best = error_affine(x, w, d * (float)*scale, dmin * (float)*min, top);
    int s0 = *scale, m0 = *min;
    for (size_t i = 0; i < sizeof NEAR / sizeof *NEAR; i++) {
        int s = s0 + NEAR[i][0], m = m0 + NEAR[i][1];
        if (s < 0 || s > 63 || m < 0 || m > 63)
            continue;
        float e = error_affine(x, w, d * (float)s, dmin * (float)m, top);
        if (e < best) {
            best = e;
            *scale = (uint8_t)s;
            *min = (uint8_t)m;
        }
    }
}

static void pack_scales(const uint8_t scale[PARTS], const uint8_t min[PARTS], uint8_t *out) {
    for (int i = 0; i < 4; i++) {
        out[i] = (uint8_t)(scale[i] | scale[4 + i] >> 4 << 6);
        out[4 + i] = (uint8_t)(min[i] | min[4 + i] >> 4 << 6);
        out[8 + i] = (uint8_t)((scale[4 + i] & 15) | (min[4 + i] & 15) << 4);
    }
}

INLINE bool make_affine(const float *x, const float *w, float top, uint8_t *out, uint8_t q[SUPER]) {
    float scale[PARTS], min[PARTS], d, dmin;
    uint8_t stored[PARTS], stored_min[PARTS];
    for (int s = 0; s < PARTS; s++)
        fit_affine(x + PART * s, w + PART * s, top, &scale[s], &min[s]);
    if (!put_factor(out, extreme(scale, PARTS), 63, &d) ||
        !put_factor(out + 2, extreme(min, PARTS), 63, &dmin))
        return false;
    for (int s = 0; s < PARTS; s++) {
        stored[s] = (uint8_t)(d > 0 ? nearest(clamp(scale[s] / d, 0, 63)) : 0);
        stored_min[s] = (uint8_t)(dmin > 0 ? nearest(clamp(min[s] / dmin, 0, 63)) : 0);
        choose_affine(x + PART * s, w + PART * s, d, dmin, top, &stored[s], &stored_min[s]);
        float step = d * (float)stored[s], inverse = step > 0 ? 1 / step : 0;
        if (!isfinite(inverse))
            inverse = 0;
        for (int i = 0; i < PART; i++)
            q[PART * s + i] = (uint8_t)nearest(
                clamp((x[PART * s + i] + dmin * (float)stored_min[s]) * inverse, 0, top));
    }
    pack_scales(stored, stored_min, out + 4);
    return true;
}

static bool make_q4_k(const float *x, const float *w, uint8_t *out) {
    uint8_t q[SUPER];
    if (!make_affine(x, w, 15, out, q))
        return false;
    for (int e = 0; e < SUPER / 2; e++) {
        int at = 64 * (e / PART) + e % PART;
        out[16 + e] = (uint8_t)(q[at] | q[at + PART] << 4);
    }
    return true;
}

static bool make_q5_k(const float *x, const float *w, uint8_t *out) {
    uint8_t q[SUPER];
    if (!make_affine(x, w, 31, out, q))
        return false;
    memset(out + 16, 0, PART);
    for (int e = 0; e < SUPER; e++)
        out[16 + e % PART] |= (uint8_t)(q[e] >> 4 << e / PART);
    for (int e = 0; e < SUPER / 2; e++) {
        int at = 64 * (e / PART) + e % PART;
        out[48 + e] = (uint8_t)((q[at] & 15) | (q[at + PART] & 15) << 4);
    }
    return true;
}

/* -------------------------------------------------------------- rows */

typedef bool (*make_fn)(const float *x, const float *w, uint8_t *out);

static make_fn maker_of(qie_dtype dtype) {
    switch (dtype) {
    case QIE_Q8_0: return make_q8_0;
    case QIE_Q4_0: return make_q4_0;
    case QIE_Q4_K: return make_q4_k;
    case QIE_Q5_K: return make_q5_k;
    case QIE_Q6_K: return make_q6_k;
    default: return NULL;
    }
}

bool qie_quant_makes_blocks(qie_dtype dtype) {
    return maker_of(dtype) != NULL;
}

bool qie_quant_blocks(qie_dtype dtype, const float *x, const float *importance, int64_t n,
                      void *out) {
    make_fn make = maker_of(dtype);
    int block = qie_dtype_block_elements(dtype);
    size_t bytes = qie_dtype_block_bytes(dtype);
    float ones[SUPER];
    uint8_t *to = out;
    if (!make || n % block || !all_finite(x, n))
        return false;
    for (int i = 0; i < SUPER; i++)
        ones[i] = 1;
    for (int64_t i = 0; i < n; i += block, to += bytes)
        if (!make(x + i, importance ? importance + i : ones, to))
            return false;
    return true;
}

/* The scale of a row of I8 with the smallest error, among some that cut the largest values. */
static float fit_row(const float *x, const float *importance, int64_t n, float most) {
    float best = -1, scale = most / 127;
    for (int i = 0; i < 12; i++) {
        float inverse = 127 / (most * (1 - 0.03f * (float)i)), gain, xq = 0, qq = 0;
        for (int64_t k = 0; k < n; k += SUPER) {
            float v[SUPER] = {0}, w[SUPER], part_xq, part_qq;
            size_t len = (size_t)(n - k < SUPER ? n - k : SUPER);
            memcpy(v, x + k, len * sizeof *v);
            for (size_t j = 0; j < SUPER; j++)
                w[j] = importance && j < len ? importance[(size_t)k + j] : 1;
            sums_symmetric(v, w, SUPER, inverse, -127, 127, &part_xq, &part_qq);
            xq += part_xq;
            qq += part_qq;
        }
        gain = qq > 0 ? xq * (xq / qq) : 0;
        if (gain > best) {
            best = gain;
            scale = xq / qq;
        }
    }
    return scale;
}

bool qie_quant_scaled(qie_dtype dtype, const float *x, const float *importance, int64_t n,
                      void *out, float *scale) {
    uint8_t *to = out;
    if ((dtype != QIE_I8 && dtype != QIE_F8_E4M3) || !all_finite(x, n))
        return false;
    float most = fabsf(extreme(x, n));
    *scale = 1;
    if (most == 0) {
        memset(out, 0, (size_t)n);
        return true;
    }
    *scale = dtype == QIE_I8 ? fit_row(x, importance, n, most) : most / 448;
    /* Values so small that a scale would lose its bits, or none is left: as good as zero. */
    if (!(*scale >= 1e-30f) || !isfinite(*scale))
        *scale = most / (dtype == QIE_I8 ? 127 : 448) >= 1e-30f ? most / 127 : 1e-30f;
    float inverse = 1 / *scale;
    for (int64_t i = 0; i < n; i++)
        to[i] = dtype == QIE_I8 ? (uint8_t)(int8_t)nearest(clamp(x[i] * inverse, -127, 127))
                                : qie_f32_to_f8_e4m3(clamp(x[i] * inverse, -448, 448));
    return true;
}
