/* What the same cores do in oneDNN, as the measure that benchmarks are held against. */
#ifndef QIE_COMPUTE_CPU_ONEDNN_ROOF_H
#define QIE_COMPUTE_CPU_ONEDNN_ROOF_H

#include <stdint.h>

#include "base/dtype.h"

/* Seconds of the fastest and the median of `repeats` products [m, k] x [k, n] in F32 or BF16,
 * weights in the layout that oneDNN likes best (reordered beforehand, not timed), by the given
 * clock. -1 if oneDNN refuses. */
int qie_onednn_time_matmul(qie_dtype dtype, int64_t m, int64_t n, int64_t k, int n_threads,
                           int repeats, double (*clock_s)(void), double *fastest, double *median);
/* The same for a 3 x 3 or 1 x 1 convolution of [h, w, in] to [ho, wo, out], channels last. */
int qie_onednn_time_conv(qie_dtype dtype, int h, int w, int in, int out, int kernel, int stride,
                         int n_threads, int repeats, double (*clock_s)(void), double *fastest,
                         double *median);

#endif
