#define _GNU_SOURCE
#include "base/error.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name, *text;
    int exit_code, http;
} STATUS[] = {
#define X(name, exit_code, http, text) {#name, text, exit_code, http},
    QIE_STATUS_MAP(X)
#undef X
};

static unsigned index_of(qie_status s) {
    return (unsigned)s < (unsigned)QIE_E_COUNT ? (unsigned)s : (unsigned)QIE_E_INTERNAL;
}

const char *qie_status_name(qie_status status) {
    return STATUS[index_of(status)].name;
}
const char *qie_status_text(qie_status status) {
    return STATUS[index_of(status)].text;
}
int qie_status_exit_code(qie_status status) {
    return STATUS[index_of(status)].exit_code;
}
int qie_status_http(qie_status status) {
    return STATUS[index_of(status)].http;
}

/* Messages quote file names and text from outside: a terminal must not be steered by them, and a
 * cut must not leave half a UTF-8 sequence, which would make the JSON that carries the message
 * invalid. */
static void clean(char *s, size_t cap) {
    size_t n = strnlen(s, cap - 1);
    s[n] = 0;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f)
            s[i] = '?';
    size_t i = 0;
    while (i < n) {
        unsigned char c = (unsigned char)s[i];
        size_t len = c < 0x80                ? 1
                     : c >= 0xc2 && c < 0xe0 ? 2
                     : c >= 0xe0 && c < 0xf0 ? 3
                     : c >= 0xf0 && c < 0xf5 ? 4
                                             : 0;
        int bad = len == 0;
        for (size_t j = 1; !bad && j < len; j++)
            bad = i + j >= n || ((unsigned char)s[i + j] & 0xc0) != 0x80;
        if (bad && i + len > n && len > 1) {
            s[i] = 0;
            return;
        }
        if (bad) {
            s[i] = '?';
            len = 1;
        }
        i += len;
    }
}

qie_status qie_fail_v(qie_error *err, qie_status status, const char *param, const char *fmt,
                      va_list ap) {
    if (err) {
        err->status = status;
        snprintf(err->param, sizeof err->param, "%s", param ? param : "");
        vsnprintf(err->message, sizeof err->message, fmt, ap);
        clean(err->param, sizeof err->param);
        clean(err->message, sizeof err->message);
    }
    return status;
}

qie_status qie_fail(qie_error *err, qie_status status, const char *param, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    qie_fail_v(err, status, param, fmt, ap);
    va_end(ap);
    return status;
}

void qie_error_context(qie_error *err, const char *fmt, ...) {
    if (!err || err->status == QIE_OK)
        return;
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    size_t n = strlen(err->message);
    snprintf(err->message + n, sizeof err->message - n, " (while %s)", text);
    clean(err->message, sizeof err->message);
}

void qie_error_clear(qie_error *err) {
    if (err)
        memset(err, 0, sizeof *err);
}
