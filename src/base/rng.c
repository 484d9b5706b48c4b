#define _GNU_SOURCE
#include "base/rng.h"

#include <math.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/dtype.h"

void qie_rng_seed(qie_rng *rng, uint64_t seed) {
    memset(rng, 0, sizeof *rng);
    rng->state[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < 624; i++)
        rng->state[i] = 1812433253u * (rng->state[i - 1] ^ (rng->state[i - 1] >> 30)) + i;
    rng->next = 624;
}

static void refill(qie_rng *r) {
    uint32_t *s = r->state;
    for (size_t i = 0; i < 624; i++) {
        uint32_t y = (s[i] & 0x80000000u) | (s[(i + 1) % 624] & 0x7fffffffu);
        s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    r->next = 0;
}

uint32_t qie_rng_u32(qie_rng *rng) {
    if (rng->next >= 624)
        refill(rng);
    uint32_t y = rng->state[rng->next++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* Single-precision logarithm and sine/cosine of the Cephes library with the fused multiply-adds
 * that torch's vector code uses; any other libm differs in the last bit for four values in ten. */
static float cephes_log(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    float e = (float)((int)(u >> 23) - 126), m;
    u = (u & 0x007fffffu) | 0x3f000000u;
    memcpy(&m, &u, sizeof m);
    if (m < 0.707106781186547524f) {
        e -= 1.0f;
        m = (m - 1.0f) + m;
    } else
        m = m - 1.0f;
    static const float P[8] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                               1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                               -2.4999993993e-1f, 3.3333331174e-1f};
    float z = m * m, y = 7.0376836292e-2f;
    for (int i = 0; i < 8; i++)
        y = fmaf(y, m, P[i]);
    y = y * m;
    y = fmaf(y, z, e * -2.12194440e-4f);
    y = fmaf(-0.5f, z, y);
    return fmaf(e, 0.693359375f, m + y);
}

static void cephes_sincos(float t, float *sine, float *cosine) {
    float y = t * 1.27323954473516f;
    int j = ((int)y + 1) & ~1;
    y = (float)j;
    float x = fmaf(y, -0.78515625f, t);
    x = fmaf(y, -2.4187564849853515625e-4f, x);
    x = fmaf(y, -3.77489497744594108e-8f, x);
    float z = x * x;
    float a = fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f);
    a = fmaf(a, z, 4.166664568298827e-2f);
    a = a * z;
    a = fmaf(a, z, -(0.5f * z));
    a = a + 1.0f;
    float b = fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f);
    b = fmaf(b, z, -1.6666654611e-1f);
    b = b * z;
    b = fmaf(b, x, x);
    float s = (j & 2) ? a : b, c = (j & 2) ? b : a;
    *sine = (j & 4) ? -s : s;
    *cosine = ((j - 2) & 4) ? c : -c;
}

static void box_muller_16(float *v) {
    for (int j = 0; j < 8; j++) {
        float r = sqrtf(-2.0f * cephes_log(1.0f - v[j])), s, c;
        cephes_sincos(6.2831855f * v[j + 8], &s, &c);
        v[j] = r * c;
        v[j + 8] = r * s;
    }
}

/* torch's path for fewer than 16 values: double precision, pairs kept in the generator. */
static double normal_scalar(qie_rng *r) {
    if (r->has_spare) {
        r->has_spare = false;
        return r->spare;
    }
    double u[2];
    for (int i = 0; i < 2; i++) {
        uint64_t hi = qie_rng_u32(r), bits = hi << 32 | qie_rng_u32(r);
        u[i] = (double)(bits & ((1ull << 53) - 1)) * 0x1p-53;
    }
    double radius = sqrt(-2.0 * log1p(-u[1])), angle = 2.0 * 3.14159265358979323846 * u[0];
    r->spare = radius * sin(angle);
    r->has_spare = true;
    return radius * cos(angle);
}

static float uniform24(qie_rng *r) {
    return (float)(qie_rng_u32(r) & 0xffffffu) * 0x1p-24f;
}

void qie_rng_normal(qie_rng *rng, float *out, size_t n, bool bf16) {
    if (n < 16) {
        for (size_t i = 0; i < n; i++)
            out[i] = (float)normal_scalar(rng);
    } else {
        for (size_t i = 0; i < n; i++)
            out[i] = uniform24(rng);
        for (size_t i = 0; i + 16 <= n; i += 16)
            box_muller_16(out + i);
        if (n % 16) { /* the last 16 are drawn anew, over what is there */
            float *tail = out + n - 16;
            for (int i = 0; i < 16; i++)
                tail[i] = uniform24(rng);
            box_muller_16(tail);
        }
    }
    if (bf16)
        for (size_t i = 0; i < n; i++)
            out[i] = qie_bf16_to_f32(qie_f32_to_bf16(out[i]));
}

uint64_t qie_random_seed(void) {
    uint32_t v = 0;
    if (getrandom(&v, sizeof v, 0) != (ssize_t)sizeof v) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        v = (uint32_t)t.tv_nsec ^ (uint32_t)t.tv_sec;
    }
    return v & 0x7fffffffu;
}

uint64_t qie_derived_seed(uint64_t seed) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) >> 33;
}
