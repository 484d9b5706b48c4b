/* Elements of stored weights as floats: 8-bit floats, integers and the blocks of GGUF files.
 *
 * The plain definition of every layout: the faster readers of compute/cpu are tested against it.
 * Each value is made by the same float operations as in the format's reference (scale times
 * integer, then minus the minimum, each rounded), so values are equal to the bit. */
#ifndef QIE_BASE_BLOCKS_H
#define QIE_BASE_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"

/* The 16 levels of IQ4_NL and IQ4_XS. */
extern const int8_t QIE_IQ4_LEVELS[16];

float qie_f8_e4m3_to_f32(uint8_t b);
float qie_f8_e5m2_to_f32(uint8_t b);
/* Nearest, ties to even; beyond 448 the largest finite value; NaN stays NaN. */
uint8_t qie_f32_to_f8_e4m3(float f);

/* The eight 6-bit (scale, minimum) pairs of Q4_K and Q5_K. */
void qie_k_scales(const uint8_t packed[12], uint8_t scale[8], uint8_t min[8]);
/* The sixteen 6-bit scales of Q3_K, 0..63 (stored with 32 added). */
void qie_q3_k_scales(const uint8_t packed[12], uint8_t scale[16]);

/* n elements of type F8_*, I8 or blocks (n a multiple of the block's elements) at src, which needs
 * no alignment. -1 for other types. */
int qie_blocks_to_f32(float *dst, const void *src, qie_dtype dtype, size_t n);

/* Types whose elements are integers of 8 bits times a float that QIE_INT8_GROUP neighbours share.
 */
#define QIE_INT8_GROUP 32
bool qie_blocks_are_int8(qie_dtype dtype);
/* n elements of such a type (whole blocks) as their n integers and n / QIE_INT8_GROUP factors; each
 * product rounded is what qie_blocks_to_f32 gives. */
void qie_blocks_to_int8(int8_t *q, float *scale, const void *src, qie_dtype dtype, size_t n);

#endif
