#include "model/step_cache.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/log.h"
#include "base/parallel.h"
#include "plan/memory.h"

#define CHUNK QIE_PLAN_CACHE_CHUNK /* values summed as one piece: some 50 us */

/* Measured, docs/SPEED.md «Step caching»: thresholds and rows of skipped steps that cost the demo's
 * pictures little (balanced) or visibly less than half of the steps would (fast). */
static const qie_cache_rules MODES[] = {
    [QIE_CACHE_OFF] = {0, 0, 0, 0},
    [QIE_CACHE_BALANCED] = {.threshold = 0.06, .most = 2},
    [QIE_CACHE_FAST] = {.threshold = 0.12, .most = 4},
};

bool qie_cache_rules_make(qie_cache mode, double threshold, int n_steps, qie_cache_rules *out) {
    *out = MODES[QIE_CACHE_OFF];
    if ((unsigned)mode >= sizeof MODES / sizeof *MODES || mode == QIE_CACHE_OFF ||
        n_steps < QIE_CACHE_MIN_STEPS)
        return false;
    *out = MODES[mode];
    if (threshold >= 0)
        out->threshold = threshold;
    out->first = (n_steps + 9) / 10 > 2 ? (n_steps + 9) / 10 : 2;
    out->last = 1;
    return true;
}

int64_t qie_step_cache_chunks(int64_t n) {
    return (n + CHUNK - 1) / CHUNK;
}

qie_status qie_step_cache_init(qie_step_cache *c, const qie_run *run, const qie_cache_rules *rules,
                               int n_steps, int n_passes, int64_t n, qie_error *err) {
    size_t bytes = sizeof(float) * (size_t)n;
    void *p;
    memset(c, 0, sizeof *c);
    c->rules = *rules;
    c->n_steps = n_steps;
    c->n = n;
    QIE_TRY(
        qie_run_alloc_host(run, sizeof(double) * 2 * (size_t)qie_step_cache_chunks(n), &p, err));
    c->partial = p;
    QIE_TRY(qie_run_alloc(run, bytes, &p, err));
    c->scratch = p;
    for (int i = 0; i < n_passes; i++) {
        QIE_TRY(qie_run_alloc(run, bytes, &p, err));
        c->first[i] = p;
        QIE_TRY(qie_run_alloc(run, bytes, &p, err));
        c->rest[i] = p;
    }
    return QIE_OK;
}

typedef struct summing {
    const float *a, *b;
    int64_t n;
    double *partial;
} summing;

static void sum_chunk(void *arg, size_t i_chunk, int i_thread) {
    summing *s = arg;
    int64_t from = (int64_t)i_chunk * CHUNK, to = from + CHUNK < s->n ? from + CHUNK : s->n;
    /* Four rows of sums each, added in one order: vectors without reordering by the compiler. */
    double change[4] = {0}, size[4] = {0};
    (void)i_thread;
    for (int64_t i = from; i < to; i++) {
        change[i & 3] += fabsf(s->a[i] - s->b[i]);
        size[i & 3] += fabsf(s->b[i]);
    }
    s->partial[2 * i_chunk] = change[0] + change[1] + change[2] + change[3];
    s->partial[2 * i_chunk + 1] = size[0] + size[1] + size[2] + size[3];
}

double qie_relative_change(const float *a, const float *b, int64_t n, int n_threads,
                           double *partial) {
    summing s = {a, b, n, partial};
    double change = 0, size = 0;
    qie_parallel_for(n_threads, (size_t)qie_step_cache_chunks(n), sum_chunk, &s);
    for (int64_t i = 0; i < qie_step_cache_chunks(n); i++) {
        change += partial[2 * i];
        size += partial[2 * i + 1];
    }
    return change <= 0 ? 0 : change / size; /* size 0: infinite */
}

void qie_step_cache_before(qie_step_cache *c, const qie_run *run, int i_step, int i_pass,
                           const float *x) {
    if (i_step == 0) { /* of another picture, or the first */
        c->filled[i_pass] = false;
        c->n_row[i_pass] = 0;
    }
    run->compute->ops.copy(run->compute, c->scratch, x, sizeof(float) * (size_t)c->n);
}

/* How far the first block's part has moved; on a device the numbers come to the host. */
static qie_status change_of(const qie_step_cache *c, const qie_run *run, int i_pass, double *change,
                            qie_error *err) {
    size_t bytes = sizeof(float) * (size_t)c->n;
    qie_run_mark mark = qie_run_mark_get(run);
    const void *now, *then;
    QIE_TRY(qie_run_view(run, c->scratch, bytes, &now, err));
    QIE_TRY(qie_run_view(run, c->first[i_pass], bytes, &then, err));
    *change = qie_relative_change(now, then, c->n, run->compute->n_threads, c->partial);
    qie_run_release(run, mark);
    return QIE_OK;
}

qie_status qie_step_cache_decide(qie_step_cache *c, const qie_run *run, int i_step, int i_pass,
                                 float *x, bool *skip, qie_error *err) {
    qie_compute *compute = run->compute;
    size_t bytes = sizeof(float) * (size_t)c->n;
    const qie_cache_rules *r = &c->rules;
    *skip = false;
    compute->ops.axpy(compute, -1, x, c->scratch, c->n);
    if (c->filled[i_pass] && i_step >= r->first && i_step < c->n_steps - r->last &&
        c->n_row[i_pass] < r->most) {
        double change;
        QIE_TRY(change_of(c, run, i_pass, &change, err));
        *skip = change < r->threshold; /* not a number: computed, and found out later */
        qie_log(QIE_LOG_DEBUG, "cache", "step %d, pass %d: change %.4f, %s", i_step + 1, i_pass,
                change, *skip ? "skipped" : "computed");
    }
    if (*skip) {
        compute->ops.axpy(compute, -1, c->rest[i_pass], x, c->n);
        c->n_row[i_pass]++;
        c->n_skipped++;
        return QIE_OK;
    }
    float *first = c->first[i_pass];
    c->first[i_pass] = c->scratch;
    c->scratch = first;
    c->n_row[i_pass] = 0;
    compute->ops.copy(compute, c->rest[i_pass], x, bytes);
    qie_run_share(run, c->rest[i_pass], bytes); /* the last block may be on another device */
    return QIE_OK;
}

void qie_step_cache_keep(qie_step_cache *c, const qie_run *run, int i_pass, const float *x) {
    run->compute->ops.axpy(run->compute, -1, x, c->rest[i_pass], c->n);
    qie_run_share(run, c->rest[i_pass], sizeof(float) * (size_t)c->n);
    c->filled[i_pass] = true;
}
