/* The template around a prompt: ids of the reference pipeline, refusal of placeholders. */
#define _GNU_SOURCE
#include "base/strbuf.h"
#include "text/prompt.h"
#include "text_fixture.h"

static const char PREFIX_IDS[] =
    "151644 8948 198 74785 279 1376 4419 315 279 1946 2168 320 3423 11 6083 11 1379 11 10434 11 "
    "6171 11 4004 701 "
    "1221 10339 1246 279 1196 594 1467 7600 1265 11596 476 5602 279 2168 13 19813 264 501 2168 429 "
    "20027 279 1196 "
    "594 8502 1393 20337 28137 448 279 4024 1946 1380 8311 13 151645 198 151644 872 198";

static qie_files *files;
static qie_tokenizer *tok;

static void close_all(void) {
    qie_tokenizer_close(tok);
    qie_files_close(files);
}

static const qie_tokenizer *get_tokenizer(void) {
    qie_error e = {0};
    if (!tok) {
        if (fixture_released(&files, &tok, &e) != QIE_OK)
            printf("  %s\n", e.message);
        atexit(close_all);
    }
    return tok;
}

QTEST(test_prompt_prefix_is_64_tokens_of_the_reference) {
    qie_error e = {0};
    qie_prompt p;
    int32_t prefix[80];
    int n_tokens = 3;
    static const int32_t REST[] = {24669,  220,  16,  25,   220,    151652, 151655, 151655, 151655,
                                   151653, 6927, 432, 6303, 151645, 198,    151644, 77091,  198};
    ASSERT(get_tokenizer());
    ASSERT_INT(fixture_ids(PREFIX_IDS, prefix, 80), 64);
    ASSERT_OK(qie_prompt_build(tok, "make it blue", 12, &n_tokens, 1, &p, &e));
    ASSERT_INT(p.n_drop, 64);
    ASSERT_INT(p.n_prompt, 3);
    ASSERT_INT(p.image_pad_id, 151655);
    ASSERT_INT(p.n_ids, 64 + sizeof REST / sizeof *REST);
    ASSERT_INT(p.parts[0], 64 + 6); /* up to the first placeholder */
    ASSERT_INT(p.parts[1], 3);
    ASSERT(!memcmp(p.ids, prefix, 64 * sizeof *prefix));
    ASSERT(!memcmp(p.ids + 64, REST, sizeof REST));
    qie_prompt_release(&p);
    ASSERT(!p.ids);
}

/* Lt = sum of (6 + digits + n) + tokens + 5 (spec 4.2). */
QTEST(test_prompt_16_pictures_have_the_lengths_of_the_template) {
    qie_error e = {0};
    qie_prompt p;
    int n_tokens[16];
    size_t expected = 64 + 5 + 1, pads = 0;
    ASSERT(get_tokenizer());
    for (int i = 0; i < 16; i++) {
        n_tokens[i] = 196 + i;
        expected += (size_t)(6 + (i + 1 >= 10 ? 2 : 1) + n_tokens[i]);
    }
    ASSERT_OK(qie_prompt_build(tok, " ", 1, n_tokens, 16, &p, &e));
    ASSERT_INT(p.n_ids, expected);
    ASSERT_INT(p.n_prompt, 1);
    for (size_t i = 0, k = 0; i < p.n_ids; i++) {
        if (p.ids[i] != p.image_pad_id)
            continue;
        size_t run = 0;
        while (p.ids[i + run] == p.image_pad_id)
            run++;
        ASSERT_INT(run, n_tokens[k++]);
        pads += run;
        i += run;
    }
    ASSERT_INT(pads, 196 * 16 + 120);
    qie_prompt_release(&p);
}

QTEST(test_prompt_empty_and_nul_and_added_tokens_are_legal) {
    qie_error e = {0};
    qie_prompt p;
    int n_tokens = 1;
    ASSERT(get_tokenizer());
    ASSERT_OK(qie_prompt_build(tok, "", 0, &n_tokens, 1, &p, &e));
    ASSERT_INT(p.n_prompt, 0);
    ASSERT_INT(p.n_ids, 64 + 8 + 5);
    qie_prompt_release(&p);
    ASSERT_OK(qie_prompt_build(tok, "a\0b", 3, &n_tokens, 1, &p, &e));
    ASSERT_INT(p.n_prompt, 3);
    qie_prompt_release(&p);
    /* Live as in the reference. */
    ASSERT_OK(qie_prompt_build(tok, "<|im_end|>hi", 12, &n_tokens, 1, &p, &e));
    ASSERT_INT(p.n_prompt, 2);
    ASSERT_INT(p.ids[72], 151645);
    qie_prompt_release(&p);
    ASSERT_OK(qie_prompt_build(tok, "hi", 2, NULL, 0, &p, &e));
    ASSERT_INT(p.n_ids, 64 + 1 + 5);
    qie_prompt_release(&p);
}

QTEST(test_prompt_placeholders_and_bad_text_are_refused) {
    static const char *const BAD[] = {"x<|image_pad|>", "<|video_pad|> y",
                                      "<|image_pad|><|im_end|>", "\xe4\xbd", "<|image_pad|>\xff"};
    int n_tokens = 4;
    ASSERT(get_tokenizer());
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        qie_error e = {0};
        qie_prompt p;
        ASSERT_INT(qie_prompt_build(tok, BAD[i], strlen(BAD[i]), &n_tokens, 1, &p, &e),
                   QIE_E_INVALID);
        ASSERT(!p.ids);
        ASSERT_STR(e.param, "prompt");
    }
}

QTEST(test_prompt_tokenizer_without_template_tokens_is_corrupt) {
    qie_error e = {0};
    qie_prompt p;
    qie_tokenizer *bare;
    qie_files *f;
    int n_tokens = 4;
    size_t n;
    char path[256];
    snprintf(path, sizeof path, "%s/bare/tokenizer", fixture_folder());
    ASSERT_OK(qie_mkdirs(path, &e));
    free(fixture_gunzip("tokenizer/vocab.json.gz", "bare/tokenizer/vocab.json", &n));
    free(fixture_gunzip("tokenizer/merges.txt.gz", "bare/tokenizer/merges.txt", &n));
    snprintf(path, sizeof path, "%s/bare", fixture_folder());
    ASSERT_OK(qie_files_open_dir(path, &f, &e));
    ASSERT_OK(qie_tokenizer_open(f, "tokenizer", &bare, &e));
    ASSERT_INT(qie_prompt_build(bare, "x", 1, &n_tokens, 1, &p, &e), QIE_E_CORRUPT);
    ASSERT_CONTAINS(e.message, "<|im_start|>");
    qie_tokenizer_close(bare);
    qie_files_close(f);
}

/* The bound that needs no tokenizer holds for what normalisation makes longest (UAX #15), too. */
QTEST(test_prompt_most_rows_is_never_exceeded) {
    static const char *const UNITS[] = {"a",          "make it blue ",    "\xf0\x9d\x85\xa0",
                                        "\xcd\x84",   "\xe7\xb4\xab",     "\xef\xac\xac",
                                        "<|im_end|>", "\xf0\x9f\xa6\x8a", "\n"};
    int n_tokens[2] = {196, 4};
    ASSERT(get_tokenizer());
    for (size_t i = 0; i < sizeof UNITS / sizeof *UNITS; i++)
        for (size_t times = 1; times < 2000; times *= 7)
            for (size_t n_images = 0; n_images <= 2; n_images++) {
                qie_error e = {0};
                qie_prompt p;
                size_t one = strlen(UNITS[i]), n = times * one;
                char *text = malloc(n + 1);
                for (size_t k = 0; k < times; k++)
                    memcpy(text + k * one, UNITS[i], one);
                ASSERT_OK(qie_prompt_build(tok, text, n, n_tokens, n_images, &p, &e));
                int64_t rows = (int64_t)p.n_ids - (int64_t)p.n_drop;
                ASSERT(rows <= qie_prompt_most_rows(n, n_tokens, n_images));
                qie_prompt_release(&p);
                free(text);
            }
}

QTEST(test_prompt_100000_characters_work) {
    qie_error e = {0};
    qie_prompt p;
    int n_tokens = 196;
    char *text = malloc(100000);
    ASSERT(get_tokenizer());
    for (size_t i = 0; i < 100000; i++)
        text[i] = "make the sky blue "[i % 18];
    ASSERT_OK(qie_prompt_build(tok, text, 100000, &n_tokens, 1, &p, &e));
    ASSERT(p.n_prompt > 20000 && p.n_prompt < 30000);
    qie_prompt_release(&p);
    free(text);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
