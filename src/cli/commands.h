/* The sub-commands. Each gets its parsed arguments and returns the status that becomes the exit
 * code; errors have been reported by then unless said otherwise. */
#ifndef QIE_CLI_COMMANDS_H
#define QIE_CLI_COMMANDS_H

#include "cli/options.h"
#include "qie/error.h"

qie_status cli_run_edit(cli_values *values, qie_error *err);
qie_status cli_run_bench(cli_values *values, qie_error *err);
qie_status cli_run_serve(cli_values *values, qie_error *err);
qie_status cli_run_worker(cli_values *values, qie_error *err);
qie_status cli_run_info(cli_values *values, qie_error *err);
qie_status cli_run_help(cli_values *values, qie_error *err);
qie_status cli_run_pull(cli_values *values, qie_error *err);
qie_status cli_run_verify(cli_values *values, qie_error *err);
qie_status cli_run_doctor(cli_values *values, qie_error *err);
qie_status cli_run_list(cli_values *values, qie_error *err);
qie_status cli_run_rm(cli_values *values, qie_error *err);
qie_status cli_run_quantize(cli_values *values, qie_error *err);
qie_status cli_run_prune(cli_values *values, qie_error *err);

#endif
