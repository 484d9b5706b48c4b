/* Chooses, for each operation, the best variant of this machine. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "compute/backend.h"
#include "compute/cpu/cpu_backend.h"
#include "compute/cpu/cpu_state.h"
#include "compute/cpu/onednn_backend.h"
#include "compute/cpu/quantised.h"
#include "compute/cpu/ref.h"

static size_t round_up(size_t n) {
    return (n + 63) / 64 * 64;
}

static qie_cpu_state plan(const qie_compute_limits *limits) {
    qie_cpu_state s = {0};
    size_t linear = QIE_A_BYTES + QIE_B_BYTES + QIE_PANEL_BYTES + QIE_C_BYTES;
    size_t attention = qie_cpu_attention_bytes(limits->max_head_dim);
    size_t tiles = qie_cpu_winograd_thread_bytes(limits->max_conv_k / 9);
    size_t thread = linear > attention ? linear : attention;
    size_t shared = qie_cpu_conv_bytes(limits->max_conv_k, limits->max_conv_n);
    size_t winograd = qie_cpu_winograd_shared_bytes(limits->max_conv_k / 9, limits->max_conv_n);
    thread = tiles > thread ? tiles : thread;
    shared = winograd > shared ? winograd : shared;
    s.max_int8_k = limits->max_int8_k;
    if (limits->max_int8_k) {
        size_t int8_shared = qie_cpu_int8_shared_bytes(limits->max_int8_k);
        size_t int8_thread = qie_cpu_int8_thread_bytes();
        shared = int8_shared > shared ? int8_shared : shared;
        thread = int8_thread > thread ? int8_thread : thread;
    }
    s.shared_bytes = round_up(shared);
    s.thread_bytes = round_up(thread);
    return s;
}

typedef enum kind { CPU, REF, ONEDNN, UNKNOWN } kind;
static const char *const NAMES[] = {"cpu", "ref", "onednn"};

static kind kind_of(const char *name) {
    for (int i = 0; name && i < UNKNOWN; i++)
        if (!strcmp(name, NAMES[i]))
            return (kind)i;
    return name ? UNKNOWN : CPU;
}

size_t qie_compute_scratch_bytes(const char *name, int n_threads,
                                 const qie_compute_limits *limits) {
    kind k = kind_of(name);
    if (k == ONEDNN)
        return qie_onednn_scratch_bytes(n_threads, limits);
    if (k != CPU)
        return 0;
    qie_cpu_state s = plan(limits);
    return s.shared_bytes + (size_t)(n_threads < 1 ? 1 : n_threads) * s.thread_bytes;
}

/* Replace the plain C entries by those of the level. */
static qie_status fill(qie_compute *c, const qie_compute_limits *limits, qie_error *err) {
    (void)limits;
    (void)err;
#if defined(__x86_64__)
    if (c->level == QIE_CPU_REF)
        return QIE_OK;
    qie_cpu_state *state = malloc(sizeof *state);
    QIE_FAIL_IF(!state, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    *state = plan(limits);
    state->kernels = c->level >= QIE_CPU_AVX512BF16 ? &qie_kernels_avx512bf16
                     : c->level >= QIE_CPU_AVX512   ? &qie_kernels_avx512
                                                    : &qie_kernels_avx2;
    state->i8_groups = c->level >= QIE_CPU_AVX512BF16 ? &qie_i8_gemm_avx512bf16
                       : c->level >= QIE_CPU_AVX512   ? &qie_i8_gemm_avx512
                                                      : &qie_i8_gemm_avx2;
    state->i8 = c->level >= QIE_CPU_AMX ? &qie_i8_gemm_amx : state->i8_groups;
    state->bf16 = c->level >= QIE_CPU_AVX512BF16 ? &qie_bf16_gemm_avx512bf16 : NULL;
    if (c->level >= QIE_CPU_AMX) {
        qie_bf16_gemm_amx_make(&state->amx);
        state->bf16 = &state->amx;
    }
    c->state = state;
    c->release_state = free;
    c->bf16_native = state->bf16 != NULL;
    c->int8_blocks = c->level != QIE_CPU_AMX && limits->max_int8_k > 0;
    c->ops.linear = qie_cpu_linear;
    c->ops.conv2d = qie_cpu_conv2d;
    c->ops.attention = qie_cpu_attention;
    qie_cpu_fill_rows(&c->ops);
#endif
    return QIE_OK;
}

qie_status qie_compute_create_level(const char *name, qie_cpu_level level, int n_threads,
                                    const qie_compute_limits *limits, qie_compute **out,
                                    qie_error *err) {
    qie_status st = QIE_OK;
    kind k = kind_of(name);
    *out = NULL;
    QIE_FAIL_IF(k == UNKNOWN, QIE_E_INVALID, err, "backend",
                "back end '%s' is not one of cpu, ref, onednn", name);
    qie_compute *c = calloc(1, sizeof *c);
    QIE_FAIL_IF(!c, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    c->name = NAMES[k];
    c->level = k == REF ? QIE_CPU_REF : level;
    c->n_threads = n_threads < 1 ? 1 : n_threads;
    c->rows_alone = k != ONEDNN; /* its kernels are chosen by the number of rows */
    c->scratch_bytes = qie_compute_scratch_bytes(name, c->n_threads, limits);
    if (c->scratch_bytes && !(c->scratch = aligned_alloc(64, round_up(c->scratch_bytes)))) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory: %zu bytes of scratch",
                      c->scratch_bytes);
        goto fail;
    }
    qie_ref_fill(&c->ops);
    if (k == CPU)
        QIE_TRY_GOTO(fill(c, limits, err));
    else if (k == ONEDNN)
        QIE_TRY_GOTO(qie_onednn_init(c, limits, err));
    *out = c;
    return QIE_OK;
fail:
    qie_compute_destroy(c);
    return st;
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
