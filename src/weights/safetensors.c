#define _GNU_SOURCE
#include "weights/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/json.h"

/* What one walk over the header's members carries. */
typedef struct header_walk {
    qie_tensor_file *out;
    const unsigned char *data; /* first byte behind the header */
    size_t n_data;
    qie_status st;
    qie_error *err;
} header_walk;

static bool no_memory(header_walk *w) {
    w->st =
        qie_fail(w->err, QIE_E_NO_MEMORY, NULL, "no memory for the header of '%s'", w->out->label);
    return false;
}

static bool corrupt(header_walk *w, const char *name, const char *what) {
    w->st = qie_fail(w->err, QIE_E_CORRUPT, w->out->label, "'%s' is damaged: tensor '%s' %s",
                     w->out->label, name, what);
    return false;
}

/* A non-negative integer of an array. */
static bool read_size(const qie_json *v, size_t *out) {
    if (!qie_json_is_integer(v) || qie_json_integer(v) < 0)
        return false;
    *out = (size_t)qie_json_integer(v);
    return true;
}

static bool add_metadata(void *arg, const char *key, qie_json *value) {
    header_walk *w = arg;
    const char *text = qie_json_string(value, NULL);
    if (!text) {
        w->st = qie_fail(w->err, QIE_E_CORRUPT, w->out->label,
                         "'%s' is damaged: metadata '%s' is not a string", w->out->label, key);
        return false;
    }
    const char **slot = w->out->meta + 2 * w->out->n_meta;
    slot[0] = strdup(key);
    slot[1] = strdup(text);
    w->out->n_meta++;
    return slot[0] && slot[1] ? true : no_memory(w);
}

static bool read_metadata(header_walk *w, const qie_json *object) {
    if (!qie_json_is_object(object)) {
        w->st = qie_fail(w->err, QIE_E_CORRUPT, w->out->label,
                         "'%s' is damaged: __metadata__ is not an object", w->out->label);
        return false;
    }
    w->out->meta = calloc(2 * qie_json_size(object) + 1, sizeof *w->out->meta);
    return w->out->meta ? qie_json_each(object, add_metadata, w) : no_memory(w);
}

static bool read_shape(header_walk *w, qie_tensor *t, const char *name, const qie_json *shape) {
    if (!qie_json_is_array(shape))
        return corrupt(w, name, "has no shape");
    size_t n_dims = qie_json_size(shape);
    if (n_dims > QIE_MAX_DIMS)
        return corrupt(w, name, "has more than 8 dimensions");
    t->n_dims = (int)n_dims;
    t->n_elements = 1;
    for (size_t i = 0; i < n_dims; i++) {
        size_t d;
        if (!read_size(qie_json_at(shape, i), &d))
            return corrupt(w, name, "has a dimension that is not a whole number of 0 or more");
        t->shape[i] = (int64_t)d;
        if (!qie_mul_i64(t->n_elements, t->shape[i], &t->n_elements))
            return corrupt(w, name, "has a shape whose size overflows");
    }
    return true;
}

static bool add_tensor(void *arg, const char *key, qie_json *value) {
    header_walk *w = arg;
    if (!strcmp(key, "__metadata__"))
        return read_metadata(w, value);
    const char *dtype = qie_json_string(qie_json_member(value, "dtype"), NULL);
    if (!dtype)
        return corrupt(w, key, "has no dtype");
    size_t i = w->out->n_tensors++;
    qie_tensor *t = &w->out->tensors[i];
    t->name = strdup(key);
    w->out->dtypes[i] = strdup(dtype);
    if (!t->name || !w->out->dtypes[i])
        return no_memory(w);
    int known = qie_dtype_from_name(dtype);
    if (known >= 0 && !qie_dtype_size((qie_dtype)known))
        known = -1; /* blocks have no place in this format */
    t->dtype = known < 0 ? QIE_DTYPE_COUNT : (qie_dtype)known;
    if (!read_shape(w, t, key, qie_json_member(value, "shape")))
        return false;
    const qie_json *offsets = qie_json_member(value, "data_offsets");
    size_t begin, end, bytes;
    if (!qie_json_is_array(offsets) || qie_json_size(offsets) != 2 ||
        !read_size(qie_json_at(offsets, 0), &begin) || !read_size(qie_json_at(offsets, 1), &end))
        return corrupt(w, key, "has no data_offsets of two whole numbers");
    if (begin > end)
        return corrupt(w, key, "ends before it begins");
    if (end > w->n_data)
        return corrupt(w, key, "lies behind the end of the file (is the file complete?)");
    t->data = w->data + begin;
    t->n_bytes = end - begin;
    if (known < 0)
        return true; /* an unknown type hurts only when the tensor is asked for */
    if (!qie_mul_size((size_t)t->n_elements, qie_dtype_size(t->dtype), &bytes) ||
        bytes != t->n_bytes)
        return corrupt(w, key, "has a shape that does not fit its bytes");
    return true;
}

static int by_offset(const void *a, const void *b) {
    const qie_tensor *x = *(const qie_tensor *const *)a, *y = *(const qie_tensor *const *)b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

/* Overlaps would let two names share memory, gaps are what a wrong offset leaves behind: both
 * refused. */
static bool check_cover(header_walk *w) {
    size_t n = w->out->n_tensors;
    const qie_tensor **sorted = malloc((n + 1) * sizeof *sorted);
    if (!sorted)
        return no_memory(w);
    for (size_t i = 0; i < n; i++)
        sorted[i] = &w->out->tensors[i];
    qsort(sorted, n, sizeof *sorted, by_offset);
    size_t at = 0;
    bool ok = true;
    for (size_t i = 0; i < n && ok; i++) {
        size_t begin = (size_t)((const unsigned char *)sorted[i]->data - w->data);
        if (begin != at)
            ok = corrupt(w, sorted[i]->name,
                         begin < at ? "overlaps another tensor" : "leaves a gap before it");
        at = begin + sorted[i]->n_bytes;
    }
    free(sorted);
    if (ok && at != w->n_data) {
        w->st = qie_fail(w->err, QIE_E_CORRUPT, w->out->label,
                         "'%s' is damaged: its tensors take %zu bytes, but %zu follow the header",
                         w->out->label, at, w->n_data);
        ok = false;
    }
    return ok;
}

qie_status qie_safetensors_parse(const void *data, size_t n, const char *label,
                                 qie_tensor_file *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    out->label = strdup(label);
    out->format = "safetensors";
    QIE_FAIL_IF(!out->label, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    const unsigned char *p = data;
    QIE_FAIL_IF(n < 8, QIE_E_CORRUPT, err, label,
                "'%s' is no safetensors file: it has only %zu bytes", label, n);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--)
        header = header << 8 | p[i];
    QIE_FAIL_IF(header > QIE_SAFETENSORS_MAX_HEADER, QIE_E_CORRUPT, err, label,
                "'%s' is no safetensors file: header of %llu bytes, limit %u", label,
                (unsigned long long)header, QIE_SAFETENSORS_MAX_HEADER);
    QIE_FAIL_IF(header > n - 8, QIE_E_CORRUPT, err, label,
                "'%s' is truncated: header of %llu bytes in a file of %zu", label,
                (unsigned long long)header, n);
    QIE_FAIL_IF(header < 2 || p[8] != '{', QIE_E_CORRUPT, err, label,
                "'%s' is no safetensors file: its header is not a JSON object", label);
    qie_error json_err = {0};
    qie_json *root;
    if (qie_json_parse((const char *)p + 8, (size_t)header, "header", &root, &json_err) != QIE_OK)
        return qie_fail(err, QIE_E_CORRUPT, label, "'%s' is damaged: %s", label, json_err.message);
    header_walk w = {out, p + 8 + header, n - 8 - (size_t)header, QIE_OK, err};
    size_t members = qie_json_size(root);
    out->tensors = calloc(members + 1, sizeof *out->tensors);
    out->dtypes = calloc(members + 1, sizeof *out->dtypes);
    if (!out->tensors || !out->dtypes)
        no_memory(&w);
    else if (qie_json_each(root, add_tensor, &w))
        check_cover(&w);
    qie_json_free(root);
    return w.st;
}
