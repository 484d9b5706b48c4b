/* Configs: the released forms, the new forms, and absurd numbers refused with file and key. */
#define _GNU_SOURCE
#include "qtest.h"

#include "base/files.h"
#include "base/fs.h"
#include "base/json.h"
#include "plan/config.h"
#include "plan/memory.h"
#include "plan/tensors.h"

#define MODEL QIE_SOURCE_DIR "/tests/golden/model"

static const char *const NAMES[] = {
    "model_index.json", "transformer/config.json",         "text_encoder/config.json",
    "vae/config.json",  "scheduler/scheduler_config.json", "processor/preprocessor_config.json"};
enum { N = sizeof NAMES / sizeof *NAMES };

/* The tiny model's configs as built-in files, one of them replaced by `text`. */
static qie_status read_with(const char *name, const char *text, qie_model_config *out,
                            qie_error *e) {
    qie_builtin_file table[N + 2] = {0};
    unsigned char *data[N] = {0};
    size_t k = 0;
    for (int i = 0; i < N; i++) {
        char path[512];
        size_t n;
        snprintf(path, sizeof path, MODEL "/%s", NAMES[i]);
        if (qie_file_read(path, 1 << 20, &data[i], &n, e) != QIE_OK)
            return e->status;
        table[k++] = (qie_builtin_file){NAMES[i], data[i], data[i] + n};
        if (name && !strcmp(name, NAMES[i])) {
            if (!text)
                table[--k] = (qie_builtin_file){0};
            else
                table[k - 1] = (qie_builtin_file){name, (const unsigned char *)text,
                                                  (const unsigned char *)text + strlen(text)};
        }
    }
    if (name && !strcmp(name, "qwen_edit.json"))
        table[k++] = (qie_builtin_file){name, (const unsigned char *)text,
                                        (const unsigned char *)text + strlen(text)};
    qie_files *f = NULL;
    qie_status st = qie_files_open_builtin(table, "test", &f, e);
    if (st == QIE_OK)
        st = qie_model_config_read(f, out, e);
    qie_files_close(f);
    for (int i = 0; i < N; i++)
        free(data[i]);
    return st;
}

/* One key of one config set to a JSON value. */
static qie_status read_set(const char *name, const char *key, const char *value,
                           qie_model_config *out, qie_error *e) {
    char path[512];
    qie_json *j, *v;
    snprintf(path, sizeof path, MODEL "/%s", name);
    if (qie_json_parse_file(path, 1 << 20, &j, e) != QIE_OK ||
        qie_json_parse(value, strlen(value), "value", &v, e) != QIE_OK)
        return QIE_E_INTERNAL;
    qie_json *target = qie_json_member(j, "text_config");
    if (target && qie_json_member(target, key))
        qie_json_put(target, key, v);
    else
        qie_json_put(j, key, v);
    char *text = qie_json_text(j, 0);
    qie_json_free(j);
    qie_status st = read_with(name, text, out, e);
    free(text);
    return st;
}

QTEST(test_config_tiny_model_reads_all_numbers) {
    qie_error e = {0};
    qie_model_config c;
    ASSERT_OK(read_with(NULL, NULL, &c, &e));
    ASSERT_INT(c.transformer.num_layers, 2);
    ASSERT_INT(c.transformer.inner_dim, 64);
    ASSERT(c.transformer.zero_cond_t);
    ASSERT_INT(c.text.hidden_size, 64);
    ASSERT_INT(c.text.mrope_section[1], 3);
    ASSERT_INT(c.vision.n_fullatt, 1);
    ASSERT_INT(c.vae.base_dim, 8);
    ASSERT_INT(c.vae.scale_factor, 8);
    ASSERT_INT(c.defaults.num_inference_steps, 40);
    ASSERT_LE(fabs(c.scheduler.shift_terminal - 0.02), 1e-9);
}

QTEST(test_config_absurd_numbers_are_refused_with_file_and_key) {
    static const char *const cases[][3] = {
        {"transformer/config.json", "num_layers", "0"},
        {"transformer/config.json", "num_layers", "-3"},
        {"transformer/config.json", "num_layers", "1e300"},
        {"transformer/config.json", "num_layers", "2.5"},
        {"transformer/config.json", "num_layers", "\"two\""},
        {"transformer/config.json", "attention_head_dim", "100000"},
        {"transformer/config.json", "num_attention_heads", "4294967297"},
        {"transformer/config.json", "axes_dims_rope", "[8, 12]"},
        {"transformer/config.json", "axes_dims_rope", "[8, 12, 13]"},
        {"transformer/config.json", "axes_dims_rope", "\"x\""},
        {"transformer/config.json", "joint_attention_dim", "65"},
        {"transformer/config.json", "in_channels", "63"},
        {"transformer/config.json", "zero_cond_t", "1"},
        {"text_encoder/config.json", "hidden_size", "63"},
        {"text_encoder/config.json", "num_key_value_heads", "3"},
        {"text_encoder/config.json", "vocab_size", "1e12"},
        {"text_encoder/config.json", "rope_theta", "-1"},
        {"text_encoder/config.json", "image_token_id", "100000"},
        {"vae/config.json", "base_dim", "0"},
        {"vae/config.json", "dim_mult", "[]"},
        {"vae/config.json", "dim_mult", "[1,2,4,4,4,4,4,4,4,4]"},
        {"vae/config.json", "latents_std", "[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]"},
        {"vae/config.json", "latents_mean", "[1]"},
        {"vae/config.json", "z_dim", "1000"},
        {"scheduler/scheduler_config.json", "shift_terminal", "1.5"},
        {"scheduler/scheduler_config.json", "max_image_seq_len", "256"},
        {"scheduler/scheduler_config.json", "base_shift", "1e10"},
        {"processor/preprocessor_config.json", "image_std", "[0, 1, 1]"},
        {"processor/preprocessor_config.json", "patch_size", "7"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qie_error e = {0};
        qie_model_config c;
        qie_status st = read_set(cases[i][0], cases[i][1], cases[i][2], &c, &e);
        if (st != QIE_E_CORRUPT && st != QIE_E_UNSUPPORTED)
            QTEST_FAIL("%s %s = %s: %s", cases[i][0], cases[i][1], cases[i][2],
                       qie_status_name(st));
        /* contradictions between two files are told of one of them */
        ASSERT_CONTAINS(e.message, ".json");
    }
}

QTEST(test_config_other_models_are_unsupported) {
    qie_error e = {0};
    qie_model_config c;
    ASSERT_INT(read_set("transformer/config.json", "use_layer3d_rope", "true", &c, &e),
               QIE_E_UNSUPPORTED);
    ASSERT_INT(read_set("transformer/config.json", "guidance_embeds", "true", &c, &e),
               QIE_E_UNSUPPORTED);
    ASSERT_INT(
        read_set("transformer/config.json", "_class_name", "\"FluxTransformer2DModel\"", &c, &e),
        QIE_E_UNSUPPORTED);
    ASSERT_INT(read_set("scheduler/scheduler_config.json", "use_karras_sigmas", "true", &c, &e),
               QIE_E_UNSUPPORTED);
    ASSERT_INT(
        read_with("model_index.json", "{\"_class_name\":\"StableDiffusionPipeline\"}", &c, &e),
        QIE_E_UNSUPPORTED);
    ASSERT_CONTAINS(e.message, "StableDiffusionPipeline");
}

QTEST(test_config_broken_json_or_missing_file_names_the_file) {
    for (int i = 0; i < N; i++) {
        qie_error e = {0};
        qie_model_config c;
        ASSERT_INT(read_with(NAMES[i], "{\"a\":", &c, &e), QIE_E_CORRUPT);
        ASSERT_CONTAINS(e.message, NAMES[i]);
        ASSERT_INT(read_with(NAMES[i], "[]", &c, &e), QIE_E_CORRUPT);
        ASSERT_INT(read_with(NAMES[i], NULL, &c, &e), QIE_E_NOT_FOUND);
        ASSERT_CONTAINS(e.message, NAMES[i]);
    }
}

QTEST(test_config_zero_cond_t_absent_means_false) {
    qie_error e = {0};
    qie_model_config c;
    ASSERT_OK(read_set("transformer/config.json", "zero_cond_t", "null", &c, &e));
    ASSERT(!c.transformer.zero_cond_t);
}

QTEST(test_config_defaults_file_is_read_and_checked) {
    qie_error e = {0};
    qie_model_config c;
    ASSERT_OK(read_with("qwen_edit.json",
                        "{\"num_inference_steps\":4,\"true_cfg_scale\":1.0,\"size\":\"keep\","
                        "\"about\":{\"en\":\"hello\",\"zh\":\"你好\"}}",
                        &c, &e));
    ASSERT_INT(c.defaults.num_inference_steps, 4);
    ASSERT(c.defaults.keep_size);
    ASSERT_STR(c.defaults.about_zh, "你好");
    ASSERT_INT(read_with("qwen_edit.json", "{\"num_inference_steps\":0}", &c, &e), QIE_E_CORRUPT);
    ASSERT_INT(read_with("qwen_edit.json", "{\"size\":\"big\"}", &c, &e), QIE_E_CORRUPT);
    ASSERT_INT(read_with("qwen_edit.json", "{\"max_side\":3}", &c, &e), QIE_E_CORRUPT);
}

static bool count_spec(void *arg, const qie_tensor_spec *s) {
    int64_t *n = arg, k = 1;
    for (int i = 0; i < s->n_dims; i++)
        k *= s->shape[i];
    n[0]++;
    n[1] += k;
    return true;
}

/* Released sizes: the counts of the released files, from instantiating the classes at those sizes.
 */
QTEST(test_tensors_released_sizes_have_the_released_counts) {
    qie_transformer_config t = {.patch_size = 2,
                                .in_channels = 64,
                                .out_channels = 16,
                                .num_layers = 60,
                                .attention_head_dim = 128,
                                .num_attention_heads = 24,
                                .joint_attention_dim = 3584,
                                .inner_dim = 3072};
    int64_t n[2] = {0, 0};
    ASSERT(qie_tensors_transformer(&t, count_spec, n));
    ASSERT_INT(n[0], 1933);
    ASSERT_INT(n[1], 20430401088);
    qie_text_config x = {.vocab_size = 152064,
                         .hidden_size = 3584,
                         .intermediate_size = 18944,
                         .num_hidden_layers = 28,
                         .num_attention_heads = 28,
                         .num_key_value_heads = 4,
                         .head_dim = 128};
    qie_vision_config v = {.depth = 32,
                           .hidden_size = 1280,
                           .num_heads = 16,
                           .intermediate_size = 3420,
                           .out_hidden_size = 3584,
                           .patch_size = 14,
                           .temporal_patch_size = 2,
                           .spatial_merge_size = 2};
    n[0] = n[1] = 0;
    ASSERT(qie_tensors_text_encoder(&x, &v, count_spec, n));
    ASSERT_INT(n[0], 729);
    ASSERT_INT(n[1], 8292166656);
    qie_vae_config a = {
        .base_dim = 96, .z_dim = 16, .num_res_blocks = 2, .n_levels = 4, .dim_mult = {1, 2, 4, 4}};
    n[0] = n[1] = 0;
    ASSERT(qie_tensors_vae(&a, count_spec, n));
    ASSERT_INT(n[0], 186); /* 194 less the 8 of time_conv, which a single frame never uses */
}

QTEST(test_memory_plan_huge_requests_do_not_overflow) {
    qie_error e = {0};
    qie_model_config c;
    ASSERT_OK(read_with(NULL, NULL, &c, &e));
    qie_size_plan s = {.n_images = 1,
                       .n_target = INT64_C(1) << 40,
                       .n_reference = INT64_C(1) << 40,
                       .n_patches = INT64_C(1) << 40,
                       .n_vision_tokens = INT64_C(1) << 40,
                       .generated = {1 << 20, 1 << 20}};
    s.images[0].vae = (qie_size){1 << 20, 1 << 20};
    qie_memory_request r = {.model = &c,
                            .sizes = &s,
                            .act = QIE_F32,
                            .n_passes = 2,
                            .n_ids = {INT64_C(1) << 50, 1},
                            .n_text = {INT64_C(1) << 50, 1},
                            .n_steps = 200,
                            .n_outputs = 10};
    qie_memory_plan p;
    ASSERT(!qie_memory_plan_make(&r, &p));
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
