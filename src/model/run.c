#include "model/run.h"

#include <stdio.h>

#include "base/error.h"

qie_status qie_run_check(const qie_run *run, qie_error *err) {
    if (run->beat)
        run->beat(run->beat_arg);
    if (run->cancel && atomic_load_explicit(run->cancel, memory_order_relaxed))
        return qie_fail(err, QIE_E_CANCELLED, NULL, "the edit was cancelled");
    return QIE_OK;
}

qie_status qie_run_alloc(const qie_run *run, size_t bytes, void **out, qie_error *err) {
    *out = qie_arena_alloc(run->arena, bytes);
    QIE_FAIL_IF(!*out, QIE_E_INTERNAL, err, NULL,
                "the memory plan of %zu MB was too small: another %zu bytes asked for",
                qie_arena_capacity(run->arena) >> 20, bytes);
    return QIE_OK;
}

qie_status qie_run_mat(const qie_run *run, qie_dtype dtype, int64_t rows, int64_t cols,
                       qie_mat *out, qie_error *err) {
    void *p;
    QIE_TRY(qie_run_alloc(run, (size_t)rows * (size_t)cols * qie_dtype_size(dtype), &p, err));
    *out = qie_mat_make(p, dtype, rows, cols);
    return QIE_OK;
}

qie_status qie_bind_vec(const qie_weights *w, const char *name, int64_t n, qie_vec *out,
                        qie_error *err) {
    const qie_tensor *t = qie_weights_find(w, name);
    /* VAE gammas are [C, 1, 1, 1] or [C, 1, 1]: only the count matters. */
    if (t && t->n_elements == n && t->n_dims >= 1 && t->shape[0] == n)
        QIE_TRY(qie_weights_need(w, name, t->n_dims, t->shape, &t, err));
    else
        QIE_TRY(qie_weights_need(w, name, 1, &n, &t, err));
    *out = (qie_vec){t->data, t->dtype, n};
    return QIE_OK;
}

qie_status qie_bind_linear(const qie_weights *w, const char *name, int64_t n, int64_t k, bool bias,
                           qie_linear *out, qie_error *err) {
    char full[192];
    int64_t shape[5] = {n, k, 1, 1, 1};
    const qie_tensor *t;
    snprintf(full, sizeof full, "%s.weight", name);
    t = qie_weights_find(w, full);
    /* 1x1 convolutions ([n, k, 1, 1(, 1)]) and the patch embedding ([n, 3, 2, 14, 14]) are linear
     * layers. */
    if (t && t->n_dims > 2 && t->n_dims <= 5 && t->shape[0] == n && t->n_elements == n * k)
        QIE_TRY(qie_weights_need(w, full, t->n_dims, t->shape, &t, err));
    else
        QIE_TRY(qie_weights_need(w, full, 2, shape, &t, err));
    out->w = (qie_wmat){.data = t->data, .dtype = t->dtype, .n = n, .k = k};
    out->b = (qie_vec){NULL, QIE_F32, 0};
    if (!bias)
        return QIE_OK;
    snprintf(full, sizeof full, "%s.bias", name);
    return qie_bind_vec(w, full, n, &out->b, err);
}

void qie_run_linear(const qie_run *run, qie_mat x, const qie_linear *l, qie_act act,
                    qie_store store, qie_mat dst) {
    qie_linear_args a = {
        .x = x, .w = l->w, .bias = l->b, .act = act, .store = store, .split = x.rows, .dst = dst};
    run->compute->ops.linear(run->compute, &a);
}

void qie_run_linear_gated(const qie_run *run, qie_mat x, const qie_linear *l, const float *gate0,
                          const float *gate1, int64_t split, qie_mat dst) {
    qie_linear_args a = {.x = x,
                         .w = l->w,
                         .bias = l->b,
                         .store = QIE_STORE_GATED_ADD,
                         .gate = {gate0, gate1},
                         .split = split,
                         .dst = dst};
    run->compute->ops.linear(run->compute, &a);
}

void qie_linear_prefetch(const qie_linear *l) {
    qie_weights_prefetch(l->w.data, (size_t)l->w.n * qie_dtype_row_bytes(l->w.dtype, l->w.k));
}
