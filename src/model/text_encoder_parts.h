/* What text_encoder.c and vision_encoder.c share: the bound tensors of one Qwen2.5-VL. */
#ifndef QIE_MODEL_TEXT_ENCODER_PARTS_H
#define QIE_MODEL_TEXT_ENCODER_PARTS_H

#include "model/text_encoder.h"

typedef struct qie_vision_block {
    qie_vec norm1, norm2;
    qie_linear qkv[3], proj, gate, up, down; /* qkv: query, key, value */
    qie_weight_group group;
} qie_vision_block;

typedef struct qie_vision {
    qie_linear patch_embed, merge0, merge2;
    qie_vec ln_q;
    qie_vision_block *blocks; /* [depth] */
    qie_weight_group fixed;   /* patch embedding and merger */
} qie_vision;

typedef struct qie_language_layer {
    qie_vec input_norm, post_norm;
    qie_linear q, k, v, o, gate, up, down;
    qie_weight_group group;
} qie_language_layer;

struct qie_text_encoder {
    qie_text_config t;
    qie_vision_config v;
    qie_vision vision;
    qie_wmat embed_tokens;
    qie_vec norm;
    qie_language_layer *layers; /* [num_hidden_layers] */
    qie_weight_group fixed;     /* the final norm; of the embedding only a few rows are read */
};

/* out->blocks must have room for depth entries. */
qie_status qie_vision_bind(const qie_vision_config *v, const qie_weights *w, qie_vision *out,
                           qie_error *err);

#endif
