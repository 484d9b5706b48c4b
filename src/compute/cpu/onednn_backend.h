/* Back end "onednn": linear and conv2d through oneDNN, plain C for the rest. An independent
 * implementation to check ours against, and the one to try on processors that we have no kernels
 * for. Not the fast one: weights of another type than the activations are converted tile by tile,
 * and oneDNN allocates small objects per call. */
#ifndef QIE_COMPUTE_CPU_ONEDNN_BACKEND_H
#define QIE_COMPUTE_CPU_ONEDNN_BACKEND_H

#include "compute/backend.h"

/* Bytes of scratch for the given number of threads. */
size_t qie_onednn_scratch_bytes(int n_threads, const qie_compute_limits *limits);
/* Replace linear and conv2d; c->scratch and c->ops are set already. */
qie_status qie_onednn_init(qie_compute *c, const qie_compute_limits *limits, qie_error *err);

#endif
