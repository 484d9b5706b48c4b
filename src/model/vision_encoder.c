/* The vision tower: windowed attention over patches, then the merger to the language model's width.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace.h"
#include "model/rope.h"
#include "model/text_encoder_parts.h"

#define VISION_EPS 1e-6f /* fixed in transformers' modeling_qwen2_5_vl.py */

/* Released files fuse query, key and value, llama.cpp's keep them apart. */
static qie_status bind_qkv(const qie_weights *w, int block, int64_t h, qie_linear qkv[3],
                           qie_error *err) {
    char n[96];
    qie_linear fused;
    snprintf(n, sizeof n, "visual.blocks.%d.attn.q.weight", block);
    bool apart = qie_weights_find(w, n) != NULL;
    snprintf(n, sizeof n, "visual.blocks.%d.attn.qkv", block);
    if (!apart)
        QIE_TRY(qie_bind_linear(w, n, 3 * h, h, true, &fused, err));
    for (int i = 0; i < 3; i++) {
        snprintf(n, sizeof n, "visual.blocks.%d.attn.%c", block, "qkv"[i]);
        if (apart)
            QIE_TRY(qie_bind_linear(w, n, h, h, true, &qkv[i], err));
        else
            qkv[i] = qie_linear_rows(&fused, i * h, h);
    }
    return QIE_OK;
}

qie_status qie_vision_bind(const qie_vision_config *v, const qie_weights *w, qie_vision *out,
                           qie_error *err) {
    int64_t h = v->hidden_size, m = (int64_t)v->spatial_merge_size * v->spatial_merge_size * h;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    QIE_TRY(qie_bind_linear(w, "visual.patch_embed.proj", h, patch, false, &out->patch_embed, err));
    QIE_TRY(qie_bind_vec(w, "visual.merger.ln_q.weight", h, &out->ln_q, err));
    QIE_TRY(qie_bind_linear(w, "visual.merger.mlp.0", m, m, true, &out->merge0, err));
    QIE_TRY(
        qie_bind_linear(w, "visual.merger.mlp.2", v->out_hidden_size, m, true, &out->merge2, err));
    for (int b = 0; b < v->depth; b++) {
        qie_vision_block *k = &out->blocks[b];
        char n[96];
#define NAME(suffix) (snprintf(n, sizeof n, "visual.blocks.%d." suffix, b), n)
        QIE_TRY(qie_bind_vec(w, NAME("norm1.weight"), h, &k->norm1, err));
        QIE_TRY(qie_bind_vec(w, NAME("norm2.weight"), h, &k->norm2, err));
        QIE_TRY(bind_qkv(w, b, h, k->qkv, err));
        QIE_TRY(qie_bind_linear(w, NAME("attn.proj"), h, h, true, &k->proj, err));
        QIE_TRY(qie_bind_linear(w, NAME("mlp.gate_proj"), v->intermediate_size, h, true, &k->gate,
                                err));
        QIE_TRY(
            qie_bind_linear(w, NAME("mlp.up_proj"), v->intermediate_size, h, true, &k->up, err));
        QIE_TRY(qie_bind_linear(w, NAME("mlp.down_proj"), h, v->intermediate_size, true, &k->down,
                                err));
#undef NAME
    }
    return QIE_OK;
}

size_t qie_vision_windows(const qie_vision_config *v, const qie_size_plan *sizes, int32_t *index,
                          int64_t *bounds) {
    int merge = v->spatial_merge_size, unit = merge * merge;
    int side = v->window_size / v->patch_size / merge; /* merged cells per window side */
    int64_t base = 0, at = 0;
    size_t n_windows = 0;
    bounds[0] = 0;
    for (int i = 0; i < sizes->n_images; i++) {
        int gh = sizes->images[i].grid_px.h / v->patch_size / merge;
        int gw = sizes->images[i].grid_px.w / v->patch_size / merge;
        for (int wy = 0; wy < gh; wy += side)
            for (int wx = 0; wx < gw; wx += side) {
                for (int y = wy; y < gh && y < wy + side; y++)
                    for (int x = wx; x < gw && x < wx + side; x++)
                        index[at++] = (int32_t)(base + (int64_t)y * gw + x);
                bounds[++n_windows] = at * unit;
            }
        base += (int64_t)gh * gw;
    }
    return n_windows;
}

/* (row, col) of each patch of the tower's order. */
static void patch_positions(const qie_vision_config *v, const qie_size_plan *sizes,
                            const int32_t *index, int32_t *rows_cols) {
    int merge = v->spatial_merge_size, unit = merge * merge;
    int64_t base = 0, at = 0;
    for (int i = 0; i < sizes->n_images; i++) {
        int gw = sizes->images[i].grid_px.w / v->patch_size / merge;
        for (int t = 0; t < sizes->images[i].n_vision_tokens; t++, at++) {
            int cell = (int)(index[at] - base);
            for (int p = 0; p < unit; p++) {
                rows_cols[(at * unit + p) * 2] = (int32_t)(cell / gw * merge + p / merge);
                rows_cols[(at * unit + p) * 2 + 1] = (int32_t)(cell % gw * merge + p % merge);
            }
        }
        base += sizes->images[i].n_vision_tokens;
    }
}

static void vision_block(const qie_vision_config *v, const qie_run *run, const qie_vision_block *b,
                         qie_mat x, qie_mat h, qie_mat qkv, qie_mat gate, const float *cos,
                         const float *sin, const int64_t *bounds, size_t n_bounds) {
    const qie_ops *ops = &run->compute->ops;
    int heads = v->num_heads, head_dim = v->hidden_size / heads;
    ops->rms_norm(run->compute, x, b->norm1, VISION_EPS, h);
    qie_mat part[3];
    for (int i = 0; i < 3; i++) {
        part[i] = qkv;
        part[i].cols = v->hidden_size;
        part[i].data = (unsigned char *)qkv.data +
                       (size_t)i * (size_t)v->hidden_size * qie_dtype_size(qkv.dtype);
        qie_run_linear(run, h, &b->qkv[i], QIE_ACT_NONE, QIE_STORE_SET, part[i]);
    }
    for (int i = 0; i < 2; i++) {
        qie_qk_norm_rope_args r = {
            .x = part[i], .n_heads = heads, .head_dim = head_dim, .cos = cos, .sin = sin};
        ops->qk_norm_rope(run->compute, &r);
    }
    qie_attention_args a = {.q = part[0],
                            .k = part[1],
                            .v = part[2],
                            .n_heads = heads,
                            .n_kv_heads = heads,
                            .head_dim = head_dim,
                            .scale = 1.0f / sqrtf((float)head_dim),
                            .segments = bounds,
                            .n_segments = n_bounds,
                            .dst = h};
    ops->attention(run->compute, &a);
    qie_run_linear(run, h, &b->proj, QIE_ACT_NONE, QIE_STORE_ADD, x);
    ops->rms_norm(run->compute, x, b->norm2, VISION_EPS, h);
    qie_run_linear(run, h, &b->gate, QIE_ACT_SILU, QIE_STORE_SET, gate);
    qie_run_linear(run, h, &b->up, QIE_ACT_NONE, QIE_STORE_MUL, gate);
    qie_run_linear(run, gate, &b->down, QIE_ACT_NONE, QIE_STORE_ADD, x);
}

typedef struct vision_buffers {
    int32_t *index, *rows_cols;
    int64_t *bounds, *whole;
    size_t n_windows;
    float *cos, *sin, *ordered, *merged;
    qie_mat x, h, qkv, gate, wide;
} vision_buffers;

static qie_status allocate(const qie_vision_config *v, const qie_run *run, const qie_size_plan *s,
                           vision_buffers *b, qie_error *err) {
    int64_t p = s->n_patches, t = s->n_vision_tokens, h = v->hidden_size;
    int64_t unit = (int64_t)v->spatial_merge_size * v->spatial_merge_size;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    size_t half = (size_t)(h / v->num_heads / 2);
#define GET_FROM(alloc, field, bytes)            \
    do {                                         \
        void *mem;                               \
        QIE_TRY(alloc(run, (bytes), &mem, err)); \
        b->field = mem;                          \
    } while (0)
#define GET(field, bytes) GET_FROM(qie_run_alloc, field, bytes)
#define GET_HOST(field, bytes) GET_FROM(qie_run_alloc_host, field, bytes)
    GET_HOST(index, sizeof(int32_t) * (size_t)t);
    GET_HOST(rows_cols, sizeof(int32_t) * (size_t)p * 2);
    GET_HOST(bounds, sizeof(int64_t) * (size_t)(t + 1));
    GET_HOST(whole, sizeof(int64_t) * (QIE_MAX_PICTURES + 1));
    GET(cos, sizeof(float) * (size_t)p * half);
    GET(sin, sizeof(float) * (size_t)p * half);
    GET(ordered, sizeof(float) * (size_t)(p * patch));
    GET(merged, sizeof(float) * (size_t)(t * v->out_hidden_size));
#undef GET
#undef GET_HOST
#undef GET_FROM
    QIE_TRY(qie_run_mat(run, QIE_F32, p, h, &b->x, err));
    QIE_TRY(qie_run_mat(run, run->act, p, h, &b->h, err));
    QIE_TRY(qie_run_mat(run, run->act, p, 3 * h, &b->qkv, err));
    QIE_TRY(qie_run_mat(run, run->act, p, v->intermediate_size, &b->gate, err));
    return qie_run_mat(run, run->act, t, unit * h, &b->wide, err);
}

/* Patches in the tower's order, and the rotary tables of their places. */
static qie_status fill_inputs(const qie_vision_config *v, const qie_run *run,
                              const qie_size_plan *sizes, const float *patches,
                              const vision_buffers *b, qie_error *err) {
    int64_t unit = (int64_t)v->spatial_merge_size * v->spatial_merge_size;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    size_t group = sizeof(float) * (size_t)(unit * patch);
    size_t all = group * (size_t)sizes->n_vision_tokens;
    size_t table =
        sizeof(float) * (size_t)sizes->n_patches * (size_t)(v->hidden_size / v->num_heads / 2);
    void *cosine, *sine, *ordered;
    qie_run_mark mark = qie_run_mark_get(run);
    QIE_TRY(qie_run_stage(run, b->cos, table, &cosine, err));
    QIE_TRY(qie_run_stage(run, b->sin, table, &sine, err));
    QIE_TRY(qie_run_stage(run, b->ordered, all, &ordered, err));
    patch_positions(v, sizes, b->index, b->rows_cols);
    qie_rope_vision(v, b->rows_cols, sizes->n_patches, cosine, sine);
    for (int64_t t = 0; t < sizes->n_vision_tokens; t++)
        memcpy((float *)ordered + t * unit * patch, patches + b->index[t] * unit * patch, group);
    qie_run_commit(run, b->cos, cosine, table);
    qie_run_commit(run, b->sin, sine, table);
    qie_run_commit(run, b->ordered, ordered, all);
    qie_run_release(run, mark);
    return QIE_OK;
}

qie_status qie_vision_encode(qie_text_encoder *e, const qie_run *run, const qie_size_plan *sizes,
                             const float *patches, float *features, qie_error *err) {
    const qie_vision_config *v = &e->v;
    const qie_vision *w = &e->vision;
    int64_t unit = (int64_t)v->spatial_merge_size * v->spatial_merge_size;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    qie_run_mark mark = qie_run_mark_get(run);
    vision_buffers b;
    QIE_TRY(allocate(v, run, sizes, &b, err));
    b.n_windows = qie_vision_windows(v, sizes, b.index, b.bounds);
    b.whole[0] = 0;
    for (int i = 0; i < sizes->n_images; i++)
        b.whole[i + 1] = b.whole[i] + sizes->images[i].n_patches;
    qie_run_group(run, &w->fixed, &w->blocks[0].group, 0, NULL);
    QIE_TRY(fill_inputs(v, run, sizes, patches, &b, err));
    qie_run_linear(run, qie_mat_make(b.ordered, QIE_F32, sizes->n_patches, patch), &w->patch_embed,
                   QIE_ACT_NONE, QIE_STORE_SET, b.x);
    const qie_range live = {b.x.data, sizeof(float) * (size_t)(sizes->n_patches * v->hidden_size)};
    for (int i = 0; i < v->depth; i++) {
        QIE_TRY(qie_run_check(run, err));
        double started = qie_now_s();
        bool full = false;
        for (int f = 0; f < v->n_fullatt; f++)
            full = full || v->fullatt_block_indexes[f] == i;
        qie_run_group(run, &w->blocks[i].group,
                      i + 1 < v->depth ? &w->blocks[i + 1].group : &w->fixed, 1, &live);
        vision_block(v, run, &w->blocks[i], b.x, b.h, b.qkv, b.gate, b.cos, b.sin,
                     full ? b.whole : b.bounds, full ? (size_t)sizes->n_images : b.n_windows);
        qie_trace_span("block", started, "vision layer %d", i + 1);
    }
    qie_run_group(run, &w->fixed, &e->layers[0].group, 1, &live);
    run->compute->ops.rms_norm(run->compute, b.x, w->ln_q, VISION_EPS, b.h);
    qie_mat grouped =
        qie_mat_make(b.h.data, b.h.dtype, sizes->n_vision_tokens, unit * v->hidden_size);
    qie_run_linear(run, grouped, &w->merge0, QIE_ACT_GELU_ERF, QIE_STORE_SET, b.wide);
    int64_t out = v->out_hidden_size;
    qie_run_linear(run, b.wide, &w->merge2, QIE_ACT_NONE, QIE_STORE_SET,
                   qie_mat_make(b.merged, QIE_F32, sizes->n_vision_tokens, out));
    const void *merged;
    QIE_TRY(qie_run_view(run, b.merged, sizeof(float) * (size_t)(sizes->n_vision_tokens * out),
                         &merged, err));
    int64_t shape[2] = {sizes->n_vision_tokens, out};
    qie_observe_f32(run->observer, "merger_out_window_order", merged, 2, shape);
    for (int64_t t = 0; t < sizes->n_vision_tokens; t++)
        memcpy(features + b.index[t] * out, (const float *)merged + t * out,
               sizeof(float) * (size_t)out);
    qie_run_release(run, mark);
    return QIE_OK;
}
