/* The service's own log: one line an event, the job's id in each that belongs to one. */
#ifndef QIE_SERVICE_LOG_H
#define QIE_SERVICE_LOG_H

#include <stdbool.h>

#include "base/log.h"

/* Also takes over the lines of the library. */
void svc_log_start(bool json);
/* job may be NULL. */
void svc_log(qie_log_level level, const char *event, const char *job, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

#endif
