#include "text/pretokenize.h"

#include <stdlib.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/error.h"

struct qie_pretokenizer {
    pcre2_code *code;
};

struct qie_pieces {
    const pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *limits;
};

/* tokenizers 0.23 matches with Unicode 16 classes. PCRE2 10.42 has 14: letters and numbers encoded
 * since, named here so that every version from 14 to 16 gives the same pieces. */
#define LATER_LETTERS                                                                      \
    "\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}"       \
    "\\x{10d4a}-\\x{10d65}\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}" \
    "\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}"   \
    "\\x{113d3}\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}"  \
    "\\x{1342f}\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}"            \
    "\\x{16d40}-\\x{16d6c}\\x{18cff}\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}"             \
    "\\x{1e030}-\\x{1e06d}\\x{1e4d0}-\\x{1e4eb}\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}"  \
    "\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
#define LATER_NUMBERS                                                                      \
    "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}" \
    "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}" \
    "\\x{1e4f0}-\\x{1e4f9}\\x{1e5f1}-\\x{1e5fa}"
#define L "\\p{L}" LATER_LETTERS
#define N "\\p{N}" LATER_NUMBERS
/* The property White_Space; PCRE2's own \s has U+180E besides. */
#define S                                                                                        \
    "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}" \
    "\\x{3000}"

/* Qwen2's expression, as in its tokenizer.json: alternatives are tried in this order. */
static const char PATTERN[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
                              "|[^\\r\\n" L N "]?[" L "]+"
                              "|[" N "]"
                              "| ?[^" S L N "]+[\\r\\n]*"
                              "|[" S "]*[\\r\\n]+"
                              "|[" S "]+(?![^" S "])"
                              "|[" S "]+";
#undef L
#undef N
#undef S

/* No compilation to machine code: it costs more than the match of a long prompt, and tools that
 * watch memory cannot see through it. */
qie_status qie_pretokenizer_create(qie_pretokenizer **out, qie_error *err) {
    int code = 0;
    size_t at = 0;
    *out = calloc(1, sizeof **out);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    (*out)->code = pcre2_compile((PCRE2_SPTR)PATTERN, sizeof PATTERN - 1,
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, &code,
                                 &at, NULL);
    if ((*out)->code)
        return QIE_OK;
    free(*out);
    *out = NULL;
    return qie_fail(err, code == PCRE2_ERROR_HEAP_FAILED ? QIE_E_NO_MEMORY : QIE_E_INTERNAL, NULL,
                    "cannot compile the tokenizer's pattern: PCRE2 error %d at %zu", code, at);
}

void qie_pretokenizer_destroy(qie_pretokenizer *p) {
    if (!p)
        return;
    pcre2_code_free(p->code);
    free(p);
}

qie_status qie_pieces_create(const qie_pretokenizer *p, qie_pieces **out, qie_error *err) {
    qie_pieces *w = calloc(1, sizeof *w);
    *out = NULL;
    if (w) {
        w->code = p->code;
        w->match = pcre2_match_data_create(1, NULL);
        w->limits = pcre2_match_context_create(NULL);
    }
    if (!w || !w->match || !w->limits) {
        qie_pieces_destroy(w);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    /* One piece takes a handful of backtracking points; a run of white space as many as it is long.
     */
    pcre2_set_match_limit(w->limits, 1u << 31);
    pcre2_set_depth_limit(w->limits, 1000);
    *out = w;
    return QIE_OK;
}

void qie_pieces_destroy(qie_pieces *w) {
    if (!w)
        return;
    pcre2_match_data_free(w->match);
    pcre2_match_context_free(w->limits);
    free(w);
}

qie_status qie_pieces_next(qie_pieces *w, const char *text, size_t n, size_t at, size_t *end,
                           qie_error *err) {
    int rc = pcre2_match(w->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, w->match, w->limits);
    *end = rc < 0 ? 0 : pcre2_get_ovector_pointer(w->match)[1];
    if (rc >= 0 && *end > at)
        return QIE_OK;
    *end = n;
    return qie_fail(err, rc == PCRE2_ERROR_NOMEMORY ? QIE_E_NO_MEMORY : QIE_E_INTERNAL, NULL,
                    "cannot split the text into words: PCRE2 error %d at byte %zu", rc, at);
}
