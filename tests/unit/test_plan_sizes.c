/* Size rules against diffusers' recorded calculate_dimensions, and the rules that are ours. */
#include "qtest.h"

#include "base/json.h"
#include "plan/sizes.h"

static qie_model_config released(void) {
    qie_model_config m = {0};
    m.transformer.patch_size = 2;
    m.vae.scale_factor = 8;
    m.vision.patch_size = 14;
    m.vision.spatial_merge_size = 2;
    m.processor.min_pixels = 3136;
    m.processor.max_pixels = 12845056;
    return m;
}

QTEST(test_sizes_dims_recorded_exact) {
    qie_error e = {0};
    qie_json *j;
    ASSERT_OK(qie_json_parse_file(QIE_SOURCE_DIR "/tests/golden/unit/sizes.json", 1 << 20, &j, &e));
    for (size_t i = 0; i < qie_json_size(j); i++) {
        qie_json *row = qie_json_at(j, i), *out = qie_json_member(row, "out");
        double w = qie_json_number(qie_json_member(row, "w")),
               h = qie_json_number(qie_json_member(row, "h"));
        qie_size s = qie_dims(qie_json_number(qie_json_member(row, "area")), w / h);
        ASSERT_INT(s.w, qie_json_integer(qie_json_at(out, 0)));
        ASSERT_INT(s.h, qie_json_integer(qie_json_at(out, 1)));
    }
    ASSERT_INT(qie_json_size(j), 200);
    qie_json_free(j);
}

/* Rows of the table in docs/MODEL.md: source, condition, after the second resize, output, tokens.
 */
QTEST(test_sizes_plan_default_equals_diffusers) {
    static const int rows[][11] = {
        {512, 512, 384, 384, 392, 392, 196, 1024, 1024, 4096, 64},
        {1536, 1024, 480, 320, 476, 308, 187, 1248, 832, 4056, 78},
        {1920, 1080, 512, 288, 504, 280, 180, 1376, 768, 4128, 86},
        {1600, 1200, 448, 320, 448, 308, 176, 1184, 896, 4144, 74},
        {1170, 2532, 256, 576, 252, 588, 189, 704, 1504, 4136, 44},
        {4000, 1000, 768, 192, 756, 196, 189, 2048, 512, 4096, 128},
    };
    qie_model_config m = released();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const int *r = rows[i];
        qie_size_request q = {.n_images = 1, .images = {{r[0], r[1]}}};
        qie_size_plan s;
        qie_error e = {0};
        ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
        ASSERT_INT(s.images[0].cond.w, r[2]);
        ASSERT_INT(s.images[0].cond.h, r[3]);
        ASSERT_INT(s.images[0].grid_px.w, r[4]);
        ASSERT_INT(s.images[0].grid_px.h, r[5]);
        ASSERT_INT(s.images[0].n_vision_tokens, r[6]);
        ASSERT_INT(s.generated.w, r[7]);
        ASSERT_INT(s.generated.h, r[8]);
        ASSERT_INT(s.n_target, r[9]);
        ASSERT_INT(s.grid_w, r[10]);
        ASSERT_INT(s.images[0].vae.w, r[7]);
    }
}

QTEST(test_sizes_plan_last_image_decides_ratio) {
    qie_model_config m = released();
    qie_size_request q = {.n_images = 2, .images = {{1920, 1080}, {1024, 1536}}};
    qie_size_plan s;
    qie_error e = {0};
    ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
    ASSERT_INT(s.generated.w, 832);
    ASSERT_INT(s.generated.h, 1248);
    ASSERT_INT(s.images[0].vae.w, 1376);
    ASSERT_INT(s.n_reference, 4128 + 4056);
}

QTEST(test_sizes_explicit_size_is_floored_and_reported) {
    qie_model_config m = released();
    qie_size_request q = {.n_images = 1, .images = {{512, 512}}, .width = 333, .height = 160};
    qie_size_plan s;
    qie_error e = {0};
    ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
    ASSERT_INT(s.generated.w, 320);
    ASSERT_INT(s.generated.h, 160);
    ASSERT(s.floored);
    q.width = 0; /* the other side by the rule */
    ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
    ASSERT_INT(s.generated.w, 1024);
    q.width = 15;
    ASSERT_INT(qie_size_plan_make(&m, &q, &s, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "width");
}

QTEST(test_sizes_max_side_bounds_output_and_references) {
    qie_model_config m = released();
    for (int side = 64; side <= 4096; side += 37)
        for (int ratio = 0; ratio < 5; ratio++) {
            static const qie_size in[5] = {
                {512, 512}, {1920, 1080}, {900, 1600}, {3000, 1000}, {640, 480}};
            qie_size_request q = {.n_images = 1, .images = {in[ratio]}, .max_side = side};
            qie_size_plan s;
            qie_error e = {0};
            ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
            ASSERT_LE(s.generated.w, side);
            ASSERT_LE(s.generated.h, side);
            ASSERT_INT(s.images[0].vae.w, s.generated.w);
        }
}

QTEST(test_sizes_keep_size_pads_small_and_resizes_large) {
    qie_model_config m = released();
    qie_size_request q = {.n_images = 1, .images = {{100, 77}}, .keep_size = true};
    qie_size_plan s;
    qie_error e = {0};
    ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
    ASSERT_INT(s.generated.w, 128);
    ASSERT_INT(s.generated.h, 96);
    ASSERT_INT(s.output.w, 100);
    ASSERT_INT(s.output.h, 77);
    ASSERT_INT(s.output_fit, QIE_FIT_PAD);
    ASSERT_INT(s.images[0].vae_fit, QIE_FIT_PAD);
    ASSERT_INT(s.images[0].vae.w, 128);
    q.images[0] = (qie_size){4000, 3000};
    ASSERT_OK(qie_size_plan_make(&m, &q, &s, &e));
    ASSERT_INT(s.output.w, 4000);
    ASSERT_INT(s.generated.w, 1184);
    ASSERT(s.kept_by_resize);
    ASSERT_INT(s.images[0].vae_fit, QIE_FIT_RESIZE);
}

QTEST(test_sizes_bad_requests_name_the_field) {
    qie_model_config m = released();
    qie_size_plan s;
    qie_error e = {0};
    qie_size_request q = {.n_images = 1, .images = {{512, 512}}, .max_side = 63};
    ASSERT_INT(qie_size_plan_make(&m, &q, &s, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "max_side");
    q.max_side = 0;
    q.ref_area = 10;
    ASSERT_INT(qie_size_plan_make(&m, &q, &s, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "ref_area");
    q.ref_area = 0;
    q.images[0] = (qie_size){30000, 16};
    ASSERT_INT(qie_size_plan_make(&m, &q, &s, &e), QIE_E_INVALID);
    ASSERT_STR(e.param, "image");
    q.n_images = 17;
    ASSERT_INT(qie_size_plan_make(&m, &q, &s, &e), QIE_E_INVALID);
}

QTEST(test_sizes_rope_start_is_largest_half_extent) {
    qie_size_plan s = {.n_images = 1, .grid_h = 64, .grid_w = 64};
    s.images[0].grid_h = 5;
    s.images[0].grid_w = 151;
    ASSERT_INT(qie_rope_text_start(&s), 75);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
