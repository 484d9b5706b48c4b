#define _GNU_SOURCE
#include "service/master/loop.h"

#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/error.h"

struct svc_watch {
    int fd;
    svc_watch_fn fn; /* NULL: taken away */
    void *arg;
    svc_watch *prev, *next; /* among the live ones, then (next) among the dead */
};

struct svc_loop {
    int fd;
    svc_watch *live; /* owned: who watches to the end need not take it away */
    svc_watch *dead; /* freed when the batch of events that may name them is over */
};

qie_status svc_loop_create(svc_loop **out, qie_error *err) {
    svc_loop *l = calloc(1, sizeof *l);
    *out = NULL;
    QIE_FAIL_IF(!l, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    l->fd = epoll_create1(EPOLL_CLOEXEC);
    if (l->fd < 0) {
        free(l);
        return qie_fail(err, QIE_E_IO, NULL, "no epoll");
    }
    *out = l;
    return QIE_OK;
}

static void free_list(svc_watch **list) {
    while (*list) {
        svc_watch *w = *list;
        *list = w->next;
        free(w);
    }
}

void svc_loop_destroy(svc_loop *l) {
    if (!l)
        return;
    free_list(&l->dead);
    free_list(&l->live);
    close(l->fd);
    free(l);
}

svc_watch *svc_loop_watch(svc_loop *l, int fd, uint32_t events, svc_watch_fn fn, void *arg) {
    svc_watch *w = calloc(1, sizeof *w);
    struct epoll_event e = {.events = events, .data.ptr = w};
    if (!w)
        return NULL;
    w->fd = fd;
    w->fn = fn;
    w->arg = arg;
    if (epoll_ctl(l->fd, EPOLL_CTL_ADD, fd, &e)) {
        free(w);
        return NULL;
    }
    w->next = l->live;
    if (l->live)
        l->live->prev = w;
    l->live = w;
    return w;
}

void svc_loop_unwatch(svc_loop *l, svc_watch *w) {
    if (!w || !w->fn)
        return;
    epoll_ctl(l->fd, EPOLL_CTL_DEL, w->fd, NULL);
    w->fn = NULL;
    *(w->prev ? &w->prev->next : &l->live) = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->next = l->dead;
    l->dead = w;
}

void svc_loop_run_once(svc_loop *l, int timeout_ms) {
    struct epoll_event events[64];
    int n = epoll_wait(l->fd, events, 64, timeout_ms);
    for (int i = 0; i < n; i++) {
        svc_watch *w = events[i].data.ptr;
        if (w->fn)
            w->fn(w->arg, events[i].events);
    }
    free_list(&l->dead);
}
