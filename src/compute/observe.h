/* Named intermediate tensors of a run: written into a safetensors file, for comparison with a
 * reference, or searched for values that are not finite.
 *
 * QIE_DUMP=out.safetensors turns the first on, QIE_DUMP_NAMES='prompt_embeds,block.0.*' chooses
 * (default: all); the first tensor of a name is kept. QIE_CHECK_FINITE=1 turns the second on: the
 * first tensor with an infinity or a NaN is named, once, in the log, with the value's place and
 * the tensor before it. Names equal those of the reference recordings. The caller asks before it
 * computes anything only for an observer. */
#ifndef QIE_COMPUTE_OBSERVE_H
#define QIE_COMPUTE_OBSERVE_H

#include <stdbool.h>
#include <stdint.h>

#include "compute/backend.h"
#include "qie/error.h"

typedef struct qie_observer qie_observer;

/* From the environment; *out is NULL when neither is set. */
qie_status qie_observer_create_from_env(qie_observer **out, qie_error *err);
void qie_observer_destroy(qie_observer *o);
/* False for o NULL. */
bool qie_observer_wants(const qie_observer *o, const char *name);
/* Is it of use to call with the same name again, in other steps? */
bool qie_observer_checks(const qie_observer *o);
/* Takes what it wants of the data, of the given shape. */
void qie_observe_f32(qie_observer *o, const char *name, const float *data, int n_dims,
                     const int64_t *shape);
void qie_observe_i64(qie_observer *o, const char *name, const int64_t *data, int n_dims,
                     const int64_t *shape);
/* Write the file. Errors: QIE_E_IO, QIE_E_NO_MEMORY. */
qie_status qie_observer_save(qie_observer *o, qie_error *err);

#endif
