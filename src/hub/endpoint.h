/* Hubs: their addresses, what they answer, and how often a question is repeated.
 *
 * Two kinds speak here: the Hugging Face hub and its mirrors, and ModelScope. The settings that
 * huggingface_hub takes from the environment are read here too. */
#ifndef QIE_HUB_ENDPOINT_H
#define QIE_HUB_ENDPOINT_H

#include <stdbool.h>
#include <stddef.h>

#include "hub/http.h"
#include "hub/listing.h"
#include "qie/error.h"

#define QIE_HUB_ENDPOINTS_MAX 8
#define QIE_HUB_DEFAULT_ENDPOINT "https://huggingface.co"

typedef enum qie_hub_kind { QIE_HUB_HF = 0, QIE_HUB_MODELSCOPE } qie_hub_kind;

typedef struct qie_endpoint {
    char url[1024]; /* without a slash at the end */
    qie_hub_kind kind;
} qie_endpoint;

/* What the environment says about hubs. */
typedef struct qie_hub_settings {
    qie_endpoint endpoints[QIE_HUB_ENDPOINTS_MAX];
    size_t n_endpoints;
    char endpoint_origin[24]; /* "--endpoint", "HF_ENDPOINT", "default" */
    char token[1024];         /* "" for none; never printed */
    char token_origin[32];    /* "HF_TOKEN", "HF_TOKEN_PATH", "token file", "" */
    bool offline;
    const char *offline_origin; /* "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"; NULL */
    int stall_timeout_s;        /* HF_HUB_DOWNLOAD_TIMEOUT, else 30 */
    const char *ca_bundle;      /* file of certificates in place of the system's; NULL */
    const char *ca_origin;      /* "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"; NULL */
} qie_hub_settings;

/* `endpoints`: addresses given as flags (each may hold several, comma-separated), which win over
 * HF_ENDPOINT. An address is of ModelScope when its host name contains "modelscope" or it is
 * written modelscope:ADDRESS. Errors: QIE_E_INVALID (no address, bad number). */
qie_status qie_hub_settings_read(char *const *endpoints, size_t n, qie_hub_settings *out,
                                 qie_error *err);

/* Revision as this kind of hub calls it ("main" is "master" at ModelScope). */
const char *qie_hub_revision_for(qie_hub_kind kind, const char *revision);
/* Address of a file. */
void qie_hub_file_url(const qie_endpoint *e, const char *repo, const char *revision,
                      const char *path, char *out, size_t cap);

/* How a question to a hub goes. */
typedef struct qie_hub_client {
    qie_http *http;
    const qie_hub_settings *settings;
    int max_tries;                /* of one question without success */
    bool (*stop)(void *stop_arg); /* may be NULL */
    void *stop_arg;
} qie_hub_client;

/* Seconds to wait before try k (0 first) at the latest after `retry_after_s` (-1: not told): 0.25 s
 * doubling to 8 s, with a quarter of chance so that many clients do not come back together. */
double qie_hub_backoff(int k, int retry_after_s);
/* True for answers that may be better next time. */
bool qie_hub_may_retry(int status);
/* What an answer that is no success means and what to do. `what`: "the list of files", a path. */
qie_status qie_hub_refusal(const qie_hub_settings *s, const qie_endpoint *e, const char *repo,
                           const char *revision, const char *what, const qie_http_reply *reply,
                           qie_error *err);
/* The text of an end that is no answer, with what to set. */
qie_status qie_hub_unreachable(const qie_hub_settings *s, const qie_endpoint *e, qie_http_end end,
                               const char *why, qie_error *err);

/* The files of a revision (NULL: main) at one endpoint. Sizes and hashes that the list does not
 * tell are asked file by file. Errors: QIE_E_NETWORK, QIE_E_NOT_FOUND, QIE_E_DENIED, QIE_E_CORRUPT,
 * QIE_E_CANCELLED. */
qie_status qie_hub_list(const qie_hub_client *c, const qie_endpoint *e, const char *repo,
                        const char *revision, qie_hub_listing *out, qie_error *err);

#endif
