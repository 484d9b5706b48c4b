#define _GNU_SOURCE
#include "weights/gguf.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/strbuf.h"

enum {
    MAX_NAME = 4096,
    MAX_DEPTH = 4,       /* of arrays in arrays */
    MAX_TEXT_ARRAY = 64, /* longer arrays stay views */
    DEFAULT_ALIGNMENT = 32,
    MAX_ALIGNMENT = 1 << 20,
    MIN_PAIR = 8 + 4 + 1, /* bytes of the shortest pair and tensor: bounds the counts */
    MIN_TENSOR = 8 + 4 + 4 + 8,
};

/* GGUF's numbers of the types; names of those that we do not read. */
static const struct {
    int number;
    qie_dtype dtype;
    const char *name;
} TYPES[] = {
    {0, QIE_F32, NULL},
    {1, QIE_F16, NULL},
    {2, QIE_Q4_0, NULL},
    {3, QIE_Q4_1, NULL},
    {6, QIE_Q5_0, NULL},
    {7, QIE_Q5_1, NULL},
    {8, QIE_Q8_0, NULL},
    {9, QIE_DTYPE_COUNT, "Q8_1"},
    {10, QIE_Q2_K, NULL},
    {11, QIE_Q3_K, NULL},
    {12, QIE_Q4_K, NULL},
    {13, QIE_Q5_K, NULL},
    {14, QIE_Q6_K, NULL},
    {15, QIE_DTYPE_COUNT, "Q8_K"},
    {16, QIE_DTYPE_COUNT, "IQ2_XXS"},
    {17, QIE_DTYPE_COUNT, "IQ2_XS"},
    {18, QIE_DTYPE_COUNT, "IQ3_XXS"},
    {19, QIE_DTYPE_COUNT, "IQ1_S"},
    {20, QIE_IQ4_NL, NULL},
    {21, QIE_DTYPE_COUNT, "IQ3_S"},
    {22, QIE_DTYPE_COUNT, "IQ2_S"},
    {23, QIE_IQ4_XS, NULL},
    {24, QIE_I8, NULL},
    {25, QIE_DTYPE_COUNT, "I16"},
    {26, QIE_I32, NULL},
    {27, QIE_I64, NULL},
    {28, QIE_F64, NULL},
    {29, QIE_DTYPE_COUNT, "IQ1_M"},
    {30, QIE_BF16, NULL},
    {34, QIE_DTYPE_COUNT, "TQ1_0"},
    {35, QIE_DTYPE_COUNT, "TQ2_0"},
    {39, QIE_DTYPE_COUNT, "MXFP4"},
};

int qie_gguf_type_of(qie_dtype dtype) {
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
        if (TYPES[i].dtype == dtype && dtype != QIE_DTYPE_COUNT)
            return TYPES[i].number;
    return -1;
}

/* Reading forward; the first failure ends it. */
typedef struct reader {
    const unsigned char *data;
    size_t n, at;
    qie_tensor_file *out;
    size_t alignment;
    qie_status st;
    qie_error *err;
} reader;

__attribute__((format(printf, 2, 3))) static bool corrupt(reader *r, const char *fmt, ...) {
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (r->st == QIE_OK)
        r->st = qie_fail(r->err, QIE_E_CORRUPT, r->out->label, "'%s' is damaged: %s", r->out->label,
                         text);
    return false;
}

static bool no_memory(reader *r) {
    if (r->st == QIE_OK)
        r->st = qie_fail(r->err, QIE_E_NO_MEMORY, NULL, "no memory for the header of '%s'",
                         r->out->label);
    return false;
}

static bool take(reader *r, size_t n, const unsigned char **p) {
    *p = NULL;
    if (n > r->n - r->at)
        return corrupt(r, "its header ends at byte %zu of %zu (is the file complete?)", r->at,
                       r->n);
    *p = r->data + r->at;
    r->at += n;
    return true;
}

static uint64_t little(const unsigned char *p, size_t n) {
    uint64_t v = 0;
    for (size_t i = n; i-- > 0;)
        v = v << 8 | p[i];
    return v;
}

static bool read_u32(reader *r, uint32_t *v) {
    *v = 0;
    const unsigned char *p;
    if (!take(r, 4, &p) || !p)
        return false;
    *v = (uint32_t)little(p, 4);
    return true;
}

static bool read_u64(reader *r, uint64_t *v) {
    *v = 0;
    const unsigned char *p;
    if (!take(r, 8, &p) || !p)
        return false;
    *v = little(p, 8);
    return true;
}

static bool read_string(reader *r, const unsigned char **p, size_t *n) {
    uint64_t len;
    *p = NULL;
    *n = 0;
    if (!read_u64(r, &len))
        return false;
    if (len > r->n - r->at)
        return corrupt(r, "a string of %" PRIu64 " bytes at byte %zu of %zu", len, r->at, r->n);
    *n = (size_t)len;
    return take(r, *n, p);
}

/* A name, as a new string. */
static char *read_name(reader *r, const char *what) {
    const unsigned char *p;
    size_t n;
    if (!read_string(r, &p, &n))
        return NULL;
    if (!n || n > MAX_NAME || memchr(p, 0, n) || !qie_utf8_valid((const char *)p, n)) {
        corrupt(r, "the name of a %s is empty, too long or no text", what);
        return NULL;
    }
    char *s = strndup((const char *)p, n);
    if (!s)
        no_memory(r);
    return s;
}

static size_t scalar_size(uint32_t type) {
    static const unsigned char SIZES[QIE_GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < QIE_GGUF_TYPES ? SIZES[type] : 0;
}

static int64_t sign_extend(uint64_t v, size_t bytes) {
    unsigned shift = 64 - 8 * (unsigned)bytes;
    return (int64_t)(v << shift) >> shift;
}

static void print_scalar(qie_strbuf *b, uint32_t type, const unsigned char *p) {
    size_t size = scalar_size(type);
    uint64_t v = little(p, size);
    float f;
    double d;
    switch (type) {
    case QIE_GGUF_BOOL: qie_strbuf_puts(b, v ? "true" : "false"); return;
    case QIE_GGUF_F32:
        memcpy(&f, p, 4);
        qie_strbuf_printf(b, "%.9g", (double)f);
        return;
    case QIE_GGUF_F64:
        memcpy(&d, p, 8);
        qie_strbuf_printf(b, "%.17g", d);
        return;
    case QIE_GGUF_I8:
    case QIE_GGUF_I16:
    case QIE_GGUF_I32:
    case QIE_GGUF_I64: qie_strbuf_printf(b, "%" PRId64, sign_extend(v, size)); return;
    default: qie_strbuf_printf(b, "%" PRIu64, v);
    }
}

/* Step over n elements of an array. */
static bool skip_elements(reader *r, uint32_t type, uint64_t n, int depth) {
    const unsigned char *p;
    size_t size = scalar_size(type), bytes;
    if (size) {
        if (n > SIZE_MAX / size || !qie_mul_size((size_t)n, size, &bytes))
            return corrupt(r, "an array of %" PRIu64 " elements", n);
        return take(r, bytes, &p);
    }
    if (type != QIE_GGUF_STRING && type != QIE_GGUF_ARRAY)
        return corrupt(r, "an array of elements of unknown type %" PRIu32, type);
    /* Each element takes 8 bytes or more: the count is bounded before the walk begins. */
    if (n > (r->n - r->at) / 8)
        return corrupt(r, "an array of %" PRIu64 " elements at byte %zu of %zu", n, r->at, r->n);
    for (uint64_t i = 0; i < n; i++) {
        size_t len;
        uint32_t inner;
        uint64_t count;
        if (type == QIE_GGUF_STRING) {
            if (!read_string(r, &p, &len))
                return false;
        } else if (depth >= MAX_DEPTH) {
            return corrupt(r, "arrays nested more than %d deep", (int)MAX_DEPTH);
        } else if (!read_u32(r, &inner) || !read_u64(r, &count) ||
                   !skip_elements(r, inner, count, depth + 1)) {
            return false;
        }
    }
    return true;
}

static bool add_meta(reader *r, char *key, char *value) {
    const char **slot = r->out->meta + 2 * r->out->n_meta++;
    slot[0] = key;
    slot[1] = value;
    return key && value ? true : no_memory(r);
}

/* The value of `key`, whose string this takes over. */
static bool read_array(reader *r, char *key) {
    uint32_t type;
    uint64_t n;
    if (!read_u32(r, &type) || !read_u64(r, &n)) {
        free(key);
        return false;
    }
    const unsigned char *begin = r->data + r->at;
    if (!skip_elements(r, type, n, 1)) {
        free(key);
        return false;
    }
    size_t size = scalar_size(type);
    if (!size || n > MAX_TEXT_ARRAY) {
        r->out->arrays[r->out->n_arrays++] = (qie_meta_array){key, type, n, begin, r->data + r->at};
        return true;
    }
    qie_strbuf b;
    qie_strbuf_init(&b, 8192);
    qie_strbuf_puts(&b, "[");
    for (uint64_t i = 0; i < n; i++) {
        qie_strbuf_puts(&b, i ? "," : "");
        print_scalar(&b, type, begin + i * size);
    }
    qie_strbuf_puts(&b, "]");
    return add_meta(r, key, qie_strbuf_take(&b));
}

static bool read_pair(reader *r) {
    uint32_t type;
    const unsigned char *p;
    size_t n;
    char *key = read_name(r, "key");
    if (!key)
        return false;
    if (!read_u32(r, &type)) {
        free(key);
        return false;
    }
    if (type == QIE_GGUF_ARRAY)
        return read_array(r, key);
    if (type == QIE_GGUF_STRING) {
        if (read_string(r, &p, &n) && p)
            return add_meta(r, key, strndup((const char *)p, n));
        free(key);
        return false;
    }
    bool known = scalar_size(type) != 0;
    if (!known || !take(r, scalar_size(type), &p) || !p) {
        if (!known)
            corrupt(r, "key '%.100s' has a value of unknown type %" PRIu32, key, type);
        free(key);
        return false;
    }
    qie_strbuf b;
    qie_strbuf_init(&b, 100);
    print_scalar(&b, type, p);
    return add_meta(r, key, qie_strbuf_take(&b));
}

static bool read_type(reader *r, qie_tensor *t, const char **name) {
    uint32_t number;
    char text[32];
    if (!read_u32(r, &number))
        return false;
    t->dtype = QIE_DTYPE_COUNT;
    snprintf(text, sizeof text, "GGUF type %" PRIu32, number);
    const char *found = text;
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
        if ((uint32_t)TYPES[i].number == number) {
            t->dtype = TYPES[i].dtype;
            found = TYPES[i].name ? TYPES[i].name : qie_dtype_name(t->dtype);
        }
    *name = strdup(found);
    return *name ? true : no_memory(r);
}

/* One row of the table; data is set to the offset until the data's begin is known. */
static bool read_tensor(reader *r) {
    uint32_t n_dims;
    size_t i = r->out->n_tensors;
    qie_tensor *t = &r->out->tensors[i];
    t->name = read_name(r, "tensor");
    if (!t->name)
        return false;
    r->out->n_tensors++; /* released from here on */
    if (!read_u32(r, &n_dims))
        return false;
    if (n_dims > QIE_MAX_DIMS)
        return corrupt(r, "tensor '%.100s' has %" PRIu32 " dimensions", t->name, n_dims);
    t->n_dims = (int)n_dims;
    t->n_elements = 1;
    for (int d = t->n_dims - 1; d >= 0; d--) {
        uint64_t v;
        if (!read_u64(r, &v))
            return false;
        if (v > INT64_MAX || !qie_mul_i64(t->n_elements, (int64_t)v, &t->n_elements))
            return corrupt(r, "tensor '%.100s' has a shape whose size overflows", t->name);
        t->shape[d] = (int64_t)v;
    }
    uint64_t offset;
    if (!read_type(r, t, &r->out->dtypes[i]) || !read_u64(r, &offset))
        return false;
    if (offset > r->n)
        return corrupt(r, "tensor '%.100s' lies behind the end of the file (is it complete?)",
                       t->name);
    t->n_bytes = (size_t)offset; /* for now: see place_tensor */
    return true;
}

/* The view of a tensor, once the data's begin is known. */
static bool place_tensor(reader *r, qie_tensor *t, size_t begin) {
    size_t offset = t->n_bytes, bytes = 0, room = r->n - begin;
    t->n_bytes = 0;
    t->data = r->data + begin;
    if (t->dtype == QIE_DTYPE_COUNT)
        return true; /* an unknown type hurts only when the tensor is asked for */
    int block = qie_dtype_block_elements(t->dtype);
    int64_t row = t->n_dims ? t->shape[t->n_dims - 1] : 1;
    if (row % block)
        return corrupt(r,
                       "tensor '%.100s' has rows of %" PRId64 " elements, not whole blocks of %d",
                       t->name, row, block);
    if (!qie_mul_size((size_t)(t->n_elements / block), qie_dtype_block_bytes(t->dtype), &bytes))
        return corrupt(r, "tensor '%.100s' has a shape whose size overflows", t->name);
    if (offset % r->alignment)
        return corrupt(r, "tensor '%.100s' is not aligned to %zu bytes", t->name, r->alignment);
    if (offset > room || bytes > room - offset)
        return corrupt(r, "tensor '%.100s' lies behind the end of the file (is it complete?)",
                       t->name);
    t->data = r->data + begin + offset;
    t->n_bytes = bytes;
    return true;
}

static int by_place(const void *a, const void *b) {
    const qie_tensor *x = *(const qie_tensor *const *)a, *y = *(const qie_tensor *const *)b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Gaps are allowed (padding), shared bytes are not. */
static bool check_overlap(reader *r) {
    size_t n = r->out->n_tensors;
    const qie_tensor **sorted = malloc((n + 1) * sizeof *sorted);
    if (!sorted)
        return no_memory(r);
    for (size_t i = 0; i < n; i++)
        sorted[i] = &r->out->tensors[i];
    qsort(sorted, n, sizeof *sorted, by_place);
    const unsigned char *end = NULL;
    bool ok = true;
    for (size_t i = 0; i < n && ok; i++) {
        const unsigned char *p = sorted[i]->data;
        if (end && p < end && sorted[i]->n_bytes)
            ok = corrupt(r, "tensor '%.100s' overlaps another tensor", sorted[i]->name);
        if (sorted[i]->n_bytes)
            end = p + sorted[i]->n_bytes;
    }
    free(sorted);
    return ok;
}

static bool check_names(reader *r) {
    size_t n = r->out->n_tensors, m = r->out->n_meta, k = 0;
    const char **names = malloc((n + m + r->out->n_arrays + 1) * sizeof *names);
    if (!names)
        return no_memory(r);
    for (size_t i = 0; i < n; i++)
        names[i] = r->out->tensors[i].name;
    qsort(names, n, sizeof *names, by_text);
    bool ok = true;
    for (size_t i = 1; i < n && ok; i++)
        if (!strcmp(names[i - 1], names[i]))
            ok = corrupt(r, "it has two tensors '%.100s'", names[i]);
    for (size_t i = 0; i < m; i++)
        names[k++] = r->out->meta[2 * i];
    for (size_t i = 0; i < r->out->n_arrays; i++)
        names[k++] = r->out->arrays[i].key;
    qsort(names, k, sizeof *names, by_text);
    for (size_t i = 1; i < k && ok; i++)
        if (!strcmp(names[i - 1], names[i]))
            ok = corrupt(r, "it has two values for the key '%.100s'", names[i]);
    free(names);
    return ok;
}

static bool set_alignment(reader *r) {
    const char *text = qie_tensor_file_meta(r->out, "general.alignment");
    r->alignment = DEFAULT_ALIGNMENT;
    if (!text)
        return true;
    char *end;
    unsigned long long v = strtoull(text, &end, 10);
    if (*end || !v || v % 8 || v > MAX_ALIGNMENT)
        return corrupt(r, "general.alignment is '%.40s'", text);
    r->alignment = (size_t)v;
    return true;
}

/* Shapes that converters changed to get rows of whole blocks, as they were. */
static void restore_shape(reader *r, qie_tensor *t) {
    char key[MAX_NAME + 40];
    snprintf(key, sizeof key, "comfy.gguf.orig_shape.%s", t->name);
    const char *p = qie_tensor_file_meta(r->out, key);
    int64_t shape[QIE_MAX_DIMS], n = 1;
    int dims = 0;
    if (!p || *p != '[')
        return;
    for (p++; *p && *p != ']' && dims < QIE_MAX_DIMS; dims++) {
        char *end;
        shape[dims] = strtoll(p, &end, 10);
        if (end == p || shape[dims] < 0 || !qie_mul_i64(n, shape[dims], &n))
            return;
        p = *end == ',' ? end + 1 : end;
    }
    if (*p != ']' || !dims || n != t->n_elements)
        return;
    t->n_dims = dims;
    memcpy(t->shape, shape, sizeof shape);
}

static bool read_file(reader *r) {
    uint64_t n_tensors, n_pairs;
    if (!read_u64(r, &n_tensors) || !read_u64(r, &n_pairs))
        return false;
    if (n_tensors > r->n / MIN_TENSOR || n_pairs > r->n / MIN_PAIR)
        return corrupt(r, "%" PRIu64 " tensors and %" PRIu64 " keys in a file of %zu bytes",
                       n_tensors, n_pairs, r->n);
    qie_tensor_file *o = r->out;
    o->tensors = calloc((size_t)n_tensors + 1, sizeof *o->tensors);
    o->dtypes = calloc((size_t)n_tensors + 1, sizeof *o->dtypes);
    o->meta = calloc(2 * (size_t)n_pairs + 1, sizeof *o->meta);
    o->arrays = calloc((size_t)n_pairs + 1, sizeof *o->arrays);
    if (!o->tensors || !o->dtypes || !o->meta || !o->arrays)
        return no_memory(r);
    for (uint64_t i = 0; i < n_pairs; i++)
        if (!read_pair(r))
            return false;
    if (!set_alignment(r))
        return false;
    for (uint64_t i = 0; i < n_tensors; i++)
        if (!read_tensor(r))
            return false;
    size_t begin = (r->at + r->alignment - 1) / r->alignment * r->alignment;
    if (begin > r->n) {
        if (n_tensors)
            return corrupt(r, "it ends before its data (is the file complete?)");
        begin = r->n;
    }
    for (uint64_t i = 0; i < n_tensors; i++)
        if (!place_tensor(r, &o->tensors[i], begin))
            return false;
    if (!check_names(r) || !check_overlap(r))
        return false;
    for (uint64_t i = 0; i < n_tensors; i++)
        restore_shape(r, &o->tensors[i]);
    return true;
}

qie_status qie_gguf_parse(const void *data, size_t n, const char *label, qie_tensor_file *out,
                          qie_error *err) {
    memset(out, 0, sizeof *out);
    out->label = strdup(label);
    out->format = "gguf";
    QIE_FAIL_IF(!out->label, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    QIE_FAIL_IF(n < 8 || memcmp(data, "GGUF", 4), QIE_E_CORRUPT, err, label, "'%s' is no GGUF file",
                label);
    reader r = {data, n, 4, out, 0, QIE_OK, err};
    uint32_t version = 0;
    read_u32(&r, &version);
    QIE_FAIL_IF(version >> 16, QIE_E_UNSUPPORTED, err, label,
                "'%s' is a GGUF file for big-endian machines", label);
    QIE_FAIL_IF(version < 2 || version > 3, QIE_E_UNSUPPORTED, err, label,
                "'%s' is a GGUF file of version %u; versions 2 and 3 can be read", label, version);
    read_file(&r);
    return r.st;
}

const char *qie_gguf_next_string(const qie_meta_array *array, const unsigned char **at, size_t *n) {
    if (array->type != QIE_GGUF_STRING || *at >= array->end)
        return NULL;
    const unsigned char *p = *at;
    *n = (size_t)little(p, 8);
    *at = p + 8 + *n;
    return (const char *)p + 8;
}
