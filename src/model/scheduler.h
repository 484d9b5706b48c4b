/* FlowMatchEulerDiscreteScheduler: the noise levels of a run. */
#ifndef QIE_MODEL_SCHEDULER_H
#define QIE_MODEL_SCHEDULER_H

#include <stdint.h>

#include "plan/config.h"

/* sigmas[0 .. n_steps] (the last is 0) for n_steps >= 1 and n_target tokens of the generated
 * picture; timesteps[0 .. n_steps-1] = sigma x num_train_timesteps (NULL: not wanted). float32
 * arithmetic in the order of numpy's, equal to diffusers' for n_steps >= 2. For one step with a
 * terminal shift diffusers divides zero by zero; we use [1, 0]. */
void qie_scheduler_sigmas(const qie_scheduler_config *c, int n_steps, int64_t n_target,
                          float *sigmas, float *timesteps);

#endif
