#include "model/transformer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace.h"
#include "model/rope.h"

#define EPS                                                                               \
    1e-6f /* every norm of this transformer: fixed in diffusers' transformer_qwenimage.py \
           */
#define TIME_CHANNELS 256

/* One of the two streams of a block. */
typedef struct stream {
    qie_linear mod, q, k, v, out, up, down;
    qie_vec norm_q, norm_k;
} stream;

typedef struct block {
    stream img, txt;
    qie_weight_group modulation, rest;
} block;

struct qie_transformer {
    qie_transformer_config c;
    qie_linear time1, time2, img_in, txt_in, norm_out, proj_out;
    qie_vec txt_norm;
    int64_t n_bytes; /* of all tensors */
    block *blocks;
    qie_weight_group fixed; /* everything outside the blocks */
};

static void group_stream(block *b, const stream *s) {
    const qie_linear *rest[] = {&s->q, &s->k, &s->v, &s->out, &s->up, &s->down};
    qie_group_add_linear(&b->modulation, &s->mod);
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        qie_group_add_linear(&b->rest, rest[i]);
    qie_group_add_vec(&b->rest, s->norm_q);
    qie_group_add_vec(&b->rest, s->norm_k);
}

static void make_groups(qie_transformer *t) {
    const qie_linear *fixed[] = {&t->time1,  &t->time2,    &t->img_in,
                                 &t->txt_in, &t->norm_out, &t->proj_out};
    t->fixed.kind = QIE_GROUP_FIXED;
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        qie_group_add_linear(&t->fixed, fixed[i]);
    qie_group_add_vec(&t->fixed, t->txt_norm);
    for (int i = 0; i < t->c.num_layers; i++) {
        block *b = &t->blocks[i];
        b->modulation.kind = QIE_GROUP_MODULATION;
        b->rest.kind = QIE_GROUP_BLOCK;
        b->modulation.index = b->rest.index = i;
        group_stream(b, &b->img);
        group_stream(b, &b->txt);
    }
}

size_t qie_transformer_groups(qie_transformer *t, qie_weight_group **out) {
    size_t n = 0;
    out[n++] = &t->fixed;
    for (int i = 0; i < t->c.num_layers; i++)
        out[n++] = &t->blocks[i].modulation;
    for (int i = 0; i < t->c.num_layers; i++)
        out[n++] = &t->blocks[i].rest;
    return n;
}

/* [image stream?][linears as in bind_stream, then the two norms] */
static const char *const STREAM_NAMES[2][9] = {
    {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "txt_mod.1",
     "txt_mlp.net.0.proj", "txt_mlp.net.2", "attn.norm_added_q.weight", "attn.norm_added_k.weight"},
    {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mod.1", "img_mlp.net.0.proj",
     "img_mlp.net.2", "attn.norm_q.weight", "attn.norm_k.weight"}};

static qie_status bind_stream(const qie_weights *w, const qie_transformer_config *c, int i_block,
                              bool image, stream *s, qie_error *err) {
    int64_t d = c->inner_dim;
    struct {
        qie_linear *l;
        int64_t n, k;
    } linears[7] = {{&s->q, d, d},       {&s->k, d, d},      {&s->v, d, d},       {&s->out, d, d},
                    {&s->mod, 6 * d, d}, {&s->up, 4 * d, d}, {&s->down, d, 4 * d}};
    char name[128];
    for (int i = 0; i < 9; i++) {
        snprintf(name, sizeof name, "transformer_blocks.%d.%s", i_block, STREAM_NAMES[image][i]);
        if (i < 7)
            QIE_TRY(qie_bind_linear(w, name, linears[i].n, linears[i].k, true, linears[i].l, err));
        else
            QIE_TRY(qie_bind_vec(w, name, c->attention_head_dim, i == 7 ? &s->norm_q : &s->norm_k,
                                 err));
    }
    /* Nearly all of the work; what steers it (modulation, time, input and output layers) is small
     * and keeps its precision. */
    s->q.int8 = s->k.int8 = s->v.int8 = s->out.int8 = s->up.int8 = s->down.int8 = true;
    /* In 8-bit floats, which have 3 bits of mantissa, pictures get dark and blurred unless the way
     * out of the image stream's MLP is left out as well: SGLang, pull request 23155. */
    s->q.fp8 = s->k.fp8 = s->v.fp8 = s->out.fp8 = s->up.fp8 = true;
    s->down.fp8 = !image;
    return QIE_OK;
}

qie_status qie_transformer_open(const qie_transformer_config *c, const qie_weights *w,
                                qie_transformer **out, qie_error *err) {
    *out = NULL;
    qie_transformer *t = calloc(1, sizeof *t);
    qie_status st = QIE_OK;
    int64_t d = c->inner_dim;
    if (t) {
        t->c = *c;
        t->n_bytes = qie_weights_bytes(w);
        t->blocks = calloc((size_t)c->num_layers, sizeof *t->blocks);
    }
    if (!t || !t->blocks) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    QIE_TRY_GOTO(qie_bind_linear(w, "time_text_embed.timestep_embedder.linear_1", d, TIME_CHANNELS,
                                 true, &t->time1, err));
    QIE_TRY_GOTO(qie_bind_linear(w, "time_text_embed.timestep_embedder.linear_2", d, d, true,
                                 &t->time2, err));
    QIE_TRY_GOTO(qie_bind_linear(w, "img_in", d, c->in_channels, true, &t->img_in, err));
    QIE_TRY_GOTO(qie_bind_linear(w, "txt_in", d, c->joint_attention_dim, true, &t->txt_in, err));
    QIE_TRY_GOTO(qie_bind_linear(w, "norm_out.linear", 2 * d, d, true, &t->norm_out, err));
    QIE_TRY_GOTO(qie_bind_linear(w, "proj_out",
                                 (int64_t)c->patch_size * c->patch_size * c->out_channels, d, true,
                                 &t->proj_out, err));
    QIE_TRY_GOTO(qie_bind_vec(w, "txt_norm.weight", c->joint_attention_dim, &t->txt_norm, err));
    for (int i = 0; i < c->num_layers; i++) {
        QIE_TRY_GOTO(bind_stream(w, c, i, true, &t->blocks[i].img, err));
        QIE_TRY_GOTO(bind_stream(w, c, i, false, &t->blocks[i].txt, err));
    }
    make_groups(t);
    *out = t;
    return QIE_OK;
fail:
    qie_transformer_close(t);
    return st;
}

void qie_transformer_each_linear(qie_transformer *t,
                                 void (*fn)(void *arg, const char *name, qie_linear *l),
                                 void *arg) {
    fn(arg, "time_text_embed.timestep_embedder.linear_1", &t->time1);
    fn(arg, "time_text_embed.timestep_embedder.linear_2", &t->time2);
    fn(arg, "img_in", &t->img_in);
    fn(arg, "txt_in", &t->txt_in);
    fn(arg, "norm_out.linear", &t->norm_out);
    fn(arg, "proj_out", &t->proj_out);
    for (int b = 0; b < t->c.num_layers; b++)
        for (int image = 0; image < 2; image++) {
            stream *s = image ? &t->blocks[b].img : &t->blocks[b].txt;
            qie_linear *l[7] = {&s->q, &s->k, &s->v, &s->out, &s->mod, &s->up, &s->down};
            char name[128];
            for (int i = 0; i < 7; i++) {
                snprintf(name, sizeof name, "transformer_blocks.%d.%s", b, STREAM_NAMES[image][i]);
                fn(arg, name, l[i]);
            }
        }
}

void qie_transformer_close(qie_transformer *t) {
    if (!t)
        return;
    for (int i = 0; t->blocks && i < t->c.num_layers; i++) {
        qie_group_release(&t->blocks[i].modulation);
        qie_group_release(&t->blocks[i].rest);
    }
    qie_group_release(&t->fixed);
    free(t->blocks);
    free(t);
}

struct qie_denoiser {
    qie_transformer *t;
    int64_t n_target, n_image, n_text[2], max_text;
    int n_passes, n_steps, n_forwards;
    bool caching;
    qie_step_cache cache;
    bool prefetch, larger_than_memory;
    int n_kept; /* of a model larger than memory: the first blocks, which stay in memory; if all
                   came by in turn, each would push out the one that is needed soonest */
    float *timesteps;
    float *ref_in;          /* [n_reference, D]: references through img_in */
    float *txt_in[2];       /* [n_text, D]: conditioning through txt_norm and txt_in */
    float *cos[2], *sin[2]; /* [n_text + n_image, head_dim / 2] for each pass */
    /* modulation of steps mod_first .. mod_first + mod_count - 1, and of t = 0 behind them; in the
       last two rows that of the step mod_now and of t = 0 once more, where a device's recording of
       a step finds them: per block [rows][6 D] for the image stream, then the text stream;
       norm_out [rows][2 D] */
    int mod_first, mod_count, mod_rows, mod_now;
    float *mod, *mod_out, *temb;
    float *x_img, *x_txt; /* residual streams, F32 */
    qie_mat h, q, k, v; /* [max_text + n_image, D]: text rows first; h is also attention's output */
    qie_mat hidden;     /* [max(n_image, max_text), 4 D] */
};

_Static_assert(sizeof(struct qie_denoiser) <= QIE_PLAN_DENOISER_BYTES, "plan/memory.c books this");

/* temb = linear_2(silu(linear_1([cos, sin](1000 t f)))) for each t, then silu: the only form that
 * is used. */
static qie_status time_embedding(const qie_denoiser *d, const qie_run *run, const float *times,
                                 int n, float *scratch, qie_error *err) {
    const qie_transformer *t = d->t;
    int64_t dim = t->c.inner_dim;
    float *hidden = scratch + (int64_t)n * TIME_CHANNELS;
    size_t bytes = sizeof(float) * (size_t)n * TIME_CHANNELS;
    void *staged;
    QIE_TRY(qie_run_stage(run, scratch, bytes, &staged, err));
    float *e = staged;
    for (int r = 0; r < n; r++)
        for (int i = 0; i < TIME_CHANNELS / 2; i++) {
            float f = expf((float)-log(10000.0) * (float)i / (TIME_CHANNELS / 2));
            float angle = 1000.0f * (times[r] * f);
            e[r * TIME_CHANNELS + i] = cosf(angle);
            e[r * TIME_CHANNELS + TIME_CHANNELS / 2 + i] = sinf(angle);
        }
    qie_run_commit(run, scratch, e, bytes);
    qie_run_linear(run, qie_mat_make(scratch, QIE_F32, n, TIME_CHANNELS), &t->time1, QIE_ACT_SILU,
                   QIE_STORE_SET, qie_mat_make(hidden, QIE_F32, n, dim));
    qie_run_linear(run, qie_mat_make(hidden, QIE_F32, n, dim), &t->time2, QIE_ACT_SILU,
                   QIE_STORE_SET, qie_mat_make(d->temb, QIE_F32, n, dim));
    return QIE_OK;
}

/* The weights of a block, but for its modulation, which was read before the loop. */
static void each_linear(const qie_denoiser *d, int i_block, void (*fn)(const qie_linear *l)) {
    const stream *streams[2] = {&d->t->blocks[i_block].img, &d->t->blocks[i_block].txt};
    for (int i = 0; i < 2; i++) {
        const qie_linear *l[] = {&streams[i]->q,   &streams[i]->k,  &streams[i]->v,
                                 &streams[i]->out, &streams[i]->up, &streams[i]->down};
        for (size_t k = 0; k < sizeof l / sizeof *l; k++)
            fn(l[k]);
    }
}
/* Of the block that runs next: in the first step they come from disk while the one before computes;
 * a model larger than memory needs it in every one. */
static void prefetch_block(const qie_denoiser *d, int i_block) {
    if (i_block < d->t->c.num_layers)
        each_linear(d, i_block, qie_linear_prefetch);
}

/* Rows of the modulation table: `mod_count` steps from `first`, then t = 0 for zero_cond_t. */
static qie_status modulate_steps(qie_denoiser *d, const qie_run *run, int first, qie_error *err) {
    const qie_transformer *t = d->t;
    int64_t dim = t->c.inner_dim;
    int n = d->n_steps - first < QIE_MODULATION_STEPS ? d->n_steps - first : QIE_MODULATION_STEPS;
    float times[QIE_MODULATION_STEPS + 1];
    memcpy(times, d->timesteps + first, (size_t)n * sizeof *times);
    times[n] = 0;
    int rows = n + 1;
    qie_run_mark mark = qie_run_mark_get(run);
    void *scratch;
    QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)rows * (size_t)(TIME_CHANNELS + dim),
                          &scratch, err));
    qie_run_group(run, &t->fixed, &t->blocks[0].modulation, 0, NULL);
    QIE_TRY(time_embedding(d, run, times, rows, scratch, err));
    qie_run_release(run, mark);
    qie_mat temb = qie_mat_make(d->temb, QIE_F32, rows, dim);
    qie_run_linear(run, temb, &t->norm_out, QIE_ACT_NONE, QIE_STORE_SET,
                   qie_mat_make(d->mod_out, QIE_F32, rows, 2 * dim));
    qie_run_share(run, d->temb, sizeof(float) * (size_t)(rows * dim));
    qie_run_share(run, d->mod_out, sizeof(float) * (size_t)(rows * 2 * dim));
    for (int b = 0; b < t->c.num_layers; b++) {
        QIE_TRY(qie_run_check(run, err));
        if (b + 1 < t->c.num_layers) {
            qie_linear_prefetch(&t->blocks[b + 1].img.mod);
            qie_linear_prefetch(&t->blocks[b + 1].txt.mod);
        } else
            prefetch_block(d, 0);
        qie_run_group(run, &t->blocks[b].modulation,
                      b + 1 < t->c.num_layers ? &t->blocks[b + 1].modulation : &t->blocks[0].rest,
                      0, NULL);
        float *at = d->mod + (int64_t)b * 2 * d->mod_rows * 6 * dim;
        qie_run_linear(run, temb, &t->blocks[b].img.mod, QIE_ACT_NONE, QIE_STORE_SET,
                       qie_mat_make(at, QIE_F32, rows, 6 * dim));
        qie_run_linear(run, temb, &t->blocks[b].txt.mod, QIE_ACT_NONE, QIE_STORE_SET,
                       qie_mat_make(at + (int64_t)d->mod_rows * 6 * dim, QIE_F32, rows, 6 * dim));
        qie_run_share(run, at, sizeof(float) * (size_t)(2 * d->mod_rows * 6 * dim));
        if (d->n_kept < t->c.num_layers) {
            qie_linear_let_go(&t->blocks[b].img.mod);
            qie_linear_let_go(&t->blocks[b].txt.mod);
        }
    }
    d->mod_first = first;
    d->mod_count = n;
    d->mod_now = -1;
    return QIE_OK;
}

qie_status qie_denoiser_modulate(qie_denoiser *d, const qie_run *run, int i_step, qie_error *err) {
    return modulate_steps(d, run, i_step, err);
}

static qie_status alloc_f32(const qie_run *run, int64_t n, float **out, qie_error *err) {
    void *p;
    QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)n, &p, err));
    *out = p;
    return QIE_OK;
}

static qie_status alloc_buffers(qie_denoiser *d, const qie_run *run, const qie_cache_rules *cache,
                                qie_error *err) {
    const qie_transformer_config *c = &d->t->c;
    int64_t dim = c->inner_dim, n = d->max_text + d->n_image, half = c->attention_head_dim / 2;
    d->mod_rows = (d->n_steps < QIE_MODULATION_STEPS ? d->n_steps : QIE_MODULATION_STEPS) + 3;
    void *p;
    QIE_TRY(qie_run_alloc_host(run, sizeof(float) * (size_t)d->n_steps, &p, err));
    d->timesteps = p;
    QIE_TRY(alloc_f32(run, (d->n_image - d->n_target) * dim, &d->ref_in, err));
    for (int i = 0; i < d->n_passes; i++) {
        QIE_TRY(alloc_f32(run, d->n_text[i] * dim, &d->txt_in[i], err));
        QIE_TRY(alloc_f32(run, (d->n_text[i] + d->n_image) * half, &d->cos[i], err));
        QIE_TRY(alloc_f32(run, (d->n_text[i] + d->n_image) * half, &d->sin[i], err));
    }
    QIE_TRY(alloc_f32(run, (int64_t)c->num_layers * 2 * d->mod_rows * 6 * dim, &d->mod, err));
    QIE_TRY(alloc_f32(run, (int64_t)(d->mod_rows - 2) * 2 * dim, &d->mod_out, err));
    QIE_TRY(alloc_f32(run, (int64_t)(d->mod_rows - 2) * dim, &d->temb, err));
    QIE_TRY(alloc_f32(run, d->n_image * dim, &d->x_img, err));
    QIE_TRY(alloc_f32(run, d->max_text * dim, &d->x_txt, err));
    QIE_TRY(qie_run_mat(run, run->act, n, dim, &d->h, err));
    QIE_TRY(qie_run_mat(run, run->act, n, dim, &d->q, err));
    QIE_TRY(qie_run_mat(run, run->act, n, dim, &d->k, err));
    QIE_TRY(qie_run_mat(run, run->act, n, dim, &d->v, err));
    int64_t rows = d->n_image > d->max_text ? d->n_image : d->max_text;
    QIE_TRY(qie_run_mat(run, run->act, rows, 4 * dim, &d->hidden, err));
    return d->caching ? qie_step_cache_init(&d->cache, run, cache, d->n_steps, d->n_passes,
                                            d->n_target * dim, err)
                      : QIE_OK;
}

/* Rotary tables: those of the picture's rows are the same in both passes. */
static qie_status fill_tables(qie_denoiser *d, const qie_run *run, const qie_size_plan *sizes,
                              qie_error *err) {
    const qie_transformer_config *c = &d->t->c;
    int64_t half = c->attention_head_dim / 2;
    size_t image = sizeof(float) * (size_t)(d->n_image * half);
    for (int p = 0; p < d->n_passes; p++) {
        qie_run_mark mark = qie_run_mark_get(run);
        int64_t at = d->n_text[p] * half, rows = p ? d->n_text[p] : d->n_text[p] + d->n_image;
        size_t bytes = sizeof(float) * (size_t)(rows * half);
        void *cosine, *sine;
        QIE_TRY(qie_run_stage(run, d->cos[p], bytes, &cosine, err));
        QIE_TRY(qie_run_stage(run, d->sin[p], bytes, &sine, err));
        qie_rope_text(c, sizes, d->n_text[p], cosine, sine);
        if (p == 0)
            qie_rope_image(c, sizes, (float *)cosine + at, (float *)sine + at);
        qie_run_commit(run, d->cos[p], cosine, bytes);
        qie_run_commit(run, d->sin[p], sine, bytes);
        qie_run_release(run, mark);
        if (p == 0)
            continue;
        const qie_ops *ops = &run->compute->ops;
        ops->copy(run->compute, d->cos[p] + at, d->cos[0] + d->n_text[0] * half, image);
        ops->copy(run->compute, d->sin[p] + at, d->sin[0] + d->n_text[0] * half, image);
        qie_run_share(run, d->cos[p] + at, image);
        qie_run_share(run, d->sin[p] + at, image);
    }
    return QIE_OK;
}

/* The input layers are 1/1000 of the arithmetic: they run in f32 whatever the precision. */
static qie_status embed_inputs(qie_denoiser *d, const qie_run *run, const qie_denoiser_inputs *in,
                               qie_error *err) {
    const qie_transformer *t = d->t;
    int64_t dim = t->c.inner_dim, joint = t->c.joint_attention_dim;
    int64_t n_ref = d->n_image - d->n_target;
    qie_run_mark outer = qie_run_mark_get(run);
    const void *lent;
    qie_run_group(run, &t->fixed, &t->blocks[0].modulation, 0, NULL);
    QIE_TRY(qie_run_lend(run, in->image_latents, sizeof(float) * (size_t)(n_ref * t->c.in_channels),
                         &lent, err));
    qie_mat refs = qie_mat_make((void *)(uintptr_t)lent, QIE_F32, n_ref, t->c.in_channels);
    qie_run_linear(run, refs, &t->img_in, QIE_ACT_NONE, QIE_STORE_SET,
                   qie_mat_make(d->ref_in, QIE_F32, n_ref, dim));
    qie_run_share(run, d->ref_in, sizeof(float) * (size_t)(n_ref * dim));
    for (int p = 0; p < d->n_passes; p++) {
        qie_run_mark mark = qie_run_mark_get(run);
        qie_mat normed;
        QIE_TRY(qie_run_mat(run, QIE_F32, d->n_text[p], joint, &normed, err));
        QIE_TRY(qie_run_lend(run, in->prompt_embeds[p],
                             sizeof(float) * (size_t)(d->n_text[p] * joint), &lent, err));
        qie_mat text = qie_mat_make((void *)(uintptr_t)lent, QIE_F32, d->n_text[p], joint);
        run->compute->ops.rms_norm(run->compute, text, t->txt_norm, EPS, normed);
        qie_run_linear(run, normed, &t->txt_in, QIE_ACT_NONE, QIE_STORE_SET,
                       qie_mat_make(d->txt_in[p], QIE_F32, d->n_text[p], dim));
        qie_run_share(run, d->txt_in[p], sizeof(float) * (size_t)(d->n_text[p] * dim));
        qie_run_release(run, mark);
    }
    qie_run_release(run, outer);
    return fill_tables(d, run, in->sizes, err);
}

qie_status qie_denoiser_create(qie_transformer *t, const qie_run *run,
                               const qie_denoiser_inputs *in, qie_denoiser **out, qie_error *err) {
    *out = NULL;
    void *p;
    QIE_TRY(qie_run_alloc_host(run, sizeof(qie_denoiser), &p, err));
    qie_denoiser *d = p;
    memset(d, 0, sizeof *d);
    d->t = t;
    d->n_target = in->sizes->n_target;
    d->n_image = in->sizes->n_target + in->sizes->n_reference;
    d->n_passes = in->n_passes;
    d->n_steps = in->n_steps;
    for (int i = 0; i < in->n_passes; i++) {
        d->n_text[i] = in->n_text[i];
        if (in->n_text[i] > d->max_text)
            d->max_text = in->n_text[i];
    }
    d->caching = in->cache != NULL;
    QIE_TRY(alloc_buffers(d, run, in->cache, err));
    memcpy(d->timesteps, in->timesteps, sizeof(float) * (size_t)in->n_steps);
    QIE_TRY(embed_inputs(d, run, in, err));
    d->mod_first = d->mod_now = -1;
    d->prefetch = true;
    if (run->compute->mem)
        run->compute->mem->repeat_forget(run->compute);
    d->larger_than_memory = t->n_bytes > qie_memory_total();
    d->n_kept = t->c.num_layers;
    if (d->larger_than_memory && !run->compute->mem)
        d->n_kept = (int)(qie_memory_available() / 4 * 3 / (int64_t)t->blocks[0].rest.n_bytes);
    *out = d;
    return QIE_OK;
}

/* Modulation vectors of one stream in one block for the current step. */
typedef struct modulation {
    const float *shift1, *scale1, *gate1, *shift2, *scale2, *gate2;
} modulation;

static modulation modulation_of(const qie_denoiser *d, int i_block, bool text, int row) {
    int64_t dim = d->t->c.inner_dim;
    const float *m = d->mod + (((int64_t)i_block * 2 + text) * d->mod_rows + row) * 6 * dim;
    modulation r = {m, m + dim, m + 2 * dim, m + 3 * dim, m + 4 * dim, m + 5 * dim};
    return r;
}

static qie_layer_norm_args norm_args(qie_mat x, const float *shift0, const float *scale0,
                                     const float *shift1, const float *scale1, int64_t split,
                                     qie_mat dst) {
    qie_layer_norm_args a = {.x = x,
                             .scale = {scale0, scale1},
                             .shift = {shift0, shift1},
                             .split = split,
                             .eps = EPS,
                             .dst = dst};
    return a;
}

/* Rows of the modulation table. */
typedef struct mod_rows {
    int step, zero;
} mod_rows;

/* One stream in one block: its rows [from, from + n) of the joint matrices, of which the first
 * n_out are computed to the end; rows below `split` are the noisy ones. */
typedef struct part {
    const stream *s;
    modulation m0, m1; /* of rows below and from `split` on */
    qie_mat x;         /* residual */
    int64_t from, n, n_out, split;
} part;

static part part_of(const qie_denoiser *d, int i_block, mod_rows rows, int pass, bool text,
                    bool last) {
    const block *b = &d->t->blocks[i_block];
    int64_t n_text = d->n_text[pass];
    part p = {.s = text ? &b->txt : &b->img,
              .m0 = modulation_of(d, i_block, text, rows.step),
              .from = text ? 0 : n_text,
              .n = text ? n_text : d->n_image,
              .split = text ? n_text : d->n_target};
    p.n_out = !last ? p.n : text ? 0 : d->n_target;
    p.m1 = d->t->c.zero_cond_t && !text ? modulation_of(d, i_block, text, rows.zero) : p.m0;
    p.x = qie_mat_make(text ? d->x_txt : d->x_img, QIE_F32, p.n, d->t->c.inner_dim);
    return p;
}

/* q, k, v rows of one stream from its normed rows, QK norm and rotation included. */
static void project_qkv(const qie_denoiser *d, const qie_run *run, const part *p, int pass) {
    const qie_transformer_config *c = &d->t->c;
    int64_t half = c->attention_head_dim / 2;
    qie_mat x = qie_mat_rows(d->h, p->from, p->n), q = qie_mat_rows(d->q, p->from, p->n_out),
            k = qie_mat_rows(d->k, p->from, p->n), v = qie_mat_rows(d->v, p->from, p->n);
    if (p->n_out)
        qie_run_linear(run, qie_mat_rows(x, 0, p->n_out), &p->s->q, QIE_ACT_NONE, QIE_STORE_SET, q);
    qie_run_linear(run, x, &p->s->k, QIE_ACT_NONE, QIE_STORE_SET, k);
    qie_run_linear(run, x, &p->s->v, QIE_ACT_NONE, QIE_STORE_SET, v);
    qie_qk_norm_rope_args a = {.n_heads = c->num_attention_heads,
                               .head_dim = c->attention_head_dim,
                               .eps = EPS,
                               .cos = d->cos[pass] + p->from * half,
                               .sin = d->sin[pass] + p->from * half,
                               .interleaved = true};
    a.x = q;
    a.norm = p->s->norm_q;
    if (p->n_out)
        run->compute->ops.qk_norm_rope(run->compute, &a);
    a.x = k;
    a.norm = p->s->norm_k;
    run->compute->ops.qk_norm_rope(run->compute, &a);
}

/* What a block begins with: the norm before attention, to h. */
static qie_layer_norm_args norm_before_attention(const qie_denoiser *d, const part *p) {
    return norm_args(p->x, p->m0.shift1, p->m0.scale1, p->m1.shift1, p->m1.scale1, p->split,
                     qie_mat_rows(d->h, p->from, p->n));
}

/* Attention's way out, joined to the residual, and the norm before the MLP: to rows of q, which is
 * done with, because h still holds the other stream's. */
static void leave_attention(const qie_denoiser *d, const qie_run *run, const part *p) {
    qie_mat x = qie_mat_rows(p->x, 0, p->n_out);
    qie_layer_norm_args norm = norm_args(x, p->m0.shift2, p->m0.scale2, p->m1.shift2, p->m1.scale2,
                                         p->split, qie_mat_rows(d->q, p->from, p->n_out));
    qie_run_linear_gated(run, qie_mat_rows(d->h, p->from, p->n_out), &p->s->out, p->m0.gate1,
                         p->m1.gate1, p->split, x, &norm);
}

/* next: the same stream in the block behind, or NULL: what that begins with is computed here. */
static void feed_forward(const qie_denoiser *d, const qie_run *run, const part *p,
                         const part *next) {
    qie_mat up = qie_mat_rows(d->hidden, 0, p->n_out);
    qie_layer_norm_args norm = norm_before_attention(d, next ? next : p);
    qie_run_linear(run, qie_mat_rows(d->q, p->from, p->n_out), &p->s->up, QIE_ACT_GELU_TANH,
                   QIE_STORE_SET, up);
    qie_run_linear_gated(run, up, &p->s->down, p->m0.gate2, p->m1.gate2, p->split,
                         qie_mat_rows(p->x, 0, p->n_out), next ? &norm : NULL);
}

/* How a block follows another. */
typedef struct seam {
    bool normed; /* h holds what it begins with: the block before left it */
    bool ahead;  /* it leaves that for the block behind */
    bool last;   /* only target rows of the image stream matter from here on, so queries and the
                    second half are computed for them alone */
} seam;

static void run_block(const qie_denoiser *d, const qie_run *run, int i_block, mod_rows rows,
                      int pass, seam at) {
    const qie_transformer_config *c = &d->t->c;
    const qie_ops *ops = &run->compute->ops;
    int64_t n_text = d->n_text[pass], n = n_text + d->n_image;
    part parts[2] = {part_of(d, i_block, rows, pass, false, at.last),
                     part_of(d, i_block, rows, pass, true, at.last)};
    for (int i = 0; i < 2 && !at.normed; i++) {
        qie_layer_norm_args norm = norm_before_attention(d, &parts[i]);
        ops->layer_norm(run->compute, &norm);
    }
    for (int i = 0; i < 2; i++)
        project_qkv(d, run, &parts[i], pass);
    int64_t q_from = n_text - parts[1].n_out, n_query = parts[1].n_out + parts[0].n_out;
    qie_attention_args a = {.q = qie_mat_rows(d->q, q_from, n_query),
                            .k = qie_mat_rows(d->k, 0, n),
                            .v = qie_mat_rows(d->v, 0, n),
                            .n_heads = c->num_attention_heads,
                            .n_kv_heads = c->num_attention_heads,
                            .head_dim = c->attention_head_dim,
                            .scale = 1.0f / sqrtf((float)c->attention_head_dim),
                            .dst = qie_mat_rows(d->h, q_from, n_query)};
    ops->attention(run->compute, &a);
    for (int i = 0; i < 2 && parts[i].n_out; i++)
        leave_attention(d, run, &parts[i]);
    for (int i = 0; i < 2 && parts[i].n_out; i++) {
        part next = parts[i];
        if (at.ahead) /* what is computed there to the end does not matter to how it begins */
            next = part_of(d, i_block + 1, rows, pass, i, false);
        feed_forward(d, run, &parts[i], at.ahead ? &next : NULL);
    }
}

static void observe_block(const qie_denoiser *d, const qie_run *run, int i_block, int pass) {
    int64_t dim = d->t->c.inner_dim;
    char name[64];
    snprintf(name, sizeof name, "block.%d.img", i_block);
    int64_t img[3] = {1, d->n_image, dim}, txt[3] = {1, d->n_text[pass], dim};
    qie_run_observe(run, name, d->x_img, 3, img);
    snprintf(name, sizeof name, "block.%d.txt", i_block);
    qie_run_observe(run, name, d->x_txt, 3, txt);
}

/* Is the last block's whole output asked for by a dump? Then it is computed in full. */
static bool wants_last(const qie_denoiser *d, const qie_run *run) {
    char a[64], b[64];
    snprintf(a, sizeof a, "block.%d.img", d->t->c.num_layers - 1);
    snprintf(b, sizeof b, "block.%d.txt", d->t->c.num_layers - 1);
    return qie_observer_wants(run->observer, a) || qie_observer_wants(run->observer, b);
}

/* Blocks [first, end). */
typedef struct stretch {
    int pass, first, end;
    mod_rows rows;
    bool observing, whole;
    qie_range live[2]; /* what one block leaves for the next */
} stretch;

/* A back end that joins a product, the residual and the norm behind them gains by having the block
 * behind in mind, if that runs in the same place. */
static bool looks_ahead(const qie_run *run, const qie_weight_group *next) {
    const qie_compute *c = run->compute;
    return c->ops.linear_norm && (!c->mem || c->mem->stays(run->compute, next));
}

static qie_status run_stretch(const qie_denoiser *d, const qie_run *run, const stretch *s,
                              qie_error *err) {
    const qie_transformer *t = d->t;
    int n = t->c.num_layers;
    seam at = {.ahead = false};
    for (int b = s->first; b < s->end; b++) {
        QIE_TRY(qie_run_check(run, err));
        double started = qie_now_s();
        if (d->prefetch)
            prefetch_block(d, d->larger_than_memory ? (b + 1) % n : b + 1);
        qie_run_group(run, &t->blocks[b].rest, &t->blocks[(b + 1) % n].rest, 2, s->live);
        at.normed = at.ahead;
        at.ahead = b + 1 < s->end && looks_ahead(run, &t->blocks[b + 1].rest);
        at.last = b == n - 1 && !s->whole;
        run_block(d, run, b, s->rows, s->pass, at);
        if (b >= d->n_kept)
            each_linear(d, b, qie_linear_let_go);
        qie_trace_span("block", started, "block %d", b + 1);
        if (s->observing)
            observe_block(d, run, b, s->pass);
    }
    return QIE_OK;
}

/* The same on a device, which may have a recording of it from another step. */
static qie_status repeat_stretch(const qie_denoiser *d, const qie_run *run, const stretch *s,
                                 qie_error *err) {
    const qie_mem_ops *mem = run->compute->mem;
    qie_status st = qie_run_check(run, err);
    bool done = st != QIE_OK;
    while (!done &&
           !mem->repeat_begin(run->compute, s->pass, &d->t->blocks[s->first].rest, s->live, 2)) {
        st = run_stretch(d, run, s, err);
        done = mem->repeat_end(run->compute, st == QIE_OK);
    }
    return st;
}

/* What a recording reads has to be in one place whatever the step is. */
static mod_rows rows_in_place(qie_denoiser *d, const qie_run *run, int i_step) {
    mod_rows from = {i_step - d->mod_first, d->mod_count};
    mod_rows to = {d->mod_rows - 2, d->mod_rows - 1};
    int64_t width = 6 * d->t->c.inner_dim;
    qie_mat table = {d->mod, QIE_F32, 2 * (int64_t)d->t->c.num_layers, width, d->mod_rows * width};
    const int moves[2][2] = {{from.step, to.step}, {from.zero, to.zero}};
    for (int i = 0; i < 2 && d->mod_now != i_step; i++) {
        qie_mat src = table, dst = table;
        src.data = d->mod + moves[i][0] * width;
        dst.data = d->mod + moves[i][1] * width;
        run->compute->mem->convert(run->compute, src, dst);
    }
    d->mod_now = i_step;
    return to;
}

qie_status qie_denoiser_forward(qie_denoiser *d, const qie_run *run, int i_step, int i_pass,
                                const float *latents, float *velocity, qie_error *err) {
    const qie_transformer *t = d->t;
    int64_t dim = t->c.inner_dim;
    if (d->mod_first < 0 || i_step < d->mod_first || i_step >= d->mod_first + d->mod_count)
        QIE_TRY(modulate_steps(d, run, i_step, err));
    int row = i_step - d->mod_first;
    qie_mat x = qie_mat_make((void *)(uintptr_t)latents, QIE_F32, d->n_target, t->c.in_channels);
    const qie_ops *ops = &run->compute->ops;
    stretch s = {.pass = i_pass, .end = t->c.num_layers, .rows = {row, d->mod_count}};
    s.observing =
        qie_observer_checks(run->observer) || (run->observer && i_step == 0 && i_pass == 0);
    s.whole = s.observing && wants_last(d, run);
    s.live[0] = (qie_range){d->x_img, sizeof(float) * (size_t)(d->n_image * dim)};
    s.live[1] = (qie_range){d->x_txt, sizeof(float) * (size_t)(d->n_text[i_pass] * dim)};
    bool repeats = run->compute->mem && !s.observing, skip = false;
    if (repeats)
        s.rows = rows_in_place(d, run, i_step);
    qie_run_group(run, &t->fixed, &t->blocks[0].rest, 0, NULL);
    qie_run_linear(run, x, &t->img_in, QIE_ACT_NONE, QIE_STORE_SET,
                   qie_mat_make(d->x_img, QIE_F32, d->n_target, dim));
    ops->copy(run->compute, d->x_img + d->n_target * dim, d->ref_in,
              sizeof(float) * (size_t)((d->n_image - d->n_target) * dim));
    ops->copy(run->compute, d->x_txt, d->txt_in[i_pass],
              sizeof(float) * (size_t)(d->n_text[i_pass] * dim));
    d->n_forwards++;
    if (d->caching) { /* the first block alone decides about the others */
        qie_step_cache_before(&d->cache, run, i_step, i_pass, d->x_img);
        s.end = 1;
        QIE_TRY(run_stretch(d, run, &s, err));
        QIE_TRY(qie_step_cache_decide(&d->cache, run, i_step, i_pass, d->x_img, &skip, err));
        s.first = 1;
        s.end = t->c.num_layers;
    }
    if (!skip && s.first < s.end)
        QIE_TRY(repeats ? repeat_stretch(d, run, &s, err) : run_stretch(d, run, &s, err));
    if (d->caching && !skip)
        qie_step_cache_keep(&d->cache, run, i_pass, d->x_img);
    d->prefetch = d->larger_than_memory;
    qie_run_group(run, &t->fixed, &t->blocks[0].rest, 1, s.live);
    const float *m = d->mod_out + (int64_t)row * 2 * dim; /* scale, then shift: unlike the blocks */
    /* the output layer in f32: 64 columns; d->hidden is free and large enough (4 D of at least 2
     * bytes) */
    qie_mat normed = qie_mat_make(d->hidden.data, QIE_F32, d->n_target, dim);
    qie_layer_norm_args norm = norm_args(qie_mat_make(d->x_img, QIE_F32, d->n_target, dim), m + dim,
                                         m, m + dim, m, d->n_target, normed);
    ops->layer_norm(run->compute, &norm);
    qie_run_linear(run, normed, &t->proj_out, QIE_ACT_NONE, QIE_STORE_SET,
                   qie_mat_make(velocity, QIE_F32, d->n_target, t->proj_out.w.n));
    return QIE_OK;
}

void qie_denoiser_count(const qie_denoiser *d, int *n_forwards, int *n_skipped) {
    *n_forwards = d->n_forwards;
    *n_skipped = d->caching ? d->cache.n_skipped : 0;
}

qie_status qie_denoiser_probe(qie_denoiser *d, const qie_run *run, double *seconds_per_block,
                              qie_error *err) {
    if (d->mod_first < 0) { /* any numbers do: time does not depend on them */
        qie_run_zero(run, d->mod,
                     sizeof(float) * (size_t)(2 * d->mod_rows * 6 * d->t->c.inner_dim));
        d->mod_count = d->mod_rows - 3;
    }
    qie_run_zero(run, d->x_img, sizeof(float) * (size_t)(d->n_image * d->t->c.inner_dim));
    qie_run_zero(run, d->x_txt, sizeof(float) * (size_t)(d->max_text * d->t->c.inner_dim));
    qie_run_group(run, &d->t->blocks[0].rest, NULL, 0, NULL);
    double best = INFINITY;
    for (int i = 0; i < 2; i++) { /* the first one reads the weights from disk */
        QIE_TRY(qie_run_check(run, err));
        double t0 = qie_now_s();
        run_block(d, run, 0, (mod_rows){0, d->mod_count}, 0, (seam){.ahead = false});
        float one;
        QIE_TRY(qie_run_fetch(run, &one, d->x_img, sizeof one, err)); /* waits for a device */
        double s = qie_now_s() - t0;
        best = s < best ? s : best;
        if (best > 5)
            break;
    }
    *seconds_per_block = best;
    return QIE_OK;
}
