/* Where weights are: held on a card, or copied into a ring of slots while the group before
 * computes. Placing follows plan/assign.c; an allocation that fails takes the next lower form. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_state.hpp"

static size_t aligned(size_t n) {
    return (n + CU_ALIGN - 1) / CU_ALIGN * CU_ALIGN;
}

static int by_address(const void *a, const void *b) {
    const unsigned char *x = ((const cu_span *)a)->data, *y = ((const cu_span *)b)->data;
    return x < y ? -1 : x > y;
}

qie_status cu_weights_load(qie_compute *c, qie_weight_group *const *groups, size_t n,
                           qie_error *err) {
    cu_backend *b = cu_of(c);
    size_t n_spans = 0;
    for (size_t i = 0; i < n; i++)
        n_spans += groups[i]->n_spans;
    cu_weights_release(b);
    b->groups = (cu_group *)calloc(n + 1, sizeof *b->groups);
    b->spans = (cu_span *)calloc(n_spans + 1, sizeof *b->spans);
    QIE_FAIL_IF(!b->groups || !b->spans, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        cu_group *g = &b->groups[b->n_groups++];
        g->g = groups[i];
        g->offsets = (size_t *)calloc(g->g->n_spans + 1, sizeof *g->offsets);
        QIE_FAIL_IF(!g->offsets, QIE_E_NO_MEMORY, err, NULL, "out of memory");
        for (size_t k = 0; k < g->g->n_spans; k++) {
            g->offsets[k] = g->bytes;
            g->bytes += aligned(g->g->spans[k].n_bytes);
            cu_span s = {(const unsigned char *)g->g->spans[k].data, g->g->spans[k].n_bytes, (int)i,
                         g->offsets[k]};
            b->spans[b->n_spans++] = s;
        }
    }
    qsort(b->spans, b->n_spans, sizeof *b->spans, by_address);
    return QIE_OK;
}

void cu_weights_unplace(cu_backend *b) {
    for (int d = 0; d < b->n; d++) {
        cu_card *x = &b->cards[d];
        cu_free(x->id, x->arena);
        cu_free(x->id, x->work);
        cu_free(x->id, x->weights);
        cu_free(x->id, x->ring);
        x->arena = x->work = x->weights = x->ring = NULL;
        for (int k = 0; k < CU_MOST_SLOTS; k++) {
            x->slots[k].at = NULL;
            x->slots[k].group = NULL;
            x->slots[k].used = false;
        }
        for (size_t i = 0; i < b->n_groups; i++) {
            b->groups[i].at[d] = NULL;
            b->groups[i].held[d] = false;
        }
    }
    cu_host_free(b->pinned);
    b->pinned = NULL;
    for (size_t i = 0; i < b->n_groups; i++)
        b->groups[i].pinned = NULL;
    b->placed = false;
    b->arena_bytes = 0;
    b->active = NULL;
    b->current = b->lane = 0;
    b->in_pass = false;
    memset(b->arriving_from, 0, sizeof b->arriving_from);
}

void cu_weights_release(cu_backend *b) {
    cu_weights_unplace(b);
    for (size_t i = 0; i < b->n_groups; i++)
        free(b->groups[i].offsets);
    free(b->groups);
    free(b->spans);
    b->groups = NULL;
    b->spans = NULL;
    b->n_groups = b->n_spans = 0;
}

/* A group's bytes to the card: from its pinned copy, or through the pieces from the file. */
static void copy_in(cu_backend *b, int card, cu_stream s, const cu_group *g, unsigned char *to) {
    if (g->pinned) {
        cu_good(b, card, cu_copy_in(s, to, g->pinned, g->bytes));
        return;
    }
    for (size_t k = 0; k < g->g->n_spans && !b->failed; k++)
        cu_send(b, card, s, to + g->offsets[k], g->g->spans[k].data, g->g->spans[k].n_bytes);
}

/* Has this card to have the group? Lanes beyond the first are for blocks only. */
static bool held_by(const qie_assign_group *a, int card, bool parallel) {
    if (a->kind == QIE_ASSIGN_FIXED)
        return true;
    if (a->kind == QIE_ASSIGN_VAE)
        return card == 0;
    int lanes = parallel && a->kind == QIE_ASSIGN_BLOCK ? QIE_ASSIGN_LANES : 1;
    for (int i = 0; i < lanes; i++)
        if (a->card[i] == card && a->held[i])
            return true;
    return false;
}

static bool divide_work(cu_backend *b, cu_card *x) {
    unsigned char *p = x->work;
    x->libs_space = p;
    x->product = p += QIE_CU_LIBS_WORKSPACE;
    x->panel = p += b->product_bytes;
    x->low = p += b->panel_bytes;
    x->small = p += b->low_bytes;
    x->small_at = 0;
    return true;
}

/* Take what the plan says of one card and fill it. CU_OOM: the plan was too much. */
static int place_card(cu_backend *b, int d, const qie_assign_group *assigned, size_t arena) {
    cu_card *x = &b->cards[d];
    void *p;
    bool parallel = b->plan.form == QIE_FORM_PARALLEL;
    size_t held = 0;
    for (size_t i = 0; i < b->n_groups; i++)
        if (held_by(&assigned[i], d, parallel))
            held += b->groups[i].bytes;
    int rc = cu_malloc(x->id, arena, &p);
    if (rc != CU_OK)
        return rc;
    x->arena = (unsigned char *)p;
    if ((rc = cu_malloc(x->id, b->work_bytes, &p)) != CU_OK)
        return rc;
    x->work = (unsigned char *)p;
    divide_work(b, x);
    if ((rc = cu_malloc(x->id, held ? held : CU_ALIGN, &p)) != CU_OK)
        return rc;
    x->weights = (unsigned char *)p;
    bool ring = false;
    for (size_t i = 0; i < b->n_groups; i++)
        for (int l = 0; l < QIE_ASSIGN_LANES; l++)
            ring = ring || (assigned[i].card[l] == d && !held_by(&assigned[i], d, parallel));
    size_t slot = aligned((size_t)b->plan.slot_bytes);
    if (ring) {
        if ((rc = cu_malloc(x->id, (size_t)b->plan.n_slots * slot, &p)) != CU_OK)
            return rc;
        x->ring = (unsigned char *)p;
    }
    for (int k = 0; k < b->plan.n_slots && x->ring; k++)
        x->slots[k].at = x->ring + (size_t)k * slot;
    unsigned char *at = x->weights;
    for (size_t i = 0; i < b->n_groups; i++) {
        cu_group *g = &b->groups[i];
        for (int l = 0; l < QIE_ASSIGN_LANES; l++)
            g->card[l] = assigned[i].card[l];
        if (!held_by(&assigned[i], d, parallel))
            continue;
        g->held[d] = true;
        g->at[d] = at;
        at += g->bytes;
        copy_in(b, d, x->compute, g, g->at[d]);
        if (b->failed)
            return b->failed;
    }
    return cu_stream_sync(x->compute);
}

/* Streamed groups in pinned memory, as many as the host may give: from there they come at the bus's
 * full speed. The others are read from their mapped files each time. */
static void pin_streamed(cu_backend *b) {
    static const qie_group_kind order[] = {QIE_GROUP_BLOCK, QIE_GROUP_MODULATION, QIE_GROUP_TEXT,
                                           QIE_GROUP_VAE};
    size_t total = 0, limit = (size_t)(b->options.host_bytes > 0 ? b->options.host_bytes : 0);
    for (int pass = 0; pass < 2; pass++) {
        unsigned char *at = b->pinned;
        size_t taken = 0;
        for (size_t k = 0; k < sizeof order / sizeof *order; k++)
            for (size_t i = 0; i < b->n_groups; i++) {
                cu_group *g = &b->groups[i];
                bool held = false;
                for (int d = 0; d < b->n; d++)
                    held = held || g->held[d];
                if (g->g->kind != order[k] || held || g->bytes > limit - taken)
                    continue;
                taken += g->bytes;
                if (!pass)
                    continue;
                g->pinned = at;
                at += g->bytes;
                for (size_t s = 0; s < g->g->n_spans; s++)
                    memcpy(g->pinned + g->offsets[s], g->g->spans[s].data, g->g->spans[s].n_bytes);
            }
        total = taken;
        void *p;
        if (!pass) {
            if (!total || cu_host_alloc(total, &p) != CU_OK)
                return; /* slower, not wrong */
            b->pinned = (unsigned char *)p;
            b->pinned_bytes = total;
        }
    }
}

static void describe(cu_backend *b) {
    char *p = b->description;
    size_t left = sizeof b->description;
    const double gib = 1073741824.0;
    int n = snprintf(p, left, "%s", qie_assign_form_name(b->plan.form));
    for (int d = 0; d < b->n && n > 0 && (size_t)n < left; d++) {
        if (!b->cards[d].arena)
            continue;
        p += n;
        left -= (size_t)n;
        n = snprintf(p, left, "%s GPU %d (%.40s): %.1f GiB of weights, %.1f GiB in all",
                     d ? ";" : ",", b->cards[d].id, b->cards[d].info.name,
                     (double)b->plan.held_bytes[d] / gib, (double)b->plan.need[d] / gib);
    }
    if (b->plan.streams && n > 0 && (size_t)n < left)
        snprintf(p + n, left - (size_t)n, "; %.1f GiB pass through %d slots",
                 (double)b->plan.streamed_bytes / gib, b->plan.n_slots);
}

/* What a card offers: free memory and what we hold of it, less the head-room. */
static int offer_of(const cu_backend *b, int d, int64_t *offer) {
    size_t free, total;
    int rc = cu_memory(b->cards[d].id, &free, &total);
    if (rc != CU_OK)
        return rc;
    *offer = (int64_t)free + (b->cards[d].arena ? b->plan.need[d] : 0) - b->options.headroom;
    if (b->options.limit > 0 && *offer > b->options.limit)
        *offer = b->options.limit;
    return CU_OK;
}

int64_t cu_weights_room(cu_backend *b) {
    int64_t offer = 0, fixed = 0, largest = 0;
    if (b->failed || !cu_good(b, 0, offer_of(b, 0, &offer)))
        return 1;
    for (size_t i = 0; i < b->n_groups; i++) {
        int64_t n = (int64_t)b->groups[i].bytes;
        if (b->groups[i].g->kind == QIE_GROUP_FIXED || b->groups[i].g->kind == QIE_GROUP_VAE)
            fixed += n;
        else if (n > largest)
            largest = n;
    }
    /* two slots are the least to stream with */
    int64_t room = offer - (int64_t)b->work_bytes - fixed - 2 * largest - (int64_t)CU_ALIGN;
    return room > 1 ? room : 1;
}

/* One try at the level. CU_OOM: does not fit. */
static int place(cu_backend *b, size_t arena, qie_assign_group *assigned) {
    qie_assign_request r;
    memset(&r, 0, sizeof r);
    r.n_cards = b->n;
    r.work = (int64_t)(arena + b->work_bytes);
    r.n_passes = b->options.n_passes;
    r.level = b->level;
    for (int d = 0; d < b->n; d++) {
        int rc = offer_of(b, d, &r.offer[d]);
        if (rc != CU_OK)
            return rc;
    }
    for (size_t i = 0; i < b->n_groups; i++) {
        memset(&assigned[i], 0, sizeof assigned[i]);
        assigned[i].kind = (qie_assign_kind)b->groups[i].g->kind;
        assigned[i].index = b->groups[i].g->index;
        assigned[i].bytes = (int64_t)b->groups[i].bytes;
    }
    if (!qie_assign(&r, assigned, b->n_groups, &b->plan))
        return CU_OOM;
    b->arena_bytes = arena;
    for (int d = 0; d < b->n; d++) {
        if (!b->plan.need[d])
            continue;
        int rc = place_card(b, d, assigned, arena);
        if (rc != CU_OK)
            return rc;
    }
    if (b->plan.streams)
        pin_streamed(b);
    b->placed = true;
    describe(b);
    return CU_OK;
}

qie_status cu_weights_place(cu_backend *b, size_t arena, qie_error *err) {
    const double gib = 1073741824.0;
    arena = aligned(arena);
    if (b->placed && arena <= b->arena_bytes)
        return QIE_OK;
    qie_assign_group *assigned = (qie_assign_group *)calloc(b->n_groups + 1, sizeof *assigned);
    QIE_FAIL_IF(!assigned, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    int rc = CU_OOM;
    int64_t need = 0;
    for (b->level = 0; rc == CU_OOM && b->level <= 3; b->level++) {
        cu_weights_unplace(b);
        b->failed = CU_OK;
        rc = place(b, arena, assigned);
        need = b->plan.need[0];
        if (rc == CU_OOM && b->plan.n_slots && b->options.say && b->level < 3) {
            char text[256];
            snprintf(text, sizeof text,
                     "the GPU has no room for the %s placement (%.1f GiB): trying the next smaller",
                     qie_assign_form_name(b->plan.form), (double)need / gib);
            b->options.say(b->options.say_arg, text);
        }
    }
    free(assigned);
    if (rc == CU_OK)
        return QIE_OK;
    cu_weights_unplace(b);
    if (rc != CU_OOM) {
        cu_good(b, 0, rc);
        return b->compute.mem->check(&b->compute, err);
    }
    b->failed = CU_OK;
    return qie_fail(err, QIE_E_NO_MEMORY, "device",
                    "the GPU has too little free memory: %.2f GiB are needed even with the weights "
                    "streamed; a smaller --max-side or --headroom-gib needs less",
                    (double)need / gib);
}

/* The slot of the card that holds the group. */
static cu_slot *slot_of(cu_card *x, const cu_group *g) {
    for (int k = 0; k < CU_MOST_SLOTS; k++)
        if (x->slots[k].at && x->slots[k].group == g)
            return &x->slots[k];
    return NULL;
}

/* Begin to copy a group into the slot that was left longest ago, once what it held has been
 * computed with. */
static void fetch(cu_backend *b, int card, cu_group *g) {
    cu_card *x = &b->cards[card];
    cu_slot *oldest = NULL;
    for (int k = 0; k < b->plan.n_slots; k++) {
        cu_slot *s = &x->slots[k];
        if (s->at && (!s->group || s->group != b->active) && (!oldest || s->turn < oldest->turn))
            oldest = s;
    }
    if (!oldest) {
        cu_good(b, card, cu_fail(CU_FAILED, "no slot for weights: broken invariant"));
        return;
    }
    if (oldest->group)
        oldest->group->at[card] = NULL;
    if (oldest->used && !cu_good(b, card, cu_stream_wait(x->copy, oldest->done)))
        return;
    oldest->used = false;
    oldest->group = g;
    oldest->turn = ++b->turn;
    copy_in(b, card, x->copy, g, oldest->at);
    g->at[card] = oldest->at;
    cu_good(b, card, cu_event_record(oldest->ready, x->copy));
}

void cu_weights_use(cu_backend *b, int card, const qie_weight_group *w) {
    cu_group *g = &b->groups[w->id];
    cu_card *x = &b->cards[card];
    if (b->failed || g == b->active)
        return;
    /* What was active is done when the stream comes here. */
    for (int d = 0; d < b->n && b->active; d++) {
        cu_slot *s = slot_of(&b->cards[d], b->active);
        if (s && cu_good(b, d, cu_event_record(s->done, b->cards[d].compute)))
            s->used = true;
    }
    b->active = g;
    if (g->held[card])
        return;
    if (!slot_of(x, g))
        fetch(b, card, g);
    cu_slot *s = slot_of(x, g);
    if (s) {
        s->turn = ++b->turn;
        cu_good(b, card, cu_stream_wait(x->compute, s->ready));
    }
}

void cu_weights_fetch(cu_backend *b, int card, const qie_weight_group *w) {
    cu_group *g = &b->groups[w->id];
    if (!b->failed && !g->held[card] && g != b->active && !slot_of(&b->cards[card], g))
        fetch(b, card, g);
}

const void *cu_held(cu_backend *b, const void *host, size_t n) {
    const unsigned char *p = (const unsigned char *)host;
    size_t low = 0, high = b->n_spans;
    if (!host)
        return NULL;
    while (low < high) { /* the last span that begins at or before p */
        size_t m = (low + high) / 2;
        if (b->spans[m].data <= p)
            low = m + 1;
        else
            high = m;
    }
    if (low > 0) {
        const cu_span *s = &b->spans[low - 1];
        if (p + n <= s->data + s->n) {
            unsigned char *at = b->groups[s->group].at[b->current];
            if (at)
                return at + s->offset + (size_t)(p - s->data);
            if (!b->failed)
                cu_good(b, b->current, cu_fail(CU_FAILED, "weights were used that are not there"));
            return NULL;
        }
    }
    return NULL;
}

const void *cu_weight_at(cu_backend *b, const void *host, size_t n) {
    const void *p = cu_held(b, host, n);
    return p || b->failed || !host ? p : cu_small(b, host, n);
}
