/* 3x3 convolutions of stride 1 in float by Winograd's minimal filtering: tiles of 2x2 results from
 * 16 products for each pair of channels instead of 36, and from 9 where the input is doubled first
 * (x86/winograd.inc). The factors are 1 and 1/2 and the sums short: the error stays that of the
 * direct sum within a small factor, unlike with larger tiles. In bf16 the transformed values would
 * be rounded once more: there the direct product stays.
 *
 * The weights are transformed once into the scratch that all threads share, [panel of two vectors
 * of output channels][block of input channels][place in the tile][input channel][column]. A task
 * takes some tiles of the map through all of it: transforms their inputs, and for each panel
 * multiplies place by place and transforms the sums back, while they are in the core's cache. */
#include <assert.h>
#include <string.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"

enum {
    PLACES = 16,
    AHEAD = 4,             /* tiles between the request for an input and its use */
    MAX_TILES = 48,        /* in a task */
    INPUT_BYTES = 1 << 20, /* of one task's transformed inputs, at most */
    /* Below, the gather of the direct product costs less than the transforms. */
    MIN_CHANNELS = 16,
    MIN_PIXELS = 64,
};

typedef struct winograd {
    qie_compute *c;
    const qie_conv2d_args *a;
    const qie_gemm *g;
    int n;              /* 4, or 3 of a doubled map */
    int64_t blocks, kb; /* of input channels; channels in one (the last may have fewer) */
    int64_t tiles_x, n_tiles, task_tiles;
    float *weights;
} winograd;

/* From one place to the next: an odd number of cache lines, or the 16 rows that a tile is written
 * to would share a few sets of the cache. */
static int64_t place_bytes(int64_t tiles) {
    int64_t lines = tiles * QIE_A_STRIDE / 64;
    return (lines | 1) * 64;
}

/* Places of all blocks, with the padded rows that the tile kernels take. */
static int64_t input_bytes(int64_t channels, int64_t tiles) {
    return qie_ceil_div(channels, QIE_K_UNITS) * PLACES * place_bytes(tiles);
}

static int64_t tiles_of(int64_t channels, int mr) {
    int64_t fit = INPUT_BYTES / (PLACES * 4 * channels) / mr * mr;
    int64_t most = MAX_TILES / mr * mr;
    return fit > most ? most : fit < mr ? mr : fit;
}

size_t qie_cpu_winograd_shared_bytes(int64_t in, int64_t out) {
    return (size_t)PLACES * (size_t)in * (size_t)(qie_ceil_div(out, QIE_NR_MAX) * QIE_NR_MAX) * 4;
}

static size_t most_input_bytes(int64_t max_in) {
    int64_t most = 0;
    /* of all with one number of blocks the fewest channels allow the most tiles */
    for (int64_t c = 1; c <= max_in; c += QIE_K_UNITS) {
        int64_t tiles = tiles_of(c, 1), n = input_bytes(c, tiles > QIE_MR_MAX ? tiles : QIE_MR_MAX);
        most = n > most ? n : most;
    }
    return (size_t)most;
}

size_t qie_cpu_winograd_thread_bytes(int64_t max_in) {
    return most_input_bytes(max_in) +
           (size_t)(PLACES + 4) * MAX_TILES * QIE_NR_MAX * 4; /* sums, rows of results */
}

bool qie_cpu_winograd_takes(const qie_compute *c, const qie_conv2d_args *a) {
    const qie_cpu_state *s = qie_cpu_state_of(c);
    const qie_gemm *g = qie_cpu_gemm(c, a->x.dtype);
    return g->winograd_in && a->w.kh == 3 && a->stride == 1 && a->w.in >= MIN_CHANNELS &&
           (int64_t)a->dst.h * a->dst.w >= MIN_PIXELS &&
           qie_cpu_winograd_shared_bytes(a->w.in, a->w.out) <= s->shared_bytes &&
           qie_cpu_winograd_thread_bytes(a->w.in) <= s->thread_bytes;
}

/* ---- weights */

/* The nine taps of one input channel, for up to n output channels from o0 on. */
static void taps_of(const qie_conv_weight *w, int64_t o0, int64_t n, int64_t ch, int vw, float *g) {
    int64_t taps = (int64_t)w->kt * 9, last = taps - 9;
    for (int64_t o = 0; o < vw; o++) {
        size_t at = (size_t)(((o0 + o) * w->in + ch) * taps + last);
        for (int64_t t = 0; t < 9; t++) {
            float v = 0;
            if (o >= n)
                v = 0;
            else if (w->dtype == QIE_F32)
                memcpy(&v, (const unsigned char *)w->data + (at + (size_t)t) * 4, 4);
            else {
                uint16_t h;
                memcpy(&h, (const unsigned char *)w->data + (at + (size_t)t) * 2, 2);
                v = w->dtype == QIE_BF16 ? qie_bf16_to_f32(h) : qie_f16_to_f32(h);
            }
            g[t * vw + o] = v;
        }
    }
}

static void weights_task(void *arg, size_t index, int i_thread) {
    const winograd *job = arg;
    (void)i_thread;
    const qie_conv_weight *w = &job->a->w;
    int vw = job->g->vw;
    int64_t o0 = (int64_t)index * 2 * vw, n = w->out - o0 < 2 * vw ? w->out - o0 : 2 * vw;
    int64_t cols = n > vw ? 2 * vw : vw, places = (int64_t)job->n * job->n;
    float *panel = job->weights + places * w->in * o0, g[9 * QIE_NR_MAX / 2];
    for (int64_t b = 0; b < job->blocks; b++) {
        int64_t c0 = b * job->kb, k = w->in - c0 < job->kb ? w->in - c0 : job->kb;
        for (int64_t i = 0; i < k; i++)
            for (int64_t v = 0; v < cols; v += vw) {
                taps_of(w, o0 + v, n - v, c0 + i, vw, g);
                job->g->winograd_weights(panel + places * c0 * cols + i * cols + v, k * cols, g,
                                         job->n);
            }
    }
}

/* ---- tiles */

/* Pointers to the pixels that tile t reads; outside of the map they point to zeros. */
static void pixels_of(const winograd *job, int64_t t, const void *zeros, const void **px) {
    const qie_fmap *x = &job->a->x;
    size_t pixel = (size_t)x->c * qie_dtype_size(x->dtype);
    int step = job->n == 4 ? 2 : 1;
    int64_t y0 = t / job->tiles_x * step - 1, x0 = t % job->tiles_x * step - 1;
    for (int y = 0; y < job->n; y++)
        for (int i = 0; i < job->n; i++) {
            int64_t sy = y0 + y, sx = x0 + i;
            bool inside = sy >= 0 && sy < x->h && sx >= 0 && sx < x->w;
            px[y * job->n + i] =
                inside ? (const unsigned char *)x->data + (size_t)(sy * x->w + sx) * pixel : zeros;
        }
}

/* Ask for the pixels that tile t reads and the ones before it did not: their rows lie far apart and
 * are too short for the processor to guess. */
static void prefetch_tile(const winograd *job, int64_t t, const void *zeros) {
    const void *px[PLACES];
    int64_t bytes = (int64_t)((size_t)job->a->x.c * qie_dtype_size(job->a->x.dtype));
    pixels_of(job, t, zeros, px);
    for (int y = 0; y < job->n; y++)
        for (int x = job->n - (job->n == 4 ? 2 : 1); x < job->n; x++)
            for (int64_t i = 0; px[y * job->n + x] != zeros && i < bytes; i += 64)
                __builtin_prefetch((const unsigned char *)px[y * job->n + x] + i, 0, 3);
}

static void transform_inputs(const winograd *job, int64_t t0, int64_t n_tiles,
                             unsigned char *inputs) {
    static const float zeros[QIE_K_UNITS];
    const qie_fmap *x = &job->a->x;
    int64_t places = (int64_t)job->n * job->n, step = place_bytes(n_tiles);
    for (int64_t t = 0; t < n_tiles; t++) {
        const void *px[PLACES] = {NULL}, *at[PLACES];
        pixels_of(job, t0 + t, zeros, px);
        if (t0 + t + AHEAD < job->n_tiles)
            prefetch_tile(job, t0 + t + AHEAD, zeros);
        for (int64_t b = 0; b < job->blocks; b++) {
            int64_t c0 = b * job->kb, k = x->c - c0 < job->kb ? x->c - c0 : job->kb;
            for (int i = 0; i < places; i++)
                at[i] = px[i] == zeros ? zeros
                                       : (const void *)((const unsigned char *)px[i] +
                                                        (size_t)c0 * qie_dtype_size(x->dtype));
            job->g->winograd_in(inputs + b * places * step + t * QIE_A_STRIDE, step / 4, at, job->n,
                                x->dtype, k);
        }
    }
}

static void multiply(const winograd *job, const unsigned char *inputs, int64_t n_tiles,
                     const float *panel, int64_t cols, float *sums) {
    const qie_gemm *g = job->g;
    int64_t places = (int64_t)job->n * job->n, in = job->a->w.in, mr = g->mr;
    int64_t pieces = qie_ceil_div(n_tiles, mr);
    int vectors = cols > g->vw ? 2 : 1;
    for (int64_t b = 0; b < job->blocks; b++) {
        int64_t c0 = b * job->kb, k = in - c0 < job->kb ? in - c0 : job->kb;
        for (int64_t p = 0; p < places; p++) {
            const unsigned char *rows = inputs + (b * places + p) * place_bytes(n_tiles);
            const float *weights = panel + places * c0 * cols + p * k * cols;
            for (int64_t i = 0; i < pieces; i++) {
                int64_t r = n_tiles * i / pieces, n = n_tiles * (i + 1) / pieces - r;
                g->tile[QIE_A_ROWS][vectors - 1][n](k, rows + r * QIE_A_STRIDE, 0, weights,
                                                    sums + (p * n_tiles + r) * cols, cols, NULL,
                                                    b > 0);
            }
        }
    }
}

/* Tiles [t, t + n) of one row of tiles: two rows of 2 n pixels each leave through the epilogue. */
static void finish_run(const winograd *job, int64_t t, int64_t n, const float *rows, int64_t cols,
                       int64_t n0, int64_t n_out, qie_epilogue *e) {
    const qie_conv2d_args *a = job->a;
    size_t size = qie_dtype_size(a->dst.dtype);
    int64_t y = t / job->tiles_x * 2, x = t % job->tiles_x * 2;
    int64_t pixels = a->dst.w - x < 2 * n ? a->dst.w - x : 2 * n;
    for (int64_t r = 0; r < 2 && y + r < a->dst.h; r++) {
        size_t at = (size_t)(((y + r) * a->dst.w + x) * a->w.out + n0) * size;
        e->residual = a->residual.data ? (const unsigned char *)a->residual.data + at : NULL;
        qie_cpu_state_of(job->c)->kernels->epilogue(e, rows + r * 2 * n * cols,
                                                    (unsigned char *)a->dst.data + at, a->dst.dtype,
                                                    n_out, pixels);
    }
}

static void finish(const winograd *job, int64_t t0, int64_t n_tiles, const float *sums,
                   int64_t cols, int64_t n0, int64_t n_out, const float *bias, float *rows) {
    qie_epilogue e = {.bias = bias, .ldy = cols, .ldd = job->a->w.out};
    for (int64_t from = 0, n; from < n_tiles; from += n) {
        int64_t left = job->tiles_x - (t0 + from) % job->tiles_x;
        n = n_tiles - from < left ? n_tiles - from : left;
        for (int64_t t = 0; t < n; t++)
            job->g->winograd_out(rows + 2 * t * cols, 2 * n * cols, sums + (from + t) * cols,
                                 n_tiles * cols, job->n, cols);
        finish_run(job, t0 + from, n, rows, cols, n0, n_out, &e);
    }
}

static void tiles_task(void *arg, size_t index, int i_thread) {
    const winograd *job = arg;
    const qie_conv2d_args *a = job->a;
    int vw = job->g->vw;
    int64_t t0 = (int64_t)index * job->task_tiles, places = (int64_t)job->n * job->n;
    int64_t n_tiles = job->n_tiles - t0 < job->task_tiles ? job->n_tiles - t0 : job->task_tiles;
    unsigned char *inputs = qie_cpu_thread_scratch(job->c, i_thread);
    float *sums = (float *)(void *)(inputs + most_input_bytes(a->w.in)),
          *rows = sums + (int64_t)PLACES * MAX_TILES * QIE_NR_MAX, bias[QIE_NR_MAX];
    transform_inputs(job, t0, n_tiles, inputs);
    for (int64_t n0 = 0; n0 < a->w.out; n0 += 2 * vw) {
        int64_t n_out = a->w.out - n0 < 2 * vw ? a->w.out - n0 : 2 * vw;
        int64_t cols = n_out > vw ? 2 * vw : vw;
        if (a->bias.data)
            qie_cpu_state_of(job->c)->kernels->convert(
                bias, QIE_F32,
                (const unsigned char *)a->bias.data + (size_t)n0 * qie_dtype_size(a->bias.dtype),
                a->bias.dtype, n_out);
        multiply(job, inputs, n_tiles, job->weights + places * a->w.in * n0, cols, sums);
        finish(job, t0, n_tiles, sums, cols, n0, n_out, a->bias.data ? bias : NULL, rows);
    }
}

void qie_cpu_winograd(qie_compute *c, const qie_conv2d_args *a) {
    winograd job = {.c = c,
                    .a = a,
                    .g = qie_cpu_gemm(c, a->x.dtype),
                    .n = a->upsample ? 3 : 4,
                    .blocks = qie_ceil_div(a->w.in, QIE_K_UNITS),
                    .weights = (float *)(void *)c->scratch};
    /* whole vectors in every block, so that no transform ends within one */
    job.kb = qie_ceil_div(qie_ceil_div(a->w.in, job.blocks), job.g->vw) * job.g->vw;
    job.tiles_x = (a->dst.w + 1) / 2;
    job.n_tiles = job.tiles_x * ((a->dst.h + 1) / 2);
    job.task_tiles = tiles_of(a->w.in, job.g->mr);
    qie_parallel_for(c->n_threads, (size_t)qie_ceil_div(a->w.out, 2 * job.g->vw), weights_task,
                     &job);
    qie_parallel_for(c->n_threads, (size_t)qie_ceil_div(job.n_tiles, job.task_tiles), tiles_task,
                     &job);
}
