/* Records named intermediate tensors of a run into a safetensors file, for comparison with a
 * reference.
 *
 * QIE_DUMP=out.safetensors turns it on, QIE_DUMP_NAMES='prompt_embeds,block.0.*' chooses (default:
 * all). Names equal those of the reference recordings. The caller asks before it computes anything
 * only for a dump. */
#ifndef QIE_COMPUTE_OBSERVE_H
#define QIE_COMPUTE_OBSERVE_H

#include <stdbool.h>
#include <stdint.h>

#include "compute/backend.h"
#include "qie/error.h"

typedef struct qie_observer qie_observer;

/* From the environment; *out is NULL when QIE_DUMP is not set. */
qie_status qie_observer_create_from_env(qie_observer **out, qie_error *err);
void qie_observer_destroy(qie_observer *o);
/* False for o NULL. */
bool qie_observer_wants(const qie_observer *o, const char *name);
/* Copies the data as F32 under `name` with the given shape; a name seen before is ignored. */
void qie_observe(qie_observer *o, const char *name, qie_mat m, int n_dims, const int64_t *shape);
void qie_observe_f32(qie_observer *o, const char *name, const float *data, int n_dims,
                     const int64_t *shape);
void qie_observe_i64(qie_observer *o, const char *name, const int64_t *data, int n_dims,
                     const int64_t *shape);
/* Write the file. Errors: QIE_E_IO, QIE_E_NO_MEMORY. */
qie_status qie_observer_save(qie_observer *o, qie_error *err);

#endif
