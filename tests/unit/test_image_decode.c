#include <time.h>

#include "image/exif.h"
#include "image/geometry.h"
#include "qtest.h"
#include "test_image_util.h"

QTEST(test_decode_every_kind_equals_pillow) {
    FILE *f = fopen(IMAGES "manifest.txt", "r");
    ASSERT(f != NULL);
    char name[64];
    int w, h, n_files = 0, n_wrong = 0;
    unsigned long long hash;
    while (fscanf(f, "%63s %d %d %llx", name, &w, &h, &hash) == 4) {
        qie_error e = {0};
        size_t n;
        uint8_t *bytes = fixture(name, &n);
        qie_image *image;
        qie_status st = qie_image_decode(bytes, n, NULL, &image, &e);
        if (st != QIE_OK || qie_image_width(image) != w || qie_image_height(image) != h ||
            image_hash(image) != hash) {
            printf("  %s: %s %s\n", name, st ? qie_status_name(st) : "differs", e.message);
            n_wrong++;
        }
        n_files++;
        qie_image_destroy(image);
        free(bytes);
    }
    fclose(f);
    ASSERT(n_files > 90);
    ASSERT_INT(n_wrong, 0);
}

QTEST(test_load_message_names_the_file) {
    qie_error e = {0};
    qie_image *image;
    ASSERT_INT(qie_image_load(IMAGES "manifest.txt", NULL, &image, &e), QIE_E_UNSUPPORTED);
    ASSERT_CONTAINS(e.message, "manifest.txt");
    ASSERT_INT(qie_image_load(IMAGES "none.png", NULL, &image, &e), QIE_E_NOT_FOUND);
    ASSERT_CONTAINS(e.message, "none.png");
    ASSERT(image == NULL);
    ASSERT_OK(qie_image_load(IMAGES "lossy.webp", NULL, &image, &e));
    qie_image_destroy(image);
}

QTEST(test_probe_tells_format_and_size_before_orientation) {
    static const struct {
        const char *name;
        qie_image_format format;
        int w, h;
    } CASES[] = {{"exif6.png", QIE_IMAGE_PNG, 24, 17},
                 {"exif6.jpg", QIE_IMAGE_JPEG, 24, 17},
                 {"exif6.webp", QIE_IMAGE_WEBP, 24, 17},
                 {"lossy.webp", QIE_IMAGE_WEBP, 33, 47},
                 {"lossless.webp", QIE_IMAGE_WEBP, 17, 19}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        qie_error e = {0};
        size_t n;
        uint8_t *bytes = fixture(CASES[i].name, &n);
        qie_image_format format;
        int w, h;
        ASSERT_OK(qie_image_probe(bytes, n, NULL, &format, &w, &h, &e));
        ASSERT_INT(format, CASES[i].format);
        ASSERT_INT(w, CASES[i].w);
        ASSERT_INT(h, CASES[i].h);
        free(bytes);
    }
}

QTEST(test_format_from_path_goes_by_the_extension) {
    ASSERT_INT(qie_image_format_from_path("a/b.PNG"), QIE_IMAGE_PNG);
    ASSERT_INT(qie_image_format_from_path("b.jpg"), QIE_IMAGE_JPEG);
    ASSERT_INT(qie_image_format_from_path("b.x.Jpeg"), QIE_IMAGE_JPEG);
    ASSERT_INT(qie_image_format_from_path("b.webp"), QIE_IMAGE_WEBP);
    ASSERT_INT(qie_image_format_from_path("dir.png/b"), QIE_IMAGE_UNKNOWN);
    ASSERT_INT(qie_image_format_from_path(""), QIE_IMAGE_UNKNOWN);
    ASSERT_STR(qie_image_format_name(QIE_IMAGE_WEBP), "webp");
    ASSERT_STR(qie_image_format_name(QIE_IMAGE_UNKNOWN), "unknown");
}

/* A header of the named file that announces w x h. */
static uint8_t *lying(const char *name, size_t *n, uint32_t w, uint32_t h) {
    uint8_t *b = fixture(name, n);
    if (strstr(name, ".png"))
        png_lie(b, w, h);
    else if (strstr(name, ".jpg")) {
        size_t i = 2;
        while (b[i + 1] != 0xc0 && b[i + 1] != 0xc2)
            i += 2u + (size_t)(b[i + 2] << 8 | b[i + 3]);
        uint8_t size[4] = {(uint8_t)(h >> 8), (uint8_t)h, (uint8_t)(w >> 8), (uint8_t)w};
        memcpy(b + i + 5, size, 4);
    } else { /* VP8X */
        for (int k = 0; k < 3; k++) {
            b[24 + k] = (uint8_t)((w - 1) >> (8 * k));
            b[27 + k] = (uint8_t)((h - 1) >> (8 * k));
        }
    }
    return b;
}

static const char *const FORMATS[] = {"damage.png", "damage.jpg", "damage.webp"};

QTEST(test_header_of_one_pixel_is_refused_and_names_the_smallest_side) {
    for (int i = 0; i < 3; i++) {
        qie_error e = {0};
        size_t n;
        uint8_t *b = lying(FORMATS[i], &n, 1, 1);
        qie_image *image;
        ASSERT_INT(qie_image_decode(b, n, NULL, &image, &e), QIE_E_INVALID);
        ASSERT_CONTAINS(e.message, "1x1");
        ASSERT_CONTAINS(e.message, "at least 16");
        ASSERT_STR(e.param, "image");
        free(b);
    }
}

QTEST(test_header_of_a_huge_picture_is_refused_at_once) {
    static const uint32_t SIDES[][2] = {{30000, 30000}, {30001, 16}, {16, 30001}, {7100, 7100}};
    clock_t begin = clock();
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 4; k++) {
            qie_error e = {0};
            size_t n;
            uint8_t *b = lying(FORMATS[i], &n, SIDES[k][0], SIDES[k][1]);
            qie_image *image;
            ASSERT_INT(qie_image_decode(b, n, NULL, &image, &e), QIE_E_TOO_LARGE);
            ASSERT(image == NULL);
            free(b);
        }
    static const uint32_t ABSURD[] = {0x7fffffff, 0x80000000u, 0xffffffffu};
    for (int k = 0; k < 3; k++) {
        qie_error e = {0};
        size_t n;
        uint8_t *b = lying("damage.png", &n, ABSURD[k], ABSURD[k]);
        qie_image *image;
        ASSERT_INT(qie_image_decode(b, n, NULL, &image, &e), QIE_E_TOO_LARGE);
        free(b);
    }
    ASSERT_LE((double)(clock() - begin) / CLOCKS_PER_SEC, 0.5);
}

QTEST(test_header_of_zero_or_too_many_pixels_for_its_data_is_refused) {
    static const uint32_t SIDES[][2] = {{0, 0},   {0, 16},  {16, 0},     {640, 480},
                                        {16, 18}, {17, 17}, {7000, 7000}};
    for (int i = 0; i < 3; i++)
        for (size_t k = i == 2 ? 3 : 0; k < sizeof SIDES / sizeof SIDES[0]; k++) {
            /* The same blocks: 17x17 and 16x17 are not told apart by a JPEG's data, nor 17 and 18
             * rows. */
            if (i == 1 && (k == 4))
                continue;
            qie_error e = {0};
            size_t n;
            uint8_t *b = lying(FORMATS[i], &n, SIDES[k][0], SIDES[k][1]);
            qie_image *image;
            qie_status st = qie_image_decode(b, n, NULL, &image, &e);
            if (st != QIE_E_INVALID)
                printf("  %s as %ux%u: %s %s\n", FORMATS[i], SIDES[k][0], SIDES[k][1],
                       qie_status_name(st), e.message);
            ASSERT_INT(st, QIE_E_INVALID);
            ASSERT_STR(e.param, "image");
            free(b);
        }
}

QTEST(test_limits_of_the_caller_hold) {
    qie_error e = {0};
    size_t n;
    uint8_t *b = fixture("lossy.webp", &n); /* 33x47 */
    qie_image *image;
    qie_image_limits l = qie_image_limits_default();
    l.max_bytes = n - 1;
    ASSERT_INT(qie_image_decode(b, n, &l, &image, &e), QIE_E_TOO_LARGE);
    l = qie_image_limits_default();
    l.max_pixels = 33 * 47 - 1;
    ASSERT_INT(qie_image_decode(b, n, &l, &image, &e), QIE_E_TOO_LARGE);
    l.max_pixels++;
    l.max_side_px = 47;
    l.min_side_px = 33;
    ASSERT_OK(qie_image_decode(b, n, &l, &image, &e));
    qie_image_destroy(image);
    l.min_side_px = 34;
    ASSERT_INT(qie_image_decode(b, n, &l, &image, &e), QIE_E_INVALID);
    free(b);
}

QTEST(test_other_formats_are_named) {
    static const struct {
        const char *bytes;
        size_t n;
        qie_status st;
        const char *text;
    } CASES[] = {{"", 0, QIE_E_INVALID, "empty"},
                 {"GIF89a..........", 16, QIE_E_UNSUPPORTED, "GIF"},
                 {"BM..............", 16, QIE_E_UNSUPPORTED, "BMP"},
                 {"II*\0............", 16, QIE_E_UNSUPPORTED, "TIFF"},
                 {"\0\0\0\x1c"
                  "ftypheic....",
                  16, QIE_E_UNSUPPORTED, "HEIC"},
                 {"hello", 5, QIE_E_UNSUPPORTED, "not a PNG, JPEG or WebP"},
                 {"\x89PNG", 4, QIE_E_INVALID, "cut off"},
                 {"\xff\xd8", 2, QIE_E_INVALID, "cut off"},
                 {"RIFF....", 8, QIE_E_INVALID, "cut off"}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        qie_error e = {0};
        qie_image *image;
        ASSERT_INT(qie_image_decode(CASES[i].bytes, CASES[i].n, NULL, &image, &e), CASES[i].st);
        ASSERT_CONTAINS(e.message, CASES[i].text);
    }
}

QTEST(test_orientation_turns_as_the_table_of_exif_says) {
    /* Where the picture's upper left and upper right pixels go: x, y of the result, 1 = last. */
    static const int GOES[9][4] = {{0},          {0, 0, 1, 0}, {1, 0, 0, 0},
                                   {1, 1, 0, 1}, {0, 1, 1, 1}, {0, 0, 0, 1},
                                   {1, 0, 1, 1}, {1, 1, 1, 0}, {0, 1, 0, 0}};
    for (int o = 1; o <= 8; o++) {
        qie_error e = {0};
        qie_image *image = lcg_image(70, 3, 9);
        uint8_t left[3], right[3];
        memcpy(left, qie_image_pixels(image), 3);
        memcpy(right, qie_image_pixels(image) + 69 * 3, 3);
        ASSERT_OK(qie_image_orient(&image, o, &e));
        int w = qie_image_width(image), h = qie_image_height(image);
        ASSERT_INT(w, o >= 5 ? 3 : 70);
        const uint8_t *p = qie_image_pixels(image);
        const int *g = GOES[o];
        ASSERT(!memcmp(p + (g[1] * (h - 1) * w + g[0] * (w - 1)) * 3, left, 3));
        ASSERT(!memcmp(p + (g[3] * (h - 1) * w + g[2] * (w - 1)) * 3, right, 3));
        qie_image_destroy(image);
    }
}

QTEST(test_exif_damaged_blocks_say_nothing) {
    uint8_t block[32] = "II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0";
    ASSERT_INT(qie_exif_orientation(block, 26), 6);
    for (size_t n = 0; n < 22; n++) {
        uint8_t *exact = malloc(n ? n : 1);
        memcpy(exact, block, n);
        ASSERT_INT(qie_exif_orientation(exact, n), 0);
        free(exact);
    }
    memset(block + 4, 0xff, 4);
    ASSERT_INT(qie_exif_orientation(block, 26), 0);
    ASSERT_INT(qie_xmp_orientation((const uint8_t *)"tiff:Orientation=\"", 18), 0);
    ASSERT_INT(qie_xmp_orientation((const uint8_t *)"tiff:Orientation tiff:Orientation>3", 35), 3);
}

QTEST(test_create_impossible_sizes_are_refused) {
    qie_error e = {0};
    qie_image *image;
    ASSERT_INT(qie_image_create(0, 5, &image, &e), QIE_E_INVALID);
    ASSERT_INT(qie_image_create(5, -1, &image, &e), QIE_E_INVALID);
    ASSERT(image == NULL);
    qie_image_destroy(NULL);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
