#define _GNU_SOURCE
#include "plan/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"

#define MAX_CONFIG_BYTES (8u << 20)

/* Bounds of what a config may say: far above any model of this family, far below what overflows. */
enum { MAX_DIM = 1 << 17, MAX_LAYERS = 1024, MAX_HEADS = 1024, MAX_VOCAB = 1 << 24 };

static qie_status parse(qie_files *files, const char *name, qie_json **out, qie_error *err) {
    const unsigned char *data;
    size_t n;
    *out = NULL;
    QIE_TRY(qie_files_get(files, name, &data, &n, err));
    QIE_FAIL_IF(n > MAX_CONFIG_BYTES, QIE_E_CORRUPT, err, name,
                "'%s' has %zu bytes: no config is that large", name, n);
    qie_status st = qie_json_parse((const char *)data, n, name, out, err);
    if (st == QIE_OK && !qie_json_is_object(*out)) {
        qie_json_free(*out);
        *out = NULL;
        st = qie_fail(err, QIE_E_CORRUPT, name, "'%s' is not a JSON object", name);
    }
    if (st == QIE_E_SYNTAX && err)
        err->status = QIE_E_CORRUPT;
    return st == QIE_E_SYNTAX ? QIE_E_CORRUPT : st;
}

/* A reader of one object that remembers the first failure, so that the lists below stay lists. */
typedef struct reader {
    const qie_json *obj, *fallback; /* fallback: where old flat configs keep the same keys */
    const char *file;
    qie_error *err;
    qie_status st;
} reader;

static const qie_json *member(const reader *r, const char *key) {
    const qie_json *m = qie_json_member(r->obj, key);
    return m || !r->fallback ? m : qie_json_member(r->fallback, key);
}

static void corrupt(reader *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void corrupt(reader *r, const char *fmt, ...) {
    if (r->st != QIE_OK)
        return;
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    r->st = qie_fail(r->err, QIE_E_CORRUPT, r->file, "%s: %s", r->file, text);
}

static void unsupported(reader *r, const char *text) {
    if (r->st == QIE_OK)
        r->st = qie_fail(r->err, QIE_E_UNSUPPORTED, r->file, "%s: %s", r->file, text);
}

#define REQUIRED INT64_MIN

static int64_t num(reader *r, const char *key, int64_t def, int64_t min, int64_t max) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK)
        return min;
    if (!m) {
        if (def == REQUIRED)
            corrupt(r, "'%s' is missing", key);
        return def == REQUIRED ? min : def;
    }
    double d = qie_json_number(m);
    if (!qie_json_is_number(m) || d != floor(d)) {
        corrupt(r, "'%s' must be an integer", key);
        return min;
    }
    if (d < (double)min || d > (double)max) {
        corrupt(r, "'%s' is %.0f, not within %lld..%lld", key, d, (long long)min, (long long)max);
        return min;
    }
    return (int64_t)d;
}

static int dim(reader *r, const char *key, int64_t def, int64_t max) {
    return (int)num(r, key, def, 1, max);
}

static double real(reader *r, const char *key, double def, double min, double max) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK || !m)
        return def;
    double d = qie_json_number(m);
    if (!qie_json_is_number(m) || !(d >= min && d <= max)) {
        corrupt(r, "'%s' must be a number within %g..%g", key, min, max);
        return def;
    }
    return d;
}

static bool flag(reader *r, const char *key, bool def) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK || !m)
        return def;
    if (!qie_json_is_bool(m))
        corrupt(r, "'%s' must be true or false", key);
    return qie_json_bool(m);
}

static const char *text(reader *r, const char *key, const char *def) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK || !m)
        return def;
    const char *s = qie_json_string(m, NULL);
    if (!s)
        corrupt(r, "'%s' must be a string", key);
    return s ? s : def;
}

/* Integers of an array into out; returns how many, -1 when absent. */
static int ints(reader *r, const char *key, int max_n, int64_t min, int64_t max, int *out) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK || !m)
        return -1;
    size_t n = qie_json_size(m);
    if (!qie_json_is_array(m) || n > (size_t)max_n) {
        corrupt(r, "'%s' must be a list of at most %d integers", key, max_n);
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        double d = qie_json_number(qie_json_at(m, i));
        if (!qie_json_is_number(qie_json_at(m, i)) || d != floor(d) || d < (double)min ||
            d > (double)max) {
            corrupt(r, "'%s' holds something else than integers within %lld..%lld", key,
                    (long long)min, (long long)max);
            return -1;
        }
        out[i] = (int)d;
    }
    return (int)n;
}

static int reals(reader *r, const char *key, int max_n, double *out) {
    const qie_json *m = member(r, key);
    if (r->st != QIE_OK || !m)
        return -1;
    size_t n = qie_json_size(m);
    if (!qie_json_is_array(m) || n > (size_t)max_n) {
        corrupt(r, "'%s' must be a list of at most %d numbers", key, max_n);
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        out[i] = qie_json_number(qie_json_at(m, i));
        if (!qie_json_is_number(qie_json_at(m, i)) || !isfinite(out[i])) {
            corrupt(r, "'%s' holds something else than numbers", key);
            return -1;
        }
    }
    return (int)n;
}

static void check_class(reader *r, const char *key, const char *expected) {
    const char *c = text(r, key, expected);
    if (r->st == QIE_OK && strcmp(c, expected)) {
        char t[200];
        snprintf(t, sizeof t, "is a %.80s, this program runs %s", c, expected);
        unsupported(r, t);
    }
}

static void read_transformer(reader *r, qie_transformer_config *c) {
    check_class(r, "_class_name", "QwenImageTransformer2DModel");
    c->patch_size = dim(r, "patch_size", 2, 16);
    c->in_channels = dim(r, "in_channels", 64, MAX_DIM);
    c->out_channels = dim(r, "out_channels", 16, MAX_DIM);
    c->num_layers = dim(r, "num_layers", 60, MAX_LAYERS);
    c->attention_head_dim = dim(r, "attention_head_dim", 128, 512);
    c->num_attention_heads = dim(r, "num_attention_heads", 24, MAX_HEADS);
    c->joint_attention_dim = dim(r, "joint_attention_dim", 3584, MAX_DIM);
    static const int released[3] = {16, 56, 56};
    memcpy(c->axes_dims_rope, released, sizeof released);
    int n = ints(r, "axes_dims_rope", 3, 2, 512, c->axes_dims_rope);
    if (n >= 0 && n != 3)
        corrupt(r, "'axes_dims_rope' must have 3 entries");
    c->zero_cond_t = flag(r, "zero_cond_t", false);
    c->inner_dim = c->attention_head_dim * c->num_attention_heads;
    if (c->inner_dim > MAX_DIM)
        corrupt(r, "inner dimension %d is above %d", c->inner_dim, (int)MAX_DIM);
    int sum = 0;
    for (int i = 0; i < 3; i++) {
        sum += c->axes_dims_rope[i];
        if (c->axes_dims_rope[i] % 2)
            corrupt(r, "'axes_dims_rope' entries must be even");
    }
    if (sum != c->attention_head_dim)
        corrupt(r, "'axes_dims_rope' adds up to %d, 'attention_head_dim' is %d", sum,
                c->attention_head_dim);
    if (flag(r, "guidance_embeds", false))
        unsupported(r, "'guidance_embeds' is true: not a model of the Qwen-Image-Edit family");
    if (flag(r, "use_layer3d_rope", false) || flag(r, "use_additional_t_cond", false))
        unsupported(r, "this is a Qwen-Image-Layered model, which this program does not run");
    if (c->patch_size != 2)
        unsupported(r, "'patch_size' is not 2");
}

static void read_vision(reader *r, qie_vision_config *v) {
    v->depth = dim(r, "depth", 32, MAX_LAYERS);
    v->hidden_size = dim(r, "hidden_size", 3584, MAX_DIM);
    v->num_heads = dim(r, "num_heads", 16, MAX_HEADS);
    v->intermediate_size = dim(r, "intermediate_size", 3420, MAX_DIM);
    v->out_hidden_size = dim(r, "out_hidden_size", 3584, MAX_DIM);
    v->patch_size = dim(r, "patch_size", 14, 64);
    v->temporal_patch_size = dim(r, "temporal_patch_size", 2, 8);
    v->spatial_merge_size = dim(r, "spatial_merge_size", 2, 8);
    v->window_size = dim(r, "window_size", 112, 4096);
    static const int released[4] = {7, 15, 23, 31};
    int n =
        ints(r, "fullatt_block_indexes", QIE_MAX_FULLATT, 0, MAX_LAYERS, v->fullatt_block_indexes);
    v->n_fullatt = n;
    if (n < 0) {
        memcpy(v->fullatt_block_indexes, released, sizeof released);
        v->n_fullatt = 4;
    }
    int64_t channels = num(r, member(r, "in_chans") ? "in_chans" : "in_channels", 3, 1, 64);
    if (r->st == QIE_OK && channels != 3)
        unsupported(r, "the vision tower does not take 3 channels");
    if (r->st == QIE_OK && strcmp(text(r, "hidden_act", "silu"), "silu"))
        unsupported(r, "the vision tower's 'hidden_act' is not silu");
    if (r->st == QIE_OK && (v->hidden_size % v->num_heads || v->hidden_size / v->num_heads % 4))
        corrupt(r, "vision 'hidden_size' %d cannot be split into %d heads of a multiple of 4",
                v->hidden_size, v->num_heads);
    if (r->st == QIE_OK && v->hidden_size / v->num_heads > 512)
        corrupt(r, "vision heads of %d are above 512", v->hidden_size / v->num_heads);
    if (r->st == QIE_OK && v->window_size < v->patch_size * v->spatial_merge_size)
        corrupt(r, "'window_size' %d is smaller than one merged cell", v->window_size);
}

static void read_text(reader *r, qie_text_config *t) {
    t->vocab_size = dim(r, "vocab_size", 152064, MAX_VOCAB);
    t->hidden_size = dim(r, "hidden_size", REQUIRED, MAX_DIM);
    t->intermediate_size = dim(r, "intermediate_size", REQUIRED, MAX_DIM);
    t->num_hidden_layers = dim(r, "num_hidden_layers", REQUIRED, MAX_LAYERS);
    t->num_attention_heads = dim(r, "num_attention_heads", REQUIRED, MAX_HEADS);
    t->num_key_value_heads = dim(r, "num_key_value_heads", REQUIRED, MAX_HEADS);
    t->rms_norm_eps = real(r, "rms_norm_eps", 1e-5, 0, 1); /* 1e-5: class default of transformers */
    t->rope_theta = real(r, "rope_theta", 1e6, 1, 1e12);
    if (r->st != QIE_OK)
        return;
    if (t->hidden_size % t->num_attention_heads ||
        t->num_attention_heads % t->num_key_value_heads ||
        t->hidden_size / t->num_attention_heads % 2)
        corrupt(r, "%d hidden units, %d heads and %d key/value heads do not divide", t->hidden_size,
                t->num_attention_heads, t->num_key_value_heads);
    t->head_dim = t->hidden_size / t->num_attention_heads;
    if (t->head_dim > 512)
        corrupt(r, "language heads of %d are above 512", t->head_dim);
    static const int released[3] = {16, 24, 24};
    memcpy(t->mrope_section, released, sizeof released);
    const char *const places[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const qie_json *m = member(r, places[i]);
        if (!m || !qie_json_is_object(m))
            continue;
        reader in = {m, NULL, r->file, r->err, r->st};
        int n = ints(&in, "mrope_section", 3, 0, 512, t->mrope_section);
        if (n >= 0 && n != 3)
            corrupt(&in, "'mrope_section' must have 3 entries");
        t->rope_theta = real(&in, "rope_theta", t->rope_theta, 1, 1e12);
        const char *type = text(&in, "rope_type", text(&in, "type", "default"));
        if (in.st == QIE_OK && strcmp(type, "default") && strcmp(type, "mrope"))
            unsupported(&in, "'rope_type' is neither default nor mrope");
        r->st = in.st;
    }
    if (r->st == QIE_OK &&
        t->mrope_section[0] + t->mrope_section[1] + t->mrope_section[2] != t->head_dim / 2)
        corrupt(r, "'mrope_section' adds up to %d, half a head is %d",
                t->mrope_section[0] + t->mrope_section[1] + t->mrope_section[2], t->head_dim / 2);
    if (r->st == QIE_OK && strcmp(text(r, "hidden_act", "silu"), "silu"))
        unsupported(r, "'hidden_act' is not silu");
    if (flag(r, "use_sliding_window", false) &&
        num(r, "max_window_layers", MAX_LAYERS, 0, MAX_LAYERS) < t->num_hidden_layers)
        unsupported(r, "'use_sliding_window' is true");
}

static void read_text_encoder(reader *r, qie_text_config *t, qie_vision_config *v) {
    const char *type = text(r, "model_type", "qwen2_5_vl");
    if (r->st == QIE_OK && strcmp(type, "qwen2_5_vl")) {
        unsupported(r, "'model_type' is not qwen2_5_vl");
        return;
    }
    const qie_json *nested = qie_json_member(r->obj, "text_config");
    const qie_json *vision = qie_json_member(r->obj, "vision_config");
    if (!vision || !qie_json_is_object(vision)) {
        corrupt(r, "'vision_config' is missing");
        return;
    }
    t->image_token_id = (int)num(r, "image_token_id", 151655, 0, MAX_VOCAB);
    reader rt = {nested && qie_json_is_object(nested) ? nested : r->obj, r->obj, r->file, r->err,
                 r->st};
    read_text(&rt, t);
    reader rv = {vision, NULL, r->file, r->err, rt.st};
    read_vision(&rv, v);
    r->st = rv.st;
    if (r->st == QIE_OK && v->out_hidden_size != t->hidden_size)
        corrupt(r, "the vision tower gives %d values a token, the language model takes %d",
                v->out_hidden_size, t->hidden_size);
    if (r->st == QIE_OK && t->image_token_id >= t->vocab_size)
        corrupt(r, "'image_token_id' %d is outside the vocabulary of %d", t->image_token_id,
                t->vocab_size);
}

static void read_vae(reader *r, qie_vae_config *c) {
    check_class(r, "_class_name", "AutoencoderKLQwenImage");
    c->base_dim = dim(r, "base_dim", 96, 4096);
    c->z_dim = dim(r, "z_dim", 16, QIE_MAX_Z_DIM);
    c->num_res_blocks = dim(r, "num_res_blocks", 2, 16);
    static const int released[4] = {1, 2, 4, 4};
    memcpy(c->dim_mult, released, sizeof released);
    c->n_levels = 4;
    int n = ints(r, "dim_mult", QIE_MAX_VAE_LEVELS, 1, 64, c->dim_mult);
    if (n >= 0)
        c->n_levels = n;
    if (c->n_levels < 2) {
        corrupt(r, "'dim_mult' needs at least two entries");
        return;
    }
    c->scale_factor = 1 << (c->n_levels - 1);
    const qie_json *temporal = member(r, "temperal_downsample");
    if (temporal &&
        (!qie_json_is_array(temporal) || qie_json_size(temporal) != (size_t)(c->n_levels - 1)))
        corrupt(r, "'temperal_downsample' must have %d entries, one fewer than 'dim_mult'",
                c->n_levels - 1);
    const qie_json *scales = member(r, "attn_scales");
    if (scales && qie_json_size(scales))
        unsupported(r, "'attn_scales' is not empty");
    if (num(r, "input_channels", 3, 1, 64) != 3)
        unsupported(r, "'input_channels' is not 3");
    static const double mean[16] = {-0.7571, -0.7089, -0.9113, 0.1075,  -0.1745, 0.9653,
                                    -0.1517, 1.5508,  0.4134,  -0.0715, 0.5517,  -0.3632,
                                    -0.1922, -0.9497, 0.2503,  -0.2921};
    static const double std[16] = {2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160};
    int nm = reals(r, "latents_mean", QIE_MAX_Z_DIM, c->latents_mean);
    int ns = reals(r, "latents_std", QIE_MAX_Z_DIM, c->latents_std);
    if (nm < 0 && ns < 0 && c->z_dim == 16) { /* class defaults */
        memcpy(c->latents_mean, mean, sizeof mean);
        memcpy(c->latents_std, std, sizeof std);
    } else if (nm != c->z_dim || ns != c->z_dim)
        corrupt(r, "'latents_mean' and 'latents_std' need %d entries each", c->z_dim);
    for (int i = 0; i < c->z_dim && r->st == QIE_OK; i++)
        if (!(c->latents_std[i] > 1e-6))
            corrupt(r, "'latents_std' holds a value that is not positive");
}

static void read_scheduler(reader *r, qie_scheduler_config *c) {
    check_class(r, "_class_name", "FlowMatchEulerDiscreteScheduler");
    c->num_train_timesteps = dim(r, "num_train_timesteps", 1000, 1000000);
    c->use_dynamic_shifting = flag(r, "use_dynamic_shifting", false);
    c->base_shift = real(r, "base_shift", 0.5, -20, 20);
    c->max_shift = real(r, "max_shift", 1.15, -20, 20);
    c->shift = real(r, "shift", 1.0, 1e-3, 1e3);
    c->base_image_seq_len = dim(r, "base_image_seq_len", 256, 1 << 24);
    c->max_image_seq_len = dim(r, "max_image_seq_len", 4096, 1 << 24);
    c->shift_terminal = real(r, "shift_terminal", 0, 0, 0.99);
    const char *type = text(r, "time_shift_type", "exponential");
    if (r->st != QIE_OK)
        return;
    c->exponential = !strcmp(type, "exponential");
    if (!c->exponential && strcmp(type, "linear"))
        unsupported(r, "'time_shift_type' is neither exponential nor linear");
    static const char *const unknown[] = {"invert_sigmas", "stochastic_sampling",
                                          "use_karras_sigmas", "use_exponential_sigmas",
                                          "use_beta_sigmas"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        if (flag(r, unknown[i], false))
            unsupported(r, "a sigma schedule other than the plain one is asked for");
    if (r->st == QIE_OK && c->max_image_seq_len == c->base_image_seq_len)
        corrupt(r, "'base_image_seq_len' equals 'max_image_seq_len'");
}

static void read_processor(reader *r, qie_processor_config *c, const qie_vision_config *v) {
    /* CLIP's constants: class defaults of Qwen2VLImageProcessor. */
    static const double mean[3] = {0.48145466, 0.4578275, 0.40821073};
    static const double std[3] = {0.26862954, 0.26130258, 0.27577711};
    memcpy(c->image_mean, mean, sizeof mean);
    memcpy(c->image_std, std, sizeof std);
    int nm = reals(r, "image_mean", 3, c->image_mean), ns = reals(r, "image_std", 3, c->image_std);
    if ((nm >= 0 && nm != 3) || (ns >= 0 && ns != 3))
        corrupt(r, "'image_mean' and 'image_std' need 3 entries");
    for (int i = 0; i < 3 && r->st == QIE_OK; i++)
        if (!(c->image_std[i] > 1e-6))
            corrupt(r, "'image_std' holds a value that is not positive");
    c->rescale_factor = real(r, "rescale_factor", 1.0 / 255, 1e-9, 1e9);
    c->min_pixels = num(r, "min_pixels", 3136, 1, INT64_C(1) << 40);
    c->max_pixels = num(r, "max_pixels", 12845056, 1, INT64_C(1) << 40);
    const qie_json *size = member(r, "size");
    if (r->st == QIE_OK && size && qie_json_is_object(size)) {
        reader in = {size, NULL, r->file, r->err, r->st};
        c->min_pixels = num(&in, "shortest_edge", c->min_pixels, 1, INT64_C(1) << 40);
        c->max_pixels = num(&in, "longest_edge", c->max_pixels, 1, INT64_C(1) << 40);
        r->st = in.st;
    }
    if (num(r, "patch_size", v->patch_size, 1, 1024) != v->patch_size ||
        num(r, "merge_size", v->spatial_merge_size, 1, 1024) != v->spatial_merge_size ||
        num(r, "temporal_patch_size", v->temporal_patch_size, 1, 1024) != v->temporal_patch_size)
        corrupt(r, "patch, merge or temporal patch size differ from the vision tower's");
    if (r->st == QIE_OK && c->min_pixels > c->max_pixels)
        corrupt(r, "'min_pixels' is above 'max_pixels'");
}

static void read_defaults(reader *r, qie_defaults_config *d) {
    d->num_inference_steps = (int)num(r, "num_inference_steps", 40, 1, 200);
    d->true_cfg_scale = real(r, "true_cfg_scale", 4.0, 0, 20);
    d->lightning = flag(r, "lightning", false);
    d->steps_told = member(r, "num_inference_steps") != NULL;
    d->cfg_told = member(r, "true_cfg_scale") != NULL;
    d->max_side = (int)num(r, "max_side", 0, 0, 4096);
    d->ref_area = num(r, "ref_area", 0, 0, INT64_C(1) << 24);
    if (r->st == QIE_OK && d->max_side && d->max_side < 64)
        corrupt(r, "'max_side' is below 64");
    if (r->st == QIE_OK && d->ref_area && d->ref_area < 1024)
        corrupt(r, "'ref_area' is below 1024");
    const char *size = text(r, "size", "");
    d->keep_size = !strcmp(size, "keep");
    if (r->st == QIE_OK && *size && !d->keep_size)
        corrupt(r, "'size' must be \"keep\"");
    const qie_json *about = member(r, "about");
    if (r->st == QIE_OK && about && qie_json_is_string(about))
        snprintf(d->about_en, sizeof d->about_en, "%s", qie_json_string(about, NULL));
    if (r->st == QIE_OK && about && qie_json_is_object(about)) {
        reader in = {about, NULL, r->file, r->err, r->st};
        snprintf(d->about_en, sizeof d->about_en, "%s", text(&in, "en", ""));
        snprintf(d->about_zh, sizeof d->about_zh, "%s", text(&in, "zh", ""));
        r->st = in.st;
    }
}

static qie_status check_index(qie_files *files, qie_error *err) {
    qie_json *j = NULL;
    if (!qie_files_exists(files, "model_index.json"))
        return qie_fail(err, QIE_E_NOT_FOUND, "model",
                        "'%s' has no model_index.json: not a model folder in the diffusers layout",
                        qie_files_label(files));
    QIE_TRY(parse(files, "model_index.json", &j, err));
    reader r = {j, NULL, "model_index.json", err, QIE_OK};
    const char *c = text(&r, "_class_name", "");
    /* QwenImageEditPipeline (the first Edit release) takes one picture and another template. */
    if (r.st == QIE_OK && strcmp(c, "QwenImageEditPlusPipeline")) {
        char t[200];
        snprintf(t, sizeof t,
                 "the pipeline is '%.80s', this program runs QwenImageEditPlusPipeline", c);
        unsupported(&r, t);
    }
    qie_json_free(j);
    return r.st;
}

qie_status qie_model_config_read(qie_files *files, qie_model_config *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    QIE_TRY(check_index(files, err));
    qie_json *j = NULL;
    reader r = {0};
#define READ(name, call)                          \
    do {                                          \
        QIE_TRY(parse(files, name, &j, err));     \
        r = (reader){j, NULL, name, err, QIE_OK}; \
        call;                                     \
        qie_json_free(j);                         \
        if (r.st != QIE_OK)                       \
            return r.st;                          \
    } while (0)
    READ("transformer/config.json", read_transformer(&r, &out->transformer));
    READ("text_encoder/config.json", read_text_encoder(&r, &out->text, &out->vision));
    READ("vae/config.json", read_vae(&r, &out->vae));
    READ("scheduler/scheduler_config.json", read_scheduler(&r, &out->scheduler));
    const char *const places[] = {"processor/preprocessor_config.json",
                                  "processor/processor_config.json",
                                  "tokenizer/preprocessor_config.json"};
    bool found = false;
    for (int i = 0; i < 3 && !found; i++) {
        if (!qie_files_exists(files, places[i]))
            continue;
        found = true;
        QIE_TRY(parse(files, places[i], &j, err));
        const qie_json *inner = qie_json_member(j, "image_processor");
        r = (reader){inner && qie_json_is_object(inner) ? inner : j, NULL, places[i], err, QIE_OK};
        read_processor(&r, &out->processor, &out->vision);
        qie_json_free(j);
        if (r.st != QIE_OK)
            return r.st;
    }
    QIE_FAIL_IF(!found, QIE_E_NOT_FOUND, err, "processor", "'%s' has no %s", qie_files_label(files),
                places[0]);
    if (qie_files_exists(files, "qwen_edit.json"))
        READ("qwen_edit.json", read_defaults(&r, &out->defaults));
    else {
        reader none = {NULL, NULL, "qwen_edit.json", err, QIE_OK};
        read_defaults(&none, &out->defaults);
    }
#undef READ
    const char *const tok[] = {"processor/vocab.json", "processor/tokenizer.json"};
    out->tokenizer_folder = qie_files_exists(files, tok[0]) || qie_files_exists(files, tok[1])
                                ? "processor"
                                : "tokenizer";
    const qie_transformer_config *t = &out->transformer;
    QIE_FAIL_IF(t->joint_attention_dim != out->text.hidden_size, QIE_E_CORRUPT, err,
                "transformer/config.json",
                "transformer/config.json: 'joint_attention_dim' is %d, the text encoder gives %d",
                t->joint_attention_dim, out->text.hidden_size);
    QIE_FAIL_IF(t->in_channels != out->vae.z_dim * 4 || t->out_channels != out->vae.z_dim,
                QIE_E_CORRUPT, err, "transformer/config.json",
                "transformer/config.json: %d channels in and %d out do not fit the VAE's %d latent "
                "channels",
                t->in_channels, t->out_channels, out->vae.z_dim);
    return QIE_OK;
}
