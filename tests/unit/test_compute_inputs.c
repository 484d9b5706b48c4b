/* Sums of squares of the inputs of linear layers: of those that are asked about, over all calls. */
#include "op_test.h"

#include "compute/op_inputs.h"

enum { M = 5, N = 7, K = 600 };

static float x[M * (K + 3)], w[2][N * K], y[2][M * N];

QTEST(test_inputs_are_summed_by_column) {
    for (int level = 0; level < 2; level++) {
        qie_op_inputs *p;
        qie_error e;
        qie_compute *c = op_compute(level ? "cpu" : "ref", qie_cpu_level_hardware(), 2);
        for (int i = 0; i < M * (K + 3); i++)
            x[i] = (float)(i % 17) - 8; /* squares and their sums are exact */
        for (int i = 0; i < N * K; i++)
            w[0][i] = w[1][i] = (float)(i % 5) - 2;
        ASSERT_INT(qie_op_inputs_create(1, &p, &e), QIE_OK);
        ASSERT_INT(qie_op_inputs_add(p, w[0], "first", K, &e), QIE_OK);
        ASSERT_INT(qie_op_inputs_add(p, w[1], "no room", K, &e), QIE_E_NO_MEMORY);
        qie_op_inputs_begin(c, p);
        for (int which = 0; which < 2; which++)
            for (int times = 0; times < 2; times++) {
                qie_linear_args a = {.x = {x, QIE_F32, times ? 2 : M, K, K + 3},
                                     .w = {.data = w[which], .dtype = QIE_F32, .n = N, .k = K},
                                     .dst = qie_mat_make(y[which], QIE_F32, times ? 2 : M, N)};
                c->ops.linear(c, &a);
            }
        ASSERT(!memcmp(y[0], y[1], sizeof y[0]));
        ASSERT_INT(p->list[0].rows, M + 2);
        for (int k = 0; k < K; k++) {
            double want = 0;
            for (int r = 0; r < M + 2; r++) {
                double v = (double)x[(r % M) * (K + 3) + k];
                want += v * v;
            }
            if (fabs(p->list[0].sums[k] - want) > 0)
                QTEST_FAIL("column %d: %g, expected %g", k, p->list[0].sums[k], want);
        }
        qie_compute_destroy(c);
        qie_op_inputs_destroy(p);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
