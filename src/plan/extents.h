/* Largest extents of all operations of a model, from its configs: what scratch is made for. */
#ifndef QIE_PLAN_EXTENTS_H
#define QIE_PLAN_EXTENTS_H

#include "plan/config.h"

typedef struct qie_extents {
    int64_t max_k;      /* inner dimension of any linear */
    int64_t max_n;      /* outer dimension of any linear */
    int64_t max_conv_k; /* in * kh * kw of any convolution */
    int64_t max_conv_n; /* out of any convolution */
    int max_head_dim;
} qie_extents;

qie_extents qie_extents_of(const qie_model_config *c);

#endif
