/* Bump allocator over one reserved range of addresses, with a ceiling fixed at creation.
 *
 * Address space is reserved once; pages become resident on first touch and are given back by reset.
 * This is the only source of memory while an edit computes: a request whose plan fits cannot fail
 * half way. */
#ifndef QIE_BASE_ARENA_H
#define QIE_BASE_ARENA_H

#include <stddef.h>

#include "qie/error.h"

typedef struct qie_arena qie_arena;

#define QIE_ARENA_ALIGN 64u

/* Reserve `capacity` bytes (rounded up to pages). Errors: QIE_E_NO_MEMORY. */
qie_status qie_arena_create(size_t capacity, qie_arena **out, qie_error *err);
/* Over memory of somebody else, which is only divided, never touched: a device's. Errors:
 * QIE_E_NO_MEMORY. */
qie_status qie_arena_create_over(void *base, size_t capacity, qie_arena **out, qie_error *err);
void qie_arena_destroy(qie_arena *a);
/* 64-byte aligned, not zeroed after a release; NULL when the ceiling is reached. */
void *qie_arena_alloc(qie_arena *a, size_t bytes);
/* Position to release to later: everything allocated after the mark dies, in one go. */
size_t qie_arena_mark(const qie_arena *a);
void qie_arena_release(qie_arena *a, size_t mark);
/* Release all and give the pages back to the system. */
void qie_arena_reset(qie_arena *a);
size_t qie_arena_capacity(const qie_arena *a);
/* Highest use since creation or reset, in bytes. */
size_t qie_arena_peak(const qie_arena *a);
/* Bytes that an allocation of `bytes` really takes: for planning. */
size_t qie_arena_rounded(size_t bytes);

#endif
