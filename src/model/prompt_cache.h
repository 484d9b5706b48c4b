/* What prompts and pictures were encoded to, kept within a process: the same prompt with the same
 * pictures is not encoded again, nor are pictures that come back with another prompt, nor what
 * every prompt begins with.
 *
 * An entry is found by the hash of everything that its numbers follow from: pixels as the vision
 * tower gets them, tokens, type of activations, LoRAs (pipeline.c makes the keys). A hit gives the
 * bytes that were put. Entries are copies; together they never take more than the limit, the ones
 * unused for longest go first. One thread at a time. */
#ifndef QIE_MODEL_PROMPT_CACHE_H
#define QIE_MODEL_PROMPT_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"

/* At the released sizes the template takes 4 MB, a picture 14 MB, what each prompt with it became
 * 3 MB: three pictures with a prompt each, or one with a dozen. */
#define QIE_PROMPT_CACHE_BYTES ((size_t)64 << 20)

typedef struct qie_prompt_cache qie_prompt_cache;
typedef struct qie_prompt_key {
    char hex[QIE_HASH_HEX_MAX];
} qie_prompt_key;

typedef struct qie_prompt_cache_stats {
    size_t hits, misses; /* of qie_prompt_cache_get */
    size_t n, bytes;     /* entries held, and their numbers */
} qie_prompt_cache_stats;

/* The key of n parts; their lengths count. Errors: QIE_E_NO_MEMORY. */
typedef struct qie_prompt_part {
    const void *data;
    size_t bytes;
} qie_prompt_part;
qie_status qie_prompt_key_make(const qie_prompt_part *parts, size_t n, qie_prompt_key *out,
                               qie_error *err);

/* An empty one of at most max_bytes; 0 keeps nothing. Errors: QIE_E_NO_MEMORY. */
qie_status qie_prompt_cache_create(size_t max_bytes, qie_prompt_cache **out, qie_error *err);
void qie_prompt_cache_destroy(qie_prompt_cache *c);
/* Copy the n floats under this key to `out`; false, out untouched: there are none of that number.
 */
bool qie_prompt_cache_get(qie_prompt_cache *c, const qie_prompt_key *key, float *out, size_t n);
/* Would n floats be kept? */
bool qie_prompt_cache_fits(const qie_prompt_cache *c, size_t n);
/* Keep a copy of n floats. More than the limit or than there is memory for: nothing happens. */
void qie_prompt_cache_put(qie_prompt_cache *c, const qie_prompt_key *key, const float *data,
                          size_t n);
qie_prompt_cache_stats qie_prompt_cache_get_stats(const qie_prompt_cache *c);

#endif
