/* One edit at a service instead of in this process: send, follow, fetch, write.
 *
 * What people see is what a local edit shows: the same progress, messages and last line. Fields
 * that nobody set are left out, so that the service's defaults hold. */
#ifndef QIE_CLI_REMOTE_H
#define QIE_CLI_REMOTE_H

#include "cli/request.h"
#include "cli/service_client.h"

/* Flags that say how this machine computes have no place beside --server. Errors: QIE_E_USAGE. */
qie_status cli_remote_check_flags(const cli_values *values, qie_error *err);

/* The request must be read and its outputs checked; pictures are sent as they stand in their files.
 * *result and `paths` as in cli_job_run. Ctrl-C cancels the job at the service. With --dry-run the
 * service's plan is printed instead. Errors: as cli_service_call, what the job failed with,
 * QIE_E_IO. */
qie_status cli_remote_run(cli_service *service, const cli_request *request, bool dry_run,
                          bool paths, qie_json **result, qie_error *err);

#endif
