/* What an edit tells about its weights: the mean square of every input of every linear layer of the
 * transformer and the text encoder, for `quantize`. */
#ifndef QIE_MODEL_IMPORTANCE_H
#define QIE_MODEL_IMPORTANCE_H

#include "compute/op_inputs.h"
#include "weights/weights.h"

/* Start collecting over all runs of c. *out lives until c is destroyed. Errors: QIE_E_NO_MEMORY. */
qie_status qie_importance_begin(qie_compute *c, const qie_weights *transformer,
                                const qie_weights *text_encoder, qie_op_inputs **out,
                                qie_error *err);
/* One safetensors file: of each layer that ran, F32 [columns] under the name of its weight. Errors:
 * QIE_E_CONFLICT (nothing ran), QIE_E_IO, QIE_E_NO_MEMORY. */
qie_status qie_importance_save(const qie_op_inputs *p, const char *path, qie_error *err);

#endif
