#include "model/rope.h"

#include <math.h>

/* frequency i of an axis with d values: theta^(-2i/d), float32 as the reference computes it */
static float frequency(double theta, int i, int d) {
    return 1.0f / powf((float)theta, (float)(2 * i) / (float)d);
}

/* One row of the transformer's table from its three positions. */
static void row_of(const qie_transformer_config *c, const float *freq, const int pos[3],
                   float *cosine, float *sine) {
    int at = 0;
    for (int axis = 0; axis < 3; axis++)
        for (int i = 0; i < c->axes_dims_rope[axis] / 2; i++, at++) {
            float angle = (float)pos[axis] * freq[at];
            cosine[at] = (float)cos((double)angle);
            sine[at] = (float)sin((double)angle);
        }
}

static void frequencies(const qie_transformer_config *c, float *freq) {
    int at = 0;
    for (int axis = 0; axis < 3; axis++)
        for (int i = 0; i < c->axes_dims_rope[axis] / 2; i++)
            freq[at++] = frequency(10000.0, i, c->axes_dims_rope[axis]);
}

void qie_rope_image(const qie_transformer_config *c, const qie_size_plan *s, float *cosine,
                    float *sine) {
    float freq[256];
    frequencies(c, freq);
    int half = c->attention_head_dim / 2;
    int64_t row = 0;
    for (int p = 0; p <= s->n_images; p++) {
        int gh = p ? s->images[p - 1].grid_h : s->grid_h,
            gw = p ? s->images[p - 1].grid_w : s->grid_w;
        for (int y = 0; y < gh; y++)
            for (int x = 0; x < gw; x++, row++) {
                int pos[3] = {p, y - (gh - gh / 2), x - (gw - gw / 2)};
                row_of(c, freq, pos, cosine + row * half, sine + row * half);
            }
    }
}

void qie_rope_text(const qie_transformer_config *c, const qie_size_plan *s, int64_t n_text,
                   float *cosine, float *sine) {
    float freq[256];
    frequencies(c, freq);
    int half = c->attention_head_dim / 2, m = qie_rope_text_start(s);
    for (int64_t i = 0; i < n_text; i++) {
        int p = m + (int)i, pos[3] = {p, p, p};
        row_of(c, freq, pos, cosine + i * half, sine + i * half);
    }
}

void qie_rope_language(const qie_text_config *c, const int32_t *triples, int64_t n, float *cosine,
                       float *sine) {
    int half = c->head_dim / 2;
    for (int j = 0; j < half; j++) {
        int axis = j < c->mrope_section[0]                         ? 0
                   : j < c->mrope_section[0] + c->mrope_section[1] ? 1
                                                                   : 2;
        float f = frequency(c->rope_theta, j, c->head_dim);
        for (int64_t r = 0; r < n; r++) {
            float angle = (float)triples[r * 3 + axis] * f;
            cosine[r * half + j] = (float)cos((double)angle);
            sine[r * half + j] = (float)sin((double)angle);
        }
    }
}

void qie_rope_vision(const qie_vision_config *c, const int32_t *rows_cols, int64_t n, float *cosine,
                     float *sine) {
    int half = c->hidden_size / c->num_heads / 2, quarter = half / 2;
    for (int j = 0; j < half; j++) {
        /* 10000: theta of Qwen2_5_VisionRotaryEmbedding; its dimension is half a head */
        float f = frequency(10000.0, j % quarter, half);
        for (int64_t r = 0; r < n; r++) {
            float angle = (float)rows_cols[r * 2 + (j >= quarter)] * f;
            cosine[r * half + j] = (float)cos((double)angle);
            sine[r * half + j] = (float)sin((double)angle);
        }
    }
}
