/* Qwen2.5-VL as the pipeline uses it: pictures and prompt in, hidden states after the final norm
 * out. */
#ifndef QIE_MODEL_TEXT_ENCODER_H
#define QIE_MODEL_TEXT_ENCODER_H

#include "model/run.h"
#include "plan/config.h"
#include "plan/sizes.h"
#include "qie/edit.h"
#include "text/prompt.h"

typedef struct qie_text_encoder qie_text_encoder;

/* Bind all tensors of language model and vision tower (lm_head is never touched); w must outlive
 * the object. */
qie_status qie_text_encoder_open(const qie_text_config *t, const qie_vision_config *v,
                                 const qie_weights *w, qie_text_encoder **out, qie_error *err);
void qie_text_encoder_close(qie_text_encoder *e);
/* Its groups of weights in order of use, 2 + depth + num_hidden_layers of them. */
size_t qie_text_encoder_groups(qie_text_encoder *e, qie_weight_group **out);
/* Call fn with the name and place of every linear layer of both towers. */
void qie_text_encoder_each_linear(qie_text_encoder *e,
                                  void (*fn)(void *arg, const char *name, qie_linear *l),
                                  void *arg);

/* Vision tower over all pictures of a request.
 * patches [n_patches, 3 * temporal * patch * patch] in merge-block order, pictures after each other
 * (the processor's pixel_values); features [n_vision_tokens, out_hidden_size] F32, raster order
 * within each picture. Errors: QIE_E_CANCELLED between blocks. */
qie_status qie_vision_encode(qie_text_encoder *e, const qie_run *run, const qie_size_plan *sizes,
                             const float *patches, float *features, qie_error *err);

/* Keys and values of the tokens that prompts begin with, so that the next one computes only what
 * differs: the template up to the first picture, and from there to the end of the last picture. */
typedef struct qie_language_part {
    int64_t n;   /* tokens */
    bool filled; /* false: the next encode stores them; true: it starts behind them, if behind all
                    parts before, too */
    void *data;  /* of operations: [num_hidden_layers][k, v][n, n_kv_heads * head_dim] */
} qie_language_part;
typedef struct qie_language_prefix {
    qie_language_part parts[QIE_PROMPT_PARTS];
} qie_language_prefix;
/* The token that the next encode starts with. */
int64_t qie_language_start(const qie_language_prefix *prefix);

/* Language model: ids [n_ids], vision features for the tokens image_pad_id, in order; hidden_last
 * [n_ids, hidden] F32 after the final norm. The number of image_pad_id among ids, from the token
 * that it starts with, must be n_features (checked: QIE_E_INTERNAL). prefix, of fewer tokens than
 * n_ids: the rows before qie_language_start() belong to an encode with the same leading ids;
 * hidden_last's are left as they are. n_drop < n_ids: so many rows at the start are not asked for;
 * hidden_last's are undefined. */
qie_status qie_language_encode(qie_text_encoder *e, const qie_run *run, const qie_size_plan *sizes,
                               const int32_t *ids, int64_t n_ids, int32_t image_pad_id,
                               const float *features, int64_t n_features, qie_positions positions,
                               qie_language_prefix *prefix, int64_t n_drop, float *hidden_last,
                               qie_error *err);

/* Order in which the vision tower works: for each group of merge x merge patches in the tower, its
 * merged cell in raster order (window_index), and the window boundaries in patches. index has
 * n_vision_tokens entries, bounds (out) at most n_vision_tokens + 1; returns the number of windows.
 * Exposed for tests. */
size_t qie_vision_windows(const qie_vision_config *v, const qie_size_plan *sizes, int32_t *index,
                          int64_t *bounds);

#endif
