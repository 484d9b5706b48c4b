/* What the files of the CUDA back end share. One object per engine; one thread. */
#ifndef QIE_COMPUTE_CUDA_CU_STATE_HPP
#define QIE_COMPUTE_CUDA_CU_STATE_HPP

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_libs.hpp"
#include "compute/cuda/cu_rt.h"

enum {
    CU_CHUNKS = 4, /* pinned pieces that host data goes through */
    CU_MOST_SLOTS = QIE_ASSIGN_SLOTS,
    CU_DEVICES = QIE_ASSIGN_CARDS_MAX
};
#define CU_CHUNK_BYTES ((size_t)8 << 20)
#define CU_SMALL_BYTES ((size_t)1 << 20)
#define CU_ALIGN ((size_t)256)

/* Where a group's weights are, and where its spans begin in it. */
typedef struct cu_group {
    const qie_weight_group *g;
    size_t bytes;                  /* packed, every span aligned */
    size_t *offsets;               /* [n_spans] */
    unsigned char *pinned;         /* its packed bytes in host memory, or NULL: read the file */
    const unsigned char *packed;   /* the same in the offload file, or NULL */
    unsigned char *at[CU_DEVICES]; /* on each device now; NULL: not there */
    bool held[CU_DEVICES];         /* for good */
    int card[QIE_ASSIGN_LANES];
} cu_group;

typedef struct cu_slot {
    unsigned char *at;
    cu_group *group;      /* in it now */
    cu_event ready, done; /* copied in; computed with */
    bool used;            /* `done` was recorded since the last copy */
    int64_t turn;         /* of the last use */
} cu_slot;

typedef struct cu_card {
    int id;         /* as the runtime counts */
    int number;     /* as people do: the driver's */
    int64_t listed; /* free before this process was there, as the driver says; 0: not known */
    cu_device_info info;
    cu_stream compute, copy;
    cu_event met; /* for an order between cards */
    qie_cu_libs *libs;
    unsigned char *arena;
    /* workspace, one allocation */
    unsigned char *work;
    unsigned char *libs_space, *product, *panel, *low, *small;
    size_t small_at;
    unsigned char *weights; /* held groups, one allocation */
    unsigned char *ring;
    unsigned char *lows; /* matrices of LoRAs */
    cu_slot slots[CU_MOST_SLOTS];
} cu_card;

typedef struct cu_span { /* where a host pointer's copy is */
    const unsigned char *data;
    size_t n;
    int group;
    size_t offset;
} cu_span;

/* Work that comes back: cu_repeat.cpp. */
typedef struct cu_repeat {
    int times;      /* it was begun */
    cu_graph graph; /* NULL: not captured */
    int origin;     /* card whose stream it begins and ends on */
    int end;        /* card that operations run on afterwards */
    cu_group *active;
    bool on[CU_DEVICES];
} cu_repeat;

/* Rows that were just made bytes: what they were, and the first of cu_card.low is it still. */
typedef struct cu_bytes {
    const void *x; /* NULL: none, or something ran since */
    int64_t m, k, ld;
    qie_dtype type;
    int card;
} cu_bytes;

typedef struct cu_backend {
    qie_compute compute; /* first: the object that the caller holds */
    qie_device_options options;
    int n;
    cu_card cards[CU_DEVICES];
    int current; /* card that operations run on */
    int lane;
    bool in_pass;
    /* activations */
    size_t arena_bytes;
    size_t product_bytes, panel_bytes, low_bytes, work_bytes;
    /* weights */
    cu_group *groups;
    size_t n_groups;
    cu_span *spans;
    size_t n_spans;
    /* matrices of LoRAs: by address, what they take, and what placing made room for */
    cu_span *lows;
    size_t n_lows, lows_bytes, lows_room;
    bool placed;
    int level;
    qie_assign_result plan;
    int n_slots;
    int64_t turn;
    cu_group *active; /* begun last */
    /* host side */
    unsigned char *chunk[CU_CHUNKS];
    cu_event chunk_done[CU_CHUNKS][CU_DEVICES];
    bool chunk_used[CU_CHUNKS][CU_DEVICES];
    int next_chunk;
    unsigned char *received; /* a piece that results come back through: nobody else reads it */
    unsigned char *pinned;   /* of streamed groups */
    int offload;             /* nameless file in the offload folder; -1: none */
    unsigned char *packed;   /* it, mapped */
    size_t packed_bytes;
    size_t pinned_bytes;
    /* results of guidance passes on their way to the first card */
    cu_event arriving[QIE_ASSIGN_LANES][CU_DEVICES]; /* by the card they come from */
    int arriving_from[QIE_ASSIGN_LANES];             /* card; 0: nothing is */
    bool graphs;                                     /* are made; QIE_CUDA_GRAPHS=0: not */
    cu_repeat repeats[QIE_ASSIGN_LANES];
    cu_repeat *noting; /* being captured; NULL: operations run */
    cu_bytes bytes;
    /* for measurements, from the environment: QIE_CUDA_RANDOM=1, QIE_CUDA_PROFILE=FILE */
    bool random;
    struct cu_profile *profile; /* NULL: operations run as they come */
    /* the first failure */
    int failed;
    char why[320];
    char description[512];
} cu_backend;

static inline cu_backend *cu_of(qie_compute *c) {
    return (cu_backend *)c;
}
/* Note a runtime's answer; true if all is well. */
bool cu_good(cu_backend *b, int card, int rc);
/* The address on this card of activations, given by their address on the first. */
void *cu_here(const cu_backend *b, int card, const void *p);

/* cu_memory.cpp */
extern const qie_mem_ops cu_mem_ops;
int cu_memory_create(cu_backend *b, const qie_compute_limits *limits);
void cu_memory_release(cu_backend *b);
/* A few host bytes as this card can read them until CU_SMALL_BYTES more were asked for. */
void *cu_small(cu_backend *b, const void *host, size_t n);
/* Host bytes to an address of this card's own. */
void cu_send(cu_backend *b, int card, cu_stream s, void *dst, const void *src, size_t n);
/* Rows ids[i] of a table of the host, one after the other. */
void cu_send_rows(cu_backend *b, void *dst, const void *table, size_t row, const int32_t *ids,
                  int64_t n);
void cu_receive(cu_backend *b, void *dst, const void *src, size_t n);
/* Before every operation: the card's stream, after what has to come first. NULL: failed before. */
cu_card *cu_ready(cu_backend *b);

/* Work of `to` after everything queued on `from` so far. */
void cu_after(cu_backend *b, int to, int from);

/* cu_repeat.cpp: see qie_mem_ops */
bool cu_repeat_begin(qie_compute *c, int key, const qie_weight_group *first, const qie_range *live,
                     size_t n_live);
bool cu_repeat_end(qie_compute *c, bool keep);
void cu_repeat_forget(qie_compute *c);

/* cu_weights.cpp */
qie_status cu_weights_load(qie_compute *c, qie_weight_group *const *groups, size_t n,
                           qie_error *err);
qie_status cu_weights_place(cu_backend *b, size_t arena_bytes, qie_error *err);
qie_status cu_weights_plan(cu_backend *b, size_t arena_bytes, char *out, size_t cap,
                           qie_error *err);
void cu_weights_release(cu_backend *b);
void cu_weights_adapt(qie_compute *c, const qie_weight_span *spans, size_t n, bool *moved);
int64_t cu_weights_room(cu_backend *b);
/* All memory of the cards that placing took. */
void cu_weights_unplace(cu_backend *b);
/* Have the group on the card, computing in its stream from now on; then fetch the next. */
void cu_weights_use(cu_backend *b, int card, const qie_weight_group *g);
void cu_weights_fetch(cu_backend *b, int card, const qie_weight_group *g);
/* The card's copy of host bytes that belong to a group; NULL: they belong to none, or a failure. */
const void *cu_held(cu_backend *b, const void *host, size_t n);
/* The same; others are copied in now through the small area. NULL: failed. */
const void *cu_weight_at(cu_backend *b, const void *host, size_t n);

/* cu_ops.cpp */
void cu_ops_fill(qie_ops *ops);

/* cu_profile.cpp: time of each operation on its own, the card being waited for before and after it;
 * a table at the end. */
void cu_profile_create(cu_backend *b, const char *path);
void cu_profile_note(cu_backend *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void cu_profile_release(cu_backend *b);

#endif
