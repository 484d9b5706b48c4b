/* Opening GPUs for an engine: which cards, how much of them, and what of a model goes where. */
#ifndef QIE_MODEL_DEVICE_H
#define QIE_MODEL_DEVICE_H

#include "model/model.h"
#include "plan/assign.h"
#include "qie/edit.h"

/* What happened while an edit was placed, for people: of many lines the first ones. */
typedef struct qie_device_said {
    int n;
    char text[4][256];
} qie_device_said;

/* A compute on the GPUs that the options name, the model's weights announced to it (they are copied
 * when the first edit's memory is reserved). said: is added to from then on. Errors:
 * QIE_E_UNAVAILABLE (no driver, card or plugin), QIE_E_INVALID ("gpus"), QIE_E_UNSUPPORTED (plugin
 * of another version). */
qie_status qie_device_open(const qie_engine_options *o, qie_model *m, qie_device_said *said,
                           qie_compute **out, qie_error *err);

#endif
