/* The edit template around a prompt, as ids: what QwenImageEditPlusPipeline feeds to the text
 * encoder. */
#ifndef QIE_TEXT_PROMPT_H
#define QIE_TEXT_PROMPT_H

#include "text/tokenizer.h"

/* What all prompts begin with: the template before the first picture; then, with the same pictures,
 * up to the end of the last one. */
#define QIE_PROMPT_PARTS 2

typedef struct qie_prompt {
    int32_t *ids; /* owned; with each <|image_pad|> repeated n_image_tokens[i] times */
    size_t n_ids;
    size_t parts[QIE_PROMPT_PARTS]; /* tokens of each */
    size_t n_drop;   /* 64: rows of the system prefix to drop after the language model */
    size_t n_prompt; /* tokens of the user's text alone */
    int32_t image_pad_id;
} qie_prompt;

/* Build ids for N pictures with n_image_tokens[i] language-model tokens each. The fixed parts keep
 * their added tokens. In the user's text added tokens are live as in the reference, except
 * <|image_pad|> and
 * <|video_pad|>, which would break the count of pictures: refused with QIE_E_INVALID, param
 * "prompt". Errors: QIE_E_INVALID (not UTF-8, placeholder), QIE_E_CORRUPT (tokenizer lacks a token
 * of the template). */
qie_status qie_prompt_build(const qie_tokenizer *t, const char *prompt, size_t n_bytes,
                            const int *n_image_tokens, size_t n_images, qie_prompt *out,
                            qie_error *err);
/* Rows of conditioning that no prompt of n_bytes exceeds, whatever the tokenizer: each token stands
 * for a byte at least, and normalisation makes at most three of one. For a decision without one. */
int64_t qie_prompt_most_rows(size_t n_bytes, const int *n_image_tokens, size_t n_images);
/* The refusals that need no tokenizer: not UTF-8, a picture's placeholder. Errors: QIE_E_INVALID,
 * param "prompt". */
qie_status qie_prompt_check(const char *prompt, size_t n_bytes, qie_error *err);
void qie_prompt_release(qie_prompt *p);

#endif
