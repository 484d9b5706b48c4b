#define _GNU_SOURCE
#include "service/master/tasks.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/error.h"

#define MAX_THREADS 8

typedef struct queue {
    svc_task *first, **last;
} queue;

static void push(queue *q, svc_task *t) {
    t->next = NULL;
    *q->last = t;
    q->last = &t->next;
}

static svc_task *pop_all(queue *q) {
    svc_task *t = q->first;
    q->first = NULL;
    q->last = &q->first;
    return t;
}

struct svc_done {
    pthread_mutex_t lock;
    queue finished;
    int fd;
};

qie_status svc_done_create(svc_done **out, qie_error *err) {
    svc_done *d = calloc(1, sizeof *d);
    *out = NULL;
    QIE_FAIL_IF(!d, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    d->finished.last = &d->finished.first;
    d->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->fd < 0) {
        free(d);
        return qie_fail(err, QIE_E_IO, NULL, "no eventfd");
    }
    pthread_mutex_init(&d->lock, NULL);
    *out = d;
    return QIE_OK;
}

void svc_done_destroy(svc_done *d) {
    if (!d)
        return;
    close(d->fd);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

int svc_done_fd(const svc_done *d) {
    return d->fd;
}

void svc_done_post(svc_done *d, svc_task *task) {
    uint64_t one = 1;
    pthread_mutex_lock(&d->lock);
    bool first = !d->finished.first;
    push(&d->finished, task);
    pthread_mutex_unlock(&d->lock);
    if (first) {
        ssize_t ignored = write(d->fd, &one, sizeof one);
        (void)ignored;
    }
}

void svc_done_deliver(svc_done *d) {
    uint64_t n;
    ssize_t ignored = read(d->fd, &n, sizeof n);
    (void)ignored;
    pthread_mutex_lock(&d->lock);
    svc_task *t = pop_all(&d->finished);
    pthread_mutex_unlock(&d->lock);
    while (t) {
        svc_task *next = t->next;
        t->done(t);
        t = next;
    }
}

struct svc_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    queue waiting;
    svc_done *done;
    bool quit, stopped;
    int n;
    pthread_t threads[MAX_THREADS];
};

static void *work(void *arg) {
    svc_pool *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->waiting.first && !p->quit)
            pthread_cond_wait(&p->wake, &p->lock);
        svc_task *t = p->waiting.first;
        if (!t)
            break;
        p->waiting.first = t->next;
        if (!t->next)
            p->waiting.last = &p->waiting.first;
        pthread_mutex_unlock(&p->lock);
        t->run(t);
        svc_done_post(p->done, t);
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

qie_status svc_pool_create(int n_threads, svc_done *done, svc_pool **out, qie_error *err) {
    svc_pool *p = calloc(1, sizeof *p);
    sigset_t all, old;
    *out = NULL;
    QIE_FAIL_IF(!p, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    p->done = done;
    p->waiting.last = &p->waiting.first;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    sigfillset(&all); /* signals are the loop's */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (; p->n < n_threads && p->n < MAX_THREADS; p->n++)
        if (pthread_create(&p->threads[p->n], NULL, work, p))
            break;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (p->n == 0) {
        svc_pool_destroy(p);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "no thread");
    }
    *out = p;
    return QIE_OK;
}

void svc_pool_stop(svc_pool *p) {
    if (!p || p->stopped)
        return;
    pthread_mutex_lock(&p->lock);
    p->quit = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n; i++)
        pthread_join(p->threads[i], NULL);
    p->stopped = true;
}

void svc_pool_destroy(svc_pool *p) {
    if (!p)
        return;
    svc_pool_stop(p);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void svc_pool_post(svc_pool *p, svc_task *task) {
    if (p->stopped) {
        task->run(task);
        svc_done_post(p->done, task);
        return;
    }
    pthread_mutex_lock(&p->lock);
    push(&p->waiting, task);
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
}
