/* torch's random numbers: exact for f32 and for bf16 where they are defined. */
#include "qtest.h"

#include "base/rng.h"
#include "weights/weights.h"

#define GOLDEN QIE_SOURCE_DIR "/tests/golden/unit/random.safetensors"

QTEST(test_rng_u32_known_seeds_first_outputs) {
    static const uint32_t zero[4] = {2357136044u, 2546248239u, 3071714933u, 3626093760u};
    qie_rng r;
    qie_rng_seed(&r, 0);
    for (int i = 0; i < 4; i++)
        ASSERT_INT(qie_rng_u32(&r), zero[i]);
    qie_rng_seed(&r, 42);
    ASSERT_INT(qie_rng_u32(&r), 1608637542u);
}

QTEST(test_rng_seed_only_low_32_bits_matter) {
    qie_rng a, b;
    float x[32], y[32];
    qie_rng_seed(&a, 5);
    qie_rng_seed(&b, (1ull << 32) + 5);
    qie_rng_normal(&a, x, 32, false);
    qie_rng_normal(&b, y, 32, false);
    ASSERT(!memcmp(x, y, sizeof x));
}

QTEST(test_rng_normal_recorded_seeds_exact) {
    qie_error e = {0};
    qie_weights *w;
    ASSERT_OK(qie_weights_open_file(GOLDEN, &w, &e));
    int n_checked = 0;
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        unsigned long long seed, n;
        char tail[16] = "";
        ASSERT(sscanf(t->name, "%llu.%llu%15s", &seed, &n, tail) >= 2);
        bool bf16 = !strcmp(tail, ".bf16");
        /* bf16 draws of a length that 16 does not divide have another tail in torch; latents never
         * have one */
        if (bf16 && n % 16)
            continue;
        float *got = malloc(sizeof(float) * (size_t)n), *want = malloc(sizeof(float) * (size_t)n);
        qie_rng r;
        qie_rng_seed(&r, seed);
        qie_rng_normal(&r, got, (size_t)n, bf16);
        qie_to_f32(want, t->data, t->dtype, (size_t)n);
        size_t differ = 0;
        double worst = 0;
        for (size_t k = 0; k < (size_t)n; k++) {
            differ += got[k] != want[k];
            worst = fmax(worst, fabs((double)got[k] - (double)want[k]));
        }
        free(got);
        free(want);
        /* fewer than 16: double precision through libm, then one rounding */
        if (n < 16 ? worst > 1e-6 : differ > 0)
            QTEST_FAIL("%s: %zu of %llu values differ, worst %g", t->name, differ, n, worst);
        n_checked++;
    }
    qie_weights_close(w);
    ASSERT(n_checked > 50);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
