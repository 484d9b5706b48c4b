/* Memory of the cards: activations, transfers, and the order between cards. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_kernels.hpp"
#include "compute/cuda/cu_state.hpp"

bool cu_good(cu_backend *b, int card, int rc) {
    if (rc == CU_OK)
        return true;
    if (!b->failed) {
        b->failed = rc;
        snprintf(b->why, sizeof b->why, "GPU %d (%.60s): %.230s",
                 card >= 0 ? b->cards[card].number : -1, card >= 0 ? b->cards[card].info.name : "?",
                 cu_text());
    }
    return false;
}

void *cu_here(const cu_backend *b, int card, const void *p) {
    const unsigned char *c = (const unsigned char *)p, *base = b->cards[0].arena;
    if (!p || card == 0 || c < base || c >= base + b->arena_bytes)
        return (void *)(uintptr_t)p;
    return b->cards[card].arena + (c - base);
}

cu_card *cu_ready(cu_backend *b) {
    if (b->failed)
        return NULL;
    cu_card *d = &b->cards[b->current];
    b->bytes.x = NULL;
    for (int i = 0; i < QIE_ASSIGN_LANES && !b->in_pass; i++)
        if (b->arriving_from[i]) {
            cu_event e = b->arriving[i][b->arriving_from[i]];
            b->arriving_from[i] = 0;
            cu_good(b, 0, cu_stream_wait(b->cards[0].compute, e));
        }
    return d;
}

/* A graph would read whatever a piece of pinned memory holds later. */
static bool repeats(cu_backend *b) {
    return b->noting && !cu_good(b, b->current, cu_fail(CU_FAILED, "it needs data of the host"));
}

/* A piece of pinned memory that no copy reads any more; -1: a failure. */
static int take_chunk(cu_backend *b) {
    if (repeats(b))
        return -1;
    int k = b->next_chunk;
    b->next_chunk = (k + 1) % CU_CHUNKS;
    for (int d = 0; d < b->n; d++)
        if (b->chunk_used[k][d]) {
            b->chunk_used[k][d] = false;
            if (!cu_good(b, d, cu_event_sync(b->chunk_done[k][d])))
                return -1;
        }
    return k;
}

void cu_send(cu_backend *b, int card, cu_stream s, void *dst, const void *src, size_t n) {
    for (size_t at = 0; at < n && !b->failed; at += CU_CHUNK_BYTES) {
        size_t part = n - at < CU_CHUNK_BYTES ? n - at : CU_CHUNK_BYTES;
        int k = take_chunk(b);
        if (k < 0)
            return;
        memcpy(b->chunk[k], (const unsigned char *)src + at, part);
        if (!cu_good(b, card, cu_copy_in(s, (unsigned char *)dst + at, b->chunk[k], part)) ||
            !cu_good(b, card, cu_event_record(b->chunk_done[k][card], s)))
            return;
        b->chunk_used[k][card] = true;
    }
}

void cu_send_rows(cu_backend *b, void *dst, const void *table, size_t row, const int32_t *ids,
                  int64_t n) {
    cu_card *d = &b->cards[b->current];
    int64_t some = (int64_t)(CU_CHUNK_BYTES / row);
    if (some < 1) {
        cu_good(b, b->current, cu_fail(CU_FAILED, "a row of the embedding is too long"));
        return;
    }
    for (int64_t at = 0; at < n && !b->failed; at += some) {
        int64_t part = n - at < some ? n - at : some;
        int k = take_chunk(b);
        if (k < 0)
            return;
        for (int64_t i = 0; i < part; i++)
            memcpy(b->chunk[k] + (size_t)i * row,
                   (const unsigned char *)table + (size_t)ids[at + i] * row, row);
        if (!cu_good(b, b->current,
                     cu_copy_in(d->compute, (unsigned char *)dst + (size_t)at * row, b->chunk[k],
                                (size_t)part * row)) ||
            !cu_good(b, b->current, cu_event_record(b->chunk_done[k][b->current], d->compute)))
            return;
        b->chunk_used[k][b->current] = true;
    }
}

void cu_receive(cu_backend *b, void *dst, const void *src, size_t n) {
    cu_card *d = cu_ready(b);
    for (size_t at = 0; d && !repeats(b) && at < n && !b->failed; at += CU_CHUNK_BYTES) {
        size_t part = n - at < CU_CHUNK_BYTES ? n - at : CU_CHUNK_BYTES;
        if (!cu_good(b, b->current,
                     cu_copy_out(d->compute, b->received, (const unsigned char *)src + at, part)) ||
            !cu_good(b, b->current, cu_stream_sync(d->compute)))
            return;
        memcpy((unsigned char *)dst + at, b->received, part);
    }
}

void *cu_small(cu_backend *b, const void *host, size_t n) {
    cu_card *d = &b->cards[b->current];
    size_t need = (n + CU_ALIGN - 1) / CU_ALIGN * CU_ALIGN;
    if (need > CU_SMALL_BYTES) {
        cu_good(b, b->current, cu_fail(CU_FAILED, "a list of the host is too long"));
        return NULL;
    }
    if (d->small_at + need > CU_SMALL_BYTES)
        d->small_at = 0; /* the stream is in order: earlier readers are done before the copy */
    void *p = d->small + d->small_at;
    d->small_at += need;
    cu_send(b, b->current, d->compute, p, host, n);
    return b->failed ? NULL : p;
}

void cu_after(cu_backend *b, int to, int from) {
    cu_card *f = &b->cards[from];
    if (cu_good(b, from, cu_event_record(f->met, f->compute)))
        cu_good(b, to, cu_stream_wait(b->cards[to].compute, f->met));
}

/* Ranges of activations from one card to another. The copy runs on the source's stream, when the
 * target has finished with what lay there. */
static void move(cu_backend *b, int from, int to, const qie_range *r, size_t n, bool wait) {
    if (from == to || !n || b->failed)
        return;
    cu_after(b, from, to);
    for (size_t i = 0; i < n && !b->failed; i++)
        if (r[i].n_bytes)
            cu_good(b, from,
                    cu_copy_peer(b->cards[from].compute, b->cards[to].id, cu_here(b, to, r[i].data),
                                 cu_here(b, from, r[i].data), r[i].n_bytes));
    if (wait)
        cu_after(b, to, from);
}

static void mem_upload(qie_compute *c, void *dst, const void *src, size_t n) {
    cu_backend *b = cu_of(c);
    if (!cu_ready(b))
        return;
    for (size_t at = 0; at < n && !b->failed; at += CU_CHUNK_BYTES) {
        size_t part = n - at < CU_CHUNK_BYTES ? n - at : CU_CHUNK_BYTES;
        int k = take_chunk(b);
        if (k < 0)
            return;
        memcpy(b->chunk[k], (const unsigned char *)src + at, part);
        for (int d = 0; d < b->n && !b->failed; d++) {
            if (!b->cards[d].arena)
                continue;
            void *to = (unsigned char *)cu_here(b, d, dst) + at;
            cu_good(b, d, cu_copy_in(b->cards[d].compute, to, b->chunk[k], part));
            cu_good(b, d, cu_event_record(b->chunk_done[k][d], b->cards[d].compute));
            b->chunk_used[k][d] = true;
        }
    }
}

static void mem_download(qie_compute *c, void *dst, const void *src, size_t n) {
    cu_backend *b = cu_of(c);
    cu_receive(b, dst, cu_here(b, b->current, src), n);
}

static void mem_zero(qie_compute *c, void *dst, size_t n) {
    cu_backend *b = cu_of(c);
    if (!cu_ready(b))
        return;
    for (int d = 0; d < b->n; d++)
        if (b->cards[d].arena)
            cu_good(b, d, cu_zero(b->cards[d].compute, cu_here(b, d, dst), n));
}

static void mem_convert(qie_compute *c, qie_mat src, qie_mat dst) {
    cu_backend *b = cu_of(c);
    if (!cu_ready(b))
        return;
    for (int d = 0; d < b->n; d++) {
        if (!b->cards[d].arena)
            continue;
        qie_mat from = src, to = dst;
        from.data = cu_here(b, d, src.data);
        to.data = cu_here(b, d, dst.data);
        cu_k_convert(b->cards[d].compute, from, to);
    }
}

static void mem_share(qie_compute *c, const void *data, size_t n) {
    cu_backend *b = cu_of(c);
    qie_range r = {(void *)(uintptr_t)data, n};
    if (!cu_ready(b))
        return;
    for (int d = 0; d < b->n; d++)
        if (b->cards[d].arena)
            move(b, b->current, d, &r, 1, true);
}

static void mem_begin_group(qie_compute *c, const qie_weight_group *g, const qie_range *live,
                            size_t n_live, const qie_weight_group *next) {
    cu_backend *b = cu_of(c);
    if (!cu_ready(b) || !b->placed)
        return;
    int card = g->kind == QIE_GROUP_FIXED ? b->current : b->groups[g->id].card[b->lane];
    move(b, b->current, card, live, n_live, true);
    b->current = card;
    cu_weights_use(b, card, g);
    if (next && next->kind != QIE_GROUP_FIXED)
        cu_weights_fetch(b, b->groups[next->id].card[b->lane], next);
}

static bool mem_stays(qie_compute *c, const qie_weight_group *g) {
    cu_backend *b = cu_of(c);
    return b->placed && b->groups[g->id].card[b->lane] == b->current;
}

/* Card that a lane begins on: that of its first block. */
static int lane_start(const cu_backend *b, int lane) {
    for (size_t i = 0; i < b->n_groups; i++)
        if (b->groups[i].g->kind == QIE_GROUP_BLOCK)
            return b->groups[i].card[lane];
    return 0;
}

static void mem_begin_pass(qie_compute *c, int i_pass, qie_range in) {
    cu_backend *b = cu_of(c);
    if (!cu_ready(b) || !b->placed)
        return;
    int lane = b->plan.form == QIE_FORM_PARALLEL ? i_pass % QIE_ASSIGN_LANES : 0;
    /* All lanes get their input before the first one queues its work on the first card. */
    if (i_pass == 0)
        for (int l = 0; l < QIE_ASSIGN_LANES; l++)
            move(b, 0, lane_start(b, l), &in, 1, true);
    b->lane = lane;
    b->current = lane_start(b, lane);
    b->in_pass = true;
}

static void mem_end_pass(qie_compute *c, int i_pass, qie_range out) {
    cu_backend *b = cu_of(c);
    int from = b->current, slot = i_pass % QIE_ASSIGN_LANES;
    if (!b->failed && from != 0) {
        move(b, from, 0, &out, 1, false);
        cu_good(b, from, cu_event_record(b->arriving[slot][from], b->cards[from].compute));
        b->arriving_from[slot] = from;
    }
    b->in_pass = false;
    b->lane = 0;
    b->current = 0;
}

static qie_status mem_check(qie_compute *c, qie_error *err) {
    cu_backend *b = cu_of(c);
    if (b->noting) /* what is wrong with a capture is seen at its end */
        return QIE_OK;
    switch (b->failed) {
    case CU_OK: return QIE_OK;
    case CU_OOM: return qie_fail(err, QIE_E_NO_MEMORY, "device", "%s", b->why);
    default:
        return qie_fail(err, QIE_E_UNAVAILABLE, "device",
                        "the GPU failed and cannot be used by this process any more: %s", b->why);
    }
}

static qie_status mem_reserve(qie_compute *c, size_t n, void **base, qie_error *err) {
    cu_backend *b = cu_of(c);
    *base = NULL;
    QIE_TRY(mem_check(c, err));
    QIE_TRY(cu_weights_place(b, n, err));
    *base = b->cards[0].arena;
    return QIE_OK;
}

static int64_t mem_room(qie_compute *c) {
    return cu_weights_room(cu_of(c));
}

static const char *mem_describe(qie_compute *c) {
    return cu_of(c)->description;
}

static qie_status mem_plan(qie_compute *c, size_t n, char *out, size_t cap, qie_error *err) {
    cu_backend *b = cu_of(c);
    out[0] = 0;
    QIE_TRY(mem_check(c, err));
    return cu_weights_plan(b, n, out, cap, err);
}

const qie_mem_ops cu_mem_ops = {mem_reserve,     cu_weights_load, cu_weights_adapt, mem_upload,
                                mem_download,    mem_zero,        mem_convert,      mem_share,
                                mem_begin_group, mem_stays,       mem_begin_pass,   mem_end_pass,
                                cu_repeat_begin, cu_repeat_end,   cu_repeat_forget, mem_check,
                                mem_room,        mem_describe,    mem_plan};

int cu_memory_create(cu_backend *b, const qie_compute_limits *limits) {
    (void)limits;
    for (int k = 0; k <= CU_CHUNKS; k++) {
        void *p;
        int rc = cu_host_alloc(CU_CHUNK_BYTES, &p);
        if (rc != CU_OK)
            return rc;
        (k < CU_CHUNKS ? b->chunk[k] : b->received) = (unsigned char *)p;
    }
    for (int d = 0; d < b->n; d++) {
        cu_card *x = &b->cards[d];
        int rc = cu_stream_create(x->id, &x->compute);
        if (rc == CU_OK)
            rc = cu_stream_create(x->id, &x->copy);
        if (rc == CU_OK)
            rc = cu_event_create(x->id, &x->met);
        for (int k = 0; k < CU_CHUNKS && rc == CU_OK; k++)
            rc = cu_event_create(x->id, &b->chunk_done[k][d]);
        for (int k = 0; k < CU_MOST_SLOTS && rc == CU_OK; k++) {
            rc = cu_event_create(x->id, &x->slots[k].ready);
            if (rc == CU_OK)
                rc = cu_event_create(x->id, &x->slots[k].done);
        }
        for (int k = 0; k < QIE_ASSIGN_LANES && rc == CU_OK; k++)
            rc = cu_event_create(x->id, &b->arriving[k][d]);
        if (rc == CU_OK)
            rc = qie_cu_libs_create(x->id, &x->libs);
        if (rc != CU_OK)
            return rc;
    }
    return CU_OK;
}

void cu_memory_release(cu_backend *b) {
    cu_weights_release(b);
    for (int d = 0; d < b->n; d++) {
        cu_card *x = &b->cards[d];
        qie_cu_libs_destroy(x->libs);
        for (int k = 0; k < CU_CHUNKS; k++)
            cu_event_destroy(b->chunk_done[k][d]);
        for (int k = 0; k < CU_MOST_SLOTS; k++) {
            cu_event_destroy(x->slots[k].ready);
            cu_event_destroy(x->slots[k].done);
        }
        for (int k = 0; k < QIE_ASSIGN_LANES; k++)
            cu_event_destroy(b->arriving[k][d]);
        cu_event_destroy(x->met);
        cu_stream_destroy(x->compute);
        cu_stream_destroy(x->copy);
    }
    for (int k = 0; k < CU_CHUNKS; k++)
        cu_host_free(b->chunk[k]);
    cu_host_free(b->received);
}
