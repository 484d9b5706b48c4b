/* A component of a model: shards and index, single files, and the two namings of the text encoder.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/strbuf.h"
#include "qtest.h"
#include "weights/weights.h"

/* A file in memory with one F32 tensor of one element per name. */
typedef struct shard {
    unsigned char *data;
    size_t n;
} shard;

static shard make_shard(const char *const *names) {
    qie_strbuf b;
    size_t count = 0, header;
    qie_strbuf_init(&b, 1u << 24);
    qie_strbuf_puts(&b, "{");
    for (; names[count]; count++)
        qie_strbuf_printf(&b,
                          "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[%zu,%zu]}",
                          count ? "," : "", names[count], 4 * count, 4 * count + 4);
    qie_strbuf_puts(&b, "}");
    header = b.len;
    shard s = {calloc(1, 8 + header + 4 * count), 8 + header + 4 * count};
    for (size_t i = 0; i < 8; i++)
        s.data[i] = (unsigned char)((uint64_t)header >> (8 * i));
    memcpy(s.data + 8, b.data, header);
    for (size_t i = 0; i < count; i++) {
        float v = (float)i;
        memcpy(s.data + 8 + header + 4 * i, &v, 4);
    }
    qie_strbuf_release(&b);
    return s;
}

#define ROW(name, s) \
    { name, (s).data, (s).data + (s).n }
#define TEXT_ROW(name, t) \
    { name, (const unsigned char *)(t), (const unsigned char *)(t) + strlen(t) }

static qie_status open_rows(const qie_builtin_file *rows, qie_files **f, qie_weights **w,
                            qie_error *e) {
    *w = NULL;
    qie_status st = qie_files_open_builtin(rows, "test model", f, e);
    return st == QIE_OK ? qie_weights_open(*f, "x", w, e) : st;
}

static const char *const FIRST[] = {"model.a", "visual.b", "stray", NULL}, *const SECOND[] = {"c",
                                                                                              NULL};

QTEST(test_index_shards_are_joined_and_strays_ignored) {
    qie_error e = {0};
    qie_files *f;
    qie_weights *w;
    shard one = make_shard(FIRST), two = make_shard(SECOND);
    const char *index = "{\"metadata\":{\"total_size\":12},\"weight_map\":{\"c\":\"2.safetensors\","
                        "\"model.a\":\"1.safetensors\",\"visual.b\":\"1.safetensors\"}}";
    qie_builtin_file rows[] = {TEXT_ROW("x/model.safetensors.index.json", index),
                               ROW("x/1.safetensors", one),
                               ROW("x/2.safetensors", two),
                               {0}};
    ASSERT_OK(open_rows(rows, &f, &w, &e));
    ASSERT_INT(qie_weights_count(w), 3);
    ASSERT_INT(qie_weights_bytes(w), 12);
    ASSERT(!qie_weights_find(w, "stray"));
    ASSERT_STR(qie_weights_file_of(w, qie_weights_find(w, "c")), "test model/x/2.safetensors");
    ASSERT_STR(qie_weights_file_of(w, qie_weights_find(w, "visual.b")),
               "test model/x/1.safetensors");
    float v;
    memcpy(&v, qie_weights_find(w, "visual.b")->data, 4);
    ASSERT_INT(v, 1);
    qie_weights_close(w);
    qie_files_close(f);
    free(one.data);
    free(two.data);
}

QTEST(test_index_lies_are_refused) {
    static const struct {
        const char *index, *message;
        qie_status status;
    } CASES[] = {
        {"", "not valid JSON", QIE_E_CORRUPT},
        {"{}", "no weight_map", QIE_E_CORRUPT},
        {"{\"weight_map\":{}}", "no weight_map", QIE_E_CORRUPT},
        {"{\"weight_map\":[\"a\"]}", "no weight_map", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":3}}", "tensor 'c' has no file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"\"}}", "not a plain file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"../2.safetensors\"}}", "not a plain file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"/etc/passwd\"}}", "not a plain file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"y/2.safetensors\"}}", "not a plain file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"..\"}}", "not a plain file name", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"3.safetensors\"}}",
         "'test model/x/3.safetensors' is missing: complete the model with `qwen-edit pull`",
         QIE_E_NOT_FOUND},
        {"{\"weight_map\":{\"d\":\"2.safetensors\"}}", "names tensor 'd' in '2.safetensors'",
         QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"1.safetensors\",\"model.a\":\"2.safetensors\"}}",
         "names tensor 'c' in '1.safetensors'", QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"2.safetensors\",\"c\":\"1.safetensors\"}}", "duplicate",
         QIE_E_CORRUPT},
        {"{\"weight_map\":{\"c\":\"bad.safetensors\"}}",
         "'test model/x/bad.safetensors' is no safetensors", QIE_E_CORRUPT},
    };
    shard one = make_shard(FIRST), two = make_shard(SECOND);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        qie_error e = {0};
        qie_files *f;
        qie_weights *w;
        qie_builtin_file rows[] = {
            TEXT_ROW("x/diffusion_pytorch_model.safetensors.index.json", CASES[i].index),
            ROW("x/1.safetensors", one),
            ROW("x/2.safetensors", two),
            TEXT_ROW("x/bad.safetensors", "bad"),
            {0}};
        qie_status st = open_rows(rows, &f, &w, &e);
        if (st != CASES[i].status || w || !strstr(e.message, CASES[i].message))
            QTEST_FAIL("case %zu: %s \"%s\", expected \"%s\"", i, qie_status_name(st), e.message,
                       CASES[i].message);
        qie_files_close(f);
    }
    free(one.data);
    free(two.data);
}

QTEST(test_index_absent_uses_single_file) {
    qie_error e = {0};
    qie_files *f;
    qie_weights *w;
    shard one = make_shard(FIRST);
    qie_builtin_file rows[] = {ROW("x/model.safetensors", one), {0}}, none[] = {{0}};
    ASSERT_OK(open_rows(rows, &f, &w, &e));
    ASSERT_INT(qie_weights_count(w), 3);
    ASSERT_STR(qie_weights_file_of(w, qie_weights_at(w, 0)), "test model/x/model.safetensors");
    qie_weights_close(w);
    qie_files_close(f);
    ASSERT_INT(open_rows(none, &f, &w, &e), QIE_E_NOT_FOUND);
    ASSERT_CONTAINS(e.message, "'test model/x'");
    ASSERT_CONTAINS(e.message, "qwen-edit pull");
    qie_files_close(f);
    free(one.data);
}

/* transformers renamed the text encoder's tensors by prefix; both are found under the released
 * name. */
QTEST(test_index_both_namings_are_found) {
    static const char *const OLD[] = {"visual.merger.ln_q.weight", "model.norm.weight",
                                      "lm_head.weight", NULL},
                             *const NEW[] = {"model.visual.merger.ln_q.weight",
                                             "model.language_model.norm.weight", "lm_head.weight",
                                             NULL};
    for (int k = 0; k < 2; k++) {
        qie_error e = {0};
        qie_weights *w;
        const qie_tensor *t;
        static const int64_t SHAPE[] = {1};
        shard s = make_shard(k ? NEW : OLD);
        ASSERT_OK(qie_weights_open_bytes(s.data, s.n, "t", &w, &e));
        for (int i = 0; i < 3; i++) {
            ASSERT_OK(qie_weights_need(w, OLD[i], 1, SHAPE, &t, &e));
            ASSERT(t == qie_weights_at(w, (size_t)i));
        }
        ASSERT(!qie_weights_find(w, "model.merger.ln_q.weight"));
        ASSERT(!qie_weights_find(w, "norm.weight"));
        ASSERT(!qie_weights_find(w, "visual."));
        ASSERT(!qie_weights_find(w, ""));
        qie_weights_close(w);
        free(s.data);
    }
}

QTEST(test_index_tiny_model_opens_whole) {
    static const struct {
        const char *folder, *tensor;
        size_t count;
        int64_t elements;
    } PARTS[] = {{"transformer", "transformer_blocks.1.img_mlp.net.2.weight", 77, 340480},
                 {"vae", "decoder.conv_in.weight", 194, 924491},
                 {"text_encoder", "visual.patch_embed.proj.weight", 69, 421184}};
    qie_error e = {0};
    qie_files *f;
    ASSERT_OK(qie_files_open_dir(QIE_SOURCE_DIR "/tests/golden/model", &f, &e));
    for (size_t i = 0; i < 3; i++) {
        qie_weights *w;
        double start = qie_now_s();
        ASSERT_OK(qie_weights_open(f, PARTS[i].folder, &w, &e));
        printf("  %s: %.2f ms\n", PARTS[i].folder, (qie_now_s() - start) * 1e3);
        ASSERT_INT(qie_weights_count(w), PARTS[i].count);
        ASSERT_INT(qie_weights_elements(w), PARTS[i].elements);
        ASSERT_INT(qie_weights_bytes(w), 4 * PARTS[i].elements);
        ASSERT(qie_weights_find(w, PARTS[i].tensor));
        for (size_t k = 0; k < qie_weights_count(w); k++)
            ASSERT(qie_weights_find(w, qie_weights_at(w, k)->name) == qie_weights_at(w, k));
        qie_weights_close(w);
    }
    qie_files_close(f);
}

/* As many tensors as the released transformer: opening is linear, a look-up needs no walk. */
QTEST(test_index_1933_tensors_open_quickly) {
    enum { N = 1933 };
    qie_error e = {0};
    qie_weights *w;
    char(*names)[64] = calloc(N, sizeof *names);
    const char **list = calloc(N + 1, sizeof *list);
    for (int i = 0; i < N; i++) {
        snprintf(names[i], sizeof names[i], "transformer_blocks.%d.attn.add_q_proj.%d.weight",
                 i / 32, i % 32);
        list[i] = names[i];
    }
    shard s = make_shard(list);
    double start = qie_now_s();
    ASSERT_OK(qie_weights_open_bytes(s.data, s.n, "big", &w, &e));
    double opened = qie_now_s();
    for (int i = 0; i < N; i++)
        ASSERT(qie_weights_find(w, names[i]) == qie_weights_at(w, (size_t)i));
    printf("  open %.2f ms, 1933 look-ups %.2f ms\n", (opened - start) * 1e3,
           (qie_now_s() - opened) * 1e3);
    ASSERT_LE(qie_now_s() - start, 1.0);
    qie_weights_close(w);
    free(s.data);
    free(names);
    free(list);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
