/* Row operations: norms, rotary embedding, conversions, guidance, against plain C at every level.
 */
#include "op_test.h"

static const qie_dtype ACTS[] = {QIE_F32, QIE_BF16}, WEIGHTS[] = {QIE_F32, QIE_BF16, QIE_F16};

/* What one subtest runs on a back end; the result is left in `out`. */
typedef struct rows_case {
    const char *what;
    int64_t rows, cols;
    qie_dtype out_type;
    double bound;
    op_buf *out;
    op_buf start; /* contents of out before */
    void (*run)(qie_compute *c, const struct rows_case *p);
    const void *args;
} rows_case;

static void check(rows_case *p) {
    op_buf want = op_copy(&p->start, false), *saved = p->out;
    qie_compute *ref = op_compute("ref", QIE_CPU_REF, 1);
    memcpy(saved->data, p->start.data, p->start.bytes);
    p->run(ref, p);
    qie_compute_destroy(ref);
    memcpy(want.data, saved->data, want.bytes);
    size_t n = want.bytes / qie_dtype_size(p->out_type);
    for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++) {
        op_buf first = {0};
        for (int threads = 1; threads <= 3; threads++) {
            memcpy(saved->data, p->start.data, p->start.bytes);
            qie_compute *c = op_compute("cpu", (qie_cpu_level)level, threads);
            p->run(c, p);
            qie_compute_destroy(c);
            double nmse = op_nmse(saved->data, want.data, p->out_type, n);
            if (!(nmse <= p->bound))
                QTEST_FAIL("%s level %s rows %lld cols %lld out %s: NMSE %.3g", p->what,
                           qie_cpu_level_name((qie_cpu_level)level), (long long)p->rows,
                           (long long)p->cols, op_dtype(p->out_type), nmse);
            if (threads == 1)
                first = op_copy(saved, false);
            else if (memcmp(first.data, saved->data, first.bytes))
                QTEST_FAIL("%s level %s rows %lld cols %lld: %d threads differ from 1", p->what,
                           qie_cpu_level_name((qie_cpu_level)level), (long long)p->rows,
                           (long long)p->cols, threads);
        }
        op_free(&first);
    }
    op_free(&want);
}

/* Rounding of a few float operations; a bf16 result moves by 2^-8 when it falls on the other side.
 */
static double bound_of(qie_dtype out) {
    return out == QIE_BF16 ? 1e-6 : 1e-12;
}

typedef struct rms_case {
    qie_mat x, dst;
    qie_vec w;
} rms_case;
static void run_rms(qie_compute *c, const rows_case *p) {
    const rms_case *a = p->args;
    c->ops.rms_norm(c, a->x, a->w, 1e-6f, a->dst);
}
QTEST(test_rms_norm_types_and_sizes_match_reference) {
    for (int i = 0; i < 40 && !qtest_failed; i++) {
        int64_t rows = 1 + op_u32() % 9, cols = 1 + op_u32() % 200, ldx = cols + op_u32() % 3,
                ldd = cols + op_u32() % 3;
        if (i % 8 == 7)
            rows = 700;
        qie_dtype x = ACTS[i & 1], d = ACTS[i / 2 & 1], w = WEIGHTS[i % 3];
        bool edge = op_u32() & 1;
        op_buf bx = op_random(x, (size_t)((rows - 1) * ldx + cols), i % 5 ? 1 : 1e-5f, edge);
        op_buf bw = op_random(w, (size_t)cols, 1, edge),
               bd = op_random(d, (size_t)((rows - 1) * ldd + cols), 1, edge);
        rms_case a = {{bx.data, x, rows, cols, ldx},
                      {bd.data, d, rows, cols, ldd},
                      {i % 4 ? bw.data : NULL, w, cols}};
        rows_case p = {"rms_norm",         rows,    cols, d, bound_of(d), &bd,
                       op_copy(&bd, edge), run_rms, &a};
        check(&p);
        op_free(&bx), op_free(&bw), op_free(&bd), op_free(&p.start);
    }
}

static void run_layer_norm(qie_compute *c, const rows_case *p) {
    c->ops.layer_norm(c, p->args);
}
QTEST(test_layer_norm_modulation_matches_reference) {
    for (int i = 0; i < 40 && !qtest_failed; i++) {
        int64_t rows = 1 + op_u32() % 9, cols = 1 + op_u32() % 200;
        if (i % 8 == 7)
            rows = 700;
        qie_dtype d = ACTS[i & 1];
        bool edge = op_u32() & 1;
        op_buf bx = op_alloc((size_t)(rows * cols) * 4, edge), m[4];
        op_fill(bx.data, QIE_F32, (size_t)(rows * cols), 1, i % 3 ? 0.1f : 30);
        for (int j = 0; j < 4; j++)
            m[j] = op_random(QIE_F32, (size_t)cols, 1, edge);
        op_buf bd = op_random(d, (size_t)(rows * cols), 1, edge);
        qie_layer_norm_args a = {.x = {bx.data, QIE_F32, rows, cols, cols},
                                 .split = rows / 2,
                                 .eps = 1e-6f,
                                 .dst = {bd.data, d, rows, cols, cols}};
        for (int j = 0; j < 2 && i % 4; j++) {
            a.scale[j] = (const float *)(const void *)m[j].data;
            a.shift[j] = (const float *)(const void *)m[j + 2].data;
        }
        /* A mean of 30 deviations costs 5 bits of x - mean. */
        rows_case p = {"layer_norm",
                       rows,
                       cols,
                       d,
                       i % 3           ? bound_of(d)
                       : d == QIE_BF16 ? 1e-6
                                       : 1e-10,
                       &bd,
                       op_copy(&bd, edge),
                       run_layer_norm,
                       &a};
        if (cols > 1) /* one column: zero over eps, all rounding */
            check(&p);
        for (int j = 0; j < 4; j++)
            op_free(&m[j]);
        op_free(&bx), op_free(&bd), op_free(&p.start);
    }
}

static void run_rope(qie_compute *c, const rows_case *p) {
    c->ops.qk_norm_rope(c, p->args);
}
QTEST(test_qk_norm_rope_variants_match_reference) {
    const int dims[] = {128, 80, 64, 32, 16, 2, 6, 36};
    for (int i = 0; i < 64 && !qtest_failed; i++) {
        int d = dims[i / 8], heads = 1 + (int)(op_u32() % 4);
        int64_t rows = i % 8 == 3 ? 300 : 1 + op_u32() % 9, ld = (int64_t)heads * d + op_u32() % 5;
        qie_dtype t = ACTS[i & 1], w = WEIGHTS[op_u32() % 3];
        bool edge = op_u32() & 1;
        op_buf x = op_random(t, (size_t)((rows - 1) * ld + heads * d), 1, edge),
               nw = op_random(w, (size_t)d, 1, edge);
        op_buf cs = op_random(QIE_F32, (size_t)(rows * (d / 2)), 1, edge);
        op_buf sn = op_random(QIE_F32, (size_t)(rows * (d / 2)), 1, edge);
        qie_qk_norm_rope_args a = {
            .x = {x.data, t, rows, heads * d, ld}, .n_heads = heads, .head_dim = d, .eps = 1e-6f};
        a.interleaved = i & 2;
        if (i & 4)
            a.norm = (qie_vec){nw.data, w, d};
        if (i % 8 != 5) {
            a.cos = (const float *)(const void *)cs.data;
            a.sin = (const float *)(const void *)sn.data;
        }
        rows_case p = {"qk_norm_rope",    rows,     d, t, bound_of(t), &x,
                       op_copy(&x, edge), run_rope, &a};
        check(&p);
        op_free(&x), op_free(&nw), op_free(&cs), op_free(&sn), op_free(&p.start);
    }
}

typedef struct channel_case {
    qie_fmap x, dst;
    qie_vec gamma;
    bool silu;
} channel_case;
static void run_channel(qie_compute *c, const rows_case *p) {
    const channel_case *a = p->args;
    c->ops.channel_norm(c, a->x, a->gamma, a->silu, a->dst);
}
QTEST(test_channel_norm_types_and_sizes_match_reference) {
    const int channels[] = {1, 3, 12, 16, 48, 96, 100, 384};
    for (int i = 0; i < 32 && !qtest_failed; i++) {
        int c = channels[i / 4], h = 1 + (int)(op_u32() % 30), w = 1 + (int)(op_u32() % 30);
        qie_dtype x = ACTS[i & 1], d = ACTS[i / 2 & 1], g = WEIGHTS[i % 3];
        bool edge = op_u32() & 1;
        size_t n = (size_t)h * (size_t)w * (size_t)c;
        op_buf bx = op_random(x, n, 1, edge), bg = op_random(g, (size_t)c, 1, edge),
               bd = op_random(d, n, 1, edge);
        memset(bx.data, 0, (size_t)c * qie_dtype_size(x)); /* a pixel of zeros stays zero */
        channel_case a = {{bx.data, x, h, w, c}, {bd.data, d, h, w, c}, {bg.data, g, c}, i & 4};
        rows_case p = {"channel_norm",     h * w,       c, d, bound_of(d), &bd,
                       op_copy(&bd, edge), run_channel, &a};
        check(&p);
        op_free(&bx), op_free(&bg), op_free(&bd), op_free(&p.start);
    }
}

typedef struct embed_case {
    qie_wmat table;
    qie_mat src, dst;
    const int32_t *ids;
} embed_case;
static void run_embed(qie_compute *c, const rows_case *p) {
    const embed_case *a = p->args;
    c->ops.embed(c, a->table, a->ids, a->dst);
}
static void run_convert(qie_compute *c, const rows_case *p) {
    const embed_case *a = p->args;
    c->ops.convert(c, a->src, a->dst);
}
QTEST(test_embed_and_convert_are_exact) {
    for (int i = 0; i < 24 && !qtest_failed; i++) {
        int64_t rows = i % 6 == 5 ? 900 : 1 + op_u32() % 20, cols = 1 + op_u32() % 100,
                ld = cols + op_u32() % 3;
        qie_dtype t = WEIGHTS[i % 3], s = ACTS[i & 1], d = ACTS[i / 2 & 1];
        bool edge = op_u32() & 1;
        op_buf table = op_random(t, (size_t)(50 * cols), 1, edge);
        op_buf src = op_random(s, (size_t)((rows - 1) * ld + cols), 1, edge);
        op_buf dst = op_random(d, (size_t)((rows - 1) * ld + cols), 1, edge);
        int32_t *ids = malloc((size_t)rows * sizeof *ids);
        for (int64_t r = 0; r < rows; r++)
            ids[r] = (int32_t)(op_u32() % 50);
        embed_case a = {{.data = table.data, .dtype = t, .n = 50, .k = cols},
                        {src.data, s, rows, cols, ld},
                        {dst.data, d, rows, cols, ld},
                        ids};
        rows_case p = {"embed", rows, cols, d, 0, &dst, op_copy(&dst, edge), run_embed, &a};
        check(&p);
        p.what = "convert", p.run = run_convert;
        if (!qtest_failed)
            check(&p);
        free(ids);
        op_free(&table), op_free(&src), op_free(&dst), op_free(&p.start);
    }
}

QTEST(test_convert_rounds_every_special_value_as_scalar_code) {
    enum { N = 1 << 16 };
    op_buf src = op_alloc(N * 4, false), dst = op_alloc(N * 2, false);
    for (uint32_t i = 0; i < N;
         i++) { /* all exponents and signs, ties and their neighbours, inf, NaN */
        uint32_t u = (i << 16) | (i % 5 == 0   ? 0x8000u
                                  : i % 5 == 1 ? 0x7fffu
                                  : i % 5 == 2 ? 0x8001u
                                  : i % 5 == 3 ? 0u
                                               : 1u);
        memcpy(src.data + 4 * i, &u, 4);
    }
    embed_case a = {.src = {src.data, QIE_F32, 1, N, N}, .dst = {dst.data, QIE_BF16, 1, N, N}};
    for (int level = OP_FIRST_LEVEL; level <= (int)qie_cpu_level_hardware(); level++) {
        qie_compute *c = op_compute("cpu", (qie_cpu_level)level, 1);
        c->ops.convert(c, a.src, a.dst);
        qie_compute_destroy(c);
        for (size_t i = 0; i < N; i++) {
            float f;
            qie_bf16 h;
            memcpy(&f, src.data + 4 * i, 4);
            memcpy(&h, dst.data + 2 * i, 2);
            bool tiny = f != 0 && fabsf(f) < 1.17549435e-38f; /* may become zero */
            if (h != qie_f32_to_bf16(f) && !(tiny && !(h & 0x7fff)))
                QTEST_FAIL("level %s: %g became %04x", qie_cpu_level_name((qie_cpu_level)level),
                           (double)f, h);
        }
    }
    op_free(&src), op_free(&dst);
}

typedef struct cfg_case {
    const float *cond, *uncond;
    float *v;
} cfg_case;
static void run_cfg(qie_compute *c, const rows_case *p) {
    const cfg_case *a = p->args;
    c->ops.cfg_combine(c, a->cond, a->uncond, 4.0f, p->rows, p->cols, a->v);
}
QTEST(test_cfg_combine_matches_reference) {
    for (int i = 0; i < 16 && !qtest_failed; i++) {
        int64_t rows = i % 4 == 3 ? 2000 : 1 + op_u32() % 20, cols = 1 + op_u32() % 100;
        op_buf p0 = op_random(QIE_F32, (size_t)(rows * cols), 1, i & 1),
               q = op_random(QIE_F32, (size_t)(rows * cols), 1, i & 1);
        op_buf v = op_random(QIE_F32, (size_t)(rows * cols), 1, i & 1);
        memset(p0.data, 0, (size_t)cols * 4);
        memset(q.data, 0, (size_t)cols * 4);
        cfg_case a = {(float *)(void *)p0.data, (float *)(void *)q.data, (float *)(void *)v.data};
        rows_case p = {"cfg_combine",      rows,    cols, QIE_F32, 1e-12, &v,
                       op_copy(&v, false), run_cfg, &a};
        check(&p);
        op_free(&p0), op_free(&q), op_free(&v), op_free(&p.start);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
