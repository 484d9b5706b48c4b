/* Tiled encode and decode against diffusers' (tests/golden/unit/vae-tiling.safetensors), in f32. */
#include "qtest.h"

#include "model/model.h"

#define GOLDEN QIE_SOURCE_DIR "/tests/golden/"

typedef struct fixture {
    qie_model m;
    qie_compute *c;
    qie_arena *arena;
    qie_weights *ref;
    qie_run run;
} fixture;

static qie_status setup(fixture *f, qie_error *e) {
    memset(f, 0, sizeof *f);
    qie_status st = qie_model_open(GOLDEN "model", &f->m, e);
    qie_compute_limits l = qie_model_limits(&f->m.config);
    if (st == QIE_OK)
        st = qie_compute_create(NULL, 2, &l, &f->c, e);
    if (st == QIE_OK)
        st = qie_arena_create(1u << 28, &f->arena, e);
    if (st == QIE_OK)
        st = qie_weights_open_file(GOLDEN "unit/vae-tiling.safetensors", &f->ref, e);
    f->run = (qie_run){.compute = f->c, .arena = f->arena, .device = f->arena, .act = QIE_F32};
    return st;
}

static void teardown(fixture *f) {
    qie_weights_close(f->ref);
    qie_arena_destroy(f->arena);
    qie_compute_destroy(f->c);
    qie_model_release(&f->m);
}

QTEST(test_vae_tiled_encode_equals_diffusers) {
    qie_error e = {0};
    fixture f;
    ASSERT_OK(setup(&f, &e));
    const qie_tensor *px = qie_weights_find(f.ref, "pixels"),
                     *want = qie_weights_find(f.ref, "mean");
    int h = (int)px->shape[3], w = (int)px->shape[4], lh = h / 8, lw = w / 8, z = 16;
    float *pixels = malloc(sizeof(float) * 3 * (size_t)h * (size_t)w);
    float *mean = malloc(sizeof(float) * (size_t)(z * lh * lw)),
          *t = malloc(sizeof(float) * (size_t)(z * lh * lw));
    const uint8_t *p = px->data;
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < h * w; i++)
            pixels[i * 3 + c] = 2.0f * ((float)p[c * h * w + i] / 255.0f) - 1.0f;
    ASSERT_OK(qie_vae_encode(f.m.vae, &f.run, pixels, h, w, true, mean, &e));
    for (int i = 0; i < lh * lw; i++)
        for (int c = 0; c < z; c++)
            t[c * lh * lw + i] = mean[i * z + c];
    ASSERT_INT(want->n_elements, z * lh * lw);
    ASSERT_LE(qtest_nmse(t, want->data, (size_t)want->n_elements), 1e-8);
    free(pixels);
    free(mean);
    free(t);
    teardown(&f);
}

QTEST(test_vae_tiled_decode_equals_diffusers) {
    qie_error e = {0};
    fixture f;
    ASSERT_OK(setup(&f, &e));
    const qie_tensor *z = qie_weights_find(f.ref, "latents"),
                     *want = qie_weights_find(f.ref, "decoded_half");
    int n = (int)z->shape[1], h = (int)z->shape[3], w = (int)z->shape[4], oh = h * 4, ow = w * 4;
    float *map = malloc(sizeof(float) * (size_t)(n * h * w)),
          *px = malloc(sizeof(float) * 3 * 64 * (size_t)(h * w));
    float *half = malloc(sizeof(float) * 3 * (size_t)(oh * ow));
    for (int c = 0; c < n; c++)
        for (int i = 0; i < h * w; i++)
            map[i * n + c] = ((const float *)z->data)[c * h * w + i];
    ASSERT_OK(qie_vae_decode(f.m.vae, &f.run, map, h, w, true, px, &e));
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < oh; y++)
            for (int x = 0; x < ow; x++)
                half[(c * oh + y) * ow + x] = px[((2 * y) * w * 8 + 2 * x) * 3 + c];
    ASSERT_INT(want->n_elements, 3 * oh * ow);
    ASSERT_LE(qtest_nmse(half, want->data, (size_t)want->n_elements), 1e-8);
    free(map);
    free(px);
    free(half);
    teardown(&f);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
