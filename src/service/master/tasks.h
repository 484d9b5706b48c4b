/* Work off the loop: a few threads take tasks in order, and what they finished is handed back to
 * the loop through an eventfd. The queue's writer posts its completions here too. */
#ifndef QIE_SERVICE_TASKS_H
#define QIE_SERVICE_TASKS_H

#include <stdbool.h>

#include "qie/error.h"

typedef struct svc_task svc_task;
struct svc_task {
    void (*run)(svc_task *task);  /* in a thread */
    void (*done)(svc_task *task); /* in the loop; owns the task from then on */
    svc_task *next;
};

/* What has been finished and waits for the loop. */
typedef struct svc_done svc_done;
qie_status svc_done_create(svc_done **out, qie_error *err);
void svc_done_destroy(svc_done *d);
int svc_done_fd(const svc_done *d);
/* From any thread. */
void svc_done_post(svc_done *d, svc_task *task);
/* In the loop: call `done` of everything finished. */
void svc_done_deliver(svc_done *d);

typedef struct svc_pool svc_pool;
qie_status svc_pool_create(int n_threads, svc_done *done, svc_pool **out, qie_error *err);
/* Finishes what runs and what waits, then ends the threads; what is posted later runs at once in
 * the caller. */
void svc_pool_stop(svc_pool *pool);
void svc_pool_destroy(svc_pool *pool);
void svc_pool_post(svc_pool *pool, svc_task *task);

#endif
