#define _GNU_SOURCE
#include "model/adapters.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/error.h"
#include "base/log.h"

typedef struct kept {
    char *path;
    struct stat stat; /* of the file when it was opened */
    qie_lora *lora;
    qie_lora_match *matches;
    size_t n_matches;
    uint64_t last_used, id; /* selections and openings so far */
} kept;

struct qie_adapters {
    qie_lora_target *targets;
    qie_linear **linears; /* of the targets */
    size_t n_targets, cap;
    qie_lora_table *table;
    bool zero_cond_t, no_memory;
    kept kept[QIE_ADAPTERS_KEPT];
    uint64_t n_selections, n_opened;
    qie_lowrank *terms; /* of all layers in force, those of a layer side by side */
    qie_adapters_active active;
};

static void add_target(void *arg, const char *name, qie_linear *l) {
    qie_adapters *a = arg;
    if (a->n_targets == a->cap) {
        size_t cap = a->cap ? 2 * a->cap : 256;
        qie_lora_target *t = realloc(a->targets, cap * sizeof *t);
        if (t)
            a->targets = t;
        qie_linear **p = realloc(a->linears, cap * sizeof *p);
        if (p)
            a->linears = p;
        if (!t || !p) {
            a->no_memory = true;
            return;
        }
        a->cap = cap;
    }
    qie_lora_part part = !strncmp(name, "model.", 6) || !strncmp(name, "visual.", 7)
                             ? QIE_LORA_TEXT_ENCODER
                             : QIE_LORA_TRANSFORMER;
    char *own = strdup(name);
    a->no_memory = a->no_memory || !own;
    a->targets[a->n_targets] = (qie_lora_target){own, part, l->w.n, l->w.k};
    a->linears[a->n_targets++] = l;
}

qie_status qie_adapters_create(void (*each)(void *model, qie_linear_fn fn, void *arg), void *model,
                               bool zero_cond_t, qie_adapters **out, qie_error *err) {
    *out = NULL;
    qie_adapters *a = calloc(1, sizeof *a);
    QIE_FAIL_IF(!a, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    a->zero_cond_t = zero_cond_t;
    each(model, add_target, a);
    qie_status st = a->no_memory ? qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory")
                                 : qie_lora_table_create(a->targets, a->n_targets, &a->table, err);
    if (st != QIE_OK) {
        qie_adapters_destroy(a);
        return st;
    }
    *out = a;
    return QIE_OK;
}

static void kept_release(kept *k) {
    free(k->path);
    free(k->matches);
    qie_lora_close(k->lora);
    memset(k, 0, sizeof *k);
}

/* No layer has terms any more. */
static void clear(qie_adapters *a) {
    for (size_t i = 0; i < a->n_targets; i++) {
        a->linears[i]->lowrank = NULL;
        a->linears[i]->n_lowrank = 0;
    }
    free(a->terms);
    a->terms = NULL;
    memset(&a->active, 0, sizeof a->active);
}

void qie_adapters_destroy(qie_adapters *a) {
    if (!a)
        return;
    /* The layers may be gone already: only what is ours is freed. */
    for (size_t i = 0; i < QIE_ADAPTERS_KEPT; i++)
        kept_release(&a->kept[i]);
    for (size_t i = 0; i < a->n_targets; i++)
        free((void *)(uintptr_t)a->targets[i].name);
    qie_lora_table_destroy(a->table);
    free(a->terms);
    free(a->targets);
    free(a->linears);
    free(a);
}

const qie_adapters_active *qie_adapters_get(const qie_adapters *a) {
    return &a->active;
}

static bool same_file(const kept *k, const char *path, const struct stat *s) {
    return k->path && !strcmp(k->path, path) && k->stat.st_dev == s->st_dev &&
           k->stat.st_ino == s->st_ino && k->stat.st_size == s->st_size &&
           k->stat.st_mtim.tv_sec == s->st_mtim.tv_sec &&
           k->stat.st_mtim.tv_nsec == s->st_mtim.tv_nsec;
}

/* Let go of those not used for longest while all together hold too much. */
static void trim(qie_adapters *a) {
    for (;;) {
        size_t held = 0;
        kept *oldest = NULL;
        for (size_t i = 0; i < QIE_ADAPTERS_KEPT; i++) {
            kept *k = &a->kept[i];
            size_t own = k->lora ? qie_lora_own_bytes(k->lora) : 0;
            held += own;
            if (own && k->last_used != a->n_selections &&
                (!oldest || k->last_used < oldest->last_used))
                oldest = k;
        }
        if (held <= QIE_ADAPTERS_OWN_BYTES || !oldest)
            return;
        kept_release(oldest);
    }
}

/* The file at path, opened and matched; from the kept ones if it has not changed. */
static qie_status obtain(qie_adapters *a, const char *path, kept **out, qie_error *err) {
    struct stat s;
    kept *oldest = NULL;
    QIE_FAIL_IF(stat(path, &s) != 0, QIE_E_NOT_FOUND, err, "lora", "LoRA '%s' does not exist",
                path);
    QIE_FAIL_IF(!S_ISREG(s.st_mode), QIE_E_INVALID, err, "lora", "LoRA '%s' is not a file", path);
    for (size_t i = 0; i < QIE_ADAPTERS_KEPT; i++) {
        kept *k = &a->kept[i];
        if (same_file(k, path, &s)) {
            k->last_used = a->n_selections;
            *out = k;
            return QIE_OK;
        }
        /* Those of the selection that is being made stay. */
        if (k->last_used != a->n_selections && (!oldest || k->last_used < oldest->last_used))
            oldest = k;
    }
    _Static_assert(QIE_MAX_LORAS <= QIE_ADAPTERS_KEPT, "a selection fits");
    kept_release(oldest);
    qie_status st = qie_lora_open(path, &oldest->lora, err);
    if (st == QIE_OK)
        st = qie_lora_match_all(oldest->lora, a->table, a->zero_cond_t, &oldest->matches,
                                &oldest->n_matches, err);
    if (st == QIE_OK && !(oldest->path = strdup(path)))
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (st != QIE_OK) {
        kept_release(oldest);
        return st;
    }
    oldest->stat = s;
    oldest->last_used = a->n_selections;
    oldest->id = ++a->n_opened;
    *out = oldest;
    return QIE_OK;
}

static qie_lowrank term_of(const qie_lora_match *m, const qie_linear *l, double weight) {
    const qie_lora_module *d = m->module;
    size_t skip = (size_t)(m->up_row * d->rank) * qie_dtype_size(d->up->dtype);
    qie_lowrank t = {
        .down = {.data = d->down->data, .dtype = d->down->dtype, .n = d->rank, .k = d->k},
        .up = {.data = (const unsigned char *)d->up->data + skip,
               .dtype = d->up->dtype,
               .n = l->w.n,
               .k = d->rank},
        .scale = (float)(weight * d->scale)};
    return t;
}

/* Terms of the chosen files to their layers. */
static qie_status attach(qie_adapters *a, kept *const *files, const qie_lora_use *uses, size_t n,
                         qie_error *err) {
    size_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += files[i]->n_matches;
    size_t *first = calloc(a->n_targets + 1, sizeof *first);
    a->terms = calloc(total + 1, sizeof *a->terms);
    if (!first || !a->terms) {
        free(first);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < files[i]->n_matches; k++)
            first[files[i]->matches[k].i_target + 1]++;
    for (size_t i = 0; i < a->n_targets; i++)
        first[i + 1] += first[i];
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; uses[i].weight != 0 && k < files[i]->n_matches; k++) {
            const qie_lora_match *m = &files[i]->matches[k];
            qie_linear *l = a->linears[m->i_target];
            a->terms[first[m->i_target] + l->n_lowrank++] = term_of(m, l, uses[i].weight);
            if (a->targets[m->i_target].part == QIE_LORA_TRANSFORMER)
                a->active.flops += 2.0 * (double)m->module->rank * (double)(l->w.n + l->w.k);
        }
    for (size_t i = 0; i < a->n_targets; i++) {
        qie_linear *l = a->linears[i];
        int64_t rank = 0;
        l->lowrank = l->n_lowrank ? a->terms + first[i] : NULL;
        for (size_t k = 0; k < l->n_lowrank; k++)
            rank += l->lowrank[k].down.n;
        a->active.rank = rank > a->active.rank ? rank : a->active.rank;
    }
    free(first);
    return QIE_OK;
}

static void describe(qie_adapters *a, kept *const *files, const qie_lora_use *uses, size_t n) {
    qie_adapters_active *v = &a->active;
    v->n = n;
    for (size_t i = 0; i < n; i++) {
        const qie_lora *l = files[i]->lora;
        snprintf(v->loras[i].name, sizeof v->loras[i].name, "%s",
                 uses[i].name ? uses[i].name : l->name);
        v->loras[i].weight = uses[i].weight;
        v->loras[i].id = files[i]->id;
        v->loras[i].n_modules = (int)l->n_modules;
        v->loras[i].max_rank = l->max_rank;
        bool from_metadata;
        const char *base = qie_lora_base(l, &from_metadata);
        if (base && !strcmp(base, "2511") != a->zero_cond_t)
            qie_log(QIE_LOG_WARN, "lora",
                    "'%s' is named after Qwen-Image-Edit-%s, which %s "
                    "zero_cond_t, and this model %s: its effect may be weaker or wrong",
                    l->name, base, a->zero_cond_t ? "has no" : "has",
                    a->zero_cond_t ? "has it" : "has it not");
        if (!l->preset.lightning || uses[i].weight == 0 || v->preset.lightning)
            continue;
        v->preset = l->preset;
        snprintf(v->preset_from, sizeof v->preset_from, "LoRA '%s' by %s", v->loras[i].name,
                 l->preset_from);
    }
}

static bool unchanged(const qie_adapters *a, kept *const *files, const qie_lora_use *uses,
                      size_t n) {
    bool same = n == a->active.n;
    for (size_t i = 0; i < n && same; i++)
        same = files[i]->id == a->active.loras[i].id &&
               uses[i].weight == a->active.loras[i].weight &&
               !strncmp(uses[i].name ? uses[i].name : files[i]->lora->name, a->active.loras[i].name,
                        sizeof a->active.loras[i].name - 1);
    return same;
}

qie_status qie_adapters_select(qie_adapters *a, const qie_lora_use *uses, size_t n,
                               qie_error *err) {
    kept *files[QIE_MAX_LORAS];
    qie_status st = QIE_OK;
    a->n_selections++;
    if (n > QIE_MAX_LORAS)
        st =
            qie_fail(err, QIE_E_INVALID, "lora", "%zu LoRAs, at most %d at once", n, QIE_MAX_LORAS);
    for (size_t i = 0; i < n && st == QIE_OK; i++)
        st = fabs(uses[i].weight) <= 100
                 ? obtain(a, uses[i].path, &files[i], err)
                 : qie_fail(err, QIE_E_INVALID, "lora",
                            "weight %g of LoRA '%s' is not within -100..100", uses[i].weight,
                            uses[i].path);
    if (st == QIE_OK && unchanged(a, files, uses, n))
        return QIE_OK;
    clear(a);
    trim(a);
    if (st == QIE_OK)
        st = attach(a, files, uses, n, err);
    if (st == QIE_OK)
        describe(a, files, uses, n);
    else
        clear(a);
    return st;
}

size_t qie_adapters_spans(const qie_adapters *a, qie_weight_span *out, size_t cap) {
    size_t n = 0;
    for (size_t i = 0; i < a->n_targets; i++)
        for (size_t k = 0; k < a->linears[i]->n_lowrank; k++) {
            const qie_lowrank *t = &a->linears[i]->lowrank[k];
            const qie_wmat *m[2] = {&t->down, &t->up};
            for (int j = 0; j < 2; j++, n++)
                if (n < cap)
                    out[n] = (qie_weight_span){
                        m[j]->data, (size_t)m[j]->n * qie_dtype_row_bytes(m[j]->dtype, m[j]->k)};
        }
    return n;
}
