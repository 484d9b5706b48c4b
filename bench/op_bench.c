/* qie-op-bench: times operations at the shapes of a file, beside oneDNN on the same shapes in the
 * same run.
 *
 *   qie-op-bench [--threads N] [--repeats N] [--level LEVEL] [--dtype f32|bf16] [--backend NAME]
 * [--no-roof]
 *                [--json FILE] [--cpu-time] SHAPES...
 *
 * Roof: for linear and conv2d oneDNN's own time with weights in its preferred layout; for attention
 * the GFLOP/s of a oneDNN matmul 1024 x 1024 x 1024 of the same type. Times are the fastest and the
 * median of N after one warm-up; shares compare fastest times. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/parallel.h"
#include "compute/backend.h"
#include "compute/cpu/cpu_backend.h"
#include "compute/cpu/onednn_roof.h"

typedef struct options {
    int threads, repeats;
    qie_dtype dtype;
    const char *backend;
    bool roof;
    FILE *json;
    double (*clock_s)(void);
} options;

typedef struct shape {
    char op[16];
    long v[7];
} shape;

typedef struct result {
    double fastest, median, gflop, roof_fastest; /* seconds; roof 0: none */
} result;

/* Processor time of this process: for one thread on a machine that others use too. */
static double cpu_time(void) {
    return (double)clock() / CLOCKS_PER_SEC;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *filled(size_t n, qie_dtype t) {
    size_t bytes = n * qie_dtype_size(t);
    unsigned char *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(5);
    }
    uint32_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        float v = (float)(seed >> 8) / 8388608.0f - 1.0f;
        qie_bf16 h = qie_f32_to_bf16(v);
        memcpy(p + i * qie_dtype_size(t), t == QIE_F32 ? (void *)&v : (void *)&h,
               qie_dtype_size(t));
    }
    return p;
}

static void measure(void (*run)(qie_compute *c, void *args), qie_compute *c, void *args,
                    const options *o, result *r) {
    int repeats = o->repeats;
    double *t = malloc((size_t)repeats * sizeof *t);
    if (!t)
        exit(5);
    run(c, args);
    for (int i = 0; i < repeats; i++) {
        double start = o->clock_s();
        run(c, args);
        t[i] = o->clock_s() - start;
    }
    qsort(t, (size_t)repeats, sizeof *t, compare);
    r->fastest = t[0];
    r->median = t[repeats / 2];
    free(t);
}

static void run_linear(qie_compute *c, void *args) {
    c->ops.linear(c, args);
}
static void run_attention(qie_compute *c, void *args) {
    c->ops.attention(c, args);
}
static void run_conv2d(qie_compute *c, void *args) {
    c->ops.conv2d(c, args);
}

static result bench_linear(const options *o, qie_compute *c, const shape *s) {
    int64_t m = s->v[0], n = s->v[1], k = s->v[2];
    qie_linear_args a = {.x = qie_mat_make(filled((size_t)(m * k), o->dtype), o->dtype, m, k),
                         .w = {filled((size_t)(n * k), o->dtype), o->dtype, n, k},
                         .dst = qie_mat_make(filled((size_t)(m * n), o->dtype), o->dtype, m, n)};
    result r = {.gflop = 2e-9 * (double)m * (double)n * (double)k};
    double median;
    if (o->roof && qie_onednn_time_matmul(o->dtype, m, n, k, o->threads, o->repeats, o->clock_s,
                                          &r.roof_fastest, &median))
        r.roof_fastest = 0;
    measure(run_linear, c, &a, o, &r);
    free(a.x.data);
    free((void *)a.w.data);
    free(a.dst.data);
    return r;
}

static result bench_attention(const options *o, qie_compute *c, const shape *s) {
    int64_t nq = s->v[0], nk = s->v[1], d = s->v[4], q_cols = s->v[2] * d, k_cols = s->v[3] * d;
    qie_attention_args a = {
        .q = qie_mat_make(filled((size_t)(nq * q_cols), o->dtype), o->dtype, nq, q_cols),
        .k = qie_mat_make(filled((size_t)(nk * k_cols), o->dtype), o->dtype, nk, k_cols),
        .v = qie_mat_make(filled((size_t)(nk * k_cols), o->dtype), o->dtype, nk, k_cols),
        .n_heads = (int)s->v[2],
        .n_kv_heads = (int)s->v[3],
        .head_dim = (int)d,
        .scale = 1.0f / sqrtf((float)d),
        .causal = s->v[5],
        .dst = qie_mat_make(filled((size_t)(nq * q_cols), o->dtype), o->dtype, nq, q_cols)};
    result r = {.gflop = 4e-9 * (double)nq * (double)nk * (double)q_cols * (a.causal ? 0.5 : 1)};
    double fastest, median;
    if (o->roof && !qie_onednn_time_matmul(o->dtype, 1024, 1024, 1024, o->threads, o->repeats,
                                           o->clock_s, &fastest, &median))
        r.roof_fastest = fastest * r.gflop / (2e-9 * 1024 * 1024 * 1024);
    measure(run_attention, c, &a, o, &r);
    free(a.q.data);
    free(a.k.data);
    free(a.v.data);
    free(a.dst.data);
    return r;
}

static result bench_conv2d(const options *o, qie_compute *c, const shape *s) {
    int h = (int)s->v[0], w = (int)s->v[1], in = (int)s->v[2], out = (int)s->v[3],
        kernel = (int)s->v[4];
    int stride = (int)s->v[5], up = s->v[6] ? 2 : 1, ho = h * up / stride, wo = w * up / stride;
    size_t nx = (size_t)h * (size_t)w * (size_t)in, ny = (size_t)ho * (size_t)wo * (size_t)out;
    size_t nw = (size_t)out * (size_t)in * (size_t)(kernel * kernel);
    qie_conv2d_args a = {.x = {filled(nx, o->dtype), o->dtype, h, w, in},
                         .w = {filled(nw, o->dtype), o->dtype, out, in, 1, kernel, kernel},
                         .stride = stride,
                         .upsample = up == 2,
                         .dst = {filled(ny, o->dtype), o->dtype, ho, wo, out}};
    result r = {.gflop = 2e-9 * (double)(ny * nw) / out};
    double median;
    if (o->roof &&
        qie_onednn_time_conv(o->dtype, h * up, w * up, in, out, kernel, stride, o->threads,
                             o->repeats, o->clock_s, &r.roof_fastest, &median))
        r.roof_fastest = 0;
    measure(run_conv2d, c, &a, o, &r);
    free(a.x.data);
    free((void *)a.w.data);
    free(a.dst.data);
    return r;
}

static const struct {
    const char *op;
    int n_values;
    result (*bench)(const options *o, qie_compute *c, const shape *s);
} OPS[] = {
    {"linear", 3, bench_linear}, {"attention", 6, bench_attention}, {"conv2d", 7, bench_conv2d}};

static void print_result(const options *o, const qie_compute *c, const shape *s, int n_values,
                         const result *r) {
    char dims[96] = "";
    for (int i = 0; i < n_values; i++)
        snprintf(dims + strlen(dims), sizeof dims - strlen(dims), "%s%ld", i ? " " : "", s->v[i]);
    printf("%-9s %-28s %10.3f %10.3f %9.1f ", s->op, dims, r->fastest * 1e3, r->median * 1e3,
           r->gflop / r->fastest);
    if (r->roof_fastest > 0)
        printf("%9.1f %6.0f %%\n", r->gflop / r->roof_fastest, 100 * r->roof_fastest / r->fastest);
    else
        printf("%9s\n", "-");
    fflush(stdout);
    if (o->json)
        fprintf(o->json,
                "{\"op\":\"%s\",\"shape\":\"%s\",\"dtype\":\"%s\",\"level\":\"%s\",\"backend\":\"%"
                "s\",\"threads\":%d,"
                "\"fastest_s\":%.9g,\"median_s\":%.9g,\"gflop\":%.9g,\"roof_s\":%.9g}\n",
                s->op, dims, qie_dtype_name(o->dtype), qie_cpu_level_name(c->level), c->name,
                o->threads, r->fastest, r->median, r->gflop, r->roof_fastest);
}

static int run_file(const options *o, qie_compute *c, const char *path) {
    FILE *f = fopen(path, "r");
    char line[256];
    if (!f) {
        fprintf(stderr, "cannot open '%s'\n", path);
        return 2;
    }
    while (fgets(line, sizeof line, f)) {
        shape s = {.op = ""};
        int n = sscanf(line, "%15s %ld %ld %ld %ld %ld %ld %ld", s.op, &s.v[0], &s.v[1], &s.v[2],
                       &s.v[3], &s.v[4], &s.v[5], &s.v[6]);
        if (n < 1 || s.op[0] == '#')
            continue;
        for (size_t i = 0; i < sizeof OPS / sizeof *OPS; i++)
            if (!strcmp(OPS[i].op, s.op) && n - 1 == OPS[i].n_values) {
                result r = OPS[i].bench(o, c, &s);
                print_result(o, c, &s, OPS[i].n_values, &r);
            }
    }
    fclose(f);
    return 0;
}

int main(int argc, char **argv) {
    options o = {.threads = qie_cpu_count(),
                 .repeats = 5,
                 .dtype = QIE_BF16,
                 .backend = "cpu",
                 .roof = true,
                 .clock_s = qie_now_s};
    qie_cpu_level level = qie_cpu_level_get();
    int i = 1, status = 0;
    for (; i < argc && !strncmp(argv[i], "--", 2); i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--no-roof")) {
            o.roof = false;
            continue;
        }
        if (!strcmp(argv[i], "--cpu-time")) {
            o.clock_s = cpu_time;
            continue;
        }
        if (!strcmp(argv[i], "--threads"))
            o.threads = atoi(value);
        else if (!strcmp(argv[i], "--repeats"))
            o.repeats = atoi(value);
        else if (!strcmp(argv[i], "--dtype"))
            o.dtype = !strcmp(value, "f32") ? QIE_F32 : QIE_BF16;
        else if (!strcmp(argv[i], "--backend"))
            o.backend = value;
        else if (!strcmp(argv[i], "--json"))
            o.json = fopen(value, "w");
        else if (!strcmp(argv[i], "--level")) {
            for (int l = 0; l <= (int)qie_cpu_level_hardware(); l++)
                if (!strcmp(value, qie_cpu_level_name((qie_cpu_level)l)))
                    level = (qie_cpu_level)l;
        } else {
            fprintf(stderr, "unknown option '%s'\n", argv[i]);
            return 2;
        }
        i++;
    }
    if (o.repeats < 1 || o.threads < 1 || i == argc) {
        fprintf(stderr, "usage: qie-op-bench [--threads N] [--repeats N] [--level L] [--dtype "
                        "f32|bf16] [--backend B] "
                        "[--no-roof] [--json FILE] [--cpu-time] SHAPES...\n");
        return 2;
    }
    qie_compute_limits limits = {32768, 32768, 9 * 1024, 1024, 512};
    qie_compute *c;
    qie_error e;
    if (qie_compute_create_level(o.backend, level, o.threads, &limits, &c, &e) != QIE_OK) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    printf("back end %s, level %s, %d threads, %s, fastest and median of %d; scratch %.1f MB\n",
           c->name, qie_cpu_level_name(c->level), o.threads, qie_dtype_name(o.dtype), o.repeats,
           (double)c->scratch_bytes / 1e6);
    printf("%-9s %-28s %10s %10s %9s %9s %8s\n", "op", "shape", "ms", "median", "GFLOP/s", "roof",
           "share");
    for (; i < argc && !status; i++)
        status = run_file(&o, c, argv[i]);
    qie_compute_destroy(c);
    if (o.json)
        fclose(o.json);
    return status;
}
