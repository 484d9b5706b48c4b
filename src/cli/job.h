/* One request on an open engine: plan, compute, write, say what came out. */
#ifndef QIE_CLI_JOB_H
#define QIE_CLI_JOB_H

#include "cli/request.h"

/* Run the edit and write its results; the seed must be chosen and the pictures loaded. *result (new
 * JSON) is the object that --json prints; NULL on failure. Paths written go to stdout, one a line,
 * when `paths` is set. Errors: as qie_engine_edit, and QIE_E_IO. */
qie_status cli_job_run(qie_engine *engine, cli_request *request, bool paths, qie_json **result,
                       qie_error *err);

/* Sizes, tokens, memory and time without computing. Text goes to stdout when `text` is set. */
qie_status cli_job_plan(qie_engine *engine, const cli_request *request, bool text,
                        qie_json **result, qie_error *err);

#endif
