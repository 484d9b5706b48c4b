#include "qtest.h"
#include "test_image_util.h"

static uint8_t *encode(const qie_image *image, qie_image_format format, int quality,
                       const char *parameters, size_t *n) {
    qie_error e = {0};
    qie_image_encode_options o = qie_image_encode_options_default();
    o.format = format;
    o.quality = quality;
    o.parameters = parameters;
    uint8_t *bytes;
    if (qie_image_encode(image, &o, &bytes, n, &e) != QIE_OK) {
        printf("  encode: %s\n", e.message);
        return NULL;
    }
    return bytes;
}

/* Mean absolute difference of two pictures of one size; -1 if sizes differ. */
static double difference(const qie_image *a, const qie_image *b) {
    if (qie_image_width(a) != qie_image_width(b) || qie_image_height(a) != qie_image_height(b))
        return -1;
    size_t n = (size_t)qie_image_width(a) * (size_t)qie_image_height(a) * 3;
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += abs(qie_image_pixels_const(a)[i] - qie_image_pixels_const(b)[i]);
    return sum / (double)n;
}

QTEST(test_encode_round_trips_keep_the_pixels) {
    static const struct {
        qie_image_format format;
        int quality;
        double bound; /* levels on the mean; 0: exact */
    } CASES[] = {{QIE_IMAGE_PNG, 95, 0},    {QIE_IMAGE_WEBP, 100, 0}, {QIE_IMAGE_JPEG, 100, 0.6},
                 {QIE_IMAGE_JPEG, 90, 1.5}, {QIE_IMAGE_JPEG, 60, 4},  {QIE_IMAGE_WEBP, 90, 4},
                 {QIE_IMAGE_JPEG, 1, 60},   {QIE_IMAGE_WEBP, 1, 30}};
    static const int SIZES[][2] = {{16, 16}, {33, 47}, {130, 61}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        for (size_t k = 0; k < 3; k++)
            for (int with = 0; with < 2; with++) {
                qie_error e = {0};
                qie_image *image = smooth_image(SIZES[k][0], SIZES[k][1]), *back;
                size_t n;
                uint8_t *bytes =
                    encode(image, CASES[i].format, CASES[i].quality, with ? "{}" : NULL, &n);
                ASSERT(bytes != NULL);
                ASSERT_INT(qie_image_sniff(bytes, n), CASES[i].format);
                ASSERT_OK(qie_image_decode(bytes, n, NULL, &back, &e));
                double d = difference(image, back);
                ASSERT(d >= 0);
                ASSERT_LE(d, CASES[i].bound);
                qie_image_destroy(image);
                qie_image_destroy(back);
                free(bytes);
            }
}

QTEST(test_encode_png_at_every_level_is_exact) {
    for (int level = 0; level <= 9; level++) {
        qie_error e = {0};
        qie_image *image = lcg_image(40, 30, 4), *back;
        qie_image_encode_options o = qie_image_encode_options_default();
        o.compression = level;
        uint8_t *bytes;
        size_t n;
        ASSERT_OK(qie_image_encode(image, &o, &bytes, &n, &e));
        ASSERT_OK(qie_image_decode(bytes, n, NULL, &back, &e));
        ASSERT(image_hash(image) == image_hash(back));
        qie_image_destroy(image);
        qie_image_destroy(back);
        free(bytes);
    }
}

QTEST(test_encode_jpeg_of_high_quality_keeps_full_colour) {
    qie_image *image = smooth_image(32, 32);
    for (int q = 89; q <= 90; q++) {
        size_t n, i = 2;
        uint8_t *b = encode(image, QIE_IMAGE_JPEG, q, NULL, &n);
        ASSERT(b != NULL);
        while (b[i + 1] != 0xc0)
            i += 2u + (size_t)(b[i + 2] << 8 | b[i + 3]);
        ASSERT_INT(b[i + 11], q >= 90 ? 0x11 : 0x22); /* sampling factors of the first component */
        free(b);
    }
    qie_image_destroy(image);
}

static const qie_image_format ALL[] = {QIE_IMAGE_PNG, QIE_IMAGE_JPEG, QIE_IMAGE_WEBP};

static void check_parameters(const char *text) {
    qie_image *image = smooth_image(16, 16);
    for (int i = 0; i < 3; i++)
        for (int quality = 50; quality <= 100; quality += 50) {
            qie_error e = {0};
            size_t n;
            uint8_t *bytes = encode(image, ALL[i], quality, text, &n);
            ASSERT(bytes != NULL);
            char *back;
            ASSERT_OK(qie_image_read_parameters(bytes, n, &back, &e));
            if (text)
                ASSERT(back && !strcmp(back, text));
            else
                ASSERT(back == NULL);
            free(back);
            qie_image *again;
            ASSERT_OK(qie_image_decode(bytes, n, NULL, &again, &e));
            qie_image_destroy(again);
            free(bytes);
        }
    qie_image_destroy(image);
}

QTEST(test_parameters_come_back_from_every_format) {
    check_parameters(NULL);
    check_parameters("");
    check_parameters("{\"prompt\":\"make it <b>&amp;</b> & \\\"red\\\"\",\"seed\":1}");
    check_parameters(
        "{\"prompt\":\"\xe6\x8a\x8a\xe8\x83\x8c\xe6\x99\xaf \xf0\x9f\x8e\xa8\"}\r\n\t");
}

QTEST(test_parameters_longer_than_a_jpeg_segment_come_back) {
    size_t n = 300000;
    char *text = malloc(n + 1);
    for (size_t i = 0; i < n; i += 3)
        memcpy(text + i, "\xe6\x8a\x8a", 3);
    text[n] = 0;
    check_parameters(text);
    for (size_t len = 65520; len < 65527; len++) { /* around the end of the first segment */
        memset(text, 'x', len);
        text[len] = 0;
        check_parameters(text);
    }
    free(text);
}

QTEST(test_parameters_of_other_programs_are_left_alone) {
    static const struct {
        const char *file, *text;
    } CASES[] = {{"parameters_compressed.png", "{\"prompt\":\"a <b> & c\"}"},
                 {"parameters_other.png", NULL},
                 {"damage.png", "{\"prompt\":\"a <b> & c\"}"},
                 {"parameters.jpg", "{\"prompt\":\"a <b> & c\"}"},
                 {"parameters_other.jpg", NULL},
                 {"xmp6.webp", NULL},
                 {"lossy.webp", NULL},
                 {"c2d8i0.png", NULL}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        qie_error e = {0};
        size_t n;
        uint8_t *bytes = fixture(CASES[i].file, &n);
        char *text;
        ASSERT_OK(qie_image_read_parameters(bytes, n, &text, &e));
        if (CASES[i].text)
            ASSERT_STR(text, CASES[i].text);
        else
            ASSERT(text == NULL);
        free(text);
        free(bytes);
    }
    qie_error e = {0};
    char *text;
    ASSERT_INT(qie_image_read_parameters("GIF89a", 6, &text, &e), QIE_E_UNSUPPORTED);
}

QTEST(test_encode_options_out_of_range_are_refused) {
    qie_image *image = smooth_image(16, 16);
    static char big[(1u << 20) + 2];
    memset(big, 'x', sizeof big - 1);
    const struct {
        qie_image_encode_options o;
        qie_status st;
        const char *param;
    } cases[] = {{{QIE_IMAGE_JPEG, 0, 6, NULL}, QIE_E_INVALID, "quality"},
                 {{QIE_IMAGE_WEBP, 101, 6, NULL}, QIE_E_INVALID, "quality"},
                 {{QIE_IMAGE_PNG, 95, 10, NULL}, QIE_E_INVALID, "compression"},
                 {{QIE_IMAGE_PNG, 95, -1, NULL}, QIE_E_INVALID, "compression"},
                 {{QIE_IMAGE_UNKNOWN, 95, 6, NULL}, QIE_E_UNSUPPORTED, "output_format"},
                 {{QIE_IMAGE_PNG, 95, 6, "\xff"}, QIE_E_INVALID, "parameters"},
                 {{QIE_IMAGE_JPEG, 95, 6, big}, QIE_E_TOO_LARGE, "parameters"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qie_error e = {0};
        uint8_t *bytes;
        size_t n;
        ASSERT_INT(qie_image_encode(image, &cases[i].o, &bytes, &n, &e), cases[i].st);
        ASSERT_STR(e.param, cases[i].param);
        ASSERT(bytes == NULL && n == 0);
    }
    qie_image_destroy(image);
}

QTEST(test_encode_sides_beyond_the_format_are_refused) {
    for (int i = 1; i < 3; i++) {
        qie_error e = {0};
        int max = ALL[i] == QIE_IMAGE_WEBP ? 16383 : 65500;
        qie_image *image;
        qie_image_encode_options o = qie_image_encode_options_default();
        o.format = ALL[i];
        uint8_t *bytes;
        size_t n;
        ASSERT_OK(qie_image_create(max + 1, 16, &image, &e));
        ASSERT_INT(qie_image_encode(image, &o, &bytes, &n, &e), QIE_E_TOO_LARGE);
        ASSERT_CONTAINS(e.message, "choose png");
        qie_image_destroy(image);
        ASSERT_OK(qie_image_create(16, max, &image, &e));
        ASSERT_OK(qie_image_encode(image, &o, &bytes, &n, &e));
        free(bytes);
        qie_image_destroy(image);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
