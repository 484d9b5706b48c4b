/* The bench on the tiny model: every stage and operation is there, its numbers fit the plan, and it
 * leaves the engine as it was. */
#define _GNU_SOURCE
#include "qtest.h"
#include "run.h"

#include "base/json.h"
#include "qie/bench.h"

#define MODEL QIE_SOURCE_DIR "/tests/golden/model"

static qie_image *picture(void) {
    qie_image *i = NULL;
    qie_image_create(64, 64, &i, NULL);
    uint8_t *p = qie_image_pixels(i);
    for (int k = 0; k < 64 * 64 * 3; k++)
        p[k] = (uint8_t)(k * 7 / 3);
    return i;
}

static qie_edit_options edit_of(const qie_image *const *images) {
    qie_edit_options o = qie_edit_options_default();
    o.images = images;
    o.n_images = 1;
    o.prompt = "make the sky red";
    o.num_inference_steps = 2;
    o.width = o.height = 64;
    o.ref_area = 64 * 64;
    return o;
}

static qie_engine *open_engine(void) {
    qie_engine_options o = qie_engine_options_default();
    qie_engine *engine = NULL;
    o.model = MODEL;
    o.precision = QIE_PRECISION_F32;
    o.n_threads = 2;
    qie_engine_open(&o, &engine, NULL);
    return engine;
}

static const qie_bench_op *find(const qie_bench_result *r, int stage, const char *op) {
    for (size_t i = 0; i < r->n_ops; i++)
        if ((int)r->ops[i].stage == stage && !strcmp(r->ops[i].op, op))
            return &r->ops[i];
    return NULL;
}

QTEST(test_bench_all_stages_measured_with_their_operations) {
    qie_error e = {0};
    qie_image *image = picture();
    const qie_image *images[1] = {image};
    qie_edit_options edit = edit_of(images);
    qie_bench_options o = qie_bench_options_default();
    qie_bench_result r;
    qie_engine *engine = open_engine();
    o.repeats = 2;
    ASSERT(engine);
    ASSERT_OK(qie_engine_bench(engine, &edit, &o, &r, &e));
    for (int i = 0; i < QIE_BENCH_STAGES; i++) {
        const qie_bench_stage *s = &r.stages[i];
        ASSERT(s->measured);
        ASSERT_INT(s->n, 2);
        ASSERT(s->fastest_s > 0 && s->fastest_s <= s->median_s);
        /* operations lie inside the runs, which were as many; the mean is at most the slowest */
        ASSERT_LE(s->ops_s, s->times[s->n - 1]);
    }
    ASSERT_STR(r.stages[QIE_BENCH_TEXT].layers[0].name, "vision");
    ASSERT_INT(r.stages[QIE_BENCH_TEXT].layers[0].n, 3);
    ASSERT_STR(r.stages[QIE_BENCH_TEXT].layers[1].name, "language");
    ASSERT_INT(r.stages[QIE_BENCH_FORWARD].layers[0].n, 2);
    ASSERT(r.stages[QIE_BENCH_FORWARD].layers[0].layer_s > 0);
    ASSERT_STR(r.stages[QIE_BENCH_TEXT_NEXT].layers[0].name, "vision");
    ASSERT(!r.stages[QIE_BENCH_TEXT_AGAIN].layers[0].name); /* the pictures are not seen again */
    ASSERT_STR(r.stages[QIE_BENCH_TEXT_AGAIN].layers[1].name, "language");
    ASSERT(!find(&r, QIE_BENCH_TEXT_AGAIN, "linear"));
    ASSERT(find(&r, QIE_BENCH_FORWARD, "attention"));
    ASSERT(find(&r, QIE_BENCH_TEXT, "embed"));
    ASSERT(!find(&r, QIE_BENCH_TEXT, "conv2d"));
    const qie_bench_op *conv = find(&r, QIE_BENCH_VAE_DECODE, "conv2d");
    ASSERT(conv && conv->fastest_s > 0 && conv->roof_s > 0 && conv->calls >= 1);
    ASSERT(!find(&r, QIE_BENCH_EDIT, "linear"));
    qie_bench_result_release(&r);
    qie_engine_close(engine);
    qie_image_destroy(image);
}

/* Two blocks, of which the last computes queries of the target alone: the products that the plan
 * counts, less what is left out, plus the small layers at both ends. */
QTEST(test_bench_forward_products_agree_with_the_plan) {
    qie_error e = {0};
    qie_image *image = picture();
    const qie_image *images[1] = {image};
    qie_edit_options edit = edit_of(images);
    qie_bench_options o = qie_bench_options_default();
    qie_bench_result r;
    qie_engine *engine = open_engine();
    memset(o.stages, 0, sizeof o.stages);
    o.stages[QIE_BENCH_FORWARD] = true;
    o.repeats = 1;
    o.ops = false;
    ASSERT(engine);
    ASSERT_OK(qie_engine_bench(engine, &edit, &o, &r, &e));
    double target = r.plan.n_target_tokens, reference = r.plan.n_reference_tokens,
           text = r.plan.n_prompt_tokens, n = target + reference + text, d = 64;
    double block = 24 * d * d * n + 4 * d * n * n,
           last = 4 * d * d * n + 20 * d * d * target + 4 * d * n * target,
           ends = 2 * target * d * 64 * 2;
    double want = (block + last + ends) * 1e-9;
    ASSERT_LE(fabs(r.stages[QIE_BENCH_FORWARD].gflop - want) / want, 1e-6);
    ASSERT(!r.stages[QIE_BENCH_TEXT].measured);
    for (size_t i = 0; i < r.n_ops; i++)
        ASSERT(r.ops[i].fastest_s == 0);
    qie_bench_result_release(&r);
    qie_engine_close(engine);
    qie_image_destroy(image);
}

QTEST(test_bench_leaves_the_engine_as_it_was) {
    qie_error e = {0};
    qie_image *image = picture();
    const qie_image *images[1] = {image};
    qie_edit_options edit = edit_of(images);
    qie_bench_options o = qie_bench_options_default();
    qie_bench_result r;
    qie_edit_result before, after;
    qie_engine *engine = open_engine();
    o.repeats = 1;
    o.ops = false;
    o.cold = true;
    edit.seed = 5;
    ASSERT(engine);
    ASSERT_OK(qie_engine_edit(engine, &edit, &before, &e));
    ASSERT_OK(qie_engine_bench(engine, &edit, &o, &r, &e));
    ASSERT_OK(qie_engine_edit(engine, &edit, &after, &e));
    ASSERT(!memcmp(qie_image_pixels_const(before.images[0]),
                   qie_image_pixels_const(after.images[0]), 64 * 64 * 3));
    qie_bench_result_release(&r);
    qie_edit_result_release(&before);
    qie_edit_result_release(&after);
    qie_engine_close(engine);
    qie_image_destroy(image);
}

QTEST(test_bench_command_prints_json_for_the_stages_asked) {
    static run_result r;
    const char *args[] = {"bench",  "--model",
                          MODEL,    "-W",
                          "64",     "-H",
                          "64",     "--repeats",
                          "1",      "-s",
                          "1",      "--no-ops",
                          "--only", "text,text_again,vae_encode,modulation,forward,vae_decode",
                          "--json", NULL};
    qie_json *o = NULL;
    run_program(QIE_BINARY_DIR "/qwen-edit", args, &(run_options){.input = NULL}, &r);
    ASSERT_INT(r.code, 0);
    ASSERT_INT(qie_json_parse(r.out, strlen(r.out), "output", &o, NULL), QIE_OK);
    ASSERT_INT(qie_json_size(qie_json_member(o, "stages")), 6);
    ASSERT(qie_json_number(qie_json_member(o, "sum_at_released_depth_s")) >
           qie_json_number(qie_json_member(o, "sum_of_stages_s")));
    qie_json_free(o);
}

QTEST(test_bench_command_unknown_stage_is_refused) {
    static run_result r;
    const char *args[] = {"bench", "--model", MODEL, "--only", "text,nothing", NULL};
    run_program(QIE_BINARY_DIR "/qwen-edit", args, &(run_options){.input = NULL}, &r);
    ASSERT_INT(r.code, 2);
    ASSERT_CONTAINS(r.err, "'nothing' is not one of text");
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
