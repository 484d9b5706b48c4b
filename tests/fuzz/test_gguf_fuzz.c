/* Every field of a GGUF header, and of a safetensors one, set to hostile values and cut anywhere: a
 * clear error or views inside the file. Small by default; QIE_TEST_LONG=1 makes 10^7 executions of
 * it, QIE_FUZZ_SECONDS goes on for a time. A failure prints the seed. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "gguf_make.h"
#include "qtest.h"
#include "weights/weights.h"

static uint64_t next(uint64_t *s) { /* splitmix64 */
    uint64_t z = (*s += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* The bytes in a block of exactly their size, so that the sanitizer sees one too many; 0 or 1: was
 * it accepted. */
static int run(const unsigned char *bytes, size_t n) {
    unsigned char *copy = malloc(n ? n : 1);
    memcpy(copy, bytes, n);
    qie_weights *w = NULL;
    qie_error err;
    int ok = qie_weights_open_bytes(copy, n, "fuzz", &w, &err) == QIE_OK;
    volatile unsigned sum = 0;
    for (size_t i = 0; ok && i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        const unsigned char *p = t->data;
        if (t->n_bytes && (p < copy || t->n_bytes > (size_t)(copy + n - p)))
            abort();
        for (size_t k = 0; k < t->n_bytes; k++)
            sum += p[k];
    }
    if (ok)
        qie_weights_close(w);
    free(copy);
    return ok;
}

static const uint64_t VALUES[] = {0,
                                  1,
                                  2,
                                  7,
                                  8,
                                  31,
                                  33,
                                  64,
                                  127,
                                  128,
                                  255,
                                  256,
                                  65535,
                                  65536,
                                  0x7fffffff,
                                  0x80000000,
                                  0xffffffff,
                                  1ull << 32,
                                  1ull << 40,
                                  1ull << 62,
                                  1ull << 63,
                                  UINT64_MAX,
                                  UINT64_MAX - 7};
enum { N_VALUES = sizeof VALUES / sizeof *VALUES };

/* Every place x width x value, and every length. */
QTEST(test_gguf_every_field_hostile_is_survived) {
    static gguf_make g, h;
    gguf_example(&g, 3);
    ASSERT_INT(run(g.data, g.n), 1);
    int accepted = 0;
    for (size_t at = 0; at + 8 <= g.n; at++)
        for (size_t v = 0; v < N_VALUES; v++)
            for (size_t width = 1; width <= 8; width *= 2) {
                h = g;
                memcpy(h.data + at, &VALUES[v], width);
                accepted += run(h.data, h.n);
            }
    ASSERT(accepted > 0);
    for (size_t n = 0; n < g.n; n++)
        ASSERT_INT(run(g.data, n), 0);
}

static bool more(uint64_t round, uint64_t rounds, double start) {
    const char *s = getenv("QIE_FUZZ_SECONDS");
    return round < rounds || (s && qie_now_s() - start < atof(s));
}

QTEST(test_gguf_random_damage_is_survived) {
    static gguf_make g, h;
    uint64_t rounds = getenv("QIE_TEST_LONG") ? 10000000 : 40000, seed;
    double start = qie_now_s();
    gguf_example(&g, 3);
    for (uint64_t r = 0; more(r, rounds, start); r++) {
        seed = r * 7919 + 1;
        h.n = g.n;
        memcpy(h.data, g.data, g.n);
        for (uint64_t k = 1 + next(&seed) % 4; k > 0; k--) {
            size_t at = next(&seed) % h.n, width = 1u << next(&seed) % 4;
            uint64_t v = next(&seed) % 3 ? VALUES[next(&seed) % N_VALUES] : next(&seed);
            if (at + width <= h.n && next(&seed) % 8)
                memcpy(h.data + at, &v, width);
            else if (next(&seed) % 2)
                h.n = at + 1;
            else
                memmove(h.data + at, h.data + at + 1, h.n - at - 1);
        }
        run(h.data, h.n);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
