#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/blocks.h"
#include "base/error.h"
#include "weights/names.h"
#include "weights/weights_impl.h"

/* A tensor of the files with what its name means. */
typedef struct item {
    char *name; /* owned by the weights */
    qie_name_kind kind;
    qie_tensor tensor;
    uint32_t file, index;
} item;

typedef struct assembly {
    qie_weights *w;
    item *items;
    size_t n, cap;
    qie_error *err;
} assembly;

static qie_status no_memory(const assembly *a) {
    return qie_fail(a->err, QIE_E_NO_MEMORY, NULL, "no memory for the tensors of '%s'",
                    a->w->label);
}

/* Memory that lives as long as the weights; NULL without memory. */
static void *keep(qie_weights *w, void *p) {
    if (p && w->n_owned == w->cap_owned) {
        size_t cap = w->cap_owned ? 2 * w->cap_owned : 64;
        void **more = realloc(w->owned, cap * sizeof *more);
        if (!more) {
            free(p);
            return NULL;
        }
        w->owned = more;
        w->cap_owned = cap;
    }
    if (p)
        w->owned[w->n_owned++] = p;
    return p;
}

static qie_status push(assembly *a, const char *name, qie_name_kind kind, const qie_tensor *t,
                       uint32_t file, uint32_t index) {
    if (a->n == a->cap) {
        size_t cap = a->cap ? 2 * a->cap : 256;
        item *more = realloc(a->items, cap * sizeof *more);
        if (!more)
            return no_memory(a);
        a->items = more;
        a->cap = cap;
    }
    item *x = &a->items[a->n];
    *x = (item){keep(a->w, strdup(name)), kind, *t, file, index};
    if (!x->name)
        return no_memory(a);
    x->tensor.name = x->name;
    a->n++;
    return QIE_OK;
}

static qie_status collect(assembly *a, qie_part part) {
    qie_weights *w = a->w;
    int up_period = 0;
    char name[QIE_NAME_BYTES];
    for (size_t i = 0; part == QIE_PART_VAE && i < w->n_tensors; i++) {
        int period = qie_name_up_period(w->tensors[i].name);
        if (period && (!up_period || period < up_period))
            up_period = period;
    }
    for (size_t i = 0; i < w->n_tensors; i++) {
        qie_name_kind kind = qie_name_map(part, w->tensors[i].name, up_period, name);
        if (kind == QIE_NAME_MARKER && strstr(w->tensors[i].name, "__index_timestep_zero__"))
            w->marked_zero_cond_t = true;
        if (kind == QIE_NAME_TENSOR || kind == QIE_NAME_SCALE)
            QIE_TRY(push(a, name, kind, &w->tensors[i], w->file_of[i], w->in_file[i]));
    }
    return QIE_OK;
}

static int by_name(const void *a, const void *b) {
    const item *x = a, *y = b;
    int c = strcmp(x->name, y->name);
    return c ? c : (int)x->kind - (int)y->kind;
}

static item *find(const assembly *a, const char *name) {
    item key = {.name = (char *)(uintptr_t)name, .kind = QIE_NAME_TENSOR};
    return a->n ? bsearch(&key, a->items, a->n, sizeof key, by_name) : NULL;
}

static void sort(assembly *a) {
    if (a->n)
        qsort(a->items, a->n, sizeof *a->items, by_name);
}

/* After sorting: two tensors, or two scales, under one name. */
static qie_status check_unique(const assembly *a) {
    for (size_t i = 1; i < a->n; i++) {
        const item *x = &a->items[i - 1], *y = &a->items[i];
        if (!by_name(x, y)) {
            const qie_tensor_file *f = a->w->files;
            return qie_fail(a->err, QIE_E_CORRUPT, a->w->label,
                            "'%s' and '%s' hold the tensor '%s' both: as '%s' and '%s'",
                            f[x->file].label, f[y->file].label, x->name,
                            f[x->file].tensors[x->index].name, f[y->file].tensors[y->index].name);
        }
    }
    return QIE_OK;
}

/* n elements as new floats of the weights. */
static float *floats(assembly *a, const qie_tensor *t, qie_status *st) {
    float *p = keep(a->w, malloc((size_t)(t->n_elements + 1) * sizeof *p));
    *st = p ? QIE_OK : no_memory(a);
    if (p && qie_to_f32(p, t->data, t->dtype, (size_t)t->n_elements))
        *st = qie_fail(a->err, QIE_E_CORRUPT, t->name, "'%s' has type %s in '%s'", t->name,
                       qie_dtype_name(t->dtype), a->w->label);
    return p;
}

/* Scales become part of their weight. */
static qie_status attach_scales(assembly *a) {
    for (size_t i = 0; i < a->n; i++) {
        item *s = &a->items[i];
        if (s->kind != QIE_NAME_SCALE)
            continue;
        const char *own = a->w->files[s->file].tensors[s->index].name;
        item *x = find(a, s->name);
        QIE_FAIL_IF(!x, QIE_E_CORRUPT, a->err, own, "scale '%s' in '%s' has no weight '%s'", own,
                    a->w->files[s->file].label, s->name);
        int64_t n = s->tensor.n_elements, rows = x->tensor.n_dims ? x->tensor.shape[0] : 1;
        QIE_FAIL_IF(n != 1 && n != rows, QIE_E_CORRUPT, a->err, own,
                    "scale '%s' in '%s' has %lld values for %lld rows", own,
                    a->w->files[s->file].label, (long long)n, (long long)rows);
        qie_status st;
        x->tensor.scale = floats(a, &s->tensor, &st);
        x->tensor.n_scale = n;
        QIE_TRY(st);
    }
    return QIE_OK;
}

/* Norms and biases that a converter put into another type than floats of 16 or 32 bits. */
static qie_status widen_vectors(assembly *a) {
    for (size_t i = 0; i < a->n; i++) {
        qie_tensor *t = &a->items[i].tensor;
        bool plain = t->dtype == QIE_F32 || t->dtype == QIE_BF16 || t->dtype == QIE_F16;
        if (a->items[i].kind != QIE_NAME_TENSOR || plain || t->n_dims != 1 ||
            t->dtype == QIE_DTYPE_COUNT)
            continue;
        qie_status st;
        float scale = t->scale && t->n_scale == 1 ? *t->scale : 1, *p = floats(a, t, &st);
        if (st != QIE_OK && st != QIE_E_NO_MEMORY)
            continue; /* integers: refused when they are asked for */
        QIE_TRY(st);
        for (int64_t k = 0; k < t->n_elements; k++)
            p[k] *= t->scale && t->n_scale > 1 ? t->scale[k] : scale;
        t->data = p;
        t->dtype = QIE_F32;
        t->n_bytes = (size_t)t->n_elements * sizeof *p;
        t->scale = NULL;
    }
    return QIE_OK;
}

/* Rows [from, from + n) of t. */
static qie_tensor rows_of(const qie_tensor *t, int64_t from, int64_t n) {
    qie_tensor part = *t;
    size_t row = t->n_bytes / (size_t)t->shape[0];
    part.shape[0] = n;
    part.n_elements = t->n_elements / t->shape[0] * n;
    part.data = (const unsigned char *)t->data + row * (size_t)from;
    part.n_bytes = row * (size_t)n;
    if (t->scale && t->n_scale > 1) {
        part.scale = t->scale + from;
        part.n_scale = n;
    }
    return part;
}

/* Query, key and value in one tensor are three views into it. */
static qie_status split_fused(assembly *a) {
    static const struct {
        const char *fused, *parts[3];
    } FUSED[] = {
        {".attn.to_qkv.", {".attn.to_q.", ".attn.to_k.", ".attn.to_v."}},
        {".attn.add_qkv_proj.", {".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."}},
    };
    size_t n = a->n;
    bool any = false;
    for (size_t i = 0; i < n; i++)
        for (size_t f = 0; f < 2; f++) {
            item x = a->items[i];
            const char *at = strstr(x.name, FUSED[f].fused);
            if (x.kind != QIE_NAME_TENSOR || !at || x.tensor.n_dims < 1 || !x.tensor.n_elements ||
                x.tensor.shape[0] % 3)
                continue;
            for (int k = 0; k < 3; k++) {
                char name[QIE_NAME_BYTES];
                int64_t rows = x.tensor.shape[0] / 3;
                snprintf(name, sizeof name, "%.*s%s%s", (int)(at - x.name), x.name,
                         FUSED[f].parts[k], at + strlen(FUSED[f].fused));
                qie_tensor part = rows_of(&x.tensor, k * rows, rows);
                QIE_TRY(push(a, name, QIE_NAME_TENSOR, &part, x.file, x.index));
            }
            a->items[i].kind = QIE_NAME_MARKER; /* its parts stand for it */
            any = true;
        }
    if (any)
        sort(a);
    return QIE_OK;
}

/* Two slices [n, 3, p, p] of the patch embedding, one per moment, to [n, 3, 2, p, p]. */
static qie_status join_patches(assembly *a) {
    item *first = find(a, "visual.patch_embed.proj.weight");
    item *second = find(a, "visual.patch_embed.proj.weight.1");
    if (!first || !second)
        return QIE_OK;
    qie_tensor *t = &first->tensor, *u = &second->tensor;
    bool same = t->n_dims == 4 && u->n_dims == 4 && t->dtype < QIE_DTYPE_COUNT &&
                u->dtype < QIE_DTYPE_COUNT && !memcmp(t->shape, u->shape, 4 * sizeof *t->shape);
    QIE_FAIL_IF(!same, QIE_E_CORRUPT, a->err, a->w->label,
                "the two halves of the patch embedding in '%s' do not fit", a->w->label);
    qie_status st;
    float *x = floats(a, t, &st);
    QIE_TRY(st);
    float *y = floats(a, u, &st);
    QIE_TRY(st);
    int64_t area = t->shape[2] * t->shape[3], planes = t->shape[0] * t->shape[1];
    float *joined = keep(a->w, malloc((size_t)(2 * t->n_elements + 1) * sizeof *joined));
    if (!joined)
        return no_memory(a);
    for (int64_t p = 0; p < planes; p++) {
        memcpy(joined + 2 * p * area, x + p * area, (size_t)area * sizeof *x);
        memcpy(joined + (2 * p + 1) * area, y + p * area, (size_t)area * sizeof *y);
    }
    const int64_t shape[5] = {t->shape[0], t->shape[1], 2, t->shape[2], t->shape[3]};
    memcpy(t->shape, shape, sizeof shape);
    t->n_dims = 5;
    t->n_elements *= 2;
    t->n_bytes = (size_t)t->n_elements * sizeof *joined;
    t->dtype = QIE_F32;
    t->data = joined;
    second->kind = QIE_NAME_MARKER;
    return QIE_OK;
}

/* Some mmproj files call the projections of the vision tower's MLP the other way round: "down" is
 * the one that gives as many values as the norm takes. */
static void turn_mlp(assembly *a) {
    for (size_t i = 0; i < a->n; i++) {
        item *down = &a->items[i];
        char name[QIE_NAME_BYTES];
        const char *at = strstr(down->name, ".mlp.down_proj.weight");
        if (strncmp(down->name, "visual.blocks.", 14) || !at || down->tensor.n_dims != 2)
            continue;
        int n = (int)(at - down->name);
        snprintf(name, sizeof name, "%.*s.norm1.weight", n, down->name);
        const item *norm = find(a, name);
        snprintf(name, sizeof name, "%.*s.mlp.up_proj.weight", n, down->name);
        item *up = find(a, name);
        if (!norm || !up || down->tensor.shape[0] == norm->tensor.n_elements ||
            up->tensor.n_dims != 2 || up->tensor.shape[0] != norm->tensor.n_elements)
            continue;
        for (int bias = 0; bias < 2; bias++) {
            snprintf(name, sizeof name, "%.*s.mlp.up_proj.%s", n, down->name,
                     bias ? "bias" : "weight");
            item *x = find(a, name);
            snprintf(name, sizeof name, "%.*s.mlp.down_proj.%s", n, down->name,
                     bias ? "bias" : "weight");
            item *y = find(a, name);
            if (x && y) { /* contents change places, names stay */
                item t = *x;
                *x = (item){x->name, x->kind, y->tensor, y->file, y->index};
                *y = (item){y->name, y->kind, t.tensor, t.file, t.index};
                x->tensor.name = x->name;
                y->tensor.name = y->name;
            }
        }
    }
}

/* The items as the tensors of w. */
static qie_status rebuild(assembly *a) {
    qie_weights *w = a->w;
    free(w->tensors);
    free(w->file_of);
    free(w->in_file);
    free(w->slots);
    w->tensors = NULL;
    w->file_of = w->in_file = w->slots = NULL;
    w->n_tensors = 0;
    w->bytes = w->elements = 0;
    QIE_TRY(qie_weights_reserve(w, a->n, a->err));
    for (size_t i = 0; i < a->n; i++)
        if (a->items[i].kind == QIE_NAME_TENSOR)
            qie_weights_add(w, &a->items[i].tensor, a->items[i].file, a->items[i].index);
    return QIE_OK;
}

qie_status qie_weights_assemble(qie_weights *w, qie_part part, qie_error *err) {
    assembly a = {.w = w, .err = err};
    qie_status st;
    QIE_TRY_GOTO(collect(&a, part));
    sort(&a);
    QIE_TRY_GOTO(check_unique(&a));
    QIE_TRY_GOTO(attach_scales(&a));
    QIE_TRY_GOTO(widen_vectors(&a));
    if (part == QIE_PART_TRANSFORMER)
        QIE_TRY_GOTO(split_fused(&a));
    if (part == QIE_PART_TEXT_ENCODER) {
        QIE_TRY_GOTO(join_patches(&a));
        turn_mlp(&a);
    }
    QIE_TRY_GOTO(check_unique(&a));
    QIE_TRY_GOTO(rebuild(&a));
fail:
    free(a.items);
    return st;
}
