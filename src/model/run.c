#include "model/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

qie_status qie_run_check(const qie_run *run, qie_error *err) {
    if (run->beat)
        run->beat(run->beat_arg);
    if (run->cancel && atomic_load_explicit(run->cancel, memory_order_relaxed))
        return qie_fail(err, QIE_E_CANCELLED, NULL, "the edit was cancelled");
    if (run->compute->mem)
        return run->compute->mem->check(run->compute, err);
    return QIE_OK;
}

static qie_status alloc_from(qie_arena *arena, size_t bytes, void **out, qie_error *err) {
    *out = qie_arena_alloc(arena, bytes);
    QIE_FAIL_IF(!*out, QIE_E_INTERNAL, err, NULL,
                "the memory plan of %zu MB was too small: another %zu bytes asked for",
                qie_arena_capacity(arena) >> 20, bytes);
    return QIE_OK;
}

qie_status qie_run_alloc(const qie_run *run, size_t bytes, void **out, qie_error *err) {
    return alloc_from(run->device, bytes, out, err);
}

qie_status qie_run_alloc_host(const qie_run *run, size_t bytes, void **out, qie_error *err) {
    return alloc_from(run->arena, bytes, out, err);
}

qie_run_mark qie_run_mark_get(const qie_run *run) {
    return (qie_run_mark){qie_arena_mark(run->arena), qie_arena_mark(run->device)};
}

void qie_run_release(const qie_run *run, qie_run_mark mark) {
    qie_arena_release(run->arena, mark.host);
    qie_arena_release(run->device, mark.device);
}

qie_status qie_run_stage(const qie_run *run, void *device, size_t bytes, void **host,
                         qie_error *err) {
    *host = device;
    return run->compute->mem ? alloc_from(run->arena, bytes, host, err) : QIE_OK;
}

void qie_run_commit(const qie_run *run, void *device, const void *host, size_t bytes) {
    if (run->compute->mem)
        run->compute->mem->upload(run->compute, device, host, bytes);
}

qie_status qie_run_lend(const qie_run *run, const void *host, size_t bytes, const void **device,
                        qie_error *err) {
    *device = host;
    if (!run->compute->mem)
        return QIE_OK;
    void *p;
    QIE_TRY(alloc_from(run->device, bytes, &p, err));
    run->compute->mem->upload(run->compute, p, host, bytes);
    *device = p;
    return QIE_OK;
}

qie_status qie_run_result(const qie_run *run, void *host, size_t bytes, void **device,
                          qie_error *err) {
    *device = host;
    return run->compute->mem ? alloc_from(run->device, bytes, device, err) : QIE_OK;
}

qie_status qie_run_fetch(const qie_run *run, void *host, const void *device, size_t bytes,
                         qie_error *err) {
    const qie_mem_ops *mem = run->compute->mem;
    if (!mem)
        return QIE_OK;
    mem->download(run->compute, host, device, bytes);
    return mem->check(run->compute, err);
}

qie_status qie_run_view(const qie_run *run, const void *device, size_t bytes, const void **host,
                        qie_error *err) {
    *host = device;
    if (!run->compute->mem)
        return QIE_OK;
    void *p;
    QIE_TRY(alloc_from(run->arena, bytes, &p, err));
    *host = p;
    return qie_run_fetch(run, p, device, bytes, err);
}

void qie_run_put(const qie_run *run, void *device, const void *host, size_t bytes) {
    if (run->compute->mem)
        run->compute->mem->upload(run->compute, device, host, bytes);
    else
        memcpy(device, host, bytes);
}

void qie_run_zero(const qie_run *run, void *device, size_t bytes) {
    if (run->compute->mem)
        run->compute->mem->zero(run->compute, device, bytes);
    else
        memset(device, 0, bytes);
}

void qie_run_share(const qie_run *run, const void *device, size_t bytes) {
    if (run->compute->mem)
        run->compute->mem->share(run->compute, device, bytes);
}

void qie_run_group(const qie_run *run, const qie_weight_group *group, const qie_weight_group *next,
                   size_t n_live, const qie_range *live) {
    if (run->compute->mem)
        run->compute->mem->begin_group(run->compute, group, live, n_live, next);
}

void qie_run_observe(const qie_run *run, const char *name, const float *device, int n_dims,
                     const int64_t *shape) {
    if (!qie_observer_wants(run->observer, name))
        return;
    if (!run->compute->mem) {
        qie_observe_f32(run->observer, name, device, n_dims, shape);
        return;
    }
    size_t n = sizeof(float);
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    float *host = malloc(n ? n : 1);
    if (host) {
        run->compute->mem->download(run->compute, host, device, n);
        qie_observe_f32(run->observer, name, host, n_dims, shape);
    }
    free(host);
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
    const qie_tensor *t;
    snprintf(full, sizeof full, "%s.weight", name);
    QIE_TRY(qie_weights_need_linear(w, full, n, k, &t, err));
    out->w = (qie_wmat){t->data, t->dtype, n, k, t->scale, t->n_scale};
    out->b = (qie_vec){NULL, QIE_F32, 0};
    out->int8 = out->fp8 = false;
    out->lowrank = NULL;
    out->n_lowrank = 0;
    if (!bias)
        return QIE_OK;
    snprintf(full, sizeof full, "%s.bias", name);
    return qie_bind_vec(w, full, n, &out->b, err);
}

qie_linear qie_linear_rows(const qie_linear *l, int64_t from, int64_t n) {
    qie_linear part = *l;
    part.w.data =
        (const unsigned char *)l->w.data + (size_t)from * qie_dtype_row_bytes(l->w.dtype, l->w.k);
    part.w.n = n;
    if (l->w.scale && l->w.n_scale > 1) {
        part.w.scale = l->w.scale + from;
        part.w.n_scale = n;
    }
    if (l->b.data)
        part.b =
            (qie_vec){(const unsigned char *)l->b.data + (size_t)from * qie_dtype_size(l->b.dtype),
                      l->b.dtype, n};
    return part;
}

/* Stored integers are multiplied as such where that is faster, but for runs in full precision. */
static bool takes_blocks(const qie_run *run, const qie_linear *l) {
    return l->int8 && run->compute->int8_blocks && (run->int8 || run->act == QIE_BF16);
}

void qie_run_linear(const qie_run *run, qie_mat x, const qie_linear *l, qie_act act,
                    qie_store store, qie_mat dst) {
    qie_linear_args a = {.x = x,
                         .w = l->w,
                         .bias = l->b,
                         .lowrank = l->lowrank,
                         .n_lowrank = l->n_lowrank,
                         .lowrank_room = run->lowrank_room,
                         .act = act,
                         .store = store,
                         .split = x.rows,
                         .dst = dst,
                         .int8 = run->int8 && l->int8,
                         .int8_blocks = takes_blocks(run, l),
                         .as_many = run->as_many,
                         .fp8 = l->fp8};
    run->compute->ops.linear(run->compute, &a);
}

void qie_run_linear_gated(const qie_run *run, qie_mat x, const qie_linear *l, const float *gate0,
                          const float *gate1, int64_t split, qie_mat dst,
                          const qie_layer_norm_args *then) {
    qie_linear_args a = {.x = x,
                         .w = l->w,
                         .bias = l->b,
                         .lowrank = l->lowrank,
                         .n_lowrank = l->n_lowrank,
                         .lowrank_room = run->lowrank_room,
                         .store = QIE_STORE_GATED_ADD,
                         .gate = {gate0, gate1},
                         .split = split,
                         .dst = dst,
                         .int8 = run->int8 && l->int8,
                         .int8_blocks = takes_blocks(run, l),
                         .as_many = run->as_many,
                         .fp8 = l->fp8};
    const qie_ops *ops = &run->compute->ops;
    if (then && ops->linear_norm)
        ops->linear_norm(run->compute, &a, then);
    else {
        ops->linear(run->compute, &a);
        if (then)
            ops->layer_norm(run->compute, then);
    }
}

void qie_linear_prefetch(const qie_linear *l) {
    qie_weights_prefetch(l->w.data, (size_t)l->w.n * qie_dtype_row_bytes(l->w.dtype, l->w.k));
    for (size_t i = 0; i < l->n_lowrank; i++) {
        const qie_wmat *m[2] = {&l->lowrank[i].down, &l->lowrank[i].up};
        for (int k = 0; k < 2; k++)
            qie_weights_prefetch(m[k]->data,
                                 (size_t)m[k]->n * qie_dtype_row_bytes(m[k]->dtype, m[k]->k));
    }
}

void qie_linear_let_go(const qie_linear *l) {
    qie_weights_let_go(l->w.data, (size_t)l->w.n * qie_dtype_row_bytes(l->w.dtype, l->w.k));
}

void qie_group_add(qie_weight_group *g, const void *data, size_t n_bytes) {
    if (!data || !n_bytes)
        return;
    /* A span that cannot be noted is found missing by the device and copied at each use. */
    qie_weight_span *s = realloc(g->spans, (g->n_spans + 1) * sizeof *s);
    if (!s)
        return;
    g->spans = s;
    s[g->n_spans++] = (qie_weight_span){data, n_bytes};
    g->n_bytes += n_bytes;
}

void qie_group_add_linear(qie_weight_group *g, const qie_linear *l) {
    qie_group_add(g, l->w.data, (size_t)l->w.n * qie_dtype_row_bytes(l->w.dtype, l->w.k));
    qie_group_add(g, l->w.scale, sizeof(float) * (size_t)l->w.n_scale);
    qie_group_add_vec(g, l->b);
}

void qie_group_add_vec(qie_weight_group *g, qie_vec v) {
    qie_group_add(g, v.data, (size_t)v.n * qie_dtype_size(v.dtype));
}

void qie_group_release(qie_weight_group *g) {
    free(g->spans);
    memset(g, 0, sizeof *g);
}
