#define _GNU_SOURCE
#include "base/arena.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#define GUARD 64u /* bytes left poisoned behind each allocation */
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
#define GUARD 0u
#endif

struct qie_arena {
    unsigned char *base;
    size_t capacity, mapped, used, peak;
    bool foreign; /* addresses of a device: never touched here */
};

size_t qie_arena_rounded(size_t bytes) {
    return (bytes + QIE_ARENA_ALIGN - 1) / QIE_ARENA_ALIGN * QIE_ARENA_ALIGN;
}

qie_status qie_arena_create(size_t capacity, qie_arena **out, qie_error *err) {
    *out = NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    QIE_FAIL_IF(capacity > SIZE_MAX / 4, QIE_E_NO_MEMORY, err, NULL, "cannot reserve %zu bytes",
                capacity);
    /* Guards exist under ASan only; the extra room keeps the plan's ceiling the same in both
     * builds. */
    size_t mapped = (capacity + (GUARD ? capacity / 8 + (1u << 20) : 0) + page) / page * page;
    qie_arena *a = calloc(1, sizeof *a);
    QIE_FAIL_IF(!a, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    void *p = mmap(NULL, mapped, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        free(a);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "cannot reserve %zu MB of address space",
                        mapped >> 20);
    }
    /* Large pages save a good part of the page faults on buffers of hundreds of megabytes. */
    if (mapped >= (8u << 20))
        madvise(p, mapped, MADV_HUGEPAGE);
    a->base = p;
    a->capacity = capacity;
    a->mapped = mapped;
    POISON(a->base, mapped);
    *out = a;
    return QIE_OK;
}

qie_status qie_arena_create_over(void *base, size_t capacity, qie_arena **out, qie_error *err) {
    *out = calloc(1, sizeof **out);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    **out = (qie_arena){.base = base, .capacity = capacity, .mapped = capacity, .foreign = true};
    return QIE_OK;
}

void qie_arena_destroy(qie_arena *a) {
    if (!a)
        return;
    if (!a->foreign) {
        UNPOISON(a->base, a->mapped);
        munmap(a->base, a->mapped);
    }
    free(a);
}

void *qie_arena_alloc(qie_arena *a, size_t bytes) {
    if (bytes > a->mapped)
        return NULL;
    size_t n = qie_arena_rounded(bytes ? bytes : 1) + (a->foreign ? 0 : GUARD);
    if (n > a->mapped - a->used)
        return NULL;
    unsigned char *p = a->base + a->used;
    a->used += n;
    if (a->used > a->peak)
        a->peak = a->used;
    if (!a->foreign)
        UNPOISON(p, bytes);
    return p;
}

size_t qie_arena_mark(const qie_arena *a) {
    return a->used;
}

void qie_arena_release(qie_arena *a, size_t mark) {
    if (mark < a->used) {
        if (!a->foreign)
            POISON(a->base + mark, a->used - mark);
        a->used = mark;
    }
}

void qie_arena_reset(qie_arena *a) {
    qie_arena_release(a, 0);
    if (a->peak && !a->foreign)
        madvise(a->base, a->mapped, MADV_DONTNEED);
    a->peak = 0;
}

size_t qie_arena_capacity(const qie_arena *a) {
    return a->capacity;
}
size_t qie_arena_peak(const qie_arena *a) {
    return a->peak;
}
