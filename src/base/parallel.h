/* The one way to use several cores: OpenMP's thread pool behind one function.
 *
 * Work is split by output, never by summation, and the split does not depend on the number of
 * threads, so the bytes of a result do not either. Nested calls run on the calling thread. */
#ifndef QIE_BASE_PARALLEL_H
#define QIE_BASE_PARALLEL_H

#include <stddef.h>

/* Called once for each index in [0, n), on any thread; i_thread is in [0, n_threads). */
typedef void (*qie_parallel_fn)(void *arg, size_t index, int i_thread);

/* Run fn for each index in [0, n) on up to n_threads threads; returns when all are done. Indices
 * are handed out one at a time, in order: make each worth >= 10 us. n_threads <= 1: on the calling
 * thread. */
void qie_parallel_for(int n_threads, size_t n, qie_parallel_fn fn, void *arg);
/* Cores this process may use (affinity mask and container CPU quota), at least 1. */
int qie_cpu_count(void);

#endif
