/* One line of a batch: the fields of POST /edit, of which some have no flag. */
#ifndef QIE_CLI_LINE_H
#define QIE_CLI_LINE_H

#include "cli/options.h"
#include "qie/edit.h"

/* Pictures that stood in the line itself, as files without a name. */
typedef struct cli_line {
    int fds[QIE_MAX_IMAGES];
    int n_fds;
} cli_line;

/* Values of the line; what is only a matter of the service (response, priority, idempotency_key,
 * preview as a truth value) has no effect. The values refer to the pictures until
 * cli_line_release. Errors: QIE_E_INVALID, QIE_E_UNSUPPORTED (an address), QIE_E_TOO_LARGE,
 * QIE_E_IO; param names the field. */
qie_status cli_line_parse(cli_line *line, cli_values *values, const qie_json *object,
                          qie_error *err);
void cli_line_release(cli_line *line);

#endif
