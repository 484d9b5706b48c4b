/* Creation with the level given, for tests and benchmarks; everybody else takes qie_compute_create.
 */
#ifndef QIE_COMPUTE_CPU_CPU_BACKEND_H
#define QIE_COMPUTE_CPU_CPU_BACKEND_H

#include "compute/backend.h"

/* `level` must not exceed qie_cpu_level_hardware(). */
qie_status qie_compute_create_level(const char *name, qie_cpu_level level, int n_threads,
                                    const qie_compute_limits *limits, qie_compute **out,
                                    qie_error *err);

#endif
