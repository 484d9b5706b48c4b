/* The command verify. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_choice.h"
#include "cli/ui.h"
#include "hub/cache.h"
#include "hub/verify.h"

typedef struct verifying {
    bool json, quiet;
    qie_json *problems;
} verifying;

static bool stop(void *arg) {
    (void)arg;
    return cli_interrupted();
}

static void progress(void *arg, int64_t done, int64_t bytes, double per_s) {
    (void)arg;
    char text[200], left[32];
    double part = bytes > 0 ? (double)done / (double)bytes : 1;
    snprintf(text, sizeof text, "%.2f/%.2f GB, %.0f MB/s, %s left", (double)done / 1e9,
             (double)bytes / 1e9, per_s / 1e6,
             cli_duration(per_s > 1 ? (double)(bytes - done) / per_s : 0, left, sizeof left));
    qie_json *e = NULL;
    if (cli_ui_is_json()) {
        e = qie_json_new_object();
        qie_json_put(e, "event", qie_json_new_string("progress"));
        qie_json_put(e, "stage", qie_json_new_string("hash"));
        qie_json_put(e, "bytes", qie_json_new_int(bytes));
        qie_json_put(e, "bytes_done", qie_json_new_int(done));
        qie_json_put(e, "bytes_per_s", qie_json_new_double(per_s));
    }
    cli_work(part, text, e);
}

static void problem(void *arg, const qie_verify_problem *p) {
    verifying *w = arg;
    if (w->json) {
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "path", qie_json_new_string(p->path));
        qie_json_put(o, "problem", qie_json_new_string(p->kind));
        qie_json_put(o, "detail", qie_json_new_string(p->detail));
        qie_json_put(o, "remedy", qie_json_new_string(p->remedy));
        qie_json_push(w->problems, o);
        return;
    }
    cli_progress_end();
    printf("%-10s  %s: %s\n            mend: %s\n", p->kind, *p->path ? p->path : "folder",
           p->detail, p->remedy);
}

/* The folder that the argument names, or the model that edit would take. */
static qie_status choose(cli_values *v, char **dir, qie_error *err) {
    const char *revision = cli_text(v, OPT_REVISION, NULL),
               *cache = cli_text(v, OPT_CACHE_DIR, NULL);
    if (cache)
        setenv("HF_HUB_CACHE", cache, 1); /* one way to look into a cache */
    if (!v->n_args && !revision) {
        const char *named = getenv("QWEN_EDIT_2511_DIR");
        if (named && *named)
            return cli_resolve_model(named, "QWEN_EDIT_2511_DIR", dir, err);
    }
    const char *name = v->n_args ? v->args[0] : QIE_HUB_DEFAULT_REPO;
    if (qie_dir_exists(name)) {
        *dir = strdup(name);
        QIE_FAIL_IF(!*dir, QIE_E_NO_MEMORY, err, NULL, "out of memory");
        return QIE_OK;
    }
    QIE_FAIL_IF(!strcmp(name, "demo"), QIE_E_INVALID, err, "demo",
                "the demo model is part of the program: there is no folder to verify");
    QIE_FAIL_IF(!qie_hub_is_repo(name), QIE_E_NOT_FOUND, err, "model", "there is no folder '%s'",
                name);
    return qie_hub_find_snapshot(name, revision, dir, err);
}

static void print_json(const verifying *w, const char *dir, const qie_verify_result *r,
                       qie_status st) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "dir", qie_json_new_string(dir));
    qie_json_put(o, "ok", qie_json_new_bool(st == QIE_OK));
    qie_json_put(o, "files", qie_json_new_int((int64_t)r->n_files));
    qie_json_put(o, "files_hashed", qie_json_new_int((int64_t)r->n_hashed));
    qie_json_put(o, "files_without_hash", qie_json_new_int((int64_t)r->n_unknown));
    qie_json_put(o, "files_missing", qie_json_new_int((int64_t)r->n_missing));
    qie_json_put(o, "bytes", qie_json_new_int(r->bytes));
    qie_json_put(o, "bytes_hashed", qie_json_new_int(r->bytes_hashed));
    qie_json_put(o, "tensors", qie_json_new_int(r->n_tensors));
    qie_json_put(o, "seconds", qie_json_new_double(r->seconds));
    qie_json_put(o, "problems", w->problems);
    char *text = qie_json_text(o, 0);
    puts(text ? text : "{}");
    free(text);
    qie_json_free(o);
}

qie_status cli_run_verify(cli_values *v, qie_error *err) {
    char *dir = NULL;
    qie_verify_result r;
    verifying w = {.json = cli_on(v, OPT_JSON), .quiet = cli_on(v, OPT_QUIET)};
    const cli_value *include = cli_get(v, OPT_INCLUDE), *exclude = cli_get(v, OPT_EXCLUDE);
    QIE_FAIL_IF(v->n_args > 1, QIE_E_USAGE, err, "model",
                "verify takes one model, '%s' is a second", v->args[1]);
    QIE_TRY(choose(v, &dir, err));
    cli_interrupt_install();
    cli_interrupt_set_polled(true);
    w.problems = qie_json_new_array();
    qie_verify_options o = {.dir = dir,
                            .cache = cli_text(v, OPT_CACHE_DIR, NULL),
                            .include = include->texts,
                            .n_include = include->n,
                            .exclude = exclude->texts,
                            .n_exclude = exclude->n,
                            .no_hash = cli_on(v, OPT_NO_HASH),
                            .stop = stop,
                            .progress = progress,
                            .problem = problem,
                            .arg = &w};
    qie_status st = qie_verify(&o, &r, err);
    cli_progress_end();
    bool told = st == QIE_OK || st == QIE_E_CORRUPT || st == QIE_E_NOT_FOUND;
    if (w.json && told) {
        print_json(&w, dir, &r, st);
        w.problems = NULL;
        qie_error_clear(err); /* the object says it all; a second one would follow */
    } else if (st == QIE_OK && !w.quiet) {
        char t[32];
        printf("%s: %zu files, %.2f GB, %lld tensors, all right", dir, r.n_files,
               (double)r.bytes / 1e9, (long long)r.n_tensors);
        if (r.n_hashed)
            printf("; %zu hashed at %.0f MB/s in %s", r.n_hashed,
                   r.seconds > 0 ? (double)r.bytes_hashed / r.seconds / 1e6 : 0,
                   cli_duration(r.seconds, t, sizeof t));
        putchar('\n');
        if (r.n_unknown)
            cli_note("no hash is known of %zu file%s: only %s header%s checked", r.n_unknown,
                     r.n_unknown == 1 ? "" : "s", r.n_unknown == 1 ? "its" : "their",
                     r.n_unknown == 1 ? " was" : "s were");
    }
    qie_json_free(w.problems);
    free(dir);
    return st;
}
