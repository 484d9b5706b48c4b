/* One safetensors file: 8 bytes of little-endian header length, a JSON header, raw data.
 *
 * Guarantees after a parse: every tensor lies inside the data, shape x element size equals its
 * bytes, the tensors cover the data without overlap or gap, names are unique. These are the rules
 * of the reference reader, so a file refused here is refused by diffusers too. Nothing is copied
 * but names and metadata. */
#ifndef QIE_WEIGHTS_SAFETENSORS_H
#define QIE_WEIGHTS_SAFETENSORS_H

#include "base/fs.h"
#include "weights/weights.h"

/* Longest header accepted; the reference reader's limit. */
#define QIE_SAFETENSORS_MAX_HEADER 100000000u

typedef struct qie_safetensors {
    qie_tensor
        *tensors; /* in the order of the header; names owned, dtype QIE_DTYPE_COUNT if unknown */
    const char **dtypes; /* as in the header, owned */
    size_t n_tensors;
    const char **meta; /* key, value, key, value, ...; owned */
    size_t n_meta;     /* pairs */
    char *label;       /* names the file in messages */
    qie_map map;       /* set by the caller when the object owns the mapping; else empty */
} qie_safetensors;

/* Parse the header of a whole file in memory. `out` is always initialised; release it in any case.
 * Errors: QIE_E_CORRUPT naming `label`, QIE_E_NO_MEMORY. */
qie_status qie_safetensors_parse(const void *data, size_t n, const char *label,
                                 qie_safetensors *out, qie_error *err);
void qie_safetensors_release(qie_safetensors *s);

#endif
