/* LoRA files: namings, what is refused and by which words, Lightning recognised, matching. */
#define _GNU_SOURCE
#include "qtest.h"

#include "base/strbuf.h"
#include "weights/lora.h"

/* A safetensors file made up of F32 tensors of zeros (alphas: the number given), in memory. */
typedef struct maker {
    qie_strbuf header;
    unsigned char *file;
    size_t n, data;
    struct {
        size_t at;
        float value;
    } alphas[256];
    size_t n_alphas;
} maker;

static void begin(maker *m, const char *metadata) {
    memset(m, 0, sizeof *m);
    qie_strbuf_init(&m->header, 1 << 20);
    qie_strbuf_printf(&m->header, "{\"__metadata__\":{%s}", metadata);
}

static void add(maker *m, const char *name, int rows, int cols) {
    size_t bytes = 4 * (size_t)rows * (size_t)cols;
    qie_strbuf_printf(&m->header,
                      ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}",
                      name, rows, cols, m->data, m->data + bytes);
    m->data += bytes;
}

static void alpha(maker *m, const char *name, float value) {
    m->alphas[m->n_alphas].at = m->data;
    m->alphas[m->n_alphas++].value = value;
    qie_strbuf_printf(&m->header,
                      ",\"%s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[%zu,%zu]}", name,
                      m->data, m->data + 4);
    m->data += 4;
}

/* A pair in a naming: "%s" stands for down or up. */
static void pair(maker *m, const char *module, const char *down, const char *up, int n, int k,
                 int rank) {
    char name[300];
    snprintf(name, sizeof name, "%s%s", module, down);
    add(m, name, rank, k);
    snprintf(name, sizeof name, "%s%s", module, up);
    add(m, name, n, rank);
}

static qie_status open_made(maker *m, const char *label, qie_lora **l, qie_error *e) {
    qie_strbuf_puts(&m->header, "}");
    size_t h = m->header.len;
    m->n = 8 + h + m->data;
    m->file = calloc(1, m->n);
    for (size_t i = 0; i < 8; i++)
        m->file[i] = (unsigned char)((uint64_t)h >> (8 * i));
    memcpy(m->file + 8, m->header.data, h);
    for (size_t i = 0; i < m->n_alphas; i++)
        memcpy(m->file + 8 + h + m->alphas[i].at, &m->alphas[i].value, 4);
    return qie_lora_open_bytes(m->file, m->n, label, l, e);
}

static void end(maker *m, qie_lora *l) {
    qie_lora_close(l);
    free(m->file);
    qie_strbuf_release(&m->header);
}

#define A ".lora_A.weight"
#define B ".lora_B.weight"

static const qie_lora_target TARGETS[] = {
    {"transformer_blocks.0.attn.to_q", QIE_LORA_TRANSFORMER, 8, 4},
    {"transformer_blocks.0.attn.to_k", QIE_LORA_TRANSFORMER, 8, 4},
    {"transformer_blocks.0.attn.to_v", QIE_LORA_TRANSFORMER, 8, 4},
    {"transformer_blocks.0.attn.to_out.0", QIE_LORA_TRANSFORMER, 8, 4},
    {"transformer_blocks.0.img_mlp.net.0.proj", QIE_LORA_TRANSFORMER, 8, 4},
    {"norm_out.linear", QIE_LORA_TRANSFORMER, 8, 4},
    {"model.layers.0.self_attn.q_proj", QIE_LORA_TEXT_ENCODER, 8, 4},
    {"visual.blocks.0.attn.q", QIE_LORA_TEXT_ENCODER, 8, 4},
    {"visual.blocks.0.attn.k", QIE_LORA_TEXT_ENCODER, 8, 4},
    {"visual.blocks.0.attn.v", QIE_LORA_TEXT_ENCODER, 8, 4}};
enum { N_TARGETS = sizeof TARGETS / sizeof *TARGETS };

/* Index of the target that a module with this key meets; -1: refused. */
static int target_of(const char *key, const char *down, const char *up, int n, qie_error *e) {
    maker m;
    qie_lora *l = NULL;
    qie_lora_table *t = NULL;
    qie_lora_match *list = NULL;
    size_t count;
    int found = -1;
    begin(&m, "");
    pair(&m, key, down, up, n, 4, 2);
    if (open_made(&m, "x.safetensors", &l, e) == QIE_OK &&
        qie_lora_table_create(TARGETS, N_TARGETS, &t, e) == QIE_OK &&
        qie_lora_match_all(l, t, true, &list, &count, e) == QIE_OK)
        found = (int)list[0].i_target + 100 * ((int)count - 1);
    free(list);
    qie_lora_table_destroy(t);
    end(&m, l);
    return found;
}

QTEST(test_lora_namings_find_their_layers) {
    static const struct {
        const char *key, *down, *up;
        int n, target;
    } cases[] = {
        {"transformer.transformer_blocks.0.attn.to_q", A, B, 8, 0},
        {"base_model.model.transformer_blocks.0.attn.to_k", A, B, 8, 1},
        {"transformer_blocks.0.attn.to_v", ".lora_down.weight", ".lora_up.weight", 8, 2},
        {"diffusion_model.transformer_blocks.0.attn.to_out.0", A, B, 8, 3},
        {"model.diffusion_model.transformer_blocks.0.attn.to_out.0", ".lora.down.weight",
         ".lora.up.weight", 8, 3},
        {"lora_unet_transformer_blocks_0_img_mlp_net_0_proj", ".lora_down.weight",
         ".lora_up.weight", 8, 4},
        {"lycoris_transformer_blocks_0_attn_to_out_0", ".lora_down.weight", ".lora_up.weight", 8,
         3},
        {"lora_unet_norm_out_linear", ".lora_down.weight", ".lora_up.weight", 8, 5},
        {"norm_out.linear", ".lora_A.my_adapter.weight", ".lora_B.my_adapter.weight", 8, 5},
        {"text_encoder.model.language_model.layers.0.self_attn.q_proj", A, B, 8, 6},
        {"text_encoder.model.layers.0.self_attn.q_proj", A, B, 8, 6},
        {"lora_te_layers_0_self_attn_q_proj", ".lora_down.weight", ".lora_up.weight", 8, 6},
        {"lora_te1_model_language_model_layers_0_self_attn_q_proj", ".lora_down.weight",
         ".lora_up.weight", 8, 6},
        {"text_encoder.model.visual.blocks.0.attn.qkv", A, B, 24, 207},
        {"text_encoders.qwen25_7b.transformer.visual.blocks.0.attn.qkv", A, B, 24, 207},
        {"transformer_blocks.0.attn.to_qkv", A, B, 24, 200}, /* q, k and v */
        {"lora_unet_transformer_blocks_0_attn_to_qkv", ".lora_down.weight", ".lora_up.weight", 24,
         200},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qie_error e = {0};
        int got = target_of(cases[i].key, cases[i].down, cases[i].up, cases[i].n, &e);
        if (got != cases[i].target)
            QTEST_FAIL("'%s': %d, expected %d: %s", cases[i].key, got, cases[i].target, e.message);
    }
}

QTEST(test_lora_of_another_model_is_refused_with_its_names) {
    qie_error e = {0};
    ASSERT_INT(target_of("diffusion_model.double_blocks.0.img_attn.qkv", A, B, 24, &e), -1);
    ASSERT_INT(e.status, QIE_E_INVALID);
    ASSERT_STR(e.param, "lora");
    ASSERT_CONTAINS(e.message, "another model");
    ASSERT_CONTAINS(e.message, "double_blocks.0.img_attn.qkv");
    ASSERT_INT(target_of("transformer_blocks.7.attn.to_q", A, B, 8, &e), -1);
    ASSERT_CONTAINS(e.message, "transformer_blocks.7.attn.to_q");
    ASSERT_INT(target_of("transformer_blocks.0.attn.to_q", A, B, 16, &e), -1);
    ASSERT_CONTAINS(e.message, "is for a layer of 4 to 16, the model's has 4 to 8");
}

QTEST(test_lora_other_adapters_are_refused_by_name) {
    static const char *const names[][2] = {
        {"x.dora_scale", "DoRA"},      {"x.lora_magnitude_vector", "DoRA"},
        {"lycoris_x.lokr_w1", "LoKr"}, {"lora_unet_x.hada_w1_a", "LoHa"},
        {"x.oft_blocks", "OFT"},       {"x.lora_mid.weight", "Tucker"},
        {"x.lora_B.bias", "biases"},   {"diffusion_model.x.diff", "full difference"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        maker m;
        qie_lora *l;
        qie_error e = {0};
        begin(&m, "");
        pair(&m, "transformer_blocks.0.attn.to_q", A, B, 8, 4, 2);
        add(&m, names[i][0], 8, 1);
        ASSERT_INT(open_made(&m, "x.safetensors", &l, &e), QIE_E_INVALID);
        ASSERT_CONTAINS(e.message, names[i][1]);
        end(&m, NULL);
    }
    maker m;
    qie_lora *l;
    qie_error e = {0};
    begin(&m,
          "\"lora_adapter_metadata\":\"{\\\"transformer.r\\\":2,\\\"transformer.lora_alpha\\\":2,"
          "\\\"transformer.use_dora\\\":true}\"");
    pair(&m, "transformer.transformer_blocks.0.attn.to_q", A, B, 8, 4, 2);
    ASSERT_INT(open_made(&m, "x.safetensors", &l, &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, "DoRA");
    end(&m, NULL);
}

QTEST(test_lora_damage_is_refused) {
    static const struct {
        const char *down, *up, *more, *says;
        int rank_up;
    } cases[] = {
        {A, NULL, NULL, "no second", 0},           {NULL, B, NULL, "no first", 2},
        {A, B, NULL, "do not fit together", 3},    {A, B, ".lora_down.weight", "say the same", 2},
        {A, B, ".weight", "belong to no LoRA", 2}, {NULL, NULL, ".weight", "no LoRA matrices", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        maker m;
        qie_lora *l;
        qie_error e = {0};
        char name[64];
        begin(&m, "");
        if (cases[i].down)
            add(&m, "x.lora_A.weight", 2, 4);
        if (cases[i].up)
            add(&m, "x.lora_B.weight", 8, cases[i].rank_up);
        if (cases[i].more) {
            snprintf(name, sizeof name, "x%s", cases[i].more);
            add(&m, name, 2, 4);
        }
        ASSERT_INT(open_made(&m, "x.safetensors", &l, &e), QIE_E_INVALID);
        ASSERT_CONTAINS(e.message, cases[i].says);
        end(&m, NULL);
    }
    maker m;
    qie_lora *l;
    qie_error e = {0};
    begin(&m, "");
    pair(&m, "x", A, B, 8, 4, 2);
    alpha(&m, "x.alpha", NAN);
    ASSERT_INT(open_made(&m, "x.safetensors", &l, &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, "x.alpha");
    end(&m, NULL);
}

QTEST(test_lora_scale_comes_from_alpha_and_metadata) {
    maker m;
    qie_lora *l;
    qie_error e = {0};
    begin(&m,
          "\"lora_adapter_metadata\":\"{\\\"transformer.r\\\":2,\\\"transformer.lora_alpha\\\":6,"
          "\\\"transformer.alpha_pattern\\\":{\\\"attn.to_k\\\":1,"
          "\\\"^transformer_blocks.0.attn.to_v\\\":10}}\"");
    pair(&m, "transformer.transformer_blocks.0.attn.to_k", A, B, 8, 4, 2);
    pair(&m, "transformer.transformer_blocks.0.attn.to_q", A, B, 8, 4, 4);
    pair(&m, "transformer.transformer_blocks.0.attn.to_v", A, B, 8, 4, 2);
    ASSERT_OK(open_made(&m, "x.safetensors", &l, &e));
    ASSERT_INT(l->n_modules, 3);
    ASSERT_LE(fabs(l->modules[0].scale - 0.5), 1e-12);
    ASSERT_LE(fabs(l->modules[1].scale - 1.5), 1e-12);
    ASSERT_LE(fabs(l->modules[2].scale - 5), 1e-12);
    ASSERT_INT(l->min_rank, 2);
    ASSERT_INT(l->max_rank, 4);
    end(&m, l);
    begin(&m, "\"lora_adapter_metadata\":\"{\\\"transformer.lora_alpha\\\":6,"
              "\\\"transformer.use_rslora\\\":true}\"");
    pair(&m, "transformer.transformer_blocks.0.attn.to_q", A, B, 8, 4, 4);
    ASSERT_OK(open_made(&m, "x.safetensors", &l, &e));
    ASSERT_LE(fabs(l->modules[0].scale - 3), 1e-12);
    end(&m, l);
    begin(&m, "");
    pair(&m, "transformer_blocks.0.attn.to_q", ".lora_down.weight", ".lora_up.weight", 8, 4, 4);
    alpha(&m, "transformer_blocks.0.attn.to_q.alpha", 2);
    ASSERT_OK(open_made(&m, "x.safetensors", &l, &e));
    ASSERT_LE(fabs(l->modules[0].scale - 0.5), 1e-12);
    end(&m, l);
}

static void released_shape(maker *m, int blocks, float a, int rank) {
    static const char *const layers[] = {
        "attn.to_q",       "attn.to_k",       "attn.to_v",          "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",    "attn.to_add_out",
        "img_mlp.net.2",   "txt_mlp.net.2",   "img_mlp.net.0.proj", "txt_mlp.net.0.proj"};
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < 12; i++) {
            char name[96], full[120];
            snprintf(name, sizeof name, "transformer_blocks.%d.%s", b, layers[i]);
            pair(m, name, ".lora_down.weight", ".lora_up.weight", 2, 2, rank);
            snprintf(full, sizeof full, "%s.alpha", name);
            alpha(m, full, a);
        }
}

QTEST(test_lora_lightning_is_recognised) {
    static const struct {
        const char *label, *metadata;
        int shape; /* 0: any other; 1: as released; 2: another alpha */
        const char *from;
        int steps;
    } cases[] = {
        {"/a/Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors", "", 0, "its name", 4},
        {"qwen_image_edit_2511_lightning_8_steps.safetensors", "", 0, "its name", 8},
        {"Lightning.safetensors", "", 0, "its name", 0},
        {"x.safetensors", "\"modelspec.title\":\"Qwen-Image-Lightning 8 steps\"", 0, "its metadata",
         8},
        {"x-4steps.safetensors", "\"name\":\"lightning\"", 0, "its metadata", 4},
        {"x.safetensors", "\"name\":\"lightning\",\"num_inference_steps\":\"4\"", 0, "its metadata",
         4},
        {"x.safetensors", "", 1, "its shape", 0},
        {"x.safetensors", "", 2, NULL, 0},
        {"style-4steps.safetensors", "\"ss_training_comment\":\"on top of lightning\"", 0, NULL,
         0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        maker m;
        qie_lora *l;
        qie_error e = {0};
        begin(&m, cases[i].metadata);
        if (cases[i].shape)
            released_shape(&m, 3, cases[i].shape == 1 ? 8 : 64, 64);
        else
            pair(&m, "transformer_blocks.0.attn.to_q", A, B, 8, 4, 2);
        ASSERT_OK(open_made(&m, cases[i].label, &l, &e));
        if (!cases[i].from != !l->preset_from ||
            (l->preset_from && strcmp(l->preset_from, cases[i].from)))
            QTEST_FAIL("case %zu: '%s'", i, l->preset_from ? l->preset_from : "not recognised");
        ASSERT_INT(l->preset.num_inference_steps, cases[i].steps);
        end(&m, l);
    }
}

QTEST(test_lora_for_the_other_zero_cond_t_is_refused_by_its_metadata) {
    for (int zero = 0; zero < 2; zero++) {
        maker m;
        qie_lora *l;
        qie_lora_table *t;
        qie_lora_match *list;
        size_t n;
        qie_error e = {0};
        begin(&m, "\"base_model\":\"Qwen/Qwen-Image-Edit-2509\"");
        pair(&m, "transformer_blocks.0.attn.to_q", A, B, 8, 4, 2);
        ASSERT_OK(open_made(&m, "x.safetensors", &l, &e));
        ASSERT_OK(qie_lora_table_create(TARGETS, N_TARGETS, &t, &e));
        ASSERT_INT(qie_lora_match_all(l, t, zero, &list, &n, &e), zero ? QIE_E_INVALID : QIE_OK);
        if (zero)
            ASSERT_CONTAINS(e.message, "zero_cond_t");
        free(list);
        qie_lora_table_destroy(t);
        end(&m, l);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
