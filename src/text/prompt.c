#include "text/prompt.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/strbuf.h"

/* diffusers pipeline_qwenimage_edit_plus.py: prompt_template_encode and
 * prompt_template_encode_start_idx. The 64 rows are the system prefix with the released vocabulary;
 * the pipeline drops 64 whatever the tokenizer. */
#define N_DROP 64
static const char PREFIX[] =
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), "
    "then explain how the user's text instruction should alter or modify the image. Generate a new "
    "image that meets the user's requirements while maintaining consistency with the original "
    "input "
    "where appropriate.<|im_end|>\n"
    "<|im_start|>user\n";
static const char SUFFIX[] = "<|im_end|>\n<|im_start|>assistant\n";

/* Ids of one request: far above the 4096 text positions that the transformer has. */
#define MAX_IDS ((size_t)1 << 28)

static qie_status check_placeholders(const char *prompt, size_t n, qie_error *err) {
    static const char *const PADS[] = {"<|image_pad|>", "<|video_pad|>"};
    for (size_t k = 0; k < 2; k++) {
        size_t len = strlen(PADS[k]);
        for (size_t i = 0; i + len <= n; i++)
            QIE_FAIL_IF(prompt[i] == '<' && !memcmp(prompt + i, PADS[k], len), QIE_E_INVALID, err,
                        "prompt", "the prompt contains %s, which stands for a picture: remove it",
                        PADS[k]);
    }
    return QIE_OK;
}

static qie_status check_tokens(const qie_tokenizer *t, int32_t *image_pad, qie_error *err) {
    static const char *const NEEDED[] = {"<|im_start|>", "<|im_end|>", "<|vision_start|>",
                                         "<|vision_end|>", "<|image_pad|>"};
    for (size_t i = 0; i < sizeof NEEDED / sizeof *NEEDED; i++) {
        *image_pad = qie_tokenizer_added_id(t, NEEDED[i]);
        QIE_FAIL_IF(*image_pad < 0, QIE_E_CORRUPT, err, "tokenizer",
                    "the tokenizer lacks the added token %s", NEEDED[i]);
    }
    return QIE_OK;
}

/* Repeat the k-th placeholder n_image_tokens[k] times; *ids is replaced. */
static qie_status expand(int32_t **ids, size_t *n_ids, size_t *parts, int32_t pad,
                         const int *n_image_tokens, size_t n_images, qie_error *err) {
    size_t pads = 0, total = *n_ids, k = 0, at = 0;
    for (size_t i = 0; i < *n_ids; i++)
        pads += (*ids)[i] == pad;
    QIE_FAIL_IF(pads != n_images, QIE_E_INTERNAL, err, NULL, "%zu placeholders for %zu pictures",
                pads, n_images);
    for (size_t i = 0; i < n_images; i++) {
        QIE_FAIL_IF(n_image_tokens[i] < 1, QIE_E_INTERNAL, err, NULL, "picture %zu has no tokens",
                    i + 1);
        total += (size_t)n_image_tokens[i] - 1;
        QIE_FAIL_IF(total > MAX_IDS, QIE_E_TOO_LARGE, err, "prompt",
                    "prompt and pictures have more than %zu tokens", MAX_IDS);
    }
    int32_t *out = malloc((total + 1) * sizeof *out);
    QIE_FAIL_IF(!out, QIE_E_NO_MEMORY, err, NULL, "no memory for %zu tokens", total);
    for (size_t i = 0; i < *n_ids; i++) {
        bool picture = (*ids)[i] == pad;
        int times = picture ? n_image_tokens[k++] : 1;
        if (picture && k == 1)
            parts[0] = at;
        while (times-- > 0)
            out[at++] = (*ids)[i];
        if (picture)
            parts[1] = at - parts[0];
    }
    free(*ids);
    *ids = out;
    *n_ids = at;
    return QIE_OK;
}

qie_status qie_prompt_check(const char *prompt, size_t n_bytes, qie_error *err) {
    QIE_FAIL_IF(!qie_utf8_valid(prompt, n_bytes), QIE_E_INVALID, err, "prompt",
                "the prompt is not valid UTF-8");
    return check_placeholders(prompt, n_bytes, err);
}

int64_t qie_prompt_most_rows(size_t n_bytes, const int *n_image_tokens, size_t n_images) {
    int64_t rows = (int64_t)(sizeof PREFIX + sizeof SUFFIX - 2) - N_DROP;
    for (size_t i = 0; i < n_images; i++)
        rows += (int64_t)strlen("Picture 16: <|vision_start|><|vision_end|>") + n_image_tokens[i];
    return rows + 3 * (int64_t)n_bytes; /* UAX #15, table "Maximum Expansion Factors" */
}

qie_status qie_prompt_build(const qie_tokenizer *t, const char *prompt, size_t n_bytes,
                            const int *n_image_tokens, size_t n_images, qie_prompt *out,
                            qie_error *err) {
    memset(out, 0, sizeof *out);
    QIE_TRY(qie_prompt_check(prompt, n_bytes, err));
    QIE_TRY(check_tokens(t, &out->image_pad_id, err));
    int32_t *ids = NULL, *alone = NULL;
    size_t n_ids = 0, n_alone = 0;
    qie_status st;
    qie_strbuf text;
    qie_strbuf_init(&text, SIZE_MAX / 4);
    /* One text, as in the reference: what the user types may then join only with what it joins
     * there. */
    qie_strbuf_puts(&text, PREFIX);
    for (size_t i = 0; i < n_images; i++)
        qie_strbuf_printf(&text, "Picture %zu: <|vision_start|><|image_pad|><|vision_end|>", i + 1);
    qie_strbuf_append(&text, prompt, n_bytes);
    qie_strbuf_puts(&text, SUFFIX);
    if (text.failed) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "no memory for the prompt");
        goto fail;
    }
    QIE_TRY_GOTO(qie_tokenizer_encode(t, text.data, text.len, true, &ids, &n_ids, err));
    QIE_TRY_GOTO(
        expand(&ids, &n_ids, out->parts, out->image_pad_id, n_image_tokens, n_images, err));
    QIE_TRY_GOTO(qie_tokenizer_encode(t, prompt, n_bytes, true, &alone, &n_alone, err));
    out->ids = ids;
    out->n_ids = n_ids;
    out->n_prompt = n_alone;
    out->n_drop = N_DROP;
    ids = NULL;
fail:
    qie_strbuf_release(&text);
    free(alone);
    free(ids);
    return st;
}

void qie_prompt_release(qie_prompt *p) {
    if (p)
        free(p->ids);
    if (p)
        memset(p, 0, sizeof *p);
}
