/* One GGUF file, version 2 or 3, little-endian: key/value pairs, a table of tensors, aligned data.
 *
 * Guarantees after a parse: every length and count was checked against the bytes that are there,
 * every tensor lies inside the data at an aligned offset, shape and type give its bytes, no two
 * tensors overlap, names and keys are unique. Dimensions are turned round: the last one is the
 * fastest, as everywhere in this program; comfy.gguf.orig_shape.NAME, if present, is the shape.
 * Nothing is copied but names and short metadata. */
#ifndef QIE_WEIGHTS_GGUF_H
#define QIE_WEIGHTS_GGUF_H

#include "weights/tensor_file.h"

/* Types of values. */
enum {
    QIE_GGUF_U8 = 0,
    QIE_GGUF_I8,
    QIE_GGUF_U16,
    QIE_GGUF_I16,
    QIE_GGUF_U32,
    QIE_GGUF_I32,
    QIE_GGUF_F32,
    QIE_GGUF_BOOL,
    QIE_GGUF_STRING,
    QIE_GGUF_ARRAY,
    QIE_GGUF_U64,
    QIE_GGUF_I64,
    QIE_GGUF_F64,
    QIE_GGUF_TYPES
};

/* Scalars become text ("true", "128", "1e-06"), arrays of up to 64 numbers a JSON list; other
 * arrays are kept as views. Errors: QIE_E_CORRUPT and QIE_E_UNSUPPORTED (version, byte order)
 * naming `label`, QIE_E_NO_MEMORY. */
qie_status qie_gguf_parse(const void *data, size_t n, const char *label, qie_tensor_file *out,
                          qie_error *err);
/* Next string of an array of strings; *at starts at array->data. NULL when there is no other. */
const char *qie_gguf_next_string(const qie_meta_array *array, const unsigned char **at, size_t *n);
/* GGUF's number of a type; -1 if the format has none. */
int qie_gguf_type_of(qie_dtype dtype);

#endif
