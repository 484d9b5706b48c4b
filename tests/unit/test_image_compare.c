/* PSNR and SSIM against values worked out by hand. */
#include "qtest.h"

#include <math.h>

#include "image/compare.h"

static qie_image *grey(int w, int h, int value, int step) {
    qie_image *image = NULL;
    if (qie_image_create(w, h, &image, NULL) != QIE_OK)
        return NULL;
    uint8_t *p = qie_image_pixels(image);
    for (int i = 0; i < w * h; i++)
        for (int c = 0; c < 3; c++)
            p[3 * i + c] = (uint8_t)(value + step * (i % 2));
    return image;
}

QTEST(test_compare_equal_pictures) {
    qie_image *a = grey(20, 9, 40, 100), *b = grey(20, 9, 40, 100);
    ASSERT(isinf(qie_image_psnr(a, b)));
    ASSERT_LE(fabs(qie_image_ssim(a, b) - 1), 1e-9);
    qie_image_destroy(a);
    qie_image_destroy(b);
}

QTEST(test_compare_constant_difference) {
    qie_image *a = grey(16, 16, 100, 0), *b = grey(16, 16, 110, 0);
    ASSERT_LE(fabs(qie_image_psnr(a, b) - 10 * log10(255.0 * 255 / 100)), 1e-9);
    double c1 = 2.55 * 2.55; /* no variance: the first factor alone */
    ASSERT_LE(fabs(qie_image_ssim(a, b) - (2 * 100 * 110.0 + c1) / (100 * 100 + 110 * 110 + c1)),
              1e-6);
    qie_image_destroy(a);
    qie_image_destroy(b);
}

QTEST(test_compare_opposite_patterns_and_sizes) {
    qie_image *a = grey(16, 16, 100, 50), *b = grey(16, 16, 150, -50), *c = grey(16, 15, 0, 0),
              *d = grey(3, 2, 10, 3);
    ASSERT(qie_image_ssim(a, b) < -0.9);
    ASSERT(qie_image_psnr(a, c) < 0 && qie_image_ssim(a, c) < 0);
    ASSERT_LE(fabs(qie_image_ssim(d, d) - 1), 1e-9);
    qie_image_destroy(a);
    qie_image_destroy(b);
    qie_image_destroy(c);
    qie_image_destroy(d);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
