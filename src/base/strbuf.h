/* Growing text buffer with a ceiling. After a failure (memory, ceiling) `failed` stays set, further
 * appends do nothing, and `data` is still a valid string; check once at the end. */
#ifndef QIE_BASE_STRBUF_H
#define QIE_BASE_STRBUF_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct qie_strbuf {
    char *data; /* NUL-terminated; owned; NULL only before the first append */
    size_t len, cap, max;
    bool failed;
} qie_strbuf;

/* max: ceiling in bytes, the NUL not counted. */
void qie_strbuf_init(qie_strbuf *b, size_t max);
void qie_strbuf_release(qie_strbuf *b);
void qie_strbuf_append(qie_strbuf *b, const void *bytes, size_t n);
void qie_strbuf_puts(qie_strbuf *b, const char *s);
void qie_strbuf_printf(qie_strbuf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The string (caller frees with free()); NULL if failed. The buffer is empty afterwards. */
char *qie_strbuf_take(qie_strbuf *b);

/* True if the n bytes are well-formed UTF-8 (no surrogates, no overlong forms). */
bool qie_utf8_valid(const char *s, size_t n);
/* Number of code points of valid UTF-8. */
size_t qie_utf8_length(const char *s, size_t n);

#endif
