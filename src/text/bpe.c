#include "text/bpe.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

/* A token of the piece so far; a doubly linked list by index. */
typedef struct qie_bpe_symbol {
    int32_t id; /* -1: joined to its left neighbour */
    int32_t prev, next;
} symbol;

/* A pair that may be joined; stale once one of its tokens has changed. */
typedef struct qie_bpe_candidate {
    int32_t rank, pos, id;
} candidate;

static size_t slot_of(const qie_bpe *b, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    key *= 0x9e3779b97f4a7c15u; /* 2^64 / golden ratio: multiplicative hashing */
    return (size_t)(key >> 32) & (b->n_slots - 1);
}

static const qie_merge *find(const qie_bpe *b, int32_t left, int32_t right) {
    for (size_t i = slot_of(b, left, right);; i = (i + 1) & (b->n_slots - 1)) {
        const qie_merge *m = &b->merges[i];
        if (m->left < 0)
            return NULL;
        if (m->left == left && m->right == right)
            return m;
    }
}

qie_status qie_bpe_init(qie_bpe *b, size_t n, qie_error *err) {
    b->n_slots = 16;
    while (b->n_slots < n + n / 2)
        b->n_slots *= 2;
    b->merges = malloc(b->n_slots * sizeof *b->merges);
    QIE_FAIL_IF(!b->merges, QIE_E_NO_MEMORY, err, NULL, "no memory for the tokenizer");
    memset(b->merges, 0xff, b->n_slots * sizeof *b->merges);
    return QIE_OK;
}

void qie_bpe_release(qie_bpe *b) {
    free(b->merges);
    b->merges = NULL;
}

void qie_bpe_add(qie_bpe *b, int32_t left, int32_t right, int32_t rank, int32_t id) {
    size_t i = slot_of(b, left, right);
    while (b->merges[i].left >= 0 && (b->merges[i].left != left || b->merges[i].right != right))
        i = (i + 1) & (b->n_slots - 1);
    b->merges[i] = (qie_merge){left, right, rank, id};
}

void qie_bpe_scratch_release(qie_bpe_scratch *s) {
    free(s->symbols);
    free(s->heap);
    memset(s, 0, sizeof *s);
}

/* Each join removes a symbol and offers at most two new pairs: 3n candidates are enough. */
static qie_status reserve(qie_bpe_scratch *s, size_t n, qie_error *err) {
    if (n <= s->cap)
        return QIE_OK;
    size_t cap = n < 64 ? 64 : n + n / 2;
    qie_bpe_scratch_release(s);
    s->symbols = malloc(cap * sizeof *s->symbols);
    s->heap = malloc(3 * cap * sizeof *s->heap);
    QIE_FAIL_IF(!s->symbols || !s->heap, QIE_E_NO_MEMORY, err, NULL,
                "no memory to tokenize the text");
    s->cap = cap;
    return QIE_OK;
}

/* Lower rank first, then further left: the order in which the reference joins. */
static bool before(const candidate *a, const candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void sink(candidate *heap, size_t n, size_t i) {
    candidate c = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &c))
            break;
        heap[i] = heap[child];
    }
    heap[i] = c;
}

static void rise(candidate *heap, size_t i) {
    candidate c = heap[i];
    for (size_t up; i > 0 && before(&c, &heap[up = (i - 1) / 2]); i = up)
        heap[i] = heap[up];
    heap[i] = c;
}

/* Append the pair that starts at symbol i, if it has a merge; the caller restores the heap's order.
 */
static bool offer(const qie_bpe *b, const symbol *sym, int32_t i, candidate *heap, size_t *n_heap) {
    if (i < 0 || sym[i].next < 0)
        return false;
    const qie_merge *m = find(b, sym[i].id, sym[sym[i].next].id);
    if (!m)
        return false;
    heap[(*n_heap)++] = (candidate){m->rank, i, m->id};
    return true;
}

/* A candidate is current if its two tokens still make the same token. */
static bool is_current(const qie_bpe *b, const symbol *sym, const candidate *c) {
    if (sym[c->pos].id < 0 || sym[c->pos].next < 0)
        return false;
    const qie_merge *m = find(b, sym[c->pos].id, sym[sym[c->pos].next].id);
    return m && m->id == c->id;
}

qie_status qie_bpe_encode(const qie_bpe *b, qie_bpe_scratch *s, const char *piece, size_t n,
                          int32_t *out, size_t *n_out, qie_error *err) {
    *n_out = 0;
    QIE_FAIL_IF(n > QIE_BPE_MAX_PIECE, QIE_E_TOO_LARGE, err, NULL, "a word of %zu bytes", n);
    QIE_TRY(reserve(s, n, err));
    symbol *sym = s->symbols;
    candidate *heap = s->heap;
    size_t n_heap = 0;
    for (size_t i = 0; i < n; i++)
        sym[i] = (symbol){b->byte_ids[(unsigned char)piece[i]], (int32_t)i - 1,
                          i + 1 < n ? (int32_t)i + 1 : -1};
    for (size_t i = 0; i + 1 < n; i++)
        offer(b, sym, (int32_t)i, heap, &n_heap);
    for (size_t i = n_heap / 2; i-- > 0;)
        sink(heap, n_heap, i);
    while (n_heap) {
        candidate c = heap[0];
        heap[0] = heap[--n_heap];
        if (n_heap)
            sink(heap, n_heap, 0);
        if (!is_current(b, sym, &c))
            continue;
        symbol *left = &sym[c.pos], *right = &sym[left->next];
        left->id = c.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            sym[left->next].prev = c.pos;
        if (offer(b, sym, left->prev, heap, &n_heap))
            rise(heap, n_heap - 1);
        if (offer(b, sym, c.pos, heap, &n_heap))
            rise(heap, n_heap - 1);
    }
    for (int32_t i = 0; i >= 0; i = sym[i].next)
        out[(*n_out)++] = sym[i].id;
    return QIE_OK;
}
