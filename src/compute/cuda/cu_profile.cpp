/* The dearest operations of a card, by shape: QIE_CUDA_PROFILE=FILE. Waiting for the card around
 * each one takes the overlap away, so the whole runs slower than without; shares are what it tells.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "compute/cuda/cu_state.hpp"

enum { KINDS = 512 };

struct cu_profile {
    char path[512];
    struct kind {
        char label[96];
        int64_t calls;
        double seconds;
    } kinds[KINDS];
    int n, current; /* current: what runs since `since`; -1: nothing */
    double since;
};

static double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cu_profile_create(cu_backend *b, const char *path) {
    b->profile = (cu_profile *)calloc(1, sizeof *b->profile);
    if (!b->profile)
        return;
    snprintf(b->profile->path, sizeof b->profile->path, "%s", path);
    b->profile->current = -1;
}

/* What ran since the last call ends here. */
static void close_current(cu_backend *b) {
    cu_profile *p = b->profile;
    cu_good(b, b->current, cu_stream_sync(b->cards[b->current].compute));
    if (p->current >= 0) {
        p->kinds[p->current].calls++;
        p->kinds[p->current].seconds += now() - p->since;
    }
    p->current = -1;
}

void cu_profile_note(cu_backend *b, const char *fmt, ...) {
    cu_profile *p = b->profile;
    char label[96];
    va_list ap;
    if (!p || b->failed)
        return;
    close_current(b);
    va_start(ap, fmt);
    vsnprintf(label, sizeof label, fmt, ap);
    va_end(ap);
    int k = 0;
    while (k < p->n && strcmp(p->kinds[k].label, label))
        k++;
    if (k == KINDS)
        return;
    if (k == p->n)
        memcpy(p->kinds[p->n++].label, label, sizeof label);
    p->current = k;
    p->since = now();
}

static int dearest_first(const void *a, const void *b) {
    double x = ((const cu_profile::kind *)a)->seconds, y = ((const cu_profile::kind *)b)->seconds;
    return (x < y) - (x > y);
}

void cu_profile_release(cu_backend *b) {
    cu_profile *p = b->profile;
    if (!p)
        return;
    if (!b->failed)
        close_current(b);
    FILE *f = fopen(p->path, "w");
    qsort(p->kinds, (size_t)p->n, sizeof *p->kinds, dearest_first);
    for (int k = 0; f && k < p->n; k++)
        fprintf(f, "%.6f\t%lld\t%s\n", p->kinds[k].seconds, (long long)p->kinds[k].calls,
                p->kinds[k].label);
    if (f)
        fclose(f);
    free(p);
    b->profile = NULL;
}
