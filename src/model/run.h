/* What every stage of an edit gets: where to compute, where to take memory, whom to tell, when to
 * stop. */
#ifndef QIE_MODEL_RUN_H
#define QIE_MODEL_RUN_H

#include <stdatomic.h>

#include "base/arena.h"
#include "compute/backend.h"
#include "compute/observe.h"
#include "weights/weights.h"

typedef struct qie_run {
    qie_compute *compute;
    qie_arena *arena;
    qie_dtype act;            /* dtype of activations that feed matrix products */
    const atomic_int *cancel; /* not zero: stop */
    qie_observer *observer;   /* NULL: no dump */
    /* Called at least once per block, layer and VAE level (liveness, progress inside a stage). */
    void (*beat)(void *arg);
    void *beat_arg;
} qie_run;

/* Beat, and QIE_E_CANCELLED when asked to stop. Call between blocks. */
qie_status qie_run_check(const qie_run *run, qie_error *err);
/* Memory from the arena; QIE_E_INTERNAL when the plan was too small. */
qie_status qie_run_alloc(const qie_run *run, size_t bytes, void **out, qie_error *err);
/* Matrix [rows, cols] from the arena. */
qie_status qie_run_mat(const qie_run *run, qie_dtype dtype, int64_t rows, int64_t cols,
                       qie_mat *out, qie_error *err);

/* A linear layer bound to its tensors. */
typedef struct qie_linear {
    qie_wmat w;
    qie_vec b; /* data NULL: none */
} qie_linear;

/* Bind `<name>.weight` [n, k] and, if bias, `<name>.bias` [n]. */
qie_status qie_bind_linear(const qie_weights *w, const char *name, int64_t n, int64_t k, bool bias,
                           qie_linear *out, qie_error *err);
/* Bind a vector tensor of n elements under its full name. */
qie_status qie_bind_vec(const qie_weights *w, const char *name, int64_t n, qie_vec *out,
                        qie_error *err);

/* dst = act(x W^T + b); the other stores likewise. */
void qie_run_linear(const qie_run *run, qie_mat x, const qie_linear *l, qie_act act,
                    qie_store store, qie_mat dst);
void qie_run_linear_gated(const qie_run *run, qie_mat x, const qie_linear *l, const float *gate0,
                          const float *gate1, int64_t split, qie_mat dst);

/* Ask for a layer's weights ahead of their use (see qie_weights_prefetch). */
void qie_linear_prefetch(const qie_linear *l);

#endif
