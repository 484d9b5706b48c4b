#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/strbuf.h"
#include "text/nfc.h"
#include "text/pretokenize.h"
#include "text/vocab.h"

struct qie_tokenizer {
    qie_vocab vocab;
    qie_pretokenizer *pre;
    bool starts_added[256]; /* some added token begins with this byte */
};

qie_status qie_tokenizer_open(qie_files *files, const char *folder, qie_tokenizer **out,
                              qie_error *err) {
    *out = NULL;
    qie_tokenizer *t = calloc(1, sizeof *t);
    QIE_FAIL_IF(!t, QIE_E_NO_MEMORY, err, NULL, "no memory for the tokenizer");
    qie_status st;
    QIE_TRY_GOTO(qie_vocab_load(files, folder, &t->vocab, err));
    QIE_TRY_GOTO(qie_pretokenizer_create(&t->pre, err));
    for (size_t i = 0; i < t->vocab.n_added; i++)
        t->starts_added[(unsigned char)t->vocab.added[i].content[0]] = true;
    *out = t;
    return QIE_OK;
fail:
    qie_tokenizer_close(t);
    return st;
}

void qie_tokenizer_close(qie_tokenizer *t) {
    if (!t)
        return;
    qie_vocab_release(&t->vocab);
    qie_pretokenizer_destroy(t->pre);
    free(t);
}

int32_t qie_tokenizer_added_id(const qie_tokenizer *t, const char *content) {
    for (size_t i = 0; i < t->vocab.n_added; i++)
        if (!strcmp(t->vocab.added[i].content, content))
            return t->vocab.added[i].id;
    return -1;
}

int32_t qie_tokenizer_vocab_size(const qie_tokenizer *t) {
    return t->vocab.max_id == INT32_MAX ? INT32_MAX : t->vocab.max_id + 1;
}

/* Leftmost added token from `at` on, the longest of those that start there; *begin is n if there is
 * none. */
static const qie_added_token *next_added(const qie_tokenizer *t, const char *text, size_t n,
                                         size_t at, size_t *begin) {
    for (size_t i = at; i < n; i++) {
        if (!t->starts_added[(unsigned char)text[i]])
            continue;
        for (size_t k = 0; k < t->vocab.n_added; k++) {
            const qie_added_token *a = &t->vocab.added[k];
            if (a->n <= n - i && !memcmp(text + i, a->content, a->n)) {
                *begin = i;
                return a;
            }
        }
    }
    *begin = n;
    return NULL;
}

const char *qie_tokenizer_find_added(const qie_tokenizer *t, const char *text, size_t n) {
    size_t begin;
    const qie_added_token *a = next_added(t, text, n, 0, &begin);
    return a ? a->content : NULL;
}

/* Ids of one call, and what makes them. */
typedef struct encoder {
    const qie_tokenizer *t;
    qie_pieces *pieces;
    qie_bpe_scratch scratch;
    int32_t *ids;
    size_t n, cap;
    qie_error *err;
} encoder;

static qie_status reserve(encoder *e, size_t more) {
    size_t cap, bytes;
    if (more <= e->cap - e->n)
        return QIE_OK;
    int32_t *ids = NULL;
    if (qie_add_size(e->n, more, &cap) && qie_add_size(cap, cap / 2 + 16, &cap) &&
        qie_mul_size(cap, sizeof *ids, &bytes))
        ids = realloc(e->ids, bytes);
    QIE_FAIL_IF(!ids, QIE_E_NO_MEMORY, e->err, NULL, "no memory to tokenize the text");
    e->ids = ids;
    e->cap = cap;
    return QIE_OK;
}

static qie_status encode_ordinary(encoder *e, const char *text, size_t n) {
    const char *norm;
    char *owned;
    size_t n_norm, end;
    qie_status st = QIE_OK;
    if (!n)
        return QIE_OK;
    QIE_TRY(qie_nfc(text, n, &norm, &n_norm, &owned, e->err));
    for (size_t at = 0; at < n_norm; at = end) {
        size_t n_ids;
        QIE_TRY_GOTO(qie_pieces_next(e->pieces, norm, n_norm, at, &end, e->err));
        QIE_TRY_GOTO(reserve(e, end - at));
        QIE_TRY_GOTO(qie_bpe_encode(&e->t->vocab.bpe, &e->scratch, norm + at, end - at,
                                    e->ids + e->n, &n_ids, e->err));
        e->n += n_ids;
    }
fail:
    free(owned);
    return st;
}

qie_status qie_tokenizer_encode(const qie_tokenizer *t, const char *text, size_t n, bool with_added,
                                int32_t **ids, size_t *n_ids, qie_error *err) {
    *ids = NULL;
    *n_ids = 0;
    QIE_FAIL_IF(!qie_utf8_valid(text, n), QIE_E_INVALID, err, "prompt",
                "the text is not valid UTF-8");
    encoder e = {.t = t, .err = err};
    qie_status st;
    QIE_TRY_GOTO(qie_pieces_create(t->pre, &e.pieces, err));
    QIE_TRY_GOTO(reserve(&e, n / 4 + 1));
    for (size_t at = 0; at < n;) {
        size_t begin = n;
        const qie_added_token *a = with_added ? next_added(t, text, n, at, &begin) : NULL;
        QIE_TRY_GOTO(encode_ordinary(&e, text + at, begin - at));
        at = begin;
        if (a) {
            QIE_TRY_GOTO(reserve(&e, 1));
            e.ids[e.n++] = a->id;
            at += a->n;
        }
    }
    *ids = e.ids;
    *n_ids = e.n;
    e.ids = NULL;
fail:
    qie_pieces_destroy(e.pieces);
    qie_bpe_scratch_release(&e.scratch);
    free(e.ids);
    return st;
}
