/* Forward reader for the tokenizer's JSON files, which have 151 thousand members.
 *
 * The parser of base/json.h takes 150-200 ms for such a vocabulary (measured; a node and a hash
 * entry each) and refuses tokenizer_config.json, whose model_max_length of 1e30 is written as an
 * integer. This one walks the text once and keeps nothing. Syntax is checked as far as values are
 * read or skipped.
 *
 * Functions return false after an error; `st` then holds its status and all later calls fail too.
 */
#ifndef QIE_TEXT_JSCAN_H
#define QIE_TEXT_JSCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

typedef struct qie_jscan {
    const char *start, *p, *end;
    const char *what; /* names the text in messages; borrowed */
    char *buf;        /* owned: the last string that had escapes */
    size_t cap;
    qie_status st;
    qie_error *err;
} qie_jscan;

/* Read n bytes (borrowed). Errors: QIE_E_CORRUPT (not UTF-8). */
bool qie_jscan_init(qie_jscan *s, const void *text, size_t n, const char *what, qie_error *err);
void qie_jscan_release(qie_jscan *s);
/* Fail at the current position: QIE_E_CORRUPT "'what' is damaged: <message> (byte N)". */
bool qie_jscan_fail(qie_jscan *s, const char *message);

/* First byte of the next value, 0 at the end of the text. */
static inline char qie_jscan_peek(qie_jscan *s) {
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r'))
        s->p++;
    return s->p < s->end ? *s->p : '\0';
}
/* Expect '{' or '['. */
bool qie_jscan_enter(qie_jscan *s, char open);
/* True when another member or element follows, which is then to be read; false behind the closing
 * bracket or after an error. *first: true before the first call, then owned by this function. */
bool qie_jscan_next(qie_jscan *s, char close, bool *first);
/* A string; the view lives until the next one is read. */
bool qie_jscan_string(qie_jscan *s, const char **text, size_t *n);
/* A member's name and the colon. */
bool qie_jscan_key(qie_jscan *s, const char **text, size_t *n);
/* A whole number without fraction or exponent, within int32. */
bool qie_jscan_int(qie_jscan *s, int32_t *out);
bool qie_jscan_bool(qie_jscan *s, bool *out);
/* Any value. */
bool qie_jscan_skip(qie_jscan *s);

static inline bool qie_jscan_is(const char *text, size_t n, const char *expected) {
    size_t i = 0;
    while (i < n && expected[i] && text[i] == expected[i])
        i++;
    return i == n && !expected[i];
}

#endif
