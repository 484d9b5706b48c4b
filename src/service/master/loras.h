/* The folder of LoRAs that requests may name: what is in it, and the fields that name them. A file
 * NAME.safetensors directly in the folder is the LoRA NAME; a link counts as its file, since who
 * may write to the folder decides what is in it. Read anew each time: files may come and go while
 * the service runs. The matrices of a file are looked at in the worker. */
#ifndef QIE_SERVICE_LORAS_H
#define QIE_SERVICE_LORAS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "qie/error.h"
#include "service/common/job.h"

#define SVC_MAX_LORA_FILES 1000 /* listed; one behind them can be named all the same */

typedef struct svc_lora_file {
    char name[SVC_LORA_NAME];
    int64_t n_bytes;
} svc_lora_file;

typedef struct svc_lora_list {
    svc_lora_file *files; /* by name */
    size_t n;
} svc_lora_list;

/* Errors: QIE_E_IO, QIE_E_NO_MEMORY. Release in any case. */
qie_status svc_loras_read(const char *dir, svc_lora_list *out, qie_error *err);
void svc_loras_release(svc_lora_list *l);

/* "name" or "name:weight" (weight 1), also with the ending .safetensors: one more of p->loras.
 * Errors: QIE_E_INVALID, param "lora". */
qie_status svc_loras_add_text(svc_params *p, const char *text, size_t n, qie_error *err);
/* The same from JSON: a text, {"name", "weight"}, or an array of these; an empty one means none. */
qie_status svc_loras_add_json(svc_params *p, const qie_json *v, qie_error *err);
/* Every LoRA named is a file of the folder (dir NULL: there is none). Errors: QIE_E_INVALID, param
 * "lora", with the names that there are. */
qie_status svc_loras_check(const char *dir, const svc_params *p, qie_error *err);

/* What the files of the folder ask for, read once for each state of a file: a header of thousands
 * of tensors takes milliseconds. `dir` is borrowed. From any thread. Errors: QIE_E_NO_MEMORY. */
typedef struct svc_lora_presets svc_lora_presets;
qie_status svc_lora_presets_create(const char *dir, svc_lora_presets **out, qie_error *err);
void svc_lora_presets_destroy(svc_lora_presets *k);

/* [{"name", "bytes"}], and for a Lightning one the settings that it brings; an empty array when k
 * is NULL or its folder cannot be read. */
qie_json *svc_loras_json(svc_lora_presets *k);
/* Steps and guidance of an edit that names neither: those of the first Lightning LoRA of the
 * request (by metadata, name or shape, as the worker finds them), else the ones given. */
void svc_loras_defaults(svc_lora_presets *k, const svc_params *p, int *steps,
                        double *true_cfg_scale);

#endif
