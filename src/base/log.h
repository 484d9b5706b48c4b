/* Log lines for people and machines. QIE_LOG="level" or "component:level,component:level" chooses
 * what is shown (error, warn, info, debug, trace; default warn). Lines go to stderr unless a sink
 * is set. */
#ifndef QIE_BASE_LOG_H
#define QIE_BASE_LOG_H

#include <stdbool.h>

typedef enum qie_log_level {
    QIE_LOG_ERROR = 0,
    QIE_LOG_WARN,
    QIE_LOG_INFO,
    QIE_LOG_DEBUG,
    QIE_LOG_TRACE
} qie_log_level;

typedef void (*qie_log_sink)(void *arg, qie_log_level level, const char *component,
                             const char *text);

/* Replace where lines go (NULL: stderr). Set once, before threads start. */
void qie_log_set_sink(qie_log_sink sink, void *arg);
bool qie_log_enabled(qie_log_level level, const char *component);
void qie_log(qie_log_level level, const char *component, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
const char *qie_log_level_name(qie_log_level level);

#endif
