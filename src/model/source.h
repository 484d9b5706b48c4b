/* Where a model comes from: a folder, single files for its parts, or both.
 *
 * A file takes the place of the folder's weights of that part. Configs and the tokenizer come from
 * the folder; what it does not have is made from what the files say (shapes, metadata) and the
 * tables of the known models, and never guessed: whether a transformer takes zero_cond_t is in no
 * shape, so a file that does not say it needs a folder or a variant. */
#ifndef QIE_MODEL_SOURCE_H
#define QIE_MODEL_SOURCE_H

#include "base/files.h"
#include "weights/weights.h"

typedef struct qie_model_source {
    const char *model; /* folder or "demo"; NULL or "": files only */
    const char *transformer, *text_encoder, *mmproj, *vae; /* files; NULL: from the folder */
    const char *variant; /* name of a known model, see qie_variant_names; NULL: as the files say */
} qie_model_source;

/* "edit-2509, edit-2511, ..." for messages. */
const char *qie_variant_names(void);

/* Open the folder and the weights of the three parts, and put what is missing of the configs into
 * `files`. All outputs are NULL on failure. Errors: QIE_E_NOT_FOUND, QIE_E_CORRUPT (a file is
 * another part's or damaged), QIE_E_INVALID (variant unknown, needed, or against what the file
 * says). */
qie_status qie_model_source_open(const qie_model_source *source, qie_files **files,
                                 qie_weights *weights[QIE_PART_COUNT], qie_error *err);

#endif
