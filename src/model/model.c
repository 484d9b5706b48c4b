#define _GNU_SOURCE
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "plan/extents.h"
#include "plan/tensors.h"

static void each_linear(void *model, qie_linear_fn fn, void *arg) {
    qie_model *m = model;
    qie_transformer_each_linear(m->transformer, fn, arg);
    qie_text_encoder_each_linear(m->text_encoder, fn, arg);
}

static qie_status open_parts(const qie_model_source *source, qie_model *m, qie_error *err) {
    qie_weights *w[QIE_PART_COUNT];
    qie_status st = qie_model_source_open(source, &m->files, w, err);
    m->w_transformer = w[QIE_PART_TRANSFORMER];
    m->w_text_encoder = w[QIE_PART_TEXT_ENCODER];
    m->w_vae = w[QIE_PART_VAE];
    QIE_TRY(st);
    QIE_TRY(qie_model_config_read(m->files, &m->config, err));
    /* Files that people brought are told all that is wrong with them at once. */
    const char *const brought[] = {source->transformer, source->text_encoder, source->vae};
    for (int p = 0; p < QIE_PART_COUNT; p++)
        if (brought[p] && *brought[p])
            QIE_TRY(qie_weights_check(w[p], (qie_part)p, &m->config, err));
    QIE_TRY(qie_tokenizer_open(m->files, m->config.tokenizer_folder, &m->tokenizer, err));
    QIE_TRY(qie_transformer_open(&m->config.transformer, m->w_transformer, &m->transformer, err));
    QIE_TRY(qie_text_encoder_open(&m->config.text, &m->config.vision, m->w_text_encoder,
                                  &m->text_encoder, err));
    QIE_TRY(qie_vae_open(&m->config.vae, m->w_vae, &m->vae, err));
    QIE_FAIL_IF(
        qie_tokenizer_vocab_size(m->tokenizer) > m->config.text.vocab_size, QIE_E_CORRUPT, err,
        m->config.tokenizer_folder,
        "the tokenizer has %d entries, the text encoder's vocabulary %d: files of two models",
        qie_tokenizer_vocab_size(m->tokenizer), m->config.text.vocab_size);
    int pad = qie_tokenizer_added_id(m->tokenizer, "<|image_pad|>");
    QIE_FAIL_IF(
        pad != m->config.text.image_token_id, QIE_E_CORRUPT, err, m->config.tokenizer_folder,
        "<|image_pad|> is %d in the tokenizer and %d in the text encoder's config: files of two "
        "models",
        pad, m->config.text.image_token_id);
    return QIE_OK;
}

qie_status qie_model_open_source(const qie_model_source *source, qie_model *m, qie_error *err) {
    memset(m, 0, sizeof *m);
    qie_status st = open_parts(source, m, err);
    if (st == QIE_OK)
        st = qie_adapters_create(each_linear, m, m->config.transformer.zero_cond_t, &m->adapters,
                                 err);
    if (st != QIE_OK) {
        if (source->model && *source->model)
            qie_error_context(err, "opening model '%s'", source->model);
        qie_model_release(m);
    }
    return st;
}

qie_status qie_model_open(const char *path, qie_model *m, qie_error *err) {
    return qie_model_open_source(&(qie_model_source){.model = path}, m, err);
}

void qie_model_release(qie_model *m) {
    qie_adapters_destroy(m->adapters);
    qie_vae_close(m->vae);
    qie_text_encoder_close(m->text_encoder);
    qie_transformer_close(m->transformer);
    qie_weights_close(m->w_vae);
    qie_weights_close(m->w_text_encoder);
    qie_weights_close(m->w_transformer);
    qie_tokenizer_close(m->tokenizer);
    qie_files_close(m->files);
    memset(m, 0, sizeof *m);
}

void qie_model_find_preset(qie_model *m, const char *name) {
    const qie_defaults_config *d = &m->config.defaults;
    qie_preset p = qie_preset_from_name(name);
    m->preset_cfg = 1;
    if (p.lightning) {
        snprintf(m->preset_from, sizeof m->preset_from, "model '%.100s' by its name", name);
    } else if (d->lightning || qie_scheduler_is_lightning(&m->config.scheduler)) {
        p.lightning = true;
        snprintf(m->preset_from, sizeof m->preset_from, "model '%.100s' by its %s", name,
                 d->lightning ? "qwen_edit.json" : "scheduler");
        m->preset_cfg = d->cfg_told ? d->true_cfg_scale : 1;
    }
    if (!p.num_inference_steps && d->steps_told)
        p.num_inference_steps = d->num_inference_steps;
    m->preset = p;
}

qie_model_defaults qie_model_defaults_now(const qie_model *m) {
    const qie_adapters_active *a = qie_adapters_get(m->adapters);
    const qie_defaults_config *d = &m->config.defaults;
    const qie_preset *p = a->preset.lightning ? &a->preset : &m->preset;
    qie_model_defaults r = {d->num_inference_steps, d->true_cfg_scale, p->lightning,
                            a->preset.lightning ? a->preset_from : m->preset_from};
    if (p->lightning) {
        r.num_inference_steps =
            p->num_inference_steps ? p->num_inference_steps : QIE_LIGHTNING_STEPS;
        r.true_cfg_scale = a->preset.lightning ? 1 : m->preset_cfg;
    }
    return r;
}

qie_compute_limits qie_model_limits(const qie_model_config *c) {
    qie_extents e = qie_extents_of(c);
    return (qie_compute_limits){.max_k = e.max_k,
                                .max_n = e.max_n,
                                .max_conv_k = e.max_conv_k,
                                .max_conv_n = e.max_conv_n,
                                .max_head_dim = e.max_head_dim};
}

qie_status qie_model_groups(qie_model *m, qie_weight_group ***out, size_t *n, qie_error *err) {
    const qie_model_config *c = &m->config;
    size_t most = 4 + (size_t)c->vision.depth + (size_t)c->text.num_hidden_layers +
                  2 * (size_t)c->transformer.num_layers;
    qie_weight_group **list = calloc(most, sizeof *list);
    QIE_FAIL_IF(!list, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    *n = qie_text_encoder_groups(m->text_encoder, list);
    *n += qie_transformer_groups(m->transformer, list + *n);
    list[(*n)++] = qie_vae_weights(m->vae);
    for (size_t i = 0; i < *n; i++)
        list[i]->id = (int)i;
    *out = list;
    return QIE_OK;
}

int64_t qie_model_weights_bytes(const qie_model *m) {
    return qie_weights_bytes(m->w_transformer) + qie_weights_bytes(m->w_text_encoder) +
           qie_weights_bytes(m->w_vae);
}

int64_t qie_model_parameters(const qie_model *m) {
    return qie_weights_elements(m->w_transformer) + qie_weights_elements(m->w_text_encoder) +
           qie_weights_elements(m->w_vae);
}
