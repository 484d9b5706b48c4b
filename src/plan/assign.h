/* Which card holds which group of weights, and what is copied in as it is needed: pure arithmetic
 * that the GPU back end obeys and that `--dry-run` and `doctor` print.
 *
 * Each card offers its free memory less the head-room. Everywhere: activations, workspace and the
 * fixed layers; on the first the VAE too. The rest is held where it fits, the most used first
 * (blocks of the transformer run at every step, modulation and text encoder once an edit); what
 * does not fit passes through a ring of slots, one group computing while the next one arrives.
 * Several cards share the layers in contiguous runs in proportion to their room: the fewest that
 * hold everything, else all of them. Where each half of some could hold everything, the two
 * guidance passes get one half each, again of the fewest. */
#ifndef QIE_PLAN_ASSIGN_H
#define QIE_PLAN_ASSIGN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QIE_ASSIGN_CARDS_MAX 8
/* A CUDA context with the libraries' own memory on one card: 0.4 to 0.7 GiB on cards of the last
 * three generations; taken at the upper end. */
#define QIE_GPU_RUNTIME ((int64_t)768 << 20)
/* What the arena of an edit takes above its plan: rounding of the last allocation. */
#define QIE_ARENA_SLACK ((int64_t)64 << 10)
#define QIE_GPU_ALIGN 256
#define QIE_ASSIGN_LANES 2
/* Slots of the ring: one computing, one arriving, one being given back. */
#define QIE_ASSIGN_SLOTS 3

typedef enum qie_assign_kind { /* the order of qie_group_kind in compute/backend.h */
                               QIE_ASSIGN_TEXT = 0,
                               QIE_ASSIGN_MODULATION,
                               QIE_ASSIGN_BLOCK,
                               QIE_ASSIGN_FIXED,
                               QIE_ASSIGN_VAE
} qie_assign_kind;

typedef struct qie_assign_group {
    qie_assign_kind kind;
    int index; /* of block or layer */
    int64_t bytes;
    /* result */
    signed char card[QIE_ASSIGN_LANES]; /* that computes it, for each guidance pass */
    bool held[QIE_ASSIGN_LANES];        /* there for good; else through the ring */
} qie_assign_group;

typedef struct qie_assign_request {
    int n_cards;                         /* the one that offers most first */
    int64_t offer[QIE_ASSIGN_CARDS_MAX]; /* free less head-room */
    int64_t work;                        /* activations and workspace on every card */
    int n_passes;                        /* 2: guidance */
    /* What has failed already: 0 nothing; 1 no card of its own for a pass; 2 nothing held but the
     * fixed layers, on one card; 3 the same with two slots. */
    int level;
} qie_assign_request;

typedef enum qie_assign_form {
    QIE_FORM_RESIDENT = 0,
    QIE_FORM_STREAMED,
    QIE_FORM_SHARDED,
    QIE_FORM_PARALLEL /* a whole model for each guidance pass */
} qie_assign_form;

typedef struct qie_assign_result {
    qie_assign_form form;
    bool streams; /* something passes through a ring */
    int n_cards, n_slots;
    int64_t slot_bytes;
    int64_t held_bytes[QIE_ASSIGN_CARDS_MAX]; /* weights held by each card */
    int64_t need[QIE_ASSIGN_CARDS_MAX];       /* in all, of each card */
    int64_t streamed_bytes;                   /* through the rings for one pass over everything */
} qie_assign_result;

/* False if it does not fit in any form at this level: out->need says what one card would need. */
bool qie_assign(const qie_assign_request *r, qie_assign_group *groups, size_t n,
                qie_assign_result *out);
/* The same at r->level or the next one that fits; false if none does. */
bool qie_assign_any(const qie_assign_request *r, qie_assign_group *groups, size_t n,
                    qie_assign_result *out);
const char *qie_assign_form_name(qie_assign_form form);
/* One line for people: form, then weights and memory in all of each card, as numbered and named
 * here; the runtime's own memory counts. */
void qie_assign_words(const qie_assign_result *r, const int *numbers, const char *const *names,
                      char *out, size_t cap);

/* Memory that operations need beside activations, on every card, in bytes. */
typedef struct qie_gpu_space {
    int64_t libs;    /* of cuBLASLt */
    int64_t product; /* results before their epilogue, in pieces of rows */
    int64_t panel;   /* converted weights: 64 rows of any at least, and a convolution's whole */
    int64_t low;     /* low-rank factors and gathered rows */
    int64_t small;   /* lists of the host */
    int64_t total;
} qie_gpu_space;
/* From the largest extents of any linear layer (k, n) and of any convolution. */
qie_gpu_space qie_gpu_space_make(int64_t max_k, int64_t max_n, int64_t max_conv_k,
                                 int64_t max_conv_n);

#endif
