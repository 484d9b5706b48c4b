#define _GNU_SOURCE
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const LEVELS[] = {"error", "warn", "info", "debug", "trace"};
static qie_log_sink the_sink; /* process-wide by nature: set once at start */
static void *the_sink_arg;

const char *qie_log_level_name(qie_log_level level) {
    return (unsigned)level < 5 ? LEVELS[level] : "?";
}

void qie_log_set_sink(qie_log_sink sink, void *arg) {
    the_sink = sink;
    the_sink_arg = arg;
}

static int level_of(const char *s, size_t n) {
    for (int i = 0; i < 5; i++)
        if (strlen(LEVELS[i]) == n && !strncmp(LEVELS[i], s, n))
            return i;
    return -1;
}

bool qie_log_enabled(qie_log_level level, const char *component) {
    int limit = QIE_LOG_WARN;
    const char *p = getenv("QIE_LOG");
    while (p && *p) {
        size_t n = strcspn(p, ",");
        const char *colon = memchr(p, ':', n);
        if (!colon) {
            int l = level_of(p, n);
            if (l >= 0)
                limit = l;
        } else if (strlen(component) == (size_t)(colon - p) &&
                   !strncmp(component, p, (size_t)(colon - p))) {
            int l = level_of(colon + 1, n - (size_t)(colon - p) - 1);
            if (l >= 0)
                return (int)level <= l;
        }
        p += n + (p[n] == ',');
    }
    return (int)level <= limit;
}

void qie_log(qie_log_level level, const char *component, const char *fmt, ...) {
    if (!qie_log_enabled(level, component))
        return;
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (the_sink)
        the_sink(the_sink_arg, level, component, text);
    else
        fprintf(stderr, "qwen-edit: %s: %s: %s\n", qie_log_level_name(level), component, text);
}
