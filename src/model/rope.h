/* Rotation tables of the three position schemes, as cos and sin [rows, head_dim / 2] in f32. */
#ifndef QIE_MODEL_ROPE_H
#define QIE_MODEL_ROPE_H

#include "plan/config.h"
#include "plan/sizes.h"

/* Transformer, image rows: target grid, then each reference (frame p = 0, 1, ..), positions
 * centred. rows = n_target + n_reference. Source: QwenEmbedRope with scale_rope. */
void qie_rope_image(const qie_transformer_config *c, const qie_size_plan *s, float *cos,
                    float *sin);
/* Transformer, text rows: position m + i on all three axes. */
void qie_rope_text(const qie_transformer_config *c, const qie_size_plan *s, int64_t n_text,
                   float *cos, float *sin);
/* Language model: position triples [n][3] per token -> tables by mrope sections. */
void qie_rope_language(const qie_text_config *c, const int32_t *triples, int64_t n, float *cos,
                       float *sin);
/* Vision tower: (row, col) of each patch -> tables, half of the frequencies for each. */
void qie_rope_vision(const qie_vision_config *c, const int32_t *rows_cols, int64_t n, float *cos,
                     float *sin);

#endif
