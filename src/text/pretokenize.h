/* Split of a text into the pieces that BPE works on: Qwen2's regular expression. */
#ifndef QIE_TEXT_PRETOKENIZE_H
#define QIE_TEXT_PRETOKENIZE_H

#include <stddef.h>

#include "qie/error.h"

typedef struct qie_pretokenizer qie_pretokenizer; /* immutable, shared by threads */
typedef struct qie_pieces qie_pieces;             /* one walk over one text */

qie_status qie_pretokenizer_create(qie_pretokenizer **out, qie_error *err);
void qie_pretokenizer_destroy(qie_pretokenizer *p);

qie_status qie_pieces_create(const qie_pretokenizer *p, qie_pieces **out, qie_error *err);
void qie_pieces_destroy(qie_pieces *w);
/* End of the piece that starts at `at` < n of valid UTF-8 (not normalised here). Always beyond
 * `at`. Errors: QIE_E_NO_MEMORY, QIE_E_INTERNAL (a limit of the matcher). */
qie_status qie_pieces_next(qie_pieces *w, const char *text, size_t n, size_t at, size_t *end,
                           qie_error *err);

#endif
