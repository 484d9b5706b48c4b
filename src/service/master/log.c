#define _GNU_SOURCE
#include "service/master/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/json.h"
#include "base/strbuf.h"
#include "service/common/message.h"

static bool as_json; /* set once at start */

static void stamp(char out[40]) {
    struct timespec t;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    size_t n = strftime(out, 32, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out + n, 40 - n, ".%03ldZ", t.tv_nsec / 1000000);
}

static void put(qie_log_level level, const char *event, const char *job, const char *text) {
    char time_text[40], clean[1100];
    qie_strbuf line;
    stamp(time_text);
    snprintf(clean, sizeof clean, "%s", text);
    svc_text_clean(clean,
                   sizeof clean); /* what a client sent must not look like a line of its own */
    qie_strbuf_init(&line, 16384);
    if (as_json) {
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "time", qie_json_new_string(time_text));
        qie_json_put(o, "level", qie_json_new_string(qie_log_level_name(level)));
        qie_json_put(o, "event", qie_json_new_string(event));
        if (job)
            qie_json_put(o, "job_id", qie_json_new_string(job));
        qie_json_put(o, "message", qie_json_new_string(clean));
        char *s = qie_json_text(o, 0);
        qie_strbuf_puts(&line, s ? s : "{}");
        free(s);
        qie_json_free(o);
    } else
        qie_strbuf_printf(&line, "%s %-5s %s%s%s: %s", time_text, qie_log_level_name(level), event,
                          job ? " job=" : "", job ? job : "", clean);
    qie_strbuf_puts(&line, "\n");
    /* One write a line, so that threads do not mix. */
    ssize_t ignored = line.failed ? 0 : write(STDERR_FILENO, line.data, line.len);
    (void)ignored;
    qie_strbuf_release(&line);
}

static void sink(void *arg, qie_log_level level, const char *component, const char *text) {
    (void)arg;
    put(level, component, NULL, text);
}

void svc_log_start(bool json) {
    as_json = json;
    qie_log_set_sink(sink, NULL);
}

void svc_log(qie_log_level level, const char *event, const char *job, const char *fmt, ...) {
    char text[1024];
    va_list ap;
    if (level > QIE_LOG_INFO && !qie_log_enabled(level, "service"))
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    put(level, event, job, text);
}
