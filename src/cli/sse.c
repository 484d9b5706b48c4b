#include "cli/sse.h"

#include <stdio.h>
#include <string.h>

void cli_sse_init(cli_sse *s) {
    memset(s, 0, sizeof *s);
    qie_strbuf_init(&s->line, CLI_SSE_MAX_BYTES);
    qie_strbuf_init(&s->data, CLI_SSE_MAX_BYTES);
}

void cli_sse_release(cli_sse *s) {
    qie_strbuf_release(&s->line);
    qie_strbuf_release(&s->data);
}

static void empty(qie_strbuf *b) {
    qie_strbuf_release(b);
    qie_strbuf_init(b, CLI_SSE_MAX_BYTES);
}

void cli_sse_restart(cli_sse *s) {
    empty(&s->line);
    empty(&s->data);
    s->name[0] = 0;
    memcpy(s->next_id, s->id, sizeof s->id);
    s->after_cr = false;
}

/* A value that does not fit is no name or number of ours: as if absent. */
static void take(char *out, size_t cap, const char *value) {
    if (strlen(value) < cap)
        memcpy(out, value, strlen(value) + 1);
}

static bool dispatch(cli_sse *s, cli_sse_fn fn, void *arg) {
    bool go_on = true;
    memcpy(s->id, s->next_id, sizeof s->id);
    if (s->data.len) { /* an event without data is none */
        s->data.data[s->data.len - 1] = 0;
        go_on = fn(arg, s->name[0] ? s->name : "message", s->data.data, s->data.len - 1);
    }
    empty(&s->data);
    s->name[0] = 0;
    return go_on;
}

static bool end_line(cli_sse *s, cli_sse_fn fn, void *arg) {
    if (!s->line.len)
        return dispatch(s, fn, arg);
    char *line = s->line.data, *value = strchr(line, ':');
    if (value == line) { /* a comment */
        empty(&s->line);
        return true;
    }
    if (value) {
        *value++ = 0;
        value += *value == ' ';
    }
    const char *text = value ? value : "";
    if (!strcmp(line, "event"))
        take(s->name, sizeof s->name, text);
    else if (!strcmp(line, "id"))
        take(s->next_id, sizeof s->next_id, text);
    else if (!strcmp(line, "data")) {
        qie_strbuf_puts(&s->data, text);
        qie_strbuf_puts(&s->data, "\n");
    }
    empty(&s->line);
    return !s->data.failed;
}

bool cli_sse_feed(cli_sse *s, const char *bytes, size_t n, cli_sse_fn fn, void *arg) {
    for (const char *p = bytes, *end = bytes + n; p < end;) {
        if (s->after_cr && *p == '\n')
            p++;
        s->after_cr = false;
        const char *stop = p;
        while (stop < end && *stop != '\n' && *stop != '\r')
            stop++;
        qie_strbuf_append(&s->line, p, (size_t)(stop - p));
        if (s->line.failed)
            return false;
        if (stop == end)
            return true;
        s->after_cr = *stop == '\r';
        p = stop + 1;
        if (!end_line(s, fn, arg))
            return false;
    }
    return true;
}
