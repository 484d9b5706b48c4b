/* Step caching on the demo: off is what it was, a threshold of 0 too; each mode leaves something
 * out and stays near; passes, pictures and few steps. */
#define _GNU_SOURCE
#include "qtest.h"

#include <math.h>

#include "image/compare.h"
#include "model/step_cache.h"
#include "qie/bench.h"
#include "qie/edit.h"

#define SAMPLE QIE_SOURCE_DIR "/demo/samples/ball.png"

static qie_engine *engine;
static qie_image *picture;
static const qie_image *views[1];

static bool set_up(void) {
    qie_error e = {0};
    qie_engine_options o = qie_engine_options_default();
    o.model = "demo";
    o.precision = QIE_PRECISION_F32; /* the same numbers on every machine, nearly */
    o.n_threads = 2;
    if (qie_image_load(SAMPLE, NULL, &picture, &e) == QIE_OK &&
        qie_engine_open(&o, &engine, &e) == QIE_OK) {
        views[0] = picture;
        return true;
    }
    printf("  %s\n", e.message);
    qtest_failed = true;
    return false;
}

static void tear_down(void) {
    qie_engine_close(engine);
    qie_image_destroy(picture);
}

static qie_edit_options options(int steps, qie_cache cache) {
    qie_edit_options o = qie_edit_options_default();
    o.images = views;
    o.n_images = 1;
    o.prompt = "turn the subject purple";
    o.seed = 5;
    o.num_inference_steps = steps;
    o.max_side = 64;
    o.keep_size = 0;
    o.cache = cache;
    return o;
}

static bool edit(const qie_edit_options *o, qie_edit_result *r) {
    qie_error e = {0};
    if (qie_engine_edit(engine, o, r, &e) == QIE_OK)
        return true;
    printf("  %s\n", e.message);
    qtest_failed = true;
    return false;
}

static bool same(const qie_image *a, const qie_image *b) {
    return isinf(qie_image_psnr(a, b));
}

QTEST(test_cache_off_and_threshold_0_are_bit_identical) {
    qie_edit_result off, zero, again;
    if (!set_up())
        return;
    qie_edit_options o = options(12, QIE_CACHE_OFF);
    o.true_cfg_scale = 3;
    ASSERT(edit(&o, &off));
    o.cache = QIE_CACHE_FAST;
    o.cache_threshold = 0;
    ASSERT(edit(&o, &zero));
    ASSERT_INT(off.n_skipped, 0);
    ASSERT_INT(off.n_forwards, 24);
    ASSERT_INT(zero.n_skipped, 0);
    ASSERT_INT(zero.plan.cache, QIE_CACHE_FAST);
    ASSERT(same(off.images[0], zero.images[0]));
    o.cache_threshold = -1;
    ASSERT(edit(&o, &again)); /* and what was cached leaves no trace */
    ASSERT(again.n_skipped > 0);
    qie_edit_result_release(&again);
    o.cache = QIE_CACHE_OFF;
    ASSERT(edit(&o, &again));
    ASSERT(same(off.images[0], again.images[0]));
    qie_edit_result_release(&off);
    qie_edit_result_release(&zero);
    qie_edit_result_release(&again);
    tear_down();
}

/* 40 steps, as the released model makes: docs/SPEED.md has the figures of more pictures. */
static void check_modes(double scale, double balanced_db, double fast_db) {
    qie_bench_cache c[QIE_CACHE_COUNT];
    qie_error e = {0};
    if (!set_up())
        return;
    qie_edit_options o = options(40, QIE_CACHE_OFF);
    o.true_cfg_scale = scale;
    int passes = scale > 1 ? 2 : 1;
    ASSERT_OK(qie_engine_bench_cache(engine, &o, NULL, NULL, c, &e));
    for (int i = 0; i < QIE_CACHE_COUNT; i++)
        printf("  %-9s %2d of %2d, PSNR %.2f dB, SSIM %.5f\n", qie_cache_name((qie_cache)i),
               c[i].n_skipped, c[i].n_forwards, c[i].psnr, c[i].ssim);
    ASSERT_INT(c[QIE_CACHE_OFF].n_skipped, 0);
    ASSERT_INT(c[QIE_CACHE_FAST].n_forwards, 40 * passes);
    ASSERT(c[QIE_CACHE_BALANCED].n_skipped >= 8 * passes);
    ASSERT(c[QIE_CACHE_FAST].n_skipped > c[QIE_CACHE_BALANCED].n_skipped);
    ASSERT(c[QIE_CACHE_FAST].n_skipped <= 35 * passes); /* never the first four and the last */
    ASSERT_LE(balanced_db, c[QIE_CACHE_BALANCED].psnr);
    ASSERT_LE(fast_db, c[QIE_CACHE_FAST].psnr);
    ASSERT(c[QIE_CACHE_OFF].ssim >= 1 && c[QIE_CACHE_FAST].ssim > 0.9);
    tear_down();
}

QTEST(test_cache_modes_of_40_steps_stay_near) {
    check_modes(1, 30, 24);
}

QTEST(test_cache_modes_with_guidance_stay_near) {
    check_modes(4, 30, 24);
}

QTEST(test_cache_each_picture_of_several_is_as_alone) {
    qie_edit_result two, one;
    if (!set_up())
        return;
    qie_edit_options o = options(20, QIE_CACHE_FAST);
    o.num_images = 2;
    ASSERT(edit(&o, &two));
    o.num_images = 1;
    ASSERT(edit(&o, &one));
    ASSERT(one.n_skipped > 0 && two.n_forwards == 2 * one.n_forwards);
    ASSERT(same(one.images[0], two.images[0]));
    ASSERT(!same(two.images[0], two.images[1]));
    qie_edit_result_release(&one);
    qie_edit_result_release(&two);
    tear_down();
}

QTEST(test_cache_does_nothing_in_few_steps_and_says_so) {
    qie_edit_result off, fast;
    if (!set_up())
        return;
    qie_edit_options o = options(8, QIE_CACHE_OFF);
    o.schedule = QIE_SCHEDULE_LIGHTNING;
    ASSERT(edit(&o, &off));
    o.cache = QIE_CACHE_FAST;
    ASSERT(edit(&o, &fast));
    ASSERT_INT(fast.plan.cache, QIE_CACHE_OFF);
    ASSERT_INT(fast.n_skipped, 0);
    ASSERT(same(off.images[0], fast.images[0]));
    ASSERT_INT(fast.plan.n_warnings, off.plan.n_warnings + 1);
    ASSERT_CONTAINS(fast.plan.warnings[fast.plan.n_warnings - 1], "cache 'fast' does nothing");
    ASSERT_INT(fast.plan.working_bytes, off.plan.working_bytes);
    qie_edit_result_release(&off);
    qie_edit_result_release(&fast);
    tear_down();
}

QTEST(test_cache_is_in_the_parameters_and_the_plan) {
    qie_edit_result r;
    qie_edit_plan with, without;
    qie_error e = {0};
    if (!set_up())
        return;
    qie_edit_options o = options(9, QIE_CACHE_OFF);
    ASSERT_OK(qie_engine_plan(engine, &o, false, &without, &e));
    o.cache = QIE_CACHE_BALANCED;
    ASSERT_OK(qie_engine_plan(engine, &o, false, &with, &e));
    ASSERT(with.working_bytes >= without.working_bytes);
    ASSERT(edit(&o, &r)); /* within the plan to the byte: the arena has no more */
    char *json = qie_edit_parameters_json(engine, &o, &r, 0);
    ASSERT_CONTAINS(json, "\"cache\":\"balanced\",\"skipped_forwards\":");
    free(json);
    qie_edit_result_release(&r);
    o.cache = (qie_cache)7;
    ASSERT_INT(qie_engine_plan(engine, &o, false, &with, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "cache");
    tear_down();
}

QTEST(test_cache_rules) {
    qie_cache_rules r;
    ASSERT(!qie_cache_rules_make(QIE_CACHE_OFF, -1, 40, &r));
    ASSERT(!qie_cache_rules_make(QIE_CACHE_FAST, -1, QIE_CACHE_MIN_STEPS - 1, &r));
    ASSERT(qie_cache_rules_make(QIE_CACHE_FAST, -1, QIE_CACHE_MIN_STEPS, &r));
    ASSERT_INT(r.first, 2);
    ASSERT_INT(r.last, 1);
    ASSERT(qie_cache_rules_make(QIE_CACHE_BALANCED, 0.5, 40, &r));
    ASSERT_INT(r.first, 4);
    ASSERT(r.threshold == 0.5);
}

QTEST(test_cache_relative_change_does_not_depend_on_threads) {
    enum { N = 300001 };
    float *a = malloc(N * sizeof *a), *b = malloc(N * sizeof *b);
    double *partial = malloc(sizeof *partial * 2 * (size_t)qie_step_cache_chunks(N)), want[2] = {0};
    ASSERT(a && b && partial);
    for (int i = 0; i < N; i++) {
        a[i] = (float)((i % 1009 * 7919) % 1001) / 500 - 1;
        b[i] = (float)((i % 1013 * 10007) % 997) / 500 - 1;
        want[0] += fabs((double)a[i] - b[i]);
        want[1] += fabs((double)b[i]);
    }
    double one = qie_relative_change(a, b, N, 1, partial),
           four = qie_relative_change(a, b, N, 4, partial);
    ASSERT(one == four);
    ASSERT_LE(fabs(one - want[0] / want[1]), 1e-6);
    ASSERT(qie_relative_change(a, a, N, 2, partial) == 0);
    memset(b, 0, N * sizeof *b);
    ASSERT(isinf(qie_relative_change(a, b, N, 2, partial)));
    free(a);
    free(b);
    free(partial);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
