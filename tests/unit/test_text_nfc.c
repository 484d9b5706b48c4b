/* Form C as tokenizers 0.23 (Unicode 9 tables) makes it: expected values recorded from
 * normalizers.NFC(). */
#include "qtest.h"
#include "text/nfc.h"

static void check(const char *text, const char *expected) {
    const char *out;
    char *owned;
    size_t n, len = strlen(text);
    qie_error e = {0};
    char *copy = malloc(len + 1); /* exact, for the sanitizers */
    memcpy(copy, text, len);
    ASSERT_OK(qie_nfc(copy, len, &out, &n, &owned, &e));
    if (n != strlen(expected) || memcmp(out, expected, n))
        QTEST_FAIL("\"%s\" became \"%.*s\", expected \"%s\"", text, (int)n, out, expected);
    free(owned);
    free(copy);
}

QTEST(test_nfc_plain_text_is_not_copied) {
    static const char TEXT[] = "caf\xc3\xa9 \xc3\x85";
    const char *out;
    char *owned;
    size_t n;
    qie_error e = {0};
    ASSERT_OK(qie_nfc(TEXT, sizeof TEXT - 1, &out, &n, &owned, &e));
    ASSERT(out == TEXT && !owned);
    ASSERT_INT(n, sizeof TEXT - 1);
    ASSERT_OK(qie_nfc("", 0, &out, &n, &owned, &e));
    ASSERT_INT(n, 0);
}

QTEST(test_nfc_composes_and_orders) {
    check("e\xcc\x81", "\xc3\xa9");
    check("\xe2\x84\xab", "\xc3\x85");                             /* angstrom sign */
    check("a\xcc\x81\xcc\xa3", "\xe1\xba\xa1\xcc\x81");            /* dot below before acute */
    check("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8", "\xea\xb0\x81"); /* Hangul */
    check("\xce\x90", "\xce\x90");                                 /* three code points and back */
    check("\xe0\xa5\x98", "\xe0\xa4\x95\xe0\xa4\xbc");             /* composition exclusion */
    check("\xf0\x9d\x85\x9e", "\xf0\x9d\x85\x97\xf0\x9d\x85\xa5"); /* musical half note */
    check("e\xcc\x81\xcc\x81", "\xc3\xa9\xcc\x81");
}

QTEST(test_nfc_characters_after_unicode_9_block) {
    check("a\xe2\xb7\xb7\xcc\xa3", "\xe1\xba\xa1\xe2\xb7\xb7"); /* U+2DF7 is old: moved over */
    check("a\xe1\xb7\xb7\xcc\xa3", "a\xe1\xb7\xb7\xcc\xa3");    /* U+1DF7 is new: blocks */
    check("\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0", "\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0");
    check("\xf0\x91\xa4\xb8", "\xf0\x91\xa4\xb8"); /* U+11938 */
    check("\xea\xb0\x80\xe1\x86\xa7",
          "\xea\xb0\x80\xe1\x86\xa7"); /* U+11A7 is no final consonant */
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
