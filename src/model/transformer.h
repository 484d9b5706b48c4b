/* QwenImageTransformer2DModel: the double-stream diffusion transformer that predicts the velocity.
 *
 * What does not change between steps is computed once per edit (references and conditioning through
 * their input layers, rope tables), what depends on the timestep alone once per group of steps
 * (modulation: a third of all weights). A forward is then only the blocks. Nothing is allocated in
 * it. */
#ifndef QIE_MODEL_TRANSFORMER_H
#define QIE_MODEL_TRANSFORMER_H

#include "model/run.h"
#include "model/step_cache.h"
#include "plan/config.h"
#include "plan/memory.h"
#include "plan/sizes.h"

typedef struct qie_transformer qie_transformer;

/* Bind all tensors; w must outlive the object. Errors: QIE_E_CORRUPT naming the tensor. */
qie_status qie_transformer_open(const qie_transformer_config *c, const qie_weights *w,
                                qie_transformer **out, qie_error *err);
void qie_transformer_close(qie_transformer *t);
/* Its groups of weights in order of use, 1 + 2 * num_layers of them. */
size_t qie_transformer_groups(qie_transformer *t, qie_weight_group **out);
/* Call fn with the name and place of every linear layer. */
void qie_transformer_each_linear(qie_transformer *t,
                                 void (*fn)(void *arg, const char *name, qie_linear *l), void *arg);

/* State of one edit: buffers in the run's arena, dead when the arena is released. */
typedef struct qie_denoiser qie_denoiser;

typedef struct qie_denoiser_inputs {
    const qie_size_plan *sizes;
    const float *image_latents;    /* [n_reference, in_channels] packed, normalised */
    int n_passes;                  /* 1, or 2 with CFG */
    const float *prompt_embeds[2]; /* [n_text[i], joint_attention_dim] */
    int64_t n_text[2];
    int n_steps;
    const float *timesteps;       /* sigma in (0, 1] for each step */
    const qie_cache_rules *cache; /* NULL: every block of every step is computed */
} qie_denoiser_inputs;

/* Allocate and precompute. Inputs need not outlive the call. */
qie_status qie_denoiser_create(qie_transformer *t, const qie_run *run,
                               const qie_denoiser_inputs *in, qie_denoiser **out, qie_error *err);
/* Velocity of step i_step for pass i_pass: latents [n_target, in_channels] -> velocity, same shape,
 * F32, both in memory of operations. Errors: QIE_E_CANCELLED between blocks. */
qie_status qie_denoiser_forward(qie_denoiser *d, const qie_run *run, int i_step, int i_pass,
                                const float *latents, float *velocity, qie_error *err);

/* Forwards so far, and those of them that the cache cut short. */
void qie_denoiser_count(const qie_denoiser *d, int *n_forwards, int *n_skipped);

/* The modulation of the steps from i_step on, which a forward computes when it needs it. */
qie_status qie_denoiser_modulate(qie_denoiser *d, const qie_run *run, int i_step, qie_error *err);

/* Steps whose modulation is kept at once: bounds the table for any number of steps. */
#define QIE_MODULATION_STEPS QIE_PLAN_MODULATION_STEPS

/* Time of one block of this size, in seconds: the probe behind an estimate. Needs the same memory
 * as an edit. */
qie_status qie_denoiser_probe(qie_denoiser *d, const qie_run *run, double *seconds_per_block,
                              qie_error *err);

#endif
