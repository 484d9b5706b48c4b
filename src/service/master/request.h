/* An edit as a client asked for it: fields of a JSON object or a form, checked against the
 * contract. */
#ifndef QIE_SERVICE_REQUEST_H
#define QIE_SERVICE_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/json.h"
#include "qie/error.h"
#include "service/common/job.h"

typedef enum svc_flavour {
    SVC_EDIT = 0, /* POST /edit, answered when done */
    SVC_JOB,      /* POST /v1/jobs */
    SVC_OPENAI    /* POST /v1/images/edits */
} svc_flavour;

typedef struct svc_source {
    uint8_t *own;         /* decoded base64 or fetched; owned */
    const uint8_t *bytes; /* own, or a view into the body */
    size_t n;
    char *url;                   /* still to be fetched; owned */
    char name[QIE_HASH_HEX_MAX]; /* in the store */
    bool stored;
} svc_source;

typedef struct svc_request {
    svc_flavour flavour;
    svc_params params;
    char *prompt, *negative, *idempotency_key, *output_path; /* owned */
    bool seed_named, as_path, as_url, stream;
    bool dry_run; /* answer with the plan: no job is made */
    int partial_images;
    int priority;
    svc_source pictures[SVC_MAX_PICTURES];
    size_t n_pictures;
} svc_request;

typedef struct svc_request_rules {
    size_t max_pictures;
    bool allow_url, has_output_dir;
    const char *lora_dir; /* of the LoRAs that may be named; NULL: none */
} svc_request_rules;

/* Errors: QIE_E_SYNTAX, QIE_E_INVALID (param), QIE_E_TOO_LARGE, QIE_E_UNSUPPORTED. Call
 * svc_request_release in any case. Views into the body stay. */
qie_status svc_request_parse(const svc_request_rules *rules, svc_flavour flavour,
                             const char *content_type, const char *body, size_t n, svc_request *out,
                             qie_error *err);
/* Formats and sizes of the pictures, from their headers. */
qie_status svc_request_check_pictures(const svc_request *r, int widths[], int heights[],
                                      qie_error *err);
void svc_request_release(svc_request *r);
/* Hash of what the request asks for, the same for JSON and form. Pictures must be in the store. */
void svc_request_fingerprint(const svc_request *r, char out[QIE_HASH_HEX_MAX]);

#endif
