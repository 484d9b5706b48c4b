/* Settings that a distilled checkpoint needs: the Lightning LoRAs and merges of Qwen-Image-Edit
 * make an edit in 4 or 8 steps, one pass each, with a schedule of their own. */
#ifndef QIE_PLAN_PRESET_H
#define QIE_PLAN_PRESET_H

#include <stdbool.h>
#include <stddef.h>

#include "plan/config.h"

typedef struct qie_preset {
    bool lightning;
    int num_inference_steps; /* 0: not told */
} qie_preset;

/* Steps of a Lightning checkpoint that does not say how many it was made for: the more careful of
 * the two that exist. A 4-step one is good in 8; the other way round is not. */
#define QIE_LIGHTNING_STEPS 8

/* What a name says ("Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16"): Lightning in any case of
 * letters, steps as a number before "step". */
qie_preset qie_preset_from_name(const char *name);
/* The steps alone: "4steps", "8-step", "4_Steps"; 0 if there is no such number of 1..64. */
int qie_preset_steps(const char *text);
/* True if this is Lightning's schedule already: base_shift = max_shift = ln 3, no terminal shift.
 */
bool qie_scheduler_is_lightning(const qie_scheduler_config *c);
/* Lightning's schedule: base_shift = max_shift = ln 3 ("shift 3"), exponential, no terminal shift;
 * so for any size sigma = 3 s / (1 + 2 s). */
void qie_scheduler_set_lightning(qie_scheduler_config *c);

#endif
