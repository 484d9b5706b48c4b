#define _GNU_SOURCE
#include "weights/quant_plan.h"

#include <fnmatch.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

/* file_type: llama.cpp's numbers of "mostly" this type. */
static const qie_quant_kind KINDS[] = {
    {"q8_0", QIE_Q8_0, QIE_FORMAT_GGUF, 7},          {"q6_k", QIE_Q6_K, QIE_FORMAT_GGUF, 18},
    {"q5_k", QIE_Q5_K, QIE_FORMAT_GGUF, 16},         {"q4_k", QIE_Q4_K, QIE_FORMAT_GGUF, 14},
    {"q4_0", QIE_Q4_0, QIE_FORMAT_GGUF, 2},          {"int8", QIE_I8, QIE_FORMAT_SAFETENSORS, 0},
    {"fp8", QIE_F8_E4M3, QIE_FORMAT_SAFETENSORS, 0},
};

const qie_quant_kind *qie_quant_kind_find(const char *name) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (!strcmp(KINDS[i].name, name))
            return &KINDS[i];
    return NULL;
}

typedef enum fate { CONVERT = 0, EIGHT_BITS, KEEP, DROP } fate;

/* What is not as the others; names as in the released model. docs/FORMATS.md has the reasons. */
static const struct {
    qie_part part;
    fate fate;
    const char *pattern;
} RULES[] = {
    {QIE_PART_TRANSFORMER, KEEP, "img_in.*"},
    {QIE_PART_TRANSFORMER, KEEP, "txt_in.*"},
    {QIE_PART_TRANSFORMER, KEEP, "time_text_embed.*"},
    {QIE_PART_TRANSFORMER, KEEP, "norm_out.*"},
    {QIE_PART_TRANSFORMER, KEEP, "proj_out.*"},
    {QIE_PART_TRANSFORMER, EIGHT_BITS, "*.img_mod.*"},
    {QIE_PART_TRANSFORMER, EIGHT_BITS, "*.txt_mod.*"},
    {QIE_PART_TEXT_ENCODER, KEEP, "model.embed_tokens.*"},
    {QIE_PART_TEXT_ENCODER, KEEP, "visual.patch_embed.*"},
    {QIE_PART_TEXT_ENCODER, KEEP, "visual.merger.*"},
    {QIE_PART_TEXT_ENCODER, EIGHT_BITS, "visual.blocks.*"},
    {QIE_PART_TEXT_ENCODER, DROP, "lm_head.*"}, /* an edit never predicts a word */
};

static bool is_float(qie_dtype t) {
    return t == QIE_F32 || t == QIE_BF16 || t == QIE_F16;
}

static double bits_of(qie_dtype t) {
    return 8.0 * (double)qie_dtype_block_bytes(t) / qie_dtype_block_elements(t);
}

static fate fate_of(qie_part part, const qie_quant_choice *c, const qie_tensor *t) {
    fate f = CONVERT;
    for (size_t i = 0; i < sizeof RULES / sizeof *RULES; i++)
        if (RULES[i].part == part && !fnmatch(RULES[i].pattern, t->name, 0))
            f = RULES[i].fate;
    if (f == DROP)
        return f;
    if (t->n_dims < 2) /* norms, biases */
        return KEEP;
    for (size_t i = 0; i < c->n_keep; i++) {
        bool not = c->keep[i][0] == '!';
        if (fnmatch(c->keep[i] + not, t->name, 0))
            continue;
        c->used[i] = true;
        f = not ? CONVERT : KEEP;
    }
    return f;
}

/* The type in which a tensor stays: its own where the file can hold it. */
static qie_dtype type_kept(const qie_quant_kind *kind, const qie_tensor *t) {
    bool blocks = kind->format == QIE_FORMAT_GGUF && qie_dtype_block_elements(t->dtype) > 1;
    return (is_float(t->dtype) || blocks) && !t->scale ? t->dtype : QIE_BF16;
}

/* The type into which a tensor is converted; false: it stays. */
static bool type_wanted(const qie_quant_kind *kind, fate f, const qie_tensor *t, qie_dtype *out) {
    int64_t k = t->n_dims >= 2 && t->shape[0] > 0 ? t->n_elements / t->shape[0] : 0;
    size_t n = strlen(t->name);
    *out = kind->dtype;
    if (f == KEEP || k == 0)
        return false;
    if (kind->format == QIE_FORMAT_SAFETENSORS) /* scales are found by the name of their weight */
        return n > 7 && !strcmp(t->name + n - 7, ".weight");
    if (f == EIGHT_BITS || k % qie_dtype_block_elements(*out))
        *out = QIE_Q8_0;
    /* GGUF rows are those of the last dimension, or of all but the first beyond four. */
    return (t->n_dims == 2 || t->n_dims > 4) && k % qie_dtype_block_elements(*out) == 0;
}

static char *own(qie_quant_plan *p, char *name) {
    if (name)
        p->names[p->n_names++] = name;
    return name;
}

/* What the columns of t count. A hundredth of the mean is added: an input that was small in the
 * edits that were looked at may be larger in another one. */
static qie_status find_importance(const qie_quant_choice *c, const qie_tensor *t, float **out,
                                  qie_error *err) {
    const qie_tensor *v = c->importance ? qie_weights_find(c->importance, t->name) : NULL;
    int64_t k = t->shape[0] > 0 ? t->n_elements / t->shape[0] : 0;
    double sum = 0;
    *out = NULL;
    if (!v || !k)
        return QIE_OK;
    QIE_FAIL_IF(v->dtype != QIE_F32 || v->n_elements != k, QIE_E_INVALID, err, "--importance",
                "'%s' has %lld values for '%s', which has %lld columns: it is of another model",
                qie_weights_file_of(c->importance, v), (long long)v->n_elements, t->name,
                (long long)k);
    float *p = malloc((size_t)k * sizeof *p);
    QIE_FAIL_IF(!p, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    memcpy(p, v->data, (size_t)k * sizeof *p);
    bool sound = true;
    for (int64_t i = 0; i < k; i++) {
        sound = sound && p[i] >= 0 && isfinite(p[i]);
        sum += (double)p[i];
    }
    if (!sound || !isfinite(sum)) {
        free(p);
        return qie_fail(err, QIE_E_INVALID, "--importance",
                        "'%s' has a value of '%s' that is no mean square",
                        qie_weights_file_of(c->importance, v), t->name);
    }
    if (sum <= 0) { /* never met anything but zero */
        free(p);
        return QIE_OK;
    }
    float mean = (float)(sum / (double)k), scale = 1 / mean;
    for (int64_t i = 0; i < k; i++)
        p[i] = isfinite(scale) ? p[i] * scale + 0.01f : 1;
    *out = p;
    return QIE_OK;
}

static qie_status add_tensor(qie_quant_plan *p, const qie_quant_choice *c, const qie_tensor *t,
                             qie_dtype type, bool converts, qie_error *err) {
    qie_layout_tensor *o = &p->tensors[p->n_tensors];
    qie_quant_item *item = &p->items[p->n_items++];
    *item = (qie_quant_item){t, p->n_tensors++, QIE_QUANT_NO_SCALE, NULL};
    *o = (qie_layout_tensor){.name = t->name, .dtype = type, .n_dims = t->n_dims};
    memcpy(o->shape, t->shape, sizeof o->shape);
    p->source_bytes += (int64_t)t->n_bytes;
    int64_t k = t->n_dims && t->shape[0] > 0 ? t->n_elements / t->shape[0] : 0;
    p->max_k = k > p->max_k ? k : p->max_k;
    if (converts) {
        QIE_TRY(find_importance(c, t, &item->importance, err));
        p->n_important += item->importance != NULL;
    }
    if (!converts || (type != QIE_I8 && type != QIE_F8_E4M3))
        return QIE_OK;
    char *name = NULL;
    if (asprintf(&name, "%s_scale", t->name) < 0)
        name = NULL;
    QIE_FAIL_IF(!own(p, name), QIE_E_NO_MEMORY, err, NULL, "out of memory");
    item->scale = (int)p->n_tensors;
    p->tensors[p->n_tensors++] =
        (qie_layout_tensor){.name = name, .dtype = QIE_F32, .n_dims = 2, .shape = {t->shape[0], 1}};
    return QIE_OK;
}

static qie_status consider(qie_quant_plan *p, const qie_quant_choice *c, const qie_tensor *t,
                           const char *file, qie_error *err) {
    fate f = fate_of(p->part, c, t);
    if (f == DROP)
        return QIE_OK;
    qie_dtype type;
    bool converts = type_wanted(c->kind, f, t, &type), again = t->scale || !is_float(t->dtype);
    bool saves = !again || bits_of(type) < bits_of(t->dtype);
    QIE_FAIL_IF(converts && f == CONVERT && !saves, QIE_E_INVALID, err, "--to",
                "'%s' has '%s' as %s (%.3g bits a weight) already: %s (%.3g) would lose more and "
                "save nothing; convert the original model",
                file, t->name, qie_dtype_name(t->dtype), bits_of(t->dtype), c->kind->name,
                bits_of(type));
    converts = converts && saves;
    if (!converts)
        type = type_kept(c->kind, t);
    if (t->n_dims >= 2) {
        p->n_kept += !converts;
        p->n_eight += converts && type != c->kind->dtype;
        p->n_converted += converts && type == c->kind->dtype;
        p->n_again += converts && again;
    }
    return add_tensor(p, c, t, type, converts, err);
}

static qie_status lay_out(qie_quant_plan *p, const qie_quant_kind *kind, const char *config,
                          qie_error *err) {
    static const char *const FILES[2][2] = {
        {"transformer/diffusion_pytorch_model.safetensors",
         "transformer/diffusion_pytorch_model.gguf"},
        {"text_encoder/model.safetensors", "text_encoder/model.gguf"}};
    bool gguf = kind->format == QIE_FORMAT_GGUF, transformer = p->part == QIE_PART_TRANSFORMER;
    qie_meta_pair meta[6];
    size_t n = 0;
    if (gguf) {
        meta[n++] =
            (qie_meta_pair){"general.architecture", transformer ? "qwen_image" : "qwen2vl", 0};
        meta[n++] = (qie_meta_pair){"general.quantization_version", NULL, 2};
        meta[n++] = (qie_meta_pair){"general.file_type", NULL, kind->file_type};
    } else {
        meta[n++] = (qie_meta_pair){"format", "pt", 0};
    }
    meta[n++] = (qie_meta_pair){"qwen_edit.quantization", kind->name, 0};
    meta[n++] = (qie_meta_pair){
        transformer ? "qwen_edit.transformer_config" : "qwen_edit.text_encoder_config", config, 0};
    p->file = FILES[!transformer][gguf];
    return qie_layout_make(kind->format, p->tensors, p->n_tensors, meta, n, &p->layout, err);
}

qie_status qie_quant_plan_make(const qie_weights *w, qie_part part, const qie_quant_choice *choice,
                               const char *config, bool zero_cond_t, qie_quant_plan *out,
                               qie_error *err) {
    static const char MARK[] = "__index_timestep_zero__";
    size_t n = qie_weights_count(w);
    memset(out, 0, sizeof *out);
    out->part = part;
    out->tensors = calloc(2 * n + 1, sizeof *out->tensors);
    out->items = calloc(n + 1, sizeof *out->items);
    out->names = calloc(n + 1, sizeof *out->names);
    QIE_FAIL_IF(!out->tensors || !out->items || !out->names, QIE_E_NO_MEMORY, err, NULL,
                "out of memory");
    for (size_t i = 0; i < n; i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        QIE_TRY(consider(out, choice, t, qie_weights_file_of(w, t), err));
    }
    QIE_FAIL_IF(!out->n_converted && !out->n_eight, QIE_E_INVALID, err, "--to",
                "no layer of the %s can be %s: %s", qie_part_name(part), choice->kind->name,
                choice->n_keep
                    ? "the rows are no whole blocks of that type, or --keep keeps all"
                    : "the rows are no whole blocks of that type; fp8 and int8 take any");
    if (part == QIE_PART_TRANSFORMER && zero_cond_t) { /* other programs tell the model by it */
        out->items[out->n_items++] =
            (qie_quant_item){NULL, out->n_tensors, QIE_QUANT_NO_SCALE, NULL};
        out->tensors[out->n_tensors++] =
            (qie_layout_tensor){.name = MARK, .dtype = QIE_F32, .n_dims = 1, .shape = {1}};
    }
    return lay_out(out, choice->kind, config, err);
}

void qie_quant_plan_release(qie_quant_plan *p) {
    qie_layout_release(&p->layout);
    for (size_t i = 0; i < p->n_names; i++)
        free(p->names[i]);
    for (size_t i = 0; i < p->n_items; i++)
        free(p->items[i].importance);
    free(p->names);
    free(p->tensors);
    free(p->items);
    memset(p, 0, sizeof *p);
}
