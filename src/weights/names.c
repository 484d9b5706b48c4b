#define _GNU_SOURCE
#include "weights/names.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *after(const char *s, const char *prefix) {
    size_t n = strlen(prefix);
    return strncmp(s, prefix, n) ? NULL : s + n;
}

bool qie_name_ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && !strcmp(s + n - k, end);
}

/* Longest first. "model." alone belongs to the language model. */
static const char *const PREFIXES[QIE_PART_COUNT][6] = {
    [QIE_PART_TRANSFORMER] = {"model.diffusion_model.", "diffusion_model.", "transformer."},
    [QIE_PART_TEXT_ENCODER] = {"text_encoders.qwen25_7b.transformer.", "text_encoders.qwen25_7b.",
                               "text_encoders.", "text_encoder."},
    [QIE_PART_VAE] = {"first_stage_model.", "vae."},
};

/* Behind the prefix of this part; NULL if the name has that of another one. */
static const char *strip(qie_part part, const char *name) {
    for (int p = 0; p < QIE_PART_COUNT; p++)
        for (const char *const *x = PREFIXES[p]; *x; x++) {
            const char *rest = after(name, *x);
            if (rest)
                return p == (int)part ? rest : NULL;
        }
    return name;
}

typedef struct rename {
    const char *from, *to;
} rename_row;

/* Replace `from` at the begin of s by `to`, by the first row that fits whole words ("attn_q" is no
 * "attn_q_norm"). */
static bool replace(const rename_row *rows, const char *s, const char *before, char *out) {
    for (; rows->from; rows++) {
        const char *rest = after(s, rows->from);
        if (rest && (*rest == '.' || !*rest)) {
            snprintf(out, QIE_NAME_BYTES, "%s%s%s", before, rows->to, rest);
            return true;
        }
    }
    return false;
}

/* Number at the begin of *s, which is moved behind the dot that follows it; -1 if there is none. */
static int number(const char **s) {
    const char *p = *s;
    int v = 0;
    if (*p < '0' || *p > '9')
        return -1;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (v > 100000)
            return -1;
        v = 10 * v + (*p - '0');
    }
    if (*p != '.')
        return -1;
    *s = p + 1;
    return v;
}

/* llama.cpp's names of the language model; the rows of q and k are not permuted for this one. */
static bool map_language(const char *s, char *out) {
    static const rename_row TOP[] = {{"token_embd", "model.embed_tokens"},
                                     {"output_norm", "model.norm"},
                                     {"output", "lm_head"},
                                     {0}};
    static const rename_row LAYER[] = {
        {"attn_norm", "input_layernorm"}, {"ffn_norm", "post_attention_layernorm"},
        {"attn_q", "self_attn.q_proj"},   {"attn_k", "self_attn.k_proj"},
        {"attn_v", "self_attn.v_proj"},   {"attn_output", "self_attn.o_proj"},
        {"ffn_gate", "mlp.gate_proj"},    {"ffn_up", "mlp.up_proj"},
        {"ffn_down", "mlp.down_proj"},    {0}};
    char before[64];
    const char *rest = after(s, "blk.");
    if (!rest)
        return replace(TOP, s, "", out);
    int n = number(&rest);
    snprintf(before, sizeof before, "model.layers.%d.", n);
    return n >= 0 && replace(LAYER, rest, before, out);
}

/* llama.cpp's names of the vision tower (mmproj file). */
static bool map_vision(const char *s, char *out) {
    static const rename_row TOP[] = {{"v.patch_embd.weight.1", "visual.patch_embed.proj.weight.1"},
                                     {"v.patch_embd", "visual.patch_embed.proj"},
                                     {"v.post_ln", "visual.merger.ln_q"},
                                     {"mm.0", "visual.merger.mlp.0"},
                                     {"mm.2", "visual.merger.mlp.2"},
                                     {0}};
    static const rename_row BLOCK[] = {{"ln1", "norm1"},
                                       {"ln2", "norm2"},
                                       {"attn_qkv", "attn.qkv"},
                                       {"attn_q", "attn.q"},
                                       {"attn_k", "attn.k"},
                                       {"attn_v", "attn.v"},
                                       {"attn_out", "attn.proj"},
                                       {"attn_output", "attn.proj"},
                                       {"ffn_gate", "mlp.gate_proj"},
                                       {"ffn_up", "mlp.up_proj"},
                                       {"ffn_down", "mlp.down_proj"},
                                       {0}};
    char before[64];
    const char *rest = after(s, "v.blk.");
    if (!rest)
        return replace(TOP, s, "", out);
    int n = number(&rest);
    snprintf(before, sizeof before, "visual.blocks.%d.", n);
    return n >= 0 && replace(BLOCK, rest, before, out);
}

static void map_text(const char *s, char *out) {
    static const rename_row PREFIX[] = {
        {"model.visual", "visual"},        {"model.language_model", "model"},
        {"language_model.model", "model"}, {"language_model", "model"},
        {"model.lm_head", "lm_head"},      {0}};
    if (!map_language(s, out) && !map_vision(s, out) && !replace(PREFIX, s, "", out))
        snprintf(out, QIE_NAME_BYTES, "%s", s);
}

int qie_name_up_period(const char *name) {
    const char *s = strip(QIE_PART_VAE, name), *rest = s ? after(s, "decoder.upsamples.") : NULL;
    int n = rest ? number(&rest) : -1;
    return n >= 0 && after(rest, "resample.") ? n + 1 : 0;
}

/* A module of the VAE in its original naming, behind its place. */
static void map_vae_module(const char *before, const char *s, char *out) {
    static const rename_row MODULE[] = {{"residual.0", "norm1"},       {"residual.2", "conv1"},
                                        {"residual.3", "norm2"},       {"residual.6", "conv2"},
                                        {"shortcut", "conv_shortcut"}, {0}};
    if (!replace(MODULE, s, before, out))
        snprintf(out, QIE_NAME_BYTES, "%s%s", before, s);
}

static void map_vae(const char *s, int up_period, char *out) {
    static const rename_row TOP[] = {{"conv1", "quant_conv"},
                                     {"conv2", "post_quant_conv"},
                                     {"encoder.conv1", "encoder.conv_in"},
                                     {"decoder.conv1", "decoder.conv_in"},
                                     {"encoder.head.0", "encoder.norm_out"},
                                     {"decoder.head.0", "decoder.norm_out"},
                                     {"encoder.head.2", "encoder.conv_out"},
                                     {"decoder.head.2", "decoder.conv_out"},
                                     {0}};
    static const char *const MIDDLE[] = {"resnets.0", "attentions.0", "resnets.1"};
    char before[96];
    const char *rest;
    int n;
    if (replace(TOP, s, "", out))
        return;
    for (int side = 0; side < 2; side++) {
        const char *name = side ? "decoder" : "encoder";
        snprintf(before, sizeof before, "%s.middle.", name);
        if ((rest = after(s, before)) && (n = number(&rest)) >= 0 && n < 3) {
            snprintf(before, sizeof before, "%s.mid_block.%s.", name, MIDDLE[n]);
            map_vae_module(before, rest, out);
            return;
        }
    }
    if ((rest = after(s, "encoder.downsamples.")) && (n = number(&rest)) >= 0) {
        snprintf(before, sizeof before, "encoder.down_blocks.%d.", n);
        map_vae_module(before, rest, out);
    } else if (up_period > 0 && (rest = after(s, "decoder.upsamples.")) &&
               (n = number(&rest)) >= 0) {
        int level = n / up_period, i = n % up_period;
        if (i < up_period - 1)
            snprintf(before, sizeof before, "decoder.up_blocks.%d.resnets.%d.", level, i);
        else
            snprintf(before, sizeof before, "decoder.up_blocks.%d.upsamplers.0.", level);
        map_vae_module(before, rest, out);
    } else {
        snprintf(out, QIE_NAME_BYTES, "%s", s);
    }
}

qie_name_kind qie_name_map(qie_part part, const char *name, int up_period,
                           char out[QIE_NAME_BYTES]) {
    static const char *const MARKERS[] = {"scaled_fp8", "__index_timestep_zero__"};
    static const char *const IGNORED[] = {".scale_input", ".input_scale", ".comfy_quant"};
    static const char *const SCALES[] = {".scale_weight", ".weight_scale"};
    char plain[QIE_NAME_BYTES];
    const char *s = strip(part, name);
    out[0] = 0;
    if (!s)
        return QIE_NAME_OTHER;
    for (size_t i = 0; i < sizeof MARKERS / sizeof *MARKERS; i++)
        if (!strcmp(s, MARKERS[i]) ||
            (qie_name_ends_with(s, MARKERS[i]) && s[strlen(s) - strlen(MARKERS[i]) - 1] == '.'))
            return QIE_NAME_MARKER;
    for (size_t i = 0; i < sizeof IGNORED / sizeof *IGNORED; i++)
        if (qie_name_ends_with(s, IGNORED[i]))
            return QIE_NAME_MARKER;
    qie_name_kind kind = QIE_NAME_TENSOR;
    snprintf(plain, sizeof plain, "%s", s);
    for (size_t i = 0; i < sizeof SCALES / sizeof *SCALES; i++)
        if (qie_name_ends_with(s, SCALES[i])) {
            size_t n = strlen(s) - strlen(SCALES[i]);
            if (n + sizeof ".weight" <= sizeof plain) {
                memcpy(plain + n, ".weight", sizeof ".weight");
                kind = QIE_NAME_SCALE;
            }
        }
    if (part == QIE_PART_TEXT_ENCODER)
        map_text(plain, out);
    else if (part == QIE_PART_VAE)
        map_vae(plain, up_period, out);
    else
        snprintf(out, QIE_NAME_BYTES, "%s", plain);
    return kind;
}
