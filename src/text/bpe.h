/* Byte-pair encoding of one piece: bytes -> ids, by the ranks of a list of merges. */
#ifndef QIE_TEXT_BPE_H
#define QIE_TEXT_BPE_H

#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

typedef struct qie_merge {
    int32_t left, right; /* ids; left < 0: empty slot */
    int32_t rank, id;    /* position in the list; id of the joined token */
} qie_merge;

typedef struct qie_bpe {
    int32_t byte_ids[256]; /* id of each single byte */
    qie_merge *merges;     /* hash table, owned */
    size_t n_slots;        /* power of two */
} qie_bpe;

/* Table for n merges. byte_ids are the caller's to fill. Errors: QIE_E_NO_MEMORY. */
qie_status qie_bpe_init(qie_bpe *b, size_t n, qie_error *err);
void qie_bpe_release(qie_bpe *b);
/* A pair given twice keeps the later rank, as in the reference. At most the n of init. */
void qie_bpe_add(qie_bpe *b, int32_t left, int32_t right, int32_t rank, int32_t id);

/* Scratch of an encoder, grown as needed. */
typedef struct qie_bpe_scratch {
    struct qie_bpe_symbol *symbols;
    struct qie_bpe_candidate *heap;
    size_t cap;
} qie_bpe_scratch;
void qie_bpe_scratch_release(qie_bpe_scratch *s);

/* Encode n bytes (1 <= n <= QIE_BPE_MAX_PIECE); out has room for n ids. O(n log n).
 * Errors: QIE_E_NO_MEMORY. */
#define QIE_BPE_MAX_PIECE ((size_t)1 << 29)
qie_status qie_bpe_encode(const qie_bpe *b, qie_bpe_scratch *s, const char *piece, size_t n,
                          int32_t *out, size_t *n_out, qie_error *err);

#endif
