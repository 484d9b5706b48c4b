/* The reader of GGUF files: what it takes, what it refuses; names of other programs. */
#include "base/strbuf.h"
#include "gguf_make.h"
#include "qtest.h"
#include "weights/gguf.h"
#include "weights/names.h"

static gguf_make g;
static qie_error err;

QTEST(test_gguf_example_is_read) {
    for (uint32_t version = 2; version <= 3; version++) {
        qie_weights *w;
        gguf_example(&g, version);
        if (qie_weights_open_bytes(g.data, g.n, "x.gguf", &w, &err) != QIE_OK)
            QTEST_FAIL("%s", err.message);
        const qie_tensor *t = qie_weights_find(w, "w"), *b = qie_weights_find(w, "b");
        ASSERT(t && b);
        ASSERT_INT(t->dtype, QIE_Q8_0);
        ASSERT_INT(t->n_dims, 2);
        ASSERT_INT(t->shape[0], 3);
        ASSERT_INT(t->shape[1], 32);
        ASSERT_INT(t->n_bytes, 102);
        ASSERT_INT((uintptr_t)b->data - (uintptr_t)t->data, 128);
        ASSERT_INT(b->n_bytes, 20);
        ASSERT_STR(qie_weights_metadata(w, "general.architecture"), "qwen_image");
        ASSERT_STR(qie_weights_metadata(w, "a.float"), "0.5");
        ASSERT_STR(qie_weights_metadata(w, "a.numbers"), "[16,-24,3]");
        const qie_meta_array *a = qie_weights_array(w, "a.strings");
        ASSERT(a && a->n == 2);
        const unsigned char *at = a->data;
        size_t n;
        const char *s = qie_gguf_next_string(a, &at, &n);
        ASSERT(n == 3 && !memcmp(s, "one", 3));
        s = qie_gguf_next_string(a, &at, &n);
        ASSERT(n == 9 && !memcmp(s, "two words", 9));
        ASSERT(!qie_gguf_next_string(a, &at, &n));
        ASSERT_STR(qie_weights_format(w), "gguf");
        qie_weights_close(w);
    }
}

static void refused(qie_status want, const char *part) {
    qie_weights *w = NULL;
    qie_status st = qie_weights_open_bytes(g.data, g.n, "x.gguf", &w, &err);
    if (st == QIE_OK)
        qie_weights_close(w);
    ASSERT_INT(st, want);
    if (!strstr(err.message, part))
        QTEST_FAIL("'%s' does not say '%s'", err.message, part);
}

QTEST(test_gguf_faults_are_refused_by_name) {
    gguf_example(&g, 1);
    refused(QIE_E_UNSUPPORTED, "version 1");
    gguf_example(&g, 4);
    refused(QIE_E_UNSUPPORTED, "version 4");
    gguf_example(&g, 3u << 24);
    refused(QIE_E_UNSUPPORTED, "big-endian");
    gguf_start(&g, 3, UINT64_MAX, 0);
    refused(QIE_E_CORRUPT, "tensors and");
    gguf_start(&g, 3, 0, UINT64_MAX / 2);
    refused(QIE_E_CORRUPT, "tensors and");
    gguf_example(&g, 3);
    g.n -= 1;
    refused(QIE_E_CORRUPT, "behind the end");
    gguf_start(&g, 3, 1, 0);
    gguf_tensor(&g, "w", 2, UINT64_C(1) << 40, UINT64_C(1) << 40, 0, 0);
    refused(QIE_E_CORRUPT, "overflows");
    gguf_start(&g, 3, 1, 0);
    gguf_tensor(&g, "w", 2, 33, 1, 8, 0);
    gguf_pad(&g, 32), g.n += 64;
    refused(QIE_E_CORRUPT, "whole blocks");
    gguf_start(&g, 3, 2, 0);
    gguf_tensor(&g, "w", 1, 8, 0, 0, 0), gguf_tensor(&g, "v", 1, 8, 0, 0, 0);
    gguf_pad(&g, 32), g.n += 64;
    refused(QIE_E_CORRUPT, "overlaps");
    gguf_start(&g, 3, 2, 0);
    gguf_tensor(&g, "w", 1, 8, 0, 0, 0), gguf_tensor(&g, "w", 1, 8, 0, 0, 32);
    gguf_pad(&g, 32), g.n += 64;
    refused(QIE_E_CORRUPT, "two tensors");
    gguf_start(&g, 3, 1, 0);
    gguf_tensor(&g, "w", 1, 8, 0, 0, 4);
    gguf_pad(&g, 32), g.n += 64;
    refused(QIE_E_CORRUPT, "aligned");
    gguf_start(&g, 3, 1, 0);
    gguf_tensor(&g, "w", 9, 1, 1, 0, 0);
    refused(QIE_E_CORRUPT, "9 dimensions");
    gguf_start(&g, 3, 0, 1);
    gguf_pair_u32(&g, "general.alignment", 12);
    refused(QIE_E_CORRUPT, "alignment");
    gguf_start(&g, 3, 0, 2);
    gguf_pair_u32(&g, "k", 1), gguf_pair_u32(&g, "k", 2);
    refused(QIE_E_CORRUPT, "two values");
    gguf_start(&g, 3, 0, 1);
    gguf_text(&g, "k"), gguf_u32(&g, 77), gguf_u64(&g, 0);
    refused(QIE_E_CORRUPT, "unknown type");
    gguf_start(&g, 3, 0, 1);
    gguf_text(&g, "k"), gguf_u32(&g, 9);
    for (int i = 0; i < 6; i++)
        gguf_u32(&g, 9), gguf_u64(&g, 1);
    refused(QIE_E_CORRUPT, "nested");
    gguf_start(&g, 3, 0, 1);
    gguf_text(&g, "k"), gguf_u32(&g, 9), gguf_u32(&g, 8), gguf_u64(&g, UINT64_C(1) << 60);
    refused(QIE_E_CORRUPT, "elements");
}

QTEST(test_names_of_other_programs_are_known) {
    static const struct {
        qie_part part;
        const char *from, *to;
        qie_name_kind kind;
    } CASES[] = {
        {0, "model.diffusion_model.img_in.weight", "img_in.weight", QIE_NAME_TENSOR},
        {0, "diffusion_model.img_in.scale_weight", "img_in.weight", QIE_NAME_SCALE},
        {0, "img_in.weight_scale", "img_in.weight", QIE_NAME_SCALE},
        {0, "img_in.scale_input", "", QIE_NAME_MARKER},
        {0, "model.diffusion_model.scaled_fp8", "", QIE_NAME_MARKER},
        {0, "vae.decoder.conv1.weight", "", QIE_NAME_OTHER},
        {1, "model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight",
         QIE_NAME_TENSOR},
        {1, "model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight", QIE_NAME_TENSOR},
        {1, "text_encoders.qwen25_7b.transformer.model.norm.weight", "model.norm.weight",
         QIE_NAME_TENSOR},
        {1, "blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias", QIE_NAME_TENSOR},
        {1, "blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight", QIE_NAME_TENSOR},
        {1, "token_embd.weight", "model.embed_tokens.weight", QIE_NAME_TENSOR},
        {1, "output.weight", "lm_head.weight", QIE_NAME_TENSOR},
        {1, "output_norm.weight", "model.norm.weight", QIE_NAME_TENSOR},
        {1, "v.blk.7.attn_k.weight", "visual.blocks.7.attn.k.weight", QIE_NAME_TENSOR},
        {1, "v.blk.7.attn_out.bias", "visual.blocks.7.attn.proj.bias", QIE_NAME_TENSOR},
        {1, "mm.2.bias", "visual.merger.mlp.2.bias", QIE_NAME_TENSOR},
        {1, "v.patch_embd.weight.1", "visual.patch_embed.proj.weight.1", QIE_NAME_TENSOR},
        {2, "conv1.weight", "quant_conv.weight", QIE_NAME_TENSOR},
        {2, "encoder.downsamples.4.residual.3.gamma", "encoder.down_blocks.4.norm2.gamma",
         QIE_NAME_TENSOR},
        {2, "encoder.downsamples.2.resample.1.bias", "encoder.down_blocks.2.resample.1.bias",
         QIE_NAME_TENSOR},
        {2, "decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight",
         QIE_NAME_TENSOR},
        {2, "vae.decoder.upsamples.7.resample.1.weight",
         "decoder.up_blocks.1.upsamplers.0.resample.1.weight", QIE_NAME_TENSOR},
        {2, "decoder.upsamples.4.shortcut.weight",
         "decoder.up_blocks.1.resnets.0.conv_shortcut.weight", QIE_NAME_TENSOR},
        {2, "decoder.head.2.weight", "decoder.conv_out.weight", QIE_NAME_TENSOR},
    };
    char out[QIE_NAME_BYTES];
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        ASSERT_INT(qie_name_map(CASES[i].part, CASES[i].from, 4, out), CASES[i].kind);
        ASSERT_STR(out, CASES[i].to);
    }
    ASSERT_INT(qie_name_up_period("decoder.upsamples.3.resample.1.weight"), 4);
    ASSERT_INT(qie_name_up_period("decoder.upsamples.3.residual.0.gamma"), 0);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
