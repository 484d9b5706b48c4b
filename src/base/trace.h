/* Where the time of a run goes, as a file of trace events (JSON) that ui.perfetto.dev and
 * chrome://tracing show: stages, steps, blocks, operations with their shapes, and for each thread
 * when it worked; the gaps are its waits.
 *
 * QIE_TRACE=FILE turns it on for the process. Off, a span costs one comparison. On, spans are kept
 * in memory, 64 bytes each, the first 2 million of the process. */
#ifndef QIE_BASE_TRACE_H
#define QIE_BASE_TRACE_H

#include <stdbool.h>

#include "qie/error.h"

bool qie_trace_on(void);
/* The calling thread did `name` from from_s (as qie_now_s) until now. category: a literal; name:
 * ASCII without quotes, cut to 35 characters. */
void qie_trace_span(const char *category, double from_s, const char *name, ...)
    __attribute__((format(printf, 3, 4)));
/* Write all spans so far; nothing if off. Errors: QIE_E_IO, QIE_E_NO_MEMORY (spans were lost). */
qie_status qie_trace_save(qie_error *err);

#endif
