/* What a run calls: each operation of a back end with its shape, how often, for how long. The table
 * of functions is replaced by one that notes and passes on; nothing is allocated while it records.
 */
#ifndef QIE_COMPUTE_OP_RECORD_H
#define QIE_COMPUTE_OP_RECORD_H

#include "compute/op_bench.h"

#define QIE_MAX_OP_USES 256

typedef struct qie_op_use {
    qie_op_shape shape;
    int group; /* the recorder's when it was called */
    int64_t calls;
    double seconds;
} qie_op_use;

typedef struct qie_op_record {
    qie_ops own; /* of the back end, called by the noting ones */
    int group;
    size_t n;
    int64_t n_lost; /* calls of shapes beyond the table */
    qie_op_use uses[QIE_MAX_OP_USES];
} qie_op_record;

/* Start noting into r, which is cleared and must live until the end. One recorder at a time. */
void qie_op_record_begin(qie_compute *c, qie_op_record *r);
void qie_op_record_end(qie_compute *c);

#endif
