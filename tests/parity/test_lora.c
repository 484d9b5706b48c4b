/* LoRAs against diffusers: the same files on the same tiny base, velocities and latents; two at
 * once; switching back and forth; the time of a switch. */
#define _GNU_SOURCE
#include "qtest.h"

#include <unistd.h>

#include "base/clock.h"
#include "base/json.h"
#include "qie/edit.h"
#include "weights/weights.h"

#define GOLDEN QIE_SOURCE_DIR "/tests/golden/"
#define BOUND 1e-8 /* NMSE: tests/golden/lora/README.md */

typedef struct fixture {
    qie_json *request;
    qie_image *image;
    const qie_image *views[1];
    qie_weights *expected;
    qie_engine *engine;
    char paths[QIE_MAX_LORAS][300];
    qie_lora_use uses[QIE_MAX_LORAS];
    size_t n_uses;
} fixture;

static fixture f;

static bool set_up(const char *backend) {
    qie_error e = {0};
    char path[400];
    const char *name = NULL;
    memset(&f, 0, sizeof f);
    if (qie_json_parse_file(GOLDEN "lora/request.json", 1 << 16, &f.request, &e) != QIE_OK)
        goto fail;
    name = qie_json_string(qie_json_at(qie_json_member(f.request, "images"), 0), NULL);
    snprintf(path, sizeof path, GOLDEN "lora/%s", name);
    if (qie_image_load(path, NULL, &f.image, &e) != QIE_OK ||
        qie_weights_open_file(GOLDEN "lora/expected.safetensors", &f.expected, &e) != QIE_OK)
        goto fail;
    f.views[0] = f.image;
    qie_engine_options o = qie_engine_options_default();
    o.model = GOLDEN "model";
    o.precision = QIE_PRECISION_F32;
    o.n_threads = 2;
    o.backend = backend;
    if (qie_engine_open(&o, &f.engine, &e) == QIE_OK)
        return true;
fail:
    printf("  %s\n", e.message);
    qtest_failed = true;
    return false;
}

static void tear_down(void) {
    qie_engine_close(f.engine);
    qie_weights_close(f.expected);
    qie_image_destroy(f.image);
    qie_json_free(f.request);
}

static bool add_use(void *arg, const char *name, qie_json *weight) {
    (void)arg;
    size_t i = f.n_uses++;
    snprintf(f.paths[i], sizeof f.paths[i], GOLDEN "lora/%s.safetensors", name);
    f.uses[i] = (qie_lora_use){.path = f.paths[i], .weight = qie_json_number(weight)};
    return true;
}

static void options_of(const char *name, qie_edit_options *o) {
    int64_t v;
    *o = qie_edit_options_default();
    o->images = f.views;
    o->n_images = 1;
    o->prompt = qie_json_string(qie_json_member(f.request, "prompt"), NULL);
    o->true_cfg_scale = qie_json_number(qie_json_member(f.request, "true_cfg_scale"));
    qie_json_get_int(f.request, "steps", 0, 0, 1000, &v, NULL);
    o->num_inference_steps = (int)v;
    qie_json_get_int(f.request, "seed", 0, 0, INT64_MAX, &v, NULL);
    o->seed = (uint64_t)v;
    qie_json_get_int(f.request, "width", 0, 0, 4096, &v, NULL);
    o->width = (int)v;
    qie_json_get_int(f.request, "height", 0, 0, 4096, &v, NULL);
    o->height = (int)v;
    qie_json_get_int(f.request, "ref_area", 0, 0, INT64_MAX, &v, NULL);
    o->ref_area = v;
    f.n_uses = 0;
    qie_json_each(qie_json_member(qie_json_member(f.request, "cases"), name), add_use, NULL);
    o->loras = f.uses;
    o->n_loras = f.n_uses;
}

/* Largest NMSE of the recorded stages of a case; < 0 when something failed. */
static double run_case(const char *name) {
    static const char *const stages[] = {"prompt_embeds", "dit.0.cond", "dit.1.uncond",
                                         "latents.1"};
    char dump[] = "/tmp/qie-lora-XXXXXX", full[64];
    qie_error e = {0};
    qie_edit_options o;
    qie_edit_result r;
    qie_weights *got = NULL;
    double worst = -1;
    int fd = mkstemp(dump);
    close(fd);
    setenv("QIE_DUMP", dump, 1);
    setenv("QIE_DUMP_NAMES", "prompt_embeds,dit.*,latents.*", 1);
    options_of(name, &o);
    qie_status st = qie_engine_edit(f.engine, &o, &r, &e);
    unsetenv("QIE_DUMP");
    if (st == QIE_OK) {
        if (r.plan.n_loras != f.n_uses)
            printf("  %zu LoRAs reported, %zu used\n", r.plan.n_loras, f.n_uses);
        qie_edit_result_release(&r);
        st = qie_weights_open_file(dump, &got, &e);
    }
    if (st != QIE_OK)
        printf("  %s: %s\n", name, e.message);
    for (size_t i = 0; st == QIE_OK && i < sizeof stages / sizeof *stages; i++) {
        snprintf(full, sizeof full, "%s/%s", name, stages[i]);
        const qie_tensor *want = qie_weights_find(f.expected, full),
                         *is = qie_weights_find(got, stages[i]);
        if (!want)
            continue;
        double nmse = is && is->n_elements == want->n_elements
                          ? qtest_nmse(is->data, want->data, (size_t)want->n_elements)
                          : INFINITY;
        printf("  %-24s NMSE %.3g\n", full, nmse);
        worst = nmse > worst || isnan(nmse) ? nmse : worst;
    }
    qie_weights_close(got);
    unlink(dump);
    return worst;
}

#define CHECK(name)                 \
    do {                            \
        double w_ = run_case(name); \
        ASSERT(w_ >= 0);            \
        ASSERT_LE(w_, BOUND);       \
    } while (0)

QTEST(test_lora_every_naming_equals_diffusers) {
    static const char *const cases[] = {"peft", "kohya", "comfy", "plain", "named", "text"};
    if (!set_up(NULL))
        return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(cases[i]);
    tear_down();
}

QTEST(test_lora_two_with_weights_equal_diffusers) {
    if (!set_up(NULL))
        return;
    CHECK("two");
    tear_down();
}

QTEST(test_lora_switched_back_and_forth_leaves_no_trace) {
    if (!set_up(NULL))
        return;
    CHECK("none");
    CHECK("kohya");
    CHECK("none");
    CHECK("two");
    CHECK("kohya");
    tear_down();
}

QTEST(test_lora_plain_c_equals_diffusers) {
    if (!set_up("ref"))
        return;
    CHECK("two");
    tear_down();
}

QTEST(test_lora_onednn_equals_diffusers) {
    if (!set_up("onednn"))
        return;
    CHECK("two");
    tear_down();
}

QTEST(test_lora_result_and_parameters_name_it) {
    qie_error e = {0};
    qie_edit_options o;
    qie_edit_result r;
    if (!set_up(NULL))
        return;
    options_of("two", &o);
    f.uses[1].name = "my style";
    ASSERT_OK(qie_engine_edit(f.engine, &o, &r, &e));
    ASSERT_INT(r.plan.n_loras, 2);
    ASSERT_STR(r.plan.loras[0].name, "peft");
    ASSERT_STR(r.plan.loras[1].name, "my style");
    ASSERT_INT(r.plan.loras[1].n_modules, 34);
    ASSERT_INT(r.plan.loras[1].max_rank, 5);
    char *json = qie_edit_parameters_json(f.engine, &o, &r, 0);
    ASSERT_CONTAINS(json, "\"loras\":[{\"name\":\"peft\",\"weight\":0.7");
    ASSERT_CONTAINS(json, "{\"name\":\"my style\",\"weight\":-0.4");
    free(json);
    qie_edit_result_release(&r);
    tear_down();
}

QTEST(test_lora_wrong_file_is_refused_and_the_next_edit_is_clean) {
    qie_error e = {0};
    qie_edit_options o;
    qie_edit_plan plan;
    if (!set_up(NULL))
        return;
    options_of("kohya", &o);
    ASSERT_OK(qie_engine_plan(f.engine, &o, false, &plan, &e));
    f.uses[0].path = GOLDEN "lora/none.safetensors";
    ASSERT_INT(qie_engine_plan(f.engine, &o, false, &plan, &e), QIE_E_NOT_FOUND);
    ASSERT_STR(e.param, "lora");
    f.uses[0].path = GOLDEN "unit/random.safetensors";
    ASSERT_INT(qie_engine_plan(f.engine, &o, false, &plan, &e), QIE_E_INVALID);
    f.uses[0].path = f.paths[0];
    f.uses[0].weight = NAN;
    ASSERT_INT(qie_engine_plan(f.engine, &o, false, &plan, &e), QIE_E_INVALID);
    CHECK("none");
    tear_down();
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
