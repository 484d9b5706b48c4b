/* conv2d: every level and type against plain C. */
#include "op_test.h"

typedef struct conv_case {
    int h, w, in, out, kernel, kt, stride;
    bool upsample, residual, in_place;
    qie_dtype x, wt, dst;
} conv_case;

/* As for linear: sums up to 3456 long in float; bf16 results fall on the other side now and then;
 * bf16 products of weights that were not bf16 carry their rounding. */
static double bound_of(const conv_case *p, qie_cpu_level level) {
    bool native = p->x == QIE_BF16 && level >= (int)QIE_CPU_AVX512BF16;
    if (native && p->wt != QIE_BF16)
        return 4e-5;
    return p->dst == QIE_BF16 ? 1e-6 : 1e-12;
}

static void run_case(const conv_case *p) {
    int up = p->upsample ? 2 : 1, ho = p->h * up, wo = p->w * up;
    if (p->stride == 2) {
        ho /= 2;
        wo /= 2;
    }
    size_t nx = (size_t)p->h * (size_t)p->w * (size_t)p->in,
           nd = (size_t)ho * (size_t)wo * (size_t)p->out;
    size_t nw = (size_t)p->out * (size_t)p->in * (size_t)(p->kt * p->kernel * p->kernel);
    for (int edge = 0; edge < 2; edge++) {
        op_buf x = op_random(p->x, nx, 1, edge), w = op_random(p->wt, nw, 0.5f, edge);
        op_buf bias = op_random(p->wt, (size_t)p->out, 1, edge),
               res = op_random(p->dst, nd, 1, edge);
        qie_conv2d_args a = {.x = {x.data, p->x, p->h, p->w, p->in},
                             .w = {w.data, p->wt, p->out, p->in, p->kt, p->kernel, p->kernel},
                             .bias = {bias.data, p->wt, p->out},
                             .stride = p->stride,
                             .upsample = p->upsample};
        op_buf want = op_copy(&res, edge);
        a.dst = (qie_fmap){want.data, p->dst, ho, wo, p->out};
        if (p->residual)
            a.residual = (qie_fmap){res.data, p->dst, ho, wo, p->out};
        qie_compute *ref = op_compute("ref", QIE_CPU_REF, 2);
        ref->ops.conv2d(ref, &a);
        qie_compute_destroy(ref);
        for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware() + 1; level++) {
            bool onednn = level > (int)qie_cpu_level_hardware(); /* the last round */
            op_buf first = {0};
            for (int threads = 1; threads <= 3; threads++) {
                op_buf got = op_copy(&res, edge);
                a.dst.data = got.data;
                if (p->residual && p->in_place)
                    a.residual.data = got.data;
                qie_compute *c =
                    op_compute(onednn ? "onednn" : "cpu", (qie_cpu_level)level, threads);
                c->ops.conv2d(c, &a);
                qie_compute_destroy(c);
                double nmse = op_nmse(got.data, want.data, p->dst, nd);
                if (!(nmse <= bound_of(p, level)))
                    QTEST_FAIL("level %s %dx%d %d->%d kernel %d kt %d stride %d up %d x %s w %s "
                               "dst %s: NMSE %.3g",
                               onednn ? "onednn" : qie_cpu_level_name((qie_cpu_level)level), p->h,
                               p->w, p->in, p->out, p->kernel, p->kt, p->stride, p->upsample,
                               op_dtype(p->x), op_dtype(p->wt), op_dtype(p->dst), nmse);
                if (threads == 1) {
                    first = got;
                } else {
                    bool same = !memcmp(first.data, got.data, got.bytes);
                    op_free(&got);
                    if (!same)
                        QTEST_FAIL("level %s %dx%d %d->%d: %d threads differ from 1",
                                   onednn ? "onednn" : qie_cpu_level_name((qie_cpu_level)level),
                                   p->h, p->w, p->in, p->out, threads);
                }
            }
            op_free(&first);
        }
        op_free(&x), op_free(&w), op_free(&bias), op_free(&res), op_free(&want);
    }
}

static const qie_dtype ACTS[] = {QIE_F32, QIE_BF16}, WEIGHTS[] = {QIE_F32, QIE_BF16, QIE_F16};

QTEST(test_conv2d_types_match_reference) {
    for (int i = 0; i < 12 && !qtest_failed; i++)
        run_case(&(conv_case){7, 9, 5, 37, 3, 1 + i % 3, 1, false, i & 1, i & 2, ACTS[i & 1],
                              WEIGHTS[i / 4], ACTS[i / 2 & 1]});
}

QTEST(test_conv2d_geometry_matches_reference) {
    for (int t = 0; t < 2; t++) {
        qie_dtype d = ACTS[t];
        run_case(&(conv_case){6, 5, 3, 12, 3, 1, 1, true, false, false, d, QIE_BF16, d});
        run_case(&(conv_case){8, 10, 16, 20, 3, 1, 2, false, false, false, d, QIE_BF16, d});
        run_case(&(conv_case){9, 7, 12, 16, 3, 1, 2, false, true, false, d, QIE_F32, d});
        run_case(&(conv_case){9, 7, 33, 65, 1, 1, 1, false, true, true, d, QIE_F16, d});
        run_case(&(conv_case){1, 1, 4, 3, 3, 3, 1, false, false, false, d, QIE_BF16, d});
        run_case(&(conv_case){1, 2, 3, 8, 3, 1, 1, true, true, true, d, QIE_BF16, d});
        if (qtest_failed)
            return;
    }
}

QTEST(test_conv2d_many_channels_match_reference) {
    run_case(&(conv_case){5, 6, 96, 200, 3, 3, 1, false, true, true, QIE_BF16, QIE_BF16, QIE_BF16});
    run_case(&(conv_case){4, 4, 384, 96, 3, 1, 1, true, false, false, QIE_BF16, QIE_BF16, QIE_F32});
    run_case(&(conv_case){4, 4, 384, 130, 3, 1, 1, false, false, false, QIE_F32, QIE_F32, QIE_F32});
    run_case(&(conv_case){40, 50, 12, 3, 3, 1, 1, false, false, false, QIE_F32, QIE_F32, QIE_F32});
}

/* Large enough for the form with fewer products: odd sides, ends within a vector, more input
 * channels than one block, few outputs, doubled maps. */
QTEST(test_conv2d_winograd_matches_reference) {
    for (int t = 0; t < 4 && !qtest_failed; t++) {
        qie_dtype x = ACTS[t & 1], d = ACTS[t / 2];
        run_case(&(conv_case){16, 18, 16, 16, 3, 3, 1, false, false, false, x, QIE_F32, d});
        run_case(&(conv_case){17, 9, 35, 3, 3, 1, 1, false, false, false, x, QIE_BF16, d});
        run_case(&(conv_case){8, 23, 96, 77, 3, 3, 1, false, true, true, x, QIE_BF16, d});
        run_case(&(conv_case){7, 9, 24, 40, 3, 1, 1, true, true, false, x, QIE_F16, d});
        run_case(&(conv_case){5, 13, 300, 20, 3, 1, 1, true, false, false, x, QIE_BF16, d});
        run_case(&(conv_case){9, 11, 270, 48, 3, 1, 1, false, true, true, x, QIE_F32, d});
        run_case(&(conv_case){1, 80, 20, 24, 3, 1, 1, false, false, false, x, QIE_BF16, d});
    }
}

QTEST(test_conv2d_random_cases_match_reference) {
    for (int i = 0; i < 30 && !qtest_failed; i++) {
        conv_case p = {.h = 1 + (int)(op_u32() % 9),
                       .w = 1 + (int)(op_u32() % 9),
                       .in = 1 + (int)(op_u32() % 40)};
        p.out = 1 + (int)(op_u32() % 70), p.kernel = op_u32() & 1 ? 3 : 1,
        p.kt = op_u32() & 1 ? 3 : 1;
        p.stride = p.kernel == 3 && p.h > 1 && p.w > 1 && op_u32() % 3 == 0 ? 2 : 1;
        p.upsample = p.stride == 1 && op_u32() % 3 == 0;
        p.residual = op_u32() & 1, p.in_place = op_u32() & 1;
        p.x = ACTS[op_u32() & 1], p.wt = WEIGHTS[op_u32() % 3], p.dst = ACTS[op_u32() & 1];
        run_case(&p);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
