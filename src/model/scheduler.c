#include "model/scheduler.h"

#include <math.h>

void qie_scheduler_sigmas(const qie_scheduler_config *c, int n_steps, int64_t n_target,
                          float *sigmas, float *timesteps) {
    double slope = (c->max_shift - c->base_shift) / (c->max_image_seq_len - c->base_image_seq_len);
    double mu = (double)n_target * slope + (c->base_shift - slope * c->base_image_seq_len);
    float shift = (float)(c->exponential ? exp(mu) : mu);
    double start = 1.0, stop = 1.0 / n_steps;
    double step = n_steps > 1 ? (stop - start) / (n_steps - 1) : 0;
    for (int i = 0; i < n_steps; i++) {
        /* numpy.linspace: start + i * step, the last value set to stop */
        float s = (float)(i == n_steps - 1 && n_steps > 1 ? stop : start + i * step);
        if (c->use_dynamic_shifting)
            s = shift / (shift + (1.0f / s - 1.0f));
        else
            s = (float)c->shift * s / (1.0f + ((float)c->shift - 1.0f) * s);
        sigmas[i] = s;
    }
    if (c->shift_terminal > 0 && n_steps > 1) {
        float factor = (1.0f - sigmas[n_steps - 1]) / (float)(1.0 - c->shift_terminal);
        for (int i = 0; i < n_steps; i++)
            sigmas[i] = 1.0f - (1.0f - sigmas[i]) / factor;
    }
    sigmas[n_steps] = 0;
    for (int i = 0; timesteps && i < n_steps; i++)
        timesteps[i] = sigmas[i] * (float)c->num_train_timesteps;
}
