/* Floats to stored weights and back, and files that hold them. */
#include "base/blocks.h"
#include "base/dtype.h"
#include "qtest.h"
#include "weights/file_layout.h"
#include "weights/quant_rows.h"

enum { ROWS = 64, N = 3072 }; /* as wide as the real model's rows */

static uint64_t state = 1;

/* Uniform in (-1, 1), from integers: the same floats everywhere. */
static float uniform(void) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (float)((int32_t)(state >> 40) - (1 << 23)) / (float)(1 << 23);
}
/* Nearly normal with deviation 1: twelve uniform ones, each of variance 1/3. */
static float normal(void) {
    float s = 0;
    for (int i = 0; i < 12; i++)
        s += uniform();
    return s * 0.5f;
}

static const struct kind {
    qie_dtype dtype;
    double nmse;   /* of normal values, measured 2.8e-5 ...; the format's own limit, not ours */
    uint64_t hash; /* of the bytes of the first rows */
} KINDS[] = {
    {QIE_Q8_0, 3.0e-5, 0xc587ce6a0fde88b8},    {QIE_Q6_K, 2.9e-4, 0xea2953080989f4b4},
    {QIE_Q5_K, 1.25e-3, 0xb5d0ffd711bb0fb1},   {QIE_Q4_K, 5.1e-3, 0x39f7e8082def9506},
    {QIE_Q4_0, 6.8e-3, 0xc75d30f198f91f62},    {QIE_I8, 7.6e-5, 0x1dc72a51a38e9bd3},
    {QIE_F8_E4M3, 7.2e-4, 0x3820971b33621378},
};
enum { N_KINDS = sizeof KINDS / sizeof *KINDS };

/* One row there and back. False if it was refused. */
static bool there_and_back(qie_dtype dtype, const float *x, const float *importance, int64_t n,
                           unsigned char *bytes, float *back) {
    float scale = 1;
    if (qie_quant_makes_blocks(dtype)) {
        if (!qie_quant_blocks(dtype, x, importance, n, bytes))
            return false;
    } else if (!qie_quant_scaled(dtype, x, importance, n, bytes, &scale))
        return false;
    qie_blocks_to_f32(back, bytes, dtype, (size_t)n);
    for (int64_t i = 0; i < n; i++)
        back[i] *= scale;
    return true;
}

static double error_of(const float *x, const float *y, const float *w, int64_t n) {
    double e = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)y[i] - (double)x[i], k = w ? (double)w[i] : 1;
        e += k * d * d;
        s += k * (double)x[i] * (double)x[i];
    }
    return e / s;
}

static float x[ROWS * N], y[ROWS * N];
static unsigned char bytes[ROWS * N * 2];

static void fill_normal(void) {
    state = 1;
    for (int i = 0; i < ROWS * N; i++)
        x[i] = 0.02f * normal();
}

QTEST(test_quant_normal_values_keep_the_stated_error) {
    fill_normal();
    for (int k = 0; k < N_KINDS; k++) {
        qie_dtype t = KINDS[k].dtype;
        for (int r = 0; r < ROWS; r++)
            ASSERT(there_and_back(t, x + r * N, NULL, N, bytes, y + r * N));
        double e = error_of(x, y, NULL, ROWS * N);
        if (!(e <= KINDS[k].nmse && e > KINDS[k].nmse / 2))
            QTEST_FAIL("%s: NMSE %.3g, stated %.3g", qie_dtype_name(t), e, KINDS[k].nmse);
    }
}

/* A conversion that is taken up again on another machine must go on with the same bytes. */
QTEST(test_quant_bytes_are_the_same_in_every_build) {
    fill_normal();
    for (int k = 0; k < N_KINDS; k++) {
        qie_dtype t = KINDS[k].dtype;
        uint64_t h = 1469598103934665603u;
        for (int r = 0; r < 8; r++) {
            ASSERT(there_and_back(t, x + r * N, NULL, N, bytes, y));
            for (size_t i = 0; i < qie_dtype_row_bytes(t, N); i++)
                h = (h ^ bytes[i]) * 1099511628211u;
        }
        if (h != KINDS[k].hash) {
            printf("  %s: 0x%016llx\n", qie_dtype_name(t), (unsigned long long)h);
            qtest_failed = true;
        }
    }
}

/* Where the errors count is where they are made small. */
QTEST(test_quant_importance_lowers_the_weighted_error) {
    static float w[N];
    fill_normal();
    for (int i = 0; i < N; i++)
        w[i] = i % 16 == 3 ? 400.0f : 1.0f;
    for (int k = 0; k < N_KINDS; k++) {
        qie_dtype t = KINDS[k].dtype;
        double plain = 0, weighted = 0;
        for (int r = 0; r < 8; r++) {
            ASSERT(there_and_back(t, x + r * N, NULL, N, bytes, y));
            plain += error_of(x + r * N, y, w, N);
            ASSERT(there_and_back(t, x + r * N, w, N, bytes, y));
            weighted += error_of(x + r * N, y, w, N);
        }
        bool takes = t != QIE_Q8_0 && t != QIE_F8_E4M3 && t != QIE_I8;
        if (takes ? !(weighted < 0.85 * plain) : !(weighted <= 1.001 * plain))
            QTEST_FAIL("%s: weighted error %.3g with importance, %.3g without", qie_dtype_name(t),
                       weighted, plain);
    }
}

QTEST(test_quant_zero_constant_and_sparse_rows) {
    for (int k = 0; k < N_KINDS; k++)
        for (int what = 0; what < 5; what++) {
            qie_dtype t = KINDS[k].dtype;
            for (int i = 0; i < 512; i++)
                x[i] = what == 0   ? 0
                       : what == 1 ? 0.25f
                       : what == 2 ? -0.25f
                       : what == 3 ? (i == 300 ? -3.0f : 0)
                                   : (i % 2 ? 1e-3f : -1e-3f);
            memset(bytes, 0xff, 1024);
            ASSERT(there_and_back(t, x, NULL, 512, bytes, y));
            double most = what == 3 ? 3 : what == 4 ? 1e-3 : 0.25;
            for (int i = 0; i < 512; i++)
                if (!(fabs((double)y[i] - (double)x[i]) <= most * 0.04))
                    QTEST_FAIL("%s, case %d: %g for %g", qie_dtype_name(t), what, (double)y[i],
                               (double)x[i]);
        }
}

QTEST(test_quant_tiny_and_huge_values_stay_finite) {
    const float sizes[] = {1e-45f, 1e-38f, 1e-30f, 1e-12f, 1e-8f, 1e5f, 3e6f, 1e20f, 3e38f};
    for (int k = 0; k < N_KINDS; k++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            state = 7;
            for (int i = 0; i < 256; i++)
                x[i] = sizes[s] * uniform();
            if (!there_and_back(KINDS[k].dtype, x, NULL, 256, bytes, y)) {
                ASSERT(sizes[s] >= 1e5f); /* scales are binary16 */
                continue;
            }
            for (int i = 0; i < 256; i++)
                if (!(fabsf(y[i] - x[i]) <= fmaxf(sizes[s] * 0.2f, 1e-7f)))
                    QTEST_FAIL("%s, %g: %g for %g", qie_dtype_name(KINDS[k].dtype),
                               (double)sizes[s], (double)y[i], (double)x[i]);
        }
}

QTEST(test_quant_refuses_what_it_cannot_write) {
    float scale;
    for (int i = 0; i < 256; i++)
        x[i] = 1;
    for (int k = 0; k < N_KINDS; k++)
        for (int bad = 0; bad < 3; bad++) {
            x[77] = bad == 0 ? NAN : bad == 1 ? INFINITY : -INFINITY;
            ASSERT(!there_and_back(KINDS[k].dtype, x, NULL, 256, bytes, y));
            x[77] = 1;
        }
    ASSERT(!qie_quant_blocks(QIE_Q4_K, x, NULL, 128, bytes));
    ASSERT(!qie_quant_blocks(QIE_Q8_0, x, NULL, 33, bytes));
    ASSERT(!qie_quant_blocks(QIE_Q2_K, x, NULL, 256, bytes));
    ASSERT(!qie_quant_blocks(QIE_I8, x, NULL, 256, bytes));
    ASSERT(!qie_quant_scaled(QIE_Q8_0, x, NULL, 256, bytes, &scale));
}

/* Values that the format holds exactly come back exactly. */
QTEST(test_quant_of_read_values_changes_nothing) {
    fill_normal();
    ASSERT(there_and_back(QIE_Q8_0, x, NULL, N, bytes, y));
    ASSERT(there_and_back(QIE_Q8_0, y, NULL, N, bytes, x));
    ASSERT(!memcmp(x, y, N * sizeof *x));
}

/* ---- files */

static const char *const NAMES[] = {"a.weight", "b.bias", "patch.weight", "c.weight", "empty"};

static size_t write_file(qie_file_format format, unsigned char *file, qie_layout_tensor *t) {
    static const qie_meta_pair META[] = {{"general.architecture", "qwen_image", 0},
                                         {"general.file_type", NULL, 7},
                                         {"odd", "\"quoted\"\n\xc3\xa9", 0}};
    qie_layout l;
    qie_error e;
    const qie_dtype block = format == QIE_FORMAT_GGUF ? QIE_Q8_0 : QIE_I8;
    t[0] = (qie_layout_tensor){.name = NAMES[0], .dtype = block, .n_dims = 2, .shape = {3, 64}};
    t[1] = (qie_layout_tensor){.name = NAMES[1], .dtype = QIE_F32, .n_dims = 1, .shape = {5}};
    t[2] = (qie_layout_tensor){
        .name = NAMES[2], .dtype = QIE_BF16, .n_dims = 5, .shape = {4, 3, 2, 7, 7}};
    t[3] = (qie_layout_tensor){.name = NAMES[3], .dtype = block, .n_dims = 2, .shape = {1, 32}};
    t[4] = (qie_layout_tensor){.name = NAMES[4], .dtype = QIE_F32, .n_dims = 2, .shape = {0, 4}};
    if (qie_layout_make(format, t, 5, META, 3, &l, &e) != QIE_OK) {
        printf("  %s\n", e.message);
        return 0;
    }
    memset(file, 0, (size_t)l.n_file);
    memcpy(file, l.head, l.n_head);
    for (int i = 0; i < 5; i++)
        for (int64_t k = 0; k < t[i].n_bytes; k++)
            file[t[i].offset + k] = (unsigned char)(17 * i + k);
    size_t n = (size_t)l.n_file;
    qie_layout_release(&l);
    return n;
}

static void check_file(qie_file_format format) {
    static _Alignas(64) unsigned char file[1 << 14];
    qie_layout_tensor t[5];
    qie_weights *w;
    qie_error e;
    size_t n = write_file(format, file, t);
    ASSERT(n > 0);
    if (qie_weights_open_bytes(file, n, "made", &w, &e) != QIE_OK)
        QTEST_FAIL("%s", e.message);
    ASSERT_INT(qie_weights_count(w), 5);
    for (int i = 0; i < 5; i++) {
        const qie_tensor *r = qie_weights_find(w, NAMES[i]);
        ASSERT(r && r->dtype == t[i].dtype && r->n_dims == t[i].n_dims);
        ASSERT(!memcmp(r->shape, t[i].shape, sizeof *r->shape * (size_t)r->n_dims));
        ASSERT_INT(r->n_bytes, t[i].n_bytes);
        ASSERT_INT((const unsigned char *)r->data - file, t[i].offset);
        size_t size = qie_dtype_size(r->dtype);
        ASSERT_INT(t[i].offset % (format == QIE_FORMAT_GGUF ? 32 : (int64_t)size), 0);
    }
    ASSERT_STR(qie_weights_metadata(w, "general.architecture"), "qwen_image");
    ASSERT_STR(qie_weights_metadata(w, "general.file_type"), "7");
    ASSERT_STR(qie_weights_metadata(w, "odd"), "\"quoted\"\n\xc3\xa9");
    qie_weights_close(w);
}

QTEST(test_layout_gguf_is_read_back) {
    check_file(QIE_FORMAT_GGUF);
}
QTEST(test_layout_safetensors_is_read_back) {
    check_file(QIE_FORMAT_SAFETENSORS);
}

QTEST(test_layout_refuses_what_a_format_lacks) {
    qie_layout l;
    qie_error e = {0};
    qie_layout_tensor t = {.name = "w", .dtype = QIE_Q8_0, .n_dims = 2, .shape = {3, 64}};
    ASSERT_INT(qie_layout_make(QIE_FORMAT_SAFETENSORS, &t, 1, NULL, 0, &l, &e), QIE_E_INVALID);
    qie_layout_release(&l);
    t.dtype = QIE_F8_E4M3;
    ASSERT_INT(qie_layout_make(QIE_FORMAT_GGUF, &t, 1, NULL, 0, &l, &e), QIE_E_INVALID);
    qie_layout_release(&l);
    t.dtype = QIE_Q4_K; /* rows of 64 */
    ASSERT_INT(qie_layout_make(QIE_FORMAT_GGUF, &t, 1, NULL, 0, &l, &e), QIE_E_INVALID);
    qie_layout_release(&l);
    t = (qie_layout_tensor){
        .name = "w", .dtype = QIE_F32, .n_dims = 2, .shape = {INT64_MAX / 2, 8}};
    ASSERT_INT(qie_layout_make(QIE_FORMAT_GGUF, &t, 1, NULL, 0, &l, &e), QIE_E_INVALID);
    qie_layout_release(&l);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
