/* One opened model: configs, mapped weights and the parts bound to them. */
#ifndef QIE_MODEL_MODEL_H
#define QIE_MODEL_MODEL_H

#include "model/adapters.h"
#include "model/source.h"
#include "model/text_encoder.h"
#include "model/transformer.h"
#include "model/vae.h"
#include "plan/config.h"
#include "text/tokenizer.h"
#include "weights/weights.h"

typedef struct qie_model {
    qie_files *files;
    qie_model_config config;
    qie_weights *w_transformer, *w_text_encoder, *w_vae;
    qie_tokenizer *tokenizer;
    qie_transformer *transformer;
    qie_text_encoder *text_encoder;
    qie_vae *vae;
    qie_adapters *adapters;
    qie_preset preset; /* of a merged checkpoint: qie_model_find_preset */
    double preset_cfg;
    char preset_from[192];
} qie_model;

/* Open a folder, "demo" or files. m is zeroed first; release it in any case.
 * Errors: see qie_engine_open. */
qie_status qie_model_open_source(const qie_model_source *source, qie_model *m, qie_error *err);
/* A folder or "demo". */
qie_status qie_model_open(const char *path, qie_model *m, qie_error *err);
void qie_model_release(qie_model *m);
/* Is this a merged Lightning checkpoint, by its name (last part of the path), its schedule or its
 * qwen_edit.json? */
void qie_model_find_preset(qie_model *m, const char *name);
/* Defaults in force: those of the LoRAs, else of a merged checkpoint, else of qwen_edit.json, else
 * the released ones. */
typedef struct qie_model_defaults {
    int num_inference_steps;
    double true_cfg_scale;
    bool lightning;          /* take its schedule, too */
    const char *preset_from; /* for people: where the preset comes from */
} qie_model_defaults;
qie_model_defaults qie_model_defaults_now(const qie_model *m);
/* Largest extents of all operations of this model, for the back end's scratch. */
qie_compute_limits qie_model_limits(const qie_model_config *c);
/* All groups of weights in order of use, numbered; free *out with free(). Errors: NO_MEMORY. */
qie_status qie_model_groups(qie_model *m, qie_weight_group ***out, size_t *n, qie_error *err);
int64_t qie_model_weights_bytes(const qie_model *m);
int64_t qie_model_parameters(const qie_model *m);
/* The configs of an open engine's model. */
struct qie_engine;
const qie_model_config *qie_engine_config(const struct qie_engine *engine);
/* A file of the open engine's tokenizer ("vocab.json") as qie_files_get gives it. Not while an edit
 * runs. */
qie_status qie_engine_tokenizer_file(const struct qie_engine *engine, const char *name,
                                     const unsigned char **data, size_t *n, qie_error *err);
/* What it keeps of earlier prompts. */
qie_prompt_cache_stats qie_engine_prompt_cache(const struct qie_engine *engine);

#endif
