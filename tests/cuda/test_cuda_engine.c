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

QTEST(test_cuda_engine_resident_equals_diffusers) {
    for (size_t i = 0; i < 2; i++) {
        setting s = setting_default();
        s.d.seed = 7 + i;
        check_exact(&s, CASES[i], "resident");
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
