#include "weights/file_layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/json.h"
#include "base/strbuf.h"
#include "weights/gguf.h"

enum { GGUF_VERSION = 3, GGUF_ALIGNMENT = 32, GGUF_DIMS = 4, HEAD_ALIGNMENT = 8 };

#define MAX_HEAD (64u << 20)

void qie_layout_release(qie_layout *l) {
    free(l->head);
    memset(l, 0, sizeof *l);
}

/* Bytes of each tensor. */
static qie_status measure(qie_layout_tensor *t, qie_error *err) {
    int block = qie_dtype_block_elements(t->dtype);
    int64_t n = 1, last = t->n_dims ? t->shape[t->n_dims - 1] : 1;
    bool fits = block > 0 && t->n_dims >= 0 && t->n_dims <= QIE_MAX_DIMS && last % block == 0;
    for (int d = 0; d < t->n_dims && fits; d++)
        fits = t->shape[d] >= 0 && qie_mul_i64(n, t->shape[d], &n);
    fits = fits && qie_mul_i64(n / block, (int64_t)qie_dtype_block_bytes(t->dtype), &t->n_bytes);
    QIE_FAIL_IF(!fits, QIE_E_INVALID, err, t->name, "tensor '%s' cannot be written as %s", t->name,
                qie_dtype_name(t->dtype));
    return QIE_OK;
}

/* Places one behind the other; *at is the first free byte. */
static qie_status place(qie_layout_tensor *t, int64_t alignment, int64_t *at, qie_error *err) {
    int64_t from = (*at + alignment - 1) / alignment * alignment;
    QIE_FAIL_IF(t->n_bytes > INT64_MAX - alignment - from, QIE_E_INVALID, err, t->name,
                "the file would be too large");
    t->offset = from;
    *at = from + t->n_bytes;
    return QIE_OK;
}

static qie_status take_head(qie_strbuf *b, size_t alignment, char pad, qie_layout *out,
                            qie_error *err) {
    while (b->len % alignment && !b->failed)
        qie_strbuf_append(b, &pad, 1);
    out->n_head = b->len;
    out->head = (unsigned char *)qie_strbuf_take(b);
    QIE_FAIL_IF(!out->head, QIE_E_NO_MEMORY, err, NULL, "no memory for the head of a weight file");
    return QIE_OK;
}

/* ---- safetensors */

/* Offsets count from the end of the head, as they do before the head is known. */
static qie_json *entry(const qie_layout_tensor *t) {
    qie_json *e = qie_json_new_object(), *shape = qie_json_new_array(), *at = qie_json_new_array();
    for (int d = 0; d < t->n_dims; d++)
        qie_json_push(shape, qie_json_new_int(t->shape[d]));
    qie_json_push(at, qie_json_new_int(t->offset));
    qie_json_push(at, qie_json_new_int(t->offset + t->n_bytes));
    qie_json_put(e, "dtype", qie_json_new_string(qie_dtype_name(t->dtype)));
    qie_json_put(e, "shape", shape);
    qie_json_put(e, "data_offsets", at);
    return e;
}

static char *safetensors_text(const qie_layout_tensor *tensors, size_t n, const qie_meta_pair *meta,
                              size_t n_meta) {
    qie_json *root = qie_json_new_object(), *m = qie_json_new_object();
    char number[16];
    for (size_t i = 0; i < n_meta; i++) {
        (void)snprintf(number, sizeof number, "%u", meta[i].number);
        qie_json_put(m, meta[i].key, qie_json_new_string(meta[i].text ? meta[i].text : number));
    }
    if (n_meta)
        qie_json_put(root, "__metadata__", m);
    else
        qie_json_free(m);
    for (size_t i = 0; i < n; i++)
        qie_json_put(root, tensors[i].name, entry(&tensors[i]));
    char *text = qie_json_size(root) == n + (n_meta > 0) ? qie_json_text(root, 0) : NULL;
    qie_json_free(root);
    return text;
}

static qie_status make_safetensors(qie_layout_tensor *tensors, size_t n, const qie_meta_pair *meta,
                                   size_t n_meta, qie_layout *out, qie_error *err) {
    int64_t at = 0;
    for (size_t size = 8; size; size /= 2)
        for (size_t i = 0; i < n; i++)
            if (qie_dtype_size(tensors[i].dtype) == size)
                QIE_TRY(place(&tensors[i], 1, &at, err));
    for (size_t i = 0; i < n; i++)
        QIE_FAIL_IF(!qie_dtype_size(tensors[i].dtype), QIE_E_INVALID, err, tensors[i].name,
                    "tensor '%s': safetensors files have no %s", tensors[i].name,
                    qie_dtype_name(tensors[i].dtype));
    char *text = safetensors_text(tensors, n, meta, n_meta);
    QIE_FAIL_IF(!text, QIE_E_NO_MEMORY, err, NULL, "no memory for the head of a weight file");
    qie_strbuf b;
    qie_strbuf_init(&b, MAX_HEAD);
    qie_strbuf_append(&b, "\0\0\0\0\0\0\0\0", 8);
    qie_strbuf_puts(&b, text);
    free(text);
    QIE_TRY(take_head(&b, HEAD_ALIGNMENT, ' ', out, err));
    uint64_t header = out->n_head - 8;
    for (int i = 0; i < 8; i++)
        out->head[i] = (unsigned char)(header >> 8 * i);
    out->n_file = (int64_t)out->n_head + at;
    for (size_t i = 0; i < n; i++)
        tensors[i].offset += (int64_t)out->n_head;
    return QIE_OK;
}

/* ---- GGUF */

static void put_int(qie_strbuf *b, uint64_t v, int bytes) {
    unsigned char p[8];
    for (int i = 0; i < bytes; i++)
        p[i] = (unsigned char)(v >> 8 * i);
    qie_strbuf_append(b, p, (size_t)bytes);
}
static void put_string(qie_strbuf *b, const char *s) {
    put_int(b, strlen(s), 8);
    qie_strbuf_puts(b, s);
}

static void put_shape_note(qie_strbuf *b, const qie_layout_tensor *t) {
    static const char KEY[] = "comfy.gguf.orig_shape.";
    put_int(b, sizeof KEY - 1 + strlen(t->name), 8);
    qie_strbuf_puts(b, KEY);
    qie_strbuf_puts(b, t->name);
    put_int(b, QIE_GGUF_ARRAY, 4);
    put_int(b, QIE_GGUF_I32, 4);
    put_int(b, (uint64_t)t->n_dims, 8);
    for (int d = 0; d < t->n_dims; d++)
        put_int(b, (uint64_t)t->shape[d], 4);
}

/* One row of the table; the fastest dimension comes first. */
static void put_row(qie_strbuf *b, const qie_layout_tensor *t) {
    put_string(b, t->name);
    if (t->n_dims > GGUF_DIMS) {
        int64_t rest = 1;
        for (int d = 1; d < t->n_dims; d++)
            rest *= t->shape[d]; /* measured before: no overflow */
        put_int(b, 2, 4);
        put_int(b, (uint64_t)rest, 8);
        put_int(b, (uint64_t)t->shape[0], 8);
    } else {
        put_int(b, (uint64_t)t->n_dims, 4);
        for (int d = t->n_dims - 1; d >= 0; d--)
            put_int(b, (uint64_t)t->shape[d], 8);
    }
    put_int(b, (uint64_t)qie_gguf_type_of(t->dtype), 4);
    put_int(b, (uint64_t)t->offset, 8);
}

static qie_status make_gguf(qie_layout_tensor *tensors, size_t n, const qie_meta_pair *meta,
                            size_t n_meta, qie_layout *out, qie_error *err) {
    int64_t at = 0;
    size_t n_notes = 0;
    for (size_t i = 0; i < n; i++) {
        QIE_FAIL_IF(qie_gguf_type_of(tensors[i].dtype) < 0, QIE_E_INVALID, err, tensors[i].name,
                    "tensor '%s': GGUF files have no %s", tensors[i].name,
                    qie_dtype_name(tensors[i].dtype));
        QIE_TRY(place(&tensors[i], GGUF_ALIGNMENT, &at, err));
        n_notes += tensors[i].n_dims > GGUF_DIMS;
    }
    at = (at + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT; /* the last one, too */
    qie_strbuf b;
    qie_strbuf_init(&b, MAX_HEAD);
    qie_strbuf_puts(&b, "GGUF");
    put_int(&b, GGUF_VERSION, 4);
    put_int(&b, n, 8);
    put_int(&b, n_meta + n_notes, 8);
    for (size_t i = 0; i < n_meta; i++) {
        put_string(&b, meta[i].key);
        put_int(&b, meta[i].text ? QIE_GGUF_STRING : QIE_GGUF_U32, 4);
        if (meta[i].text)
            put_string(&b, meta[i].text);
        else
            put_int(&b, meta[i].number, 4);
    }
    for (size_t i = 0; i < n; i++)
        if (tensors[i].n_dims > GGUF_DIMS)
            put_shape_note(&b, &tensors[i]);
    for (size_t i = 0; i < n; i++)
        put_row(&b, &tensors[i]);
    QIE_TRY(take_head(&b, GGUF_ALIGNMENT, 0, out, err));
    out->n_file = (int64_t)out->n_head + at;
    for (size_t i = 0; i < n; i++)
        tensors[i].offset += (int64_t)out->n_head;
    return QIE_OK;
}

qie_status qie_layout_make(qie_file_format format, qie_layout_tensor *tensors, size_t n,
                           const qie_meta_pair *meta, size_t n_meta, qie_layout *out,
                           qie_error *err) {
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < n; i++)
        QIE_TRY(measure(&tensors[i], err));
    return format == QIE_FORMAT_GGUF ? make_gguf(tensors, n, meta, n_meta, out, err)
                                     : make_safetensors(tensors, n, meta, n_meta, out, err);
}
