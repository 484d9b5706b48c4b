/* The command quantize. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_choice.h"
#include "cli/ui.h"
#include "weights/quantize.h"

static bool stop(void *arg) {
    (void)arg;
    return cli_interrupted();
}

static void warn(void *arg, const char *text) {
    (void)arg;
    cli_warn("%s", text);
}

static void progress(void *arg, const qie_quantize_progress *p) {
    (void)arg;
    char text[300], left[32];
    double part = p->bytes > 0 ? (double)p->bytes_done / (double)p->bytes : 0;
    snprintf(text, sizeof text, "%s %.2f/%.2f GB, %.0f MB/s%s%s%s", p->stage,
             (double)p->bytes_done / 1e9, (double)p->bytes / 1e9, p->bytes_per_s / 1e6,
             p->seconds_left >= 0 ? ", " : "",
             p->seconds_left >= 0 ? cli_duration(p->seconds_left, left, sizeof left) : "",
             p->seconds_left >= 0 ? " left" : "");
    qie_json *e = NULL;
    if (cli_ui_is_json()) {
        e = qie_json_new_object();
        qie_json_put(e, "event", qie_json_new_string("progress"));
        qie_json_put(e, "stage", qie_json_new_string(p->stage));
        qie_json_put(e, "tensor", qie_json_new_string(p->tensor));
        qie_json_put(e, "bytes", qie_json_new_int(p->bytes));
        qie_json_put(e, "bytes_done", qie_json_new_int(p->bytes_done));
        qie_json_put(e, "bytes_per_s", qie_json_new_double(p->bytes_per_s));
        qie_json_put(e, "seconds_left",
                     p->seconds_left >= 0 ? qie_json_new_double(p->seconds_left)
                                          : qie_json_new_null());
    }
    cli_work(part, text, e);
}

static void print_result(const qie_quantize_options *o, const qie_quantize_result *r) {
    qie_json *j = qie_json_new_object();
    qie_json_put(j, "dir", qie_json_new_string(o->out));
    qie_json_put(j, "to", qie_json_new_string(o->to));
    qie_json_put(j, "bytes_in", qie_json_new_int(r->bytes_in));
    qie_json_put(j, "bytes_out", qie_json_new_int(r->bytes_out));
    qie_json_put(j, "matrices_converted", qie_json_new_int((int64_t)r->n_converted));
    qie_json_put(j, "matrices_eight_bits", qie_json_new_int((int64_t)r->n_eight));
    qie_json_put(j, "matrices_kept", qie_json_new_int((int64_t)r->n_kept));
    qie_json_put(j, "resumed", qie_json_new_bool(r->resumed));
    qie_json_put(j, "was_complete", qie_json_new_bool(r->was_complete));
    qie_json_put(j, "seconds", qie_json_new_double(r->seconds));
    char *text = qie_json_text(j, 0);
    puts(text ? text : "{}");
    free(text);
    qie_json_free(j);
}

qie_status cli_run_quantize(cli_values *v, qie_error *err) {
    const char *to = cli_text(v, OPT_TO, NULL);
    char *in = NULL, t[32];
    qie_quantize_result r;
    QIE_FAIL_IF(v->n_args != 2, QIE_E_USAGE, err, NULL,
                "quantize needs a model and a folder for the result: qwen-edit quantize MODEL OUT "
                "--to TYPE");
    QIE_FAIL_IF(!to, QIE_E_USAGE, err, "--to",
                "quantize needs --to: q8_0, q6_k, q5_k, q4_k, q4_0, int8 or fp8");
    if (cli_on(v, OPT_VERBOSE) && !getenv("QIE_LOG"))
        setenv("QIE_LOG", "info", 1);
    QIE_FAIL_IF(!strcmp(v->args[0], "demo"), QIE_E_INVALID, err, "model",
                "the demo model is part of the program: quantize takes a model's folder");
    QIE_TRY(cli_resolve_model(v->args[0], "quantize", &in, err));
    cli_interrupt_install();
    cli_interrupt_set_polled(true);
    const cli_value *keep = cli_get(v, OPT_KEEP_WEIGHTS);
    qie_quantize_options o = {.in = in,
                              .out = v->args[1],
                              .to = to,
                              .keep = keep->texts,
                              .n_keep = keep->n,
                              .importance = cli_text(v, OPT_IMPORTANCE, NULL),
                              .n_threads = (int)cli_number(v, OPT_THREADS, 0),
                              .stop = stop,
                              .progress = progress,
                              .warn = warn};
    qie_status st = qie_quantize(&o, &r, err);
    cli_progress_end();
    free(in);
    QIE_TRY(st);
    if (r.was_complete)
        cli_note("it is there already, complete");
    else
        cli_note("%s%zu matrices to %s, %zu to 8 bits, %zu kept: %.2f GB instead of %.2f GB, in %s",
                 r.resumed ? "gone on with: " : "", r.n_converted, to, r.n_eight, r.n_kept,
                 (double)r.bytes_out / 1e9, (double)r.bytes_in / 1e9,
                 cli_duration(r.seconds, t, sizeof t));
    if (cli_on(v, OPT_JSON))
        print_result(&o, &r);
    else
        printf("%s\n", o.out);
    return QIE_OK;
}
