/* Every byte of small pictures cut or changed: a clean error or a picture, never a crash or half a
 * picture. Most useful under ASan and UBSan. */
#include "qtest.h"
#include "test_image_util.h"

static const char *const FILES[] = {"damage.png", "damage.jpg", "damage_progressive.jpg",
                                    "damage.webp", "damage_lossless.webp"};
#define N_FILES (sizeof FILES / sizeof FILES[0])

/* Decode and check what every outcome must have in common. True if it was a picture. */
static bool decode_safely(const uint8_t *bytes, size_t n, const char *what, size_t at) {
    qie_error e = {0};
    qie_image *image = (qie_image *)&e; /* must be overwritten */
    qie_image_limits l = qie_image_limits_default();
    l.max_pixels = 1000000; /* a flipped header must not make the loop slow */
    qie_status st = qie_image_decode(bytes, n, &l, &image, &e);
    bool fine = st == QIE_OK
                    ? image != NULL
                    : image == NULL && e.status == st && e.message[0] &&
                          !strcmp(e.param, "image") &&
                          (st == QIE_E_INVALID || st == QIE_E_UNSUPPORTED || st == QIE_E_TOO_LARGE);
    if (!fine) {
        printf("  %s at %zu: %s param '%s': %s\n", what, at, qie_status_name(st), e.param,
               e.message);
        qtest_failed = true;
    }
    qie_image_destroy(image);
    char *text;
    qie_image_read_parameters(bytes, n, &text, NULL);
    free(text);
    return st == QIE_OK;
}

QTEST(test_damage_cut_anywhere_is_refused) {
    for (size_t i = 0; i < N_FILES; i++) {
        size_t n;
        uint8_t *bytes = fixture(FILES[i], &n);
        ASSERT(decode_safely(bytes, n, FILES[i], n));
        for (size_t cut = 0; cut < n; cut++) {
            uint8_t *part = malloc(cut ? cut : 1);
            memcpy(part, bytes, cut);
            if (decode_safely(part, cut, FILES[i], cut))
                QTEST_FAIL("%s cut to %zu of %zu bytes was accepted", FILES[i], cut, n);
            free(part);
        }
        free(bytes);
    }
}

QTEST(test_damage_flipped_anywhere_is_clean) {
    for (size_t i = 0; i < N_FILES; i++) {
        size_t n, n_accepted = 0;
        uint8_t *bytes = fixture(FILES[i], &n);
        for (size_t at = 0; at < n; at++)
            for (int k = 0; k < 10; k++) {
                uint8_t was = bytes[at];
                bytes[at] = (uint8_t)(k < 8 ? was ^ 1 << k : k == 8 ? 0 : 0xff);
                if (bytes[at] != was)
                    n_accepted += decode_safely(bytes, n, FILES[i], at);
                bytes[at] = was;
            }
        /* All bytes of a PNG stand under a checksum; the other formats have none. */
        if (strstr(FILES[i], ".png"))
            ASSERT_INT(n_accepted, 0);
        free(bytes);
    }
}

QTEST(test_damage_bytes_removed_or_doubled_is_clean) {
    for (size_t i = 0; i < N_FILES; i++) {
        size_t n;
        uint8_t *bytes = fixture(FILES[i], &n);
        for (size_t at = 0; at < n; at++) {
            uint8_t *other = malloc(n + 1);
            memcpy(other, bytes, at);
            memcpy(other + at, bytes + at + 1, n - at - 1);
            decode_safely(other, n - 1, FILES[i], at);
            memcpy(other, bytes, at + 1);
            memcpy(other + at + 1, bytes + at, n - at);
            decode_safely(other, n + 1, FILES[i], at);
            free(other);
        }
        free(bytes);
    }
}

QTEST(test_damage_bombs_in_texts_do_no_harm) {
    qie_error e = {0};
    qie_image *image;
    char *text;
    ASSERT_OK(qie_image_load(IMAGES "bomb_profile.png", NULL, &image, &e));
    qie_image_destroy(image);
    size_t n;
    uint8_t *bytes = fixture("bomb_parameters.png", &n);
    ASSERT_INT(qie_image_read_parameters(bytes, n, &text, &e), QIE_E_INVALID);
    ASSERT(text == NULL);
    free(bytes);
}

QTEST(test_damage_repeated_progressive_scan_is_refused) {
    qie_error e = {0};
    size_t n, sos = 2;
    uint8_t *bytes = fixture("damage_progressive.jpg", &n);
    for (size_t i = 2; i + 3 < n; i++) /* the last scan */
        if (bytes[i] == 0xff && bytes[i + 1] == 0xda)
            sos = i;
    size_t scan = n - 2 - sos, times = 500;
    uint8_t *many = malloc(n + times * scan);
    memcpy(many, bytes, n - 2);
    for (size_t k = 0; k < times; k++)
        memcpy(many + n - 2 + k * scan, bytes + sos, scan);
    memcpy(many + n - 2 + times * scan, "\xff\xd9", 2);
    qie_image *image;
    ASSERT_INT(qie_image_decode(many, n + times * scan, NULL, &image, &e), QIE_E_INVALID);
    free(many);
    free(bytes);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
