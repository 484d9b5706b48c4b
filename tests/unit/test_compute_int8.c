/* linear in 8-bit integers: every level gives the bits of plain C, whatever the number of threads.
 */
#include "random_blocks.h"

typedef struct int8_case {
    int64_t m, n, k, ldx, ldd;
    qie_dtype x, w, dst;
    float x_scale;
    bool bias, gated, blocks;
} int8_case;

static const qie_dtype WEIGHTS[] = {QIE_F32, QIE_BF16, QIE_F16, QIE_I8};

static op_buf weights(qie_dtype t, int64_t rows, int64_t k, bool edge) {
    size_t n = (size_t)(rows * k);
    if (t > QIE_I8)
        return random_weights(t, rows, k, edge);
    if (t != QIE_I8)
        return op_random(t, n, 0.7f, edge);
    op_buf b = op_alloc(n, edge);
    for (size_t i = 0; i < n; i++)
        b.data[i] = (unsigned char)op_u32(); /* -128 too */
    return b;
}

static qie_compute *compute(const char *name, int level, int threads) {
    qie_compute_limits limits = OP_LIMITS;
    qie_compute *c = NULL;
    limits.max_int8_k = 4096;
    if (qie_compute_create_level(name, (qie_cpu_level)level, threads, &limits, &c, NULL) != QIE_OK)
        abort();
    if (c->scratch)
        memset(c->scratch, 0xff, c->scratch_bytes); /* NaN: nothing is read before it is written */
    return c;
}

static void run_case(const int8_case *p) {
    size_t nx = (size_t)((p->m - 1) * p->ldx + p->k), nd = (size_t)((p->m - 1) * p->ldd + p->n);
    for (int edge = 0; edge < 2; edge++) {
        op_buf x = op_random(p->x, nx, p->x_scale, edge);
        op_buf w = weights(p->w, p->n, p->k, edge);
        op_buf scale = op_random(QIE_F32, (size_t)p->n, 0.1f, edge);
        op_buf bias = op_random(QIE_BF16, (size_t)p->n, 1, edge);
        op_buf gate = op_random(QIE_F32, (size_t)p->n, 1, edge);
        op_buf dst = op_random(p->dst, nd, 1, edge), want = op_copy(&dst, edge);
        const float *gates = (const float *)(const void *)gate.data;
        qie_linear_args a = {.x = {x.data, p->x, p->m, p->k, p->ldx},
                             .w = {.data = w.data, .dtype = p->w, .n = p->n, .k = p->k},
                             .store = p->gated ? QIE_STORE_GATED_ADD : QIE_STORE_SET,
                             .gate = {gates, gates},
                             .split = p->m / 2,
                             .int8 = !p->blocks,
                             .int8_blocks = p->blocks};
        if (p->bias)
            a.bias = (qie_vec){bias.data, QIE_BF16, p->n};
        if (p->w == QIE_I8 || p->w == QIE_F8_E4M3 || p->w == QIE_F8_E5M2) {
            a.w.scale = (const float *)(const void *)scale.data;
            a.w.n_scale = edge ? 1 : p->n;
        }
        a.dst = (qie_mat){want.data, p->dst, p->m, p->n, p->ldd};
        qie_compute *ref = compute("ref", QIE_CPU_REF, 2);
        ref->ops.linear(ref, &a);
        qie_compute_destroy(ref);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++)
            for (int threads = 1; threads <= 3; threads++) {
                op_buf got = op_copy(&dst, edge);
                qie_compute *c = compute("cpu", level, threads);
                a.dst.data = got.data;
                c->ops.linear(c, &a);
                qie_compute_destroy(c);
                /* gate x value + old is rounded twice in plain C, too: -ffp-contract=off */
                size_t wrong = 0, at = 0, size = qie_dtype_size(p->dst);
                for (size_t i = 0; i < nd; i++) {
                    float v = op_get(got.data, p->dst, i), r = op_get(want.data, p->dst, i);
                    if (memcmp(got.data + i * size, want.data + i * size, size) &&
                        !(isnan(v) && isnan(r)) && !wrong++)
                        at = i;
                }
                if (wrong)
                    QTEST_FAIL("level %s m %lld n %lld k %lld x %s w %s dst %s %s threads %d: %zu "
                               "differ, at %zu %.9g for %.9g",
                               qie_cpu_level_name((qie_cpu_level)level), (long long)p->m,
                               (long long)p->n, (long long)p->k, op_dtype(p->x), op_dtype(p->w),
                               op_dtype(p->dst), p->blocks ? "blocks" : "", threads, wrong, at,
                               (double)op_get(got.data, p->dst, at),
                               (double)op_get(want.data, p->dst, at));
                op_free(&got);
            }
        op_free(&x), op_free(&w), op_free(&scale), op_free(&bias), op_free(&gate), op_free(&dst),
            op_free(&want);
    }
}

static const qie_dtype ACTS[] = {QIE_F32, QIE_BF16};

QTEST(test_int8_types_equal_plain_c) {
    for (int i = 0; i < 16 && !qtest_failed; i++)
        run_case(&(int8_case){37, 70, 131, 131, 70, ACTS[i & 1], WEIGHTS[i / 4], ACTS[i / 2 & 1], 1,
                              i & 1, i & 2, false});
}

QTEST(test_int8_blocks_of_k_equal_plain_c) {
    const int64_t k[] = {1, 2, 3, 63, 64, 65, 1023, 1024, 1025, 1087, 2048, 3001};
    for (size_t i = 0; i < sizeof k / sizeof *k && !qtest_failed; i++)
        run_case(&(int8_case){17, 35, k[i], k[i], 35, ACTS[i & 1], WEIGHTS[i & 3], QIE_F32, 1,
                              false, false, false});
}

/* 8-bit floats and blocks of GGUF, rows of more than one block of k. */
QTEST(test_int8_quantised_weights_equal_plain_c) {
    for (int t = QIE_F8_E4M3; t < QIE_DTYPE_COUNT && !qtest_failed; t++) {
        int block = qie_dtype_block_elements((qie_dtype)t);
        int64_t k = block == 1 ? 1031 : block == 32 ? 1056 : 1280;
        run_case(&(int8_case){37, 70, k, k, 70, ACTS[t & 1], (qie_dtype)t, ACTS[t / 2 & 1], 1, true,
                              t % 3 == 0, false});
    }
}

static const qie_dtype BLOCKS[] = {QIE_Q4_0, QIE_Q5_0, QIE_Q8_0, QIE_IQ4_NL, QIE_IQ4_XS};
enum { N_BLOCKS = sizeof BLOCKS / sizeof *BLOCKS };

/* Integers as they are stored; part of a block of k, whole ones, some and a part. */
QTEST(test_int8_stored_blocks_equal_plain_c) {
    for (int i = 0; i < 4 * N_BLOCKS && !qtest_failed; i++) {
        int8_case p = {
            .w = BLOCKS[i / 4], .x = ACTS[i & 1], .dst = ACTS[i / 2 & 1], .blocks = true};
        p.k = qie_dtype_block_elements(p.w) * (int64_t)(1 + op_u32() % 4);
        p.k += i % 4 * 1024 / 2, p.ldx = p.k + i % 3;
        p.m = QIE_INT8_MIN_ROWS + op_u32() % 40, p.n = 1 + op_u32() % 150, p.ldd = p.n + 1;
        p.x_scale = 1, p.bias = i & 1, p.gated = i & 2;
        run_case(&p);
    }
    run_case(&(int8_case){2100, 140, 64, 64, 140, QIE_BF16, QIE_Q8_0, QIE_F32, 1, 0, 0, true});
    run_case(&(int8_case){16, 40, 64, 64, 40, QIE_F32, QIE_Q8_0, QIE_F32, INFINITY, 0, 0, true});
    run_case(&(int8_case){16, 40, 64, 64, 40, QIE_F32, QIE_Q4_0, QIE_F32, 1e-38f, 0, 0, true});
}

/* A type that is no such one is not touched by int8_blocks, and int8 does not undo it. */
QTEST(test_int8_blocks_choose_by_type) {
    for (int t = 0; t < QIE_DTYPE_COUNT; t++) {
        qie_linear_args a = {.x = {.rows = QIE_INT8_MIN_ROWS}, .w = {.dtype = (qie_dtype)t}};
        int group = qie_blocks_are_int8((qie_dtype)t) ? QIE_INT8_GROUP : 0;
        ASSERT_INT(qie_linear_int8_group(&a), 0);
        a.int8_blocks = true;
        ASSERT_INT(qie_linear_int8_group(&a), group);
        a.int8 = true;
        ASSERT_INT(qie_linear_int8_group(&a), group ? group : QIE_INT8_BLOCK);
        a.x.rows--;
        ASSERT_INT(qie_linear_int8_group(&a), 0);
    }
}

/* Low-rank terms go before the integers' sums. */
QTEST(test_int8_with_lowrank_is_the_sum_of_both) {
    enum { M = 40, N = 150, K = 1056, R = 5 };
    for (int i = 0; i < 4 && !qtest_failed; i++) {
        op_buf x = op_random(QIE_BF16, M * K, 1, 0), down = op_random(QIE_F32, R * K, 0.1f, 0);
        op_buf up = op_random(QIE_F32, N * R, 1, 0), w = weights(QIE_Q8_0, N, K, false);
        static float room[M * R], plain[M * N], both[M * N], thin[M * N], zero[N * K];
        qie_lowrank term = {
            {down.data, QIE_F32, R, K, NULL, 0}, {up.data, QIE_F32, N, R, NULL, 0}, 0.5f};
        qie_linear_args a = {.x = qie_mat_make(x.data, QIE_BF16, M, K),
                             .w = {.data = w.data, .dtype = QIE_Q8_0, .n = N, .k = K},
                             .dst = qie_mat_make(plain, QIE_F32, M, N),
                             .int8 = i & 1,
                             .int8_blocks = !(i & 1),
                             .lowrank_room = room};
        qie_compute *c = compute(i & 2 ? "ref" : "cpu", qie_cpu_level_hardware(), 2);
        c->ops.linear(c, &a);
        a.lowrank = &term, a.n_lowrank = 1, a.dst.data = both;
        c->ops.linear(c, &a);
        a.int8 = a.int8_blocks = false, a.w.data = zero, a.w.dtype = QIE_F32, a.dst.data = thin;
        c->ops.linear(c, &a);
        qie_compute_destroy(c);
        for (int k = 0; k < M * N; k++)
            plain[k] += thin[k];
        double nmse = op_nmse(both, plain, QIE_F32, M * N);
        if (!(nmse < 1e-12))
            QTEST_FAIL("case %d: NMSE %.3g", i, nmse);
        op_free(&x), op_free(&w), op_free(&down), op_free(&up);
    }
}

QTEST(test_int8_odd_shapes_equal_plain_c) {
    for (int i = 0; i < 40 && !qtest_failed; i++) {
        int8_case p = {.m = QIE_INT8_MIN_ROWS + op_u32() % 40, .n = 1 + op_u32() % 150};
        p.k = 1 + op_u32() % 90 + (i % 8 == 7 ? 1000 : 0);
        p.ldx = p.k + op_u32() % 4, p.ldd = p.n + op_u32() % 4;
        p.x = ACTS[op_u32() & 1], p.w = WEIGHTS[op_u32() & 3], p.dst = ACTS[op_u32() & 1];
        p.x_scale = 1, p.bias = i & 1;
        run_case(&p);
    }
}

QTEST(test_int8_many_rows_equal_plain_c) {
    run_case(&(int8_case){2100, 140, 40, 40, 140, QIE_F32, QIE_BF16, QIE_F32, 1, 0, 0, false});
    run_case(
        &(int8_case){600, 20, 1100, 1100, 20, QIE_BF16, QIE_I8, QIE_F32, 1, true, true, false});
}

QTEST(test_int8_extreme_values_equal_plain_c) {
    const float scales[] = {0, 1e-38f, 1e-30f, 1e4f, 1e30f, INFINITY};
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(int8_case){16, 40, 64, 64, 40, QIE_F32, WEIGHTS[i % 4], QIE_F32, scales[i / 2],
                              false, false, false});
}

/* The largest products that there are, of one sign: sums near the edge of what a pair can hold. */
QTEST(test_int8_sums_of_extremes_are_exact) {
    enum { M = 20, N = 40, K = 1024 };
    float x[M * K], got[M * N], one = 1;
    static signed char w[N * K];
    for (int i = 0; i < M * K; i++)
        x[i] = i / K & 1 ? -3.0f : 3.0f;
    for (int i = 0; i < N * K; i++)
        w[i] = i / K & 1 ? 127 : -128;
    qie_linear_args a = {
        .x = qie_mat_make(x, QIE_F32, M, K),
        .w = {.data = w, .dtype = QIE_I8, .n = N, .k = K, .scale = &one, .n_scale = 1},
        .dst = qie_mat_make(got, QIE_F32, M, N),
        .int8 = true};
    for (int level = QIE_CPU_REF; level <= (int)qie_cpu_level_hardware(); level++) {
        qie_compute *c = compute("cpu", level, 1);
        c->ops.linear(c, &a);
        qie_compute_destroy(c);
        for (int r = 0; r < M; r++)
            for (int n = 0; n < N; n++) {
                int sum = K * 127 * (r & 1 ? -1 : 1) * (n & 1 ? 127 : -128);
                if (got[r * N + n] != (float)sum * (3.0f / 127.0f * one))
                    QTEST_FAIL("level %d row %d column %d: %g", level, r, n,
                               (double)got[r * N + n]);
            }
    }
}

/* What integers cost: [32, 2048] x [64, 2048]^T by the plain C of float products, then with
 * `integers` set. */
static double cost_of_integers(const op_buf *x, const op_buf *w, qie_dtype w_type,
                               void (*integers)(qie_linear_args *)) {
    enum { M = 32, N = 64, K = 2048 };
    static float exact[M * N], got[M * N];
    qie_linear_args a = {.x = qie_mat_make(x->data, QIE_F32, M, K),
                         .w = {.data = w->data, .dtype = w_type, .n = N, .k = K},
                         .dst = qie_mat_make(exact, QIE_F32, M, N)};
    qie_compute *c = compute("ref", QIE_CPU_REF, 1);
    c->ops.linear(c, &a);
    integers(&a);
    a.dst.data = got;
    c->ops.linear(c, &a);
    qie_compute_destroy(c);
    return op_nmse(got, exact, QIE_F32, M * N);
}
static void stored(qie_linear_args *a) {
    a->int8_blocks = true;
}
static void made(qie_linear_args *a) {
    a->int8 = true;
}

/* Stored integers cost what the rounding of x does: a sixth of what rounding both in long blocks
 * does, and an outlier of x costs its own group only. */
QTEST(test_int8_blocks_error_is_that_of_x) {
    for (int i = 0; i < 2 * N_BLOCKS && !qtest_failed; i++) {
        op_buf x = op_random(QIE_F32, 32 * 2048, 1, 0), w = weights(BLOCKS[i / 2], 64, 2048, 0);
        for (int r = 0; r < 32 && i & 1; r++)
            op_put(x.data, QIE_F32, (size_t)(r * 2048 + r), 1000);
        double nmse = cost_of_integers(&x, &w, BLOCKS[i / 2], stored);
        if (!(nmse > 1e-7 && nmse < 5e-5))
            QTEST_FAIL("%s outlier %d: NMSE %.3g", op_dtype(BLOCKS[i / 2]), i & 1, nmse);
        op_free(&x), op_free(&w);
    }
}

/* About 1/15000 of the signal for normal values, half of it from either side. */
QTEST(test_int8_error_is_that_of_eight_bits) {
    op_buf x = op_random(QIE_F32, 32 * 2048, 1, 0), w = op_random(QIE_F32, 64 * 2048, 1, 0);
    double nmse = cost_of_integers(&x, &w, QIE_F32, made);
    if (!(nmse > 1e-6 && nmse < 2e-4))
        QTEST_FAIL("NMSE %.3g", nmse);
    op_free(&x), op_free(&w);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
