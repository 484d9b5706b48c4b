#include "model/vae.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "plan/tensors.h"

typedef struct conv {
    qie_conv_weight w;
    qie_vec b;
} conv;

typedef struct resnet {
    qie_vec norm1, norm2;
    conv conv1, conv2, shortcut; /* shortcut.w.data NULL: same channels */
} resnet;

typedef struct mid_block {
    resnet res[2];
    qie_vec norm;
    qie_linear to_qkv, proj;
} mid_block;

typedef struct level {
    resnet *res; /* [n_res] */
    int n_res;
    conv resample; /* w.data NULL: none after this level */
} level;

typedef struct side {
    conv in, out, quant; /* quant: quant_conv or post_quant_conv */
    qie_vec norm_out;
    mid_block mid;
    level levels[QIE_MAX_VAE_LEVELS];
} side;

struct qie_vae {
    qie_vae_config c;
    side enc, dec;
    qie_weight_group group; /* all of it: used in one go, and small */
};

static void group_conv(qie_weight_group *g, const conv *c) {
    const qie_conv_weight *w = &c->w;
    qie_group_add(g, w->data,
                  (size_t)w->out * (size_t)w->in * (size_t)(w->kt * w->kh * w->kw) *
                      qie_dtype_size(w->dtype));
    qie_group_add_vec(g, c->b);
}

static void group_resnet(qie_weight_group *g, const resnet *r) {
    qie_group_add_vec(g, r->norm1);
    qie_group_add_vec(g, r->norm2);
    group_conv(g, &r->conv1);
    group_conv(g, &r->conv2);
    group_conv(g, &r->shortcut);
}

static void group_side(qie_weight_group *g, const side *s) {
    group_conv(g, &s->in);
    group_conv(g, &s->out);
    group_conv(g, &s->quant);
    qie_group_add_vec(g, s->norm_out);
    group_resnet(g, &s->mid.res[0]);
    group_resnet(g, &s->mid.res[1]);
    qie_group_add_vec(g, s->mid.norm);
    qie_group_add_linear(g, &s->mid.to_qkv);
    qie_group_add_linear(g, &s->mid.proj);
    for (int l = 0; l < QIE_MAX_VAE_LEVELS; l++) {
        for (int r = 0; r < s->levels[l].n_res && s->levels[l].res; r++)
            group_resnet(g, &s->levels[l].res[r]);
        group_conv(g, &s->levels[l].resample);
    }
}

qie_weight_group *qie_vae_weights(qie_vae *v) {
    return &v->group;
}

static qie_status bind_conv(const qie_weights *w, const char *name, int out, int in, int kt, int k,
                            bool flat, conv *c, qie_error *err) {
    char full[160];
    const qie_tensor *t;
    int64_t shape3[5] = {out, in, kt, k, k}, shape2[4] = {out, in, k, k};
    snprintf(full, sizeof full, "%s.weight", name);
    QIE_TRY(qie_weights_need(w, full, flat ? 4 : 5, flat ? shape2 : shape3, &t, err));
    c->w = (qie_conv_weight){t->data, t->dtype, out, in, kt, k, k};
    snprintf(full, sizeof full, "%s.bias", name);
    return qie_bind_vec(w, full, out, &c->b, err);
}

static qie_status bind_resnet(const qie_weights *w, const char *p, int in, int out, resnet *r,
                              qie_error *err) {
    char n[160];
#define NAME(suffix) (snprintf(n, sizeof n, "%s." suffix, p), n)
    QIE_TRY(qie_bind_vec(w, NAME("norm1.gamma"), in, &r->norm1, err));
    QIE_TRY(qie_bind_vec(w, NAME("norm2.gamma"), out, &r->norm2, err));
    QIE_TRY(bind_conv(w, NAME("conv1"), out, in, 3, 3, false, &r->conv1, err));
    QIE_TRY(bind_conv(w, NAME("conv2"), out, out, 3, 3, false, &r->conv2, err));
    if (in != out)
        QIE_TRY(bind_conv(w, NAME("conv_shortcut"), out, in, 1, 1, false, &r->shortcut, err));
#undef NAME
    return QIE_OK;
}

static qie_status bind_mid(const qie_weights *w, const char *who, int c, mid_block *m,
                           qie_error *err) {
    char n[160];
    for (int i = 0; i < 2; i++) {
        snprintf(n, sizeof n, "%s.mid_block.resnets.%d", who, i);
        QIE_TRY(bind_resnet(w, n, c, c, &m->res[i], err));
    }
    snprintf(n, sizeof n, "%s.mid_block.attentions.0.norm.gamma", who);
    QIE_TRY(qie_bind_vec(w, n, c, &m->norm, err));
    snprintf(n, sizeof n, "%s.mid_block.attentions.0.to_qkv", who);
    QIE_TRY(qie_bind_linear(w, n, 3 * c, c, true, &m->to_qkv, err));
    snprintf(n, sizeof n, "%s.mid_block.attentions.0.proj", who);
    return qie_bind_linear(w, n, c, c, true, &m->proj, err);
}

static qie_status bind_encoder(qie_vae *v, const qie_weights *w, qie_error *err) {
    const qie_vae_config *c = &v->c;
    side *s = &v->enc;
    char n[160];
    int in = c->base_dim, block = 0;
    QIE_TRY(bind_conv(w, "encoder.conv_in", in, 3, 3, 3, false, &s->in, err));
    for (int l = 0; l < c->n_levels; l++) {
        int out = qie_vae_channels(c, l);
        for (int r = 0; r < s->levels[l].n_res; r++, in = out) {
            snprintf(n, sizeof n, "encoder.down_blocks.%d", block++);
            QIE_TRY(bind_resnet(w, n, in, out, &s->levels[l].res[r], err));
        }
        if (l == c->n_levels - 1)
            break;
        snprintf(n, sizeof n, "encoder.down_blocks.%d.resample.1", block++);
        QIE_TRY(bind_conv(w, n, out, out, 1, 3, true, &s->levels[l].resample, err));
    }
    QIE_TRY(bind_mid(w, "encoder", in, &s->mid, err));
    QIE_TRY(qie_bind_vec(w, "encoder.norm_out.gamma", in, &s->norm_out, err));
    QIE_TRY(bind_conv(w, "encoder.conv_out", 2 * c->z_dim, in, 3, 3, false, &s->out, err));
    return bind_conv(w, "quant_conv", 2 * c->z_dim, 2 * c->z_dim, 1, 1, false, &s->quant, err);
}

static qie_status bind_decoder(qie_vae *v, const qie_weights *w, qie_error *err) {
    const qie_vae_config *c = &v->c;
    side *s = &v->dec;
    char n[160];
    int in = qie_vae_channels(c, c->n_levels - 1);
    QIE_TRY(bind_conv(w, "post_quant_conv", c->z_dim, c->z_dim, 1, 1, false, &s->quant, err));
    QIE_TRY(bind_conv(w, "decoder.conv_in", in, c->z_dim, 3, 3, false, &s->in, err));
    QIE_TRY(bind_mid(w, "decoder", in, &s->mid, err));
    for (int u = 0; u < c->n_levels; u++) {
        int out = qie_vae_channels(c, c->n_levels - 1 - u);
        for (int r = 0; r < s->levels[u].n_res; r++, in = out) {
            snprintf(n, sizeof n, "decoder.up_blocks.%d.resnets.%d", u, r);
            QIE_TRY(bind_resnet(w, n, in, out, &s->levels[u].res[r], err));
        }
        if (u == c->n_levels - 1)
            break;
        snprintf(n, sizeof n, "decoder.up_blocks.%d.upsamplers.0.resample.1", u);
        QIE_TRY(bind_conv(w, n, out / 2, out, 1, 3, true, &s->levels[u].resample, err));
        in = out / 2;
    }
    QIE_TRY(qie_bind_vec(w, "decoder.norm_out.gamma", in, &s->norm_out, err));
    return bind_conv(w, "decoder.conv_out", 3, in, 3, 3, false, &s->out, err);
}

qie_status qie_vae_open(const qie_vae_config *c, const qie_weights *w, qie_vae **out,
                        qie_error *err) {
    *out = NULL;
    qie_status st = QIE_OK;
    qie_vae *v = calloc(1, sizeof *v);
    if (!v)
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    v->c = *c;
    for (int l = 0; l < c->n_levels; l++) {
        level *levels[2] = {&v->enc.levels[l], &v->dec.levels[l]};
        for (int i = 0; i < 2; i++) {
            levels[i]->n_res = c->num_res_blocks + i; /* the decoder has one more per level */
            levels[i]->res = calloc((size_t)levels[i]->n_res, sizeof(resnet));
            if (!levels[i]->res) {
                st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
                goto fail;
            }
        }
    }
    QIE_TRY_GOTO(bind_encoder(v, w, err));
    QIE_TRY_GOTO(bind_decoder(v, w, err));
    v->group.kind = QIE_GROUP_VAE;
    group_side(&v->group, &v->enc);
    group_side(&v->group, &v->dec);
    *out = v;
    return QIE_OK;
fail:
    qie_vae_close(v);
    return st;
}

void qie_vae_close(qie_vae *v) {
    if (!v)
        return;
    for (int l = 0; l < QIE_MAX_VAE_LEVELS; l++) {
        free(v->enc.levels[l].res);
        free(v->dec.levels[l].res);
    }
    qie_group_release(&v->group);
    free(v);
}

/* Three buffers, each as large as the largest map of the side: the current map `x` and two to work
 * in. */
typedef struct maps {
    const qie_run *run;
    void *x, *a, *b;
} maps;

static qie_fmap map_of(const maps *m, void *data, int h, int w, int c) {
    qie_fmap f = {data, m->run->act, h, w, c};
    return f;
}

static void run_conv(const qie_run *run, qie_fmap x, const conv *c, int stride, bool upsample,
                     qie_fmap residual, qie_fmap dst) {
    qie_conv2d_args a = {.x = x,
                         .w = c->w,
                         .bias = c->b,
                         .stride = stride,
                         .upsample = upsample,
                         .residual = residual,
                         .dst = dst};
    run->compute->ops.conv2d(run->compute, &a);
}

static const qie_fmap NO_MAP;

static qie_status run_resnet(maps *m, const resnet *r, int h, int w, qie_error *err) {
    const qie_run *run = m->run;
    QIE_TRY(qie_run_check(run, err));
    int in = r->conv1.w.in, out = r->conv1.w.out;
    qie_fmap x = map_of(m, m->x, h, w, in), a = map_of(m, m->a, h, w, in),
             b = map_of(m, m->b, h, w, out);
    run->compute->ops.channel_norm(run->compute, x, r->norm1, true, a);
    run_conv(run, a, &r->conv1, 1, false, NO_MAP, b);
    run->compute->ops.channel_norm(run->compute, b, r->norm2, true, b);
    if (r->shortcut.w.data) {
        a = map_of(m, m->a, h, w, out);
        run_conv(run, x, &r->shortcut, 1, false, NO_MAP, a);
        run_conv(run, b, &r->conv2, 1, false, a, a);
        void *t = m->x;
        m->x = m->a;
        m->a = t;
    } else
        run_conv(run, b, &r->conv2, 1, false, x, x);
    return QIE_OK;
}

static void resample(maps *m, const conv *c, int *h, int *w, bool up) {
    qie_fmap x = map_of(m, m->x, *h, *w, c->w.in);
    *h = up ? *h * 2 : *h / 2;
    *w = up ? *w * 2 : *w / 2;
    run_conv(m->run, x, c, up ? 1 : 2, up, NO_MAP, map_of(m, m->a, *h, *w, c->w.out));
    void *t = m->x;
    m->x = m->a;
    m->a = t;
}

static qie_status run_mid(maps *m, const mid_block *mid, int h, int w, qie_error *err) {
    const qie_run *run = m->run;
    QIE_TRY(run_resnet(m, &mid->res[0], h, w, err));
    QIE_TRY(qie_run_check(run, err));
    int c = (int)mid->proj.w.n;
    int64_t n = (int64_t)h * w;
    qie_run_mark mark = qie_run_mark_get(run);
    qie_mat qkv;
    QIE_TRY(qie_run_mat(run, run->act, n, 3ll * c, &qkv, err));
    qie_fmap x = map_of(m, m->x, h, w, c), a = map_of(m, m->a, h, w, c),
             b = map_of(m, m->b, h, w, c);
    run->compute->ops.channel_norm(run->compute, x, mid->norm, false, a);
    qie_run_linear(run, qie_fmap_as_mat(a), &mid->to_qkv, QIE_ACT_NONE, QIE_STORE_SET, qkv);
    qie_mat part[3];
    for (int i = 0; i < 3; i++) {
        part[i] = qkv;
        part[i].cols = c;
        part[i].data = (unsigned char *)qkv.data + (size_t)(i * c) * qie_dtype_size(qkv.dtype);
    }
    qie_attention_args at = {.q = part[0],
                             .k = part[1],
                             .v = part[2],
                             .n_heads = 1,
                             .n_kv_heads = 1,
                             .head_dim = c,
                             .scale = 1.0f / sqrtf((float)c),
                             .dst = qie_fmap_as_mat(b)};
    run->compute->ops.attention(run->compute, &at);
    qie_run_linear(run, qie_fmap_as_mat(b), &mid->proj, QIE_ACT_NONE, QIE_STORE_ADD,
                   qie_fmap_as_mat(x));
    qie_run_release(run, mark);
    return run_resnet(m, &mid->res[1], h, w, err);
}

static qie_status take_maps(const qie_vae *v, const qie_run *run, int ph, int pw, maps *m,
                            qie_error *err) {
    size_t bytes = (size_t)qie_vae_largest_map(&v->c, ph, pw) * qie_dtype_size(run->act);
    m->run = run;
    QIE_TRY(qie_run_alloc(run, bytes, &m->x, err));
    QIE_TRY(qie_run_alloc(run, bytes, &m->a, err));
    return qie_run_alloc(run, bytes, &m->b, err);
}

/* pixels [h, w, 3] (row stride in floats) -> moments [h/8, w/8, 2 z] */
static qie_status encode_whole(qie_vae *v, const qie_run *run, const float *pixels, int64_t stride,
                               int h, int w, float *moments, qie_error *err) {
    const side *s = &v->enc;
    qie_run_mark mark = qie_run_mark_get(run);
    maps m;
    void *p;
    QIE_TRY(take_maps(v, run, h, w, &m, err));
    int lh = h / v->c.scale_factor, lw = w / v->c.scale_factor, z2 = 2 * v->c.z_dim;
    QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)lh * (size_t)lw * (size_t)z2, &p, err));
    qie_fmap raw = {p, QIE_F32, lh, lw, z2};
    /* The picture in f32, as it comes: the first layer has 3 channels. m.a holds it when it is a
     * window. */
    size_t bytes = sizeof(float) * 3 * (size_t)h * (size_t)w;
    if (stride != 3ll * w) {
        QIE_TRY(qie_run_alloc_host(run, bytes, &p, err));
        for (int y = 0; y < h; y++)
            memcpy((float *)p + 3ll * w * y, pixels + stride * y, sizeof(float) * 3 * (size_t)w);
        pixels = p;
    }
    const void *lent;
    QIE_TRY(qie_run_lend(run, pixels, bytes, &lent, err));
    qie_run_group(run, &v->group, NULL, 0, NULL);
    qie_fmap px = {(void *)(uintptr_t)lent, QIE_F32, h, w, 3};
    run_conv(run, px, &s->in, 1, false, NO_MAP, map_of(&m, m.x, h, w, s->in.w.out));
    for (int l = 0; l < v->c.n_levels; l++) {
        for (int r = 0; r < s->levels[l].n_res; r++)
            QIE_TRY(run_resnet(&m, &s->levels[l].res[r], h, w, err));
        if (s->levels[l].resample.w.data)
            resample(&m, &s->levels[l].resample, &h, &w, false);
    }
    QIE_TRY(run_mid(&m, &s->mid, h, w, err));
    qie_fmap x = map_of(&m, m.x, h, w, s->out.w.in);
    run->compute->ops.channel_norm(run->compute, x, s->norm_out, true, x);
    run_conv(run, x, &s->out, 1, false, NO_MAP, raw);
    bytes = sizeof(float) * (size_t)lh * (size_t)lw * (size_t)z2;
    QIE_TRY(qie_run_result(run, moments, bytes, &p, err));
    qie_fmap dst = {p, QIE_F32, lh, lw, z2};
    run_conv(run, raw, &s->quant, 1, false, NO_MAP, dst);
    QIE_TRY(qie_run_fetch(run, moments, p, bytes, err));
    qie_run_release(run, mark);
    return QIE_OK;
}

/* latents [h, w, z] (row stride in floats) -> pixels [8h, 8w, 3], not clamped */
static qie_status decode_whole(qie_vae *v, const qie_run *run, const float *latents, int64_t stride,
                               int h, int w, float *pixels, qie_error *err) {
    const side *s = &v->dec;
    qie_run_mark mark = qie_run_mark_get(run);
    maps m;
    int z = v->c.z_dim, f = v->c.scale_factor;
    void *in, *quant, *staged, *out;
    size_t bytes = sizeof(float) * (size_t)h * (size_t)w * (size_t)z;
    QIE_TRY(take_maps(v, run, h * f, w * f, &m, err));
    QIE_TRY(qie_run_alloc(run, bytes, &in, err));
    QIE_TRY(qie_run_alloc(run, bytes, &quant, err));
    QIE_TRY(qie_run_stage(run, in, bytes, &staged, err));
    for (int y = 0; y < h; y++)
        memcpy((float *)staged + (int64_t)y * w * z, latents + stride * y,
               sizeof(float) * (size_t)w * (size_t)z);
    qie_run_commit(run, in, staged, bytes);
    qie_run_group(run, &v->group, NULL, 0, NULL);
    qie_fmap a = {in, QIE_F32, h, w, z}, b = {quant, QIE_F32, h, w, z};
    run_conv(run, a, &s->quant, 1, false, NO_MAP, b);
    run_conv(run, b, &s->in, 1, false, NO_MAP, map_of(&m, m.x, h, w, s->in.w.out));
    QIE_TRY(run_mid(&m, &s->mid, h, w, err));
    for (int u = 0; u < v->c.n_levels; u++) {
        for (int r = 0; r < s->levels[u].n_res; r++)
            QIE_TRY(run_resnet(&m, &s->levels[u].res[r], h, w, err));
        if (s->levels[u].resample.w.data)
            resample(&m, &s->levels[u].resample, &h, &w, true);
    }
    bytes = sizeof(float) * 3 * (size_t)h * (size_t)w;
    QIE_TRY(qie_run_result(run, pixels, bytes, &out, err));
    qie_fmap x = map_of(&m, m.x, h, w, s->out.w.in), dst = {out, QIE_F32, h, w, 3};
    run->compute->ops.channel_norm(run->compute, x, s->norm_out, true, x);
    run_conv(run, x, &s->out, 1, false, NO_MAP, dst);
    QIE_TRY(qie_run_fetch(run, pixels, out, bytes, err));
    qie_run_release(run, mark);
    return QIE_OK;
}

/* ---- tiling, as diffusers' tiled_encode and tiled_decode: each tile on its own, then blended with
 * the tile above and the tile to the left, which are already blended themselves. All lengths in
 * output units. */
typedef struct tiling {
    int tile, step; /* in output units: side of a tile, distance between tiles */
    int channels;
    int out_h, out_w;
} tiling;

static void blend_down(const float *above, int above_h, int above_w, float *tile, int h, int w,
                       int extent, int c) {
    int n = above_h < h ? above_h : h;
    n = extent < n ? extent : n;
    for (int y = 0; y < n; y++)
        for (int x = 0; x < w && x < above_w; x++)
            for (int i = 0; i < c; i++) {
                float k = (float)y / (float)n, *t = tile + ((int64_t)y * w + x) * c + i;
                *t = above[((int64_t)(above_h - n + y) * above_w + x) * c + i] * (1 - k) + *t * k;
            }
}

static void blend_right(const float *left, int left_h, int left_w, float *tile, int h, int w,
                        int extent, int c) {
    int n = left_w < w ? left_w : w;
    n = extent < n ? extent : n;
    for (int y = 0; y < h && y < left_h; y++)
        for (int x = 0; x < n; x++)
            for (int i = 0; i < c; i++) {
                float k = (float)x / (float)n, *t = tile + ((int64_t)y * w + x) * c + i;
                *t = left[((int64_t)y * left_w + left_w - n + x) * c + i] * (1 - k) + *t * k;
            }
}

typedef struct tile_row {
    float *tiles; /* n tiles of tile x tile x channels each */
    int h;        /* of the tiles in this row */
    int *w;
} tile_row;

/* Compute tile (ty, tx) of the source into out; gives its size. */
typedef qie_status (*tile_fn)(void *arg, int ty, int tx, float *out, int *h, int *w,
                              qie_error *err);

static qie_status run_tiles(const qie_run *run, const tiling *t, tile_fn fn, void *arg, float *dst,
                            qie_error *err) {
    int ny = (t->out_h + t->step - 1) / t->step, nx = (t->out_w + t->step - 1) / t->step;
    size_t one = (size_t)t->tile * (size_t)t->tile * (size_t)t->channels;
    qie_run_mark mark = qie_run_mark_get(run);
    tile_row rows[2];
    for (int i = 0; i < 2; i++) {
        void *p;
        QIE_TRY(qie_run_alloc_host(run, sizeof(float) * one * (size_t)nx, &p, err));
        rows[i].tiles = p;
        QIE_TRY(qie_run_alloc_host(run, sizeof(int) * (size_t)nx, &p, err));
        rows[i].w = p;
        rows[i].h = 0;
    }
    int extent = t->tile - t->step;
    for (int ty = 0; ty < ny; ty++) {
        tile_row *now = &rows[ty & 1], *above = &rows[~ty & 1];
        for (int tx = 0; tx < nx; tx++)
            QIE_TRY(fn(arg, ty * t->step, tx * t->step, now->tiles + one * (size_t)tx, &now->h,
                       &now->w[tx], err));
        for (int tx = 0; tx < nx; tx++) {
            float *tile = now->tiles + one * (size_t)tx;
            int h = now->h, w = now->w[tx];
            if (ty)
                blend_down(above->tiles + one * (size_t)tx, above->h, above->w[tx], tile, h, w,
                           extent, t->channels);
            if (tx)
                blend_right(now->tiles + one * (size_t)(tx - 1), h, now->w[tx - 1], tile, h, w,
                            extent, t->channels);
            for (int y = 0; y < h && y < t->step && ty * t->step + y < t->out_h; y++) {
                int n = w < t->step ? w : t->step;
                if (tx * t->step + n > t->out_w)
                    n = t->out_w - tx * t->step;
                memcpy(dst + ((int64_t)(ty * t->step + y) * t->out_w + tx * t->step) * t->channels,
                       tile + (int64_t)y * w * t->channels,
                       sizeof(float) * (size_t)n * (size_t)t->channels);
            }
        }
    }
    qie_run_release(run, mark);
    return QIE_OK;
}

typedef struct tile_job {
    qie_vae *v;
    const qie_run *run;
    const float *src;
    int h, w; /* of the source, in its own units */
} tile_job;

static qie_status encode_tile(void *arg, int ty, int tx, float *out, int *h, int *w,
                              qie_error *err) {
    const tile_job *j = arg;
    int f = j->v->c.scale_factor, y = ty * f, x = tx * f;
    int th = j->h - y < QIE_VAE_TILE_PX ? j->h - y : QIE_VAE_TILE_PX;
    int tw = j->w - x < QIE_VAE_TILE_PX ? j->w - x : QIE_VAE_TILE_PX;
    *h = th / f;
    *w = tw / f;
    return encode_whole(j->v, j->run, j->src + ((int64_t)y * j->w + x) * 3, 3ll * j->w, th, tw, out,
                        err);
}

static qie_status decode_tile(void *arg, int ty, int tx, float *out, int *h, int *w,
                              qie_error *err) {
    const tile_job *j = arg;
    int f = j->v->c.scale_factor, y = ty / f, x = tx / f, n = QIE_VAE_TILE_PX / f;
    int th = j->h - y < n ? j->h - y : n, tw = j->w - x < n ? j->w - x : n;
    *h = th * f;
    *w = tw * f;
    return decode_whole(j->v, j->run, j->src + ((int64_t)y * j->w + x) * j->v->c.z_dim,
                        (int64_t)j->w * j->v->c.z_dim, th, tw, out, err);
}

qie_status qie_vae_encode(qie_vae *v, const qie_run *run, const float *pixels, int h, int w,
                          bool tiled, float *mean, qie_error *err) {
    int f = v->c.scale_factor, z = v->c.z_dim, lh = h / f, lw = w / f;
    qie_run_mark mark = qie_run_mark_get(run);
    void *p;
    QIE_TRY(
        qie_run_alloc_host(run, sizeof(float) * 2 * (size_t)z * (size_t)lh * (size_t)lw, &p, err));
    float *moments = p;
    if (tiled && (h > QIE_VAE_TILE_PX || w > QIE_VAE_TILE_PX)) {
        tile_job j = {v, run, pixels, h, w};
        tiling t = {QIE_VAE_TILE_PX / f, QIE_VAE_STRIDE_PX / f, 2 * z, lh, lw};
        QIE_TRY(run_tiles(run, &t, encode_tile, &j, moments, err));
    } else
        QIE_TRY(encode_whole(v, run, pixels, 3ll * w, h, w, moments, err));
    for (int64_t i = 0; i < (int64_t)lh * lw; i++) /* mean first, log variance behind it */
        memcpy(mean + i * z, moments + i * 2 * z, sizeof(float) * (size_t)z);
    qie_run_release(run, mark);
    return QIE_OK;
}

qie_status qie_vae_decode(qie_vae *v, const qie_run *run, const float *latents, int h, int w,
                          bool tiled, float *pixels, qie_error *err) {
    int f = v->c.scale_factor;
    if (tiled && (h > QIE_VAE_TILE_PX / f || w > QIE_VAE_TILE_PX / f)) {
        tile_job j = {v, run, latents, h, w};
        tiling t = {QIE_VAE_TILE_PX, QIE_VAE_STRIDE_PX, 3, h * f, w * f};
        QIE_TRY(run_tiles(run, &t, decode_tile, &j, pixels, err));
    } else
        QIE_TRY(decode_whole(v, run, latents, (int64_t)w * v->c.z_dim, h, w, pixels, err));
    int64_t n = (int64_t)h * w * f * f * 3;
    for (int64_t i = 0; i < n; i++)
        pixels[i] = pixels[i] < -1 ? -1 : pixels[i] > 1 ? 1 : pixels[i];
    return QIE_OK;
}
