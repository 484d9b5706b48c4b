/* AutoencoderKLQwenImage for one picture: its causal 3-D convolutions over a single frame are 2-D
 * ones.
 *
 * Maps are channels-last. Exact by default; tiled (diffusers' tiling, which changes the result
 * slightly) when the plan says that a whole picture does not fit. */
#ifndef QIE_MODEL_VAE_H
#define QIE_MODEL_VAE_H

#include "model/run.h"
#include "plan/config.h"
#include "plan/memory.h"

typedef struct qie_vae qie_vae;

/* Bind all tensors that a single frame needs; w must outlive the object. */
qie_status qie_vae_open(const qie_vae_config *c, const qie_weights *w, qie_vae **out,
                        qie_error *err);
void qie_vae_close(qie_vae *v);
qie_weight_group *qie_vae_weights(qie_vae *v);

/* Encode: pixels [h, w, 3] F32 in -1..1 -> mean of the posterior, [h/8, w/8, z_dim] F32 (not
 * normalised). h and w are multiples of the scale factor. Errors: QIE_E_CANCELLED between levels.
 */
qie_status qie_vae_encode(qie_vae *v, const qie_run *run, const float *pixels, int h, int w,
                          bool tiled, float *mean, qie_error *err);
/* Decode: latents [h, w, z_dim] F32 (denormalised) -> pixels [8h, 8w, 3] F32, clamped to -1..1. */
qie_status qie_vae_decode(qie_vae *v, const qie_run *run, const float *latents, int h, int w,
                          bool tiled, float *pixels, qie_error *err);

#endif
