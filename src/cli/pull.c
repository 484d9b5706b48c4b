/* The command pull. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/ui.h"
#include "hub/cache.h"
#include "hub/pull.h"

typedef struct pulling {
    bool dry_run, json;
    qie_json *missing; /* array; owned until the result takes it */
    qie_pull_phase said;
} pulling;

static bool stop(void *arg) {
    (void)arg;
    return cli_interrupted();
}

static qie_json *progress_event(const qie_pull_progress *p) {
    static const char *const phases[] = {"list", "check", "fetch", "done"};
    qie_json *e = qie_json_new_object();
    qie_json_put(e, "event", qie_json_new_string("progress"));
    qie_json_put(e, "stage", qie_json_new_string(phases[p->phase]));
    qie_json_put(e, "files", qie_json_new_int((int64_t)p->n_files));
    qie_json_put(e, "files_done", qie_json_new_int((int64_t)p->n_done));
    qie_json_put(e, "files_waiting", qie_json_new_int((int64_t)p->n_waiting));
    qie_json_put(e, "bytes", qie_json_new_int(p->bytes));
    qie_json_put(e, "bytes_done", qie_json_new_int(p->bytes_done));
    qie_json_put(e, "bytes_per_s", qie_json_new_double(p->bytes_per_s));
    qie_json_put(e, "connections", qie_json_new_int(p->n_connections));
    qie_json_put(e, "seconds_left",
                 p->seconds_left >= 0 ? qie_json_new_double(p->seconds_left) : qie_json_new_null());
    return e;
}

static void progress(void *arg, const qie_pull_progress *p) {
    pulling *w = arg;
    char text[256], left[32];
    if (p->phase == QIE_PULL_LISTING || p->phase == QIE_PULL_DONE) {
        w->said = p->phase;
        return;
    }
    double part = p->bytes > 0 ? (double)p->bytes_done / (double)p->bytes : 0;
    if (p->phase == QIE_PULL_CHECKING)
        snprintf(text, sizeof text, "checking what is there: %.2f GB", (double)p->bytes_done / 1e9);
    else if (p->n_waiting && !p->n_connections)
        snprintf(text, sizeof text, "%zu/%zu files, waiting for another pull of this model",
                 p->n_done, p->n_files);
    else
        snprintf(text, sizeof text, "%zu/%zu files, %.2f/%.2f GB, %.1f MB/s%s%s%s", p->n_done,
                 p->n_files, (double)p->bytes_done / 1e9, (double)p->bytes / 1e9,
                 p->bytes_per_s / 1e6, p->seconds_left >= 0 ? ", " : "",
                 p->seconds_left >= 0 ? cli_duration(p->seconds_left, left, sizeof left) : "",
                 p->seconds_left >= 0 ? " left" : "");
    cli_work(part, text, cli_ui_is_json() ? progress_event(p) : NULL);
}

static void say(void *arg, const char *kind, const char *text) {
    (void)arg;
    if (!strcmp(kind, "warning"))
        cli_warn("%s", text);
    else
        cli_note("%s", text);
}

static void missing(void *arg, const char *path, int64_t bytes, int64_t partial) {
    pulling *w = arg;
    if (w->json) {
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "path", qie_json_new_string(path));
        qie_json_put(o, "bytes", bytes >= 0 ? qie_json_new_int(bytes) : qie_json_new_null());
        qie_json_put(o, "bytes_partial", qie_json_new_int(partial));
        qie_json_push(w->missing, o);
    } else if (bytes >= 0)
        printf("missing  %14lld  %s%s\n", (long long)bytes, path, partial > 0 ? "  (begun)" : "");
    else
        printf("missing  %14s  %s\n", "?", path);
}

static void print_result(const pulling *w, const qie_pull_result *r, qie_status st,
                         qie_json *missing_list) {
    if (!w->json) {
        if (w->dry_run)
            printf("%zu files, %.2f GB; missing: %.2f GB\n", r->n_files, (double)r->bytes / 1e9,
                   (double)r->bytes_missing / 1e9);
        if (r->dir)
            printf("%s\n", r->dir);
        return;
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "dir", r->dir ? qie_json_new_string(r->dir) : qie_json_new_null());
    qie_json_put(o, "commit", qie_json_new_string(r->commit));
    qie_json_put(o, "complete",
                 qie_json_new_bool(st == QIE_OK && (!w->dry_run || r->bytes_missing == 0)));
    qie_json_put(o, "files", qie_json_new_int((int64_t)r->n_files));
    qie_json_put(o, "files_fetched", qie_json_new_int((int64_t)r->n_fetched));
    qie_json_put(o, "bytes", qie_json_new_int(r->bytes));
    qie_json_put(o, "bytes_missing", qie_json_new_int(r->bytes_missing));
    qie_json_put(o, "bytes_fetched", qie_json_new_int(r->bytes_fetched));
    qie_json_put(o, "seconds", qie_json_new_double(r->seconds));
    qie_json_put(o, "missing", missing_list);
    char *text = qie_json_text(o, 0);
    puts(text ? text : "{}");
    free(text);
    qie_json_free(o);
}

qie_status cli_run_pull(cli_values *v, qie_error *err) {
    qie_hub_settings settings;
    qie_pull_result result = {0};
    pulling w = {.dry_run = cli_on(v, OPT_DRY_RUN), .json = cli_on(v, OPT_JSON)};
    const cli_value *endpoint = cli_get(v, OPT_ENDPOINT), *include = cli_get(v, OPT_INCLUDE),
                    *exclude = cli_get(v, OPT_EXCLUDE);
    QIE_FAIL_IF(v->n_args > 1, QIE_E_USAGE, err, "repository",
                "pull takes one repository, '%s' is a second", v->args[1]);
    if (cli_on(v, OPT_VERBOSE) && !getenv("QIE_LOG"))
        setenv("QIE_LOG", "info", 1);
    QIE_TRY(qie_hub_settings_read(endpoint->texts, endpoint->n, &settings, err));
    cli_interrupt_install();
    cli_interrupt_set_polled(true);
    w.missing = qie_json_new_array();
    qie_pull_options o = {
        .repo = v->n_args ? v->args[0] : QIE_HUB_DEFAULT_REPO,
        .revision = cli_text(v, OPT_REVISION, NULL),
        .local_dir = cli_text(v, OPT_LOCAL_DIR, NULL),
        .cache = cli_text(v, OPT_CACHE_DIR, NULL),
        .include = include->texts,
        .n_include = include->n,
        .exclude = exclude->texts,
        .n_exclude = exclude->n,
        .settings = &settings,
        .jobs = (int)cli_number(v, OPT_JOBS, 0),
        .max_tries = (int)cli_number(v, OPT_RETRIES, 0),
        .dry_run = w.dry_run,
        .recheck = cli_on(v, OPT_RECHECK),
        .stop = stop,
        .progress = progress,
        .say = say,
        .missing = missing,
        .arg = &w,
    };
    qie_status st = qie_pull(&o, &result, err);
    explicit_bzero(settings.token, sizeof settings.token);
    cli_progress_end();
    if (st == QIE_OK && result.unchecked)
        cli_warn("the hub told no hash of some files: only their sizes were checked");
    if (st == QIE_OK && !w.dry_run && !w.json) {
        char t[32];
        if (result.n_fetched)
            cli_note("%zu files, %.2f GB, complete and checked; %.2f GB fetched in %s",
                     result.n_files, (double)result.bytes / 1e9, (double)result.bytes_fetched / 1e9,
                     cli_duration(result.seconds, t, sizeof t));
        else
            cli_note("%zu files, %.2f GB, all there", result.n_files, (double)result.bytes / 1e9);
    }
    if (st == QIE_OK || (st == QIE_E_NOT_FOUND && settings.offline && w.json)) {
        print_result(&w, &result, st, w.missing);
        if (w.json)
            w.missing = NULL; /* part of the object printed */
    }
    qie_json_free(w.missing);
    qie_pull_result_release(&result);
    return st;
}
