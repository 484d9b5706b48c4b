/* Reading a tokenizer's files: vocabulary, merges and added tokens, in the old style (vocab.json,
 * merges.txt, added_tokens.json, tokenizer_config.json) and the new one (tokenizer.json). */
#ifndef QIE_TEXT_VOCAB_H
#define QIE_TEXT_VOCAB_H

#include "base/files.h"
#include "text/bpe.h"

typedef struct qie_added_token {
    char *content; /* owned, at least one byte */
    size_t n;
    int32_t id;
} qie_added_token;

typedef struct qie_vocab {
    qie_bpe bpe;
    qie_added_token *added; /* longest first, then by bytes */
    size_t n_added;
    int32_t max_id;
} qie_vocab;

/* Errors: QIE_E_NOT_FOUND, QIE_E_CORRUPT naming the file, QIE_E_NO_MEMORY. Release `out` in any
 * case. */
qie_status qie_vocab_load(qie_files *files, const char *folder, qie_vocab *out, qie_error *err);
void qie_vocab_release(qie_vocab *v);

#endif
