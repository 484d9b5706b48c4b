/* Mutual exclusion for the few places where several threads share state outside of
 * qie_parallel_for's split-by-output rule (a download whose hash is computed while it arrives). */
#ifndef QIE_BASE_SYNC_H
#define QIE_BASE_SYNC_H

#include <pthread.h>
#include <time.h>

typedef pthread_mutex_t qie_mutex;
#define QIE_MUTEX_INIT PTHREAD_MUTEX_INITIALIZER

static inline void qie_mutex_init(qie_mutex *m) {
    pthread_mutex_init(m, NULL);
}
static inline void qie_mutex_release(qie_mutex *m) {
    pthread_mutex_destroy(m);
}
static inline void qie_mutex_lock(qie_mutex *m) {
    pthread_mutex_lock(m);
}
static inline void qie_mutex_unlock(qie_mutex *m) {
    pthread_mutex_unlock(m);
}

#endif
