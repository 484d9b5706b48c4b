#define _GNU_SOURCE
#include "weights/weights.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/trace.h"
#include "weights/weights_impl.h"

/* Index files of real checkpoints have about 0.2 MB. */
#define MAX_INDEX_BYTES (64u << 20)

static size_t hash_name(const char *a, const char *b) {
    uint64_t h = 1469598103934665603u; /* FNV-1a, 64 bit */
    for (int part = 0; part < 2; part++)
        for (const char *p = part ? b : a; *p; p++)
            h = (h ^ (unsigned char)*p) * 1099511628211u;
    return (size_t)(h ^ h >> 32);
}

const qie_tensor *qie_weights_lookup(const qie_weights *w, const char *prefix, const char *name) {
    size_t mask = w->n_slots - 1, k = strlen(prefix);
    for (size_t s = hash_name(prefix, name) & mask; w->slots[s]; s = (s + 1) & mask) {
        const qie_tensor *t = &w->tensors[w->slots[s] - 1];
        if (!strncmp(t->name, prefix, k) && !strcmp(t->name + k, name))
            return t;
    }
    return NULL;
}

/* Room for n tensors; more than 32 bits of them cannot come from headers of at most 100 MB. */
qie_status qie_weights_reserve(qie_weights *w, size_t n, qie_error *err) {
    w->n_slots = 16;
    while (w->n_slots < 2 * n)
        w->n_slots *= 2;
    w->tensors = calloc(n + 1, sizeof *w->tensors);
    w->file_of = calloc(n + 1, sizeof *w->file_of);
    w->in_file = calloc(n + 1, sizeof *w->in_file);
    w->slots = calloc(w->n_slots, sizeof *w->slots);
    QIE_FAIL_IF(!w->tensors || !w->file_of || !w->in_file || !w->slots, QIE_E_NO_MEMORY, err, NULL,
                "no memory for the tensors of '%s'", w->label);
    return QIE_OK;
}

/* The names of one file, or of one index, are unique already. */
void qie_weights_add(qie_weights *w, const qie_tensor *t, size_t file, size_t i) {
    size_t mask = w->n_slots - 1, s = hash_name("", t->name) & mask;
    while (w->slots[s])
        s = (s + 1) & mask;
    w->tensors[w->n_tensors] = *t;
    w->file_of[w->n_tensors] = (uint32_t)file;
    w->in_file[w->n_tensors] = (uint32_t)i;
    w->slots[s] = (uint32_t)++w->n_tensors;
    w->bytes += (int64_t)t->n_bytes;
    /* An unknown type's shape may claim anything. */
    if (t->dtype != QIE_DTYPE_COUNT)
        w->elements += t->n_elements;
}

qie_status qie_weights_create(const char *label, size_t n_files, qie_weights **out,
                              qie_error *err) {
    *out = NULL;
    qie_weights *w = calloc(1, sizeof *w);
    if (w) {
        w->label = strdup(label);
        w->files = calloc(n_files + 1, sizeof *w->files);
    }
    if (!w || !w->label || !w->files) {
        qie_weights_close(w);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    *out = w;
    return QIE_OK;
}

void qie_weights_close(qie_weights *w) {
    if (!w)
        return;
    for (size_t i = 0; i < w->n_files; i++)
        qie_tensor_file_release(&w->files[i]);
    free(w->files);
    free(w->label);
    free(w->tensors);
    free(w->file_of);
    free(w->in_file);
    free(w->slots);
    for (size_t i = 0; i < w->n_owned; i++)
        free(w->owned[i]);
    free(w->owned);
    free(w);
}

qie_status qie_weights_open_bytes(const void *data, size_t n, const char *label, qie_weights **out,
                                  qie_error *err) {
    qie_weights *w;
    qie_status st;
    *out = NULL;
    QIE_TRY(qie_weights_create(label, 1, &w, err));
    w->n_files = 1;
    QIE_TRY_GOTO(qie_tensor_file_parse(data, n, label, &w->files[0], err));
    QIE_TRY_GOTO(qie_weights_reserve(w, w->files[0].n_tensors, err));
    for (size_t i = 0; i < w->files[0].n_tensors; i++)
        qie_weights_add(w, &w->files[0].tensors[i], 0, i);
    *out = w;
    return QIE_OK;
fail:
    qie_weights_close(w);
    return st;
}

qie_status qie_weights_open_file(const char *path, qie_weights **out, qie_error *err) {
    qie_map map;
    *out = NULL;
    QIE_TRY(qie_map_open(path, &map, err));
    qie_status st = qie_weights_open_bytes(map.data, map.size, path, out, err);
    if (st == QIE_OK)
        (*out)->files[0].map = map;
    else
        qie_map_close(&map);
    return st;
}

/* ------------------------------------------------------------------------------------------- shard
 * index */

/* New string; NULL without memory. */
__attribute__((format(printf, 1, 2))) static char *text(const char *fmt, ...) {
    char *s = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0)
        s = NULL;
    va_end(ap);
    return s;
}

typedef struct index_walk {
    qie_weights *w;
    qie_files *files;
    const char *folder, *index; /* index: its name below the model's folder */
    char **shards;              /* name of each opened file */
    qie_status st;
    qie_error *err;
} index_walk;

static bool shard_name_is_plain(const char *s) {
    return *s && *s != '.' && !strchr(s, '/') && !strchr(s, '\\');
}

static qie_status open_shard(index_walk *x, const char *shard) {
    const unsigned char *data;
    size_t n;
    qie_weights *w = x->w;
    QIE_FAIL_IF(!shard_name_is_plain(shard), QIE_E_CORRUPT, x->err, x->index,
                "'%s' is damaged: shard name '%s' is not a plain file name", x->index, shard);
    char *name = text("%s/%s", x->folder, shard);
    char *label = text("%s/%s/%s", qie_files_label(x->files), x->folder, shard);
    qie_status st = QIE_OK;
    if (!name || !label)
        st = qie_fail(x->err, QIE_E_NO_MEMORY, NULL, "out of memory");
    else if (!qie_files_exists(x->files, name))
        st = qie_fail(x->err, QIE_E_NOT_FOUND, shard,
                      "weight file '%s' is missing: complete the model with `qwen-edit pull`",
                      label);
    else
        st = qie_files_get(x->files, name, &data, &n, x->err);
    if (st == QIE_OK) {
        x->shards[w->n_files] = strdup(shard);
        st = x->shards[w->n_files]
                 ? qie_tensor_file_parse(data, n, label, &w->files[w->n_files], x->err)
                 : qie_fail(x->err, QIE_E_NO_MEMORY, NULL, "out of memory");
        w->n_files++;
    }
    free(name);
    free(label);
    return st;
}

/* First pass: open every shard once. Checkpoints have a handful of shards, so a list is enough; a
 * lying index with a name per tensor fails at its first missing file. */
static bool visit_shard(void *arg, const char *key, qie_json *value) {
    index_walk *x = arg;
    const char *shard = qie_json_string(value, NULL);
    if (!shard) {
        x->st = qie_fail(x->err, QIE_E_CORRUPT, x->index,
                         "'%s' is damaged: tensor '%s' has no file name", x->index, key);
        return false;
    }
    for (size_t i = 0; i < x->w->n_files; i++)
        if (!strcmp(x->shards[i], shard))
            return true;
    x->st = open_shard(x, shard);
    return x->st == QIE_OK;
}

/* Second pass: take the tensors that the index names, in file order; `map` is the weight_map. */
static void take_named(index_walk *x, const qie_json *map) {
    qie_weights *w = x->w;
    for (size_t f = 0; f < w->n_files; f++)
        for (size_t i = 0; i < w->files[f].n_tensors; i++) {
            const char *name = w->files[f].tensors[i].name;
            const char *shard = qie_json_string(qie_json_member(map, name), NULL);
            if (shard && !strcmp(shard, x->shards[f]))
                qie_weights_add(w, &w->files[f].tensors[i], f, i);
            else
                qie_log(QIE_LOG_DEBUG, "weights", "'%s': tensor '%s' is not in the index, ignored",
                        w->files[f].label, name);
        }
}

static bool check_found(void *arg, const char *key, qie_json *value) {
    index_walk *x = arg;
    if (qie_weights_lookup(x->w, "", key))
        return true;
    x->st = qie_fail(x->err, QIE_E_CORRUPT, x->index,
                     "'%s' is damaged or from another model: it names tensor '%s' in '%s', which "
                     "is not there",
                     x->index, key, qie_json_string(value, NULL));
    return false;
}

static qie_status open_index(qie_files *files, const char *folder, const char *index,
                             qie_weights **out, qie_error *err) {
    const unsigned char *data;
    size_t n;
    qie_json *root = NULL;
    qie_error json_err = {0};
    index_walk x = {.files = files, .folder = folder, .index = index, .err = err};
    qie_status st;
    QIE_TRY(qie_files_get(files, index, &data, &n, err));
    QIE_FAIL_IF(n > MAX_INDEX_BYTES, QIE_E_CORRUPT, err, index, "'%s' is too large for an index",
                index);
    QIE_FAIL_IF(qie_json_parse((const char *)data, n, "index", &root, &json_err), QIE_E_CORRUPT,
                err, index, "'%s' is damaged: %s", index, json_err.message);
    const qie_json *map = qie_json_member(root, "weight_map");
    size_t named = qie_json_size(map), present = 0;
    if (!qie_json_is_object(map) || !named) {
        st = qie_fail(err, QIE_E_CORRUPT, index, "'%s' has no weight_map", index);
        goto fail;
    }
    QIE_TRY_GOTO(qie_weights_create(index, named, &x.w, err));
    x.shards = calloc(named + 1, sizeof *x.shards);
    if (!x.shards) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    qie_json_each(map, visit_shard, &x);
    QIE_TRY_GOTO(x.st);
    for (size_t f = 0; f < x.w->n_files; f++)
        present += x.w->files[f].n_tensors;
    QIE_TRY_GOTO(qie_weights_reserve(x.w, present, err));
    take_named(&x, map);
    qie_json_each(map, check_found, &x);
    QIE_TRY_GOTO(x.st);
    *out = x.w;
    x.w = NULL;
fail:
    for (size_t i = 0; x.shards && i < named; i++)
        free(x.shards[i]);
    free(x.shards);
    qie_weights_close(x.w);
    qie_json_free(root);
    return st;
}

/* A file of a model's folder as file number w->n_files of w. */
static qie_status add_file(qie_weights *w, qie_files *files, const char *name, qie_error *err) {
    const unsigned char *data;
    size_t n;
    QIE_TRY(qie_files_get(files, name, &data, &n, err));
    char *label = text("%s/%s", qie_files_label(files), name);
    qie_status st = label ? qie_tensor_file_parse(data, n, label, &w->files[w->n_files++], err)
                          : qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    free(label);
    return st;
}

/* All tensors of all files, under the files' own names; those of a file are unique already. */
qie_status qie_weights_take_all(qie_weights *w, qie_error *err) {
    size_t n = 0;
    for (size_t f = 0; f < w->n_files; f++)
        n += w->files[f].n_tensors;
    QIE_TRY(qie_weights_reserve(w, n, err));
    for (size_t f = 0; f < w->n_files; f++)
        for (size_t i = 0; i < w->files[f].n_tensors; i++) {
            const qie_tensor *t = &w->files[f].tensors[i];
            QIE_FAIL_IF(qie_weights_lookup(w, "", t->name), QIE_E_CORRUPT, err, w->label,
                        "'%s' holds the tensor '%s', which another file has, too",
                        w->files[f].label, t->name);
            qie_weights_add(w, t, f, i);
        }
    return QIE_OK;
}

static qie_status open_single(qie_files *files, const char *name, const char *beside,
                              qie_weights **out, qie_error *err) {
    qie_weights *w;
    qie_status st;
    QIE_TRY(qie_weights_create(name, 2, &w, err));
    free(w->label);
    w->label = text("%s/%s", qie_files_label(files), name);
    if (!w->label) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    QIE_TRY_GOTO(add_file(w, files, name, err));
    if (beside && qie_files_exists(files, beside))
        QIE_TRY_GOTO(add_file(w, files, beside, err));
    QIE_TRY_GOTO(qie_weights_take_all(w, err));
    *out = w;
    return QIE_OK;
fail:
    qie_weights_close(w);
    return st;
}

const char *qie_part_name(qie_part part) {
    static const char *const NAMES[] = {"transformer", "text_encoder", "vae"};
    return NAMES[part];
}

/* The first of the standard names that is there; *out stays NULL if none is. */
static qie_status open_standard(qie_files *files, const char *folder, qie_weights **out,
                                qie_error *err) {
    static const char *const NAMES[] = {"diffusion_pytorch_model.safetensors.index.json",
                                        "model.safetensors.index.json",
                                        "diffusion_pytorch_model.safetensors",
                                        "model.safetensors",
                                        "diffusion_pytorch_model.gguf",
                                        "model.gguf"};
    qie_status st = QIE_OK;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES && st == QIE_OK && !*out; i++) {
        char *name = text("%s/%s", folder, NAMES[i]), *beside = text("%s/mmproj.gguf", folder);
        if (!name || !beside)
            st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        else if (qie_files_exists(files, name))
            st = i < 2 ? open_index(files, folder, name, out, err)
                       : open_single(files, name, beside, out, err);
        free(name);
        free(beside);
    }
    return st;
}

qie_status qie_weights_open(qie_files *files, const char *folder, qie_weights **out,
                            qie_error *err) {
    *out = NULL;
    QIE_TRY(open_standard(files, folder, out, err));
    QIE_FAIL_IF(!*out, QIE_E_NOT_FOUND, err, folder,
                "no weights in '%s/%s': neither diffusion_pytorch_model nor model, as .safetensors "
                "(single or with an index) or .gguf; fetch the model with `qwen-edit pull`",
                qie_files_label(files), folder);
    qie_status st = QIE_OK;
    for (int p = 0; p < QIE_PART_COUNT; p++)
        if (!strcmp(folder, qie_part_name((qie_part)p)))
            st = qie_weights_assemble(*out, (qie_part)p, err);
    if (st != QIE_OK) {
        qie_weights_close(*out);
        *out = NULL;
    }
    return st;
}

/* -----------------------------------------------------------------------------------------------
 * look-up */

size_t qie_weights_count(const qie_weights *w) {
    return w->n_tensors;
}

const qie_tensor *qie_weights_at(const qie_weights *w, size_t i) {
    return i < w->n_tensors ? &w->tensors[i] : NULL;
}

const qie_tensor *qie_weights_find(const qie_weights *w, const char *name) {
    const qie_tensor *t = qie_weights_lookup(w, "", name);
    /* transformers 4.52 renamed the text encoder's tensors by prefix alone. */
    if (!t && !strncmp(name, "visual.", 7))
        t = qie_weights_lookup(w, "model.", name);
    if (!t && !strncmp(name, "model.", 6))
        t = qie_weights_lookup(w, "model.language_model.", name + 6);
    return t;
}

/* "[3, 4]"; buf holds 8 dimensions of 20 characters. */
static const char *shape_text(char buf[256], int n_dims, const int64_t *shape) {
    size_t at = 0;
    buf[at++] = '[';
    for (int i = 0; i < n_dims && at < 230; i++)
        at += (size_t)snprintf(buf + at, 256 - at, "%s%lld", i ? ", " : "", (long long)shape[i]);
    snprintf(buf + at, 256 - at, "]");
    return buf;
}

static bool is_float(qie_dtype t) {
    return t == QIE_F32 || t == QIE_BF16 || t == QIE_F16;
}

/* Types that the matrix operations read. */
static bool is_matrix_type(qie_dtype t) {
    return is_float(t) || t == QIE_I8 || t == QIE_F8_E4M3 || t == QIE_F8_E5M2 ||
           qie_dtype_block_elements(t) > 1;
}

static const char *type_of(const qie_weights *w, const qie_tensor *t) {
    size_t i = (size_t)(t - w->tensors);
    return w->files[w->file_of[i]].dtypes[w->in_file[i]];
}

static qie_status wrong_shape(const qie_weights *w, const char *name, const qie_tensor *t,
                              int n_dims, const int64_t *shape, qie_error *err) {
    char a[256], b[256];
    return qie_fail(err, QIE_E_CORRUPT, name, "tensor '%s' in '%s' has shape %s, expected %s", name,
                    qie_weights_file_of(w, t), shape_text(a, t->n_dims, t->shape),
                    shape_text(b, n_dims, shape));
}

qie_status qie_weights_need(const qie_weights *w, const char *name, int n_dims,
                            const int64_t *shape, const qie_tensor **out, qie_error *err) {
    *out = NULL;
    const qie_tensor *t = qie_weights_find(w, name);
    QIE_FAIL_IF(!t, QIE_E_CORRUPT, err, name, "'%s' has no tensor '%s'", w->label, name);
    QIE_FAIL_IF(!is_float(t->dtype), QIE_E_CORRUPT, err, name,
                "tensor '%s' in '%s' has dtype %s, expected F32, BF16 or F16", name,
                qie_weights_file_of(w, t), type_of(w, t));
    bool same = t->n_dims == n_dims;
    for (int d = 0; same && d < n_dims; d++)
        same = t->shape[d] == shape[d];
    if (!same)
        return wrong_shape(w, name, t, n_dims, shape, err);
    *out = t;
    return QIE_OK;
}

qie_status qie_weights_need_linear(const qie_weights *w, const char *name, int64_t n, int64_t k,
                                   const qie_tensor **out, qie_error *err) {
    *out = NULL;
    const qie_tensor *t = qie_weights_find(w, name);
    QIE_FAIL_IF(!t, QIE_E_CORRUPT, err, name, "'%s' has no tensor '%s'", w->label, name);
    const char *file = qie_weights_file_of(w, t);
    QIE_FAIL_IF(!is_matrix_type(t->dtype), QIE_E_CORRUPT, err, name,
                "tensor '%s' in '%s' has dtype %s, which is none of the types of weights", name,
                file, type_of(w, t));
    QIE_FAIL_IF(t->dtype == QIE_I8 && !t->scale, QIE_E_CORRUPT, err, name,
                "tensor '%s' in '%s' is of 8-bit integers and has no scale", name, file);
    /* 1x1 convolutions ([n, k, 1, 1(, 1)]) and the patch embedding ([n, 3, 2, 14, 14]) are linear
     * layers. */
    bool same = t->n_dims >= 2 && t->shape[0] == n && t->n_elements == n * k &&
                (t->n_dims > 2 || t->shape[1] == k);
    const int64_t shape[2] = {n, k};
    if (!same)
        return wrong_shape(w, name, t, 2, shape, err);
    QIE_FAIL_IF(k % qie_dtype_block_elements(t->dtype), QIE_E_CORRUPT, err, name,
                "tensor '%s' in '%s' has rows of %lld elements, which are no whole blocks of %s",
                name, file, (long long)k, type_of(w, t));
    *out = t;
    return QIE_OK;
}

const char *qie_weights_file_of(const qie_weights *w, const qie_tensor *t) {
    if (t < w->tensors || t >= w->tensors + w->n_tensors)
        return w->label;
    return w->files[w->file_of[t - w->tensors]].label;
}

const char *qie_weights_format(const qie_weights *w) {
    return w->n_files ? w->files[0].format : "safetensors";
}

const char *qie_weights_metadata(const qie_weights *w, const char *key) {
    for (size_t f = 0; f < w->n_files; f++) {
        const char *value = qie_tensor_file_meta(&w->files[f], key);
        if (value)
            return value;
    }
    return NULL;
}

bool qie_weights_metadata_at(const qie_weights *w, size_t i, const char **key, const char **value) {
    for (size_t f = 0; f < w->n_files; i -= w->files[f++].n_meta)
        if (i < w->files[f].n_meta) {
            *key = w->files[f].meta[2 * i];
            *value = w->files[f].meta[2 * i + 1];
            return true;
        }
    return false;
}

const qie_meta_array *qie_weights_array(const qie_weights *w, const char *key) {
    const qie_meta_array *found = NULL;
    for (size_t f = 0; f < w->n_files && !found; f++)
        found = qie_tensor_file_array(&w->files[f], key);
    return found;
}

bool qie_weights_marked_zero_cond_t(const qie_weights *w) {
    return w->marked_zero_cond_t;
}

int64_t qie_weights_bytes(const qie_weights *w) {
    return w->bytes;
}

int64_t qie_weights_elements(const qie_weights *w) {
    return w->elements;
}

/* Only hints: errors (memory that is no mapping of a file) are nobody's concern. */
static void advise(const void *data, size_t n_bytes, int advice, const char *what) {
    long page = sysconf(_SC_PAGESIZE);
    if (!n_bytes || page <= 0)
        return;
    uintptr_t from = (uintptr_t)data & ~((uintptr_t)page - 1);
    size_t n = (uintptr_t)data + n_bytes - from;
    double started = qie_now_s();
    (void)madvise((void *)from, n, advice);
    qie_trace_span("weights", started, "%s %zu MiB", what, n >> 20);
}

void qie_weights_prefetch(const void *data, size_t n_bytes) {
    advise(data, n_bytes, MADV_WILLNEED, "ask for");
}

void qie_weights_let_go(const void *data, size_t n_bytes) {
    advise(data, n_bytes, MADV_PAGEOUT, "let go");
}
