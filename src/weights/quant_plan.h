/* What a conversion makes of one part of a model: the type of every tensor, and the file's layout.
 *
 * The rule (docs/FORMATS.md has the lists): vectors stay as they are; so do the layers at the edges
 * of the network, which are small and whose error goes everywhere; modulation and the vision tower
 * get 8 bits; all other matrices get the type that was asked for. Rows that are no whole blocks of
 * that type get Q8_0, or stay. */
#ifndef QIE_WEIGHTS_QUANT_PLAN_H
#define QIE_WEIGHTS_QUANT_PLAN_H

#include "weights/file_layout.h"

/* A kind as people name it: "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "int8", "fp8". */
typedef struct qie_quant_kind {
    const char *name;
    qie_dtype dtype;
    qie_file_format format;
    uint32_t file_type; /* general.file_type of GGUF */
} qie_quant_kind;
/* NULL for another name. */
const qie_quant_kind *qie_quant_kind_find(const char *name);

typedef struct qie_quant_choice {
    const qie_quant_kind *kind;
    /* Patterns of tensor names ("*" for any text): kept as they are; behind a "!" converted
     * although the rule keeps them. The last one that fits decides. used[i] is set when pattern i
     * met a matrix. */
    const char *const *keep;
    bool *used;
    size_t n_keep;
    const qie_weights *importance; /* F32 [columns] under the names of weights; NULL: none */
} qie_quant_choice;

enum { QIE_QUANT_NO_SCALE = -1 };

/* One step of the work: a tensor of the source, whole. */
typedef struct qie_quant_item {
    const qie_tensor *source; /* NULL: bytes of zero */
    size_t tensor;            /* its place among the file's tensors */
    int scale;                /* that of its scale, or QIE_QUANT_NO_SCALE */
    float *importance;        /* of its columns, owned; NULL: all the same */
} qie_quant_item;

typedef struct qie_quant_plan {
    qie_part part;
    const char *file; /* "transformer/diffusion_pytorch_model.gguf" */
    qie_layout layout;
    qie_layout_tensor *tensors;
    size_t n_tensors;
    qie_quant_item *items;
    size_t n_items;
    char **names; /* owned, of the scales */
    size_t n_names;
    int64_t source_bytes; /* that the items read */
    int64_t max_k;
    size_t n_converted, n_eight, n_kept, n_again, n_important; /* matrices; n_again: of a source
                                                     with fewer bits than bf16 */
} qie_quant_plan;

/* `w`: the open part; it must outlive the plan. `config`: text of its config.json, put into the
 * file's metadata; `zero_cond_t`: mark a transformer so for other programs. Release `out` in any
 * case. Errors: QIE_E_INVALID (the source has no more bits than the target; no matrix fits the
 * type; importance of another model), QIE_E_NO_MEMORY. */
qie_status qie_quant_plan_make(const qie_weights *w, qie_part part, const qie_quant_choice *choice,
                               const char *config, bool zero_cond_t, qie_quant_plan *out,
                               qie_error *err);
void qie_quant_plan_release(qie_quant_plan *p);

#endif
