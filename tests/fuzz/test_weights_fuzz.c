/* Every field of a safetensors header set to hostile values, random damage to it and to an index: a
 * clear error or views inside the file. The same on every machine; QIE_TEST_LONG=1 makes 10^7
 * executions of it, QIE_FUZZ_SECONDS goes on for a time, a failure prints the seed. */
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

typedef struct tally {
    size_t rounds, accepted;
    unsigned sum;
} tally;

/* One file of this header and 32 bytes of data, in a block of exactly its size; `length` in place
 * of the header's own if it is not NULL. False: it was refused in a wrong way, which is printed. */
static bool run(tally *t, const unsigned char *text, size_t n, const uint64_t *length) {
    unsigned char *f = malloc(8 + n + 32);
    memcpy(f + 8, text, n);
    size_t size = put_file(f, n, 32);
    if (length)
        memcpy(f, length, 8);
    qie_error e = {0};
    qie_weights *w;
    qie_status st = qie_weights_open_bytes(f, size, "fuzz", &w, &e);
    bool ok = st == QIE_OK ? w != NULL : st == QIE_E_CORRUPT && !w && strstr(e.message, "'fuzz'");
    if (!ok)
        printf("  %s %s for %.*s\n", qie_status_name(st), e.message, (int)n, (const char *)text);
    t->rounds++;
    if (w) {
        t->accepted++;
        t->sum += sum_views(w);
    }
    qie_weights_close(w);
    free(f);
    return ok;
}

/* A header whose fields stand between backquotes, and what they are set to. */
static const char FIELDS[] =
    "{`\"__metadata__\"`:{`\"format\"`:`\"pt\"`},"
    "`\"model.a\"`:{`\"dtype\"`:`\"F32\"`,`\"shape\"`:[`2`,`2`],`\"data_offsets\"`:[`0`,`16`]},"
    "`\"visual.b\"`:{`\"dtype\"`:`\"BF16\"`,`\"shape\"`:`[4]`,`\"data_offsets\"`:`[16,24]`},"
    "`\"x.weight\"`:`{\"dtype\":\"I8\",\"shape\":[2,2],\"data_offsets\":[24,28]}`,"
    "`\"x.weight_scale\"`:{\"dtype\":`\"F32\"`,\"shape\":[`1`],\"data_offsets\":[`28`,`32`]}}";
static const char *const HOSTILE[] = {"",
                                      "-1",
                                      "-0",
                                      "0",
                                      "1",
                                      "3",
                                      "24",
                                      "31",
                                      "33",
                                      "1e9",
                                      "1.5",
                                      "4294967296",
                                      "9223372036854775807",
                                      "9223372036854775808",
                                      "18446744073709551615",
                                      "18446744073709551616",
                                      "null",
                                      "true",
                                      "NaN",
                                      "\"\"",
                                      "\"F32\"",
                                      "\"F64\"",
                                      "\"I8\"",
                                      "\"F8_E4M3\"",
                                      "\"Q8_0\"",
                                      "\"dtype\"",
                                      "\"shape\"",
                                      "\"data_offsets\"",
                                      "\"model.a\"",
                                      "\"x.weight\"",
                                      "\"__metadata__\"",
                                      "\"\\u0000\"",
                                      "\"\\ud800\"",
                                      "\"\xff\"",
                                      "[]",
                                      "[0]",
                                      "[0,32]",
                                      "[1,2,3,4,5,6,7,8,9]",
                                      "[[[[[[[[[[]]]]]]]]]]",
                                      "{}",
                                      "{\"a\":1}",
                                      ",",
                                      "]",
                                      "}",
                                      "2,2"};
enum { N_HOSTILE = sizeof HOSTILE / sizeof *HOSTILE };

static size_t n_fields(void) {
    size_t n = 0;
    for (const char *p = FIELDS; *p; p++)
        n += *p == '`';
    return n / 2;
}

/* The header with field at[i] set to HOSTILE[value[i]]; its length. */
static size_t put_fields(unsigned char *text, const size_t *at, const size_t *value, size_t count) {
    size_t n = 0, field = 0;
    bool inside = false, replaced = false;
    for (const char *p = FIELDS; *p; p++) {
        if (*p != '`') {
            if (!inside || !replaced)
                text[n++] = (unsigned char)*p;
            continue;
        }
        inside = !inside;
        field += !inside;
        replaced = false;
        for (size_t i = 0; inside && !replaced && i < count; i++)
            if (at[i] == field) {
                memcpy(text + n, HOSTILE[value[i]], strlen(HOSTILE[value[i]]));
                n += strlen(HOSTILE[value[i]]);
                replaced = true;
            }
    }
    return n;
}

QTEST(test_fuzz_every_field_of_a_header_hostile_is_survived) {
    tally t = {0};
    unsigned char text[1024];
    size_t n = put_fields(text, NULL, NULL, 0);
    ASSERT(run(&t, text, n, NULL));
    ASSERT_INT(t.accepted, 1);
    for (size_t at = 0; at < n_fields(); at++)
        for (size_t v = 0; v < N_HOSTILE; v++) {
            n = put_fields(text, &at, &v, 1);
            ASSERT(run(&t, text, n, NULL));
        }
    n = put_fields(text, NULL, NULL, 0);
    for (uint64_t bit = 0; bit < 64; bit++)
        for (uint64_t less = 0; less < 3; less++)
            ASSERT(run(&t, text, n, &(uint64_t){(UINT64_C(1) << bit) - less}));
    for (uint64_t length = 0; length < n + 40; length++)
        ASSERT(run(&t, text, n, &length));
    printf("  %zu executions, %zu accepted, sum %u\n", t.rounds, t.accepted, t.sum);
    ASSERT(t.accepted > 1 && t.accepted < t.rounds / 2);
}

/* Some fields hostile, stretches of text changed, or both. */
QTEST(test_fuzz_header_never_leaves_the_file) {
    double start = qie_now_s();
    tally t = {0};
    uint64_t rounds = getenv("QIE_TEST_LONG") ? 10000000 : 60000;
    for (uint64_t round = 0; more(round, rounds, start); round++) {
        unsigned char text[2048];
        uint64_t seed = round * 7919 + 1, length;
        size_t at[4], value[4], fields = next(&seed) % 5;
        for (size_t i = 0; i < fields; i++) {
            at[i] = next(&seed) % n_fields();
            value[i] = next(&seed) % N_HOSTILE;
        }
        size_t n = put_fields(text, at, value, fields);
        if (!fields || next(&seed) % 4 == 0)
            damage(text, &n, &seed);
        length = n ^ UINT64_C(1) << next(&seed) % 64;
        if (!run(&t, text, n, next(&seed) % 16 ? NULL : &length))
            QTEST_FAIL("round %llu", (unsigned long long)round);
    }
    printf("  %zu executions, %zu accepted, sum %u\n", t.rounds, t.accepted, t.sum);
    ASSERT(t.accepted > 0);
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
