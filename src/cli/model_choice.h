/* Which model an edit uses: --model > QWEN_EDIT_2511_DIR > config file > a complete snapshot of the
 * released model in the cache > the built-in demo. What is named but wrong is an error, never the
 * demo. */
#ifndef QIE_CLI_MODEL_CHOICE_H
#define QIE_CLI_MODEL_CHOICE_H

#include "cli/options.h"
#include "qie/edit.h"
#include "qie/error.h"

/* *model: new string, a folder or "demo"; "" when only files are named (--transformer ...) and no
 * snapshot is there for the rest; *named: the user chose it. Errors: QIE_E_NOT_FOUND. */
qie_status cli_choose_model(const cli_values *values, char **model, bool *named, qie_error *err);
/* A name given by the user as a folder: "demo" stays, ORG/NAME becomes its snapshot in the cache.
 */
qie_status cli_resolve_model(const char *name, const char *where, char **model, qie_error *err);
/* Files for the parts of a model. */
void cli_part_files(const cli_values *values, qie_engine_options *out);

#endif
