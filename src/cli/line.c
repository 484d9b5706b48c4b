#define _GNU_SOURCE
#include "cli/line.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"
#include "service/master/parse.h"

typedef struct walk {
    cli_line *line;
    cli_values *values;
    qie_error *err;
    qie_status st;
} walk;

/* Everything behind this reads files by name, so bytes become one. */
static qie_status add_bytes(walk *w, const char *key, const uint8_t *bytes, size_t n) {
    char path[64];
    QIE_FAIL_IF(w->line->n_fds == QIE_MAX_IMAGES, QIE_E_TOO_LARGE, w->err, key,
                "'%s': more than %d pictures", key, QIE_MAX_IMAGES);
    int fd = memfd_create("picture", MFD_CLOEXEC);
    QIE_FAIL_IF(fd < 0, QIE_E_IO, w->err, key, "cannot keep a picture in memory: %s",
                strerror(errno));
    w->line->fds[w->line->n_fds++] = fd;
    for (size_t at = 0; at < n;) {
        ssize_t k = write(fd, bytes + at, n - at);
        QIE_FAIL_IF(k < 0 && errno != EINTR, QIE_E_IO, w->err, key,
                    "cannot keep a picture in memory: %s", strerror(errno));
        at += k > 0 ? (size_t)k : 0;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return cli_set(w->values, OPT_IMAGE, FROM_REQUEST, key, path, w->err);
}

static qie_status add_base64(walk *w, const char *key, const qie_json *value) {
    size_t n, n_bytes;
    const char *text = qie_json_string(value, &n);
    uint8_t *bytes = NULL;
    QIE_FAIL_IF(!text, QIE_E_INVALID, w->err, key, "'%s' must be base64 text", key);
    if (n > 5 && !strncasecmp(text, "data:", 5)) {
        const char *comma = memchr(text, ',', n);
        QIE_FAIL_IF(!comma, QIE_E_INVALID, w->err, key, "'%s' is no base64 data URL", key);
        n -= (size_t)(comma + 1 - text);
        text = comma + 1;
    }
    QIE_FAIL_IF(!svc_base64_decode(text, n, &bytes, &n_bytes), QIE_E_INVALID, w->err, key,
                "'%s' is not base64", key);
    qie_status st = n_bytes ? add_bytes(w, key, bytes, n_bytes)
                            : qie_fail(w->err, QIE_E_INVALID, key, "'%s' is empty", key);
    free(bytes);
    return st;
}

static qie_status refuse_address(walk *w, const char *key) {
    return qie_fail(w->err, QIE_E_UNSUPPORTED, key,
                    "'%s': pictures by address are fetched by the service alone; name a file", key);
}

/* A path, or an object with the picture in it. */
static qie_status add_picture(walk *w, const char *key, const qie_json *value) {
    const qie_json *inside = qie_json_member(value, "base64");
    size_t n;
    const char *path = qie_json_string(value, &n);
    if (inside)
        return add_base64(w, key, inside);
    if (qie_json_is_object(value))
        return qie_json_member(value, "url") || qie_json_member(value, "image_url")
                   ? refuse_address(w, key)
                   : qie_fail(w->err, QIE_E_INVALID, key, "'%s' must hold paths or {\"base64\"}",
                              key);
    QIE_FAIL_IF(!path, QIE_E_INVALID, w->err, key, "'%s' must be a string", key);
    QIE_FAIL_IF(strlen(path) != n, QIE_E_INVALID, w->err, key, "'%s' contains a NUL character",
                key);
    return cli_set(w->values, OPT_IMAGE, FROM_REQUEST, key, path, w->err);
}

static qie_status each(walk *w, const char *key, const qie_json *value,
                       qie_status (*add)(walk *, const char *, const qie_json *)) {
    if (!qie_json_is_array(value))
        return add(w, key, value);
    QIE_FAIL_IF(qie_json_size(value) == 0, QIE_E_INVALID, w->err, key, "'%s' is an empty array",
                key);
    for (size_t i = 0; i < qie_json_size(value); i++)
        QIE_TRY(add(w, key, qie_json_at(value, i)));
    return QIE_OK;
}

static qie_status take_member(walk *w, const char *key, qie_json *value) {
    static const char *const ignored[] = {"response", "priority", "idempotency_key"};
    if (!strcmp(key, "image") || !strcmp(key, "images"))
        return each(w, key, value, add_picture);
    if (!strcmp(key, "image_base64"))
        return each(w, key, value, add_base64);
    if (!strcmp(key, "image_url"))
        return refuse_address(w, key);
    if (!strcmp(key, "metadata") && qie_json_is_bool(value))
        return cli_set(w->values, OPT_NO_METADATA, FROM_REQUEST, key,
                       qie_json_bool(value) ? "false" : "true", w->err);
    if (!strcmp(key, "preview") && qie_json_is_bool(value))
        return QIE_OK;
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        if (!strcmp(key, ignored[i]))
            return QIE_OK;
    return cli_parse_field(w->values, key, value, w->err);
}

static bool member(void *arg, const char *key, qie_json *value) {
    walk *w = arg;
    /* null is "not given", as in the service. */
    if (qie_json_is_object(value) || qie_json_is_array(value) || qie_json_is_string(value) ||
        qie_json_is_number(value) || qie_json_is_bool(value))
        w->st = take_member(w, key, value);
    return w->st == QIE_OK;
}

qie_status cli_line_parse(cli_line *line, cli_values *values, const qie_json *object,
                          qie_error *err) {
    walk w = {.line = line, .values = values, .err = err};
    QIE_FAIL_IF(!qie_json_is_object(object), QIE_E_INVALID, err, "line",
                "a JSON object is expected");
    qie_json_each(object, member, &w);
    return w.st;
}

void cli_line_release(cli_line *line) {
    while (line->n_fds > 0)
        close(line->fds[--line->n_fds]);
}
