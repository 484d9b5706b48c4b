/* A GGUF file in memory, field by field, for tests: nothing is checked. */
#ifndef GGUF_MAKE_H
#define GGUF_MAKE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct gguf_make {
    unsigned char data[1 << 16];
    size_t n;
} gguf_make;

static inline void gguf_bytes(gguf_make *g, const void *p, size_t n) {
    memcpy(g->data + g->n, p, n);
    g->n += n;
}
static inline void gguf_u32(gguf_make *g, uint32_t v) {
    gguf_bytes(g, &v, 4);
}
static inline void gguf_u64(gguf_make *g, uint64_t v) {
    gguf_bytes(g, &v, 8);
}
static inline void gguf_text(gguf_make *g, const char *s) {
    gguf_u64(g, strlen(s));
    gguf_bytes(g, s, strlen(s));
}
static inline void gguf_start(gguf_make *g, uint32_t version, uint64_t tensors, uint64_t pairs) {
    g->n = 0;
    gguf_bytes(g, "GGUF", 4);
    gguf_u32(g, version);
    gguf_u64(g, tensors);
    gguf_u64(g, pairs);
}
static inline void gguf_pair_text(gguf_make *g, const char *key, const char *value) {
    gguf_text(g, key);
    gguf_u32(g, 8);
    gguf_text(g, value);
}
static inline void gguf_pair_u32(gguf_make *g, const char *key, uint32_t v) {
    gguf_text(g, key);
    gguf_u32(g, 4);
    gguf_u32(g, v);
}
static inline void gguf_tensor(gguf_make *g, const char *name, int n_dims, uint64_t d0, uint64_t d1,
                               uint32_t type, uint64_t offset) {
    gguf_text(g, name);
    gguf_u32(g, (uint32_t)n_dims);
    if (n_dims > 0)
        gguf_u64(g, d0);
    if (n_dims > 1)
        gguf_u64(g, d1);
    gguf_u32(g, type);
    gguf_u64(g, offset);
}
static inline void gguf_pad(gguf_make *g, size_t alignment) {
    while (g->n % alignment)
        g->data[g->n++] = 0;
}
/* Two tensors, text, numbers, and arrays of each kind. */
static inline void gguf_example(gguf_make *g, uint32_t version) {
    gguf_start(g, version, 2, 6);
    gguf_pair_text(g, "general.architecture", "qwen_image");
    gguf_pair_u32(g, "general.alignment", 64);
    gguf_text(g, "a.float"), gguf_u32(g, 6), gguf_bytes(g, &(float){0.5f}, 4);
    gguf_text(g, "a.numbers"), gguf_u32(g, 9), gguf_u32(g, 5), gguf_u64(g, 3);
    gguf_bytes(g, (int32_t[]){16, -24, 3}, 12);
    gguf_text(g, "a.strings"), gguf_u32(g, 9), gguf_u32(g, 8), gguf_u64(g, 2);
    gguf_text(g, "one"), gguf_text(g, "two words");
    gguf_text(g, "a.nested"), gguf_u32(g, 9), gguf_u32(g, 9), gguf_u64(g, 1);
    gguf_u32(g, 0), gguf_u64(g, 2), gguf_bytes(g, "ab", 2);
    gguf_tensor(g, "w", 2, 32, 3, 8, 0);
    gguf_tensor(g, "b", 1, 5, 0, 0, 128);
    gguf_pad(g, 64);
    for (int i = 0; i < 128 + 20; i++)
        g->data[g->n++] = (unsigned char)i;
}

#endif
