/* Operations by shape: what one call computes, how long it takes alone, and the roof beside it.
 *
 * The roof is oneDNN in the same process: for linear and conv2d the same shape with weights in the
 * layout that it prefers, reordered beforehand; for attention the rate of a product of 1024 x 1024
 * x 1024. */
#ifndef QIE_COMPUTE_OP_BENCH_H
#define QIE_COMPUTE_OP_BENCH_H

#include "compute/backend.h"

#define QIE_OP_DIMS 7

/* linear: m n k; attention: nq nk heads kv_heads head_dim causal segment (length of independent
 * segments, 0: one); conv2d: h w in out kernel stride up (of the input); other operations: rows
 * columns. */
typedef struct qie_op_shape {
    char op[16];
    int64_t dims[QIE_OP_DIMS];
    qie_dtype act, weight; /* of the input; of the weights (attention and others: as act) */
    bool int8;             /* linear: multiplied in 8-bit integers, stored ones as they are */
} qie_op_shape;

/* Dimensions that an operation of this name has: 3, 7 or 2. */
int qie_op_n_dims(const char *op);
/* Multiply-adds count as two; 0 for operations that are not products. */
double qie_op_gflop(const qie_op_shape *s);
bool qie_op_equal(const qie_op_shape *a, const qie_op_shape *b);

typedef struct qie_op_bench_options {
    int repeats;
    bool roof;
    double (*clock_s)(void); /* NULL: qie_now_s */
} qie_op_bench_options;

typedef struct qie_op_time {
    double fastest, median, roof; /* seconds; roof 0: none */
} qie_op_time;

/* Time a linear, attention or conv2d on made-up values: one run to warm up, then `repeats`. Errors:
 * QIE_E_UNSUPPORTED (other operations, types without made-up values), QIE_E_NO_MEMORY. */
qie_status qie_op_bench(qie_compute *c, const qie_op_shape *s, const qie_op_bench_options *o,
                        qie_op_time *out, qie_error *err);

#endif
