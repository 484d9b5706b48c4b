/* For tests of operations: buffers between guard pages, random contents, every level of this
 * machine. */
#ifndef OP_TEST_H
#define OP_TEST_H

#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include <sys/mman.h>
#include <unistd.h>

#include "compute/backend.h"
#include "compute/cpu/cpu_backend.h"
#include "qtest.h"

static const qie_compute_limits OP_LIMITS = {
    .max_k = 4096, .max_n = 4096, .max_conv_k = 3456, .max_conv_n = 384, .max_head_dim = 512};

/* Lowest level of a test: the emulated copies of the tests leave out what every machine runs. */
#ifdef OP_EMULATED
#define OP_FIRST_LEVEL QIE_CPU_AVX512
#else
#define OP_FIRST_LEVEL QIE_CPU_AVX2
#endif

typedef struct op_buf {
    unsigned char *map, *data;
    size_t map_bytes, bytes;
} op_buf;

/* `bytes` that end (or with at_start: begin) at a page that must not be touched. */
static inline op_buf op_alloc(size_t bytes, bool at_start) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    op_buf b = {.map_bytes = body + 2 * page, .bytes = bytes};
    void *p = mmap(NULL, b.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        abort();
    b.map = p;
    mprotect(b.map, page, PROT_NONE);
    mprotect(b.map + page + body, page, PROT_NONE);
    b.data = at_start ? b.map + page : b.map + page + body - bytes;
    return b;
}
static inline void op_free(op_buf *b) {
    if (b->map)
        munmap(b->map, b->map_bytes);
    b->map = NULL;
}

static uint64_t op_seed = 1;
static inline uint32_t op_u32(void) {
    op_seed = op_seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(op_seed >> 33);
}
/* About normal, sigma 1. */
static inline float op_normal(void) {
    float s = 0;
    for (int i = 0; i < 4; i++)
        s += (float)(op_u32() & 0xffff) / 65536.0f - 0.5f;
    return s * 1.7320508f;
}
static inline void op_put(void *data, qie_dtype t, size_t i, float v) {
    unsigned char *p = (unsigned char *)data + i * qie_dtype_size(t);
    if (t == QIE_F32) {
        memcpy(p, &v, 4);
    } else {
        uint16_t h = t == QIE_BF16 ? qie_f32_to_bf16(v) : qie_f32_to_f16(v);
        memcpy(p, &h, 2);
    }
}
static inline float op_get(const void *data, qie_dtype t, size_t i) {
    float v = 0;
    qie_to_f32(&v, (const unsigned char *)data + i * qie_dtype_size(t), t, 1);
    return v;
}
static inline void op_fill(void *data, qie_dtype t, size_t n, float scale, float offset) {
    for (size_t i = 0; i < n; i++)
        op_put(data, t, i, op_normal() * scale + offset);
}
/* Random buffer of n elements. */
static inline op_buf op_random(qie_dtype t, size_t n, float scale, bool at_start) {
    op_buf b = op_alloc(n * qie_dtype_size(t), at_start);
    op_fill(b.data, t, n, scale, 0);
    return b;
}
static inline op_buf op_copy(const op_buf *from, bool at_start) {
    op_buf b = op_alloc(from->bytes, at_start);
    memcpy(b.data, from->data, from->bytes);
    return b;
}
static inline double op_nmse(const void *a, const void *ref, qie_dtype t, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        double x = (double)op_get(a, t, i), y = (double)op_get(ref, t, i);
        if (!isfinite(x) != !isfinite(y))
            return INFINITY;
        if (!isfinite(x))
            continue;
        num += (x - y) * (x - y);
        den += y * y;
    }
    return den > 0 ? num / den : num;
}
static inline qie_compute *op_compute(const char *name, qie_cpu_level level, int n_threads) {
    qie_compute *c = NULL;
    qie_error e;
    if (qie_compute_create_level(name, level, n_threads, &OP_LIMITS, &c, &e) != QIE_OK) {
        printf("  %s\n", e.message);
        abort();
    }
    return c;
}
static inline const char *op_dtype(qie_dtype t) {
    return qie_dtype_name(t);
}

#endif
