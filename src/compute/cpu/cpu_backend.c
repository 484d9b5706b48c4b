/* Chooses, for each operation, the best variant of this machine. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "compute/backend.h"
#include "compute/cpu/cpu_backend.h"
#include "compute/cpu/cpu_state.h"
#include "compute/cpu/ref.h"

static size_t round_up(size_t n) {
    return (n + 63) / 64 * 64;
}

static qie_cpu_state plan(const qie_compute_limits *limits) {
    qie_cpu_state s = {0};
    size_t linear = QIE_A_BYTES + QIE_B_BYTES + QIE_C_BYTES;
    size_t attention = qie_cpu_attention_bytes(limits->max_head_dim);
    s.shared_bytes = round_up(qie_cpu_conv_bytes(limits->max_conv_k, limits->max_conv_n));
    s.thread_bytes = round_up(linear > attention ? linear : attention);
    return s;
}

size_t qie_compute_scratch_bytes(const char *name, int n_threads,
                                 const qie_compute_limits *limits) {
    if (name && !strcmp(name, "ref"))
        return 0;
    qie_cpu_state s = plan(limits);
    return s.shared_bytes + (size_t)(n_threads < 1 ? 1 : n_threads) * s.thread_bytes;
}

#if defined(__x86_64__)
/* Entries for a level above plain C. */
static void fill(qie_compute *c, qie_cpu_state *state) {
    state->kernels = c->level >= QIE_CPU_AVX512 ? &qie_kernels_avx512 : &qie_kernels_avx2;
    state->bf16 = c->level >= QIE_CPU_AVX512BF16 ? &qie_bf16_gemm_avx512bf16 : NULL;
    c->bf16_native = state->bf16 != NULL;
    c->ops.linear = qie_cpu_linear;
    c->ops.conv2d = qie_cpu_conv2d;
    c->ops.attention = qie_cpu_attention;
    qie_cpu_fill_rows(&c->ops);
}
#endif

qie_status qie_compute_create_level(const char *name, qie_cpu_level level, int n_threads,
                                    const qie_compute_limits *limits, qie_compute **out,
                                    qie_error *err) {
    *out = NULL;
    if (!name)
        name = "cpu";
    QIE_FAIL_IF(strcmp(name, "cpu") && strcmp(name, "ref"), QIE_E_INVALID, err, "backend",
                "back end '%s' is not one of cpu, ref", name);
    qie_compute *c = calloc(1, sizeof *c);
    QIE_FAIL_IF(!c, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    bool ref = !strcmp(name, "ref");
    c->name = ref ? "ref" : "cpu";
    c->level = ref ? QIE_CPU_REF : level;
    c->n_threads = n_threads < 1 ? 1 : n_threads;
    qie_ref_fill(&c->ops);
#if defined(__x86_64__)
    if (c->level > QIE_CPU_REF) {
        qie_cpu_state *state = malloc(sizeof *state);
        c->state = state;
        c->release_state = free;
        size_t bytes = qie_compute_scratch_bytes(name, c->n_threads, limits);
        if (state)
            c->scratch = aligned_alloc(64, round_up(bytes));
        if (!c->scratch) {
            qie_compute_destroy(c);
            QIE_FAIL_IF(true, QIE_E_NO_MEMORY, err, NULL, "out of memory: %zu bytes of scratch",
                        bytes);
        }
        c->scratch_bytes = bytes;
        *state = plan(limits);
        fill(c, state);
    }
#endif
    *out = c;
    return QIE_OK;
}

qie_status qie_compute_create(const char *name, int n_threads, const qie_compute_limits *limits,
                              qie_compute **out, qie_error *err) {
    return qie_compute_create_level(name, qie_cpu_level_get(), n_threads, limits, out, err);
}

void qie_compute_destroy(qie_compute *c) {
    if (!c)
        return;
    if (c->release_state)
        c->release_state(c->state);
    free(c->scratch);
    free(c);
}
