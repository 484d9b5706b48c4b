/* Random damage to a safetensors header and to an index: a clear error or views inside the file.
 * The same on every machine; QIE_FUZZ_SECONDS makes it longer, a failure prints the seed. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/fs.h"
#include "qtest.h"
#include "weights/weights.h"

static uint64_t next(uint64_t *s) { /* splitmix64 */
    uint64_t z = (*s += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static bool more(uint64_t round, uint64_t rounds, double start) {
    const char *s = getenv("QIE_FUZZ_SECONDS");
    return round < rounds || (s && qie_now_s() - start < atof(s));
}

/* Overwrite, delete or repeat a few stretches of text; *n changes by at most 64 a time. */
static void damage(unsigned char *b, size_t *n, uint64_t *seed) {
    static const char *const WORDS[] = {"-1",
                                        "9223372036854775807",
                                        "1e9",
                                        "[",
                                        "}",
                                        "\"",
                                        "null",
                                        "0",
                                        "\\u0000",
                                        "F64",
                                        "\"shape\":",
                                        ",",
                                        "..",
                                        "/",
                                        "18446744073709551616"};
    for (uint64_t k = 1 + next(seed) % 3; k > 0 && *n > 8; k--) {
        size_t at = next(seed) % *n, len = next(seed) % 24;
        len = len < *n - at ? len : *n - at;
        switch (next(seed) % 5) {
        case 0: b[at] = (unsigned char)next(seed); break;
        case 1: b[at] ^= (unsigned char)(1u << next(seed) % 8); break;
        case 2: /* delete */
            memmove(b + at, b + at + len, *n - at - len);
            *n -= len;
            break;
        case 3: /* repeat */
            memmove(b + at + len, b + at, *n - at);
            *n += len;
            break;
        default: {
            const char *w = WORDS[next(seed) % (sizeof WORDS / sizeof *WORDS)];
            memmove(b + at + strlen(w), b + at, *n - at);
            memcpy(b + at, w, strlen(w));
            *n += strlen(w);
        }
        }
    }
}

static const char HEADER[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"model.a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
    "\"visual.b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[16,24]},"
    "\"c\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[24,32]}}";

static size_t put_file(unsigned char *f, size_t n_header, size_t n_data) {
    for (size_t i = 0; i < 8; i++)
        f[i] = (unsigned char)((uint64_t)n_header >> (8 * i));
    memset(f + 8 + n_header, 7, n_data);
    return 8 + n_header + n_data;
}

/* Touch every byte that a view promises. */
static unsigned sum_views(const qie_weights *w) {
    unsigned sum = 0;
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        for (size_t k = 0; k < t->n_bytes; k++)
            sum += ((const unsigned char *)t->data)[k];
        sum += qie_weights_find(w, t->name) == t;
    }
    return sum;
}

QTEST(test_fuzz_header_never_leaves_the_file) {
    double start = qie_now_s();
    size_t n_ok = 0;
    unsigned sum = 0;
    for (uint64_t round = 0; more(round, 60000, start); round++) {
        unsigned char text[1024];
        uint64_t seed = round;
        size_t n = sizeof HEADER - 1;
        memcpy(text, HEADER, n);
        damage(text, &n, &seed);
        unsigned char *f = malloc(8 + n + 32);
        memcpy(f + 8, text, n);
        size_t size = put_file(f, n, 32);
        if (next(&seed) % 8 == 0)
            f[next(&seed) % 8] ^= (unsigned char)(1u << next(&seed) % 8);
        qie_error e = {0};
        qie_weights *w;
        qie_status st = qie_weights_open_bytes(f, size, "fuzz", &w, &e);
        if (st != QIE_OK && (st != QIE_E_CORRUPT || w || !strstr(e.message, "'fuzz'")))
            QTEST_FAIL("seed %llu: %s %s", (unsigned long long)round, qie_status_name(st),
                       e.message);
        if (w) {
            n_ok++;
            sum += sum_views(w);
        }
        qie_weights_close(w);
        free(f);
    }
    printf("  %zu accepted, sum %u\n", n_ok, sum);
    ASSERT(n_ok > 0);
}

static const char INDEX[] =
    "{\"metadata\":{\"total_size\":32},\"weight_map\":{\"c\":\"one.safetensors\",\"model.a\":"
    "\"one.safetensors\",\"visual.b\":\"two.safetensors\"}}";

QTEST(test_fuzz_index_never_leaves_the_folder) {
    double start = qie_now_s();
    unsigned char one[8 + sizeof HEADER + 32];
    memcpy(one + 8, HEADER, sizeof HEADER - 1);
    size_t size = put_file(one, sizeof HEADER - 1, 32), n_ok = 0;
    for (uint64_t round = 0; more(round, 30000, start); round++) {
        unsigned char text[1024];
        uint64_t seed = round;
        size_t n = sizeof INDEX - 1;
        memcpy(text, INDEX, n);
        damage(text, &n, &seed);
        unsigned char *exact = malloc(n);
        memcpy(exact, text, n);
        qie_builtin_file rows[] = {{"x/model.safetensors.index.json", exact, exact + n},
                                   {"x/one.safetensors", one, one + size},
                                   {"x/two.safetensors", one, one + size},
                                   {0}};
        qie_error e = {0};
        qie_files *f;
        qie_weights *w;
        ASSERT_OK(qie_files_open_builtin(rows, "m", &f, &e));
        qie_status st = qie_weights_open(f, "x", &w, &e);
        if (st != QIE_OK && ((st != QIE_E_CORRUPT && st != QIE_E_NOT_FOUND) || w || !e.message[0]))
            QTEST_FAIL("seed %llu: %s %s", (unsigned long long)round, qie_status_name(st),
                       e.message);
        n_ok += w != NULL;
        if (w)
            ASSERT(sum_views(w) > 0);
        qie_weights_close(w);
        qie_files_close(f);
        free(exact);
    }
    printf("  %zu accepted\n", n_ok);
    ASSERT(n_ok > 0);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
