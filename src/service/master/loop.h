/* The master's one loop: descriptors and what is called when they are ready. */
#ifndef QIE_SERVICE_LOOP_H
#define QIE_SERVICE_LOOP_H

#include <stdbool.h>
#include <stdint.h>

#include "qie/error.h"

typedef struct svc_loop svc_loop;
typedef struct svc_watch svc_watch;
typedef void (*svc_watch_fn)(void *arg, uint32_t events);

qie_status svc_loop_create(svc_loop **out, qie_error *err);
void svc_loop_destroy(svc_loop *l);
/* events as of epoll; NULL when the kernel refuses. */
svc_watch *svc_loop_watch(svc_loop *l, int fd, uint32_t events, svc_watch_fn fn, void *arg);
/* Also from inside a callback; call before the descriptor is closed. */
void svc_loop_unwatch(svc_loop *l, svc_watch *w);
void svc_loop_run_once(svc_loop *l, int timeout_ms);

#endif
