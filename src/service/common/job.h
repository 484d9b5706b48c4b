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
#define SVC_MAX_LORAS 8
#define SVC_LORA_NAME 128 /* bytes with the NUL */
#define SVC_LORA_ENDING ".safetensors"

/* A LoRA by the name of its file in the service's folder, without the ending. */
typedef struct svc_lora {
    char name[SVC_LORA_NAME];
    double weight;
} svc_lora;

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
    int32_t cache;   /* qie_cache; -1: the service's */
    int32_t n_loras; /* 0: none; -1: those that the service was started with */
    svc_lora loras[SVC_MAX_LORAS];
} svc_params;

svc_params svc_params_default(void);
/* New object. */
qie_json *svc_params_to_json(const svc_params *p);
/* What svc_params_to_json wrote. Errors: QIE_E_CORRUPT. */
qie_status svc_params_from_json(const qie_json *o, svc_params *p, qie_error *err);

/* May a file of the folder be called so? One part of a path, not hidden, UTF-8 without control
 * characters, short enough. */
bool svc_lora_name_is_valid(const char *name);
/* New string "dir/name.safetensors"; NULL: no memory, or no valid name. */
char *svc_lora_path(const char *dir, const char *name);

/* "image/png" ... */
const char *svc_format_mime(int format);

#endif
