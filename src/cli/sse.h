/* Reads a stream of server-sent events piece by piece, as the HTML standard defines it: lines end
 * in LF, CR or CRLF, an event may be cut anywhere, comments are skipped. */
#ifndef QIE_CLI_SSE_H
#define QIE_CLI_SSE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/strbuf.h"

#define CLI_SSE_MAX_BYTES (8u << 20) /* of one line and of one event's data: a preview fits */

typedef struct cli_sse {
    qie_strbuf line, data;
    bool after_cr;
    char name[32];
    char id[32]; /* of the last whole event; for Last-Event-ID */
    char next_id[32];
} cli_sse;

/* An event; `data` may be empty, never NULL. Returning false ends the reading. */
typedef bool (*cli_sse_fn)(void *arg, const char *name, const char *data, size_t n);

void cli_sse_init(cli_sse *s);
void cli_sse_release(cli_sse *s);
/* A connection has ended: what was cut off is dropped, the id stays. */
void cli_sse_restart(cli_sse *s);
/* False when fn returned false or a limit was passed. */
bool cli_sse_feed(cli_sse *s, const char *bytes, size_t n, cli_sse_fn fn, void *arg);

#endif
