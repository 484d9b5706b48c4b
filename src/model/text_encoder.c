#include "model/text_encoder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace.h"
#include "model/rope.h"
#include "model/text_encoder_parts.h"

static qie_status bind_layer(const qie_text_config *t, const qie_weights *w, int i,
                             qie_language_layer *l, qie_error *err) {
    int64_t h = t->hidden_size, kv = (int64_t)t->num_key_value_heads * t->head_dim;
    char n[96];
#define NAME(suffix) (snprintf(n, sizeof n, "model.layers.%d." suffix, i), n)
    QIE_TRY(qie_bind_vec(w, NAME("input_layernorm.weight"), h, &l->input_norm, err));
    QIE_TRY(qie_bind_vec(w, NAME("post_attention_layernorm.weight"), h, &l->post_norm, err));
    QIE_TRY(qie_bind_linear(w, NAME("self_attn.q_proj"), h, h, true, &l->q, err));
    QIE_TRY(qie_bind_linear(w, NAME("self_attn.k_proj"), kv, h, true, &l->k, err));
    QIE_TRY(qie_bind_linear(w, NAME("self_attn.v_proj"), kv, h, true, &l->v, err));
    QIE_TRY(qie_bind_linear(w, NAME("self_attn.o_proj"), h, h, false, &l->o, err));
    QIE_TRY(
        qie_bind_linear(w, NAME("mlp.gate_proj"), t->intermediate_size, h, false, &l->gate, err));
    QIE_TRY(qie_bind_linear(w, NAME("mlp.up_proj"), t->intermediate_size, h, false, &l->up, err));
    QIE_TRY(
        qie_bind_linear(w, NAME("mlp.down_proj"), h, t->intermediate_size, false, &l->down, err));
#undef NAME
    return QIE_OK;
}

static void make_groups(qie_text_encoder *e) {
    e->fixed.kind = e->vision.fixed.kind = QIE_GROUP_TEXT;
    qie_group_add_vec(&e->fixed, e->norm);
    qie_group_add_linear(&e->vision.fixed, &e->vision.patch_embed);
    qie_group_add_linear(&e->vision.fixed, &e->vision.merge0);
    qie_group_add_linear(&e->vision.fixed, &e->vision.merge2);
    qie_group_add_vec(&e->vision.fixed, e->vision.ln_q);
    for (int i = 0; i < e->v.depth; i++) {
        qie_vision_block *b = &e->vision.blocks[i];
        const qie_linear *list[] = {&b->qkv[0], &b->qkv[1], &b->qkv[2], &b->proj,
                                    &b->gate,   &b->up,     &b->down};
        b->group.kind = QIE_GROUP_TEXT;
        b->group.index = i;
        for (size_t k = 0; k < sizeof list / sizeof *list; k++)
            qie_group_add_linear(&b->group, list[k]);
        qie_group_add_vec(&b->group, b->norm1);
        qie_group_add_vec(&b->group, b->norm2);
    }
    for (int i = 0; i < e->t.num_hidden_layers; i++) {
        qie_language_layer *l = &e->layers[i];
        const qie_linear *list[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        l->group.kind = QIE_GROUP_TEXT;
        l->group.index = i;
        for (size_t k = 0; k < sizeof list / sizeof *list; k++)
            qie_group_add_linear(&l->group, list[k]);
        qie_group_add_vec(&l->group, l->input_norm);
        qie_group_add_vec(&l->group, l->post_norm);
    }
}

size_t qie_text_encoder_groups(qie_text_encoder *e, qie_weight_group **out) {
    size_t n = 0;
    out[n++] = &e->vision.fixed;
    for (int i = 0; i < e->v.depth; i++)
        out[n++] = &e->vision.blocks[i].group;
    for (int i = 0; i < e->t.num_hidden_layers; i++)
        out[n++] = &e->layers[i].group;
    out[n++] = &e->fixed;
    return n;
}

qie_status qie_text_encoder_open(const qie_text_config *t, const qie_vision_config *v,
                                 const qie_weights *w, qie_text_encoder **out, qie_error *err) {
    *out = NULL;
    qie_status st = QIE_OK;
    qie_text_encoder *e = calloc(1, sizeof *e);
    if (e) {
        e->t = *t;
        e->v = *v;
        e->layers = calloc((size_t)t->num_hidden_layers, sizeof *e->layers);
        e->vision.blocks = calloc((size_t)v->depth, sizeof *e->vision.blocks);
    }
    if (!e || !e->layers || !e->vision.blocks) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    qie_linear embed;
    QIE_TRY_GOTO(qie_bind_linear(w, "model.embed_tokens", t->vocab_size, t->hidden_size, false,
                                 &embed, err));
    e->embed_tokens = embed.w;
    QIE_TRY_GOTO(qie_bind_vec(w, "model.norm.weight", t->hidden_size, &e->norm, err));
    for (int i = 0; i < t->num_hidden_layers; i++)
        QIE_TRY_GOTO(bind_layer(t, w, i, &e->layers[i], err));
    QIE_TRY_GOTO(qie_vision_bind(v, w, &e->vision, err));
    make_groups(e);
    *out = e;
    return QIE_OK;
fail:
    qie_text_encoder_close(e);
    return st;
}

void qie_text_encoder_each_linear(qie_text_encoder *e,
                                  void (*fn)(void *arg, const char *name, qie_linear *l),
                                  void *arg) {
    char n[96];
    for (int i = 0; i < e->t.num_hidden_layers; i++) {
        qie_language_layer *l = &e->layers[i];
        const struct {
            const char *name;
            qie_linear *l;
        } list[] = {{"self_attn.q_proj", &l->q}, {"self_attn.k_proj", &l->k},
                    {"self_attn.v_proj", &l->v}, {"self_attn.o_proj", &l->o},
                    {"mlp.gate_proj", &l->gate}, {"mlp.up_proj", &l->up},
                    {"mlp.down_proj", &l->down}};
        for (size_t k = 0; k < sizeof list / sizeof *list; k++) {
            snprintf(n, sizeof n, "model.layers.%d.%s", i, list[k].name);
            fn(arg, n, list[k].l);
        }
    }
    for (int i = 0; i < e->v.depth; i++) {
        qie_vision_block *b = &e->vision.blocks[i];
        const struct {
            const char *name;
            qie_linear *l;
        } list[] = {{"attn.q", &b->qkv[0]},      {"attn.k", &b->qkv[1]},
                    {"attn.v", &b->qkv[2]},      {"attn.proj", &b->proj},
                    {"mlp.gate_proj", &b->gate}, {"mlp.up_proj", &b->up},
                    {"mlp.down_proj", &b->down}};
        for (size_t k = 0; k < sizeof list / sizeof *list; k++) {
            snprintf(n, sizeof n, "visual.blocks.%d.%s", i, list[k].name);
            fn(arg, n, list[k].l);
        }
    }
    fn(arg, "visual.merger.mlp.0", &e->vision.merge0);
    fn(arg, "visual.merger.mlp.2", &e->vision.merge2);
}

void qie_text_encoder_close(qie_text_encoder *e) {
    if (!e)
        return;
    for (int i = 0; e->layers && i < e->t.num_hidden_layers; i++)
        qie_group_release(&e->layers[i].group);
    for (int i = 0; e->vision.blocks && i < e->v.depth; i++)
        qie_group_release(&e->vision.blocks[i].group);
    qie_group_release(&e->vision.fixed);
    qie_group_release(&e->fixed);
    free(e->layers);
    free(e->vision.blocks);
    free(e);
}

/* Position triples (t, h, w) of every token: text counts on, a picture spans a grid
 * (docs/MODEL.md). Sequential: what transformers 5 computes when it is not told which tokens are
 * pictures. */
static void token_positions(const qie_text_encoder *e, const qie_size_plan *sizes,
                            const int32_t *ids, int64_t n, int32_t pad, qie_positions mode,
                            int32_t *triples) {
    int cell = e->v.patch_size * e->v.spatial_merge_size, i_image = 0;
    int32_t next = 0;
    for (int64_t i = 0; i < n;) {
        if (ids[i] != pad || mode == QIE_POSITIONS_SEQUENTIAL || i_image >= sizes->n_images) {
            triples[i * 3] = triples[i * 3 + 1] = triples[i * 3 + 2] = next++;
            i++;
            continue;
        }
        int32_t gh = sizes->images[i_image].grid_px.h / cell,
                gw = sizes->images[i_image].grid_px.w / cell;
        for (int32_t y = 0; y < gh; y++)
            for (int32_t x = 0; x < gw && i < n; x++, i++) {
                triples[i * 3] = next;
                triples[i * 3 + 1] = next + y;
                triples[i * 3 + 2] = next + x;
            }
        next += gh > gw ? gh : gw;
        i_image++;
    }
}

typedef struct language_buffers {
    int32_t *triples;
    float *cos, *sin;
    qie_mat x, h, q, k, v, gate;
} language_buffers;

static qie_status allocate(const qie_text_config *t, const qie_run *run, int64_t n,
                           language_buffers *b, qie_error *err) {
    void *p;
    size_t table = sizeof(float) * (size_t)n * (size_t)(t->head_dim / 2);
    int64_t kv = (int64_t)t->num_key_value_heads * t->head_dim;
    QIE_TRY(qie_run_alloc_host(run, sizeof(int32_t) * 3 * (size_t)n, &p, err));
    b->triples = p;
    QIE_TRY(qie_run_alloc(run, table, &p, err));
    b->cos = p;
    QIE_TRY(qie_run_alloc(run, table, &p, err));
    b->sin = p;
    QIE_TRY(qie_run_mat(run, QIE_F32, n, t->hidden_size, &b->x, err));
    QIE_TRY(qie_run_mat(run, run->act, n, t->hidden_size, &b->h, err));
    QIE_TRY(qie_run_mat(run, run->act, n, t->hidden_size, &b->q, err));
    QIE_TRY(qie_run_mat(run, run->act, n, kv, &b->k, err));
    QIE_TRY(qie_run_mat(run, run->act, n, kv, &b->v, err));
    return qie_run_mat(run, run->act, n, t->intermediate_size, &b->gate, err);
}

int64_t qie_language_start(const qie_language_prefix *prefix) {
    int64_t start = 0;
    for (int i = 0; i < QIE_PROMPT_PARTS && prefix->parts[i].filled; i++)
        start += prefix->parts[i].n;
    return start;
}

/* Store the first rows of a layer's keys and values, or bring them back. */
static void exchange_prefix(const qie_run *run, const qie_language_prefix *prefix, int i_layer,
                            const language_buffers *b) {
    int64_t from = 0;
    for (int i = 0; i < QIE_PROMPT_PARTS; i++) {
        const qie_language_part *p = &prefix->parts[i];
        size_t bytes = (size_t)(p->n * b->k.cols) * qie_dtype_size(b->k.dtype);
        unsigned char *kept = (unsigned char *)p->data + bytes * 2 * (size_t)i_layer;
        void *rows[2] = {qie_mat_rows(b->k, from, p->n).data, qie_mat_rows(b->v, from, p->n).data};
        for (int k = 0; k < 2 && bytes; k++, kept += bytes)
            run->compute->ops.copy(run->compute, p->filled ? rows[k] : kept,
                                   p->filled ? kept : rows[k], bytes);
        from += p->n;
    }
}

/* The weights of the layer that runs next: they come from disk while the one before computes. */
static void prefetch_layer(const qie_text_encoder *e, int i_layer) {
    if (i_layer >= e->t.num_hidden_layers)
        return;
    const qie_language_layer *l = &e->layers[i_layer];
    const qie_linear *list[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        qie_linear_prefetch(list[i]);
}

/* Rows [from, n) of b->x through one layer, and rows [start, from) into its keys and values; those
 * of the rows before come from the prefix. */
static void language_layer(const qie_text_config *t, const qie_run *run,
                           const qie_language_layer *l, int i_layer,
                           const qie_language_prefix *prefix, int64_t start, int64_t from,
                           const language_buffers *all) {
    const qie_ops *ops = &run->compute->ops;
    float eps = (float)t->rms_norm_eps;
    int64_t n = all->x.rows, half = t->head_dim / 2;
    language_buffers rest = *all, *b = &rest;
    qie_mat h = qie_mat_rows(all->h, start, n - start);
    qie_mat *early[] = {&b->k, &b->v}, *late[] = {&b->x, &b->h, &b->q, &b->gate};
    for (size_t i = 0; i < sizeof early / sizeof *early; i++)
        *early[i] = qie_mat_rows(*early[i], start, n - start);
    for (size_t i = 0; i < sizeof late / sizeof *late; i++)
        *late[i] = qie_mat_rows(*late[i], from, n - from);
    ops->rms_norm(run->compute, qie_mat_rows(all->x, start, n - start), l->input_norm, eps, h);
    qie_run_linear(run, b->h, &l->q, QIE_ACT_NONE, QIE_STORE_SET, b->q);
    qie_run_linear(run, h, &l->k, QIE_ACT_NONE, QIE_STORE_SET, b->k);
    qie_run_linear(run, h, &l->v, QIE_ACT_NONE, QIE_STORE_SET, b->v);
    qie_qk_norm_rope_args r = {.x = b->q,
                               .n_heads = t->num_attention_heads,
                               .head_dim = t->head_dim,
                               .cos = b->cos + from * half,
                               .sin = b->sin + from * half};
    ops->qk_norm_rope(run->compute, &r);
    r.x = b->k;
    r.cos = b->cos + start * half;
    r.sin = b->sin + start * half;
    r.n_heads = t->num_key_value_heads;
    ops->qk_norm_rope(run->compute, &r);
    exchange_prefix(run, prefix, i_layer, all);
    b->k = all->k;
    b->v = all->v;
    qie_attention_args a = {.q = b->q,
                            .k = b->k,
                            .v = b->v,
                            .n_heads = t->num_attention_heads,
                            .n_kv_heads = t->num_key_value_heads,
                            .head_dim = t->head_dim,
                            .scale = 1.0f / sqrtf((float)t->head_dim),
                            .causal = true,
                            .dst = b->h};
    ops->attention(run->compute, &a);
    qie_run_linear(run, b->h, &l->o, QIE_ACT_NONE, QIE_STORE_ADD, b->x);
    ops->rms_norm(run->compute, b->x, l->post_norm, eps, b->h);
    qie_run_linear(run, b->h, &l->gate, QIE_ACT_SILU, QIE_STORE_SET, b->gate);
    qie_run_linear(run, b->h, &l->up, QIE_ACT_NONE, QIE_STORE_MUL, b->gate);
    qie_run_linear(run, b->gate, &l->down, QIE_ACT_NONE, QIE_STORE_ADD, b->x);
}

/* Rows of the picture tokens, which come in runs, from the vision tower's features. */
static void place_features(const qie_text_encoder *e, const qie_run *run, const int32_t *ids,
                           int64_t start, int64_t n, int32_t pad, const float *features, float *x) {
    int64_t width = e->t.hidden_size;
    for (int64_t i = start; i < n;) {
        int64_t end = i;
        while (end < n && ids[end] == pad)
            end++;
        if (end == i) {
            i++;
            continue;
        }
        qie_run_put(run, x + i * width, features, sizeof(float) * (size_t)((end - i) * width));
        features += (end - i) * width;
        i = end;
    }
}

static qie_status fill_tables(const qie_text_encoder *e, const qie_run *run,
                              const qie_size_plan *sizes, const int32_t *ids, int64_t n,
                              int32_t pad, qie_positions mode, language_buffers *b,
                              qie_error *err) {
    size_t bytes = sizeof(float) * (size_t)n * (size_t)(e->t.head_dim / 2);
    void *cosine, *sine;
    qie_run_mark mark = qie_run_mark_get(run);
    token_positions(e, sizes, ids, n, pad, mode, b->triples);
    QIE_TRY(qie_run_stage(run, b->cos, bytes, &cosine, err));
    QIE_TRY(qie_run_stage(run, b->sin, bytes, &sine, err));
    qie_rope_language(&e->t, b->triples, n, cosine, sine);
    qie_run_commit(run, b->cos, cosine, bytes);
    qie_run_commit(run, b->sin, sine, bytes);
    qie_run_release(run, mark);
    return QIE_OK;
}

qie_status qie_language_encode(qie_text_encoder *e, const qie_run *run, const qie_size_plan *sizes,
                               const int32_t *ids, int64_t n_ids, int32_t image_pad_id,
                               const float *features, int64_t n_features, qie_positions positions,
                               qie_language_prefix *prefix, int64_t n_drop, float *hidden_last,
                               qie_error *err) {
    const qie_text_config *t = &e->t;
    int64_t n_pads = 0, start = qie_language_start(prefix);
    int64_t asked = start > n_drop ? start : n_drop; /* first row that the last layer finishes */
    for (int64_t i = 0; i < n_ids; i++) {
        QIE_FAIL_IF(ids[i] < 0 || ids[i] >= t->vocab_size, QIE_E_CORRUPT, err, "tokenizer",
                    "the tokenizer gives id %d, the text encoder's vocabulary has %d entries",
                    ids[i], t->vocab_size);
        n_pads += i >= start && ids[i] == image_pad_id;
    }
    QIE_FAIL_IF(n_pads != n_features, QIE_E_INTERNAL, err, NULL,
                "%lld picture tokens in the prompt for %lld picture features", (long long)n_pads,
                (long long)n_features);
    qie_run own = *run; /* the rows of a prompt are the same with and without a prefix */
    own.as_many = true;
    run = &own;
    qie_run_mark mark = qie_run_mark_get(run);
    language_buffers b;
    QIE_TRY(allocate(t, run, n_ids, &b, err));
    qie_run_group(run, &e->layers[0].group, NULL, 0, NULL);
    run->compute->ops.embed(run->compute, e->embed_tokens, ids + start,
                            qie_mat_rows(b.x, start, n_ids - start));
    place_features(e, run, ids, start, n_ids, image_pad_id, features, b.x.data);
    QIE_TRY(fill_tables(e, run, sizes, ids, n_ids, image_pad_id, positions, &b, err));
    size_t row = sizeof(float) * (size_t)t->hidden_size;
    const qie_range live = {b.x.data, row * (size_t)n_ids};
    for (int i = 0; i < t->num_hidden_layers; i++) {
        QIE_TRY(qie_run_check(run, err));
        double started = qie_now_s();
        prefetch_layer(e, i + 1);
        qie_run_group(run, &e->layers[i].group,
                      i + 1 < t->num_hidden_layers ? &e->layers[i + 1].group : NULL, 1, &live);
        language_layer(t, run, &e->layers[i], i, prefix, start,
                       i + 1 < t->num_hidden_layers ? start : asked, &b);
        qie_trace_span("block", started, "language layer %d", i + 1);
    }
    for (int i = 0; i < QIE_PROMPT_PARTS; i++)
        prefix->parts[i].filled = true;
    qie_run_group(run, &e->fixed, NULL, 1, &live);
    float *to = hidden_last + asked * t->hidden_size;
    size_t bytes = row * (size_t)(n_ids - asked);
    void *out;
    QIE_TRY(qie_run_result(run, to, bytes, &out, err));
    run->compute->ops.rms_norm(run->compute, qie_mat_rows(b.x, asked, n_ids - asked), e->norm,
                               (float)t->rms_norm_eps,
                               qie_mat_make(out, QIE_F32, n_ids - asked, t->hidden_size));
    QIE_TRY(qie_run_fetch(run, to, out, bytes, err));
    qie_run_release(run, mark);
    return QIE_OK;
}
