/* torch's CPU random numbers: torch.Generator("cpu").manual_seed(seed), torch.randn(...).
 *
 * Bit-exact with torch 2.15 on x86 for float32 (spec: docs/MODEL.md, noise). Only the low 32 bits
 * of a seed matter, as in torch. */
#ifndef QIE_BASE_RNG_H
#define QIE_BASE_RNG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct qie_rng {
    uint32_t state[624];
    unsigned next;
    bool has_spare; /* second half of a Box-Muller pair, kept for the next scalar draw */
    double spare;
} qie_rng;

void qie_rng_seed(qie_rng *rng, uint64_t seed);
uint32_t qie_rng_u32(qie_rng *rng);
/* n standard normal values as torch.randn draws them in one call. bf16: values rounded to bf16 (as
 * f32). */
void qie_rng_normal(qie_rng *rng, float *out, size_t n, bool bf16);
/* A seed from the system's entropy, in 0 .. 2^31-1. */
uint64_t qie_random_seed(void);
/* Another seed, in 0 .. 2^31-1, that depends only on this one: a chain of edits can be repeated. */
uint64_t qie_derived_seed(uint64_t seed);

#endif
