/* Attention with a running softmax: no row of scores longer than a block exists.
 *
 * A task is one head and 128 to 512 rows of queries. Queries are packed once as B, so that a
 * query is a lane of the vectors and keys and values are read by broadcast: scores lie
 * [key][query], the softmax never crosses lanes, and its weights are B of the second product as
 * they leave the vector unit. The output grows as [channel][query] and is turned over at the end.
 * Blocks of keys and values are copied together once for all queries of the task. */
#include <assert.h>

#include "base/parallel.h"
#include "compute/cpu/cpu_state.h"

enum {
    MIN_QUERIES = 128, /* in a task */
    MAX_QUERIES = 512,
    OUT_BYTES = 256 << 10, /* of a task's results, at most: they stay in the core's cache, too */
    MIN_TASKS = 64,
    BLOCK_BYTES = 96 << 10, /* of one block of keys: with the values it stays in the core's cache */
    MAX_KEYS = 256,
};

/* Keys in a block: even, decided by the head size alone. */
static int64_t block_keys(int64_t d, int64_t unit) {
    int64_t n = BLOCK_BYTES * unit / (d * 4) / 16 * 16;
    return n > MAX_KEYS ? MAX_KEYS : n < 16 ? 16 : n;
}

/* Most queries of a task: the more, the less often keys and values are copied. */
static int64_t most_queries(int64_t d) {
    int64_t n = MAX_QUERIES;
    while (n > MIN_QUERIES && n * d * 4 > OUT_BYTES)
        n /= 2;
    return n;
}

typedef struct layout {
    int64_t keys, parts;                /* keys in a block; blocks of k that a key takes */
    int64_t queries;                    /* of a task, at most */
    size_t k, v, q, s, o, stats, bytes; /* offsets in the thread's scratch */
} layout;

static layout layout_of(int64_t d, int64_t unit, bool v_rows) {
    layout l = {.keys = block_keys(d, unit), .queries = most_queries(d)};
    int64_t units = qie_ceil_div(d, unit);
    l.parts = qie_ceil_div(units, QIE_K_UNITS);
    l.k = 0;
    l.v = l.k + (size_t)(l.keys * l.parts * QIE_A_STRIDE);
    l.q = l.v +
          (v_rows ? (size_t)(d * QIE_A_STRIDE) : (size_t)((l.keys / unit * d * 4 + 63) / 64 * 64));
    l.s = l.q + (size_t)(l.queries * units * 4);
    l.o = l.s + (size_t)(l.keys * QIE_NR_MAX * 4);
    l.stats = l.o + (size_t)(l.queries * d * 4);
    l.bytes = l.stats + 3 * (size_t)l.queries * sizeof(float);
    return l;
}

size_t qie_cpu_attention_bytes(int max_head_dim) {
    size_t most = 0;
    for (int64_t d = 1; d <= max_head_dim; d++)
        for (int i = 0; i < 3; i++) { /* float, bf16, bf16 with v_rows */
            size_t bytes = layout_of(d, i ? 2 : 1, i == 2).bytes;
            most = bytes > most ? bytes : most;
        }
    return most;
}

typedef struct attention_job {
    qie_compute *c;
    const qie_attention_args *a;
    const qie_gemm *g;
    layout l;
    int64_t queries, n_blocks; /* in a task; tasks of a head */
} attention_job;

static const void *at(const qie_mat *m, int64_t row, int64_t col) {
    return (const unsigned char *)m->data + (size_t)(row * m->ld + col) * qie_dtype_size(m->dtype);
}

/* Up to two vectors of queries. */
typedef struct group {
    int64_t from, n; /* rows of q */
    int vectors, cols;
    bool started;
    const unsigned char *q;
    float *o, *max, *sum;
} group;

/* One block of n keys, already copied, for one group; limit as in qie_softmax_args. */
static void attend_block(const attention_job *job, unsigned char *scratch, group *gr, int64_t n,
                         int64_t limit) {
    const qie_gemm *g = job->g;
    const layout *l = &job->l;
    int64_t d = job->a->head_dim, units = qie_ceil_div(d, g->unit), cols = gr->cols;
    float *s = (float *)(void *)(scratch + l->s);
    float *factor = (float *)(void *)(scratch + l->stats) + 2 * l->queries;
    int64_t n_tiles = qie_ceil_div(n, g->mr);
    for (int64_t t = 0; t < n_tiles; t++) {
        int64_t r0 = n * t / n_tiles, rows = n * (t + 1) / n_tiles - r0;
        for (int64_t p = 0; p < l->parts; p++) {
            int64_t u0 = p * QIE_K_UNITS,
                    steps = units - u0 < QIE_K_UNITS ? units - u0 : QIE_K_UNITS;
            g->tile[QIE_A_ROWS][gr->vectors - 1][rows](
                steps, scratch + l->k + (p * l->keys + r0) * QIE_A_STRIDE, 0, gr->q + u0 * cols * 4,
                s + r0 * cols, cols, NULL, p > 0);
        }
    }
    g->softmax(&(qie_softmax_args){.s = s,
                                   .p = s,
                                   .max = gr->max,
                                   .sum = gr->sum,
                                   .factor = factor,
                                   .scale = job->a->scale,
                                   .n = n,
                                   .cols = gr->cols,
                                   .limit = limit});
    n_tiles = qie_ceil_div(d, g->mr);
    for (int64_t t = 0; t < n_tiles; t++) {
        int64_t r0 = d * t / n_tiles, rows = d * (t + 1) / n_tiles - r0;
        const unsigned char *v = scratch + l->v + r0 * (g->v_rows ? QIE_A_STRIDE : 4);
        g->tile[g->v_rows ? QIE_A_ROWS : QIE_A_STEPS][gr->vectors - 1][rows](
            qie_ceil_div(n, g->unit), v, d * 4, s, gr->o + r0 * cols, cols, factor, gr->started);
    }
    gr->started = true;
}

/* Queries [q0, q1) of one head over keys [k0, k1). */
static void attend(const attention_job *job, unsigned char *scratch, int head, int64_t q0,
                   int64_t q1, int64_t k0, int64_t k1) {
    const qie_attention_args *a = job->a;
    const qie_gemm *g = job->g;
    const layout *l = &job->l;
    int64_t d = a->head_dim, units = qie_ceil_div(d, g->unit), offset = a->k.rows - a->q.rows;
    int64_t q_col = head * d, kv_col = head / (a->n_heads / a->n_kv_heads) * d;
    float *stats = (float *)(void *)(scratch + l->stats);
    group groups[MAX_QUERIES / 8];
    int n_groups = 0;
    for (int64_t q = q0, done = 0; q < q1; n_groups++) {
        group *gr = &groups[n_groups];
        int64_t left = q1 - q;
        *gr = (group){.from = q, .vectors = left > g->vw ? 2 : 1};
        gr->cols = gr->vectors * g->vw;
        gr->n = left < gr->cols ? left : gr->cols;
        unsigned char *packed = scratch + l->q + done * units * 4;
        gr->q = packed;
        gr->o = (float *)(void *)(scratch + l->o) + done * d;
        gr->max = stats + done;
        gr->sum = stats + l->queries + done;
        for (int i = 0; i < gr->cols; i++) {
            gr->max[i] = -1e30f;
            gr->sum[i] = 0;
        }
        g->pack_b(packed, gr->vectors, at(&a->q, q, q_col), a->q.dtype, a->q.ld, gr->n, d);
        q += gr->n;
        done += gr->cols;
    }
    if (a->causal && q1 + offset < k1)
        k1 = q1 + offset;
    for (int64_t k = k0; k < k1; k += l->keys) {
        int64_t n = k1 - k < l->keys ? k1 - k : l->keys;
        for (int64_t p = 0; p < l->parts; p++) {
            int64_t e0 = p * QIE_K_UNITS * g->unit, len = d - e0;
            if (len > QIE_K_UNITS * g->unit)
                len = QIE_K_UNITS * g->unit;
            g->copy_a(scratch + l->k + p * l->keys * QIE_A_STRIDE, at(&a->k, k, kv_col + e0),
                      a->k.dtype, a->k.ld, n, len);
        }
        g->pack_v(scratch + l->v, at(&a->v, k, kv_col), a->v.dtype, a->v.ld, n, d);
        for (int i = 0; i < n_groups; i++) {
            group *gr = &groups[i];
            int64_t limit = INT64_MAX, seen = n;
            if (a->causal) {
                limit = gr->from + offset + 1 - k;
                if (limit + gr->n - 1 < seen)
                    seen = limit + gr->n - 1;
                if (limit >= seen)
                    limit = INT64_MAX;
            }
            if (seen > 0)
                attend_block(job, scratch, gr, seen, limit);
        }
    }
    for (int i = 0; i < n_groups; i++)
        qie_cpu_state_of(job->c)->kernels->finish_attention(
            groups[i].o, groups[i].sum, groups[i].cols, d, groups[i].n,
            (void *)at(&a->dst, groups[i].from, q_col), a->dst.dtype, a->dst.ld);
}

static void attend_segments(const attention_job *job, size_t index, int i_thread) {
    const qie_attention_args *a = job->a;
    unsigned char *scratch = qie_cpu_thread_scratch(job->c, i_thread);
    int head = (int)((int64_t)index / job->n_blocks);
    int64_t q0 = (int64_t)index % job->n_blocks * job->queries;
    int64_t q1 = q0 + job->queries < a->q.rows ? q0 + job->queries : a->q.rows;
    if (!a->segments) {
        attend(job, scratch, head, q0, q1, 0, a->k.rows);
        return;
    }
    /* Last segment that starts at or before q0. */
    size_t lo = 0, hi = a->n_segments;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (a->segments[mid] <= q0)
            lo = mid;
        else
            hi = mid;
    }
    for (size_t s = lo; s < a->n_segments && a->segments[s] < q1; s++) {
        int64_t from = a->segments[s], to = a->segments[s + 1];
        int64_t first = from > q0 ? from : q0, last = to < q1 ? to : q1;
        if (first < last)
            attend(job, scratch, head, first, last, from, to);
    }
}

static void attention_task(void *arg, size_t index, int i_thread) {
    const attention_job *job = arg;
    qie_gemm_begin(job->g);
    attend_segments(job, index, i_thread);
    qie_gemm_end(job->g);
}

void qie_cpu_attention(qie_compute *c, const qie_attention_args *a) {
    assert(a->q.dtype == a->k.dtype && a->k.dtype == a->v.dtype);
    attention_job job = {.c = c, .a = a, .g = qie_cpu_gemm(c, a->q.dtype)};
    job.l = layout_of(a->head_dim, job.g->unit, job.g->v_rows);
    assert(job.l.bytes <= qie_cpu_state_of(c)->thread_bytes);
    job.queries = job.l.queries;
    while (job.queries > MIN_QUERIES &&
           a->n_heads * qie_ceil_div(a->q.rows, job.queries) < MIN_TASKS)
        job.queries /= 2;
    job.n_blocks = qie_ceil_div(a->q.rows, job.queries);
    int64_t work = a->q.rows * a->k.rows * a->head_dim * a->n_heads;
    qie_parallel_for(work < 1 << 18 ? 1 : c->n_threads, (size_t)(job.n_blocks * a->n_heads),
                     attention_task, &job);
}
