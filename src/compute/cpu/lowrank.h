/* LoRA terms of a linear layer, what all back ends of the CPU share. */
#ifndef QIE_COMPUTE_CPU_LOWRANK_H
#define QIE_COMPUTE_CPU_LOWRANK_H

#include "compute/backend.h"

/* Sum of the ranks: columns of a->lowrank_room. */
int64_t qie_lowrank_total(const qie_linear_args *a);
/* Fill a->lowrank_room: [m, total] of scale_i (x down_i^T), through c's own linear. */
void qie_lowrank_project(qie_compute *c, const qie_linear_args *a);

#endif
