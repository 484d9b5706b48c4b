/* Where a command computes, from its flags and the machine: hub/place.h for the command line. */
#ifndef QIE_CLI_PLACE_H
#define QIE_CLI_PLACE_H

#include "base/json.h"
#include "cli/options.h"
#include "hub/place.h"

/* Refuses in doctor's words where no GPU has room; prints what is to be known otherwise. `gpus`:
 * NULL, or the list of --gpus; each: a service, with a worker on every card that has room. An
 * explicit --backend is computed on the CPU, without looking. */
qie_status cli_place(const cli_values *values, const char *model, const char *gpus, bool each,
                     qie_place *out, qie_error *err);
/* Where a model (folder, or "demo") fits on this machine, as an object for info. */
qie_json *cli_place_describe(const char *model);
/* qie_cuda.so: named by QIE_CUDA_PLUGIN or beside the program; free(); NULL if there is none. */
char *cli_find_plugin(void);
/* Is the user spoken to in Chinese (LC_ALL, LC_MESSAGES, LANG)? */
bool cli_speaks_chinese(void);

#endif
