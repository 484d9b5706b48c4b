#include "text/jscan.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/strbuf.h"

/* Tokenizer files nest four deep. */
#define MAX_DEPTH 64

bool qie_jscan_init(qie_jscan *s, const void *text, size_t n, const char *what, qie_error *err) {
    memset(s, 0, sizeof *s);
    s->start = s->p = text;
    s->end = s->start + n;
    s->what = what;
    s->err = err;
    if (!qie_utf8_valid(text, n))
        s->st = qie_fail(err, QIE_E_CORRUPT, what, "'%s' is damaged: it is not UTF-8", what);
    return s->st == QIE_OK;
}

void qie_jscan_release(qie_jscan *s) {
    free(s->buf);
    s->buf = NULL;
    s->cap = 0;
}

bool qie_jscan_fail(qie_jscan *s, const char *message) {
    if (s->st == QIE_OK)
        s->st = qie_fail(s->err, QIE_E_CORRUPT, s->what, "'%s' is damaged: %s (byte %zu)", s->what,
                         message, (size_t)(s->p - s->start));
    return false;
}

bool qie_jscan_enter(qie_jscan *s, char open) {
    if (s->st != QIE_OK)
        return false;
    if (qie_jscan_peek(s) != open)
        return qie_jscan_fail(s, open == '{' ? "expected an object" : "expected an array");
    s->p++;
    return true;
}

bool qie_jscan_next(qie_jscan *s, char close, bool *first) {
    if (s->st != QIE_OK)
        return false;
    char c = qie_jscan_peek(s);
    if (c == close) {
        s->p++;
        return false;
    }
    if (!*first) {
        if (c != ',')
            return qie_jscan_fail(s, "expected ',' or the closing bracket");
        s->p++;
        if (qie_jscan_peek(s) == close)
            return qie_jscan_fail(s, "comma before the closing bracket");
    }
    *first = false;
    return true;
}

static int hex4(const char *p, const char *end) {
    int v = 0;
    if (end - p < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0)
            return -1;
        v = v * 16 + d;
    }
    return v;
}

static size_t put_utf8(char *o, uint32_t c) {
    if (c < 0x80) {
        o[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        o[i] = (char)(0x80 | (c & 0x3f));
    o[0] = (char)((0xf00u >> n) | c);
    return n;
}

/* \uXXXX at p (behind the backslash and u), pairs joined; a lone surrogate is refused. */
static bool read_unicode(qie_jscan *s, const char **p, uint32_t *out) {
    int hi = hex4(*p, s->end), lo;
    if (hi < 0)
        return qie_jscan_fail(s, "bad \\u escape in a string");
    *p += 4;
    *out = (uint32_t)hi;
    if (hi < 0xd800 || hi > 0xdfff)
        return true;
    if (hi > 0xdbff || s->end - *p < 6 || (*p)[0] != '\\' || (*p)[1] != 'u' ||
        (lo = hex4(*p + 2, s->end)) < 0xdc00 || lo > 0xdfff)
        return qie_jscan_fail(s, "half of a surrogate pair in a string");
    *p += 6;
    *out = 0x10000u + (((uint32_t)hi - 0xd800u) << 10) + ((uint32_t)lo - 0xdc00u);
    return true;
}

/* The string from s->p (behind the quote) has a backslash: decode it into buf. An escape never
 * grows. */
static bool read_escaped(qie_jscan *s, const char **text, size_t *n) {
    const char *q = s->p;
    while (q < s->end && *q != '"')
        q += *q == '\\' ? 2 : 1;
    if (q >= s->end)
        return qie_jscan_fail(s, "string without an end");
    size_t need = (size_t)(q - s->p) + 1, len = 0;
    if (need > s->cap) {
        char *b = realloc(s->buf, need * 2);
        if (!b) {
            s->st = qie_fail(s->err, QIE_E_NO_MEMORY, NULL, "no memory to read '%s'", s->what);
            return false;
        }
        s->buf = b;
        s->cap = need * 2;
    }
    for (const char *p = s->p; p < q;) {
        if ((unsigned char)*p < 0x20)
            return qie_jscan_fail(s, "control character in a string");
        if (*p != '\\') {
            s->buf[len++] = *p++;
            continue;
        }
        static const char FROM[] = "\"\\/bfnrt", TO[] = "\"\\/\b\f\n\r\t";
        const char *at = strchr(FROM, p[1]);
        uint32_t c = 0; /* set on success; gcc does not see that under the thread sanitizer */
        if (p[1] && at) {
            s->buf[len++] = TO[at - FROM];
            p += 2;
        } else if (p[1] == 'u') {
            p += 2;
            if (!read_unicode(s, &p, &c))
                return false;
            len += put_utf8(s->buf + len, c);
        } else
            return qie_jscan_fail(s, "unknown escape in a string");
    }
    s->p = q + 1;
    *text = s->buf;
    *n = len;
    return true;
}

bool qie_jscan_string(qie_jscan *s, const char **text, size_t *n) {
    *text = "";
    *n = 0;
    if (s->st != QIE_OK)
        return false;
    if (qie_jscan_peek(s) != '"')
        return qie_jscan_fail(s, "expected a string");
    s->p++;
    for (const char *q = s->p; q < s->end; q++) {
        if (*q == '"') {
            *text = s->p;
            *n = (size_t)(q - s->p);
            s->p = q + 1;
            return true;
        }
        if (*q == '\\')
            return read_escaped(s, text, n);
        if ((unsigned char)*q < 0x20)
            return qie_jscan_fail(s, "control character in a string");
    }
    return qie_jscan_fail(s, "string without an end");
}

bool qie_jscan_key(qie_jscan *s, const char **text, size_t *n) {
    if (!qie_jscan_string(s, text, n))
        return false;
    if (qie_jscan_peek(s) != ':')
        return qie_jscan_fail(s, "expected ':'");
    s->p++;
    return true;
}

bool qie_jscan_int(qie_jscan *s, int32_t *out) {
    *out = 0;
    if (s->st != QIE_OK)
        return false;
    bool minus = qie_jscan_peek(s) == '-';
    int64_t v = 0;
    const char *p = s->p + minus, *from = p;
    for (; p < s->end && *p >= '0' && *p <= '9'; p++) {
        v = v * 10 + (*p - '0');
        if (v > INT32_MAX)
            return qie_jscan_fail(s, "number out of range");
    }
    if (p == from || (p < s->end && (*p == '.' || *p == 'e' || *p == 'E')))
        return qie_jscan_fail(s, "expected a whole number");
    s->p = p;
    *out = (int32_t)(minus ? -v : v);
    return true;
}

static bool literal(qie_jscan *s, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, word, n))
        return qie_jscan_fail(s, "unknown word");
    s->p += n;
    return true;
}

bool qie_jscan_bool(qie_jscan *s, bool *out) {
    *out = false;
    if (s->st != QIE_OK)
        return false;
    char c = qie_jscan_peek(s);
    if (c != 't' && c != 'f')
        return qie_jscan_fail(s, "expected true or false");
    *out = c == 't';
    return literal(s, *out ? "true" : "false");
}

static bool skip(qie_jscan *s, int depth) {
    const char *text;
    size_t n;
    bool first = true;
    char c = qie_jscan_peek(s);
    if (depth > MAX_DEPTH)
        return qie_jscan_fail(s, "nested too deep");
    if (c == '"')
        return qie_jscan_string(s, &text, &n);
    if (c == '{' || c == '[') {
        s->p++;
        while (qie_jscan_next(s, c == '{' ? '}' : ']', &first))
            if ((c == '{' && !qie_jscan_key(s, &text, &n)) || !skip(s, depth + 1))
                return false;
        return s->st == QIE_OK;
    }
    if (c == 't' || c == 'f' || c == 'n')
        return literal(s, c == 't' ? "true" : c == 'f' ? "false" : "null");
    const char *from = s->p;
    while (s->p < s->end && *s->p && strchr("+-.eE0123456789", *s->p))
        s->p++;
    return s->p > from ? true : qie_jscan_fail(s, "expected a value");
}

bool qie_jscan_skip(qie_jscan *s) {
    return s->st == QIE_OK && skip(s, 0);
}
