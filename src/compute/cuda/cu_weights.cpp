/* Where weights are: held on a card, or copied into a ring of slots while the group before
 * computes. Placing follows plan/assign.c; an allocation that fails takes the next lower form. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_kernels.hpp"
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
    cu_repeat_forget(&b->compute);
    for (int d = 0; d < b->n; d++) {
        cu_card *x = &b->cards[d];
        cu_free(x->id, x->arena);
        cu_free(x->id, x->work);
        cu_free(x->id, x->weights);
        cu_free(x->id, x->ring);
        cu_free(x->id, x->lows);
        x->arena = x->work = x->weights = x->ring = x->lows = NULL;
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
    if (b->packed)
        munmap(b->packed, b->packed_bytes);
    b->packed = NULL;
    for (size_t i = 0; i < b->n_groups; i++) {
        b->groups[i].pinned = NULL;
        b->groups[i].packed = NULL;
    }
    b->placed = false;
    b->lows_room = 0;
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
    free(b->lows);
    b->groups = NULL;
    b->spans = b->lows = NULL;
    b->n_groups = b->n_spans = b->n_lows = b->lows_bytes = 0;
}

/* A group's bytes to the card: from its pinned copy, or through the pieces from a file. */
static void copy_in(cu_backend *b, int card, cu_stream s, const cu_group *g, unsigned char *to) {
    if (g->pinned) {
        cu_good(b, card, cu_copy_in(s, to, g->pinned, g->bytes));
        return;
    }
    if (g->packed) {
        cu_send(b, card, s, to, g->packed, g->bytes);
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

static void send_lows(cu_backend *b, int d) {
    cu_card *x = &b->cards[d];
    for (size_t i = 0; x->lows && i < b->n_lows && !b->failed; i++)
        cu_send(b, d, x->compute, x->lows + b->lows[i].offset, b->lows[i].data, b->lows[i].n);
}

/* Sorted, without what is there twice, and where each lies in the cards' copy. Returns the new
 * number. */
static size_t arrange(cu_span *s, size_t n, size_t *bytes) {
    size_t k = 0;
    *bytes = 0;
    qsort(s, n, sizeof *s, by_address);
    for (size_t i = 0; i < n; i++) {
        if (k && s[i].data < s[k - 1].data + s[k - 1].n) {
            size_t end = (size_t)(s[i].data - s[k - 1].data) + s[i].n;
            s[k - 1].n = end > s[k - 1].n ? end : s[k - 1].n;
        } else
            s[k++] = s[i];
    }
    for (size_t i = 0; i < k; i++) {
        s[i].offset = *bytes;
        *bytes += aligned(s[i].n);
    }
    return k;
}

void cu_weights_adapt(qie_compute *c, const qie_weight_span *spans, size_t n, bool *moved) {
    cu_backend *b = cu_of(c);
    *moved = false;
    cu_span *list = (cu_span *)calloc(n + 1, sizeof *list);
    if (!list || b->failed) { /* without a copy they are sent at each use: slower, not wrong */
        free(list);
        return;
    }
    for (size_t i = 0; i < n; i++)
        list[i] = {(const unsigned char *)spans[i].data, spans[i].n_bytes, -1, 0};
    size_t bytes, k = arrange(list, n, &bytes);
    bool same = k == b->n_lows;
    for (size_t i = 0; i < k && same; i++)
        same = list[i].data == b->lows[i].data && list[i].n == b->lows[i].n;
    if (same) {
        free(list);
        return;
    }
    free(b->lows);
    b->lows = list;
    b->n_lows = k;
    b->lows_bytes = bytes;
    if (b->placed && bytes > b->lows_room) {
        cu_weights_unplace(b);
        *moved = true;
    }
    for (int d = 0; d < b->n; d++)
        send_lows(b, d);
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
    if (b->lows_room) {
        if ((rc = cu_malloc(x->id, b->lows_room, &p)) != CU_OK)
            return rc;
        x->lows = (unsigned char *)p;
        send_lows(b, d);
    }
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
        if (b->random)
            cu_k_fill_random(x->compute, g->at[d], (int64_t)(g->bytes / 2), (uint32_t)i);
        else
            copy_in(b, d, x->compute, g, g->at[d]);
        if (b->failed)
            return b->failed;
    }
    /* No order that the stream would not make: a failure has to show while less can be tried. */
    return cu_stream_sync(x->compute);
}

static bool streamed(const cu_backend *b, const cu_group *g) {
    for (int d = 0; d < b->n; d++)
        if (g->held[d])
            return false;
    return true;
}

/* bf16 of about +-0.015: like weights, and no page of a file is read. */
static void fill_random(unsigned char *to, size_t n, uint32_t h) {
    for (size_t k = 0; k + 1 < n; k += 2) {
        h = h * 1664525u + 1013904223u;
        uint16_t v = (uint16_t)(0x3c00u + (h >> 23) % 0x76u + (h >> 31 << 15));
        memcpy(to + k, &v, 2);
    }
}

/* Streamed groups in pinned memory, as many as the host may give: from there they come at the bus's
 * full speed. The others are read from files each time. */
static void pin_streamed(cu_backend *b) {
    static const qie_group_kind order[] = {QIE_GROUP_BLOCK, QIE_GROUP_MODULATION, QIE_GROUP_TEXT,
                                           QIE_GROUP_VAE};
    size_t limit = (size_t)(b->options.host_bytes > 0 ? b->options.host_bytes : 0);
    for (int pass = 0; pass < 2; pass++) { /* how much, then what */
        unsigned char *at = b->pinned;
        size_t taken = 0;
        for (size_t k = 0; k < sizeof order / sizeof *order; k++)
            for (size_t i = 0; i < b->n_groups; i++) {
                cu_group *g = &b->groups[i];
                if (g->g->kind != order[k] || !streamed(b, g) || g->bytes > limit - taken)
                    continue;
                taken += g->bytes;
                if (!pass)
                    continue;
                g->pinned = at;
                at += g->bytes;
                if (b->random)
                    fill_random(g->pinned, g->bytes, (uint32_t)i + 1);
                for (size_t s = 0; s < g->g->n_spans && !b->random; s++)
                    memcpy(g->pinned + g->offsets[s], g->g->spans[s].data, g->g->spans[s].n_bytes);
            }
        void *p;
        if (!pass) {
            if (!taken || cu_host_alloc(taken, &p) != CU_OK)
                return; /* slower, not wrong */
            b->pinned = (unsigned char *)p;
            b->pinned_bytes = taken;
        }
    }
}

static bool write_all(int fd, const void *p, size_t n, off_t at) {
    while (n) {
        ssize_t k = pwrite(fd, p, n, at);
        if (k <= 0)
            return false;
        p = (const unsigned char *)p + k;
        n -= (size_t)k;
        at += k;
    }
    return true;
}

/* What is streamed and not pinned, packed in the offload folder's file. A disk without room: from
 * the model's files, as without a folder. */
static void offload(cu_backend *b) {
    size_t total = 0, at = 0;
    for (size_t i = 0; i < b->n_groups; i++)
        if (streamed(b, &b->groups[i]) && !b->groups[i].pinned)
            total += b->groups[i].bytes;
    if (b->offload < 0 || !total)
        return;
    bool ok = !ftruncate(b->offload, 0) && !ftruncate(b->offload, (off_t)total);
    for (size_t i = 0; i < b->n_groups && ok; i++) {
        const cu_group *g = &b->groups[i];
        if (!streamed(b, g) || g->pinned)
            continue;
        for (size_t k = 0; k < g->g->n_spans && ok; k++)
            ok = write_all(b->offload, g->g->spans[k].data, g->g->spans[k].n_bytes,
                           (off_t)(at + g->offsets[k]));
        at += g->bytes;
    }
    void *p = ok ? mmap(NULL, total, PROT_READ, MAP_SHARED, b->offload, 0) : MAP_FAILED;
    if (p == MAP_FAILED) {
        if (ftruncate(b->offload, 0) == 0 && b->options.say)
            b->options.say(b->options.say_arg, "the offload folder has no room: weights are read "
                                               "from the model's files");
        return;
    }
    b->packed = (unsigned char *)p;
    b->packed_bytes = total;
    at = 0;
    for (size_t i = 0; i < b->n_groups; i++) {
        cu_group *g = &b->groups[i];
        if (!streamed(b, g) || g->pinned)
            continue;
        g->packed = b->packed + at;
        at += g->bytes;
    }
}

static void words(const cu_backend *b, const qie_assign_result *plan, char *out, size_t cap) {
    int numbers[CU_DEVICES] = {0};
    const char *names[CU_DEVICES] = {0};
    for (int d = 0; d < b->n; d++) {
        numbers[d] = b->cards[d].number;
        names[d] = b->cards[d].info.name;
    }
    qie_assign_words(plan, numbers, names, out, cap);
}

/* What a card offers: free memory and what we hold of it, less the head-room. The driver's number
 * from before this process was there, less an allowance for the runtime, is what doctor counts
 * with; what the runtime says now is less when others have taken something since. */
static int offer_of(const cu_backend *b, int d, int64_t *offer) {
    const cu_card *x = &b->cards[d];
    size_t free, total;
    int rc = cu_memory(x->id, &free, &total);
    if (rc != CU_OK)
        return rc;
    *offer = (int64_t)free + (x->arena ? b->plan.need[d] : 0);
    if (x->listed > 0 && x->listed - QIE_GPU_RUNTIME < *offer)
        *offer = x->listed - QIE_GPU_RUNTIME;
    *offer -= b->options.headroom;
    if (b->options.limit > 0 && *offer > b->options.limit)
        *offer = b->options.limit;
    return CU_OK;
}

/* The question to plan/assign.c. */
static int ask(cu_backend *b, size_t arena, qie_assign_group *groups, qie_assign_request *r) {
    memset(r, 0, sizeof *r);
    r->n_cards = b->n;
    r->work = (int64_t)(arena + b->work_bytes + b->lows_bytes);
    r->n_passes = b->options.n_passes;
    for (int d = 0; d < b->n; d++) {
        int rc = offer_of(b, d, &r->offer[d]);
        if (!cu_good(b, d, rc))
            return rc;
    }
    for (size_t i = 0; i < b->n_groups; i++) {
        memset(&groups[i], 0, sizeof groups[i]);
        groups[i].kind = (qie_assign_kind)b->groups[i].g->kind;
        groups[i].index = b->groups[i].g->index;
        groups[i].bytes = (int64_t)b->groups[i].bytes;
    }
    return CU_OK;
}

static qie_status too_little(int64_t need, qie_error *err) {
    return qie_fail(err, QIE_E_NO_MEMORY, "device",
                    "the GPU has too little free memory: %.2f GiB are needed even with the weights "
                    "streamed; a smaller --max-side or --headroom-gib needs less",
                    (double)(need + QIE_GPU_RUNTIME) / 1073741824.0);
}

qie_status cu_weights_plan(cu_backend *b, size_t arena, char *out, size_t cap, qie_error *err) {
    qie_assign_request r;
    qie_assign_result plan;
    qie_assign_group *groups = (qie_assign_group *)calloc(b->n_groups + 1, sizeof *groups);
    QIE_FAIL_IF(!groups, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    int rc = ask(b, aligned(arena), groups, &r);
    bool fits = rc == CU_OK && qie_assign_any(&r, groups, b->n_groups, &plan);
    free(groups);
    if (rc != CU_OK)
        return b->compute.mem->check(&b->compute, err);
    if (!fits)
        return too_little(plan.need[0], err);
    words(b, &plan, out, cap);
    return QIE_OK;
}

/* The largest arena that fits in some form. */
int64_t cu_weights_room(cu_backend *b) {
    qie_assign_request r;
    qie_assign_result plan;
    qie_assign_group *groups = (qie_assign_group *)calloc(b->n_groups + 1, sizeof *groups);
    if (b->failed || !groups || ask(b, 0, groups, &r) != CU_OK) {
        free(groups);
        return 1;
    }
    int64_t low = 0, high = r.offer[0] > 1 ? r.offer[0] : 1, beside = r.work;
    while (high - low > (int64_t)CU_ALIGN) {
        int64_t middle = low + (high - low) / 2;
        r.work = beside + middle;
        if (qie_assign_any(&r, groups, b->n_groups, &plan))
            low = middle;
        else
            high = middle;
    }
    free(groups);
    low -= (int64_t)CU_ALIGN + QIE_ARENA_SLACK; /* what is reserved is more than what is planned */
    return low > 1 ? low : 1;
}

/* One try at the level. CU_OOM: does not fit, or is what was refused already. */
static int place(cu_backend *b, size_t arena, qie_assign_group *assigned,
                 const qie_assign_result *refused) {
    qie_assign_request r;
    int asked = ask(b, arena, assigned, &r);
    if (asked != CU_OK)
        return asked;
    r.level = b->level;
    if (!qie_assign(&r, assigned, b->n_groups, &b->plan) ||
        !memcmp(&b->plan, refused, sizeof *refused))
        return CU_OOM;
    b->arena_bytes = arena;
    b->lows_room = b->lows_bytes;
    for (int d = 0; d < b->n; d++) {
        if (!b->plan.need[d])
            continue;
        int rc = place_card(b, d, assigned, arena);
        if (rc != CU_OK && rc != CU_OOM)
            cu_good(b, d, rc);
        if (rc != CU_OK)
            return rc;
    }
    if (b->plan.streams) {
        pin_streamed(b);
        offload(b);
    }
    b->placed = true;
    words(b, &b->plan, b->description, sizeof b->description);
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
    qie_assign_result refused;
    memset(&refused, 0, sizeof refused);
    for (b->level = 0; rc == CU_OOM && b->level <= 3; b->level++) {
        cu_weights_unplace(b);
        b->failed = CU_OK;
        rc = place(b, arena, assigned, &refused);
        need = b->plan.need[0];
        bool again = !memcmp(&b->plan, &refused, sizeof refused);
        memcpy(&refused, &b->plan, sizeof refused);
        if (rc == CU_OOM && !again && b->plan.n_slots && b->options.say && b->level < 3) {
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
    return too_little(need, err);
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

/* The span that holds all of these bytes, or NULL. */
static const cu_span *span_of(const cu_span *spans, size_t high, const unsigned char *p, size_t n) {
    size_t low = 0;
    while (low < high) { /* the last span that begins at or before p */
        size_t m = (low + high) / 2;
        if (spans[m].data <= p)
            low = m + 1;
        else
            high = m;
    }
    const cu_span *s = low ? &spans[low - 1] : NULL;
    return s && p + n <= s->data + s->n ? s : NULL;
}

const void *cu_held(cu_backend *b, const void *host, size_t n) {
    const unsigned char *p = (const unsigned char *)host;
    const cu_span *s = host ? span_of(b->spans, b->n_spans, p, n) : NULL;
    if (s) {
        unsigned char *at = b->groups[s->group].at[b->current];
        if (at)
            return at + s->offset + (size_t)(p - s->data);
        if (!b->failed)
            cu_good(b, b->current, cu_fail(CU_FAILED, "weights were used that are not there"));
        return NULL;
    }
    unsigned char *lows = b->cards[b->current].lows;
    s = host && lows ? span_of(b->lows, b->n_lows, p, n) : NULL;
    return s ? lows + s->offset + (size_t)(p - s->data) : NULL;
}

const void *cu_weight_at(cu_backend *b, const void *host, size_t n) {
    const void *p = cu_held(b, host, n);
    return p || b->failed || !host ? p : cu_small(b, host, n);
}
