/* Rows of floats as stored weights: the blocks of GGUF files, and 8-bit rows with one scale.
 *
 * The other direction is base/blocks.c, which defines what every byte means. Scales are found by
 * least squares over a few starts, so the error is below that of the largest value alone deciding.
 * The same floats give the same bytes at every level of the processor and number of threads. */
#ifndef QIE_WEIGHTS_QUANT_ROWS_H
#define QIE_WEIGHTS_QUANT_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"

/* Blocks that can be made: Q8_0, Q4_0, Q4_K, Q5_K, Q6_K. */
bool qie_quant_makes_blocks(qie_dtype dtype);
/* One row of n elements as blocks of `dtype`; n must be a multiple of the block's elements and
 * `out` have room for qie_dtype_row_bytes(dtype, n). `importance`: n weights of the squared errors,
 * >= 0 and finite (mean squares of the layer's input); NULL: all equal. False, with `out`
 * undefined, when a value is not finite or too large for the type's scale, or the type is not one
 * of those above. */
bool qie_quant_blocks(qie_dtype dtype, const float *x, const float *importance, int64_t n,
                      void *out);
/* One row of n elements as I8 (-127..127) or F8_E4M3 and its scale: value = stored x *scale. False
 * as above. */
bool qie_quant_scaled(qie_dtype dtype, const float *x, const float *importance, int64_t n,
                      void *out, float *scale);

#endif
