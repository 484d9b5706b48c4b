/* What the program says while it works: notes, warnings, errors and progress on standard error.
 *
 * On a terminal progress is one line redrawn in place; elsewhere one line per step; with --json
 * every message is one JSON object a line; --quiet leaves warnings and errors. One per process: the
 * log of the library comes through here too, so that nothing is written into the bar. */
#ifndef QIE_CLI_UI_H
#define QIE_CLI_UI_H

#include <stdbool.h>

#include "base/json.h"
#include "qie/edit.h"
#include "qie/error.h"

void cli_ui_start(bool json, bool quiet);
/* Line of the batch file that messages are about; 0: none. */
void cli_ui_set_line(int line);
void cli_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void cli_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void cli_report(const qie_error *error);
void cli_progress(const qie_progress *progress);
/* Progress of other work: `part` 0..1 done, < 0 unknown; text beside the bar. On a terminal at most
 * ten times a second; elsewhere when `part` has grown by a twentieth or a minute has passed; with
 * --json the event, which is taken over, once a second. `event` may be NULL when !cli_ui_is_json().
 */
void cli_work(double part, const char *text, qie_json *event);
/* Take the bar away; async-signal-safe is not needed: the handler only writes a line end. */
void cli_progress_end(void);

/* Warnings said since cli_ui_forget_warnings, as a new array of strings. */
qie_json *cli_warnings_json(void);
void cli_ui_forget_warnings(void);
bool cli_ui_is_json(void);
/* An event of its own kind, with --json only; takes the object (may be NULL). */
void cli_event(const char *kind, qie_json *members);
/* {"message", "type", "param", "exit_code"} as new JSON. */
qie_json *cli_error_json(const qie_error *error);
/* "12 s", "3 min 20 s", "2 h 05 min" */
const char *cli_duration(double seconds, char *out, size_t cap);

#endif
