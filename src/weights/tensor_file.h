/* What a reader finds in one weight file, whatever its format: tensors as views into the file's
 * bytes, and metadata as text. */
#ifndef QIE_WEIGHTS_TENSOR_FILE_H
#define QIE_WEIGHTS_TENSOR_FILE_H

#include "base/fs.h"
#include "weights/weights.h"

/* An array among the metadata that is not worth a text: the vocabulary of a tokenizer. Its elements
 * were walked once and lie inside the file. */
typedef struct qie_meta_array {
    const char *key; /* owned */
    uint32_t type;   /* of an element: GGUF's number */
    uint64_t n;
    const unsigned char *data, *end;
} qie_meta_array;

typedef struct qie_tensor_file {
    /* In the order of the header; names owned, dtype QIE_DTYPE_COUNT if unknown. */
    qie_tensor *tensors;
    const char **dtypes; /* as in the header, owned */
    size_t n_tensors;
    const char **meta; /* key, value, key, value, ...; owned */
    size_t n_meta;     /* pairs */
    qie_meta_array *arrays;
    size_t n_arrays;
    const char *format; /* "safetensors" or "gguf" */
    char *label;        /* names the file in messages */
    qie_map map;        /* set by the caller when the object owns the mapping; else empty */
} qie_tensor_file;

/* Parse the header of a whole file in memory, of the format that its first bytes tell. `out` is
 * always initialised; release it in any case. Errors: QIE_E_CORRUPT naming `label`,
 * QIE_E_NO_MEMORY. */
qie_status qie_tensor_file_parse(const void *data, size_t n, const char *label,
                                 qie_tensor_file *out, qie_error *err);
void qie_tensor_file_release(qie_tensor_file *f);
/* Value of a key; NULL if absent. */
const char *qie_tensor_file_meta(const qie_tensor_file *f, const char *key);
const qie_meta_array *qie_tensor_file_array(const qie_tensor_file *f, const char *key);
/* The same over all files of w. */
const qie_meta_array *qie_weights_array(const qie_weights *w, const char *key);

#endif
