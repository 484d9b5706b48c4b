/* How large the inputs of linear layers are: of each layer that is asked about, the mean square of
 * every column of x over all rows that it meets. The table of functions is replaced by one that
 * sums and passes on. For back ends on host memory. */
#ifndef QIE_COMPUTE_OP_INPUTS_H
#define QIE_COMPUTE_OP_INPUTS_H

#include "compute/backend.h"

typedef struct qie_op_input {
    const void *weight; /* which layer: the begin of its weight */
    const char *name;   /* borrowed */
    int64_t k, rows;    /* columns of x; rows met so far */
    double *sums;       /* k sums of squares; owned */
} qie_op_input;

typedef struct qie_op_inputs {
    qie_ops own; /* of the back end, called by the summing one */
    size_t n, cap;
    qie_op_input *list;
} qie_op_inputs;

/* Room for up to `cap` layers; add each before begin. Errors: QIE_E_NO_MEMORY. */
qie_status qie_op_inputs_create(size_t cap, qie_op_inputs **out, qie_error *err);
qie_status qie_op_inputs_add(qie_op_inputs *p, const void *weight, const char *name, int64_t k,
                             qie_error *err);
void qie_op_inputs_destroy(qie_op_inputs *p);
/* Start summing, until the compute is destroyed; p must live as long. Not with a qie_op_record. */
void qie_op_inputs_begin(qie_compute *c, qie_op_inputs *p);

#endif
