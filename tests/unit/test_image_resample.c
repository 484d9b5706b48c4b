#include "image/resample.h"

#include "image/geometry.h"
#include "qtest.h"
#include "test_image_util.h"
#include "weights/weights.h"

static qie_image *image_of(const qie_tensor *t) {
    qie_image *image;
    if (qie_image_create((int)t->shape[1], (int)t->shape[0], &image, NULL) != QIE_OK)
        exit(1);
    memcpy(qie_image_pixels(image), t->data, t->n_bytes);
    return image;
}

QTEST(test_resample_recorded_pictures_are_bit_exact) {
    qie_error e = {0};
    qie_weights *w;
    ASSERT_OK(
        qie_weights_open_file(QIE_SOURCE_DIR "/tests/golden/unit/resample.safetensors", &w, &e));
    int n_cases = 0, n_wrong = 0;
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        int k, width, height;
        char filter[16], name[16];
        if (sscanf(t->name, "out.%d.%15[a-z].%dx%d", &k, filter, &width, &height) != 4)
            continue;
        snprintf(name, sizeof name, "in.%d", k);
        qie_image *in = image_of(qie_weights_find(w, name)), *out;
        qie_filter f = strcmp(filter, "lanczos") ? QIE_FILTER_BICUBIC : QIE_FILTER_LANCZOS;
        ASSERT_OK(qie_resample(in, width, height, f, QIE_RESAMPLE_PILLOW_13, 2, &out, &e));
        if (memcmp(qie_image_pixels(out), t->data, t->n_bytes)) {
            printf("  %s differs\n", t->name);
            n_wrong++;
        }
        n_cases++;
        qie_image_destroy(in);
        qie_image_destroy(out);
    }
    qie_weights_close(w);
    ASSERT_INT(n_cases, 24);
    ASSERT_INT(n_wrong, 0);
}

QTEST(test_resample_odd_sizes_and_both_orders_are_bit_exact) {
    qie_error e = {0};
    FILE *f = fopen(IMAGES "resample.txt", "r");
    ASSERT(f != NULL);
    int wi, hi, wo, ho, filter, order, n_cases = 0, n_wrong = 0;
    unsigned seed;
    unsigned long long hash;
    while (fscanf(f, "%d %d %d %d %d %d %u %llx", &wi, &hi, &wo, &ho, &filter, &order, &seed,
                  &hash) == 8) {
        qie_image *in = lcg_image(wi, hi, seed), *out;
        ASSERT_OK(qie_resample(in, wo, ho, (qie_filter)filter, (qie_resample_order)order,
                               1 + n_cases % 3, &out, &e));
        if (image_hash(out) != hash) {
            printf("  %dx%d to %dx%d filter %d order %d seed %u differs\n", wi, hi, wo, ho, filter,
                   order, seed);
            n_wrong++;
        }
        n_cases++;
        qie_image_destroy(in);
        qie_image_destroy(out);
    }
    fclose(f);
    ASSERT_INT(n_cases, 240);
    ASSERT_INT(n_wrong, 0);
}

QTEST(test_resample_threads_do_not_change_bytes) {
    qie_error e = {0};
    qie_image *in = lcg_image(301, 211, 7), *one, *many;
    ASSERT_OK(qie_resample(in, 97, 333, QIE_FILTER_LANCZOS, 0, 1, &one, &e));
    ASSERT_OK(qie_resample(in, 97, 333, QIE_FILTER_LANCZOS, 0, 7, &many, &e));
    ASSERT(image_hash(one) == image_hash(many));
    qie_image_destroy(in);
    qie_image_destroy(one);
    qie_image_destroy(many);
}

QTEST(test_resample_equal_size_is_a_copy) {
    qie_error e = {0};
    qie_image *in = lcg_image(33, 20, 7), *out;
    ASSERT_OK(qie_resample(in, 33, 20, QIE_FILTER_LANCZOS, 0, 1, &out, &e));
    ASSERT(out != in && image_hash(in) == image_hash(out));
    qie_image_destroy(in);
    qie_image_destroy(out);
}

QTEST(test_resample_impossible_size_is_refused) {
    qie_error e = {0};
    qie_image *in = lcg_image(16, 16, 1), *out;
    ASSERT_INT(qie_resample(in, 0, 5, QIE_FILTER_LANCZOS, 0, 1, &out, &e), QIE_E_INVALID);
    ASSERT_INT(qie_resample(in, 5, -3, QIE_FILTER_LANCZOS, 0, 1, &out, &e), QIE_E_INVALID);
    ASSERT(out == NULL);
    qie_image_destroy(in);
}

QTEST(test_resample_extreme_shrink_of_a_wide_picture_works) {
    qie_error e = {0};
    qie_image *in = lcg_image(30000, 16, 3), *out;
    ASSERT_OK(qie_resample(in, 16, 16, QIE_FILTER_LANCZOS, 0, 2, &out, &e));
    ASSERT_INT(qie_image_width(out), 16);
    qie_image_destroy(in);
    qie_image_destroy(out);
}

QTEST(test_crop_takes_the_named_pixels) {
    qie_error e = {0};
    qie_image *in = lcg_image(20, 10, 3), *out;
    ASSERT_OK(qie_image_crop(in, 3, 2, 5, 4, &out, &e));
    const uint8_t *a = qie_image_pixels(in), *b = qie_image_pixels(out);
    for (int y = 0; y < 4; y++)
        ASSERT(!memcmp(b + y * 15, a + ((y + 2) * 20 + 3) * 3, 15));
    qie_image_destroy(out);
    ASSERT_INT(qie_image_crop(in, 16, 0, 5, 4, &out, &e), QIE_E_INVALID);
    ASSERT_INT(qie_image_crop(in, 0, 0, 20, 11, &out, &e), QIE_E_INVALID);
    ASSERT_INT(qie_image_crop(in, -1, 0, 5, 4, &out, &e), QIE_E_INVALID);
    ASSERT_INT(qie_image_crop(in, 2147483647, 0, 5, 4, &out, &e), QIE_E_INVALID);
    qie_image_destroy(in);
}

QTEST(test_pad_repeats_the_last_column_and_row) {
    qie_error e = {0};
    qie_image *in = lcg_image(7, 5, 3), *out;
    ASSERT_OK(qie_image_pad_edge(in, 11, 8, &out, &e));
    const uint8_t *a = qie_image_pixels(in), *b = qie_image_pixels(out);
    for (int y = 0; y < 8; y++)
        for (int x = 0; x < 11; x++) {
            int sx = x < 7 ? x : 6, sy = y < 5 ? y : 4;
            ASSERT(!memcmp(b + (y * 11 + x) * 3, a + (sy * 7 + sx) * 3, 3));
        }
    qie_image_destroy(out);
    ASSERT_INT(qie_image_pad_edge(in, 6, 8, &out, &e), QIE_E_INVALID);
    qie_image_destroy(in);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
