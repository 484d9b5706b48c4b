/* Byte-level BPE tokenizer of Qwen2 with added tokens: text -> ids, equal to the `tokenizers`
 * library. */
#ifndef QIE_TEXT_TOKENIZER_H
#define QIE_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/files.h"
#include "qie/error.h"

typedef struct qie_tokenizer qie_tokenizer;

/* Load from `folder` ("processor", else "tokenizer") of a model: vocab.json + merges.txt (+
 * added_tokens.json, tokenizer_config.json's added_tokens_decoder), or tokenizer.json alone (new
 * style: model.vocab, model.merges as "a b" or ["a","b"], added_tokens). Errors: QIE_E_NOT_FOUND,
 * QIE_E_CORRUPT with the file's name. */
qie_status qie_tokenizer_open(qie_files *files, const char *folder, qie_tokenizer **out,
                              qie_error *err);
void qie_tokenizer_close(qie_tokenizer *t);

/* Id of an added token by its text ("<|image_pad|>"); -1 if there is none. */
int32_t qie_tokenizer_added_id(const qie_tokenizer *t, const char *content);
/* Largest id + 1. */
int32_t qie_tokenizer_vocab_size(const qie_tokenizer *t);

/* Tokenize n bytes of UTF-8 (NUL allowed). Added tokens in the text become their ids when
 * `with_added`, else they are ordinary text. *ids is new (free with free()), never NULL on success.
 * Errors: QIE_E_INVALID (not UTF-8), QIE_E_NO_MEMORY. */
qie_status qie_tokenizer_encode(const qie_tokenizer *t, const char *text, size_t n, bool with_added,
                                int32_t **ids, size_t *n_ids, qie_error *err);
/* First added token that occurs in the text (borrowed name), NULL if none. */
const char *qie_tokenizer_find_added(const qie_tokenizer *t, const char *text, size_t n);

#endif
