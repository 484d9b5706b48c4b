/* linear: every level and type against plain C, odd shapes, epilogues, threads. */
#include "op_test.h"

typedef struct linear_case {
    int64_t m, n, k, ldx, ldd, split;
    qie_dtype x, w, dst, bias; /* bias: QIE_DTYPE_COUNT = none */
    qie_act act;
    qie_store store;
    float scale; /* of x */
} linear_case;

static bool odd_weights; /* at an odd address, as in a file */

/* Float arithmetic: rounding of sums up to 4096 long. bf16 results: a sum that falls on the other
 * side of a rounding boundary moves by 2^-8, rarely. bf16 products of weights that were not bf16:
 * their rounding. */
static double bound_of(const linear_case *p, int level) {
    if (level > (int)qie_cpu_level_hardware()) /* oneDNN: bf16 products wherever x is bf16 */
        level = QIE_CPU_AVX512BF16;
    bool native = p->x == QIE_BF16 && level >= (int)QIE_CPU_AVX512BF16;
    if (native && p->w != QIE_BF16)
        return 4e-5;
    return p->dst == QIE_BF16 ? 1e-6 : 1e-12;
}

static void run_case(const linear_case *p) {
    size_t nx = (size_t)((p->m - 1) * p->ldx + p->k), nw = (size_t)(p->n * p->k);
    size_t nd = (size_t)((p->m - 1) * p->ldd + p->n);
    for (int edge = 0; edge < 2; edge++) {
        op_buf x = op_random(p->x, nx, p->scale, edge),
               w = op_alloc(nw * qie_dtype_size(p->w) + odd_weights, edge);
        unsigned char *weights = w.data + (edge && odd_weights);
        op_fill(weights, p->w, nw, 0.7f, 0);
        op_buf bias = {0}, dst = op_random(p->dst, nd, 1, edge);
        op_buf g0 = op_random(QIE_F32, (size_t)p->n, 1, edge),
               g1 = op_random(QIE_F32, (size_t)p->n, 1, edge);
        if (p->bias != QIE_DTYPE_COUNT)
            bias = op_random(p->bias, (size_t)p->n, 1, edge);
        qie_linear_args a = {.x = {x.data, p->x, p->m, p->k, p->ldx},
                             .w = {weights, p->w, p->n, p->k},
                             .bias = {bias.data, p->bias, p->n},
                             .act = p->act,
                             .store = p->store,
                             .gate = {(float *)(void *)g0.data, (float *)(void *)g1.data},
                             .split = p->split};
        op_buf want = op_copy(&dst, edge);
        qie_compute *ref = op_compute("ref", QIE_CPU_REF, 2);
        a.dst = (qie_mat){want.data, p->dst, p->m, p->n, p->ldd};
        ref->ops.linear(ref, &a);
        qie_compute_destroy(ref);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware() + 1; level++) {
            bool onednn = level > (int)qie_cpu_level_hardware(); /* the last round */
            op_buf first = {0};
            for (int threads = 1; threads <= 3; threads++) {
                op_buf got = op_copy(&dst, edge);
                qie_compute *c =
                    op_compute(onednn ? "onednn" : "cpu", (qie_cpu_level)level, threads);
                a.dst = (qie_mat){got.data, p->dst, p->m, p->n, p->ldd};
                c->ops.linear(c, &a);
                qie_compute_destroy(c);
                double nmse = op_nmse(got.data, want.data, p->dst, nd);
                if (!(nmse <= bound_of(p, level)))
                    QTEST_FAIL("level %s m %lld n %lld k %lld x %s w %s dst %s act %d store %d "
                               "edge %d: NMSE %.3g",
                               onednn ? "onednn" : qie_cpu_level_name((qie_cpu_level)level),
                               (long long)p->m, (long long)p->n, (long long)p->k, op_dtype(p->x),
                               op_dtype(p->w), op_dtype(p->dst), (int)p->act, (int)p->store, edge,
                               nmse);
                if (threads == 1)
                    first = got;
                else {
                    bool same = !memcmp(first.data, got.data, got.bytes);
                    op_free(&got);
                    if (!same)
                        QTEST_FAIL("level %s m %lld n %lld k %lld: %d threads differ from 1",
                                   onednn ? "onednn" : qie_cpu_level_name((qie_cpu_level)level),
                                   (long long)p->m, (long long)p->n, (long long)p->k, threads);
                }
            }
            op_free(&first);
        }
        op_free(&x), op_free(&w), op_free(&bias), op_free(&dst), op_free(&g0), op_free(&g1),
            op_free(&want);
    }
}

static const qie_dtype ACTS[] = {QIE_F32, QIE_BF16}, WEIGHTS[] = {QIE_F32, QIE_BF16, QIE_F16};

QTEST(test_linear_types_match_reference) {
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(linear_case){37, 70, 131, 131, 70, 0, ACTS[i & 1], WEIGHTS[i / 4],
                                ACTS[i / 2 & 1], WEIGHTS[i % 3], QIE_ACT_NONE, QIE_STORE_SET, 1});
}

QTEST(test_linear_small_m_types_match_reference) {
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(linear_case){1 + i % 8, 131, 99, 101, 140, 0, ACTS[i & 1], WEIGHTS[i / 4],
                                ACTS[i / 2 & 1], WEIGHTS[i % 3], QIE_ACT_NONE, QIE_STORE_SET, 1});
}

QTEST(test_linear_epilogues_match_reference) {
    for (int act = 0; act < 4; act++)
        for (int store = 0; store < 4 && !qtest_failed; store++) {
            run_case(&(linear_case){21, 45, 64, 70, 51, 9, ACTS[store & 1], QIE_BF16, QIE_F32,
                                    QIE_BF16, (qie_act)act, (qie_store)store, 1});
            run_case(&(linear_case){3, 45, 64, 70, 51, 2, QIE_F32, QIE_BF16, ACTS[store & 1],
                                    QIE_DTYPE_COUNT, (qie_act)act, (qie_store)store, 1});
        }
}

QTEST(test_linear_odd_shapes_match_reference) {
    for (int i = 0; i < 60 && !qtest_failed; i++) {
        linear_case p = {.m = 1 + op_u32() % 40, .n = 1 + op_u32() % 150, .k = 1 + op_u32() % 90};
        if (i % 10 == 9)
            p.k += 1000;
        p.ldx = p.k + op_u32() % 4;
        p.ldd = p.n + op_u32() % 4;
        p.x = ACTS[op_u32() & 1], p.w = WEIGHTS[op_u32() % 3], p.dst = ACTS[op_u32() & 1];
        p.bias = i & 1 ? QIE_DTYPE_COUNT : WEIGHTS[op_u32() % 3];
        p.scale = 1;
        run_case(&p);
    }
}

QTEST(test_linear_weights_at_odd_addresses_match_reference) {
    odd_weights = true;
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(linear_case){.m = i & 1 ? 3 : 20,
                                .n = 37,
                                .k = 75,
                                .ldx = 75,
                                .ldd = 37,
                                .x = ACTS[i / 2 & 1],
                                .w = WEIGHTS[i / 4],
                                .dst = QIE_F32,
                                .bias = QIE_DTYPE_COUNT,
                                .scale = 1});
    odd_weights = false;
}

QTEST(test_linear_many_tasks_match_reference) {
    run_case(&(linear_case){2100, 200, 40, 40, 200, 0, QIE_F32, QIE_BF16, QIE_F32, QIE_F32,
                            QIE_ACT_NONE, QIE_STORE_SET, 1});
    run_case(&(linear_case){300, 260, 1100, 1100, 260, 150, QIE_BF16, QIE_BF16, QIE_F32, QIE_BF16,
                            QIE_ACT_NONE, QIE_STORE_GATED_ADD, 1});
}

/* With as_many a row has the same bits alone, among a few and among many. */
QTEST(test_linear_as_many_rows_do_not_depend_on_their_number) {
    enum { M = 150, N = 77, K = 700 };
    for (int i = 0; i < 12 && !qtest_failed; i++) {
        qie_dtype t = ACTS[i & 1], wt = WEIGHTS[i / 4], dt = ACTS[i / 2 & 1];
        op_buf x = op_random(t, M * K, 1, false), w = op_random(wt, N * K, 1, false);
        op_buf all = op_alloc(M * N * qie_dtype_size(dt), false),
               some = op_alloc(M * N * qie_dtype_size(dt), false);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++) {
            qie_compute *c = op_compute("cpu", (qie_cpu_level)level, 2);
            qie_linear_args a = {.x = qie_mat_make(x.data, t, M, K),
                                 .w = {w.data, wt, N, K},
                                 .split = M,
                                 .as_many = true,
                                 .dst = qie_mat_make(all.data, dt, M, N)};
            ASSERT(c->rows_alone);
            c->ops.linear(c, &a);
            const qie_mat rows = a.x, want = a.dst;
            static const int64_t counts[] = {1, 2, 5, 8, 9, 15, 29, 130};
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
                int64_t n = counts[k], from = M - n;
                a.x = qie_mat_rows(rows, from, n);
                a.dst = qie_mat_make(some.data, dt, n, N);
                c->ops.linear(c, &a);
                if (memcmp(some.data, qie_mat_rows(want, from, n).data,
                           (size_t)n * N * qie_dtype_size(dt)) != 0)
                    QTEST_FAIL("level %s x %s w %s: the last %lld rows alone differ",
                               qie_cpu_level_name((qie_cpu_level)level), op_dtype(t), op_dtype(wt),
                               (long long)n);
            }
            qie_compute_destroy(c);
        }
        op_free(&x), op_free(&w), op_free(&all), op_free(&some);
    }
}

QTEST(test_linear_extreme_values_match_reference) {
    const float scales[] = {0, 1e-30f, 1e4f, 1e18f};
    for (int i = 0; i < 4 && !qtest_failed; i++)
        for (int act = 0; act < 4; act++)
            run_case(&(linear_case){16, 40, 64, 64, 40, 0, QIE_F32, QIE_F32, QIE_F32,
                                    QIE_DTYPE_COUNT, (qie_act)act, QIE_STORE_SET, scales[i]});
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
