/* The whole engine on the double of the CUDA runtime: recordings of diffusers and the CPU's own
 * results, in every placement, with memory that is refused, waits that are forgotten, a card that
 * is lost. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

#include "base/json.h"
#include "double.h"
#include "qie/edit.h"
#include "qtest.h"
#include "weights/weights.h"

#define GOLDEN QIE_SOURCE_DIR "/tests/golden/"
#define PLUGIN QIE_BINARY_DIR "/tests/qie_cuda_double.so"
#define MIB ((size_t)1 << 20)

static cu_double_options (*options_default)(void);
static void (*configure)(const cu_double_options *);
static cu_double_stats (*stats)(void);

static void need_double(void) {
    if (configure)
        return;
    setenv("QIE_CUDA_PLUGIN", PLUGIN, 1);
    void *lib = dlopen(PLUGIN, RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        fprintf(stderr, "%s\n", dlerror());
        abort();
    }
    void *p[3] = {dlsym(lib, "cu_double_options_default"), dlsym(lib, "cu_double_configure"),
                  dlsym(lib, "cu_double_stats_get")};
    memcpy(&options_default, &p[0], sizeof p[0]);
    memcpy(&configure, &p[1], sizeof p[1]);
    memcpy(&stats, &p[2], sizeof p[2]);
}

typedef struct setting {
    cu_double_options d;
    qie_precision precision;
    const char *device, *gpus;
} setting;

static setting setting_default(void) {
    need_double();
    setting s = {options_default(), QIE_PRECISION_F32, "cuda", NULL};
    return s;
}

static qie_status open_on(const setting *s, qie_engine **out, qie_error *e) {
    qie_engine_options o = qie_engine_options_default();
    o.model = GOLDEN "model";
    o.precision = s->precision;
    o.n_threads = 2;
    o.device = s->device;
    o.gpus = s->gpus;
    o.gpu_headroom_bytes = 0;
    return qie_engine_open(&o, out, e);
}

/* One case of the recordings. */
typedef struct golden_case {
    qie_json *request;
    qie_image *images[QIE_MAX_IMAGES], *output;
    qie_edit_options o;
} golden_case;

static void load_case(const char *name, golden_case *g) {
    char path[512];
    int64_t v;
    memset(g, 0, sizeof *g);
    snprintf(path, sizeof path, GOLDEN "edit/%s/request.json", name);
    qie_json_parse_file(path, 1 << 20, &g->request, NULL);
    g->o = qie_edit_options_default();
    qie_json *list = qie_json_member(g->request, "images");
    for (size_t i = 0; i < qie_json_size(list); i++) {
        snprintf(path, sizeof path, GOLDEN "edit/%s/%s", name,
                 qie_json_string(qie_json_at(list, i), NULL));
        qie_image_load(path, NULL, &g->images[g->o.n_images++], NULL);
    }
    snprintf(path, sizeof path, GOLDEN "edit/%s/output.png", name);
    qie_image_load(path, NULL, &g->output, NULL);
    g->o.images = (const qie_image *const *)g->images;
    qie_json_get_string(g->request, "prompt", NULL, &g->o.prompt, NULL);
    qie_json_get_string(g->request, "negative_prompt", NULL, &g->o.negative_prompt, NULL);
    qie_json_get_int(g->request, "steps", 0, 0, 1000, &v, NULL);
    g->o.num_inference_steps = (int)v;
    qie_json_get_double(g->request, "true_cfg_scale", 4, &g->o.true_cfg_scale, NULL);
    qie_json_get_int(g->request, "seed", 0, 0, INT64_MAX, &v, NULL);
    g->o.seed = (uint64_t)v;
    qie_json_get_int(g->request, "width", 0, 0, 1 << 20, &v, NULL);
    g->o.width = (int)v;
    qie_json_get_int(g->request, "height", 0, 0, 1 << 20, &v, NULL);
    g->o.height = (int)v;
    qie_json_get_int(g->request, "ref_area", 0, 0, INT64_MAX, &v, NULL);
    g->o.ref_area = v;
}

static void release_case(golden_case *g) {
    for (size_t i = 0; i < g->o.n_images; i++)
        qie_image_destroy(g->images[i]);
    qie_image_destroy(g->output);
    qie_json_free(g->request);
}

static double psnr(const qie_image *a, const qie_image *b) {
    size_t n = (size_t)qie_image_width(b) * (size_t)qie_image_height(b) * 3;
    const uint8_t *x = qie_image_pixels_const(a), *y = qie_image_pixels_const(b);
    if (qie_image_width(a) != qie_image_width(b) || qie_image_height(a) != qie_image_height(b))
        return 0;
    double s = 0;
    for (size_t i = 0; i < n; i++)
        s += (double)(x[i] - y[i]) * (double)(x[i] - y[i]);
    return s > 0 ? 10 * log10(255.0 * 255.0 * (double)n / s) : 99;
}

/* Open, edit, close; the picture's distance from the recording in dB. Nothing may stay allocated.
 * placement (may be NULL): how it was placed. */
static qie_status edit_on(const setting *s, const golden_case *g, double *db, char placement[512],
                          qie_error *e) {
    qie_engine *engine = NULL;
    qie_edit_result r = {0};
    *db = 0;
    configure(&s->d);
    qie_status st = open_on(s, &engine, e);
    if (st == QIE_OK)
        st = qie_engine_edit(engine, &g->o, &r, e);
    if (st == QIE_OK)
        *db = psnr(r.images[0], g->output);
    if (placement && engine) {
        qie_engine_info info;
        qie_engine_get_info(engine, &info);
        snprintf(placement, 512, "%s", info.placement);
    }
    qie_edit_result_release(&r);
    qie_engine_close(engine);
    cu_double_stats after = stats();
    for (int i = 0; i < CU_DOUBLE_DEVICES; i++)
        if (after.live[i]) {
            printf("  %zu bytes of device %d were not freed\n", after.live[i], i);
            return QIE_E_INTERNAL;
        }
    return st;
}

static const char *const CASES[] = {"one-image-cfg", "two-images-no-cfg"};

/* 60 dB: the recording's own bytes but for a level here and there, as on the CPU. */
static void check_exact(const setting *s, const char *name, const char *form) {

    golden_case g;
    qie_error e = {0};
    double db;
    char placement[512];
    load_case(name, &g);
    ASSERT_OK(edit_on(s, &g, &db, placement, &e));
    printf("  %s: %.1f dB, %s\n", name, db, placement);
    release_case(&g);
    ASSERT_LE(60, db);
    ASSERT_CONTAINS(placement, form);
}

/* A quick edit: one step, small; what is expected is the CPU's own picture. */
static void small_case(golden_case *g) {
    qie_engine *engine = NULL;
    qie_edit_result r = {0};
    setting cpu = setting_default();
    qie_error e;
    cpu.device = NULL;
    load_case(CASES[0], g);
    g->o.num_inference_steps = 1;
    g->o.width = g->o.height = 64;
    g->o.ref_area = 64 * 64;
    if (open_on(&cpu, &engine, &e) != QIE_OK || qie_engine_edit(engine, &g->o, &r, &e) != QIE_OK) {
        fprintf(stderr, "%s\n", e.message);
        abort();
    }
    qie_image_destroy(g->output);
    g->output = r.images[0];
    r.images[0] = NULL;
    qie_edit_result_release(&r);
    qie_engine_close(engine);
}

static void check_small(const setting *s, const char *form) {
    golden_case g;
    qie_error e = {0};
    double db;
    char placement[512];
    small_case(&g);
    ASSERT_OK(edit_on(s, &g, &db, placement, &e));
    printf("  %.1f dB, %s\n", db, placement);
    release_case(&g);
    ASSERT_LE(60, db);
    ASSERT_CONTAINS(placement, form);
}

/* Peak memory of the first card and bytes of weights in a resident run of a case: what the other
 * placements are squeezed from. */
static size_t resident_peak, weight_bytes;

static void measure(void) {
    golden_case g;
    qie_error e = {0};
    double db;
    qie_engine *engine;
    qie_engine_info info;
    if (resident_peak)
        return;
    setting s = setting_default();
    small_case(&g);
    if (edit_on(&s, &g, &db, NULL, &e) == QIE_OK)
        resident_peak = stats().peak[0];
    configure(&s.d);
    if (open_on(&s, &engine, &e) == QIE_OK) {
        qie_engine_get_info(engine, &info);
        weight_bytes = (size_t)info.weights_bytes;
        qie_engine_close(engine);
    }
    release_case(&g);
}

QTEST(test_cuda_engine_resident_equals_diffusers) {
    for (size_t i = 0; i < (getenv("QIE_TEST_LONG") ? 2 : 1); i++) {
        setting s = setting_default();
        s.d.seed = 7 + i;
        check_exact(&s, CASES[i], "resident");
    }
}

/* Half of the weights held, half through the ring; then as much through it as there is. */
QTEST(test_cuda_engine_streamed_equals_the_cpu) {
    measure();
    setting s = setting_default();
    s.d.memory[0] = resident_peak - weight_bytes / 20;
    s.d.seed = 100;
    check_small(&s, "streamed");
}

/* No pinned copies: streamed groups come from the mapped file through the pieces. */
QTEST(test_cuda_engine_streamed_from_the_file_equals_the_cpu) {
    measure();
    setting s = setting_default();
    s.d.memory[0] = resident_peak - weight_bytes / 20;
    s.d.seed = 101;
    s.d.fail_host = 5; /* the first four are the pieces */
    check_small(&s, "streamed");
}

QTEST(test_cuda_engine_sharded_unequally_equals_the_cpu) {
    measure();
    setting s = setting_default();
    s.d.n_devices = 3;
    for (int i = 0; i < 3; i++)
        s.d.memory[i] = resident_peak - weight_bytes / 20 * (size_t)(1 + 2 * i);
    s.d.seed = 5;
    check_small(&s, "sharded");
    cu_double_stats st = stats();
    for (int i = 0; i < 3; i++)
        ASSERT(st.works_of[i] > 0);
}

/* A card for each guidance pass: both work, the results meet on the first. */
QTEST(test_cuda_engine_parallel_passes_equal_the_cpu) {
    setting s = setting_default();
    s.d.n_devices = 2;
    s.d.seed = 9;
    check_small(&s, "parallel");
    cu_double_stats st = stats();
    ASSERT(st.works_of[1] > 20);
}

/* In bf16 the picture is the CPU's but for rounding: the bound is that of the CPU's own bf16. */
QTEST(test_cuda_engine_bf16_is_close_to_diffusers) {
    if (!getenv("QIE_TEST_LONG"))
        QTEST_SKIP("slow: QIE_TEST_LONG=1 runs it");
    golden_case g;
    qie_error e = {0};
    double db;
    setting s = setting_default();
    s.precision = QIE_PRECISION_BF16;
    load_case(CASES[0], &g);
    g.o.noise = QIE_NOISE_F32; /* the recording's noise */
    ASSERT_OK(edit_on(&s, &g, &db, NULL, &e));
    release_case(&g);
    printf("  %.1f dB\n", db);
    ASSERT_LE(30, db);
}

/* Our own attention and convolution in place of the libraries', thread by thread. */
QTEST(test_cuda_engine_own_kernels_give_the_same_picture) {
    if (!getenv("QIE_TEST_LONG"))
        QTEST_SKIP("slow: QIE_TEST_LONG=1 runs it");
    golden_case g;
    qie_error e = {0};
    double db;
    setting s = setting_default();
    s.precision = QIE_PRECISION_BF16;
    load_case(CASES[0], &g);
    g.o.noise = QIE_NOISE_F32;
    setenv("QIE_CUDA_OWN", "1", 1);
    qie_status st = edit_on(&s, &g, &db, NULL, &e);
    unsetenv("QIE_CUDA_OWN");
    release_case(&g);
    ASSERT_OK(st);
    printf("  %.1f dB\n", db);
    ASSERT_LE(30, db);
}

/* Each allocation of the card refused once: the edit goes on in a smaller placement with the same
 * picture, or ends with NO_MEMORY; nothing leaks. */
QTEST(test_cuda_engine_refused_allocation_falls_back) {
    golden_case g;
    qie_error e = {0};
    double db;
    char placement[512];
    small_case(&g);
    setting s = setting_default();
    s.d.n_devices = 2;
    ASSERT_OK(edit_on(&s, &g, &db, placement, &e));
    ASSERT_CONTAINS(placement, "parallel");
    int64_t n = stats().allocs;
    ASSERT_LE(60, db);
    ASSERT(n >= 6);
    int fell = 0;
    for (int64_t i = 1; i <= n; i++) {
        s.d.fail_alloc = i;
        s.d.seed = (uint64_t)i;
        ASSERT_OK(edit_on(&s, &g, &db, placement, &e));
        ASSERT_LE(60, db);
        fell += !strstr(placement, "parallel");
    }
    ASSERT_INT(fell, (int)n);
    release_case(&g);
}

QTEST(test_cuda_engine_too_little_memory_is_refused_before_the_start) {
    golden_case g;
    qie_error e = {0};
    double db;
    small_case(&g);
    setting s = setting_default();
    s.d.memory[0] = 8 * MIB;
    ASSERT_INT(edit_on(&s, &g, &db, NULL, &e), QIE_E_NO_MEMORY);
    ASSERT_INT(stats().works, 0);
    release_case(&g);
}

/* The card is lost in the middle: a clear error, at once and for every edit after it. */
QTEST(test_cuda_engine_lost_device_is_told) {
    golden_case g;
    qie_error e = {0};
    small_case(&g);
    setting s = setting_default();
    qie_engine *engine;
    configure(&s.d);
    double db;
    ASSERT_OK(edit_on(&s, &g, &db, NULL, &e));
    int64_t works = stats().works;
    for (int i = 1; i <= 7; i++) {
        s.d.lose_at = works * i / 8;
        configure(&s.d);
        ASSERT_OK(open_on(&s, &engine, &e));
        qie_edit_result r = {0};
        qie_status st = qie_engine_edit(engine, &g.o, &r, &e);
        ASSERT_INT(st, QIE_E_UNAVAILABLE);
        ASSERT_CONTAINS(e.message, "lost");
        ASSERT_CONTAINS(e.message, "GPU 0");
        ASSERT_INT(qie_engine_edit(engine, &g.o, &r, &e), QIE_E_UNAVAILABLE);
        qie_engine_close(engine);
    }
    release_case(&g);
}

/* A wait between streams that is left out shows as another picture in some order of the work. Not
 * every one does: of two that lie one behind the other the second may hold what the first held. */
QTEST(test_cuda_engine_forgotten_wait_is_seen) {
    if (!getenv("QIE_TEST_LONG"))
        QTEST_SKIP("slow: QIE_TEST_LONG=1 runs it");
    golden_case g;
    qie_error e = {0};
    double db;
    small_case(&g);
    setting s = setting_default();
    measure();
    s.d.memory[0] = resident_peak - weight_bytes / 20;
    ASSERT_OK(edit_on(&s, &g, &db, NULL, &e));
    ASSERT_LE(60, db);
    int64_t waits = stats().waits;
    printf("  %lld waits\n", (long long)waits);
    ASSERT(waits > 4);
    int seen = 0, tried = 0;
    for (int64_t i = 1; i <= waits; i++) {
        tried++;
        for (uint64_t seed = 1; seed <= 3; seed++) {
            s.d.drop_wait = i;
            s.d.seed = seed;
            if (edit_on(&s, &g, &db, NULL, &e) != QIE_OK || db < 60) {
                printf("  wait %lld, seed %llu\n", (long long)i, (unsigned long long)seed);
                seen++;
                break;
            }
        }
    }
    release_case(&g);
    printf("  %d of %d forgotten waits seen\n", seen, tried);
    ASSERT(seen > 0);
}

QTEST(test_cuda_engine_unknown_gpu_is_refused) {
    qie_error e = {0};
    qie_engine *engine = NULL;
    setting s = setting_default();
    configure(&s.d);
    s.gpus = "7";
    ASSERT_INT(open_on(&s, &engine, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "gpus");
    s.gpus = "0,0";
    ASSERT_INT(open_on(&s, &engine, &e), QIE_E_INVALID);
    s.gpus = "GPU-00000000";
    ASSERT_OK(open_on(&s, &engine, &e));
    qie_engine_close(engine);
    s.d.cc_major = 7;
    configure(&s.d);
    s.gpus = NULL;
    ASSERT_INT(open_on(&s, &engine, &e), QIE_E_UNAVAILABLE);
    ASSERT_CONTAINS(e.message, "compute capability 7.0");
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
