#define _GNU_SOURCE
#include "model/source.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/strbuf.h"
#include "model/demo_files.h"
#include "weights/gguf.h"

#define MAX_MADE_BYTES (64u << 20)

/* What tells the released models apart. Sources: docs/MODEL.md, "zero_cond_t" and "Lightning". */
static const struct variant {
    const char *name;
    bool zero_cond_t;
    int steps; /* 0: the released 40 with CFG 4; else distilled: CFG off, own schedule */
} VARIANTS[] = {
    {"edit-2509", false, 0},
    {"edit-2511", true, 0},
    {"edit-2509-lightning-4", false, 4},
    {"edit-2509-lightning-8", false, 8},
    {"edit-2511-lightning-4", true, 4},
    {"edit-2511-lightning-8", true, 8},
};

const char *qie_variant_names(void) {
    return "edit-2509, edit-2511, edit-2509-lightning-4, edit-2509-lightning-8, "
           "edit-2511-lightning-4, edit-2511-lightning-8";
}

typedef struct maker {
    const qie_model_source *source;
    const struct variant *variant; /* NULL: not named */
    qie_files *files;
    qie_weights **w;
    qie_error *err;
} maker;

static bool has(const maker *m, const char *name) {
    return qie_files_exists(m->files, name);
}

static qie_status put(const maker *m, const char *name, qie_strbuf *b) {
    qie_status st = b->failed ? qie_fail(m->err, QIE_E_NO_MEMORY, NULL, "out of memory")
                              : qie_files_put(m->files, name, b->data, b->len, m->err);
    if (st == QIE_OK && b->len < 2000)
        qie_log(QIE_LOG_INFO, "model", "%s made from the files and the known models: %s", name,
                b->data);
    qie_strbuf_release(b);
    return st;
}

static qie_status put_text(const maker *m, const char *name, const char *text) {
    return qie_files_put(m->files, name, text, strlen(text), m->err);
}

static qie_status find_variant(maker *m) {
    const char *name = m->source->variant;
    if (!name || !*name)
        return QIE_OK;
    for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++)
        if (!strcmp(VARIANTS[i].name, name))
            m->variant = &VARIANTS[i];
    QIE_FAIL_IF(!strcmp(name, "edit"), QIE_E_UNSUPPORTED, m->err, "variant",
                "the first Qwen-Image-Edit takes one picture and another template: this program "
                "runs its successors, %s",
                qie_variant_names());
    QIE_FAIL_IF(!m->variant, QIE_E_INVALID, m->err, "variant", "variant '%s' is not one of %s",
                name, qie_variant_names());
    return QIE_OK;
}

/* Extent d of a tensor, 0 if there is none. */
static int64_t extent(const qie_weights *w, const char *name, int d) {
    const qie_tensor *t = qie_weights_find(w, name);
    return t && d < t->n_dims ? t->shape[d] : 0;
}

/* How many of "<before>N<behind>" there are, from 0 on. */
static int count_layers(const qie_weights *w, const char *before, const char *behind) {
    char name[160];
    for (int i = 0;; i++) {
        snprintf(name, sizeof name, "%s%d%s", before, i, behind);
        if (i > 100000 || !qie_weights_find(w, name))
            return i;
    }
}

/* What the file itself says about zero_cond_t: 1, 0, or -1 for nothing. */
static int told_zero_cond_t(const qie_weights *w) {
    const char *config = qie_weights_metadata(w, "qwen_edit.transformer_config");
    const char *said = qie_weights_metadata(w, "qwen_edit.zero_cond_t");
    if (said)
        return !strcmp(said, "true");
    if (config) {
        qie_json *j = NULL;
        int value = -1;
        if (qie_json_parse(config, strlen(config), "config", &j, NULL) == QIE_OK) {
            const qie_json *z = qie_json_member(j, "zero_cond_t");
            value = z && qie_json_bool(z);
        }
        qie_json_free(j);
        return value;
    }
    return qie_weights_marked_zero_cond_t(w) ? 1 : -1;
}

static qie_status conflict(const maker *m, int told) {
    return qie_fail(m->err, QIE_E_INVALID, "variant",
                    "'%s' is marked as a model with%s zero_cond_t, and variant '%s' is one with%s",
                    m->source->transformer ? m->source->transformer : "transformer",
                    told ? "" : "out", m->variant->name, told ? "out" : "");
}

static qie_status make_transformer_config(const maker *m) {
    static const char NAME[] = "transformer/config.json";
    const qie_weights *w = m->w[QIE_PART_TRANSFORMER];
    int told = told_zero_cond_t(w);
    if (m->variant && told >= 0 && told != (int)m->variant->zero_cond_t)
        return conflict(m, told);
    if (has(m, NAME) && !m->variant && told < 0)
        return QIE_OK;
    const char *own = qie_weights_metadata(w, "qwen_edit.transformer_config");
    if (own && !m->variant && !has(m, NAME))
        return put_text(m, NAME, own);
    int64_t head = extent(w, "transformer_blocks.0.attn.norm_q.weight", 0);
    int64_t dim = extent(w, "img_in.weight", 0);
    bool zero = m->variant ? m->variant->zero_cond_t : told == 1;
    QIE_FAIL_IF(!m->variant && told < 0, QIE_E_INVALID, m->err, "variant",
                "'%s' does not say which model it is (zero_cond_t), and its shapes cannot: name "
                "the model's folder with --model, or --variant (%s)",
                m->source->transformer, qie_variant_names());
    if (has(m, NAME) || own) { /* only the flag may differ */
        const unsigned char *data = (const unsigned char *)own;
        size_t n = own ? strlen(own) : 0;
        qie_json *j = NULL;
        if (!own)
            QIE_TRY(qie_files_get(m->files, NAME, &data, &n, m->err));
        QIE_TRY(qie_json_parse((const char *)data, n, NAME, &j, m->err));
        qie_json_put(j, "zero_cond_t", qie_json_new_bool(zero));
        char *text = qie_json_text(j, 0);
        qie_json_free(j);
        qie_status st = text ? put_text(m, NAME, text)
                             : qie_fail(m->err, QIE_E_NO_MEMORY, NULL, "out of memory");
        free(text);
        return st;
    }
    QIE_FAIL_IF(head != 128 || dim % head, QIE_E_INVALID, m->err, "model",
                "'%s' has heads of %lld elements: no known model does; its folder with "
                "config.json is needed (--model)",
                m->source->transformer, (long long)head);
    qie_strbuf b;
    qie_strbuf_init(&b, 4096);
    qie_strbuf_printf(
        &b,
        "{\"_class_name\":\"QwenImageTransformer2DModel\",\"patch_size\":2,"
        "\"in_channels\":%lld,\"out_channels\":%lld,\"num_layers\":%d,"
        "\"attention_head_dim\":%lld,\"num_attention_heads\":%lld,"
        "\"joint_attention_dim\":%lld,\"axes_dims_rope\":[16,56,56],"
        "\"zero_cond_t\":%s}",
        (long long)extent(w, "img_in.weight", 1), (long long)extent(w, "proj_out.weight", 0) / 4,
        count_layers(w, "transformer_blocks.", ".img_mod.1.weight"), (long long)head,
        (long long)(dim / head), (long long)extent(w, "txt_in.weight", 1), zero ? "true" : "false");
    return put(m, NAME, &b);
}

/* A number among the metadata of GGUF files: "<arch>.<key>". */
static const char *meta(const qie_weights *w, const char *arch, const char *key) {
    char name[200];
    snprintf(name, sizeof name, "%s.%s", arch, key);
    return qie_weights_metadata(w, name);
}

static const char *meta_or(const qie_weights *w, const char *arch, const char *key,
                           const char *def) {
    const char *v = meta(w, arch, key);
    return v ? v : def;
}

/* Id of a token by its text among GGUF metadata; -1 if there is none. */
static long find_token(const qie_weights *w, const char *text) {
    const qie_meta_array *a = qie_weights_array(w, "tokenizer.ggml.tokens");
    const unsigned char *at = a ? a->data : NULL;
    size_t n;
    const char *s;
    for (long i = 0; a && (s = qie_gguf_next_string(a, &at, &n)); i++)
        if (n == strlen(text) && !memcmp(s, text, n))
            return i;
    return -1;
}

static void vision_config(const qie_weights *w, qie_strbuf *b) {
    static const char V[] = "clip.vision";
    int depth = count_layers(w, "visual.blocks.", ".norm1.weight");
    const char *pattern = meta(w, V, "n_wa_pattern");
    int every = pattern ? (int)strtol(pattern, NULL, 10) : 8; /* released: 7, 15, 23, 31 */
    qie_strbuf_printf(
        b,
        "\"vision_config\":{\"depth\":%d,\"hidden_size\":%lld,\"intermediate_size\":%lld,"
        "\"num_heads\":%s,\"out_hidden_size\":%lld,\"patch_size\":%s,\"temporal_patch_size\":2,"
        "\"spatial_merge_size\":%s,\"window_size\":%s,\"fullatt_block_indexes\":[",
        depth, (long long)extent(w, "visual.blocks.0.norm1.weight", 0),
        (long long)extent(w, "visual.blocks.0.mlp.gate_proj.weight", 0),
        meta_or(w, V, "attention.head_count", "16"),
        (long long)extent(w, "visual.merger.mlp.2.weight", 0), meta_or(w, V, "patch_size", "14"),
        meta_or(w, V, "spatial_merge_size", "2"), meta_or(w, V, "window_size", "112"));
    bool first = true;
    for (int i = 0; i < depth && every > 0; i++)
        if ((i + 1) % every == 0) {
            qie_strbuf_printf(b, "%s%d", first ? "" : ",", i);
            first = false;
        }
    qie_strbuf_puts(b, "]}}");
}

static qie_status make_text_config(const maker *m) {
    static const char NAME[] = "text_encoder/config.json";
    const qie_weights *w = m->w[QIE_PART_TEXT_ENCODER];
    if (has(m, NAME))
        return QIE_OK;
    const char *own = qie_weights_metadata(w, "qwen_edit.text_encoder_config");
    if (own)
        return put_text(m, NAME, own);
    const char *arch = qie_weights_metadata(w, "general.architecture");
    int64_t hidden = extent(w, "model.embed_tokens.weight", 1);
    bool told = arch && meta(w, arch, "attention.head_count");
    /* Without metadata only the one size that the released models use is known. */
    QIE_FAIL_IF(!told && hidden != 3584, QIE_E_INVALID, m->err, "model",
                "'%s' has no description and is not the known Qwen2.5-VL-7B: its folder with "
                "config.json is needed (--model)",
                m->source->text_encoder);
    QIE_FAIL_IF(told && strcmp(arch, "qwen2vl") && strcmp(arch, "qwen25vl"), QIE_E_UNSUPPORTED,
                m->err, "text_encoder", "'%s' is a %s, not a Qwen2.5-VL", m->source->text_encoder,
                arch);
    const char *clip = qie_weights_metadata(w, "clip.projector_type");
    QIE_FAIL_IF(clip && strcmp(clip, "qwen2.5vl_merger"), QIE_E_UNSUPPORTED, m->err, "mmproj",
                "'%s' is a vision tower of type '%s', not qwen2.5vl_merger",
                m->source->mmproj ? m->source->mmproj : m->source->text_encoder, clip);
    if (!told)
        arch = "";
    int sections[3] = {16, 24, 24};
    const char *text = meta(w, arch, "rope.dimension_sections");
    if (!text)
        text = meta(w, arch, "rope.mrope_section");
    if (text)
        (void)sscanf(text, "[%d,%d,%d", &sections[0], &sections[1], &sections[2]);
    long image = find_token(w, "<|image_pad|>");
    qie_strbuf b;
    qie_strbuf_init(&b, 65536);
    qie_strbuf_printf(
        &b,
        "{\"model_type\":\"qwen2_5_vl\",\"image_token_id\":%ld,\"vocab_size\":%lld,"
        "\"hidden_size\":%lld,\"intermediate_size\":%lld,\"num_hidden_layers\":%d,"
        "\"num_attention_heads\":%s,\"num_key_value_heads\":%s,\"rms_norm_eps\":%s,"
        "\"rope_theta\":%s,\"rope_scaling\":{\"type\":\"mrope\",\"mrope_section\":[%d,%d,%d]},",
        image >= 0 ? image : 151655, (long long)extent(w, "model.embed_tokens.weight", 0),
        (long long)hidden, (long long)extent(w, "model.layers.0.mlp.gate_proj.weight", 0),
        count_layers(w, "model.layers.", ".input_layernorm.weight"),
        meta_or(w, arch, "attention.head_count", "28"),
        meta_or(w, arch, "attention.head_count_kv", "4"),
        meta_or(w, arch, "attention.layer_norm_rms_epsilon", "1e-6"),
        meta_or(w, arch, "rope.freq_base", "1000000"), sections[0], sections[1], sections[2]);
    vision_config(w, &b);
    return put(m, NAME, &b);
}

static qie_status make_vae_config(const maker *m) {
    static const char NAME[] = "vae/config.json";
    if (has(m, NAME))
        return QIE_OK;
    /* The mean and scale of the latents are in no shape: those of the released VAE are known. */
    int64_t base_dim = extent(m->w[QIE_PART_VAE], "encoder.conv_in.weight", 0);
    QIE_FAIL_IF(base_dim != 96, QIE_E_INVALID, m->err, "model",
                "'%s' has %lld channels, the known VAE 96: its folder with config.json is needed "
                "(--model)",
                m->source->vae, (long long)base_dim);
    return put_text(m, NAME, "{\"_class_name\":\"AutoencoderKLQwenImage\"}");
}

static qie_status make_scheduler(const maker *m) {
    static const char NAME[] = "scheduler/scheduler_config.json";
    bool distilled = m->variant && m->variant->steps;
    if (has(m, NAME) && !distilled)
        return QIE_OK;
    if (!distilled)
        return put_text(m, NAME,
                        "{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\","
                        "\"num_train_timesteps\":1000,\"use_dynamic_shifting\":true,"
                        "\"base_shift\":0.5,\"max_shift\":0.9,\"base_image_seq_len\":256,"
                        "\"max_image_seq_len\":8192,\"shift\":1.0,\"shift_terminal\":0.02,"
                        "\"time_shift_type\":\"exponential\"}");
    char text[400];
    snprintf(text, sizeof text, "{\"num_inference_steps\":%d,\"true_cfg_scale\":1.0}",
             m->variant->steps);
    QIE_TRY(put_text(m, "qwen_edit.json", text));
    /* ln 3 */
    return put_text(m, NAME,
                    "{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\","
                    "\"num_train_timesteps\":1000,\"use_dynamic_shifting\":true,"
                    "\"base_shift\":1.0986122886681098,\"max_shift\":1.0986122886681098,"
                    "\"base_image_seq_len\":256,\"max_image_seq_len\":8192,\"shift\":1.0,"
                    "\"shift_terminal\":null,\"time_shift_type\":\"exponential\"}");
}

static void put_quoted(qie_strbuf *b, const char *s, size_t n) {
    qie_strbuf_puts(b, "\"");
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            qie_strbuf_printf(b, "\\%c", c);
        else if (c < 0x20)
            qie_strbuf_printf(b, "\\u%04x", c);
        else
            qie_strbuf_append(b, &c, 1);
    }
    qie_strbuf_puts(b, "\"");
}

/* The tokenizer of a GGUF text encoder as the files that the tokenizer reads. */
static qie_status make_tokenizer(const maker *m) {
    const qie_weights *w = m->w[QIE_PART_TEXT_ENCODER];
    if (has(m, "processor/vocab.json") || has(m, "processor/tokenizer.json") ||
        has(m, "tokenizer/vocab.json") || has(m, "tokenizer/tokenizer.json"))
        return QIE_OK;
    const qie_meta_array *tokens = qie_weights_array(w, "tokenizer.ggml.tokens"),
                         *merges = qie_weights_array(w, "tokenizer.ggml.merges"),
                         *types = qie_weights_array(w, "tokenizer.ggml.token_type");
    const char *model = qie_weights_metadata(w, "tokenizer.ggml.model");
    QIE_FAIL_IF(!tokens || !merges || !model || strcmp(model, "gpt2"), QIE_E_NOT_FOUND, m->err,
                "model",
                "there is no tokenizer: '%s' does not hold one, and no folder with tokenizer/ is "
                "named (--model)",
                m->source->text_encoder ? m->source->text_encoder : "the text encoder");
    qie_strbuf vocab, added, lines;
    qie_strbuf_init(&vocab, MAX_MADE_BYTES);
    qie_strbuf_init(&added, MAX_MADE_BYTES);
    qie_strbuf_init(&lines, MAX_MADE_BYTES);
    const unsigned char *at = tokens->data;
    const char *s;
    size_t n;
    for (uint64_t i = 0; (s = qie_gguf_next_string(tokens, &at, &n)); i++) {
        enum { CONTROL = 3, USER_DEFINED = 4, UNUSED = 5 };
        int32_t type = 1;
        if (types && types->type == QIE_GGUF_I32 && i < types->n)
            memcpy(&type, types->data + 4 * i, 4);
        qie_strbuf *b = type == CONTROL || type == USER_DEFINED ? &added : &vocab;
        if (type == UNUSED || !n)
            continue;
        qie_strbuf_puts(b, b->len ? "," : "{");
        put_quoted(b, s, n);
        qie_strbuf_printf(b, ":%llu", (unsigned long long)i);
    }
    qie_strbuf_puts(&vocab, vocab.len ? "}" : "{}");
    qie_strbuf_puts(&added, added.len ? "}" : "{}");
    qie_strbuf_puts(&lines, "#version: 0.2\n");
    for (at = merges->data; (s = qie_gguf_next_string(merges, &at, &n));) {
        qie_strbuf_append(&lines, s, n);
        qie_strbuf_puts(&lines, "\n");
    }
    qie_status st = put(m, "tokenizer/vocab.json", &vocab);
    qie_status st2 = put(m, "tokenizer/added_tokens.json", &added);
    qie_status st3 = put(m, "tokenizer/merges.txt", &lines);
    return st != QIE_OK ? st : st2 != QIE_OK ? st2 : st3;
}

static qie_status make_configs(maker *m) {
    QIE_TRY(make_transformer_config(m));
    QIE_TRY(make_text_config(m));
    QIE_TRY(make_vae_config(m));
    QIE_TRY(make_scheduler(m));
    QIE_TRY(make_tokenizer(m));
    if (!has(m, "model_index.json"))
        QIE_TRY(put_text(m, "model_index.json", "{\"_class_name\":\"QwenImageEditPlusPipeline\"}"));
    if (!has(m, "processor/preprocessor_config.json") &&
        !has(m, "processor/processor_config.json") && !has(m, "tokenizer/preprocessor_config.json"))
        QIE_TRY(put_text(m, "processor/preprocessor_config.json", "{}"));
    return QIE_OK;
}

static bool given(const char *s) {
    return s && *s;
}

static qie_status open_part(const maker *m, qie_part part) {
    static const char *const FLAG[] = {"--transformer", "--text-encoder", "--vae"};
    const qie_model_source *s = m->source;
    const char *const file[] = {s->transformer, s->text_encoder, s->vae};
    if (given(file[part])) {
        const char *paths[2] = {file[part], s->mmproj};
        bool two = part == QIE_PART_TEXT_ENCODER && given(s->mmproj);
        return qie_weights_open_part(paths, two ? 2 : 1, part, &m->w[part], m->err);
    }
    QIE_FAIL_IF(!given(s->model), QIE_E_NOT_FOUND, m->err, qie_part_name(part),
                "there is no %s: name its file (%s) or a model's folder (--model)",
                qie_part_name(part), FLAG[part]);
    return qie_weights_open(m->files, qie_part_name(part), &m->w[part], m->err);
}

qie_status qie_model_source_open(const qie_model_source *source, qie_files **files,
                                 qie_weights *weights[QIE_PART_COUNT], qie_error *err) {
    maker m = {.source = source, .w = weights, .err = err};
    qie_status st;
    *files = NULL;
    for (int p = 0; p < QIE_PART_COUNT; p++)
        weights[p] = NULL;
    QIE_TRY_GOTO(find_variant(&m));
    if (given(source->mmproj) && !given(source->text_encoder)) {
        st = qie_fail(err, QIE_E_INVALID, "mmproj",
                      "--mmproj is the vision tower of a --text-encoder: name that file, too");
        goto fail;
    }
    if (!given(source->model))
        st = qie_files_open_empty("the known models", &m.files, err);
    else if (!strcmp(source->model, "demo"))
        st = qie_files_open_builtin(qie_demo_files, "the demo model", &m.files, err);
    else
        st = qie_files_open_dir(source->model, &m.files, err);
    QIE_TRY_GOTO(st);
    for (int p = 0; p < QIE_PART_COUNT; p++)
        QIE_TRY_GOTO(open_part(&m, (qie_part)p));
    if (given(source->transformer) || given(source->text_encoder) || given(source->vae) ||
        m.variant)
        QIE_TRY_GOTO(make_configs(&m));
    *files = m.files;
    return QIE_OK;
fail:
    for (int p = 0; p < QIE_PART_COUNT; p++) {
        qie_weights_close(weights[p]);
        weights[p] = NULL;
    }
    qie_files_close(m.files);
    return st;
}
