/* The head of a weight file that is about to be written, and where each tensor's bytes go.
 *
 * Everything is known before the first weight is read: the file can be made at its full size and
 * filled in any order. What a layout says is what the readers of this folder (gguf.h,
 * safetensors.h) accept, and the packages `gguf` and `safetensors` of PyPI. */
#ifndef QIE_WEIGHTS_FILE_LAYOUT_H
#define QIE_WEIGHTS_FILE_LAYOUT_H

#include "weights/weights.h"

typedef enum qie_file_format { QIE_FORMAT_SAFETENSORS = 0, QIE_FORMAT_GGUF } qie_file_format;

/* A pair of the metadata: text, or a number of 32 bits where the format has numbers. */
typedef struct qie_meta_pair {
    const char *key, *text; /* text NULL: `number` counts */
    uint32_t number;
} qie_meta_pair;

typedef struct qie_layout_tensor {
    const char *name;
    qie_dtype dtype;
    int n_dims;
    int64_t shape[QIE_MAX_DIMS];
    int64_t offset, n_bytes; /* set by qie_layout_make: from the file's begin */
} qie_layout_tensor;

typedef struct qie_layout {
    unsigned char *head; /* owned */
    size_t n_head;       /* bytes up to the first tensor, padding included */
    int64_t n_file;      /* bytes of the whole file */
} qie_layout;

/* Lay out n tensors in the order given. GGUF: shapes of more than 4 dimensions are written as
 * [first, product of the rest] beside comfy.gguf.orig_shape.NAME, the bytes between tensors are
 * zero. safetensors: tensors of larger elements come first in the file, so that each is aligned to
 * its element. Release `out` in any case. Errors: QIE_E_INVALID (a type the format does not have,
 * rows that are no whole blocks, sizes that overflow), QIE_E_NO_MEMORY. */
qie_status qie_layout_make(qie_file_format format, qie_layout_tensor *tensors, size_t n,
                           const qie_meta_pair *meta, size_t n_meta, qie_layout *out,
                           qie_error *err);
void qie_layout_release(qie_layout *l);

#endif
