/* linear in 8-bit integers: every level gives the bits of plain C, whatever the number of threads.
 */
#include "random_blocks.h"

typedef struct int8_case {
    int64_t m, n, k, ldx, ldd;
    qie_dtype x, w, dst;
    float x_scale;
    bool bias, gated;
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
                             .int8 = true};
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
                    QTEST_FAIL("level %s m %lld n %lld k %lld x %s w %s dst %s threads %d: %zu "
                               "differ, at %zu %.9g for %.9g",
                               qie_cpu_level_name((qie_cpu_level)level), (long long)p->m,
                               (long long)p->n, (long long)p->k, op_dtype(p->x), op_dtype(p->w),
                               op_dtype(p->dst), threads, wrong, at,
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
                              i & 1, i & 2});
}

QTEST(test_int8_blocks_of_k_equal_plain_c) {
    const int64_t k[] = {1, 2, 3, 63, 64, 65, 1023, 1024, 1025, 1087, 2048, 3001};
    for (size_t i = 0; i < sizeof k / sizeof *k && !qtest_failed; i++)
        run_case(&(int8_case){17, 35, k[i], k[i], 35, ACTS[i & 1], WEIGHTS[i & 3], QIE_F32, 1,
                              false, false});
}

/* 8-bit floats and blocks of GGUF, rows of more than one block of k. */
QTEST(test_int8_quantised_weights_equal_plain_c) {
    for (int t = QIE_F8_E4M3; t < QIE_DTYPE_COUNT && !qtest_failed; t++) {
        int block = qie_dtype_block_elements((qie_dtype)t);
        int64_t k = block == 1 ? 1031 : block == 32 ? 1056 : 1280;
        run_case(&(int8_case){37, 70, k, k, 70, ACTS[t & 1], (qie_dtype)t, ACTS[t / 2 & 1], 1, true,
                              t % 3 == 0});
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
    run_case(&(int8_case){2100, 140, 40, 40, 140, QIE_F32, QIE_BF16, QIE_F32, 1, false, false});
    run_case(&(int8_case){600, 20, 1100, 1100, 20, QIE_BF16, QIE_I8, QIE_F32, 1, true, true});
}

QTEST(test_int8_extreme_values_equal_plain_c) {
    const float scales[] = {0, 1e-38f, 1e-30f, 1e4f, 1e30f, INFINITY};
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(int8_case){16, 40, 64, 64, 40, QIE_F32, WEIGHTS[i % 4], QIE_F32, scales[i / 2],
                              false, false});
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

/* What it costs: about 1/15000 of the signal for normal values, half of it from either side. */
QTEST(test_int8_error_is_that_of_eight_bits) {
    enum { M = 32, N = 64, K = 2048 };
    op_buf x = op_random(QIE_F32, M * K, 1, 0), w = op_random(QIE_F32, N * K, 1, 0);
    static float exact[M * N], got[M * N];
    qie_linear_args a = {.x = qie_mat_make(x.data, QIE_F32, M, K),
                         .w = {.data = w.data, .dtype = QIE_F32, .n = N, .k = K},
                         .dst = qie_mat_make(exact, QIE_F32, M, N)};
    qie_compute *c = compute("ref", QIE_CPU_REF, 1);
    c->ops.linear(c, &a);
    a.int8 = true;
    a.dst.data = got;
    c->ops.linear(c, &a);
    qie_compute_destroy(c);
    double nmse = op_nmse(got, exact, QIE_F32, M * N);
    if (!(nmse > 1e-6 && nmse < 2e-4))
        QTEST_FAIL("NMSE %.3g", nmse);
    op_free(&x), op_free(&w);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
