#include "model/prompt_cache.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"

enum { ENTRIES = 64 }; /* few and large: found by looking at each */

typedef struct entry {
    qie_prompt_key key;
    float *data; /* NULL: free */
    size_t n;
    uint64_t used;
} entry;

struct qie_prompt_cache {
    size_t max_bytes, bytes, hits, misses;
    uint64_t clock;
    entry entries[ENTRIES];
};

qie_status qie_prompt_key_make(const qie_prompt_part *parts, size_t n, qie_prompt_key *out,
                               qie_error *err) {
    qie_hash *h;
    QIE_TRY(qie_hash_create(QIE_HASH_SHA256, 0, &h, err));
    for (size_t i = 0; i < n; i++) {
        uint64_t bytes = parts[i].bytes;
        qie_hash_update(h, &bytes, sizeof bytes);
        qie_hash_update(h, parts[i].data, parts[i].bytes);
    }
    qie_hash_final(h, out->hex);
    qie_hash_destroy(h);
    return QIE_OK;
}

qie_status qie_prompt_cache_create(size_t max_bytes, qie_prompt_cache **out, qie_error *err) {
    *out = calloc(1, sizeof **out);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    (*out)->max_bytes = max_bytes;
    return QIE_OK;
}

static void drop(qie_prompt_cache *c, entry *e) {
    c->bytes -= e->n * sizeof(float);
    free(e->data);
    memset(e, 0, sizeof *e);
}

void qie_prompt_cache_destroy(qie_prompt_cache *c) {
    if (!c)
        return;
    for (int i = 0; i < ENTRIES; i++)
        free(c->entries[i].data);
    free(c);
}

static entry *find(qie_prompt_cache *c, const qie_prompt_key *key) {
    for (int i = 0; i < ENTRIES; i++)
        if (c->entries[i].data && !strcmp(c->entries[i].key.hex, key->hex))
            return &c->entries[i];
    return NULL;
}

bool qie_prompt_cache_get(qie_prompt_cache *c, const qie_prompt_key *key, float *out, size_t n) {
    entry *e = find(c, key);
    if (!e || e->n != n) {
        c->misses++;
        return false;
    }
    c->hits++;
    e->used = ++c->clock;
    memcpy(out, e->data, n * sizeof(float));
    return true;
}

/* A free place after which `bytes` more are within the limit. */
static entry *make_room(qie_prompt_cache *c, size_t bytes) {
    for (;;) {
        entry *oldest = NULL, *empty = NULL;
        for (int i = 0; i < ENTRIES; i++) {
            entry *e = &c->entries[i];
            if (!e->data)
                empty = e;
            else if (!oldest || e->used < oldest->used)
                oldest = e;
        }
        if (empty && c->bytes + bytes <= c->max_bytes)
            return empty;
        drop(c, oldest);
    }
}

bool qie_prompt_cache_fits(const qie_prompt_cache *c, size_t n) {
    return n && n <= c->max_bytes / sizeof(float);
}

void qie_prompt_cache_put(qie_prompt_cache *c, const qie_prompt_key *key, const float *data,
                          size_t n) {
    if (!qie_prompt_cache_fits(c, n))
        return;
    entry *e = find(c, key);
    if (e)
        drop(c, e);
    e = make_room(c, n * sizeof(float));
    e->data = malloc(n * sizeof(float));
    if (!e->data)
        return;
    memcpy(e->data, data, n * sizeof(float));
    e->key = *key;
    e->n = n;
    e->used = ++c->clock;
    c->bytes += n * sizeof(float);
}

qie_prompt_cache_stats qie_prompt_cache_get_stats(const qie_prompt_cache *c) {
    qie_prompt_cache_stats s = {.hits = c->hits, .misses = c->misses, .bytes = c->bytes};
    for (int i = 0; i < ENTRIES; i++)
        s.n += c->entries[i].data != NULL;
    return s;
}
