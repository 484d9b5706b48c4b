#include "plan/tensors.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef struct emitter {
    qie_tensor_spec_fn fn;
    void *arg;
    bool go;
} emitter;

static void emit(emitter *e, bool unused, int n_dims, int64_t s0, int64_t s1, int64_t s2,
                 int64_t s3, int64_t s4, const char *fmt, va_list ap) {
    if (!e->go)
        return;
    qie_tensor_spec t = {.n_dims = n_dims, .shape = {s0, s1, s2, s3, s4}, .unused = unused};
    vsnprintf(t.name, sizeof t.name, fmt, ap);
    e->go = e->fn(e->arg, &t);
}

__attribute__((format(printf, 3, 4))) static void vec(emitter *e, int64_t n, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    emit(e, false, 1, n, 0, 0, 0, 0, fmt, ap);
    va_end(ap);
}

__attribute__((format(printf, 4, 5))) static void mat(emitter *e, int64_t n, int64_t k,
                                                      const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    emit(e, false, 2, n, k, 0, 0, 0, fmt, ap);
    va_end(ap);
}

/* prefix.weight [n, k] and prefix.bias [n] */
static void linear(emitter *e, int64_t n, int64_t k, const char *prefix, const char *name) {
    mat(e, n, k, "%s%s.weight", prefix, name);
    vec(e, n, "%s%s.bias", prefix, name);
}

bool qie_tensors_transformer(const qie_transformer_config *c, qie_tensor_spec_fn fn, void *arg) {
    emitter e = {fn, arg, true};
    int64_t d = c->inner_dim;
    linear(&e, d, 256, "", "time_text_embed.timestep_embedder.linear_1");
    linear(&e, d, d, "", "time_text_embed.timestep_embedder.linear_2");
    vec(&e, c->joint_attention_dim, "txt_norm.weight");
    linear(&e, d, c->in_channels, "", "img_in");
    linear(&e, d, c->joint_attention_dim, "", "txt_in");
    linear(&e, 2 * d, d, "", "norm_out.linear");
    linear(&e, (int64_t)c->patch_size * c->patch_size * c->out_channels, d, "", "proj_out");
    for (int b = 0; b < c->num_layers; b++) {
        char p[64];
        snprintf(p, sizeof p, "transformer_blocks.%d.", b);
        static const char *const attn[] = {"attn.to_q",       "attn.to_k",       "attn.to_v",
                                           "attn.to_out.0",   "attn.add_q_proj", "attn.add_k_proj",
                                           "attn.add_v_proj", "attn.to_add_out"};
        for (int i = 0; i < 8; i++)
            linear(&e, d, d, p, attn[i]);
        static const char *const norms[] = {"norm_q", "norm_k", "norm_added_q", "norm_added_k"};
        for (int i = 0; i < 4; i++)
            vec(&e, c->attention_head_dim, "%sattn.%s.weight", p, norms[i]);
        linear(&e, 6 * d, d, p, "img_mod.1");
        linear(&e, 6 * d, d, p, "txt_mod.1");
        linear(&e, 4 * d, d, p, "img_mlp.net.0.proj");
        linear(&e, d, 4 * d, p, "img_mlp.net.2");
        linear(&e, 4 * d, d, p, "txt_mlp.net.0.proj");
        linear(&e, d, 4 * d, p, "txt_mlp.net.2");
    }
    return e.go;
}

__attribute__((format(printf, 8, 9))) static void any(emitter *e, bool unused, int n_dims,
                                                      int64_t s0, int64_t s1, int64_t s2, int64_t k,
                                                      const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    emit(e, unused, n_dims, s0, s1, s2, k, k, fmt, ap);
    va_end(ap);
}

bool qie_tensors_text_encoder(const qie_text_config *t, const qie_vision_config *v,
                              qie_tensor_spec_fn fn, void *arg) {
    emitter e = {fn, arg, true};
    int64_t h = t->hidden_size, kv = (int64_t)t->num_key_value_heads * t->head_dim;
    mat(&e, t->vocab_size, h, "model.embed_tokens.weight");
    for (int l = 0; l < t->num_hidden_layers; l++) {
        char p[64];
        snprintf(p, sizeof p, "model.layers.%d.", l);
        linear(&e, h, h, p, "self_attn.q_proj");
        linear(&e, kv, h, p, "self_attn.k_proj");
        linear(&e, kv, h, p, "self_attn.v_proj");
        mat(&e, h, h, "%sself_attn.o_proj.weight", p);
        mat(&e, t->intermediate_size, h, "%smlp.gate_proj.weight", p);
        mat(&e, t->intermediate_size, h, "%smlp.up_proj.weight", p);
        mat(&e, h, t->intermediate_size, "%smlp.down_proj.weight", p);
        vec(&e, h, "%sinput_layernorm.weight", p);
        vec(&e, h, "%spost_attention_layernorm.weight", p);
    }
    vec(&e, h, "model.norm.weight");
    any(&e, true, 2, t->vocab_size, h, 0, 0, "lm_head.weight");
    int64_t w = v->hidden_size, m = (int64_t)v->spatial_merge_size * v->spatial_merge_size * w;
    any(&e, false, 5, w, 3, v->temporal_patch_size, v->patch_size,
        "visual.patch_embed.proj.weight");
    for (int b = 0; b < v->depth; b++) {
        char p[64];
        snprintf(p, sizeof p, "visual.blocks.%d.", b);
        vec(&e, w, "%snorm1.weight", p);
        vec(&e, w, "%snorm2.weight", p);
        linear(&e, 3 * w, w, p, "attn.qkv");
        linear(&e, w, w, p, "attn.proj");
        linear(&e, v->intermediate_size, w, p, "mlp.gate_proj");
        linear(&e, v->intermediate_size, w, p, "mlp.up_proj");
        linear(&e, w, v->intermediate_size, p, "mlp.down_proj");
    }
    vec(&e, w, "visual.merger.ln_q.weight");
    linear(&e, m, m, "", "visual.merger.mlp.0");
    linear(&e, v->out_hidden_size, m, "", "visual.merger.mlp.2");
    return e.go;
}

static void conv3(emitter *e, bool unused, int64_t out, int64_t in, int64_t kt, int64_t k,
                  const char *name) {
    any(e, unused, 5, out, in, kt, k, "%s.weight", name);
    any(e, unused, 1, out, 0, 0, 0, "%s.bias", name);
}

static void conv2(emitter *e, int64_t out, int64_t in, int64_t k, const char *name) {
    if (e->go) {
        qie_tensor_spec t = {.n_dims = 4, .shape = {out, in, k, k}};
        snprintf(t.name, sizeof t.name, "%s.weight", name);
        e->go = e->fn(e->arg, &t);
    }
    vec(e, out, "%s.bias", name);
}

static void resnet(emitter *e, int64_t in, int64_t out, const char *p) {
    char n[128];
    any(e, false, 4, in, 1, 1, 1, "%s.norm1.gamma", p);
    snprintf(n, sizeof n, "%s.conv1", p);
    conv3(e, false, out, in, 3, 3, n);
    any(e, false, 4, out, 1, 1, 1, "%s.norm2.gamma", p);
    snprintf(n, sizeof n, "%s.conv2", p);
    conv3(e, false, out, out, 3, 3, n);
    if (in != out) {
        snprintf(n, sizeof n, "%s.conv_shortcut", p);
        conv3(e, false, out, in, 1, 1, n);
    }
}

static void mid_block(emitter *e, int64_t c, const char *side) {
    char p[96];
    for (int i = 0; i < 2; i++) {
        snprintf(p, sizeof p, "%s.mid_block.resnets.%d", side, i);
        resnet(e, c, c, p);
    }
    any(e, false, 3, c, 1, 1, 1, "%s.mid_block.attentions.0.norm.gamma", side);
    snprintf(p, sizeof p, "%s.mid_block.attentions.0.to_qkv", side);
    conv2(e, 3 * c, c, 1, p);
    snprintf(p, sizeof p, "%s.mid_block.attentions.0.proj", side);
    conv2(e, c, c, 1, p);
}

int qie_vae_channels(const qie_vae_config *c, int level) {
    return c->base_dim * c->dim_mult[level];
}

static void vae_encoder(emitter *e, const qie_vae_config *c) {
    char p[96];
    int block = 0;
    int64_t in = c->base_dim;
    conv3(e, false, in, 3, 3, 3, "encoder.conv_in");
    for (int l = 0; l < c->n_levels; l++) {
        int64_t out = qie_vae_channels(c, l);
        for (int r = 0; r < c->num_res_blocks; r++) {
            snprintf(p, sizeof p, "encoder.down_blocks.%d", block++);
            resnet(e, in, out, p);
            in = out;
        }
        if (l < c->n_levels - 1) {
            snprintf(p, sizeof p, "encoder.down_blocks.%d.resample.1", block++);
            conv2(e, out, out, 3, p);
        }
    }
    mid_block(e, in, "encoder");
    any(e, false, 4, in, 1, 1, 1, "encoder.norm_out.gamma");
    conv3(e, false, 2 * c->z_dim, in, 3, 3, "encoder.conv_out");
    conv3(e, false, 2 * c->z_dim, 2 * c->z_dim, 1, 1, "quant_conv");
}

static void vae_decoder(emitter *e, const qie_vae_config *c) {
    char p[96];
    int64_t in = qie_vae_channels(c, c->n_levels - 1);
    conv3(e, false, c->z_dim, c->z_dim, 1, 1, "post_quant_conv");
    conv3(e, false, in, c->z_dim, 3, 3, "decoder.conv_in");
    mid_block(e, in, "decoder");
    for (int u = 0; u < c->n_levels; u++) {
        int64_t out = qie_vae_channels(c, c->n_levels - 1 - u);
        for (int r = 0; r <= c->num_res_blocks; r++) {
            snprintf(p, sizeof p, "decoder.up_blocks.%d.resnets.%d", u, r);
            resnet(e, in, out, p);
            in = out;
        }
        if (u < c->n_levels - 1) { /* the upsampler halves the channels */
            snprintf(p, sizeof p, "decoder.up_blocks.%d.upsamplers.0.resample.1", u);
            conv2(e, out / 2, out, 3, p);
            in = out / 2;
        }
    }
    any(e, false, 4, in, 1, 1, 1, "decoder.norm_out.gamma");
    conv3(e, false, 3, in, 3, 3, "decoder.conv_out");
}

bool qie_tensors_vae(const qie_vae_config *c, qie_tensor_spec_fn fn, void *arg) {
    emitter e = {fn, arg, true};
    vae_encoder(&e, c);
    vae_decoder(&e, c);
    return e.go;
}
