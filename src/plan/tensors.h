/* The tensors that a model's configs imply: names as in the released files, and shapes. Shared by
 * the loader, `verify` and `info`. */
#ifndef QIE_PLAN_TENSORS_H
#define QIE_PLAN_TENSORS_H

#include <stdbool.h>
#include <stdint.h>

#include "plan/config.h"

typedef struct qie_tensor_spec {
    char name[160];
    int n_dims;
    int64_t shape[5];
    bool unused; /* in the file, but never read for a single picture (time_conv, lm_head) */
} qie_tensor_spec;

/* Return false to stop. */
typedef bool (*qie_tensor_spec_fn)(void *arg, const qie_tensor_spec *spec);

/* Each calls fn for every tensor of the component; false when fn stopped. */
bool qie_tensors_transformer(const qie_transformer_config *c, qie_tensor_spec_fn fn, void *arg);
bool qie_tensors_text_encoder(const qie_text_config *t, const qie_vision_config *v,
                              qie_tensor_spec_fn fn, void *arg);
bool qie_tensors_vae(const qie_vae_config *c, qie_tensor_spec_fn fn, void *arg);

/* Channels of VAE level i, counted from the picture: level 0 has base_dim x dim_mult[0]. */
int qie_vae_channels(const qie_vae_config *c, int level);

#endif
