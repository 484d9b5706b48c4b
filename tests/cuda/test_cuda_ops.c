/* Linear layers of the CUDA back end on the double of the runtime, LoRAs and products in 8 bits
 * with them, against the plain C of the operation: the back end's host code, its pieces and panels,
 * our kernels. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fs.h"
#include "compute/cpu/ref.h"
#include "compute/op_record.h"
#include "compute/plugin.h"
#include "double.h"
#include "qtest.h"

#define PLUGIN QIE_BINARY_DIR "/tests/qie_cuda_double.so"

enum { LORAS = 2, MOST = 256 * 1024 };

static cu_double_stats (*stats)(void);

/* The smaller the limits, the more pieces a product is cut into. */
static const qie_compute_limits LIMITS = {64, 64, 64, 16, 32, 0},
                                NORM_LIMITS = {96, 96, 64, 16, 32, 0};

static uint64_t dice = 1;
static float rnd(void) {
    float s = 0;
    for (int i = 0; i < 4; i++) {
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        s += (float)(dice >> 48) / 65536.0f - 0.5f;
    }
    return s * 1.7320508f;
}

static void *numbers(qie_dtype t, int64_t n, float size) {
    unsigned char *p = calloc((size_t)n, 4);
    for (int64_t i = 0; p && i < n; i++) {
        float v = rnd() * size;
        if (t == QIE_F16) {
            uint16_t h = qie_f32_to_f16(v);
            memcpy(p + 2 * i, &h, 2);
        } else if (t == QIE_I8 || t == QIE_F8_E4M3)
            p[i] =
                (unsigned char)(t == QIE_I8 ? (int)(v * 40) & 255 : 0x28 + ((int)(v * 8) & 0x87));
        else
            qie_ref_store(p, t, i, v);
    }
    return p;
}

typedef struct layer {
    int64_t m, k, n, rank[LORAS];
    qie_dtype act, weights, low;
    size_t n_lowrank;
    qie_store store;
    qie_act after;
    bool known, scaled, eight; /* known: the back end was told of the LoRAs' matrices beforehand */
    bool norm;                 /* and the norm of the sum after it, in one operation */
    qie_dtype bias;
    bool one_scale; /* with scaled: the first, for all */
} layer;

typedef struct data {
    void *x, *w, *bias, *gate[2], *dst, *down[LORAS], *up[LORAS];
    float *scale, *room;
} data;

static data make_data(const layer *l) {
    data d = {.x = numbers(l->act, l->m * l->k, 1),
              .w = numbers(l->weights, l->n * l->k, 0.1f),
              .bias = numbers(l->bias, l->n, 0.5f),
              .gate = {numbers(QIE_F32, l->n, 1), numbers(QIE_F32, l->n, 1)},
              .dst = numbers(l->store == QIE_STORE_SET ? l->act : QIE_F32, l->m * l->n, 1),
              .scale = numbers(QIE_F32, l->n, 1),
              .room = calloc((size_t)(l->m * (l->rank[0] + l->rank[1]) + 1), sizeof(float))};
    for (int i = 0; i < LORAS; i++) {
        d.down[i] = numbers(l->low, l->rank[i] * l->k, 0.2f);
        d.up[i] = numbers(l->low, l->n * l->rank[i], 0.2f);
    }
    return d;
}

static void free_data(data *d) {
    void *all[] = {d->x,       d->w,       d->bias,  d->gate[0], d->gate[1], d->dst,
                   d->down[0], d->down[1], d->up[0], d->up[1],   d->scale,   d->room};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* x and dst may be elsewhere: on the device. */
static qie_linear_args args_of(const layer *l, const data *d, qie_lowrank list[LORAS], void *x,
                               void *dst, const float *gate0, const float *gate1) {
    for (int i = 0; i < LORAS; i++) {
        list[i].down = (qie_wmat){d->down[i], l->low, l->rank[i], l->k, NULL, 0};
        list[i].up = (qie_wmat){d->up[i], l->low, l->n, l->rank[i], NULL, 0};
        list[i].scale = i ? -0.6f : 0.9f;
    }
    qie_linear_args a = {.x = qie_mat_make(x, l->act, l->m, l->k),
                         .w = {d->w, l->weights, l->n, l->k, l->scaled ? d->scale : NULL,
                               !l->scaled     ? 0
                               : l->one_scale ? 1
                                              : l->n},
                         .bias = {d->bias, l->bias, l->n},
                         .lowrank = list,
                         .n_lowrank = l->n_lowrank,
                         .lowrank_room = d->room,
                         .act = l->after,
                         .store = l->store,
                         .gate = {gate0, gate1},
                         .split = l->m / 3,
                         .int8 = l->eight,
                         .fp8 = l->eight};
    a.dst = qie_mat_make(dst, l->store == QIE_STORE_SET ? l->act : QIE_F32, l->m, l->n);
    return a;
}

/* The norm behind a layer: its modulation is that of the gates, the other way round. */
static qie_layer_norm_args norm_of(const layer *l, const qie_linear_args *a, void *dst,
                                   qie_dtype type) {
    qie_layer_norm_args n = {.x = a->dst,
                             .scale = {a->gate[0], a->gate[1]},
                             .shift = {a->gate[1], a->gate[0]},
                             .split = l->m / 2,
                             .eps = 1e-6f,
                             .dst = qie_mat_make(dst, type, l->m, l->n)};
    return n;
}

/* A back end that holds the weights of a layer, and memory for 5 x MOST bytes of activations. */
typedef struct device {
    qie_compute *c;
    unsigned char *base;
    qie_weight_span spans[3], lows[2 * LORAS];
    qie_weight_group group;
} device;

static qie_status device_open(const layer *l, const data *d, device *v, qie_error *e) {
    const qie_plugin *plugin;
    qie_device_options o = {.n_devices = 1, .n_threads = 1, .n_passes = 1};
    void *base = NULL;
    bool moved;
    QIE_TRY(qie_plugin_open(PLUGIN, &plugin, e));
    QIE_TRY(plugin->create(&o, l->norm ? &NORM_LIMITS : &LIMITS, &v->c, e));
    v->spans[0] = (qie_weight_span){d->w, (size_t)(l->n * l->k) * qie_dtype_size(l->weights)};
    v->spans[1] = (qie_weight_span){d->bias, sizeof(float) * (size_t)l->n};
    v->spans[2] = (qie_weight_span){d->scale, sizeof(float) * (size_t)l->n};
    for (int i = 0; i < LORAS; i++) {
        v->lows[2 * i] =
            (qie_weight_span){d->down[i], (size_t)(l->rank[i] * l->k) * qie_dtype_size(l->low)};
        v->lows[2 * i + 1] =
            (qie_weight_span){d->up[i], (size_t)(l->n * l->rank[i]) * qie_dtype_size(l->low)};
    }
    v->group = (qie_weight_group){QIE_GROUP_FIXED, 0, 0, 3, 0, v->spans};
    qie_weight_group *groups[] = {&v->group};
    const qie_mem_ops *mem = v->c->mem;
    qie_status st = mem->load(v->c, groups, 1, e);
    if (l->known)
        mem->adapt(v->c, v->lows, 2 * LORAS, &moved);
    if (st == QIE_OK)
        st = mem->reserve(v->c, 5 * MOST, &base, e);
    v->base = base;
    if (st == QIE_OK)
        mem->begin_group(v->c, &v->group, NULL, 0, NULL);
    else
        qie_compute_destroy(v->c);
    return st;
}

/* The layer on the back end: result in `out` [m, n] F32, that of the norm behind it. */
static qie_status on_device(const layer *l, const data *d, float *out, qie_error *e) {
    device v;
    QIE_TRY(device_open(l, d, &v, e));
    qie_compute *c = v.c;
    const qie_mem_ops *mem = c->mem;
    unsigned char *x = v.base, *dst = x + MOST;
    float *gate[2] = {(float *)(void *)(x + 2 * MOST), (float *)(void *)(x + 3 * MOST)};
    qie_lowrank list[LORAS];
    mem->upload(c, x, d->x, (size_t)(l->m * l->k) * qie_dtype_size(l->act));
    qie_linear_args a = args_of(l, d, list, x, dst, gate[0], gate[1]);
    size_t bytes = (size_t)(l->m * l->n) * qie_dtype_size(a.dst.dtype);
    mem->upload(c, dst, d->dst, bytes);
    for (int i = 0; i < 2; i++)
        mem->upload(c, gate[i], d->gate[i], sizeof(float) * (size_t)l->n);
    qie_layer_norm_args n = norm_of(l, &a, x + 4 * MOST, l->act);
    static qie_op_record record;
    qie_op_record_begin(c, &record);
    if (l->norm)
        c->ops.linear_norm(c, &a, &n);
    else
        c->ops.linear(c, &a);
    qie_op_record_end(c);
    unsigned char *raw = malloc(bytes);
    mem->download(c, raw, dst, bytes);
    qie_to_f32(out, raw, a.dst.dtype, (size_t)(l->m * l->n));
    if (l->norm) {
        mem->download(c, raw, n.dst.data, (size_t)(l->m * l->n) * qie_dtype_size(l->act));
        qie_to_f32(out + l->m * l->n, raw, l->act, (size_t)(l->m * l->n));
    }
    free(raw);
    qie_status st = mem->check(c, e);
    const qie_op_shape *noted = &record.uses[0].shape;
    if (record.n != 1 || strcmp(noted->op, "linear") != 0 || noted->dims[1] != l->n)
        st = qie_fail(e, QIE_E_INTERNAL, NULL, "%zu operations were noted", record.n);
    qie_compute_destroy(c);
    return st;
}

/* NMSE against plain C in f32 on the same numbers. */
static qie_status compare(const layer *l, double *error, qie_error *e) {
    data d = make_data(l);
    size_t n = (size_t)(l->m * l->n), all = l->norm ? 2 * n : n;
    float *got = calloc(all, sizeof *got), *want = calloc(all, sizeof *want),
          *x = calloc((size_t)(l->m * l->k), sizeof *x);
    qie_compute ref = {.n_threads = 1};
    qie_lowrank list[LORAS];
    qie_ref_fill(&ref.ops);
    qie_to_f32(x, d.x, l->act, (size_t)(l->m * l->k));
    layer plain = *l;
    plain.act = QIE_F32;
    plain.eight = false;
    qie_linear_args a = args_of(&plain, &d, list, x, want, d.gate[0], d.gate[1]);
    qie_to_f32(want, d.dst, l->store == QIE_STORE_SET ? l->act : QIE_F32, n);
    ref.ops.linear(&ref, &a);
    qie_layer_norm_args norm = norm_of(l, &a, want + n, QIE_F32);
    if (l->norm)
        ref.ops.layer_norm(&ref, &norm);
    qie_status st = on_device(l, &d, got, e);
    double off = 0, size = 0;
    for (size_t i = 0; i < all; i++) {
        off += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    *error = off / size;
    free(got);
    free(want);
    free(x);
    free_data(&d);
    return st;
}

/* bf16: the thin product, the layer's and the sum of both are rounded once each, 2^-9 relative. */
static const double F32 = 1e-11, B16 = 2e-5;

QTEST(test_cuda_ops_linear_with_loras_equals_plain_c) {
    static const qie_dtype lows[] = {QIE_F32, QIE_BF16, QIE_F16};
    static const int64_t sizes[][5] = {/* m, k, n, ranks */
                                       {3, 8, 19, 1, 2},
                                       {37, 64, 50, 4, 16},
                                       {70, 33, 64, 7, 1}};
    qie_error e = {0};
    double worst[2] = {0, 0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int form = 0; form < 48; form++) {
            layer l = {.m = sizes[i][0],
                       .k = sizes[i][1],
                       .n = sizes[i][2],
                       .rank = {sizes[i][3], sizes[i][4]}};
            bool bf = form & 1;
            l.act = bf ? QIE_BF16 : QIE_F32;
            l.weights = form & 2 ? QIE_BF16 : QIE_F32;
            l.low = lows[form / 4 % 3];
            l.n_lowrank = (size_t)(form / 12 % 2) + 1;
            l.known = form & 4;
            l.store = form / 24 ? QIE_STORE_GATED_ADD : QIE_STORE_SET;
            l.after = form / 12 % 2 && l.store == QIE_STORE_SET ? QIE_ACT_GELU_TANH : QIE_ACT_NONE;
            double error;
            ASSERT_OK(compare(&l, &error, &e));
            worst[bf] = error > worst[bf] ? error : worst[bf];
            if (!(error <= (bf ? B16 : F32)))
                printf("  form %d of %lld x %lld x %lld\n", form, (long long)l.m, (long long)l.n,
                       (long long)l.k);
            ASSERT_LE(error, bf ? B16 : F32);
        }
    printf("  off by %.1e in f32, %.1e in bf16\n", worst[0], worst[1]);
}

/* 8 bits: 2^-8 of a row's largest value, twice; fp8: 2^-4 of each value, once (x). */
QTEST(test_cuda_ops_linear_in_8_bits_is_near_plain_c) {
    qie_error e = {0};
    for (int form = 0; form < 4; form++) {
        bool fp8 = form & 1;
        layer l = {.m = 33,
                   .k = 64,
                   .n = 48,
                   .rank = {1, 1},
                   .act = QIE_BF16,
                   .low = QIE_F32,
                   .eight = true};
        l.weights = fp8 ? QIE_F8_E4M3 : QIE_I8;
        l.scaled = form & 2 || !fp8;
        double error;
        ASSERT_OK(compare(&l, &error, &e));
        printf("  %s%s: %.1e\n", fp8 ? "fp8" : "int8", l.scaled ? ", a scale a row" : "", error);
        ASSERT_LE(error, fp8 ? 2e-3 : 2e-4);
        ASSERT(error > 1e-6); /* it was in 8 bits */
    }
}

static const layer FP8 = {.m = 40,
                          .k = 64,
                          .n = 48,
                          .rank = {1, 1},
                          .act = QIE_BF16,
                          .weights = QIE_F8_E4M3,
                          .low = QIE_F32,
                          .eight = true,
                          .scaled = true,
                          .bias = QIE_BF16};

/* fp8 in one product of the library, scales, bias and activation included, or where it refuses
 * that, in three pieces: close to plain C and to each other. */
QTEST(test_cuda_ops_linear_in_fp8_is_one_product_where_the_library_scales) {
    qie_error e = {0};
    for (int form = 0; form < 8; form++) {
        layer l = FP8;
        l.m = 33 + form;
        l.one_scale = form & 1;
        l.after = form & 2 ? QIE_ACT_GELU_TANH : QIE_ACT_NONE;
        double error;
        setenv("QIE_CUDA_OWN", form & 4 ? "1" : "0", 1);
        ASSERT_OK(compare(&l, &error, &e));
        unsetenv("QIE_CUDA_OWN");
        printf("  %s, %s%s: %.1e\n", form & 4 ? "apart" : "one", form & 1 ? "one scale" : "scales",
               form & 2 ? ", GELU" : "", error);
        ASSERT_LE(error, 2e-3);
        ASSERT(error > 1e-6);
    }
}

/* The layer from the rows in `base`, n times one after the other; the last result. Returns the
 * pieces of work. */
static int64_t run_times(const layer *l, const data *d, const device *v, int n, void *out) {
    qie_lowrank list[LORAS];
    qie_linear_args a = args_of(l, d, list, v->base, v->base + MOST, NULL, NULL);
    int64_t before = stats().works;
    for (int i = 0; i < n; i++)
        v->c->ops.linear(v->c, &a);
    v->c->mem->download(v->c, out, a.dst.data, (size_t)(l->m * l->n) * 2);
    return stats().works - before;
}

/* q, k and v read the same rows: they become bytes once, and anew when something ran between. */
QTEST(test_cuda_ops_rows_become_bytes_once_for_the_layers_that_read_them) {
    const layer l = FP8;
    qie_error e = {0};
    data d = make_data(&l), other = make_data(&l);
    size_t x_bytes = (size_t)(l.m * l.k) * 2, y_bytes = (size_t)(l.m * l.n) * 2;
    unsigned char *one = malloc(y_bytes), *three = malloc(y_bytes), *last = malloc(y_bytes);
    for (int own = 0; own < 2; own++) {
        setenv("QIE_CUDA_OWN", own ? "1" : "0", 1);
        device v;
        ASSERT_OK(device_open(&l, &d, &v, &e));
        v.c->mem->upload(v.c, v.base, d.x, x_bytes);
        run_times(&l, &d, &v, 1, one); /* what was queued before is done */
        int64_t alone = run_times(&l, &d, &v, 1, one), more = run_times(&l, &d, &v, 3, three);
        /* each of the two others a product, and a kernel where the library does not scale */
        ASSERT_INT(more - alone, own ? 4 : 2);
        ASSERT(memcmp(one, three, y_bytes) == 0);
        v.c->mem->upload(v.c, v.base, other.x, x_bytes); /* other rows in the same place */
        run_times(&l, &d, &v, 1, last);
        ASSERT(memcmp(last, one, y_bytes) != 0);
        ASSERT_OK(v.c->mem->check(v.c, &e));
        qie_compute_destroy(v.c);
    }
    unsetenv("QIE_CUDA_OWN");
    free(one);
    free(three);
    free(last);
    free_data(&d);
    free_data(&other);
}

/* Gate, sum and norm: rows that are one piece in one kernel, others one after the other. */
QTEST(test_cuda_ops_linear_with_the_norm_behind_it_equals_plain_c) {
    static const int64_t sizes[][3] = {{3, 8, 19}, {37, 64, 48}, {600, 16, 96}, {20, 96, 96}};
    char path[] = "/tmp/qie-profile-XXXXXX", *text;
    qie_error e = {0};
    size_t n_bytes;
    int fd = mkstemp(path);
    ASSERT(fd >= 0);
    close(fd);
    ASSERT_INT(setenv("QIE_CUDA_PROFILE", path, 1), 0);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int form = 0; form < 8; form++) {
            layer l = {.m = sizes[i][0],
                       .k = sizes[i][1],
                       .n = sizes[i][2],
                       .rank = {2, 3},
                       .low = QIE_F32,
                       .store = QIE_STORE_GATED_ADD,
                       .n_lowrank = (size_t)(form / 4),
                       .norm = true};
            bool bf = form & 1, eight = form == 7 && l.n % 16 == 0 && l.k % 16 == 0;
            l.act = bf ? QIE_BF16 : QIE_F32;
            l.weights = eight ? QIE_I8 : form & 2 ? QIE_BF16 : QIE_F32;
            l.eight = l.scaled = eight;
            if (eight)
                l.n_lowrank = 0;
            double error;
            ASSERT_OK(compare(&l, &error, &e));
            ASSERT_LE(error, eight ? 2e-4 : bf ? B16 : F32);
            /* weights that are converted come in panels of rows, of which 64 fit */
            bool apart = l.weights != l.act && !bf && l.k == 96;
            ASSERT_OK(qie_file_read(path, 1 << 20, (unsigned char **)&text, &n_bytes, &e));
            ASSERT(strstr(text, "gate and sum, norm") != NULL);
            ASSERT_INT(strstr(text, "layer_norm") != NULL, apart);
            free(text);
        }
    unsetenv("QIE_CUDA_PROFILE");
    unlink(path);
}

int main(int argc, char **argv) {
    setenv("QIE_CUDA_DOUBLE", "cc=89", 1); /* read with the first call */
    void *lib = dlopen(PLUGIN, RTLD_NOW | RTLD_LOCAL);
    void *p = lib ? dlsym(lib, "cu_double_stats_get") : NULL;
    if (!p) {
        fprintf(stderr, "%s: %s\n", PLUGIN, dlerror());
        return 1;
    }
    memcpy(&stats, &p, sizeof p);
    return qtest_main(argc, argv);
}
