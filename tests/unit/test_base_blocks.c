/* Blocks to floats. The expected values of tests/golden/blocks come from the reference
 * implementation of the format; here the plain C and the vector readers meet them to the bit. */
#include "base/blocks.h"
#include "base/cpu.h"
#include "base/fs.h"
#include "compute/cpu/kernels.h"
#include "qtest.h"
#include "weights/weights.h"

static qie_weights *golden;

static bool same_bits(const float *a, const float *b, int64_t n, int64_t *at) {
    for (int64_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], 4) && !(isnan(a[i]) && isnan(b[i])) && !(a[i] == 0 && b[i] == 0)) {
            *at = i;
            return false;
        }
    return true;
}

static void check_type(qie_dtype dtype) {
    char name[64];
    snprintf(name, sizeof name, "%s.blocks", qie_dtype_name(dtype));
    const qie_tensor *blocks = qie_weights_find(golden, name);
    snprintf(name, sizeof name, "%s.values", qie_dtype_name(dtype));
    const qie_tensor *values = qie_weights_find(golden, name);
    ASSERT(blocks && values);
    int64_t n = values->n_elements, at = 0;
    ASSERT_INT(qie_dtype_row_bytes(dtype, n), blocks->n_bytes);
    float *want = malloc((size_t)n * 4), *got = malloc((size_t)n * 4);
    memcpy(want, values->data, (size_t)n * 4);
    ASSERT_INT(qie_to_f32(got, blocks->data, dtype, (size_t)n), 0);
    if (!same_bits(got, want, n, &at))
        QTEST_FAIL("%s: element %lld is %.9g, expected %.9g", qie_dtype_name(dtype), (long long)at,
                   (double)got[at], (double)want[at]);
#if defined(__x86_64__)
    if (qie_cpu_level_hardware() >= QIE_CPU_AVX2) {
        float factor = 0.37f;
        for (int scaled = 0; scaled < 2; scaled++) {
            memset(got, 0xff, (size_t)n * 4);
            bool factored = scaled && qie_dtype_block_elements(dtype) == 1;
            qie_load_weights_avx2(got, blocks->data, dtype, n, factored ? &factor : NULL);
            for (int64_t i = 0; i < n && factored; i++)
                want[i] *= factor;
            if (!same_bits(got, want, n, &at))
                QTEST_FAIL("%s avx2: element %lld is %.9g, expected %.9g", qie_dtype_name(dtype),
                           (long long)at, (double)got[at], (double)want[at]);
        }
    }
#endif
    free(want);
    free(got);
}

QTEST(test_blocks_random_equal_the_reference) {
    qie_error err;
    if (qie_weights_open_file(QIE_SOURCE_DIR "/tests/golden/blocks/blocks.safetensors", &golden,
                              &err) != QIE_OK)
        QTEST_FAIL("%s", err.message);
    for (int t = QIE_Q4_0; t <= QIE_IQ4_XS && !qtest_failed; t++)
        check_type((qie_dtype)t);
    check_type(QIE_F8_E4M3);
    check_type(QIE_F8_E5M2);
    qie_weights_close(golden);
}

QTEST(test_f8_e4m3_rounding_is_nearest_even) {
    for (int b = 0; b < 256; b++) {
        float v = qie_f8_e4m3_to_f32((uint8_t)b);
        ASSERT_INT(qie_f32_to_f8_e4m3(v), b);
        if ((b & 0x7f) >= 0x7e)
            continue;
        float next = qie_f8_e4m3_to_f32((uint8_t)(b + 1)), mid = v + (next - v) / 2;
        ASSERT_INT(qie_f32_to_f8_e4m3(mid), b % 2 ? b + 1 : b);
        ASSERT_INT(qie_f32_to_f8_e4m3(nextafterf(mid, next)), b + 1);
        ASSERT_INT(qie_f32_to_f8_e4m3(nextafterf(mid, v)), b);
    }
    ASSERT_INT(qie_f32_to_f8_e4m3(1e9f), 0x7e);
    ASSERT_INT(qie_f32_to_f8_e4m3(-INFINITY), 0xfe);
    ASSERT_INT(qie_f32_to_f8_e4m3(464.1f), 0x7e);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
