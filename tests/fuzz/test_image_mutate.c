/* Random damage to every fixture, the same on every machine, for a bounded time: QIE_FUZZ_SECONDS
 * (default 3). A failure names file and seed; run again with QIE_FUZZ_SEED to repeat it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <time.h>

#include "../unit/test_image_util.h"
#include "qtest.h"

static uint64_t next(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t below(uint64_t *state, size_t n) {
    return n ? (size_t)(next(state) % n) : 0;
}

/* A few changes; the result may be longer than the source by at most 64 bytes each. */
static uint8_t *mutate(const uint8_t *src, size_t n, uint64_t *state, size_t *out_n) {
    int n_changes = 1 + (int)below(state, 6);
    uint8_t *b = malloc(n + (size_t)n_changes * 64 + 1);
    memcpy(b, src, n);
    for (int k = 0; k < n_changes; k++) {
        size_t at = below(state, n), len = 1 + below(state, 64);
        switch (below(state, 7)) {
        case 0:
            if (n)
                b[at] ^= (uint8_t)(1u << below(state, 8));
            break;
        case 1:
            if (n)
                b[at] = (uint8_t)next(state);
            break;
        case 2: /* a length or size field */
            for (size_t i = 0; i < 4 && at + i < n; i++)
                b[at + i] = below(state, 2) ? 0xff : (uint8_t)next(state);
            break;
        case 3: n = at; break;
        case 4: /* insert */
            memmove(b + at + len, b + at, n - at);
            for (size_t i = 0; i < len; i++)
                b[at + i] = (uint8_t)next(state);
            n += len;
            break;
        case 5: /* remove */
            len = len < n - at ? len : n - at;
            memmove(b + at, b + at + len, n - at - len);
            n -= len;
            break;
        default: /* copy a piece elsewhere */
            for (size_t i = 0, from = below(state, n); i < len && at + i < n && from + i < n; i++)
                b[at + i] = b[from + i];
        }
    }
    /* A PNG with wrong checksums only tests the checksums: repair them most of the time. */
    if (n > 8 && b[1] == 'P' && below(state, 4))
        for (size_t pos = 8; n - pos >= 12;) {
            size_t len = (size_t)b[pos] << 24 | (size_t)b[pos + 1] << 16 | (size_t)b[pos + 2] << 8 |
                         b[pos + 3];
            if (len > n - pos - 12)
                break;
            put_be32(b + pos + 8 + len, png_crc(b + pos + 4, len + 4));
            pos += len + 12;
        }
    uint8_t *exact = malloc(n ? n : 1);
    memcpy(exact, b, n);
    free(b);
    *out_n = n;
    return exact;
}

static bool outcome_is_clean(const uint8_t *bytes, size_t n) {
    qie_error e = {0};
    qie_image *image;
    qie_image_limits l = qie_image_limits_default();
    l.max_pixels = 1000000;
    l.min_side_px = 1;
    qie_status st = qie_image_decode(bytes, n, &l, &image, &e);
    bool fine = st == QIE_OK
                    ? image != NULL
                    : !image && e.message[0] &&
                          (st == QIE_E_INVALID || st == QIE_E_UNSUPPORTED || st == QIE_E_TOO_LARGE);
    if (!fine)
        printf("  %s: %s\n", qie_status_name(st), e.message);
    qie_image_destroy(image);
    char *text;
    qie_image_read_parameters(bytes, n, &text, NULL);
    free(text);
    return fine;
}

QTEST(test_mutated_pictures_are_decoded_or_refused) {
    const char *seconds = getenv("QIE_FUZZ_SECONDS"), *seed_text = getenv("QIE_FUZZ_SEED");
    double limit = seconds ? atof(seconds) : 3;
    uint64_t seed = seed_text ? strtoull(seed_text, NULL, 10) : 0, n_runs = 0;
    struct dirent **names;
    int n_names = scandir(IMAGES, &names, NULL, alphasort);
    ASSERT(n_names > 50);
    clock_t begin = clock();
    while ((double)(clock() - begin) / CLOCKS_PER_SEC < limit)
        for (int i = 0; i < n_names; i++) {
            const char *name = names[i]->d_name;
            if (!strstr(name, ".png") && !strstr(name, ".jpg") && !strstr(name, ".webp"))
                continue;
            size_t n, m;
            uint8_t *bytes = fixture(name, &n);
            uint64_t state = seed;
            uint8_t *other = mutate(bytes, n, &state, &m);
            if (!outcome_is_clean(other, m))
                QTEST_FAIL("%s with QIE_FUZZ_SEED=%llu", name, (unsigned long long)seed);
            free(other);
            free(bytes);
            seed++;
            n_runs++;
        }
    for (int i = 0; i < n_names; i++)
        free(names[i]);
    free(names);
    printf("  %llu pictures\n", (unsigned long long)n_runs);
    ASSERT(n_runs > 0);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
