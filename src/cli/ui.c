#define _GNU_SOURCE
#include "cli/ui.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"

/* Ten pictures a second are enough for the eye and cost nothing. */
#define REDRAW_S 0.1

static struct {
    bool json, quiet, terminal, colour, bar;
    int line;
    double drawn_at;
    char stage[32];
    int step, i_image;
    char warnings[16][512]; /* of the running job, for its result */
    int n_warnings;
} ui = {.step = -1};

static void on_log(void *arg, qie_log_level level, const char *component, const char *text);

void cli_ui_start(bool json, bool quiet) {
    const char *term = getenv("TERM"), *no_color = getenv("NO_COLOR");
    ui.json = json;
    ui.quiet = quiet;
    ui.terminal = isatty(STDERR_FILENO) && term && *term && strcmp(term, "dumb") != 0;
    ui.colour = ui.terminal && !(no_color && *no_color);
    qie_log_set_sink(on_log, NULL);
}

void cli_ui_set_line(int line) {
    ui.line = line;
}

const char *cli_duration(double seconds, char *out, size_t cap) {
    long s = seconds < 0 ? 0 : (long)(seconds + 0.5);
    if (seconds < 9.95)
        snprintf(out, cap, "%.1f s", seconds < 0 ? 0 : seconds);
    else if (s < 60)
        snprintf(out, cap, "%ld s", s);
    else if (s < 3600)
        snprintf(out, cap, "%ld min %02ld s", s / 60, s % 60);
    else
        snprintf(out, cap, "%ld h %02ld min", s / 3600, s / 60 % 60);
    return out;
}

/* ---------------------------------------------------------------- messages */

static void put_event(qie_json *event) {
    char *text = event ? qie_json_text(event, 0) : NULL;
    if (text)
        fprintf(stderr, "%s\n", text);
    free(text);
    qie_json_free(event);
}

bool cli_ui_is_json(void) {
    return ui.json;
}

static qie_json *new_event(const char *kind) {
    qie_json *event = qie_json_new_object();
    qie_json_put(event, "event", qie_json_new_string(kind));
    if (ui.line)
        qie_json_put(event, "line", qie_json_new_int(ui.line));
    return event;
}

/* Text in a JSON string must be UTF-8; a file name need not be. */
static qie_json *json_text(const char *text) {
    qie_json *s = qie_json_new_string(text);
    return s ? s : qie_json_new_string("(not UTF-8)");
}

void cli_event(const char *kind, qie_json *members) {
    if (ui.json && !ui.quiet) {
        qie_json *event = new_event(kind);
        qie_json_put(event, kind, members);
        put_event(event);
    } else
        qie_json_free(members);
}

/* kind: "note", "warning" or "error"; colour: an SGR number */
static void say(const char *kind, int colour, const char *text) {
    if (!strcmp(kind, "warning") && ui.n_warnings < (int)(sizeof ui.warnings / sizeof *ui.warnings))
        snprintf(ui.warnings[ui.n_warnings++], sizeof *ui.warnings, "%.511s", text);
    if (ui.json) {
        qie_json *event = new_event(kind);
        qie_json_put(event, "message", json_text(text));
        put_event(event);
        return;
    }
    cli_progress_end();
    fputs("qwen-edit: ", stderr);
    if (ui.line)
        fprintf(stderr, "line %d: ", ui.line);
    if (strcmp(kind, "note") != 0) {
        if (ui.colour)
            fprintf(stderr, "\033[1;%dm%s:\033[0m ", colour, kind);
        else
            fprintf(stderr, "%s: ", kind);
    }
    fprintf(stderr, "%s\n", text);
}

void cli_note(const char *fmt, ...) {
    if (ui.quiet)
        return;
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    say("note", 0, text);
}

void cli_warn(const char *fmt, ...) {
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    say("warning", 33, text);
}

qie_json *cli_warnings_json(void) {
    qie_json *a = qie_json_new_array();
    for (int i = 0; i < ui.n_warnings; i++)
        qie_json_push(a, json_text(ui.warnings[i]));
    return a;
}

void cli_ui_forget_warnings(void) {
    ui.n_warnings = 0;
}

static void on_log(void *arg, qie_log_level level, const char *component, const char *text) {
    (void)arg;
    char line[1200];
    snprintf(line, sizeof line, "%s: %s", component, text);
    if (level == QIE_LOG_ERROR)
        say("error", 31, line);
    else if (level == QIE_LOG_WARN)
        say("warning", 33, line);
    else
        say("note", 0, line);
}

qie_json *cli_error_json(const qie_error *error) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "message", json_text(error->message));
    qie_json_put(o, "type", qie_json_new_string(qie_status_name(error->status)));
    qie_json_put(o, "param", error->param[0] ? json_text(error->param) : qie_json_new_null());
    qie_json_put(o, "exit_code", qie_json_new_int(qie_status_exit_code(error->status)));
    return o;
}

void cli_report(const qie_error *error) {
    if (ui.json) {
        qie_json *event = new_event("error");
        qie_json_put(event, "error", cli_error_json(error));
        put_event(event);
        return;
    }
    char text[1100];
    /* The engine names fields ("width"); a message that does not mention its field gets it in
     * front. */
    bool named = !error->param[0] || strstr(error->message, error->param);
    snprintf(text, sizeof text, "%s%s%s", named ? "" : error->param, named ? "" : ": ",
             error->message);
    say("error", 31, text);
}

/* ---------------------------------------------------------------- progress */

static const char *stage_words(const char *stage) {
    static const char *const words[][2] = {{"queue", "waiting in the queue"},
                                           {"load", "reading the model"},
                                           {"encode_text", "reading the instruction"},
                                           {"encode_image", "encoding the pictures"},
                                           {"denoise", "step"},
                                           {"decode", "decoding"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (!strcmp(stage, words[i][0]))
            return words[i][1];
    return stage;
}

static int terminal_width(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

static void describe(const qie_progress *p, char *out, size_t cap) {
    char left[64] = "", duration[32], image[48] = "";
    if (p->seconds_left >= 0)
        snprintf(left, sizeof left, ", %s left",
                 cli_duration(p->seconds_left, duration, sizeof duration));
    if (p->n_images > 1)
        snprintf(image, sizeof image, "picture %d/%d, ", p->i_image + 1, p->n_images);
    if (!strcmp(p->stage, "queue") && p->step > 0)
        snprintf(out, cap, "%s, %d before this edit%s", stage_words(p->stage), p->step, left);
    else if (!strcmp(p->stage, "denoise") || (p->total > 1 && p->step > 0))
        snprintf(out, cap, "%s%s %d/%d%s", image, stage_words(p->stage), p->step, p->total, left);
    else
        snprintf(out, cap, "%s%s%s", image, stage_words(p->stage), left);
}

/* One write per picture of the bar, and the line is overwritten before its rest is cleared: no
 * flicker. */
static void draw_bar(const qie_progress *p, const char *text) {
    char line[512], bar[64];
    int columns = terminal_width() - 1, room = columns - (int)strlen(text) - 4;
    int cells = room < 8 ? 0 : room > 40 ? 40 : room;
    double part = p->total > 0 ? (double)p->step / p->total : 0;
    int full = (int)(part * cells + 1e-9);
    for (int i = 0; i < cells; i++)
        bar[i] = i < full ? '#' : '-';
    bar[cells] = 0;
    if (cells)
        snprintf(line, sizeof line, "\r%s[%s]%s %.*s\033[K", ui.colour ? "\033[36m" : "", bar,
                 ui.colour ? "\033[0m" : "", columns > 0 ? columns : 1, text);
    else
        snprintf(line, sizeof line, "\r%.*s\033[K", columns > 0 ? columns : 1, text);
    fputs(line, stderr);
    fflush(stderr);
    ui.bar = true;
}

static void progress_event(const qie_progress *p) {
    qie_json *event = new_event("progress");
    qie_json_put(event, "stage", qie_json_new_string(p->stage));
    qie_json_put(event, "step", qie_json_new_int(p->step));
    qie_json_put(event, "total", qie_json_new_int(p->total));
    if (p->n_images > 1) {
        qie_json_put(event, "image", qie_json_new_int(p->i_image + 1));
        qie_json_put(event, "num_images", qie_json_new_int(p->n_images));
    }
    qie_json_put(event, "elapsed_s", qie_json_new_double(p->elapsed_s));
    qie_json_put(event, "seconds_left",
                 p->seconds_left >= 0 ? qie_json_new_double(p->seconds_left) : qie_json_new_null());
    put_event(event);
}

void cli_progress(const qie_progress *p) {
    if (ui.quiet)
        return;
    bool counts = !strcmp(p->stage, "denoise") || !strcmp(p->stage, "queue");
    bool new_stage = strcmp(ui.stage, p->stage) != 0 || ui.i_image != p->i_image;
    bool new_step = new_stage || ui.step != p->step;
    double now = qie_now_s();
    if (ui.terminal && !ui.json
            ? !(new_stage || (counts && new_step) || now - ui.drawn_at >= REDRAW_S)
            : !(new_stage || (counts && new_step)))
        return;
    snprintf(ui.stage, sizeof ui.stage, "%s", p->stage);
    ui.i_image = p->i_image;
    ui.step = p->step;
    ui.drawn_at = now;
    char text[256];
    describe(p, text, sizeof text);
    if (ui.json)
        progress_event(p);
    else if (ui.terminal)
        draw_bar(p, text);
    else if (ui.line)
        fprintf(stderr, "qwen-edit: line %d: %s\n", ui.line, text);
    else
        fprintf(stderr, "qwen-edit: %s\n", text);
}

void cli_work(double part, const char *text, qie_json *event) {
    static double told_at = -1e9, told_part = -1;
    double now = qie_now_s();
    bool terminal = ui.terminal && !ui.json;
    bool due = terminal  ? now - ui.drawn_at >= REDRAW_S
               : ui.json ? now - told_at >= 1
                         : now - told_at >= 60 || (now - told_at >= 1 &&
                                                   (part >= told_part + 0.05 || part < told_part));
    if (ui.quiet || !due) {
        qie_json_free(event);
        return;
    }
    told_at = ui.drawn_at = now;
    told_part = part;
    if (ui.json) {
        put_event(event);
        return;
    }
    qie_json_free(event);
    if (terminal) {
        qie_progress p = {.step = part < 0 ? 0 : (int)(part * 1000), .total = 1000};
        draw_bar(&p, text);
    } else
        fprintf(stderr, "qwen-edit: %s\n", text);
}

void cli_progress_end(void) {
    if (ui.bar) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
        ui.bar = false;
    }
}
