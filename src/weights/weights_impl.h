/* Inside of a qie_weights: for the files of this folder only. */
#ifndef QIE_WEIGHTS_WEIGHTS_IMPL_H
#define QIE_WEIGHTS_WEIGHTS_IMPL_H

#include "weights/tensor_file.h"

struct qie_weights {
    char *label; /* folder or file, for messages */
    qie_tensor_file *files;
    size_t n_files;
    qie_tensor *tensors; /* those that the index names, or all */
    uint32_t *file_of;   /* per tensor: index into files */
    uint32_t *in_file;   /* per tensor: index into that file's tensors */
    size_t n_tensors;
    uint32_t *slots; /* open addressing: tensor + 1, 0 empty */
    size_t n_slots;  /* power of two, at most half full */
    int64_t bytes, elements;
    bool marked_zero_cond_t;
    void **owned; /* names, scales and small tensors made while names were mapped */
    size_t n_owned, cap_owned;
};

/* Object without tensors; label is copied. */
qie_status qie_weights_create(const char *label, size_t n_files, qie_weights **out, qie_error *err);
/* Room for n tensors. */
qie_status qie_weights_reserve(qie_weights *w, size_t n, qie_error *err);
/* Append tensor i of a file under `name`, which must not be there yet. */
void qie_weights_add(qie_weights *w, const qie_tensor *t, size_t file, size_t i);
/* All tensors of all files, under the files' own names. Errors: QIE_E_CORRUPT (a name twice). */
qie_status qie_weights_take_all(qie_weights *w, qie_error *err);
/* Tensor of the name prefix + name, or NULL. */
const qie_tensor *qie_weights_lookup(const qie_weights *w, const char *prefix, const char *name);

/* Replace the tensors by those of one part under the names that this program knows them by: see
 * names.h. Scales go to their weights, fused tensors are cut, the halves of the patch embedding
 * joined. Errors: QIE_E_CORRUPT (two tensors of one name, a scale that does not fit). */
qie_status qie_weights_assemble(qie_weights *w, qie_part part, qie_error *err);

#endif
