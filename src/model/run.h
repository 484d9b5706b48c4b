/* What every stage of an edit gets: where to compute, where to take memory, whom to tell, when to
 * stop. */
#ifndef QIE_MODEL_RUN_H
#define QIE_MODEL_RUN_H

#include <stdatomic.h>

#include "base/arena.h"
#include "compute/backend.h"
#include "compute/observe.h"
#include "model/prompt_cache.h"
#include "weights/weights.h"

typedef struct qie_run {
    qie_compute *compute;
    qie_arena *arena;               /* host memory */
    qie_arena *device;              /* memory that operations work on: on the CPU the same arena */
    qie_dtype act;                  /* dtype of activations that feed matrix products */
    bool int8;                      /* layers that bear it multiply in 8-bit integers */
    bool as_many;                   /* of qie_linear_args */
    const atomic_int *cancel;       /* not zero: stop */
    qie_observer *observer;         /* NULL: no dump */
    qie_prompt_cache *prompt_cache; /* NULL: every prompt is encoded */
    float *lowrank_room;            /* for LoRAs: rows x sum of ranks of any layer, planned */
    /* Called at least once per block, layer and VAE level (liveness, progress inside a stage). */
    void (*beat)(void *arg);
    void *beat_arg;
} qie_run;

/* Beat, and QIE_E_CANCELLED when asked to stop. Call between blocks. */
qie_status qie_run_check(const qie_run *run, qie_error *err);
/* Memory that operations work on; QIE_E_INTERNAL when the plan was too small. */
qie_status qie_run_alloc(const qie_run *run, size_t bytes, void **out, qie_error *err);
/* Memory that only the host reads and writes. */
qie_status qie_run_alloc_host(const qie_run *run, size_t bytes, void **out, qie_error *err);
/* Everything allocated after a mark dies with its release. */
typedef struct qie_run_mark {
    size_t host, device;
} qie_run_mark;
qie_run_mark qie_run_mark_get(const qie_run *run);
void qie_run_release(const qie_run *run, qie_run_mark mark);

/* Between host memory and the memory of operations. On the CPU they are one, and all of these hand
 * out the same address or do nothing; a device gets or gives copies. */
/* Host memory to prepare what `device` shall hold, until qie_run_commit. */
qie_status qie_run_stage(const qie_run *run, void *device, size_t bytes, void **host,
                         qie_error *err);
void qie_run_commit(const qie_run *run, void *device, const void *host, size_t bytes);
/* Host data as operations can read it. */
qie_status qie_run_lend(const qie_run *run, const void *host, size_t bytes, const void **device,
                        qie_error *err);
/* Where operations write what qie_run_fetch then brings to `host`. */
qie_status qie_run_result(const qie_run *run, void *host, size_t bytes, void **device,
                          qie_error *err);
qie_status qie_run_fetch(const qie_run *run, void *host, const void *device, size_t bytes,
                         qie_error *err);
/* What operations computed as the host can read it. */
qie_status qie_run_view(const qie_run *run, const void *device, size_t bytes, const void **host,
                        qie_error *err);
/* Part of a buffer of operations from the host. */
void qie_run_put(const qie_run *run, void *device, const void *host, size_t bytes);
void qie_run_zero(const qie_run *run, void *device, size_t bytes);
/* See qie_mem_ops; nothing on the CPU. */
void qie_run_share(const qie_run *run, const void *device, size_t bytes);
void qie_run_group(const qie_run *run, const qie_weight_group *group, const qie_weight_group *next,
                   size_t n_live, const qie_range *live);
/* F32 data of operations into the dump. */
void qie_run_observe(const qie_run *run, const char *name, const float *device, int n_dims,
                     const int64_t *shape);

/* Matrix [rows, cols] that operations work on. */
qie_status qie_run_mat(const qie_run *run, qie_dtype dtype, int64_t rows, int64_t cols,
                       qie_mat *out, qie_error *err);

/* A linear layer bound to its tensors. */
typedef struct qie_linear {
    qie_wmat w;
    qie_vec b;                  /* data NULL: none */
    const qie_lowrank *lowrank; /* of the LoRAs in force: model/adapters.c */
    size_t n_lowrank;
    bool int8; /* may be multiplied in 8-bit integers */
    bool fp8;  /* and in 8-bit floats */
} qie_linear;

/* Bind `<name>.weight` [n, k] and, if bias, `<name>.bias` [n]. */
qie_status qie_bind_linear(const qie_weights *w, const char *name, int64_t n, int64_t k, bool bias,
                           qie_linear *out, qie_error *err);
/* Rows [from, from + n) of a layer, as a layer of its own. */
qie_linear qie_linear_rows(const qie_linear *l, int64_t from, int64_t n);
/* Bind a vector tensor of n elements under its full name. */
qie_status qie_bind_vec(const qie_weights *w, const char *name, int64_t n, qie_vec *out,
                        qie_error *err);

/* dst = act(x W^T + b); the other stores likewise. */
void qie_run_linear(const qie_run *run, qie_mat x, const qie_linear *l, qie_act act,
                    qie_store store, qie_mat dst);
/* then: a norm of dst afterwards, or NULL; see qie_ops.linear_norm. */
void qie_run_linear_gated(const qie_run *run, qie_mat x, const qie_linear *l, const float *gate0,
                          const float *gate1, int64_t split, qie_mat dst,
                          const qie_layer_norm_args *then);

/* Gather the weights of a group. */
void qie_group_add(qie_weight_group *g, const void *data, size_t n_bytes);
void qie_group_add_linear(qie_weight_group *g, const qie_linear *l);
void qie_group_add_vec(qie_weight_group *g, qie_vec v);
void qie_group_release(qie_weight_group *g);

/* Ask for a layer's weights ahead of their use (see qie_weights_prefetch). */
void qie_linear_prefetch(const qie_linear *l);
/* Its weights are not needed for long (see qie_weights_let_go). */
void qie_linear_let_go(const qie_linear *l);

#endif
