#define _GNU_SOURCE
#include "base/json.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"

qie_status qie_json_parse(const char *text, size_t n, const char *what, qie_json **out,
                          qie_error *err) {
    json_error_t je;
    *out = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &je);
    if (!*out)
        return qie_fail(err, QIE_E_SYNTAX, what, "%s is not valid JSON: %s (line %d, column %d)",
                        what, je.text, je.line, je.column);
    return QIE_OK;
}

qie_status qie_json_parse_file(const char *path, size_t max_bytes, qie_json **out, qie_error *err) {
    unsigned char *text;
    size_t n;
    *out = NULL;
    QIE_TRY(qie_file_read(path, max_bytes, &text, &n, err));
    json_error_t je;
    *out = json_loadb((const char *)text, n, JSON_DECODE_ANY, &je);
    free(text);
    if (!*out)
        return qie_fail(err, QIE_E_CORRUPT, path, "'%s' is not valid JSON: %s (line %d, column %d)",
                        path, je.text, je.line, je.column);
    return QIE_OK;
}

void qie_json_free(qie_json *root) {
    json_decref(root);
}

bool qie_json_is_object(const qie_json *v) {
    return json_is_object(v);
}
bool qie_json_is_array(const qie_json *v) {
    return json_is_array(v);
}
bool qie_json_is_string(const qie_json *v) {
    return json_is_string(v);
}
bool qie_json_is_number(const qie_json *v) {
    return json_is_number(v);
}
bool qie_json_is_integer(const qie_json *v) {
    return json_is_integer(v);
}
bool qie_json_is_bool(const qie_json *v) {
    return json_is_boolean(v);
}

qie_json *qie_json_member(const qie_json *v, const char *key) {
    json_t *m = json_object_get(v, key);
    return json_is_null(m) ? NULL : m;
}

size_t qie_json_size(const qie_json *v) {
    return json_is_array(v) ? json_array_size(v) : json_object_size(v);
}

qie_json *qie_json_at(const qie_json *array, size_t i) {
    return json_array_get(array, i);
}

const char *qie_json_string(const qie_json *v, size_t *n) {
    if (!json_is_string(v))
        return NULL;
    if (n)
        *n = json_string_length(v);
    return json_string_value(v);
}

double qie_json_number(const qie_json *v) {
    return json_number_value(v);
}
int64_t qie_json_integer(const qie_json *v) {
    return (int64_t)json_integer_value(v);
}
bool qie_json_bool(const qie_json *v) {
    return json_is_true(v);
}

bool qie_json_each(const qie_json *object, qie_json_member_fn fn, void *arg) {
    const char *key;
    json_t *value;
    json_t *o = (json_t *)(uintptr_t)object; /* jansson's iterators take a mutable pointer */
    json_object_foreach(o, key, value) {
        if (!fn(arg, key, value))
            return false;
    }
    return true;
}

static qie_status read_int(const qie_json *obj, const char *key, int64_t min, int64_t max,
                           int64_t *out, qie_error *err) {
    json_t *m = qie_json_member(obj, key);
    /* Configs write 8 as 8.0 now and then. */
    double d = json_number_value(m);
    QIE_FAIL_IF(!json_is_number(m) || d != floor(d) || fabs(d) > 9007199254740992.0, QIE_E_INVALID,
                err, key, "'%s' must be an integer", key);
    int64_t v = json_is_integer(m) ? (int64_t)json_integer_value(m) : (int64_t)d;
    QIE_FAIL_IF(v < min || v > max, QIE_E_INVALID, err, key, "'%s' is %lld, not within %lld..%lld",
                key, (long long)v, (long long)min, (long long)max);
    *out = v;
    return QIE_OK;
}

qie_status qie_json_get_int(const qie_json *obj, const char *key, int64_t def, int64_t min,
                            int64_t max, int64_t *out, qie_error *err) {
    *out = def;
    return qie_json_member(obj, key) ? read_int(obj, key, min, max, out, err) : QIE_OK;
}

qie_status qie_json_need_int(const qie_json *obj, const char *key, int64_t min, int64_t max,
                             int64_t *out, qie_error *err) {
    QIE_FAIL_IF(!qie_json_member(obj, key), QIE_E_INVALID, err, key, "'%s' is missing", key);
    return read_int(obj, key, min, max, out, err);
}

qie_status qie_json_get_double(const qie_json *obj, const char *key, double def, double *out,
                               qie_error *err) {
    json_t *m = qie_json_member(obj, key);
    *out = def;
    if (!m)
        return QIE_OK;
    QIE_FAIL_IF(!json_is_number(m), QIE_E_INVALID, err, key, "'%s' must be a number", key);
    *out = json_number_value(m);
    return QIE_OK;
}

qie_status qie_json_get_bool(const qie_json *obj, const char *key, bool def, bool *out,
                             qie_error *err) {
    json_t *m = qie_json_member(obj, key);
    *out = def;
    if (!m)
        return QIE_OK;
    QIE_FAIL_IF(!json_is_boolean(m), QIE_E_INVALID, err, key, "'%s' must be true or false", key);
    *out = json_is_true(m);
    return QIE_OK;
}

qie_status qie_json_get_string(const qie_json *obj, const char *key, const char *def,
                               const char **out, qie_error *err) {
    json_t *m = qie_json_member(obj, key);
    *out = def;
    if (!m)
        return QIE_OK;
    QIE_FAIL_IF(!json_is_string(m), QIE_E_INVALID, err, key, "'%s' must be a string", key);
    *out = json_string_value(m);
    return QIE_OK;
}

qie_json *qie_json_new_object(void) {
    return json_object();
}
qie_json *qie_json_new_array(void) {
    return json_array();
}
qie_json *qie_json_new_string(const char *utf8) {
    return json_string(utf8);
}
qie_json *qie_json_new_int(int64_t v) {
    return json_integer(v);
}
qie_json *qie_json_new_double(double v) {
    return isfinite(v) ? json_real(v) : json_null();
}
qie_json *qie_json_new_bool(bool v) {
    return json_boolean(v);
}
qie_json *qie_json_new_null(void) {
    return json_null();
}
bool qie_json_put(qie_json *obj, const char *key, qie_json *value) {
    return value && json_object_set_new(obj, key, value) == 0;
}
bool qie_json_push(qie_json *array, qie_json *value) {
    return value && json_array_append_new(array, value) == 0;
}
char *qie_json_text(const qie_json *v, int indent) {
    size_t flags = JSON_ENCODE_ANY | (indent ? JSON_INDENT((size_t)indent) : JSON_COMPACT) |
                   JSON_REAL_PRECISION(9);
    return json_dumps(v, flags);
}
