/* Tensors of one component of a model, as views into its mapped safetensors files.
 *
 * Guarantees: every view lies inside its file, its byte count equals shape x element size, no two
 * tensors of a file overlap, and names are unique over the shards. Nothing is copied; pages are
 * read when touched. */
#ifndef QIE_WEIGHTS_WEIGHTS_H
#define QIE_WEIGHTS_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/files.h"
#include "qie/error.h"

#define QIE_MAX_DIMS 8

typedef struct qie_tensor {
    const char *name; /* as in the file */
    qie_dtype dtype;  /* QIE_DTYPE_COUNT: a type we do not read; only qie_weights_need refuses it */
    int n_dims;
    int64_t shape[QIE_MAX_DIMS];
    const void *data; /* little-endian, row-major; aligned to no more than the file gives */
    size_t n_bytes;
    int64_t n_elements;
} qie_tensor;

typedef struct qie_weights qie_weights;

/* Open the component in `folder` ("transformer", "vae", "text_encoder") of a model: the index
 * (*.safetensors.index.json) and all shards that it names, else the single *.safetensors of its
 * standard name (diffusion_pytorch_model.safetensors or model.safetensors). Errors name the file:
 * QIE_E_NOT_FOUND (no weights, a shard missing), QIE_E_CORRUPT (truncated, header damaged, offsets
 * outside or overlapping, index and shards disagree). */
qie_status qie_weights_open(qie_files *files, const char *folder, qie_weights **out,
                            qie_error *err);
/* One safetensors file from memory (borrowed; must outlive the object). `label` names it in
 * messages. */
qie_status qie_weights_open_bytes(const void *data, size_t n, const char *label, qie_weights **out,
                                  qie_error *err);
/* One safetensors file by path (mapped). */
qie_status qie_weights_open_file(const char *path, qie_weights **out, qie_error *err);
void qie_weights_close(qie_weights *w);

size_t qie_weights_count(const qie_weights *w);
const qie_tensor *qie_weights_at(const qie_weights *w, size_t i);
/* By name; NULL if absent. Both namings of the text encoder are found under the released one:
 * asking for "visual.X" or "model.X" also finds "model.visual.X" and "model.language_model.X". */
const qie_tensor *qie_weights_find(const qie_weights *w, const char *name);
/* By name with exactly this shape and a floating dtype (F32, BF16, F16); else an error that names
 * tensor, file, expected and found shape. Errors: QIE_E_CORRUPT. */
qie_status qie_weights_need(const qie_weights *w, const char *name, int n_dims,
                            const int64_t *shape, const qie_tensor **out, qie_error *err);
/* File that a tensor lies in, for messages. */
const char *qie_weights_file_of(const qie_weights *w, const qie_tensor *t);
/* Value of a key in the files' __metadata__; NULL if absent. */
const char *qie_weights_metadata(const qie_weights *w, const char *key);
/* The i-th pair of the files' __metadata__, both borrowed; false behind the last one. */
bool qie_weights_metadata_at(const qie_weights *w, size_t i, const char **key, const char **value);
/* Sum of tensor bytes and of elements. */
int64_t qie_weights_bytes(const qie_weights *w);
int64_t qie_weights_elements(const qie_weights *w);
/* Tell the kernel that these bytes of a mapped file will be read soon: it reads ahead while we
 * compute. A hint. */
void qie_weights_prefetch(const void *data, size_t n_bytes);

#endif
