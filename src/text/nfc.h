/* Unicode normalisation form C as the `tokenizers` library does it. */
#ifndef QIE_TEXT_NFC_H
#define QIE_TEXT_NFC_H

#include <stddef.h>

#include "qie/error.h"

/* Normalise n bytes of valid UTF-8. When nothing changes *out is `text` itself and *owned is NULL;
 * else both are a new buffer to free(). Time is O(n log n) whatever the text. Errors:
 * QIE_E_NO_MEMORY. */
qie_status qie_nfc(const char *text, size_t n, const char **out, size_t *n_out, char **owned,
                   qie_error *err);

#endif
