/* The cache of encoded prompts: what was put comes back, nothing else does, and it stays within its
 * limit. */
#include "qtest.h"

#include <string.h>

#include "model/prompt_cache.h"

static qie_prompt_key key_of(const char *text) {
    qie_prompt_key k = {""};
    qie_prompt_part part = {text, strlen(text)};
    if (qie_prompt_key_make(&part, 1, &k, NULL) != QIE_OK)
        printf("  no key of %s\n", text);
    return k;
}

QTEST(test_prompt_key_depends_on_every_part_and_its_length) {
    qie_error e = {0};
    qie_prompt_key a, b;
    qie_prompt_part one[] = {{"ab", 2}, {"c", 1}}, other[] = {{"a", 1}, {"bc", 2}};
    ASSERT_OK(qie_prompt_key_make(one, 2, &a, &e));
    ASSERT_OK(qie_prompt_key_make(other, 2, &b, &e));
    ASSERT(strlen(a.hex) == 64);
    ASSERT(strcmp(a.hex, b.hex) != 0);
    ASSERT_OK(qie_prompt_key_make(one, 1, &b, &e));
    ASSERT(strcmp(a.hex, b.hex) != 0);
    ASSERT_OK(qie_prompt_key_make(one, 2, &b, &e));
    ASSERT(!strcmp(a.hex, b.hex));
}

QTEST(test_prompt_cache_gives_back_what_was_put) {
    qie_error e = {0};
    qie_prompt_cache *c;
    float in[3] = {1, -2, 3.5f}, out[4] = {9, 9, 9, 9};
    qie_prompt_key a = key_of("a"), b = key_of("b");
    ASSERT_OK(qie_prompt_cache_create(1000, &c, &e));
    ASSERT(!qie_prompt_cache_get(c, &a, out, 3));
    qie_prompt_cache_put(c, &a, in, 3);
    in[0] = 7; /* a copy was kept */
    ASSERT(!qie_prompt_cache_get(c, &b, out, 3));
    ASSERT(!qie_prompt_cache_get(c, &a, out, 4));
    ASSERT(out[0] == 9 && out[3] == 9);
    ASSERT(qie_prompt_cache_get(c, &a, out, 3));
    ASSERT(out[0] == 1 && out[1] == -2 && out[2] == 3.5f && out[3] == 9);
    qie_prompt_cache_put(c, &a, in, 2); /* replaces */
    ASSERT(!qie_prompt_cache_get(c, &a, out, 3));
    ASSERT(qie_prompt_cache_get(c, &a, out, 2));
    ASSERT(out[0] == 7);
    qie_prompt_cache_stats s = qie_prompt_cache_get_stats(c);
    ASSERT(s.hits == 2 && s.misses == 4 && s.n == 1 && s.bytes == 8);
    qie_prompt_cache_destroy(c);
}

QTEST(test_prompt_cache_drops_the_longest_unused_within_its_limit) {
    qie_error e = {0};
    qie_prompt_cache *c;
    float v[100] = {0};
    ASSERT_OK(qie_prompt_cache_create(40 * sizeof(float), &c, &e));
    qie_prompt_key k[4] = {key_of("0"), key_of("1"), key_of("2"), key_of("3")};
    for (int i = 0; i < 4; i++)
        qie_prompt_cache_put(c, &k[i], v, 10);
    ASSERT(qie_prompt_cache_get_stats(c).n == 4);
    ASSERT(qie_prompt_cache_get(c, &k[0], v, 10)); /* now 1 is the oldest */
    qie_prompt_key more = key_of("more"), large = key_of("large");
    qie_prompt_cache_put(c, &more, v, 11); /* 1 and 2 go */
    ASSERT(qie_prompt_cache_get(c, &k[0], v, 10));
    ASSERT(!qie_prompt_cache_get(c, &k[1], v, 10));
    ASSERT(!qie_prompt_cache_get(c, &k[2], v, 10));
    ASSERT(qie_prompt_cache_get(c, &k[3], v, 10));
    qie_prompt_cache_put(c, &large, v, 41); /* never fits: the others stay */
    qie_prompt_cache_put(c, &large, v, 0);
    qie_prompt_cache_stats s = qie_prompt_cache_get_stats(c);
    ASSERT(s.n == 3 && s.bytes == 31 * sizeof(float));
    for (int i = 0; i < 200; i++) { /* more than there are places */
        char name[16];
        snprintf(name, sizeof name, "n%d", i);
        qie_prompt_key small = key_of(name);
        qie_prompt_cache_put(c, &small, v, 1);
        ASSERT(qie_prompt_cache_get(c, &small, v, 1));
        ASSERT(qie_prompt_cache_get_stats(c).bytes <= 40 * sizeof(float));
    }
    qie_prompt_cache_destroy(c);
    qie_prompt_cache_destroy(NULL);
    ASSERT_OK(qie_prompt_cache_create(0, &c, &e));
    qie_prompt_cache_put(c, &k[0], v, 1);
    ASSERT(!qie_prompt_cache_get(c, &k[0], v, 1));
    qie_prompt_cache_destroy(c);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
