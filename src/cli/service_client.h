/* A running service (`qwen-edit serve`) as the commands of this program talk to it: calls that
 * wait, and the events of a job.
 *
 * A full or loading service (429, 503 with Retry-After) is waited for and asked again, which is
 * said; a connection that breaks while a job is followed is taken up again where it was. Ctrl-C
 * ends every wait with QIE_E_CANCELLED. The key goes to the service's own address and nowhere else.
 */
#ifndef QIE_CLI_SERVICE_CLIENT_H
#define QIE_CLI_SERVICE_CLIENT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/json.h"
#include "cli/options.h"
#include "qie/error.h"

typedef struct cli_service cli_service;

/* --server, with the key of --api-key, --api-key-file or the environment. Nothing is sent yet.
 * Errors: QIE_E_USAGE, QIE_E_INVALID (address, key), QIE_E_NOT_FOUND, QIE_E_IO (key file). */
qie_status cli_service_open(const cli_values *values, cli_service **out, qie_error *err);
void cli_service_close(cli_service *service);
/* The address as messages call it, without a slash at the end. */
const char *cli_service_address(const cli_service *service);

typedef struct cli_call {
    const char *path; /* "/v1/jobs" */
    bool post;
    const void *body; /* borrowed; NULL: empty */
    size_t n_body;
    const char *content_type;
    size_t max_bytes; /* of the answer */
    bool once;        /* neither wait for a busy service nor try again */
} cli_call;

/* The body of a 2xx answer as a new string with a NUL behind it. Errors: what the service says,
 * with its category, message and field; QIE_E_NETWORK (unreachable, or no service of ours),
 * QIE_E_CANCELLED. */
qie_status cli_service_call(cli_service *service, const cli_call *call, char **body, size_t *n,
                            qie_error *err);

/* An error object of the interface ({"message", "type", "param", "code"}) as ours. */
qie_status cli_service_error(const qie_json *error, int http_status, qie_error *err);

/* True when the job has ended. */
typedef bool (*cli_job_event_fn)(void *arg, const char *name, const qie_json *data);
/* Follow a job until fn returns true. Errors: as cli_service_call. */
qie_status cli_service_follow(cli_service *service, const char *job_id, cli_job_event_fn fn,
                              void *arg, qie_error *err);

/* Ask for the end of a job, whatever was interrupted; waits a few seconds at most. */
qie_status cli_service_cancel(cli_service *service, const char *job_id, qie_error *err);

#endif
