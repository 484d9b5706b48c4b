/* qie-op-bench: times operations at the shapes of a file, beside oneDNN on the same shapes in the
 * same run.
 *
 *   qie-op-bench [--threads N] [--repeats N] [--level LEVEL] [--dtype f32|bf16] [--int8]
 *                [--weights TYPE] [--backend NAME] [--no-roof] [--json FILE] [--cpu-time] SHAPES...
 *
 * Roof: for linear and conv2d oneDNN's own time with weights in its preferred layout; for attention
 * the GFLOP/s of a oneDNN matmul 1024 x 1024 x 1024 of the same type. Times are the fastest and the
 * median of N after one warm-up; shares compare fastest times. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/parallel.h"
#include "compute/cpu/cpu_backend.h"
#include "compute/op_bench.h"

typedef struct options {
    int threads, repeats;
    qie_dtype dtype, weights; /* weights: of linear layers; QIE_DTYPE_COUNT: as dtype */
    const char *backend;
    bool roof, int8;
    FILE *json;
    double (*clock_s)(void);
} options;

/* Processor time of this process: for one thread on a machine that others use too. */
static double cpu_time(void) {
    return (double)clock() / CLOCKS_PER_SEC;
}

static void print_result(const options *o, const qie_compute *c, const qie_op_shape *s,
                         int n_values, const qie_op_time *t) {
    char dims[96] = "";
    double gflop = qie_op_gflop(s);
    for (int i = 0; i < n_values; i++)
        snprintf(dims + strlen(dims), sizeof dims - strlen(dims), "%s%lld", i ? " " : "",
                 (long long)s->dims[i]);
    printf("%-9s %-28s %10.3f %10.3f %9.1f ", s->op, dims, t->fastest * 1e3, t->median * 1e3,
           gflop / t->fastest);
    if (t->roof > 0)
        printf("%9.1f %6.0f %%\n", gflop / t->roof, 100 * t->roof / t->fastest);
    else
        printf("%9s\n", "-");
    fflush(stdout);
    if (o->json)
        fprintf(o->json,
                "{\"op\":\"%s\",\"shape\":\"%s\",\"dtype\":\"%s\",\"level\":\"%s\",\"backend\":\"%"
                "s\",\"threads\":%d,"
                "\"fastest_s\":%.9g,\"median_s\":%.9g,\"gflop\":%.9g,\"roof_s\":%.9g}\n",
                s->op, dims, qie_dtype_name(o->dtype), qie_cpu_level_name(c->level), c->name,
                o->threads, t->fastest, t->median, gflop, t->roof);
}

/* Values of a line: a segment length is not among those of attention. */
static int values_of(const char *op) {
    int n = qie_op_n_dims(op);
    return !strcmp(op, "attention") ? 6 : n < 3 ? -1 : n;
}

static int run_line(const options *o, qie_compute *c, const char *line) {
    qie_op_shape s = {.op = "", .act = o->dtype, .weight = o->dtype, .int8 = o->int8};
    qie_dtype weights = o->weights;
    long long v[QIE_OP_DIMS] = {0};
    qie_op_bench_options bench = {o->repeats, o->roof, o->clock_s};
    qie_op_time t;
    qie_error e;
    int n = sscanf(line, "%15s %lld %lld %lld %lld %lld %lld %lld", s.op, &v[0], &v[1], &v[2],
                   &v[3], &v[4], &v[5], &v[6]);
    if (n < 1 || s.op[0] == '#' || n - 1 != values_of(s.op))
        return 0;
    for (int i = 0; i < n - 1; i++)
        s.dims[i] = v[i];
    if (weights != QIE_DTYPE_COUNT && !strcmp(s.op, "linear"))
        s.weight = weights;
    if (qie_op_bench(c, &s, &bench, &t, &e) != QIE_OK) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    print_result(o, c, &s, n - 1, &t);
    return 0;
}

static int run_file(const options *o, qie_compute *c, const char *path) {
    FILE *f = fopen(path, "r");
    char line[256];
    int status = 0;
    if (!f) {
        fprintf(stderr, "cannot open '%s'\n", path);
        return 2;
    }
    while (!status && fgets(line, sizeof line, f))
        status = run_line(o, c, line);
    fclose(f);
    return status;
}

int main(int argc, char **argv) {
    options o = {.threads = qie_cpu_count(),
                 .repeats = 5,
                 .dtype = QIE_BF16,
                 .weights = QIE_DTYPE_COUNT,
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
        if (!strcmp(argv[i], "--int8")) {
            o.int8 = true;
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
        else if (!strcmp(argv[i], "--weights") && qie_dtype_from_name(value) >= 0)
            o.weights = (qie_dtype)qie_dtype_from_name(value);
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
                        "f32|bf16] [--weights TYPE] [--int8] [--backend B] "
                        "[--no-roof] [--json FILE] [--cpu-time] SHAPES...\n");
        return 2;
    }
    qie_compute_limits limits = {32768, 32768, 9 * 1024, 1024, 512, o.int8 ? 32768 : 0};
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
