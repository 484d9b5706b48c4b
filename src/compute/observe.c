#define _GNU_SOURCE
#include "compute/observe.h"

#include <fnmatch.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/log.h"

typedef struct record {
    char name[64];
    const char *dtype;
    int n_dims;
    int64_t shape[5];
    void *data;
    size_t n_bytes;
    struct record *next;
} record;

struct qie_observer {
    char *path, *names; /* NULL: no dump */
    record *first, **last;
    bool failed;
    bool checks;       /* for values that are not finite, until one was found */
    char previous[64]; /* the tensor that was checked last */
};

qie_status qie_observer_create_from_env(qie_observer **out, qie_error *err) {
    *out = NULL;
    const char *path = getenv("QIE_DUMP"), *names = getenv("QIE_DUMP_NAMES");
    const char *check = getenv("QIE_CHECK_FINITE");
    bool dumps = path && *path, checks = check && *check && strcmp(check, "0") != 0;
    if (!dumps && !checks)
        return QIE_OK;
    qie_observer *o = calloc(1, sizeof *o);
    QIE_FAIL_IF(!o, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    o->checks = checks;
    o->last = &o->first;
    if (dumps) {
        o->path = strdup(path);
        o->names = strdup(names && *names ? names : "*");
    }
    if (dumps && (!o->path || !o->names)) {
        qie_observer_destroy(o);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    *out = o;
    return QIE_OK;
}

void qie_observer_destroy(qie_observer *o) {
    if (!o)
        return;
    while (o->first) {
        record *r = o->first;
        o->first = r->next;
        free(r->data);
        free(r);
    }
    free(o->path);
    free(o->names);
    free(o);
}

static bool dumps(const qie_observer *o, const char *name) {
    if (!o || !o->path)
        return false;
    for (const record *r = o->first; r; r = r->next)
        if (!strcmp(r->name, name))
            return false;
    for (const char *p = o->names; *p;) {
        size_t n = strcspn(p, ",");
        char pattern[128];
        if (n < sizeof pattern) {
            memcpy(pattern, p, n);
            pattern[n] = 0;
            if (!fnmatch(pattern, name, 0))
                return true;
        }
        p += n + (p[n] == ',');
    }
    return false;
}

bool qie_observer_checks(const qie_observer *o) {
    return o && o->checks;
}

bool qie_observer_wants(const qie_observer *o, const char *name) {
    return qie_observer_checks(o) || dumps(o, name);
}

static void check(qie_observer *o, const char *name, const float *data, int n_dims,
                  const int64_t *shape) {
    int64_t n = 1, at = 0;
    for (int i = 0; i < n_dims; i++)
        n *= shape[i];
    while (at < n && isfinite(data[at]))
        at++;
    if (at == n) {
        snprintf(o->previous, sizeof o->previous, "%s", name);
        return;
    }
    char place[24 * 5] = "", dims[24 * 5] = "";
    size_t n_place = 0, n_text = 0;
    int64_t below = n, left = at;
    for (int i = 0; i < n_dims; i++) {
        const char *comma = i ? ", " : "";
        below /= shape[i];
        n_place += (size_t)snprintf(place + n_place, sizeof place - n_place, "%s%lld", comma,
                                    (long long)(left / below));
        n_text += (size_t)snprintf(dims + n_text, sizeof dims - n_text, "%s%lld", comma,
                                   (long long)shape[i]);
        left %= below;
    }
    qie_log(QIE_LOG_ERROR, "finite", "%s [%s] has %g at [%s]; before it %s%s", name, dims,
            (double)data[at], place, *o->previous ? o->previous : "nothing",
            *o->previous ? " was finite" : " was looked at");
    o->checks = false;
}

/* Appends a record; its memory, of *n_bytes, is for the caller to fill. NULL: out of memory. */
static void *add(qie_observer *o, const char *name, const char *dtype, size_t item, int n_dims,
                 const int64_t *shape, size_t *n_bytes) {
    record *r = calloc(1, sizeof *r);
    size_t n = item;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    void *data = r ? malloc(n ? n : 1) : NULL;
    if (!data) {
        free(r);
        o->failed = true;
        return NULL;
    }
    strncpy(r->name, name, sizeof r->name - 1);
    r->dtype = dtype;
    r->n_dims = n_dims;
    memcpy(r->shape, shape, (size_t)n_dims * sizeof *shape);
    r->data = data;
    r->n_bytes = *n_bytes = n;
    *o->last = r;
    o->last = &r->next;
    return data;
}

void qie_observe_f32(qie_observer *o, const char *name, const float *data, int n_dims,
                     const int64_t *shape) {
    if (qie_observer_checks(o))
        check(o, name, data, n_dims, shape);
    if (!dumps(o, name))
        return;
    size_t n;
    float *to = add(o, name, "F32", sizeof(float), n_dims, shape, &n);
    if (to)
        memcpy(to, data, n);
}

void qie_observe_i64(qie_observer *o, const char *name, const int64_t *data, int n_dims,
                     const int64_t *shape) {
    if (!dumps(o, name))
        return;
    size_t n;
    void *to = add(o, name, "I64", sizeof(int64_t), n_dims, shape, &n);
    if (to)
        memcpy(to, data, n);
}

qie_status qie_observer_save(qie_observer *o, qie_error *err) {
    if (!o || !o->path)
        return QIE_OK;
    QIE_FAIL_IF(o->failed, QIE_E_NO_MEMORY, err, NULL, "no memory for the dump");
    qie_json *j = qie_json_new_object();
    size_t at = 0;
    for (record *r = o->first; r; r = r->next) {
        qie_json *t = qie_json_new_object(), *shape = qie_json_new_array(),
                 *off = qie_json_new_array();
        for (int i = 0; i < r->n_dims; i++)
            qie_json_push(shape, qie_json_new_int(r->shape[i]));
        qie_json_push(off, qie_json_new_int((int64_t)at));
        qie_json_push(off, qie_json_new_int((int64_t)(at + r->n_bytes)));
        qie_json_put(t, "dtype", qie_json_new_string(r->dtype));
        qie_json_put(t, "shape", shape);
        qie_json_put(t, "data_offsets", off);
        qie_json_put(j, r->name, t);
        at += r->n_bytes;
    }
    char *head = qie_json_text(j, 0);
    qie_json_free(j);
    size_t n = head ? strlen(head) : 0, padded = (n + 7) / 8 * 8;
    unsigned char *buf = head ? malloc(8 + padded + at) : NULL;
    if (!buf) {
        free(head);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "no memory for the dump");
    }
    for (int i = 0; i < 8; i++)
        buf[i] = (unsigned char)((uint64_t)padded >> (8 * i));
    memset(buf + 8, ' ', padded);
    memcpy(buf + 8, head, n);
    unsigned char *p = buf + 8 + padded;
    for (record *r = o->first; r; r = r->next) {
        memcpy(p, r->data, r->n_bytes);
        p += r->n_bytes;
    }
    qie_status st = qie_file_write_atomic(o->path, buf, 8 + padded + at, err);
    free(buf);
    free(head);
    return st;
}
