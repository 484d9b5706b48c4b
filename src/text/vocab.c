#define _GNU_SOURCE
#include "text/vocab.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/log.h"
#include "base/strbuf.h"
#include "text/jscan.h"

/* More tokens than any vocabulary has; bounds memory for a damaged file. */
#define MAX_TOKENS ((size_t)1 << 24)
#define MAX_ADDED 4096

/* Token text (bytes shown as GPT-2's printable characters, UTF-8) -> id. Needed only while merges
 * are read. */
typedef struct token {
    size_t at; /* in the pool */
    uint32_t n;
    int32_t id;
} token;

typedef struct loader {
    qie_files *files;
    const char *folder;
    qie_vocab *out;
    qie_error *err;
    char *pool;
    size_t n_pool, cap_pool;
    token *tokens;
    size_t n_tokens, cap_tokens;
    uint64_t *slots; /* high half of the hash, token + 1 below; 0 empty; power of two, at most two
                        thirds full */
    size_t n_slots;
    size_t hint; /* token expected next as the result of a merge */
} loader;

static qie_status no_memory(loader *l) {
    return qie_fail(l->err, QIE_E_NO_MEMORY, NULL, "no memory for the tokenizer");
}

/* -------------------------------------------------------------------------------------------------
 * tokens */

static uint64_t hash_bytes(uint64_t h, const char *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)p[i]) * 1099511628211u; /* FNV-1a */
    return h;
}
#define HASH_START 1469598103934665603u
#define NONE SIZE_MAX

static size_t token_of(uint64_t slot) {
    return (size_t)(uint32_t)slot - 1;
}

static bool is_token(const loader *l, size_t i, const char *a, size_t na, const char *b,
                     size_t nb) {
    const token *t = &l->tokens[i];
    return t->n == na + nb && !memcmp(l->pool + t->at, a, na) &&
           !memcmp(l->pool + t->at + na, b, nb);
}

/* Slot of the token a+b, its own or the empty one where it belongs. The hash bits in the slot spare
 * a look at the token, which would be two more cache misses. */
static size_t slot_of(const loader *l, const char *a, size_t na, const char *b, size_t nb,
                      uint32_t *tag) {
    uint64_t h = hash_bytes(hash_bytes(HASH_START, a, na), b, nb);
    *tag = (uint32_t)(h >> 32);
    for (size_t i = (size_t)(h ^ h >> 32) & (l->n_slots - 1);; i = (i + 1) & (l->n_slots - 1)) {
        if (!l->slots[i])
            return i;
        if ((uint32_t)(l->slots[i] >> 32) == *tag &&
            is_token(l, token_of(l->slots[i]), a, na, b, nb))
            return i;
    }
}

/* Token a+b, or NONE. */
static size_t find_token(const loader *l, const char *a, size_t na, const char *b, size_t nb) {
    uint32_t tag;
    uint64_t s = l->n_slots ? l->slots[slot_of(l, a, na, b, nb, &tag)] : 0;
    return s ? token_of(s) : NONE;
}

static int32_t id_of(const loader *l, const char *text, size_t n) {
    size_t t = find_token(l, text, n, "", 0);
    return t == NONE ? -1 : l->tokens[t].id;
}

/* Room for n tokens. */
static qie_status reserve(loader *l, size_t n) {
    if (n <= l->cap_tokens)
        return QIE_OK;
    size_t cap = l->cap_tokens + l->cap_tokens / 2 + 256, n_slots = 256;
    cap = n > cap ? n : cap;
    while (n_slots < cap + cap / 2)
        n_slots *= 2;
    token *t = cap <= MAX_TOKENS ? realloc(l->tokens, cap * sizeof *t) : NULL;
    if (!t)
        return no_memory(l);
    l->tokens = t;
    l->cap_tokens = cap;
    free(l->slots);
    l->slots = calloc(n_slots, sizeof *l->slots);
    l->n_slots = l->slots ? n_slots : 0;
    if (!l->slots)
        return no_memory(l);
    for (size_t i = 0; i < l->n_tokens; i++) {
        uint32_t tag;
        size_t s = slot_of(l, l->pool + l->tokens[i].at, l->tokens[i].n, "", 0, &tag);
        l->slots[s] = (uint64_t)tag << 32 | (i + 1);
    }
    return QIE_OK;
}

/* A token named twice keeps the later id, as in the reference. */
static qie_status add_token(loader *l, const char *text, size_t n, int32_t id) {
    QIE_TRY(reserve(l, l->n_tokens + 1));
    if (l->cap_pool - l->n_pool < n) {
        size_t cap = 2 * l->cap_pool + n + 65536;
        char *p = realloc(l->pool, cap);
        if (!p)
            return no_memory(l);
        l->pool = p;
        l->cap_pool = cap;
    }
    if (id > l->out->max_id)
        l->out->max_id = id;
    uint32_t tag;
    size_t s = slot_of(l, text, n, "", 0, &tag);
    if (l->slots[s]) {
        l->tokens[token_of(l->slots[s])].id = id;
        return QIE_OK;
    }
    if (n)
        memcpy(l->pool + l->n_pool, text, n);
    l->tokens[l->n_tokens] = (token){l->n_pool, (uint32_t)n, id};
    l->n_pool += n;
    l->slots[s] = (uint64_t)tag << 32 | ++l->n_tokens;
    return QIE_OK;
}

/* {"token": id, ...} */
static qie_status read_vocab(loader *l, qie_jscan *s) {
    bool first = true;
    /* The released file has 20.3 bytes an entry; growing on the way would hash everything again. */
    size_t expected = (size_t)(s->end - s->p) / 20;
    QIE_TRY(reserve(l, expected < MAX_TOKENS / 16 ? expected : MAX_TOKENS / 16));
    qie_jscan_enter(s, '{');
    while (qie_jscan_next(s, '}', &first)) {
        const char *text;
        size_t n;
        int32_t id;
        if (!qie_jscan_key(s, &text, &n) || !qie_jscan_int(s, &id))
            break;
        if (id < 0) {
            qie_jscan_fail(s, "negative token id");
            break;
        }
        QIE_TRY(add_token(l, text, n, id));
    }
    return s->st;
}

/* GPT-2's printable character of a byte: itself where Latin-1 has one to print, else 256 and up in
 * order. */
static size_t byte_char(unsigned byte, char out[4]) {
    unsigned c = byte, shift = 0;
    for (unsigned b = 0; b <= byte; b++)
        if (!((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)) {
            shift++;
            c = b == byte ? 255 + shift : c;
        }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xc0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3f));
    return 2;
}

static qie_status find_bytes(loader *l, const char *file) {
    for (unsigned b = 0; b < 256; b++) {
        char c[4];
        size_t n = byte_char(b, c);
        int32_t id = id_of(l, c, n);
        QIE_FAIL_IF(id < 0, QIE_E_CORRUPT, l->err, file,
                    "'%s' is damaged or no byte-level vocabulary: it lacks byte 0x%02x", file, b);
        l->out->bpe.byte_ids[b] = id;
    }
    return QIE_OK;
}

/* -------------------------------------------------------------------------------------------------
 * merges */

static qie_status add_merge(loader *l, const char *file, size_t rank, const char *a, size_t na,
                            const char *b, size_t nb) {
    int32_t left = id_of(l, a, na), right = id_of(l, b, nb), id = -1;
    /* Vocabularies list the results of merges in the order of the merges: try the next one before
     * the table. */
    size_t joined = l->hint < l->n_tokens && is_token(l, l->hint, a, na, b, nb)
                        ? l->hint
                        : find_token(l, a, na, b, nb);
    if (joined != NONE) {
        id = l->tokens[joined].id;
        l->hint = joined + 1;
    }
    if (left < 0 || right < 0 || id < 0) {
        bool show_left = left < 0 || right >= 0, show_right = left >= 0;
        return qie_fail(
            l->err, QIE_E_CORRUPT, file,
            "'%s' is damaged: merge %zu needs the token '%.*s%.*s', which the vocabulary "
            "lacks",
            file, rank + 1, show_left ? (int)(na < 200 ? na : 200) : 0, a,
            show_right ? (int)(nb < 200 ? nb : 200) : 0, b);
    }
    qie_bpe_add(&l->out->bpe, left, right, (int32_t)rank, id);
    return QIE_OK;
}

/* "left right", split at its only space. */
static qie_status add_merge_line(loader *l, const char *file, size_t rank, const char *p,
                                 size_t n) {
    const char *space = memchr(p, ' ', n);
    size_t na = space ? (size_t)(space - p) : 0, nb = space ? n - na - 1 : 0;
    QIE_FAIL_IF(!na || !nb || memchr(space + 1, ' ', nb), QIE_E_CORRUPT, l->err, file,
                "'%s' is damaged: merge %zu is not two tokens and a space", file, rank + 1);
    return add_merge(l, file, rank, p, na, space + 1, nb);
}

static qie_status check_merge_count(loader *l, const char *file, size_t n) {
    QIE_FAIL_IF(n > MAX_TOKENS, QIE_E_CORRUPT, l->err, file, "'%s' has too many merges", file);
    return qie_bpe_init(&l->out->bpe, n, l->err);
}

static qie_status read_merges_txt(loader *l, const char *file, const char *p, size_t n) {
    QIE_FAIL_IF(!qie_utf8_valid(p, n), QIE_E_CORRUPT, l->err, file,
                "'%s' is damaged: it is not UTF-8", file);
    size_t lines = 1, rank = 0;
    const char *end = p + n;
    for (const char *q = p; (q = memchr(q, '\n', (size_t)(end - q))); q++)
        lines++;
    QIE_TRY(check_merge_count(l, file, lines));
    while (p < end) {
        const char *nl = memchr(p, '\n', (size_t)(end - p)), *stop = nl ? nl : end;
        size_t len = (size_t)(stop - p);
        len -= len && p[len - 1] == '\r';
        if (len && (len < 8 || memcmp(p, "#version", 8)))
            QIE_TRY(add_merge_line(l, file, rank++, p, len));
        p = nl ? nl + 1 : end;
    }
    return QIE_OK;
}

/* One element of model.merges: "a b" or ["a", "b"]. */
static qie_status read_merge(loader *l, qie_jscan *s, size_t rank) {
    const char *a, *b;
    size_t na, nb;
    bool first = true;
    if (qie_jscan_peek(s) == '"') {
        if (!qie_jscan_string(s, &a, &na))
            return s->st;
        return add_merge_line(l, s->what, rank, a, na);
    }
    qie_jscan_enter(s, '[');
    if (!qie_jscan_next(s, ']', &first) || !qie_jscan_string(s, &a, &na)) {
        qie_jscan_fail(s, "a merge is not two tokens");
        return s->st;
    }
    /* The second string may reuse the buffer of the first: keep the vocabulary's own copy. */
    size_t t = find_token(l, a, na, "", 0);
    if (t == NONE)
        return add_merge(l, s->what, rank, a, na, "", 0);
    a = l->pool + l->tokens[t].at;
    if (!qie_jscan_next(s, ']', &first) || !qie_jscan_string(s, &b, &nb) ||
        qie_jscan_next(s, ']', &first))
        qie_jscan_fail(s, "a merge is not two tokens");
    return s->st != QIE_OK ? s->st : add_merge(l, s->what, rank, a, na, b, nb);
}

/* n: elements of the array, as counted before. */
static qie_status read_merges_json(loader *l, qie_jscan *s, size_t n) {
    bool first = true;
    QIE_TRY(check_merge_count(l, s->what, n));
    qie_jscan_enter(s, '[');
    for (size_t rank = 0; rank < n && qie_jscan_next(s, ']', &first); rank++)
        QIE_TRY(read_merge(l, s, rank));
    return s->st;
}

/* ------------------------------------------------------------------------------------------- added
 * tokens */

static qie_status add_added(loader *l, const char *file, const char *content, size_t n,
                            int32_t id) {
    qie_vocab *v = l->out;
    QIE_FAIL_IF(id < 0 || !n || memchr(content, 0, n), QIE_E_CORRUPT, l->err, file,
                "'%s' is damaged: added token without a text or an id", file);
    for (size_t i = 0; i < v->n_added; i++)
        if (v->added[i].n == n && !memcmp(v->added[i].content, content, n)) {
            QIE_FAIL_IF(v->added[i].id != id, QIE_E_CORRUPT, l->err, file,
                        "'%s' gives the added token '%.*s' the id %d, another file %d", file,
                        (int)(n < 200 ? n : 200), content, id, v->added[i].id);
            return QIE_OK;
        }
    QIE_FAIL_IF(v->n_added == MAX_ADDED, QIE_E_CORRUPT, l->err, file,
                "'%s' has more than %d added tokens", file, MAX_ADDED);
    if (!(v->n_added & (v->n_added - 1))) { /* grow at powers of two */
        qie_added_token *a = realloc(v->added, (2 * v->n_added + 1) * sizeof *a);
        if (!a)
            return no_memory(l);
        v->added = a;
    }
    char *copy = malloc(n + 1);
    if (!copy)
        return no_memory(l);
    memcpy(copy, content, n);
    copy[n] = 0;
    v->added[v->n_added++] = (qie_added_token){copy, n, id};
    if (id > v->max_id)
        v->max_id = id;
    return QIE_OK;
}

/* added_tokens.json: {"text": id, ...} */
static qie_status read_added_map(loader *l, qie_jscan *s) {
    bool first = true;
    qie_jscan_enter(s, '{');
    while (qie_jscan_next(s, '}', &first)) {
        const char *text;
        size_t n;
        int32_t id;
        if (!qie_jscan_key(s, &text, &n) || !qie_jscan_int(s, &id))
            break;
        QIE_TRY(add_added(l, s->what, text, n, id));
    }
    return s->st;
}

/* {"content": ..., "id": ..., "lstrip": ...}; id >= 0: given outside. Qwen's tokens have every flag
 * but "special" false; another value would split text differently here, so it is said. */
static qie_status read_added_object(loader *l, qie_jscan *s, int32_t id) {
    static const char *const FLAGS[] = {"lstrip", "rstrip", "single_word", "normalized"};
    char *content = NULL;
    size_t n_content = 0;
    bool first = true, odd = false;
    qie_status st = QIE_OK;
    qie_jscan_enter(s, '{');
    while (st == QIE_OK && qie_jscan_next(s, '}', &first)) {
        const char *key, *text;
        size_t n;
        bool flag = false;
        if (!qie_jscan_key(s, &key, &n))
            break;
        if (qie_jscan_is(key, n, "id"))
            qie_jscan_int(s, &id);
        else if (qie_jscan_is(key, n, "content")) {
            if (!qie_jscan_string(s, &text, &n))
                break;
            free(content);
            content = malloc(n + 1);
            if (content)
                memcpy(content, text, n);
            else
                st = no_memory(l);
            n_content = n;
        } else {
            bool is_flag = false;
            for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
                is_flag |= qie_jscan_is(key, n, FLAGS[i]);
            if (is_flag)
                qie_jscan_bool(s, &flag);
            else
                qie_jscan_skip(s);
            odd |= flag;
        }
    }
    if (st == QIE_OK)
        st = s->st;
    if (st == QIE_OK)
        st = add_added(l, s->what, content ? content : "", n_content, id);
    if (st == QIE_OK && odd)
        qie_log(QIE_LOG_WARN, "text", "'%s': added token %d has flags that are not supported",
                s->what, id);
    free(content);
    return st;
}

/* tokenizer_config.json: {"added_tokens_decoder": {"151643": {"content": ...}, ...}, ...} */
static qie_status read_config(loader *l, qie_jscan *s) {
    bool first = true;
    const char *key;
    size_t n;
    qie_jscan_enter(s, '{');
    while (qie_jscan_next(s, '}', &first) && qie_jscan_key(s, &key, &n)) {
        if (!qie_jscan_is(key, n, "added_tokens_decoder")) {
            qie_jscan_skip(s);
            continue;
        }
        bool first_token = true;
        qie_jscan_enter(s, '{');
        while (qie_jscan_next(s, '}', &first_token) && qie_jscan_key(s, &key, &n)) {
            int64_t id = n ? 0 : -1;
            for (size_t i = 0; i < n && id >= 0 && id <= INT32_MAX; i++)
                id = key[i] >= '0' && key[i] <= '9' ? 10 * id + (key[i] - '0') : -1;
            if (id < 0 || id > INT32_MAX) {
                qie_jscan_fail(s, "id of an added token is not a number");
                break;
            }
            QIE_TRY(read_added_object(l, s, (int32_t)id));
        }
    }
    return s->st;
}

/* ------------------------------------------------------------------------------------------
 * tokenizer.json */

/* Remember where values lie, since members come in any order: merges need the vocabulary. */
typedef struct parts {
    qie_jscan vocab, merges, added; /* p == NULL: absent */
    size_t n_merges;
    bool is_bpe, ignore_merges;
} parts;

/* Any value; elements of an array are counted. */
static void skip_counting(qie_jscan *s, size_t *n) {
    bool first = true;
    *n = 0;
    if (qie_jscan_peek(s) != '[') {
        qie_jscan_skip(s);
        return;
    }
    qie_jscan_enter(s, '[');
    while (qie_jscan_next(s, ']', &first) && qie_jscan_skip(s))
        ++*n;
}

static void find_parts(qie_jscan *s, bool in_model, parts *out) {
    bool first = true;
    const char *key, *text;
    size_t n;
    qie_jscan_enter(s, '{');
    while (qie_jscan_next(s, '}', &first) && qie_jscan_key(s, &key, &n)) {
        if (!in_model && qie_jscan_is(key, n, "model")) {
            find_parts(s, true, out);
            continue;
        }
        if (in_model && qie_jscan_is(key, n, "type") && qie_jscan_peek(s) == '"') {
            if (qie_jscan_string(s, &text, &n))
                out->is_bpe = qie_jscan_is(text, n, "BPE");
            continue;
        }
        if (in_model && qie_jscan_is(key, n, "ignore_merges")) {
            qie_jscan_bool(s, &out->ignore_merges);
            continue;
        }
        qie_jscan *part = in_model && qie_jscan_is(key, n, "vocab")           ? &out->vocab
                          : in_model && qie_jscan_is(key, n, "merges")        ? &out->merges
                          : !in_model && qie_jscan_is(key, n, "added_tokens") ? &out->added
                                                                              : NULL;
        qie_jscan_peek(s);
        if (part) {
            *part = *s;
            part->buf = NULL;
            part->cap = 0;
        }
        if (part && part == &out->merges)
            skip_counting(s, &out->n_merges);
        else
            qie_jscan_skip(s);
        if (part)
            part->end = s->p;
    }
}

static qie_status read_added_array(loader *l, qie_jscan *s) {
    bool first = true;
    qie_jscan_enter(s, '[');
    while (qie_jscan_next(s, ']', &first))
        QIE_TRY(read_added_object(l, s, -1));
    return s->st;
}

/* added_only: the vocabulary came from vocab.json. */
static qie_status read_tokenizer_json(loader *l, qie_jscan *s, bool added_only) {
    parts p = {.is_bpe = true};
    find_parts(s, false, &p);
    QIE_TRY(s->st);
    qie_status st = QIE_OK;
    if (!added_only) {
        QIE_FAIL_IF(!p.vocab.p || !p.merges.p, QIE_E_CORRUPT, l->err, s->what,
                    "'%s' has no model.vocab and model.merges", s->what);
        QIE_FAIL_IF(!p.is_bpe || p.ignore_merges, QIE_E_CORRUPT, l->err, s->what,
                    "'%s' is no tokenizer of Qwen2: its model is not plain BPE", s->what);
        QIE_TRY_GOTO(read_vocab(l, &p.vocab));
        QIE_TRY_GOTO(find_bytes(l, s->what));
        QIE_TRY_GOTO(read_merges_json(l, &p.merges, p.n_merges));
    }
    if (p.added.p)
        st = read_added_array(l, &p.added);
fail:
    qie_jscan_release(&p.vocab);
    qie_jscan_release(&p.merges);
    qie_jscan_release(&p.added);
    return st;
}

/* --------------------------------------------------------------------------------------------------
 * files */

typedef qie_status (*json_reader)(loader *l, qie_jscan *s);

static qie_status read_whole(loader *l, qie_jscan *s) {
    return read_tokenizer_json(l, s, false);
}
static qie_status read_added_of_whole(loader *l, qie_jscan *s) {
    return read_tokenizer_json(l, s, true);
}
static qie_status read_vocab_json(loader *l, qie_jscan *s) {
    QIE_TRY(read_vocab(l, s));
    return find_bytes(l, s->what);
}

static void file_name(const loader *l, const char *file, char out[512]) {
    snprintf(out, 512, "%s/%s", l->folder, file);
}

static bool has(const loader *l, const char *file) {
    char name[512];
    file_name(l, file, name);
    return qie_files_exists(l->files, name);
}

static qie_status read_json(loader *l, const char *file, json_reader read) {
    char name[512];
    const unsigned char *data;
    size_t n;
    qie_jscan s;
    file_name(l, file, name);
    QIE_TRY(qie_files_get(l->files, name, &data, &n, l->err));
    qie_status st = qie_jscan_init(&s, data, n, name, l->err) ? read(l, &s) : s.st;
    if (st == QIE_OK && qie_jscan_peek(&s)) {
        qie_jscan_fail(&s, "text behind the end");
        st = s.st;
    }
    qie_jscan_release(&s);
    return st;
}

static qie_status read_merges_file(loader *l) {
    char name[512];
    const unsigned char *data;
    size_t n;
    file_name(l, "merges.txt", name);
    QIE_TRY(qie_files_get(l->files, name, &data, &n, l->err));
    return read_merges_txt(l, name, (const char *)data, n);
}

static int longer_first(const void *a, const void *b) {
    const qie_added_token *x = a, *y = b;
    if (x->n != y->n)
        return x->n > y->n ? -1 : 1;
    return strcmp(x->content, y->content);
}

static qie_status load(loader *l) {
    if (has(l, "vocab.json") && has(l, "merges.txt")) {
        QIE_TRY(read_json(l, "vocab.json", read_vocab_json));
        QIE_TRY(read_merges_file(l));
    } else if (has(l, "tokenizer.json"))
        QIE_TRY(read_json(l, "tokenizer.json", read_whole));
    else
        return qie_fail(l->err, QIE_E_NOT_FOUND, l->folder,
                        "no tokenizer in '%s/%s': neither vocab.json with merges.txt nor "
                        "tokenizer.json; fetch the model with `qwen-edit pull`",
                        qie_files_label(l->files), l->folder);
    if (has(l, "added_tokens.json"))
        QIE_TRY(read_json(l, "added_tokens.json", read_added_map));
    if (has(l, "tokenizer_config.json"))
        QIE_TRY(read_json(l, "tokenizer_config.json", read_config));
    /* Files written by newer versions name them only there. */
    if (!l->out->n_added && has(l, "tokenizer.json"))
        QIE_TRY(read_json(l, "tokenizer.json", read_added_of_whole));
    if (l->out->n_added)
        qsort(l->out->added, l->out->n_added, sizeof *l->out->added, longer_first);
    return QIE_OK;
}

qie_status qie_vocab_load(qie_files *files, const char *folder, qie_vocab *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    out->max_id = -1;
    loader l = {.files = files, .folder = folder, .out = out, .err = err};
    qie_status st = load(&l);
    free(l.pool);
    free(l.tokens);
    free(l.slots);
    return st;
}

void qie_vocab_release(qie_vocab *v) {
    for (size_t i = 0; i < v->n_added; i++)
        free(v->added[i].content);
    free(v->added);
    qie_bpe_release(&v->bpe);
    memset(v, 0, sizeof *v);
}
