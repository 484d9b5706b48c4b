/* One safetensors file: 8 bytes of little-endian header length, a JSON header, raw data.
 *
 * Guarantees after a parse: every tensor lies inside the data, shape x element size equals its
 * bytes, the tensors cover the data without overlap or gap, names are unique. These are the rules
 * of the reference reader, so a file refused here is refused by diffusers too. Nothing is copied
 * but names and metadata. */
#ifndef QIE_WEIGHTS_SAFETENSORS_H
#define QIE_WEIGHTS_SAFETENSORS_H

#include "weights/tensor_file.h"

/* Longest header accepted; the reference reader's limit. */
#define QIE_SAFETENSORS_MAX_HEADER 100000000u

/* Parse the header of a whole file in memory. `out` is always initialised; release it in any case
 * (qie_tensor_file_release).
 * Errors: QIE_E_CORRUPT naming `label`, QIE_E_NO_MEMORY. */
qie_status qie_safetensors_parse(const void *data, size_t n, const char *label,
                                 qie_tensor_file *out, qie_error *err);

#endif
