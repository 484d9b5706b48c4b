#define _GNU_SOURCE
#include "service/master/parse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/error.h"

static int value_of(unsigned char c) {
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

bool svc_base64_decode(const char *text, size_t n, uint8_t **out, size_t *n_out) {
    uint8_t *p = malloc(n / 4 * 3 + 4);
    size_t k = 0, digits = 0;
    uint32_t word = 0;
    bool padded = false;
    *out = NULL;
    if (!p)
        return false;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '\r' || c == '\n')
            continue;
        if (c == '=') {
            padded = true;
            continue;
        }
        int v = value_of(c);
        if (v < 0 || padded) {
            free(p);
            return false;
        }
        word = word << 6 | (uint32_t)v;
        if (++digits % 4 == 0) {
            p[k++] = (uint8_t)(word >> 16);
            p[k++] = (uint8_t)(word >> 8);
            p[k++] = (uint8_t)word;
        }
    }
    if (digits % 4 == 1) {
        free(p);
        return false;
    }
    if (digits % 4 == 2)
        p[k++] = (uint8_t)(word >> 4);
    if (digits % 4 == 3) {
        p[k++] = (uint8_t)(word >> 10);
        p[k++] = (uint8_t)(word >> 2);
    }
    *out = p;
    *n_out = k;
    return true;
}

size_t svc_base64_length(size_t n) {
    return (n + 2) / 3 * 4;
}

void svc_base64_encode(const uint8_t *b, size_t n, char *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t i = 0;
    for (; i + 2 < n; i += 3, out += 4) {
        uint32_t w = (uint32_t)b[i] << 16 | (uint32_t)b[i + 1] << 8 | b[i + 2];
        out[0] = digits[w >> 18];
        out[1] = digits[w >> 12 & 63];
        out[2] = digits[w >> 6 & 63];
        out[3] = digits[w & 63];
    }
    if (i < n) {
        uint32_t w = (uint32_t)b[i] << 16 | (i + 1 < n ? (uint32_t)b[i + 1] << 8 : 0);
        out[0] = digits[w >> 18];
        out[1] = digits[w >> 12 & 63];
        out[2] = i + 1 < n ? digits[w >> 6 & 63] : '=';
        out[3] = '=';
    }
}

/* ---------------------------------------------------------------- multipart (RFC 7578) */

/* Value of a parameter (name="value" or name=value) in a header line of n bytes. */
static bool parameter(const char *line, size_t n, const char *name, char *out, size_t cap) {
    size_t len = strlen(name);
    for (size_t i = 0; i + len + 1 < n; i++) {
        if (line[i] != ';')
            continue;
        size_t j = i + 1;
        while (j < n && line[j] == ' ')
            j++;
        if (j + len >= n || strncasecmp(line + j, name, len) || line[j + len] != '=')
            continue;
        j += len + 1;
        bool quoted = j < n && line[j] == '"';
        size_t k = 0;
        for (j += quoted; j < n && (quoted ? line[j] != '"' : line[j] != ';' && line[j] != ' ');
             j++) {
            if (k + 1 >= cap)
                return false;
            out[k++] = line[j];
        }
        out[k] = 0;
        return true;
    }
    return false;
}

qie_status svc_multipart_begin(svc_multipart *m, const char *type, const char *body, size_t n,
                               qie_error *err) {
    memcpy(m->boundary, "\r\n--", 4);
    QIE_FAIL_IF(!parameter(type, strlen(type), "boundary", m->boundary + 4, 72) || !m->boundary[4],
                QIE_E_SYNTAX, err, NULL, "the form names no boundary");
    m->n_boundary = strlen(m->boundary);
    /* The first boundary has no line end before it. */
    QIE_FAIL_IF(n < m->n_boundary || memcmp(body, m->boundary + 2, m->n_boundary - 2), QIE_E_SYNTAX,
                err, NULL, "the form does not start with its boundary");
    m->at = body + m->n_boundary - 2;
    m->end = body + n;
    return QIE_OK;
}

static void read_headers(const char *p, const char *end, svc_part_view *part) {
    while (p < end) {
        const char *e = memmem(p, (size_t)(end - p), "\r\n", 2);
        size_t n = (size_t)((e ? e : end) - p);
        char filename[8];
        if (n > 20 && !strncasecmp(p, "Content-Disposition:", 20)) {
            if (!parameter(p, n, "name", part->name, sizeof part->name))
                part->name[0] = 0;
            /* A name that is too long for the buffer is still a name. */
            part->is_file = parameter(p, n, "filename", filename, sizeof filename) ||
                            memmem(p, n, "filename", 8) != NULL;
        }
        p += n + 2;
    }
}

qie_status svc_multipart_next(svc_multipart *m, svc_part_view *part, bool *more, qie_error *err) {
    memset(part, 0, sizeof *part);
    *more = false;
    size_t left = (size_t)(m->end - m->at);
    if (left >= 2 && !memcmp(m->at, "--", 2))
        return QIE_OK;
    QIE_FAIL_IF(left < 2 || memcmp(m->at, "\r\n", 2), QIE_E_SYNTAX, err, NULL,
                "the form is cut off");
    const char *head = m->at + 2;
    const char *blank = memmem(m->at, left, "\r\n\r\n", 4);
    QIE_FAIL_IF(!blank || blank - m->at > 4096, QIE_E_SYNTAX, err, NULL,
                "a part of the form has no end of headers");
    part->data = blank + 4;
    const char *end = memmem(part->data, (size_t)(m->end - part->data), m->boundary, m->n_boundary);
    QIE_FAIL_IF(!end, QIE_E_SYNTAX, err, NULL, "the form is cut off");
    if (blank > head)
        read_headers(head, blank, part);
    QIE_FAIL_IF(!part->name[0], QIE_E_SYNTAX, err, NULL, "a part of the form has no name");
    part->n = (size_t)(end - part->data);
    m->at = end + m->n_boundary;
    *more = true;
    return QIE_OK;
}
