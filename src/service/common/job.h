/* One edit as the service hands it around: plain numbers in a struct, and the same as JSON for the
 * queue's file. Texts and pictures travel beside it. */
#ifndef QIE_SERVICE_JOB_H
#define QIE_SERVICE_JOB_H

#include <stdbool.h>
#include <stdint.h>

#include "base/json.h"
#include "qie/error.h"
#include "qie/image.h"

#define SVC_MAX_PICTURES 16
#define SVC_MAX_RESULTS 10
#define SVC_MAX_PROMPT_CHARS 32000
#define SVC_MAX_SEED 9007199254740991 /* 2^53 - 1: exact in a JSON number */
#define SVC_ID_BYTES 40

/* Zeroes and negative numbers mean "the model's default", as in qie_edit_options. */
typedef struct svc_params {
    uint64_t seed;
    int32_t num_inference_steps; /* 0: default */
    int32_t max_side;            /* 0: default; -1: none */
    int32_t width, height;       /* 0: by rule */
    int32_t ref_area;            /* 0: by rule */
    int32_t keep_size;           /* 0, 1; -1: default */
    int32_t num_images;          /* 1..10 */
    int32_t format;              /* qie_image_format of the result */
    int32_t compression;         /* -1: default; PNG 0..9 from 0..100, else quality */
    int32_t preview_px;          /* 0: no previews */
    int32_t force_seed;          /* 1: keep a seed that an input was made with */
    int32_t no_metadata;         /* 1: no parameters in the result */
    double true_cfg_scale;       /* < 0: default */
    double guidance_scale;
} svc_params;

svc_params svc_params_default(void);
/* New object. */
qie_json *svc_params_to_json(const svc_params *p);
/* What svc_params_to_json wrote. Errors: QIE_E_CORRUPT. */
qie_status svc_params_from_json(const qie_json *o, svc_params *p, qie_error *err);

/* "image/png" ... */
const char *svc_format_mime(int format);

#endif
