#define _GNU_SOURCE
#include "image/resample.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "base/checked.h"
#include "base/error.h"
#include "base/parallel.h"
#include "image/image.h"

#define WEIGHT_BITS 22 /* Pillow: 32 - 8 bits of pixel - 2 bits for sums of overshooting lobes */
#define ROWS_PER_TASK 8

/* Weights of one axis. A weight q is kept as two 16-bit halves, q = high * 2^15 + low with 0 <= low
 * < 2^15, for the processor's 16-bit multiply-add; the sum is the same modulo 2^32, and the true
 * sum fits. Taps come in pairs: an odd count is filled up with a zero weight. */
typedef struct axis {
    int n_out, n_pairs; /* n_pairs: room per output, the largest of all */
    int *first, *count; /* per output: first input and number of taps */
    int16_t *high, *low;
} axis;

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static double sinc(double x) {
    if (x == 0.0)
        return 1.0;
    x = x * M_PI;
    return sin(x) / x;
}

static double lanczos(double x) {
    return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
}

static void axis_release(axis *a) {
    free(a->first);
    free(a->count);
    free(a->high);
    free(a->low);
    memset(a, 0, sizeof *a);
}

/* The order of every operation here is Pillow's: the weights are truncated from doubles, so another
 * order would change some of them by one. */
static void fill_weights(axis *a, int n_in, double support, double (*filter)(double), double *w) {
    double scale = (double)n_in / a->n_out, widen = scale < 1.0 ? 1.0 : scale;
    double reach = support * widen, shrink = 1.0 / widen;
    for (int o = 0; o < a->n_out; o++) {
        double centre = (o + 0.5) * scale, sum = 0.0;
        int lo = (int)(centre - reach + 0.5), hi = (int)(centre + reach + 0.5);
        lo = lo < 0 ? 0 : lo;
        hi = hi > n_in ? n_in : hi;
        int n = hi - lo;
        for (int k = 0; k < n; k++) {
            w[k] = filter((lo + k - centre + 0.5) * shrink);
            sum += w[k];
        }
        a->first[o] = lo;
        a->count[o] = n;
        size_t at = (size_t)o * (size_t)a->n_pairs * 2;
        for (int k = 0; k < n; k++) {
            double v = sum != 0.0 ? w[k] / sum : w[k];
            int q = (int)(v * (1 << WEIGHT_BITS) + (v < 0 ? -0.5 : 0.5));
            a->high[at + (size_t)k] = (int16_t)(q >> 15);
            a->low[at + (size_t)k] = (int16_t)(q & 0x7fff);
        }
    }
}

static qie_status axis_init(axis *a, int n_in, int n_out, qie_filter filter, qie_error *err) {
    memset(a, 0, sizeof *a);
    double support = filter == QIE_FILTER_BICUBIC ? 2.0 : 3.0;
    double scale = (double)n_in / n_out;
    size_t taps = (size_t)ceil(support * (scale < 1.0 ? 1.0 : scale)) * 2 + 1;
    size_t pairs = (taps + 1) / 2, n = (size_t)n_out, all;
    double *w = malloc(taps * sizeof *w);
    bool fits = qie_mul_size(n, pairs * 2, &all);
    a->n_out = n_out;
    a->n_pairs = (int)pairs;
    a->first = malloc(n * sizeof *a->first);
    a->count = malloc(n * sizeof *a->count);
    a->high = fits ? calloc(all, sizeof *a->high) : NULL;
    a->low = fits ? calloc(all, sizeof *a->low) : NULL;
    bool ok = w && a->first && a->count && a->high && a->low;
    if (ok)
        fill_weights(a, n_in, support, filter == QIE_FILTER_BICUBIC ? bicubic : lanczos, w);
    else
        axis_release(a);
    free(w);
    QIE_FAIL_IF(!ok, QIE_E_NO_MEMORY, err, "image", "out of memory while resizing a picture");
    return QIE_OK;
}

typedef struct pass {
    const qie_image *src;
    qie_image *dst;
    const axis *axis;
} pass;

#ifdef __SSE2__
/* Two neighbouring weights in every 32-bit lane. */
static inline __m128i pair_of(const int16_t *q) {
    int v;
    memcpy(&v, q, sizeof v);
    return _mm_set1_epi32(v);
}

static inline __m128i finish(__m128i high, __m128i low) {
    __m128i half = _mm_set1_epi32(1 << (WEIGHT_BITS - 1));
    return _mm_srai_epi32(_mm_add_epi32(_mm_add_epi32(_mm_slli_epi32(high, 15), low), half),
                          WEIGHT_BITS);
}
#else
static inline uint8_t finish(int32_t acc) {
    acc >>= WEIGHT_BITS;
    return (uint8_t)(acc < 0 ? 0 : acc > 255 ? 255 : acc);
}
#endif

static inline int weight(const int16_t *high, const int16_t *low, int k) {
    return high[k] * 32768 + low[k];
}

static void horizontal_row(const axis *a, const uint8_t *src, uint8_t *dst) {
    for (int o = 0; o < a->n_out; o++, dst += 3) {
        const int16_t *high = a->high + (size_t)o * (size_t)a->n_pairs * 2;
        const int16_t *low = a->low + (size_t)o * (size_t)a->n_pairs * 2;
        const uint8_t *p = src + (size_t)a->first[o] * 3;
#ifdef __SSE2__
        __m128i zero = _mm_setzero_si128(), sum_high = zero, sum_low = zero;
        for (int k = 0; k < a->count[o]; k += 2, p += 6) {
            /* Eight bytes hold two pixels; the slack behind the picture allows the last load. */
            __m128i v = _mm_loadl_epi64((const __m128i *)p);
            __m128i rgb = _mm_unpacklo_epi8(_mm_unpacklo_epi8(v, _mm_srli_epi64(v, 24)), zero);
            sum_high = _mm_add_epi32(sum_high, _mm_madd_epi16(rgb, pair_of(high + k)));
            sum_low = _mm_add_epi32(sum_low, _mm_madd_epi16(rgb, pair_of(low + k)));
        }
        __m128i v = finish(sum_high, sum_low);
        v = _mm_packus_epi16(_mm_packs_epi32(v, v), zero);
        int bytes = _mm_cvtsi128_si32(v);
        memcpy(dst, &bytes, 3);
#else
        int32_t r = 1 << (WEIGHT_BITS - 1), g = r, b = r;
        for (int k = 0; k < a->count[o]; k++, p += 3) {
            int q = weight(high, low, k);
            r += p[0] * q;
            g += p[1] * q;
            b += p[2] * q;
        }
        dst[0] = finish(r);
        dst[1] = finish(g);
        dst[2] = finish(b);
#endif
    }
}

static void horizontal_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const pass *p = arg;
    int y0 = (int)index * ROWS_PER_TASK, y1 = y0 + ROWS_PER_TASK;
    for (int y = y0; y < y1 && y < p->dst->height; y++)
        horizontal_row(p->axis, p->src->pixels + (size_t)y * qie_image_stride(p->src),
                       p->dst->pixels + (size_t)y * qie_image_stride(p->dst));
}

/* Bytes [from, to) of one output row. */
static void vertical_plain(const uint8_t *src, size_t stride, const int16_t *high,
                           const int16_t *low, int count, uint8_t *dst, size_t from, size_t to) {
    for (size_t i = from; i < to; i++) {
        int32_t acc = 1 << (WEIGHT_BITS - 1);
        for (int k = 0; k < count; k++)
            acc += src[(size_t)k * stride + i] * weight(high, low, k);
        acc >>= WEIGHT_BITS;
        dst[i] = (uint8_t)(acc < 0 ? 0 : acc > 255 ? 255 : acc);
    }
}

static void vertical_row(const axis *a, int o, const qie_image *src, uint8_t *dst) {
    const int16_t *high = a->high + (size_t)o * (size_t)a->n_pairs * 2;
    const int16_t *low = a->low + (size_t)o * (size_t)a->n_pairs * 2;
    size_t stride = qie_image_stride(src), i = 0;
    const uint8_t *top = src->pixels + (size_t)a->first[o] * stride;
    int count = a->count[o];
#ifdef __SSE2__
    __m128i zero = _mm_setzero_si128();
    for (; i + 16 <= stride; i += 16) {
        __m128i h0 = zero, h1 = zero, h2 = zero, h3 = zero;
        __m128i l0 = zero, l1 = zero, l2 = zero, l3 = zero;
        for (int k = 0; k < count; k += 2) {
            const uint8_t *row = top + (size_t)k * stride + i;
            const uint8_t *next = k + 1 < count ? row + stride : row; /* its weight is then zero */
            __m128i x = _mm_loadu_si128((const __m128i *)row);
            __m128i y = _mm_loadu_si128((const __m128i *)next);
            __m128i left = _mm_unpacklo_epi8(x, y), right = _mm_unpackhi_epi8(x, y);
            __m128i v0 = _mm_unpacklo_epi8(left, zero), v1 = _mm_unpackhi_epi8(left, zero);
            __m128i v2 = _mm_unpacklo_epi8(right, zero), v3 = _mm_unpackhi_epi8(right, zero);
            __m128i q = pair_of(high + k);
            h0 = _mm_add_epi32(h0, _mm_madd_epi16(v0, q));
            h1 = _mm_add_epi32(h1, _mm_madd_epi16(v1, q));
            h2 = _mm_add_epi32(h2, _mm_madd_epi16(v2, q));
            h3 = _mm_add_epi32(h3, _mm_madd_epi16(v3, q));
            q = pair_of(low + k);
            l0 = _mm_add_epi32(l0, _mm_madd_epi16(v0, q));
            l1 = _mm_add_epi32(l1, _mm_madd_epi16(v1, q));
            l2 = _mm_add_epi32(l2, _mm_madd_epi16(v2, q));
            l3 = _mm_add_epi32(l3, _mm_madd_epi16(v3, q));
        }
        __m128i left = _mm_packs_epi32(finish(h0, l0), finish(h1, l1));
        __m128i right = _mm_packs_epi32(finish(h2, l2), finish(h3, l3));
        _mm_storeu_si128((__m128i *)(dst + i), _mm_packus_epi16(left, right));
    }
#endif
    vertical_plain(top, stride, high, low, count, dst, i, stride);
}

static void vertical_task(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    const pass *p = arg;
    int y0 = (int)index * ROWS_PER_TASK, y1 = y0 + ROWS_PER_TASK;
    for (int y = y0; y < y1 && y < p->dst->height; y++)
        vertical_row(p->axis, y, p->src, p->dst->pixels + (size_t)y * qie_image_stride(p->dst));
}

/* One pass along one axis, or none when that side stays: then *out is NULL. */
static qie_status run_pass(const qie_image *src, bool vertical, int n_out, qie_filter filter,
                           int n_threads, qie_image **out, qie_error *err) {
    *out = NULL;
    int n_in = vertical ? src->height : src->width;
    if (n_in == n_out)
        return QIE_OK;
    axis a;
    QIE_TRY(axis_init(&a, n_in, n_out, filter, err));
    pass p = {src, NULL, &a};
    qie_status st = qie_image_create(vertical ? src->width : n_out, vertical ? n_out : src->height,
                                     &p.dst, err);
    if (st == QIE_OK) {
        size_t n = ((size_t)p.dst->height + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
        qie_parallel_for(n_threads, n, vertical ? vertical_task : horizontal_task, &p);
        *out = p.dst;
    }
    axis_release(&a);
    return st;
}

static bool vertical_first(const qie_image *image, int w, int h, qie_resample_order order) {
    int64_t less_h = (int64_t)image->height - h, less_w = (int64_t)image->width - w;
    return order == QIE_RESAMPLE_PILLOW_13 && less_h > 0 && less_h > 2 * less_w;
}

qie_status qie_resample(const qie_image *image, int w, int h, qie_filter filter,
                        qie_resample_order order, int n_threads, qie_image **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(w < 1 || h < 1, QIE_E_INVALID, err, "image",
                "a picture cannot be resized to %dx%d pixels", w, h);
    if (w == image->width && h == image->height) {
        QIE_TRY(qie_image_create(w, h, out, err));
        memcpy((*out)->pixels, image->pixels, (size_t)h * qie_image_stride(image));
        return QIE_OK;
    }
    bool vertical = vertical_first(image, w, h, order);
    qie_image *mid, *last;
    QIE_TRY(run_pass(image, vertical, vertical ? h : w, filter, n_threads, &mid, err));
    qie_status st =
        run_pass(mid ? mid : image, !vertical, vertical ? w : h, filter, n_threads, &last, err);
    if (st == QIE_OK && last) {
        qie_image_destroy(mid);
        *out = last;
    } else if (st == QIE_OK)
        *out = mid;
    else
        qie_image_destroy(mid);
    return st;
}
