#define _GNU_SOURCE
#include "base/trace.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"

enum { MAX_SPANS = 2000000 };

typedef struct span {
    double from_s, to_s;
    const char *category;
    int thread;
    char name[36];
} span;

/* Process-wide by nature: all threads note into one file. */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *path; /* NULL: off */
static span *spans;
static size_t n_spans, cap, n_lost;
static int n_threads;
static _Thread_local int thread; /* from 1, in the order of their first span */

static void read_environment(void) {
    const char *from = getenv("QIE_TRACE");
    path = from && *from ? strdup(from) : NULL;
}

bool qie_trace_on(void) {
    pthread_once(&once, read_environment);
    return path != NULL;
}

static span *room(void) {
    if (n_spans == cap && cap < MAX_SPANS) {
        size_t more = cap ? 2 * cap : 4096;
        more = more < MAX_SPANS ? more : MAX_SPANS;
        span *p = realloc(spans, more * sizeof *spans);
        if (p) {
            spans = p;
            cap = more;
        }
    }
    if (n_spans == cap) {
        n_lost++;
        return NULL;
    }
    return &spans[n_spans++];
}

void qie_trace_span(const char *category, double from_s, const char *name, ...) {
    if (!qie_trace_on())
        return;
    span s = {.from_s = from_s, .to_s = qie_now_s(), .category = category};
    va_list ap;
    va_start(ap, name);
    vsnprintf(s.name, sizeof s.name, name, ap);
    va_end(ap);
    pthread_mutex_lock(&lock);
    if (!thread)
        thread = ++n_threads;
    s.thread = thread;
    span *to = room();
    if (to)
        *to = s;
    pthread_mutex_unlock(&lock);
}

static void write_spans(FILE *f) {
    long pid = (long)getpid();
    fputs("{\"displayTimeUnit\": \"ms\", \"traceEvents\": [", f);
    for (int i = 1; i <= n_threads; i++)
        fprintf(f,
                "%s\n{\"ph\": \"M\", \"name\": \"thread_name\", \"pid\": %ld, \"tid\": %d, "
                "\"args\": {\"name\": \"thread %d\"}}",
                i > 1 ? "," : "", pid, i, i);
    for (size_t i = 0; i < n_spans; i++) {
        const span *s = &spans[i];
        fprintf(f,
                ",\n{\"ph\": \"X\", \"cat\": \"%s\", \"name\": \"%s\", \"pid\": %ld, \"tid\": %d, "
                "\"ts\": %.3f, \"dur\": %.3f}",
                s->category, s->name, pid, s->thread, s->from_s * 1e6, (s->to_s - s->from_s) * 1e6);
    }
    fputs("\n]}\n", f);
}

qie_status qie_trace_save(qie_error *err) {
    if (!qie_trace_on())
        return QIE_OK;
    FILE *f = fopen(path, "we");
    QIE_FAIL_IF(!f, QIE_E_IO, err, "QIE_TRACE", "cannot write '%s': %s", path, strerror(errno));
    pthread_mutex_lock(&lock);
    write_spans(f);
    size_t lost = n_lost;
    pthread_mutex_unlock(&lock);
    bool bad = ferror(f) != 0;
    bad = fclose(f) != 0 || bad;
    QIE_FAIL_IF(bad, QIE_E_IO, err, "QIE_TRACE", "cannot write '%s': %s", path, strerror(errno));
    QIE_FAIL_IF(lost, QIE_E_NO_MEMORY, err, "QIE_TRACE", "'%s' lacks the last %zu spans", path,
                lost);
    return QIE_OK;
}
