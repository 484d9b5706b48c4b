/* Plain C versions of all operations: the definition that every variant is tested against. */
#ifndef QIE_COMPUTE_CPU_REF_H
#define QIE_COMPUTE_CPU_REF_H

#include "compute/backend.h"

/* Fill every entry. Needs no scratch. */
void qie_ref_fill(qie_ops *ops);

/* One element of a matrix or vector as f32. */
float qie_ref_load(const void *data, qie_dtype dtype, int64_t i);
/* Elements [from, from + n) of a row of a weight, scale applied; whole blocks. */
void qie_ref_load_weights(float *dst, const qie_wmat *w, int64_t row, int64_t from, int64_t n);
void qie_ref_store(void *data, qie_dtype dtype, int64_t i, float v);
float qie_ref_act(qie_act act, float v);

#endif
