/* Random damage to the tokenizer's files and random bytes as text: a clear error or ids of the
 * vocabulary. The same on every machine; QIE_FUZZ_SECONDS makes it longer, a failure prints the
 * seed. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/fs.h"
#include "base/log.h"
#include "base/strbuf.h"
#include "qtest.h"
#include "text/prompt.h"

#define MODEL QIE_SOURCE_DIR "/tests/golden/model/processor/"

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

static void quiet(void *arg, qie_log_level level, const char *component, const char *text) {
    (void)arg;
    (void)level;
    (void)component;
    (void)text;
}

typedef struct blob {
    char *name;
    unsigned char *data;
    size_t n;
} blob;

/* A small tokenizer.json: byte symbols, two merges of each style, one added token. */
static blob small_json(void) {
    qie_strbuf b;
    unsigned shift = 256;
    qie_strbuf_init(&b, 1u << 20);
    qie_strbuf_puts(&b, "{\"added_tokens\":[{\"id\":300,\"content\":\"<|x|>\",\"lstrip\":false}],"
                        "\"model\":{\"type\":\"BPE\",\"ignore_merges\":false,\"merges\":[\"a "
                        "b\",[\"ab\",\"\\u0063\"]],"
                        "\"vocab\":{");
    for (unsigned i = 0; i < 256; i++) {
        bool printable = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        qie_strbuf_printf(&b, "\"\\u%04x\":%u,", printable ? i : shift++, i);
    }
    qie_strbuf_puts(&b, "\"ab\":256,\"abc\":257}}}");
    blob out = {NULL, NULL, b.len};
    out.data = (unsigned char *)qie_strbuf_take(&b);
    return out;
}

/* A damaged copy of exactly its size. */
static unsigned char *damaged(const blob *src, size_t *n, uint64_t *seed) {
    static const char *const WORDS[] = {"-1",   "99999999999", "1e9",     "[",       "}", "\"",
                                        "null", "0",           "\\u0000", "\\ud800", " ", ",",
                                        "\n",   "#version",    "\xff",    "\\"};
    unsigned char *b = malloc(src->n + 256);
    memcpy(b, src->data, src->n);
    *n = src->n;
    for (uint64_t k = 1 + next(seed) % 3; k > 0 && *n > 1; k--) {
        size_t at = next(seed) % *n, len = next(seed) % 40;
        len = len < *n - at ? len : *n - at;
        switch (next(seed) % 5) {
        case 0: b[at] = (unsigned char)next(seed); break;
        case 1: b[at] ^= (unsigned char)(1u << next(seed) % 8); break;
        case 2:
            memmove(b + at, b + at + len, *n - at - len);
            *n -= len;
            break;
        case 3: *n = at + 1; break; /* cut */
        default: {
            const char *w = WORDS[next(seed) % (sizeof WORDS / sizeof *WORDS)];
            memmove(b + at + strlen(w), b + at, *n - at);
            memcpy(b + at, w, strlen(w));
            *n += strlen(w);
        }
        }
    }
    unsigned char *exact = malloc(*n);
    memcpy(exact, b, *n);
    free(b);
    return exact;
}

static bool ids_in_range(const qie_tokenizer *t, const char *text, size_t n) {
    qie_error e = {0};
    int32_t *ids;
    size_t n_ids;
    bool ok = true;
    if (qie_tokenizer_encode(t, text, n, true, &ids, &n_ids, &e) != QIE_OK)
        return false;
    for (size_t i = 0; i < n_ids; i++)
        ok &= ids[i] >= 0 && ids[i] < qie_tokenizer_vocab_size(t);
    free(ids);
    return ok;
}

QTEST(test_fuzz_tokenizer_files_never_crash) {
    static const char *const NAMES[] = {"vocab.json", "merges.txt", "added_tokens.json",
                                        "tokenizer_config.json"};
    static const char TEXT[] =
        "Describe the key features <|im_end|> abcabc \xc3\xa9\xe4\xbd\xa0 12\r\n";
    blob files[5];
    double start = qie_now_s();
    size_t n_ok = 0;
    qie_log_set_sink(quiet, NULL);
    for (int i = 0; i < 4; i++) {
        char path[512], name[64];
        qie_error e = {0};
        snprintf(path, sizeof path, "%s%s", MODEL, NAMES[i]);
        snprintf(name, sizeof name, "p/%s", NAMES[i]);
        ASSERT_OK(qie_file_read(path, 1u << 24, &files[i].data, &files[i].n, &e));
        files[i].name = strdup(name);
    }
    files[4] = small_json();
    files[4].name = strdup("p/tokenizer.json");
    for (uint64_t round = 0; more(round, 3000, start); round++) {
        uint64_t seed = round;
        size_t n, which = next(&seed) % 5;
        unsigned char *bad = damaged(&files[which], &n, &seed);
        qie_builtin_file rows[6] = {{0}};
        for (size_t i = 0, k = 0; i < 4 && which < 4; i++, k++) {
            rows[k] = (qie_builtin_file){files[i].name, files[i].data, files[i].data + files[i].n};
            if (i == which)
                rows[k] = (qie_builtin_file){files[i].name, bad, bad + n};
        }
        if (which == 4)
            rows[0] = (qie_builtin_file){files[4].name, bad, bad + n};
        qie_error e = {0};
        qie_files *f;
        qie_tokenizer *t;
        ASSERT_OK(qie_files_open_builtin(rows, "m", &f, &e));
        qie_status st = qie_tokenizer_open(f, "p", &t, &e);
        if (st != QIE_OK && (st != QIE_E_CORRUPT || t || !strstr(e.message, "'p/")))
            QTEST_FAIL("seed %llu: %s %s", (unsigned long long)round, qie_status_name(st),
                       e.message);
        if (t && !ids_in_range(t, TEXT, sizeof TEXT - 1))
            QTEST_FAIL("seed %llu: ids out of range", (unsigned long long)round);
        n_ok += t != NULL;
        qie_tokenizer_close(t);
        qie_files_close(f);
        free(bad);
    }
    for (int i = 0; i < 5; i++) {
        free(files[i].data);
        free(files[i].name);
    }
    qie_log_set_sink(NULL, NULL);
    printf("  %zu accepted\n", n_ok);
    ASSERT(n_ok > 0);
}

QTEST(test_fuzz_texts_give_ids_or_invalid) {
    static const char *const WORDS[] = {"<|im_end|>",       "<|image_pad|>", "<|im_", "\xcc\x81",
                                        "\xea\xb0\x80",     "\r\n",          "  ",    "'s",
                                        "\xf0\x9f\x98\x80", "\xe4\xbd\xa0",  "the ",  "\xc3",
                                        "\xed\xa0\x80"};
    qie_error e = {0};
    qie_files *f;
    qie_tokenizer *t;
    double start = qie_now_s();
    size_t n_valid = 0;
    ASSERT_OK(qie_files_open_dir(QIE_SOURCE_DIR "/tests/golden/model", &f, &e));
    ASSERT_OK(qie_tokenizer_open(f, "processor", &t, &e));
    qie_files_close(f);
    for (uint64_t round = 0; more(round, 30000, start); round++) {
        uint64_t seed = ~round, kind = next(&seed) % 3;
        char text[512];
        size_t n = 0, want = next(&seed) % 64;
        while (n < want) {
            if (kind == 0 || next(&seed) % 4 == 0) {
                const char *w =
                    WORDS[next(&seed) % (sizeof WORDS / sizeof *WORDS - (kind == 1 ? 0 : 2))];
                memcpy(text + n, w, strlen(w));
                n += strlen(w);
            } else
                text[n++] = (char)(kind == 1 ? next(&seed) : next(&seed) % 128);
        }
        char *exact = malloc(n ? n : 1);
        if (n)
            memcpy(exact, text, n);
        bool valid = qie_utf8_valid(exact, n);
        int n_tokens = 3;
        qie_prompt p;
        if (valid != ids_in_range(t, exact, n))
            QTEST_FAIL("seed %llu: valid %d", (unsigned long long)round, valid);
        bool placeholder = valid && memmem(exact, n, "<|image_pad|>", 13);
        qie_status st = qie_prompt_build(t, exact, n, &n_tokens, 1, &p, &e);
        if (st != (valid && !placeholder ? QIE_OK : QIE_E_INVALID))
            QTEST_FAIL("seed %llu: %s %s", (unsigned long long)round, qie_status_name(st),
                       e.message);
        qie_prompt_release(&p);
        n_valid += valid;
        free(exact);
    }
    qie_tokenizer_close(t);
    printf("  %zu valid\n", n_valid);
    ASSERT(n_valid > 1000);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
