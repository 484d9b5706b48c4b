/* The commands list, rm and prune: the Hugging Face cache. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/ui.h"
#include "hub/cache.h"

static qie_status cache_dir(const cli_values *v, char **out, qie_error *err) {
    const char *named = cli_text(v, OPT_CACHE_DIR, NULL);
    if (!named)
        return qie_cache_dir(out, NULL, err);
    *out = strdup(named);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}

static void print_json(qie_json *o) {
    char *text = qie_json_text(o, 0);
    puts(text ? text : "{}");
    free(text);
    qie_json_free(o);
}

/* ------------------------------------------------------------------ list */

static qie_json *revision_json(const qie_cache_revision *r) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "commit", qie_json_new_string(r->commit));
    qie_json_put(o, "refs", qie_json_new_string(r->refs ? r->refs : ""));
    qie_json_put(o, "bytes", qie_json_new_int(r->bytes));
    qie_json_put(o, "files", qie_json_new_int(r->n_files));
    qie_json_put(o, "files_missing",
                 r->n_missing >= 0 ? qie_json_new_int(r->n_missing) : qie_json_new_null());
    qie_json_put(o, "complete", qie_json_new_bool(r->n_missing == 0 && !r->n_broken));
    qie_json_put(o, "modified", qie_json_new_int(r->modified));
    return o;
}

static qie_json *repo_json(const qie_cache_repo *r) {
    qie_json *o = qie_json_new_object(), *revisions = qie_json_new_array();
    for (size_t i = 0; i < r->n; i++)
        qie_json_push(revisions, revision_json(&r->revisions[i]));
    qie_json_put(o, "repo", qie_json_new_string(r->repo));
    qie_json_put(o, "dir", qie_json_new_string(r->dir));
    qie_json_put(o, "bytes", qie_json_new_int(r->bytes));
    qie_json_put(o, "bytes_partial", qie_json_new_int(r->incomplete_bytes));
    qie_json_put(o, "bytes_unused", qie_json_new_int(r->unused_bytes));
    qie_json_put(o, "revisions", revisions);
    return o;
}

static void print_repo(const qie_cache_repo *r) {
    printf("%-44s %9.2f GB\n", r->repo, (double)r->bytes / 1e9);
    for (size_t i = 0; i < r->n; i++) {
        const qie_cache_revision *v = &r->revisions[i];
        char when[32] = "", state[64] = "complete";
        time_t t = (time_t)v->modified;
        struct tm tm;
        if (v->modified && localtime_r(&t, &tm))
            strftime(when, sizeof when, "%Y-%m-%d", &tm);
        if (v->n_broken || v->n_missing > 0)
            snprintf(state, sizeof state, "%d file%s missing",
                     v->n_missing > 0 ? v->n_missing : v->n_broken,
                     (v->n_missing > 0 ? v->n_missing : v->n_broken) == 1 ? "" : "s");
        else if (v->n_missing < 0)
            snprintf(state, sizeof state, "a part, or no model of this program");
        printf("  %.12s  %9.2f GB  %-10s  %-12s  %s\n", v->commit, (double)v->bytes / 1e9, when,
               v->refs && *v->refs ? v->refs : "(detached)", state);
    }
    if (r->n_incomplete)
        printf(
            "  begun         %9.2f GB  in %d partial file%s: qwen-edit pull %s goes on with them\n",
            (double)r->incomplete_bytes / 1e9, r->n_incomplete, r->n_incomplete == 1 ? "" : "s",
            r->repo);
    if (r->n_unused)
        printf("  unused        %9.2f GB  in %d file%s: qwen-edit prune removes them\n",
               (double)r->unused_bytes / 1e9, r->n_unused, r->n_unused == 1 ? "" : "s");
}

qie_status cli_run_list(cli_values *v, qie_error *err) {
    char *cache;
    qie_cache_scan scan;
    QIE_FAIL_IF(v->n_args > 1, QIE_E_USAGE, err, "repository",
                "list takes one repository, '%s' is a second", v->args[1]);
    QIE_TRY(cache_dir(v, &cache, err));
    qie_status st = qie_cache_scan_read(cache, v->n_args ? v->args[0] : NULL, &scan, err);
    if (st == QIE_OK && cli_on(v, OPT_JSON)) {
        qie_json *o = qie_json_new_object(), *repos = qie_json_new_array();
        for (size_t i = 0; i < scan.n; i++)
            qie_json_push(repos, repo_json(&scan.repos[i]));
        qie_json_put(o, "cache", qie_json_new_string(cache));
        qie_json_put(o, "models", repos);
        print_json(o);
    } else if (st == QIE_OK) {
        for (size_t i = 0; i < scan.n; i++)
            print_repo(&scan.repos[i]);
        if (!scan.n)
            printf("no model%s%s in the cache %s\n", v->n_args ? " " : "s",
                   v->n_args ? v->args[0] : "", cache);
    }
    if (st == QIE_OK)
        qie_cache_scan_release(&scan);
    free(cache);
    return st;
}

/* ------------------------------------------------------------------ rm, prune */

typedef struct removing {
    bool dry, json, quiet;
} removing;

static void removed(void *arg, const char *path, int64_t bytes) {
    const removing *r = arg;
    if (r->dry && !r->json && !r->quiet && bytes > 0)
        printf("would remove %14lld  %s\n", (long long)bytes, path);
}

static void report(const removing *r, const qie_cache_removal *x) {
    if (r->json) {
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "dry_run", qie_json_new_bool(r->dry));
        qie_json_put(o, "bytes", qie_json_new_int(x->bytes));
        qie_json_put(o, "files", qie_json_new_int(x->n_files));
        qie_json_put(o, "revisions", qie_json_new_int(x->n_snapshots));
        qie_json_put(o, "partial", qie_json_new_int(x->n_partial));
        qie_json_put(o, "busy", qie_json_new_int(x->n_busy));
        print_json(o);
        return;
    }
    if (!r->quiet)
        printf("%s %.2f GB in %d file%s\n", r->dry ? "would free" : "freed", (double)x->bytes / 1e9,
               x->n_files, x->n_files == 1 ? "" : "s");
    if (x->n_busy)
        cli_note("%d not touched: in use by a pull that runs now", x->n_busy);
}

/* A question only where somebody can answer it. */
static qie_status confirm(const char *repo, const char *revision, const qie_cache_removal *x,
                          qie_error *err) {
    QIE_FAIL_IF(!isatty(STDIN_FILENO), QIE_E_USAGE, err, "--yes",
                "rm would free %.2f GB of %s: type it again with --yes", (double)x->bytes / 1e9,
                repo);
    fprintf(stderr, "Remove %s%s%s (%.2f GB)? [y/N] ", repo, revision ? " revision " : "",
            revision ? revision : "", (double)x->bytes / 1e9);
    char answer[16] = "";
    bool yes = fgets(answer, sizeof answer, stdin) && (answer[0] == 'y' || answer[0] == 'Y');
    QIE_FAIL_IF(!yes, QIE_E_CANCELLED, err, NULL, "nothing removed");
    return QIE_OK;
}

qie_status cli_run_rm(cli_values *v, qie_error *err) {
    char *cache;
    qie_cache_removal x;
    removing r = {cli_on(v, OPT_DRY_RUN), cli_on(v, OPT_JSON), cli_on(v, OPT_QUIET)};
    const char *revision = cli_text(v, OPT_REVISION, NULL);
    QIE_FAIL_IF(v->n_args != 1, QIE_E_USAGE, err, "repository",
                "rm needs the name of one model: qwen-edit list shows them");
    QIE_TRY(cache_dir(v, &cache, err));
    qie_status st = QIE_OK;
    if (!r.dry && !cli_on(v, OPT_YES)) {
        st = qie_cache_remove(cache, v->args[0], revision, true, NULL, NULL, &x, err);
        if (st == QIE_OK)
            st = confirm(v->args[0], revision, &x, err);
    }
    if (st == QIE_OK)
        st = qie_cache_remove(cache, v->args[0], revision, r.dry, removed, &r, &x, err);
    if (st == QIE_OK)
        report(&r, &x);
    free(cache);
    return st;
}

qie_status cli_run_prune(cli_values *v, qie_error *err) {
    char *cache;
    qie_cache_removal x;
    removing r = {cli_on(v, OPT_DRY_RUN), cli_on(v, OPT_JSON), cli_on(v, OPT_QUIET)};
    QIE_FAIL_IF(v->n_args, QIE_E_USAGE, err, "argument",
                "prune takes no argument; rm removes a model");
    QIE_TRY(cache_dir(v, &cache, err));
    qie_status st = qie_cache_prune(cache, cli_on(v, OPT_DETACHED), r.dry, removed, &r, &x, err);
    if (st == QIE_OK)
        report(&r, &x);
    free(cache);
    return st;
}
