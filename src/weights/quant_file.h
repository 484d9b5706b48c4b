/* One file of a conversion: made at its full size under a name of its own, filled tensor by tensor.
 *
 * Of the source a block of rows is read at a time, so memory does not grow with the model. How far
 * it came is counted in whole items of the plan; a file whose first items are known to be on the
 * disk is gone on with. */
#ifndef QIE_WEIGHTS_QUANT_FILE_H
#define QIE_WEIGHTS_QUANT_FILE_H

#include "weights/quant_plan.h"

typedef struct qie_quant_file qie_quant_file;

/* Called as the work goes on; false stops it. `bytes`: of the source, since the file was opened;
 * `name`: of the tensor. */
typedef bool (*qie_quant_step_fn)(void *arg, int64_t bytes, const char *name);

/* Open `path` to go on behind the first n_done items (0: from the begin; whatever the file holds is
 * of no use then). The room on the disk is taken at once where the file system can. Errors:
 * QIE_E_IO (no room, not writable), QIE_E_NO_MEMORY. */
qie_status qie_quant_file_open(const char *path, const qie_quant_plan *plan, size_t n_done,
                               int n_threads, qie_quant_file **out, qie_error *err);
/* Convert item i; items are done in order. Errors: QIE_E_CORRUPT (a value that is not finite or too
 * large for the type; names tensor, file and row), QIE_E_IO, QIE_E_CANCELLED. */
qie_status qie_quant_file_item(qie_quant_file *f, const qie_weights *w, size_t i,
                               qie_quant_step_fn step, void *arg, qie_error *err);
/* Everything written so far is on the disk when this returns. */
qie_status qie_quant_file_sync(qie_quant_file *f, qie_error *err);
void qie_quant_file_close(qie_quant_file *f);

#endif
