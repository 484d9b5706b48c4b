/* Tensors of one component of a model, as views into its mapped safetensors or GGUF files.
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
    /* Of quantised weights: value = stored value x scale, one for all (n_scale 1) or one a row;
     * NULL: none. Lives as long as the weights. */
    const float *scale;
    int64_t n_scale;
} qie_tensor;

/* The parts of a model that have weights. */
typedef enum qie_part {
    QIE_PART_TRANSFORMER = 0,
    QIE_PART_TEXT_ENCODER,
    QIE_PART_VAE,
    QIE_PART_COUNT
} qie_part;
/* Its folder in a model: "transformer", "text_encoder", "vae". */
const char *qie_part_name(qie_part part);

typedef struct qie_weights qie_weights;

/* Open the component in `folder` ("transformer", "vae", "text_encoder") of a model: the index
 * (*.safetensors.index.json) and all shards that it names, else the single *.safetensors or *.gguf
 * of its standard name (diffusion_pytorch_model or model; text_encoder/mmproj.gguf beside it).
 * Tensors have the names of the released model, whatever the files call them (names.h). Errors
 * name the file:
 * QIE_E_NOT_FOUND (no weights, a shard missing), QIE_E_CORRUPT (truncated, header damaged, offsets
 * outside or overlapping, index and shards disagree). */
qie_status qie_weights_open(qie_files *files, const char *folder, qie_weights **out,
                            qie_error *err);
/* The files of one part, mapped, under the names of the released model: one, or the language model
 * and its vision tower. What a file holds is told by its contents. Errors: QIE_E_CORRUPT also when
 * it holds another part or none; the message says what it is. */
qie_status qie_weights_open_part(const char *const *paths, size_t n, qie_part part,
                                 qie_weights **out, qie_error *err);
/* One file from memory (borrowed; must outlive the object), names as they are. `label` names it in
 * messages. */
qie_status qie_weights_open_bytes(const void *data, size_t n, const char *label, qie_weights **out,
                                  qie_error *err);
/* One file by path (mapped), names as they are. */
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
/* Weight of a linear layer or an embedding, [n, k] or with more dimensions of the same product, in
 * any type that the matrix operations read; else an error as above. */
qie_status qie_weights_need_linear(const qie_weights *w, const char *name, int64_t n, int64_t k,
                                   const qie_tensor **out, qie_error *err);
/* What the weights of a part are not as the config says: names missing, unknown, of another shape
 * or type; the first few of each and their number. Errors: QIE_E_CORRUPT with that list. */
struct qie_model_config;
qie_status qie_weights_check(const qie_weights *w, qie_part part,
                             const struct qie_model_config *config, qie_error *err);
/* What a file or several hold, told by names: bits. */
enum {
    QIE_HOLDS_TRANSFORMER = 1,
    QIE_HOLDS_LANGUAGE = 2, /* the two of the text encoder */
    QIE_HOLDS_VISION = 4,
    QIE_HOLDS_VAE = 8,
    QIE_HOLDS_LORA = 16
};
unsigned qie_weights_holds(const qie_weights *raw);
/* File that a tensor lies in, for messages. */
const char *qie_weights_file_of(const qie_weights *w, const qie_tensor *t);
/* "safetensors" or "gguf". */
const char *qie_weights_format(const qie_weights *w);
/* Value of a key in the files' metadata; NULL if absent. */
const char *qie_weights_metadata(const qie_weights *w, const char *key);
/* The i-th pair of the files' __metadata__, both borrowed; false behind the last one. */
bool qie_weights_metadata_at(const qie_weights *w, size_t i, const char **key, const char **value);
/* A tensor without use marks the file as a transformer with zero_cond_t. */
bool qie_weights_marked_zero_cond_t(const qie_weights *w);
/* Sum of tensor bytes and of elements. */
int64_t qie_weights_bytes(const qie_weights *w);
int64_t qie_weights_elements(const qie_weights *w);
/* Tell the kernel that these bytes of a mapped file will be read soon: it reads ahead while we
 * compute. A hint. */
void qie_weights_prefetch(const void *data, size_t n_bytes);
/* Tell it that they will not be for long: it may take their memory first, at once and without a
 * search. A hint, and one that only the owner of the file may give. */
void qie_weights_let_go(const void *data, size_t n_bytes);

#endif
