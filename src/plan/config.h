/* The numbers of a model folder: everything that its config files say, checked, nothing assumed of
 * the released sizes. Sources of keys and defaults: docs/MODEL.md, "configs". */
#ifndef QIE_PLAN_CONFIG_H
#define QIE_PLAN_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/files.h"
#include "qie/error.h"

#define QIE_MAX_FULLATT 128
#define QIE_MAX_VAE_LEVELS 8
#define QIE_MAX_Z_DIM 64

typedef struct qie_transformer_config {
    int patch_size, in_channels, out_channels, num_layers;
    int attention_head_dim, num_attention_heads, joint_attention_dim;
    int axes_dims_rope[3]; /* frame, height, width; their sum is attention_head_dim */
    bool zero_cond_t;
    int inner_dim; /* heads x head_dim */
} qie_transformer_config;

typedef struct qie_vision_config {
    int depth, hidden_size, num_heads, intermediate_size, out_hidden_size;
    int patch_size, temporal_patch_size, spatial_merge_size, window_size;
    int n_fullatt;
    int fullatt_block_indexes[QIE_MAX_FULLATT];
} qie_vision_config;

typedef struct qie_text_config {
    int vocab_size, hidden_size, intermediate_size, num_hidden_layers;
    int num_attention_heads, num_key_value_heads, head_dim;
    double rms_norm_eps, rope_theta;
    int mrope_section[3]; /* time, height, width; their sum is head_dim / 2 */
    int image_token_id;
} qie_text_config;

typedef struct qie_vae_config {
    int base_dim, z_dim, num_res_blocks;
    int n_levels;
    int dim_mult[QIE_MAX_VAE_LEVELS];
    double latents_mean[QIE_MAX_Z_DIM], latents_std[QIE_MAX_Z_DIM];
    int scale_factor; /* pixels per latent side: 2^(n_levels - 1) */
} qie_vae_config;

typedef struct qie_scheduler_config {
    int num_train_timesteps;
    bool use_dynamic_shifting;
    double base_shift, max_shift, shift;
    int base_image_seq_len, max_image_seq_len;
    double shift_terminal; /* 0: none */
    bool exponential;      /* time_shift_type: exponential, else linear */
} qie_scheduler_config;

typedef struct qie_processor_config {
    double image_mean[3], image_std[3];
    double rescale_factor;
    int64_t min_pixels, max_pixels;
} qie_processor_config;

/* qwen_edit.json beside model_index.json: what this model is best used with. */
typedef struct qie_defaults_config {
    int num_inference_steps; /* 40 unless the file says otherwise */
    double true_cfg_scale;   /* 4.0 */
    int max_side;            /* 0: none */
    int64_t ref_area;        /* 0: none */
    bool keep_size;
    bool lightning;                    /* a merged Lightning checkpoint: plan/preset.h */
    bool steps_told, cfg_told;         /* the file names them */
    char about_en[400], about_zh[400]; /* "" if absent */
} qie_defaults_config;

typedef struct qie_model_config {
    qie_transformer_config transformer;
    qie_vision_config vision;
    qie_text_config text;
    qie_vae_config vae;
    qie_scheduler_config scheduler;
    qie_processor_config processor;
    qie_defaults_config defaults;
    const char *tokenizer_folder; /* "processor" or "tokenizer": static string */
} qie_model_config;

/* Read and check all configs of a model. Errors name the file and the key: QIE_E_NOT_FOUND (a file
 * is missing), QIE_E_CORRUPT (absurd or contradictory numbers), QIE_E_UNSUPPORTED (another model or
 * an option that this program does not compute). */
qie_status qie_model_config_read(qie_files *files, qie_model_config *out, qie_error *err);

#endif
