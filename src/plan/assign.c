#include "plan/assign.h"

#include <stdio.h>
#include <string.h>

/* The most useful first: uses per byte over an edit. */
static const qie_assign_kind PRIORITY[] = {QIE_ASSIGN_BLOCK, QIE_ASSIGN_MODULATION,
                                           QIE_ASSIGN_TEXT};

/* Held whatever happens: by every card, the VAE by the first. */
static bool always_held(qie_assign_kind k) {
    return k == QIE_ASSIGN_FIXED || k == QIE_ASSIGN_VAE;
}

const char *qie_assign_form_name(qie_assign_form form) {
    static const char *const names[] = {"resident", "streamed", "sharded", "parallel"};
    return (unsigned)form < 4 ? names[form] : "?";
}

/* Cards of one guidance pass. */
typedef struct lane {
    int n, cards[QIE_ASSIGN_CARDS_MAX];
} lane;

typedef struct job {
    const qie_assign_request *r;
    qie_assign_group *groups;
    size_t n;
    qie_assign_result *out;
    int64_t fixed[QIE_ASSIGN_CARDS_MAX]; /* bytes that a card holds whatever happens */
    int64_t room[QIE_ASSIGN_CARDS_MAX];  /* beside work and fixed layers */
} job;

/* Layers of a kind in contiguous runs over the lane's cards, in proportion to their room. */
static void share(job *j, const lane *l, int i_lane, unsigned kinds) {
    double total = 0, all = 0, done = 0;
    for (int i = 0; i < l->n; i++)
        total += j->room[l->cards[i]] > 0 ? (double)j->room[l->cards[i]] : 0;
    int most = 0;
    for (size_t g = 0; g < j->n; g++)
        if (kinds >> j->groups[g].kind & 1) {
            all += (double)j->groups[g].bytes;
            if (j->groups[g].index > most)
                most = j->groups[g].index;
        }
    double upto = 0;
    int at = -1;
    for (int index = 0; index <= most; index++) {
        double bytes = 0;
        for (size_t g = 0; g < j->n; g++)
            if (kinds >> j->groups[g].kind & 1 && j->groups[g].index == index)
                bytes += (double)j->groups[g].bytes;
        /* the card whose share the middle of this layer falls into */
        while (at < 0 || (at + 1 < l->n && done + bytes / 2 >= upto)) {
            at++;
            double room = j->room[l->cards[at]] > 0 ? (double)j->room[l->cards[at]] : 0;
            upto += total > 0 ? all * room / total : 0;
        }
        for (size_t g = 0; g < j->n; g++)
            if (kinds >> j->groups[g].kind & 1 && j->groups[g].index == index)
                j->groups[g].card[i_lane] = (signed char)l->cards[at];
        done += bytes;
    }
}

static void place_lane(job *j, const lane *l, int i_lane) {
    share(j, l, i_lane, 1u << QIE_ASSIGN_TEXT);
    share(j, l, i_lane, 1u << QIE_ASSIGN_BLOCK | 1u << QIE_ASSIGN_MODULATION);
    for (size_t g = 0; g < j->n; g++)
        if (j->groups[g].kind == QIE_ASSIGN_VAE || j->groups[g].kind == QIE_ASSIGN_FIXED)
            j->groups[g].card[i_lane] = (signed char)l->cards[0];
}

/* Only the passes through the blocks have lanes of their own: modulation is computed by the first
 * lane's cards and its results shared. */
static bool in_lane(const qie_assign_group *g, int i_lane) {
    return i_lane == 0 || g->kind == QIE_ASSIGN_BLOCK;
}

/* Bytes that a card would hold if it held everything that it computes. */
static int64_t wanted(const job *j, int card, int n_lanes) {
    int64_t sum = 0;
    for (size_t g = 0; g < j->n; g++) {
        bool here = false;
        for (int i = 0; i < n_lanes; i++)
            here = here || (in_lane(&j->groups[g], i) && j->groups[g].card[i] == card);
        if (here && !always_held(j->groups[g].kind))
            sum += j->groups[g].bytes;
    }
    return sum;
}

static void hold(job *j, int card, int n_lanes, int64_t room, int64_t *held) {
    *held = 0;
    for (size_t p = 0; p < sizeof PRIORITY / sizeof *PRIORITY; p++)
        for (size_t g = 0; g < j->n; g++) {
            qie_assign_group *x = &j->groups[g];
            if (x->kind != PRIORITY[p] || x->bytes > room - *held)
                continue;
            bool here = false;
            for (int i = 0; i < n_lanes; i++)
                if (in_lane(x, i) && x->card[i] == card)
                    here = x->held[i] = true;
            if (here)
                *held += x->bytes;
        }
}

/* The whole plan for these lanes. may_stream: what does not fit passes through a ring. */
static bool try_lanes(job *j, const lane *lanes, int n_lanes, bool may_stream, bool hold_any) {
    qie_assign_result *out = j->out;
    bool used[QIE_ASSIGN_CARDS_MAX] = {false};
    for (size_t g = 0; g < j->n; g++)
        memset(j->groups[g].held, 0, sizeof j->groups[g].held);
    for (int i = 0; i < QIE_ASSIGN_LANES; i++) {
        const lane *l = &lanes[i < n_lanes ? i : 0];
        place_lane(j, l, i);
        for (int k = 0; k < l->n; k++)
            used[l->cards[k]] = true;
    }
    out->streams = false;
    out->streamed_bytes = 0;
    out->slot_bytes = 0;
    out->n_slots = j->r->level >= 3 ? 2 : QIE_ASSIGN_SLOTS;
    memset(out->need, 0, sizeof out->need);
    memset(out->held_bytes, 0, sizeof out->held_bytes);
    for (size_t g = 0; g < j->n; g++)
        if (!always_held(j->groups[g].kind) && j->groups[g].bytes > out->slot_bytes)
            out->slot_bytes = j->groups[g].bytes;
    for (int c = 0; c < j->r->n_cards; c++) {
        out->held_bytes[c] = out->need[c] = 0;
        if (!used[c])
            continue;
        int64_t all = wanted(j, c, n_lanes), room = j->room[c];
        bool ring = !hold_any || all > room;
        if (ring && (!may_stream || room < out->n_slots * out->slot_bytes)) {
            out->need[c] =
                j->fixed[c] + j->r->work + (may_stream ? out->n_slots * out->slot_bytes : all);
            return false;
        }
        if (ring)
            room -= out->n_slots * out->slot_bytes;
        hold(j, c, n_lanes, hold_any ? room : 0, &out->held_bytes[c]);
        out->streams = out->streams || ring;
        out->streamed_bytes += all - out->held_bytes[c];
        out->held_bytes[c] += j->fixed[c];
        out->need[c] =
            out->held_bytes[c] + j->r->work + (ring ? out->n_slots * out->slot_bytes : 0);
    }
    for (size_t g = 0; g < j->n; g++)
        if (always_held(j->groups[g].kind))
            for (int i = 0; i < QIE_ASSIGN_LANES; i++)
                j->groups[g].held[i] = true;
    for (size_t g = 0; g < j->n && n_lanes == 1; g++)
        for (int i = 1; i < QIE_ASSIGN_LANES; i++)
            j->groups[g].held[i] = j->groups[g].held[0];
    return true;
}

bool qie_assign(const qie_assign_request *r, qie_assign_group *groups, size_t n,
                qie_assign_result *out) {
    job j = {.r = r, .groups = groups, .n = n, .out = out};
    memset(out, 0, sizeof *out);
    if (r->n_cards < 1)
        return false;
    for (size_t g = 0; g < n; g++)
        for (int c = 0; c < r->n_cards; c++)
            if (groups[g].kind == QIE_ASSIGN_FIXED || (groups[g].kind == QIE_ASSIGN_VAE && !c))
                j.fixed[c] += groups[g].bytes;
    for (int c = 0; c < r->n_cards; c++)
        j.room[c] = r->offer[c] - r->work - j.fixed[c];
    /* The first card is where everything begins and ends; others without room for the work are left
     * out. */
    lane one = {1, {0}}, all = {0};
    for (int c = 0; c < r->n_cards; c++)
        if (!c || j.room[c] > 0)
            all.cards[all.n++] = c;
    int usable = all.n;
    out->n_cards = 1;
    for (int k = 2; r->level < 1 && r->n_passes > 1 && k <= usable; k++) {
        lane halves[QIE_ASSIGN_LANES] = {{0}, {0}};
        for (int i = 0; i < k; i++) { /* 0, 3, 4 ... and 1, 2, 5 ...: of about the same room */
            lane *half = &halves[(i + 1) / 2 % 2];
            half->cards[half->n++] = all.cards[i];
        }
        if (try_lanes(&j, halves, QIE_ASSIGN_LANES, false, true)) {
            out->form = QIE_FORM_PARALLEL;
            out->n_cards = k;
            return true;
        }
    }
    if (r->level < 2 && try_lanes(&j, &one, 1, false, true)) {
        out->form = QIE_FORM_RESIDENT;
        return true;
    }
    for (int k = 2; r->level < 2 && k <= usable; k++) {
        lane some = all;
        some.n = k;
        if (try_lanes(&j, &some, 1, k == usable, true)) {
            out->form = QIE_FORM_SHARDED;
            out->n_cards = k;
            return true;
        }
    }
    out->form = QIE_FORM_STREAMED;
    return try_lanes(&j, &one, 1, true, r->level < 2);
}

bool qie_assign_any(const qie_assign_request *r, qie_assign_group *groups, size_t n,
                    qie_assign_result *out) {
    qie_assign_request q = *r;
    for (; q.level <= 3; q.level++)
        if (qie_assign(&q, groups, n, out))
            return true;
    return false;
}

/* Small models are told in MiB. */
static const char *size_words(int64_t bytes, char out[24]) {
    const double mib = (double)bytes / 1048576.0;
    snprintf(out, 24, mib < 1024 ? "%.1f MiB" : "%.1f GiB", mib < 1024 ? mib : mib / 1024);
    return out;
}

void qie_assign_words(const qie_assign_result *r, const int *numbers, const char *const *names,
                      char *out, size_t cap) {
    char held[24], all[24];
    size_t n = (size_t)snprintf(out, cap, "%s", qie_assign_form_name(r->form));
    for (int c = 0; c < QIE_ASSIGN_CARDS_MAX && n < cap; c++)
        if (r->need[c])
            n += (size_t)snprintf(out + n, cap - n, "%s GPU %d (%.40s): %s of weights, %s in all",
                                  c ? ";" : ",", numbers[c], names[c],
                                  size_words(r->held_bytes[c], held),
                                  size_words(r->need[c] + QIE_GPU_RUNTIME, all));
    if (r->streams && n < cap)
        snprintf(out + n, cap - n, "; %s pass through %d slots", size_words(r->streamed_bytes, all),
                 r->n_slots);
}

static int64_t aligned(int64_t n) {
    return (n + QIE_GPU_ALIGN - 1) / QIE_GPU_ALIGN * QIE_GPU_ALIGN;
}

qie_gpu_space qie_gpu_space_make(int64_t k, int64_t n, int64_t conv_k, int64_t conv_n) {
    int64_t widest = k > n ? k : n, conv = 4 * conv_k * conv_n;
    /* 128 MiB: a product of the released model's widest layer goes in a few pieces */
    qie_gpu_space s = {.libs = (int64_t)32 << 20,
                       .product = aligned(widest > 4096 ? (int64_t)128 << 20 : 4 * 512 * n),
                       .panel = aligned(widest > 4096 ? (int64_t)128 << 20 : 4 * 64 * widest),
                       .low = aligned(4 * 4 * 256 * widest),
                       .small = (int64_t)1 << 20};
    if (s.panel < conv)
        s.panel = aligned(conv);
    s.total = s.libs + s.product + s.panel + s.low + s.small;
    return s;
}
