#define _GNU_SOURCE
#include "service/master/loras.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/error.h"
#include "base/strbuf.h"
#include "hub/lora_preset.h"

#define MAX_WEIGHT 100.0 /* as qie_lora_use */
#define NAMES_TOLD 500   /* bytes of names in a message */

/* ---------------------------------------------------------------- the folder */

static int by_name(const void *a, const void *b) {
    return strcmp(((const svc_lora_file *)a)->name, ((const svc_lora_file *)b)->name);
}

/* NAME of NAME.safetensors. */
static bool name_of(const char *file, char out[SVC_LORA_NAME]) {
    size_t n = strlen(file), k = strlen(SVC_LORA_ENDING);
    if (n <= k || n - k >= SVC_LORA_NAME || strcmp(file + n - k, SVC_LORA_ENDING) != 0)
        return false;
    memcpy(out, file, n - k);
    out[n - k] = 0;
    return svc_lora_name_is_valid(out);
}

qie_status svc_loras_read(const char *dir, svc_lora_list *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    DIR *d = opendir(dir);
    QIE_FAIL_IF(!d, QIE_E_IO, err, "lora", "cannot read the folder of LoRAs: %s", strerror(errno));
    out->files = calloc(SVC_MAX_LORA_FILES, sizeof *out->files);
    if (!out->files) {
        closedir(d);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    for (struct dirent *e; out->n < SVC_MAX_LORA_FILES && (e = readdir(d)) != NULL;) {
        svc_lora_file *f = &out->files[out->n];
        struct stat s;
        if (!name_of(e->d_name, f->name) || fstatat(dirfd(d), e->d_name, &s, 0) ||
            !S_ISREG(s.st_mode))
            continue;
        f->n_bytes = s.st_size;
        out->n++;
    }
    closedir(d);
    qsort(out->files, out->n, sizeof *out->files, by_name);
    return QIE_OK;
}

void svc_loras_release(svc_lora_list *l) {
    free(l->files);
    memset(l, 0, sizeof *l);
}

/* ---------------------------------------------------------------- the field */

static qie_status bad(qie_error *err, const char *what) {
    return qie_fail(err, QIE_E_INVALID, "lora", "'lora' %s", what);
}

static qie_status add(svc_params *p, const char *name, size_t n, double weight, qie_error *err) {
    size_t k = strlen(SVC_LORA_ENDING);
    if (p->n_loras < 0)
        p->n_loras = 0;
    QIE_FAIL_IF(p->n_loras == SVC_MAX_LORAS, QIE_E_INVALID, err, "lora",
                "'lora' names more than %d", SVC_MAX_LORAS);
    if (n > k && !memcmp(name + n - k, SVC_LORA_ENDING, k))
        n -= k;
    svc_lora *l = &p->loras[p->n_loras];
    if (n >= sizeof l->name || memchr(name, 0, n))
        return bad(err, "names no file: a name has at most 127 bytes");
    memcpy(l->name, name, n);
    l->name[n] = 0;
    if (!svc_lora_name_is_valid(l->name))
        return bad(err, "must name files by their names alone: no folders, nothing hidden");
    QIE_FAIL_IF(!(fabs(weight) <= MAX_WEIGHT), QIE_E_INVALID, err, "lora",
                "the weight of '%s' is not within -%g..%g", l->name, MAX_WEIGHT, MAX_WEIGHT);
    l->weight = weight;
    p->n_loras++;
    return QIE_OK;
}

qie_status svc_loras_add_text(svc_params *p, const char *text, size_t n, qie_error *err) {
    char number[40];
    const char *colon = memrchr(text, ':', n);
    double weight = 1;
    size_t left = colon ? n - (size_t)(colon + 1 - text) : 0;
    if (colon && left > 0 && left < sizeof number) { /* a name may hold colons too */
        char *end;
        memcpy(number, colon + 1, left);
        number[left] = 0;
        double w = strtod(number, &end);
        if (*end == 0 && end != number && isfinite(w) && strpbrk(number, "xXpP ") == NULL) {
            weight = w;
            n = (size_t)(colon - text);
        }
    }
    return add(p, text, n, weight, err);
}

typedef struct one_lora {
    const char *name;
    size_t n;
    double weight;
    bool weighed;
    qie_error *err;
    qie_status st;
} one_lora;

static bool lora_member(void *arg, const char *key, qie_json *v) {
    one_lora *o = arg;
    if (!strcmp(key, "name") && qie_json_is_string(v))
        o->name = qie_json_string(v, &o->n);
    else if (!strcmp(key, "weight") && qie_json_is_number(v))
        o->weight = qie_json_number(v);
    else if (!strcmp(key, "name") || !strcmp(key, "weight"))
        o->st = bad(o->err, *key == 'n' ? "needs a text as name" : "needs a number as weight");
    else
        o->st = qie_fail(o->err, QIE_E_INVALID, "lora", "'lora' has no member '%.40s'", key);
    return o->st == QIE_OK;
}

static qie_status add_one(svc_params *p, const qie_json *v, qie_error *err) {
    one_lora o = {.weight = 1, .err = err};
    size_t n;
    const char *text = qie_json_string(v, &n);
    if (text)
        return svc_loras_add_text(p, text, n, err);
    if (!qie_json_is_object(v))
        return bad(err, "must hold names, or objects with name and weight");
    qie_json_each(v, lora_member, &o);
    QIE_TRY(o.st);
    return o.name ? add(p, o.name, o.n, o.weight, err) : bad(err, "has an object without a name");
}

qie_status svc_loras_add_json(svc_params *p, const qie_json *v, qie_error *err) {
    if (!qie_json_is_array(v))
        return add_one(p, v, err);
    if (p->n_loras < 0)
        p->n_loras = 0;
    for (size_t i = 0; i < qie_json_size(v); i++)
        QIE_TRY(add_one(p, qie_json_at(v, i), err));
    return QIE_OK;
}

/* "a, b, c and 5 more" */
static void tell_names(const svc_lora_list *l, qie_strbuf *b) {
    for (size_t i = 0; i < l->n; i++) {
        if (b->len + strlen(l->files[i].name) > NAMES_TOLD) {
            qie_strbuf_printf(b, " and %zu more", l->n - i);
            return;
        }
        qie_strbuf_printf(b, "%s%s", i ? ", " : "", l->files[i].name);
    }
}

static bool is_there(const char *dir, const char *name) {
    struct stat s;
    char *path = svc_lora_path(dir, name);
    bool ok = path && !stat(path, &s) && S_ISREG(s.st_mode);
    free(path);
    return ok;
}

qie_status svc_loras_check(const char *dir, const svc_params *p, qie_error *err) {
    svc_lora_list list;
    qie_strbuf b;
    int i = 0;
    if (p->n_loras <= 0)
        return QIE_OK;
    QIE_FAIL_IF(!dir, QIE_E_INVALID, err, "lora",
                "'lora' names '%s', and this service was started without --lora-dir",
                p->loras[0].name);
    while (i < p->n_loras && is_there(dir, p->loras[i].name))
        i++;
    if (i == p->n_loras)
        return QIE_OK;
    qie_strbuf_init(&b, 4096);
    if (svc_loras_read(dir, &list, NULL) == QIE_OK)
        tell_names(&list, &b);
    qie_status st =
        qie_fail(err, QIE_E_INVALID, "lora", "there is no LoRA '%s'; %s%s", p->loras[i].name,
                 b.len ? "there are: " : "there is none", b.len && !b.failed ? b.data : "");
    qie_strbuf_release(&b);
    svc_loras_release(&list);
    return st;
}

/* ---------------------------------------------------------------- for people */

typedef struct note {
    char name[SVC_LORA_NAME];
    struct stat file;
    qie_preset preset;
} note;

struct svc_lora_presets {
    const char *dir;
    pthread_mutex_t lock; /* of what follows */
    note *notes;          /* room for SVC_MAX_LORA_FILES */
    size_t n;
};

qie_status svc_lora_presets_create(const char *dir, svc_lora_presets **out, qie_error *err) {
    svc_lora_presets *k = calloc(1, sizeof *k);
    note *notes = calloc(SVC_MAX_LORA_FILES, sizeof *notes);
    if (!k || !notes) {
        free(k);
        free(notes);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    k->dir = dir;
    k->notes = notes;
    pthread_mutex_init(&k->lock, NULL);
    *out = k;
    return QIE_OK;
}

void svc_lora_presets_destroy(svc_lora_presets *k) {
    if (!k)
        return;
    pthread_mutex_destroy(&k->lock);
    free(k->notes);
    free(k);
}

static bool unchanged(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec &&
           a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

static note *find_note(const svc_lora_presets *k, const char *name) {
    for (size_t i = 0; i < k->n; i++)
        if (!strcmp(k->notes[i].name, name))
            return &k->notes[i];
    return NULL;
}

/* What the worker will find in the file. */
static qie_preset preset_of(svc_lora_presets *k, const char *name) {
    note now = {0};
    char *path = svc_lora_path(k->dir, name);
    bool there = path && stat(path, &now.file) == 0;
    pthread_mutex_lock(&k->lock);
    const note *old = there ? find_note(k, name) : NULL;
    bool known = old && unchanged(&old->file, &now.file);
    if (known)
        now.preset = old->preset;
    pthread_mutex_unlock(&k->lock);
    if (there && !known) {
        snprintf(now.name, sizeof now.name, "%s", name);
        now.preset = qie_hub_lora_preset(path);
        if (now.preset.lightning && !now.preset.num_inference_steps)
            now.preset.num_inference_steps = QIE_LIGHTNING_STEPS;
        pthread_mutex_lock(&k->lock);
        note *slot = find_note(k, name);
        if (!slot) {
            k->n %= SVC_MAX_LORA_FILES; /* full of files that have gone, most likely */
            slot = &k->notes[k->n++];
        }
        *slot = now;
        pthread_mutex_unlock(&k->lock);
    }
    free(path);
    return now.preset;
}

qie_json *svc_loras_json(svc_lora_presets *k) {
    qie_json *out = qie_json_new_array();
    svc_lora_list list = {0};
    if (k && svc_loras_read(k->dir, &list, NULL) != QIE_OK)
        list.n = 0;
    for (size_t i = 0; i < list.n; i++) {
        qie_json *o = qie_json_new_object();
        qie_preset preset = preset_of(k, list.files[i].name);
        qie_json_put(o, "name", qie_json_new_string(list.files[i].name));
        qie_json_put(o, "bytes", qie_json_new_int(list.files[i].n_bytes));
        if (preset.lightning) {
            qie_json_put(o, "num_inference_steps", qie_json_new_int(preset.num_inference_steps));
            qie_json_put(o, "true_cfg_scale", qie_json_new_double(1));
        }
        qie_json_push(out, o);
    }
    svc_loras_release(&list);
    return out;
}

void svc_loras_defaults(svc_lora_presets *k, const svc_params *p, int *steps,
                        double *true_cfg_scale) {
    for (int i = 0; k && i < p->n_loras; i++) {
        qie_preset preset = {0};
        if (p->loras[i].weight != 0)
            preset = preset_of(k, p->loras[i].name);
        if (!preset.lightning)
            continue;
        *steps = preset.num_inference_steps;
        *true_cfg_scale = 1;
        return;
    }
}
