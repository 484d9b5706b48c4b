/* One opened model: configs, mapped weights and the parts bound to them. */
#ifndef QIE_MODEL_MODEL_H
#define QIE_MODEL_MODEL_H

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
} qie_model;

/* Open `path` (a folder, or "demo"). m is zeroed first; release it in any case.
 * Errors: see qie_engine_open. */
qie_status qie_model_open(const char *path, qie_model *m, qie_error *err);
void qie_model_release(qie_model *m);
/* Largest extents of all operations of this model, for the back end's scratch. */
qie_compute_limits qie_model_limits(const qie_model_config *c);
/* All groups of weights in order of use, numbered; free *out with free(). Errors: NO_MEMORY. */
qie_status qie_model_groups(qie_model *m, qie_weight_group ***out, size_t *n, qie_error *err);
int64_t qie_model_weights_bytes(const qie_model *m);
int64_t qie_model_parameters(const qie_model *m);

#endif
