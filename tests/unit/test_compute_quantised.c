/* linear and embed on quantised weights: every type, level and back end against plain C. */
#include "random_blocks.h"

static void run_linear(qie_dtype t, int64_t m, int64_t n, int64_t k, qie_dtype act, int n_scale,
                       bool edge) {
    op_buf w = random_weights(t, n, k, edge), x = op_random(act, (size_t)(m * k), 1, edge);
    op_buf scale = op_random(QIE_F32, (size_t)n, 0.1f, edge),
           want = op_alloc((size_t)(m * n) * 4, edge);
    qie_linear_args a = {.x = qie_mat_make(x.data, act, m, k),
                         .w = {w.data, t, n, k, n_scale ? (float *)(void *)scale.data : NULL,
                               n_scale > 1 ? n : n_scale},
                         .bias = {NULL, QIE_F32, 0},
                         .dst = qie_mat_make(want.data, QIE_F32, m, n)};
    qie_compute *c = op_compute("ref", QIE_CPU_REF, 2);
    c->ops.linear(c, &a);
    qie_compute_destroy(c);
    for (int level = QIE_CPU_AVX2; level <= (int)qie_cpu_level_hardware() + 1; level++) {
        bool onednn = level > (int)qie_cpu_level_hardware();
        op_buf got = op_alloc(want.bytes, edge);
        c = op_compute(onednn ? "onednn" : "cpu",
                       onednn ? qie_cpu_level_hardware() : (qie_cpu_level)level, 3);
        a.dst.data = got.data;
        c->ops.linear(c, &a);
        qie_compute_destroy(c);
        double nmse = op_nmse(got.data, want.data, QIE_F32, (size_t)(m * n));
        /* bf16 products where the processor or oneDNN has them: weights rounded to bf16. */
        double bound =
            act == QIE_BF16 && (onednn || level >= (int)QIE_CPU_AVX512BF16) ? 4e-5 : 1e-12;
        op_free(&got);
        if (!(nmse <= bound))
            QTEST_FAIL("%s %s m %lld n %lld k %lld x %s scales %d edge %d: NMSE %.3g",
                       onednn ? "onednn" : qie_cpu_level_name((qie_cpu_level)level), op_dtype(t),
                       (long long)m, (long long)n, (long long)k, op_dtype(act), n_scale, edge,
                       nmse);
    }
    op_free(&w), op_free(&x), op_free(&scale), op_free(&want);
}

QTEST(test_linear_quantised_types_match_reference) {
    for (int t = QIE_I8; t < QIE_DTYPE_COUNT && !qtest_failed; t++) {
        bool scaled = qie_dtype_block_elements((qie_dtype)t) == 1;
        int64_t k = scaled ? 777 : qie_dtype_block_elements((qie_dtype)t) == 32 ? 1056 : 1280;
        for (int i = 0; i < 4 && !qtest_failed; i++)
            run_linear((qie_dtype)t, i & 1 ? 3 + i : 19, 37, k, i & 2 ? QIE_BF16 : QIE_F32,
                       scaled ? i % 3 : 0, i & 1);
    }
}

QTEST(test_linear_quantised_many_tasks_match_reference) {
    run_linear(QIE_Q8_0, 530, 300, 544, QIE_BF16, 0, false);
    run_linear(QIE_Q4_K, 130, 270, 768, QIE_F32, 0, true);
}

QTEST(test_embed_quantised_rows_match_reference) {
    for (int t = QIE_I8; t < QIE_DTYPE_COUNT && !qtest_failed; t++) {
        enum { ROWS = 9, K = 1280 };
        bool scaled = qie_dtype_block_elements((qie_dtype)t) == 1;
        op_buf w = random_weights((qie_dtype)t, ROWS, K, true);
        float scale[ROWS];
        const int32_t ids[4] = {8, 0, 3, 8};
        for (int i = 0; i < ROWS; i++)
            scale[i] = 0.01f * (float)(i + 1);
        qie_wmat table = {w.data, (qie_dtype)t, ROWS, K, scaled ? scale : NULL, scaled ? ROWS : 0};
        op_buf got = op_alloc(4 * K * 4, false);
        qie_compute *c = op_compute("cpu", qie_cpu_level_hardware(), 2);
        c->ops.embed(c, table, ids, qie_mat_make(got.data, QIE_F32, 4, K));
        qie_compute_destroy(c);
        float row[K];
        for (int i = 0; i < 4 && !qtest_failed; i++) {
            qie_to_f32(row, w.data + (size_t)ids[i] * qie_dtype_row_bytes((qie_dtype)t, K),
                       (qie_dtype)t, K);
            for (int j = 0; j < K; j++)
                row[j] *= scaled ? scale[ids[i]] : 1.0f;
            if (memcmp(row, got.data + (size_t)i * sizeof row, sizeof row))
                QTEST_FAIL("%s: row %d differs", op_dtype((qie_dtype)t), (int)ids[i]);
        }
        op_free(&w), op_free(&got);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
