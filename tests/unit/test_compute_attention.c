/* attention: every level and type against plain C. */
#include "op_test.h"

typedef struct attention_case {
    int64_t nq, nk;
    int heads, kv_heads, d, pad; /* pad: extra columns of the leading dimensions */
    bool causal;
    int window; /* rows of a segment; 0: none */
    qie_dtype t, dst;
    float spread; /* of q: 1 = scores of a few units, more = sharp weights */
} attention_case;

/* Float: scores rounded before exp, sums of up to a few hundred weights. bf16 weights of the
 * softmax are rounded to 2^-9 of themselves (native), results to bf16. */
static double bound_of(const attention_case *p, qie_cpu_level level) {
    if (p->t == QIE_BF16 && level >= QIE_CPU_AVX512BF16)
        return 1e-5;
    return p->dst == QIE_BF16 ? 1e-6 : p->spread > 4 ? 1e-10 : 2e-12;
}

static void run_case(const attention_case *p) {
    int64_t ldq = (int64_t)p->heads * p->d + p->pad, ldk = (int64_t)p->kv_heads * p->d + 2 * p->pad;
    size_t nq = (size_t)((p->nq - 1) * ldq + p->heads * p->d),
           nk = (size_t)((p->nk - 1) * ldk + p->kv_heads * p->d);
    int64_t bounds[64];
    size_t n_segments = 0;
    if (p->window) {
        for (int64_t at = 0; at < p->nq; at += p->window)
            bounds[n_segments++] = at;
        bounds[n_segments] = p->nq;
    }
    for (int edge = 0; edge < 2; edge++) {
        op_buf q = op_random(p->t, nq, p->spread, edge), k = op_random(p->t, nk, 1, edge);
        op_buf v = op_random(p->t, nk, 1, edge), dst = op_random(p->dst, nq, 1, edge),
               want = op_copy(&dst, edge);
        qie_attention_args a = {.q = {q.data, p->t, p->nq, p->heads * p->d, ldq},
                                .k = {k.data, p->t, p->nk, p->kv_heads * p->d, ldk},
                                .v = {v.data, p->t, p->nk, p->kv_heads * p->d, ldk},
                                .n_heads = p->heads,
                                .n_kv_heads = p->kv_heads,
                                .head_dim = p->d,
                                .scale = 1.0f / sqrtf((float)p->d),
                                .causal = p->causal,
                                .segments = p->window ? bounds : NULL,
                                .n_segments = n_segments,
                                .dst = {want.data, p->dst, p->nq, p->heads * p->d, ldq}};
        qie_compute *ref = op_compute("ref", QIE_CPU_REF, 2);
        ref->ops.attention(ref, &a);
        qie_compute_destroy(ref);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++) {
            op_buf first = {0};
            for (int threads = 1; threads <= 3; threads++) {
                op_buf got = op_copy(&dst, edge);
                a.dst.data = got.data;
                qie_compute *c = op_compute("cpu", (qie_cpu_level)level, threads);
                memset(c->scratch, 0xff,
                       c->scratch_bytes); /* NaN: nothing may be read before it is written */
                c->ops.attention(c, &a);
                qie_compute_destroy(c);
                double nmse = op_nmse(got.data, want.data, p->dst, nq);
                if (!(nmse <= bound_of(p, (qie_cpu_level)level)))
                    QTEST_FAIL("level %s nq %lld nk %lld heads %d/%d d %d causal %d window %d %s "
                               "-> %s: NMSE %.3g",
                               qie_cpu_level_name((qie_cpu_level)level), (long long)p->nq,
                               (long long)p->nk, p->heads, p->kv_heads, p->d, p->causal, p->window,
                               op_dtype(p->t), op_dtype(p->dst), nmse);
                if (threads == 1) {
                    first = got;
                } else {
                    bool same = !memcmp(first.data, got.data, got.bytes);
                    op_free(&got);
                    if (!same)
                        QTEST_FAIL("level %s nq %lld nk %lld: %d threads differ from 1",
                                   qie_cpu_level_name((qie_cpu_level)level), (long long)p->nq,
                                   (long long)p->nk, threads);
                }
            }
            op_free(&first);
        }
        op_free(&q), op_free(&k), op_free(&v), op_free(&dst), op_free(&want);
    }
}

static const qie_dtype ACTS[] = {QIE_F32, QIE_BF16};

QTEST(test_attention_shapes_match_reference) {
    for (int i = 0; i < 4 && !qtest_failed; i++) {
        qie_dtype t = ACTS[i & 1], d = ACTS[i / 2];
        run_case(&(attention_case){33, 33, 2, 2, 128, 0, false, 0, t, d, 1});
        run_case(&(attention_case){150, 301, 2, 1, 80, 3, false, 0, t, d, 1});
        run_case(&(attention_case){5, 700, 4, 2, 32, 0, false, 0, t, d, 1});
        run_case(&(attention_case){1, 1, 1, 1, 16, 0, false, 0, t, d, 1});
    }
}

QTEST(test_attention_large_heads_match_reference) {
    for (int i = 0; i < 2 && !qtest_failed; i++) {
        run_case(&(attention_case){140, 140, 1, 1, 384, 0, false, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){40, 70, 1, 1, 512, 0, false, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){40, 70, 1, 1, 259, 1, false, 0, ACTS[i], ACTS[i], 1});
    }
}

/* The last queries have the same bits without those before. */
static void last_queries_alone(int heads, int d) {
    enum { N = 700, KV = 2 };
    static const int64_t counts[] = {1, 6, 31, 129, 300, 631};
    const int64_t width = (int64_t)heads * d, kv_width = (int64_t)KV * d;
    for (int i = 0; i < 2 && !qtest_failed; i++) {
        qie_dtype t = ACTS[i];
        op_buf q = op_random(t, (size_t)(N * width), 2, false),
               k = op_random(t, (size_t)(N * kv_width), 1, false),
               v = op_random(t, (size_t)(N * kv_width), 1, false);
        op_buf all = op_alloc((size_t)(N * width) * qie_dtype_size(t), false),
               some = op_alloc((size_t)(N * width) * qie_dtype_size(t), false);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++) {
            qie_compute *c = op_compute("cpu", (qie_cpu_level)level, 2);
            qie_attention_args a = {.q = qie_mat_make(q.data, t, N, width),
                                    .k = qie_mat_make(k.data, t, N, kv_width),
                                    .v = qie_mat_make(v.data, t, N, kv_width),
                                    .n_heads = heads,
                                    .n_kv_heads = KV,
                                    .head_dim = d,
                                    .scale = 0.088f,
                                    .causal = true,
                                    .dst = qie_mat_make(all.data, t, N, width)};
            c->ops.attention(c, &a);
            const qie_mat queries = a.q, want = a.dst;
            for (size_t j = 0; j < sizeof counts / sizeof *counts; j++) {
                int64_t n = counts[j];
                a.q = qie_mat_rows(queries, N - n, n);
                a.dst = qie_mat_make(some.data, t, n, width);
                c->ops.attention(c, &a);
                if (memcmp(some.data, qie_mat_rows(want, N - n, n).data,
                           (size_t)(n * width) * qie_dtype_size(t)) != 0)
                    QTEST_FAIL("level %s %s: the last %lld queries alone differ",
                               qie_cpu_level_name((qie_cpu_level)level), op_dtype(t), (long long)n);
            }
            qie_compute_destroy(c);
        }
        op_free(&q), op_free(&k), op_free(&v), op_free(&all), op_free(&some);
    }
}

QTEST(test_attention_causal_rows_do_not_depend_on_those_before) {
    last_queries_alone(4, 128);
    last_queries_alone(48, 16); /* heads enough for tasks of 128, 256 and 512 queries */
}

/* Heads enough for tasks of more than 128 queries. */
QTEST(test_attention_large_tasks_match_reference) {
    for (int i = 0; i < 2 && !qtest_failed; i++) {
        run_case(&(attention_case){520, 90, 64, 4, 16, 2, false, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){300, 301, 40, 8, 24, 0, false, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){590, 600, 33, 3, 8, 0, true, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){600, 600, 32, 32, 12, 0, false, 70, ACTS[i], ACTS[i], 1});
    }
}

QTEST(test_attention_causal_matches_reference) {
    for (int i = 0; i < 2 && !qtest_failed; i++) {
        run_case(&(attention_case){290, 290, 2, 1, 64, 0, true, 0, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){37, 137, 3, 1, 128, 0, true, 0, ACTS[i], QIE_F32, 1});
        run_case(&(attention_case){1, 300, 2, 2, 16, 0, true, 0, ACTS[i], QIE_F32, 1});
    }
}

QTEST(test_attention_segments_match_reference) {
    for (int i = 0; i < 2 && !qtest_failed; i++) {
        run_case(&(attention_case){300, 300, 2, 2, 80, 0, false, 64, ACTS[i], ACTS[i], 1});
        run_case(&(attention_case){300, 300, 1, 1, 16, 0, false, 13, ACTS[i], QIE_F32, 1});
        run_case(&(attention_case){300, 300, 1, 1, 20, 0, false, 200, ACTS[i], QIE_F32, 1});
    }
}

QTEST(test_attention_sharp_scores_match_reference) {
    for (int i = 0; i < 2 && !qtest_failed; i++)
        run_case(&(attention_case){70, 600, 1, 1, 64, 0, false, 0, ACTS[i], QIE_F32, 60});
}

QTEST(test_attention_random_cases_match_reference) {
    for (int i = 0; i < 20 && !qtest_failed; i++) {
        attention_case p = {
            .nq = 1 + op_u32() % 60, .nk = 1 + op_u32() % 90, .kv_heads = 1 + (int)(op_u32() % 2)};
        p.heads = p.kv_heads * (1 + (int)(op_u32() % 3)), p.d = 1 + (int)(op_u32() % 100),
        p.pad = (int)(op_u32() % 3);
        p.causal = p.nq <= p.nk && op_u32() % 2, p.t = ACTS[op_u32() & 1],
        p.dst = ACTS[op_u32() & 1], p.spread = 1;
        run_case(&p);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
