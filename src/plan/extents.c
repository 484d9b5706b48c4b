#include "plan/extents.h"

#include <stddef.h>

#include "plan/tensors.h"

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

qie_extents qie_extents_of(const qie_model_config *c) {
    const qie_vision_config *v = &c->vision;
    int64_t dim = c->transformer.inner_dim,
            merged = (int64_t)v->spatial_merge_size * v->spatial_merge_size * v->hidden_size;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    qie_extents l = {0};
    const int64_t ks[] = {4 * dim,
                          c->transformer.joint_attention_dim,
                          c->text.hidden_size,
                          c->text.intermediate_size,
                          v->intermediate_size,
                          merged,
                          patch,
                          256};
    const int64_t ns[] = {6 * dim,
                          c->text.hidden_size,
                          c->text.intermediate_size,
                          3ll * v->hidden_size,
                          v->intermediate_size,
                          merged};
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++)
        l.max_k = larger(l.max_k, ks[i]);
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
        l.max_n = larger(l.max_n, ns[i]);
    int64_t widest = 0;
    for (int i = 0; i < c->vae.n_levels; i++)
        widest = larger(widest, qie_vae_channels(&c->vae, i));
    widest = larger(widest, c->vae.base_dim);
    l.max_k = larger(l.max_k, widest);
    l.max_n = larger(l.max_n, 3 * widest);
    l.max_conv_k = 9 * larger(widest, 2ll * c->vae.z_dim);
    l.max_conv_n = larger(widest, 2ll * c->vae.z_dim);
    l.max_head_dim = (int)larger(larger(c->transformer.attention_head_dim, c->text.head_dim),
                                 larger(v->hidden_size / v->num_heads, widest));
    return l;
}
