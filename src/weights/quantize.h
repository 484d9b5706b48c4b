/* A model folder in another type: transformer and text encoder converted, the rest copied.
 *
 * Guarantees: memory does not grow with the model; whatever ends the process, the same call goes on
 * where it was and the result has the same bytes as an undisturbed one; a file has its final name
 * only when it is complete, and the folder is a model (model_index.json) only when all files are.
 * How far it came stands in OUT/quantization.json, which stays as the record of the result. */
#ifndef QIE_WEIGHTS_QUANTIZE_H
#define QIE_WEIGHTS_QUANTIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

#define QIE_QUANT_RECORD "quantization.json"

typedef struct qie_quantize_progress {
    const char *stage;         /* "copy", "transformer", "text_encoder", "hash" */
    const char *tensor;        /* in work; "" if none */
    int64_t bytes, bytes_done; /* of the source, this call's work and what was done before */
    double bytes_per_s;        /* of this call */
    double seconds_left;       /* < 0: not known yet */
} qie_quantize_progress;

typedef struct qie_quantize_options {
    const char *in, *out;
    const char *to;    /* a name of qie_quant_kind_find */
    char *const *keep; /* patterns: quant_plan.h */
    size_t n_keep;
    const char *importance;  /* file of qie_engine_save_importance; NULL: none */
    int n_threads;           /* 0: all cores */
    bool (*stop)(void *arg); /* may be NULL; so the next two */
    void (*progress)(void *arg, const qie_quantize_progress *p);
    void (*warn)(void *arg, const char *text);
    void *arg;
} qie_quantize_options;

typedef struct qie_quantize_result {
    int64_t bytes_in, bytes_out;         /* of the two parts */
    size_t n_converted, n_eight, n_kept; /* matrices: to the type, to 8 bits, as they were */
    bool resumed, was_complete;
    double seconds;
} qie_quantize_result;

/* Errors: QIE_E_INVALID (type, pattern, a source that has no more bits), QIE_E_CONFLICT (OUT holds
 * something else, or lies in IN), QIE_E_BUSY (another process works on OUT), QIE_E_NOT_FOUND,
 * QIE_E_CORRUPT (IN), QIE_E_IO (no room, not writable), QIE_E_CANCELLED. */
qie_status qie_quantize(const qie_quantize_options *o, qie_quantize_result *out, qie_error *err);

#endif
