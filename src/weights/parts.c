/* Files that people name for one part of a model: what they hold, and whether it is all there. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/strbuf.h"
#include "plan/tensors.h"
#include "weights/names.h"
#include "weights/weights_impl.h"

unsigned qie_weights_holds(const qie_weights *raw) {
    static const struct {
        qie_part part;
        unsigned bit;
        const char *name;
    } SIGNS[] = {
        {QIE_PART_TRANSFORMER, QIE_HOLDS_TRANSFORMER, "transformer_blocks.0.img_mod.1.weight"},
        {QIE_PART_TEXT_ENCODER, QIE_HOLDS_LANGUAGE, "model.layers.0.self_attn.q_proj.weight"},
        {QIE_PART_TEXT_ENCODER, QIE_HOLDS_VISION, "visual.blocks.0.norm1.weight"},
        {QIE_PART_VAE, QIE_HOLDS_VAE, "decoder.conv_in.weight"},
    };
    unsigned bits = 0;
    char name[QIE_NAME_BYTES];
    for (size_t i = 0; i < raw->n_tensors; i++) {
        const char *own = raw->tensors[i].name;
        if (strstr(own, ".lora_A") || strstr(own, ".lora_down"))
            bits |= QIE_HOLDS_LORA;
        for (size_t s = 0; s < sizeof SIGNS / sizeof *SIGNS; s++)
            if (qie_name_map(SIGNS[s].part, own, 0, name) == QIE_NAME_TENSOR &&
                !strcmp(name, SIGNS[s].name))
                bits |= SIGNS[s].bit;
    }
    return bits;
}

static const char *words_of(unsigned holds) {
    if (holds & QIE_HOLDS_LORA)
        return "a LoRA";
    switch (holds) {
    case QIE_HOLDS_TRANSFORMER: return "a transformer of the Qwen-Image family";
    case QIE_HOLDS_LANGUAGE: return "a language model without its vision tower";
    case QIE_HOLDS_VISION: return "the vision tower of a text encoder";
    case QIE_HOLDS_LANGUAGE | QIE_HOLDS_VISION: return "a text encoder";
    case QIE_HOLDS_VAE: return "a VAE";
    case 0: return "none of the parts of this model";
    default: return "several parts of a model";
    }
}

/* What the files must hold for a part, together. */
static qie_status check_holds(const qie_weights *w, qie_part part, qie_error *err) {
    static const unsigned NEED[] = {QIE_HOLDS_TRANSFORMER, QIE_HOLDS_LANGUAGE | QIE_HOLDS_VISION,
                                    QIE_HOLDS_VAE};
    static const char *const WANTED[] = {"a transformer", "a text encoder", "a VAE"};
    unsigned holds = qie_weights_holds(w);
    if ((holds & NEED[part]) == NEED[part] && !(holds & QIE_HOLDS_LORA))
        return QIE_OK;
    if (part == QIE_PART_TEXT_ENCODER && holds == QIE_HOLDS_LANGUAGE)
        return qie_fail(err, QIE_E_CORRUPT, w->label,
                        "'%s' is %s: name the file of that, too (--mmproj FILE)", w->label,
                        words_of(holds));
    if (part == QIE_PART_TEXT_ENCODER && holds == QIE_HOLDS_VISION)
        return qie_fail(err, QIE_E_CORRUPT, w->label,
                        "'%s' is %s: name the language model with --text-encoder, this file with "
                        "--mmproj",
                        w->label, words_of(holds));
    return qie_fail(err, QIE_E_CORRUPT, w->label, "'%s' is %s, not %s", w->label, words_of(holds),
                    WANTED[part]);
}

static qie_status add_mapped(qie_weights *w, const char *path, qie_error *err) {
    qie_map map;
    QIE_TRY(qie_map_open(path, &map, err));
    qie_tensor_file *f = &w->files[w->n_files++];
    qie_status st = qie_tensor_file_parse(map.data, map.size, path, f, err);
    f->map = map;
    return st;
}

qie_status qie_weights_open_part(const char *const *paths, size_t n, qie_part part,
                                 qie_weights **out, qie_error *err) {
    qie_weights *w;
    qie_status st;
    *out = NULL;
    QIE_TRY(qie_weights_create(paths[0], n, &w, err));
    for (size_t i = 0; i < n; i++)
        QIE_TRY_GOTO(add_mapped(w, paths[i], err));
    QIE_TRY_GOTO(qie_weights_take_all(w, err));
    QIE_TRY_GOTO(check_holds(w, part, err));
    QIE_TRY_GOTO(qie_weights_assemble(w, part, err));
    *out = w;
    return QIE_OK;
fail:
    qie_weights_close(w);
    return st;
}

/* ---- is it all there */

enum { N_KINDS = 3, SHOWN = 4 };

typedef struct check {
    const qie_weights *w;
    qie_part part;
    bool *seen; /* per tensor of w */
    size_t n[N_KINDS];
    qie_strbuf list[N_KINDS];
} check;

static void note(check *c, int kind, const char *text) {
    if (c->n[kind]++ < SHOWN)
        qie_strbuf_printf(&c->list[kind], "%s%.150s", c->n[kind] > 1 ? ", " : "", text);
}

static void see(check *c, const qie_tensor *t) {
    c->seen[t - c->w->tensors] = true;
}

/* Weights of matrices may be quantised; the VAE's convolutions and all vectors are floats. */
static qie_status need(check *c, const qie_tensor_spec *s, const char *name, int64_t rows,
                       qie_error *err) {
    const qie_tensor *t;
    int64_t k = 1;
    for (int d = 1; d < s->n_dims; d++)
        k *= s->shape[d];
    bool matrix = s->n_dims >= 2 && c->part != QIE_PART_VAE;
    if (matrix)
        return qie_weights_need_linear(c->w, name, rows, k, &t, err);
    int64_t shape[5];
    memcpy(shape, s->shape, sizeof shape);
    shape[0] = rows;
    /* Gammas of the VAE are [C, 1, 1, 1] or [C, 1, 1]: only the count matters. */
    t = qie_weights_find(c->w, name);
    if (t && k == 1 && t->n_elements == rows && t->n_dims >= 1 && t->shape[0] == rows)
        return qie_weights_need(c->w, name, t->n_dims, t->shape, &t, err);
    return qie_weights_need(c->w, name, s->n_dims, shape, &t, err);
}

static void check_one(check *c, const qie_tensor_spec *s, const char *name, int64_t rows) {
    const qie_tensor *t = qie_weights_find(c->w, name);
    qie_error e = {0};
    if (!t) {
        if (!s->unused)
            note(c, 0, name);
        return;
    }
    see(c, t);
    if (!s->unused && need(c, s, name, rows, &e) != QIE_OK)
        note(c, 2, e.message);
}

static bool check_spec(void *arg, const qie_tensor_spec *s) {
    check *c = arg;
    char part[200];
    const char *qkv = strstr(s->name, ".attn.qkv.");
    snprintf(part, sizeof part, "%.*s.attn.q.%s", qkv ? (int)(qkv - s->name) : 0, s->name,
             qkv ? qkv + 10 : "");
    if (!qkv || !qie_weights_find(c->w, part)) {
        check_one(c, s, s->name, s->shape[0]);
        return true;
    }
    for (const char *letter = "qkv"; *letter; letter++) {
        snprintf(part, sizeof part, "%.*s.attn.%c.%s", (int)(qkv - s->name), s->name, *letter,
                 qkv + 10);
        check_one(c, s, part, s->shape[0] / 3);
    }
    return true;
}

static qie_status verdict(check *c, qie_error *err) {
    static const char *const WHAT[] = {"missing", "unknown", "not as the config says"};
    qie_strbuf b;
    if (!c->n[0] && !c->n[1] && !c->n[2])
        return QIE_OK;
    qie_strbuf_init(&b, 2000);
    for (int k = 0; k < N_KINDS; k++)
        if (c->n[k])
            qie_strbuf_printf(&b, "%s%zu %s (%s%s)", b.len ? "; " : "", c->n[k], WHAT[k],
                              c->list[k].data ? c->list[k].data : "",
                              c->n[k] > SHOWN ? ", ..." : "");
    qie_status st =
        qie_fail(err, QIE_E_CORRUPT, c->w->label, "'%s' is not this model's %s: of its tensors %s",
                 c->w->label, qie_part_name(c->part), b.data ? b.data : "");
    qie_strbuf_release(&b);
    return st;
}

qie_status qie_weights_check(const qie_weights *w, qie_part part,
                             const struct qie_model_config *config, qie_error *err) {
    check c = {.w = w, .part = part, .seen = calloc(w->n_tensors + 1, sizeof *c.seen)};
    QIE_FAIL_IF(!c.seen, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    for (int k = 0; k < N_KINDS; k++)
        qie_strbuf_init(&c.list[k], 1000);
    if (part == QIE_PART_TRANSFORMER)
        qie_tensors_transformer(&config->transformer, check_spec, &c);
    else if (part == QIE_PART_VAE)
        qie_tensors_vae(&config->vae, check_spec, &c);
    else
        qie_tensors_text_encoder(&config->text, &config->vision, check_spec, &c);
    for (size_t i = 0; i < w->n_tensors; i++) /* the time axis is never met by single pictures */
        if (!c.seen[i] && !strstr(w->tensors[i].name, ".time_conv."))
            note(&c, 1, w->tensors[i].name);
    qie_status st = verdict(&c, err);
    for (int k = 0; k < N_KINDS; k++)
        qie_strbuf_release(&c.list[k]);
    free(c.seen);
    return st;
}
