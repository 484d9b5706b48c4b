/* Token ids equal those of the `tokenizers` library, for both styles of files, and damaged input is
 * refused. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/json.h"
#include "base/strbuf.h"
#include "text_fixture.h"

static qie_files *released_files;
static qie_tokenizer *released;

static void close_released(void) {
    qie_tokenizer_close(released);
    qie_files_close(released_files);
}

/* Loaded once; NULL if the golden files cannot be unpacked. */
static const qie_tokenizer *get_released(void) {
    qie_error e = {0};
    if (!released) {
        double t = qie_now_s();
        if (fixture_released(&released_files, &released, &e) != QIE_OK)
            printf("  %s\n", e.message);
        else {
            printf("  unpacked and loaded in %.0f ms\n", (qie_now_s() - t) * 1e3);
            atexit(close_released);
        }
    }
    return released;
}

static bool same_ids(const qie_tokenizer *t, const char *text, size_t n, const int32_t *ids,
                     size_t n_ids) {
    qie_error e = {0};
    int32_t *got;
    size_t n_got;
    /* An exact copy, so that a sanitizer sees any read beyond the text. */
    char *copy = malloc(n ? n : 1);
    if (n)
        memcpy(copy, text, n);
    if (qie_tokenizer_encode(t, copy, n, true, &got, &n_got, &e) != QIE_OK) {
        printf("  \"%.*s\": %s\n", (int)n, text, e.message);
        free(copy);
        return false;
    }
    bool same = n_got == n_ids && (!n_ids || !memcmp(got, ids, n_ids * sizeof *ids));
    if (!same) {
        printf("  \"%.*s\": got", (int)n, text);
        for (size_t i = 0; i < n_got; i++)
            printf(" %d", got[i]);
        printf(", expected");
        for (size_t i = 0; i < n_ids; i++)
            printf(" %d", ids[i]);
        printf("\n");
    }
    free(got);
    free(copy);
    return same;
}

QTEST(test_tokenizer_golden_texts_equal_reference) {
    const qie_tokenizer *t = get_released();
    ASSERT(t);
    qie_error e = {0};
    size_t n, bad = 0;
    char *text = fixture_gunzip("unit/tokenizer.json.gz", "tokenizer.golden", &n);
    ASSERT(text);
    qie_json *root;
    ASSERT_OK(qie_json_parse(text, n, "golden", &root, &e));
    ASSERT_INT(qie_json_size(root), 617);
    for (size_t i = 0; i < qie_json_size(root); i++) {
        const qie_json *row = qie_json_at(root, i), *ids = qie_json_at(row, 1);
        size_t len, n_ids = qie_json_size(ids);
        const char *s = qie_json_string(qie_json_at(row, 0), &len);
        int32_t *expected = calloc(n_ids + 1, sizeof *expected);
        for (size_t k = 0; k < n_ids; k++)
            expected[k] = (int32_t)qie_json_integer(qie_json_at(ids, k));
        bad += !same_ids(t, s, len, expected, n_ids);
        free(expected);
    }
    qie_json_free(root);
    free(text);
    ASSERT_INT(bad, 0);
}

static int nibble(char c) {
    return c <= '9' ? c - '0' : c - 'a' + 10;
}

QTEST(test_tokenizer_random_unicode_equals_reference) {
    const qie_tokenizer *t = get_released();
    ASSERT(t);
    size_t n, bad = 0, lines = 0;
    char *all = fixture_gunzip("tokenizer/unicode.txt.gz", "unicode.txt", &n);
    ASSERT(all);
    for (char *line = all, *next; (next = strchr(line, '\n')); line = next + 1, lines++) {
        char *tab = strchr(line, '\t'), text[256];
        size_t len = (size_t)(tab - line) / 2;
        int32_t ids[512];
        *next = 0;
        for (size_t i = 0; i < len && i < sizeof text; i++)
            text[i] = (char)(nibble(line[2 * i]) << 4 | nibble(line[2 * i + 1]));
        bad += !same_ids(t, text, len, ids, fixture_ids(tab + 1, ids, 512));
    }
    free(all);
    ASSERT_INT(lines, 5000);
    ASSERT_INT(bad, 0);
}

QTEST(test_tokenizer_spec_vectors_are_exact) {
    static const struct {
        const char *text, *ids;
    } CASES[] = {
        {"Hello world", "9707 1879"},
        {" ", "220"},
        {"", ""},
        {"Replace the sky, it's 3 o'clock!", "23107 279 12884 11 432 594 220 18 297 62410 0"},
        {"IT'S 12345.67", "952 13272 220 16 17 18 19 20 13 21 22"},
        {"a  b   c\n\n d\t e", "64 220 293 256 272 271 294 197 384"},
        {"你好，世界", "108386 3837 99489"},
        {"把背景换成海滩", "99360 102193 113552 113341"},
        {"e\xcc\x81 caf\xc3\xa9", "963 51950"},
        {"\xef\xac\x81 \xe2\x91\xa0\xe2\x85\xa7", "144300 220 48312 254 70467 100"},
        {"😀👍🏽", "141334 144349 145375"},
        {"   leading", "256 6388"},
        {"trailing   ", "376 14277 262"},
        {"x\r\ny", "87 319 88"},
        {"don't DON'T", "15007 944 44273 17323"},
        {"<|im_end|>hi<|image_pad|>", "151645 6023 151655"},
        {"\xc2\xa0nbsp", "4102 5674"},
        {"make it blue", "6927 432 6303"},
    };
    const qie_tokenizer *t = get_released();
    ASSERT(t);
    size_t bad = 0;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        int32_t ids[64];
        size_t n = fixture_ids(CASES[i].ids, ids, 64);
        bad += !same_ids(t, CASES[i].text, strlen(CASES[i].text), ids, n);
    }
    ASSERT_INT(bad, 0);
}

QTEST(test_tokenizer_added_tokens_found_and_ignored) {
    const qie_tokenizer *t = get_released();
    qie_error e = {0};
    int32_t *ids;
    size_t n;
    ASSERT(t);
    ASSERT_INT(qie_tokenizer_added_id(t, "<|image_pad|>"), 151655);
    ASSERT_INT(qie_tokenizer_added_id(t, "<|image_pad|"), -1);
    ASSERT_INT(qie_tokenizer_vocab_size(t), 151665);
    ASSERT_STR(qie_tokenizer_find_added(t, "x<<|im_<|vision_end|>", 21), "<|vision_end|>");
    ASSERT(!qie_tokenizer_find_added(t, "x<|vision_end|", 14));
    ASSERT(!qie_tokenizer_find_added(t, "", 0));
    ASSERT_OK(qie_tokenizer_encode(t, "<|im_end|>", 10, false, &ids, &n, &e));
    ASSERT_INT(n, 6);
    ASSERT_INT(ids[0], 27); /* "<" */
    free(ids);
}

QTEST(test_tokenizer_not_utf8_is_invalid) {
    static const char *const BAD[] = {
        "\xff",     "a\xc3",          "\xc0\x80",        "\xed\xa0\x80", "\xf4\x90\x80\x80",
        "\xe4\xbd", "ok \x80 not ok", "\xf0\x82\x82\xac"};
    const qie_tokenizer *t = get_released();
    ASSERT(t);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        qie_error e = {0};
        int32_t *ids;
        size_t n;
        ASSERT_INT(qie_tokenizer_encode(t, BAD[i], strlen(BAD[i]), true, &ids, &n, &e),
                   QIE_E_INVALID);
        ASSERT(!ids);
        ASSERT_CONTAINS(e.message, "UTF-8");
        ASSERT_STR(e.param, "prompt");
    }
}

QTEST(test_tokenizer_nul_bytes_are_text) {
    const qie_tokenizer *t = get_released();
    static const int32_t IDS[] = {64, 188, 65}; /* tokenizers 0.23: "a\0b" */
    ASSERT(t);
    ASSERT(same_ids(t, "a\0b", 3, IDS, 3));
}

/* Texts that make a careless splitter, sorter or merger quadratic. The bound is far above what a
 * loaded machine takes (at most 0.1 s each) and far below what a quadratic one would. */
QTEST(test_tokenizer_100000_characters_take_no_time) {
    static const struct {
        const char *unit;
        size_t n_ids;
    } CASES[] = {
        {"a", 12500},
        {" ", 782},
        {"\n", 3125},
        {"<", 12500},
        {"\xc3\xa9", 100000},
        {"\xcc\x81\xcc\x96", 0},
        {"1", 100000},
        {"ab", 0},
        {"\xf0\x91\xa4\xb0", 0},
        {"<|im_", 0},
        {" \n", 0},
        {"'s", 0},
    };
    const qie_tokenizer *t = get_released();
    qie_error e = {0};
    ASSERT(t);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        size_t k = strlen(CASES[i].unit), n = 100000 * k, n_ids;
        char *text = malloc(n);
        int32_t *ids;
        for (size_t j = 0; j < n; j++)
            text[j] = CASES[i].unit[j % k];
        double start = qie_now_s();
        ASSERT_OK(qie_tokenizer_encode(t, text, n, true, &ids, &n_ids, &e));
        ASSERT_LE(qie_now_s() - start, 5.0);
        if (CASES[i].n_ids)
            ASSERT_INT(n_ids, CASES[i].n_ids);
        free(ids);
        free(text);
    }
}

/* ------------------------------------------------------------------------------- small tokenizers
 * in memory */

typedef struct table {
    qie_builtin_file rows[8];
    char *owned[8];
    size_t n;
} table;

static void table_add(table *t, const char *name, char *text, size_t n) {
    t->rows[t->n] = (qie_builtin_file){name, (unsigned char *)text, (unsigned char *)text + n};
    t->owned[t->n++] = text;
}

static void table_copy(table *t, const char *name, const char *text) {
    table_add(t, name, strdup(text), strlen(text));
}

static void table_release(table *t) {
    for (size_t i = 0; i < t->n; i++)
        free(t->owned[i]);
}

static char *golden_file(const char *name, size_t *n) {
    unsigned char *data = NULL;
    char path[512];
    snprintf(path, sizeof path, GOLDEN "%s", name);
    return qie_file_read(path, 1u << 26, &data, n, NULL) == QIE_OK ? (char *)data : NULL;
}

/* Open the files of a table; message of the failure in *e. */
static qie_status open_table(table *t, qie_tokenizer **out, qie_error *e) {
    qie_files *f;
    t->rows[t->n] = (qie_builtin_file){0};
    *out = NULL;
    qie_status st = qie_files_open_builtin(t->rows, "test", &f, e);
    if (st != QIE_OK)
        return st;
    st = qie_tokenizer_open(f, "p", out, e);
    qie_files_close(f); /* a tokenizer keeps nothing of its files */
    return st;
}

static void json_string(qie_strbuf *b, const char *s, size_t n, bool escape) {
    qie_strbuf_puts(b, "\"");
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            qie_strbuf_printf(b, "\\%c", c);
        else if (escape && c >= 0xc0 && c < 0xe0) {
            qie_strbuf_printf(b, "\\u%04x", ((c & 0x1fu) << 6) | ((unsigned char)s[i + 1] & 0x3fu));
            i++;
        } else
            qie_strbuf_append(b, s + i, 1);
    }
    qie_strbuf_puts(b, "\"");
}

/* tokenizer.json from the tiny model's files. style 0: merges "a b"; 1: ["a", "b"]; 2: the same,
 * escaped, with the merges before the vocabulary. */
static char *tokenizer_json(int style) {
    size_t n_vocab, n_merges;
    char *vocab = golden_file("model/processor/vocab.json", &n_vocab);
    char *merges = golden_file("model/processor/merges.txt", &n_merges);
    qie_strbuf list, out, words;
    qie_error e = {0};
    qie_strbuf_init(&list, 1u << 24);
    qie_strbuf_init(&out, 1u << 24);
    qie_strbuf_init(&words, 1u << 24);
    for (char *save, *line = strtok_r(merges, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        char *space = strchr(line, ' ');
        if (!strncmp(line, "#version", 8))
            continue;
        qie_strbuf_puts(&list, list.len ? ", " : "");
        if (style == 0) {
            json_string(&list, line, strlen(line), false);
            continue;
        }
        qie_strbuf_puts(&list, "[");
        json_string(&list, line, (size_t)(space - line), style == 2);
        qie_strbuf_puts(&list, " , ");
        json_string(&list, space + 1, strlen(space + 1), style == 2);
        qie_strbuf_puts(&list, "]");
    }
    qie_json *root = NULL, *added = NULL;
    size_t n_added;
    char *added_text = golden_file("model/processor/added_tokens.json", &n_added);
    qie_strbuf_puts(&out, "{\"version\": \"1.0\", \"added_tokens\": [");
    if (qie_json_parse(added_text, n_added, "added", &added, &e) == QIE_OK)
        for (int id = 534; id <= 547; id++)
            qie_strbuf_printf(
                &out, "%s{\"id\": %d, \"special\": true, \"lstrip\": false, \"content\": \"%s\"}",
                id > 534 ? "," : "", id, RELEASED_ADDED[id - 534]);
    qie_strbuf_puts(&out, "], \"model\": {\"type\": \"BPE\", \"dropout\": null, ");
    if (style == 2)
        qie_strbuf_printf(&out, "\"merges\": [%s], ", list.data);
    if (style == 2 && qie_json_parse(vocab, n_vocab, "vocab", &root, &e) == QIE_OK) {
        /* the same vocabulary with \u escapes, by our own writer */
        char *p = vocab;
        for (char *q; (q = strchr(p, '"')); p = q) {
            q++;
            char *end = q;
            while (*end != '"')
                end += *end == '\\' ? 2 : 1;
            qie_strbuf_puts(&words, words.len ? "," : "");
            qie_strbuf_puts(&words, "\"");
            for (char *c = q; c < end; c++)
                if ((unsigned char)*c >= 0xc0) {
                    qie_strbuf_printf(&words, "\\u%04X",
                                      (((unsigned char)c[0] & 0x1fu) << 6) |
                                          ((unsigned char)c[1] & 0x3fu));
                    c++;
                } else
                    qie_strbuf_append(&words, c, 1);
            qie_strbuf_printf(&words, "\" : %ld", strtol(strchr(end, ':') + 1, &q, 10));
        }
        qie_strbuf_printf(&out, "\"vocab\": {%s}", words.data);
    } else
        qie_strbuf_printf(&out, "\"vocab\": %s", vocab);
    if (style != 2)
        qie_strbuf_printf(&out, ", \"merges\": [%s]", list.data);
    qie_strbuf_puts(&out, "}}");
    qie_json_free(root);
    qie_json_free(added);
    free(added_text);
    free(vocab);
    free(merges);
    qie_strbuf_release(&list);
    qie_strbuf_release(&words);
    return qie_strbuf_take(&out);
}

static const char SAMPLE[] =
    "<|im_start|>user\nDescribe the key features of the input image's texture, keep the "
    "main subject. 把主体颜色改成紫色 \xc3\xa9 e\xcc\x81 😀 123\r\n\n  x<|im_end|>";

QTEST(test_tokenizer_file_styles_give_equal_ids) {
    qie_error e = {0};
    qie_files *f;
    qie_tokenizer *old, *new;
    int32_t *expected;
    size_t n;
    ASSERT_OK(qie_files_open_dir(GOLDEN "model", &f, &e));
    ASSERT_OK(qie_tokenizer_open(f, "processor", &old, &e));
    qie_files_close(f);
    ASSERT_INT(qie_tokenizer_vocab_size(old), 548);
    ASSERT_INT(qie_tokenizer_added_id(old, "<|image_pad|>"), 546);
    ASSERT_OK(qie_tokenizer_encode(old, SAMPLE, sizeof SAMPLE - 1, true, &expected, &n, &e));
    ASSERT_INT(expected[0], 535);
    ASSERT_INT(expected[n - 1], 536);
    for (int style = 0; style < 3; style++) {
        table t = {0};
        char *json = tokenizer_json(style);
        table_add(&t, "p/tokenizer.json", json, strlen(json));
        ASSERT_OK(open_table(&t, &new, &e));
        ASSERT(same_ids(new, SAMPLE, sizeof SAMPLE - 1, expected, n));
        ASSERT_INT(qie_tokenizer_vocab_size(new), 548);
        qie_tokenizer_close(new);
        table_release(&t);
    }
    free(expected);
    qie_tokenizer_close(old);
}

/* The demo model's two folders: tokenizer.json alone, and the old files beside it. */
QTEST(test_tokenizer_demo_folders_agree) {
    qie_error e = {0};
    qie_files *f;
    qie_tokenizer *a, *b;
    int32_t *ids;
    size_t n;
    if (!qie_dir_exists(QIE_SOURCE_DIR "/demo/model/processor"))
        QTEST_SKIP("no demo model");
    ASSERT_OK(qie_files_open_dir(QIE_SOURCE_DIR "/demo/model", &f, &e));
    double start = qie_now_s();
    ASSERT_OK(qie_tokenizer_open(f, "processor", &a, &e));
    printf("  demo's tokenizer loaded in %.2f ms\n", (qie_now_s() - start) * 1e3);
    ASSERT_OK(qie_tokenizer_open(f, "tokenizer", &b, &e));
    ASSERT(qie_tokenizer_added_id(a, "<|image_pad|>") > 0);
    ASSERT_INT(qie_tokenizer_added_id(b, "<|image_pad|>"),
               qie_tokenizer_added_id(a, "<|image_pad|>"));
    ASSERT_OK(qie_tokenizer_encode(a, SAMPLE, sizeof SAMPLE - 1, true, &ids, &n, &e));
    ASSERT(same_ids(b, SAMPLE, sizeof SAMPLE - 1, ids, n));
    free(ids);
    qie_tokenizer_close(a);
    qie_tokenizer_close(b);
    qie_files_close(f);
}

/* All 256 byte symbols, then "extra". */
static char *byte_vocab(const char *extra) {
    qie_strbuf b;
    unsigned shift = 256;
    qie_strbuf_init(&b, 1u << 20);
    for (unsigned i = 0; i < 256; i++) {
        bool printable = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        qie_strbuf_printf(&b, "%s\"\\u%04x\": %u", i ? ", " : "{", printable ? i : shift++, i);
    }
    qie_strbuf_printf(&b, "%s}", extra);
    return qie_strbuf_take(&b);
}

QTEST(test_tokenizer_sparse_ids_and_late_merges_work) {
    qie_error e = {0};
    qie_tokenizer *t;
    table f = {0};
    static const int32_t IDS[] = {5000, 'c',
                                  700}; /* "b" "c" outranks "a" "b" only where it comes first */
    char *vocab = byte_vocab(", \"ab\": 5000, \"xy\": 700");
    table_add(&f, "p/vocab.json", vocab, strlen(vocab));
    table_copy(&f, "p/merges.txt", "#version: 0.2\r\na b\r\n\nx y");
    ASSERT_OK(open_table(&f, &t, &e));
    ASSERT_INT(qie_tokenizer_vocab_size(t), 5001);
    ASSERT(same_ids(t, "abcxy", 5, IDS, 3));
    qie_tokenizer_close(t);
    table_release(&f);
}

/* Each row: files (NULL: a good one or none), status, part of the message. */
QTEST(test_tokenizer_damaged_files_are_named) {
    static const struct {
        const char *extra, *vocab, *merges, *added, *config, *json, *message;
        qie_status status;
    } CASES[] = {
        {NULL, NULL, NULL, NULL, NULL, NULL, "no tokenizer in 'test/p'", QIE_E_NOT_FOUND},
        {NULL, "{\"a\": 1}", "", NULL, NULL, NULL, "lacks byte 0x00", QIE_E_CORRUPT},
        {NULL, "{\"a\": -1}", "", NULL, NULL, NULL, "'p/vocab.json' is damaged: negative",
         QIE_E_CORRUPT},
        {NULL, "{\"a\": 1.5}", "", NULL, NULL, NULL, "whole number", QIE_E_CORRUPT},
        {NULL, "{\"a\": 99999999999}", "", NULL, NULL, NULL, "out of range", QIE_E_CORRUPT},
        {NULL, "{\"a\": 1", "", NULL, NULL, NULL, "expected ','", QIE_E_CORRUPT},
        {NULL, "{\"a\": 1,}", "", NULL, NULL, NULL, "comma", QIE_E_CORRUPT},
        {NULL, "{\"a", "", NULL, NULL, NULL, "without an end", QIE_E_CORRUPT},
        {NULL, "{\"a\\", "", NULL, NULL, NULL, "without an end", QIE_E_CORRUPT},
        {NULL, "{\"\\q\": 1}", "", NULL, NULL, NULL, "unknown escape", QIE_E_CORRUPT},
        {NULL, "{\"\\ud800\": 1}", "", NULL, NULL, NULL, "surrogate", QIE_E_CORRUPT},
        {NULL, "{\"\\u12\": 1}", "", NULL, NULL, NULL, "\\u escape", QIE_E_CORRUPT},
        {NULL, "{\"\xff\": 1}", "", NULL, NULL, NULL, "not UTF-8", QIE_E_CORRUPT},
        {NULL, "[]", "", NULL, NULL, NULL, "expected an object", QIE_E_CORRUPT},
        {NULL, "", "", NULL, NULL, NULL, "expected an object", QIE_E_CORRUPT},
        {"", NULL, "a b\n", NULL, NULL, NULL,
         "'p/merges.txt' is damaged: merge 1 needs the token 'ab'", QIE_E_CORRUPT},
        {"", NULL, "zz b\n", NULL, NULL, NULL, "merge 1 needs the token 'zz'", QIE_E_CORRUPT},
        {"", NULL, "a zz\n", NULL, NULL, NULL, "merge 1 needs the token 'zz'", QIE_E_CORRUPT},
        {"", NULL, "ab\n", NULL, NULL, NULL, "not two tokens", QIE_E_CORRUPT},
        {"", NULL, "a b c\n", NULL, NULL, NULL, "not two tokens", QIE_E_CORRUPT},
        {"", NULL, "a \n", NULL, NULL, NULL, "not two tokens", QIE_E_CORRUPT},
        {"", NULL, "", "{\"<x>\": -3}", NULL, NULL, "without a text or an id", QIE_E_CORRUPT},
        {"", NULL, "", "{\"\": 3}", NULL, NULL, "without a text or an id", QIE_E_CORRUPT},
        {"", NULL, "", "{\"<x>\": 3} x", NULL, NULL, "behind the end", QIE_E_CORRUPT},
        {"", NULL, "", "{\"<x>\": 3}",
         "{\"added_tokens_decoder\": {\"4\": {\"content\": \"<x>\"}}}", NULL,
         "the id 4, another file 3", QIE_E_CORRUPT},
        {"", NULL, "", NULL, "{\"added_tokens_decoder\": {\"x\": {\"content\": \"<x>\"}}}", NULL,
         "not a number", QIE_E_CORRUPT},
        {"", NULL, "", NULL, "{\"added_tokens_decoder\": {\"7\": {}}}", NULL, "without a text",
         QIE_E_CORRUPT},
        {NULL, NULL, NULL, NULL, NULL, "{}", "no model.vocab", QIE_E_CORRUPT},
        {NULL, NULL, NULL, NULL, NULL,
         "{\"model\": {\"type\": \"WordPiece\", \"vocab\": {}, \"merges\": []}}", "not plain BPE",
         QIE_E_CORRUPT},
        {NULL, NULL, NULL, NULL, NULL, "{\"model\": {\"vocab\": [], \"merges\": []}}",
         "expected an object", QIE_E_CORRUPT},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        qie_error e = {0};
        qie_tokenizer *t;
        table f = {0};
        if (CASES[i].extra) {
            char *v = byte_vocab(CASES[i].extra);
            table_add(&f, "p/vocab.json", v, strlen(v));
        } else if (CASES[i].vocab)
            table_copy(&f, "p/vocab.json", CASES[i].vocab);
        if (CASES[i].merges)
            table_copy(&f, "p/merges.txt", CASES[i].merges);
        if (CASES[i].added)
            table_copy(&f, "p/added_tokens.json", CASES[i].added);
        if (CASES[i].config)
            table_copy(&f, "p/tokenizer_config.json", CASES[i].config);
        if (CASES[i].json)
            table_copy(&f, "p/tokenizer.json", CASES[i].json);
        qie_status st = open_table(&f, &t, &e);
        if (st != CASES[i].status || t || !strstr(e.message, CASES[i].message))
            QTEST_FAIL("case %zu: %s \"%s\", expected %s \"%s\"", i, qie_status_name(st), e.message,
                       qie_status_name(CASES[i].status), CASES[i].message);
        table_release(&f);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
