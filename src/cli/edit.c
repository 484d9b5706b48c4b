/* The command edit: one edit, or a batch with one loading of the model. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "base/parallel.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/job.h"
#include "cli/line.h"
#include "cli/loras.h"
#include "cli/model_choice.h"
#include "cli/place.h"
#include "cli/remote.h"
#include "cli/ui.h"

/* A line may hold its pictures: what the service takes as one body. */
#define LINE_MAX_BYTES (96u << 20)

static void explain_environment(void) {
    static const char *const names[] = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"};
    for (size_t i = 0; i < 2; i++)
        if (getenv(names[i]))
            qie_log(QIE_LOG_INFO, "cli",
                    "%s is not needed: the memory of an edit is planned before its first step and "
                    "cannot fragment",
                    names[i]);
}

static void prepare_process(const cli_values *v) {
    if (cli_on(v, OPT_VERBOSE) && !getenv("QIE_LOG"))
        setenv("QIE_LOG", "info", 1);
    explain_environment();
    if (cli_is_set(v, OPT_NICE) && setpriority(PRIO_PROCESS, 0, (int)cli_number(v, OPT_NICE, 0)))
        cli_warn("the priority stays as it was: %s", strerror(errno));
    cli_interrupt_install();
}

static qie_engine_options engine_options(const cli_values *v, const char *model) {
    qie_engine_options o = qie_engine_options_default();
    int half = qie_cpu_count() / 2;
    o.model = model;
    cli_part_files(v, &o);
    o.precision = qie_precision_from_name(cli_text(v, OPT_PRECISION, "auto"));
    o.n_threads = (int)cli_number(v, OPT_THREADS, half > 1 ? half : 1);
    o.backend = cli_text(v, OPT_BACKEND, NULL);
    o.collect_importance = cli_is_set(v, OPT_COLLECT_IMPORTANCE);
    o.memory_limit_bytes = (int64_t)(cli_number(v, OPT_MEMORY_LIMIT, 0) * 1073741824.0);
    return o;
}

static void introduce(const qie_engine *engine, bool named) {
    qie_engine_info info;
    qie_engine_get_info(engine, &info);
    const char *about = cli_speaks_chinese() && info.about_zh ? info.about_zh : info.about_en;
    if (info.is_demo && !named)
        cli_note("no model named: this is the built-in demo model; --model or QWEN_EDIT_2511_DIR "
                 "names another");
    if (about)
        cli_note("%s", about);
    qie_log(QIE_LOG_INFO, "cli", "model '%s': %.3g parameters, %.2f GiB, %s, %s, %s, %d threads",
            info.model, (double)info.n_parameters, (double)info.weights_bytes / 1073741824.0,
            info.precision, info.backend, info.cpu_level, info.n_threads);
}

/* On a GPU the engine sees the chosen card and no other. */
static qie_status choose_device(const cli_values *v, const char *model, qie_engine_options *o,
                                qie_error *err) {
    qie_place *chosen = malloc(sizeof *chosen);
    QIE_FAIL_IF(!chosen, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_status st = cli_place(v, model, NULL, false, chosen, err);
    if (st == QIE_OK && chosen->n_slots) {
        setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
        setenv("CUDA_VISIBLE_DEVICES", chosen->slots[0].visible, 1);
        o->device = "cuda"; /* all that are visible now */
        o->gpu_offload_folder = getenv("QWEN_EDIT_OFFLOAD_FOLDER");
        o->gpu_headroom_bytes =
            (int64_t)(cli_number(v, OPT_HEADROOM, QIE_DEFAULT_HEADROOM_GIB) * 1073741824.0);
    }
    free(chosen);
    return st;
}

/* Where the edits are computed: in this process or at a service. */
typedef struct place {
    qie_engine *engine;
    cli_service *service;
} place;

static qie_status open_place(const cli_values *v, place *where, qie_error *err) {
    char *model = NULL;
    bool named;
    if (cli_is_set(v, OPT_SERVER)) {
        cli_interrupt_set_polled(true);
        return cli_service_open(v, &where->service, err);
    }
    QIE_TRY(cli_choose_model(v, &model, &named, err));
    qie_engine_options options = engine_options(v, model);
    qie_status st = choose_device(v, model, &options, err);
    if (st == QIE_OK)
        st = cli_open_with_loras(v, &options, &where->engine, err);
    if (st == QIE_OK) {
        cli_interrupt_set_engine(where->engine);
        introduce(where->engine, named);
    }
    free(model);
    return st;
}

static void print_json(qie_json *o) {
    char *text = o ? qie_json_text(o, 0) : NULL;
    if (text)
        puts(text);
    fflush(stdout);
    free(text);
}

static qie_status run_request(const place *where, const cli_values *v, cli_request *r,
                              qie_json **result, qie_error *err) {
    bool text = !cli_on(v, OPT_JSON), dry_run = cli_on(v, OPT_DRY_RUN);
    cli_ui_forget_warnings();
    if (where->service)
        return cli_remote_run(where->service, r, dry_run, text, result, err);
    cli_request_choose_seed(r);
    return dry_run ? cli_job_plan(where->engine, r, text, result, err)
                   : cli_job_run(where->engine, r, text, result, err);
}

/* Everything that can be wrong with the request is found before the model is opened. */
static qie_status run_single(cli_values *v, place *where, qie_error *err) {
    cli_request request;
    qie_json *result = NULL;
    QIE_TRY(cli_read_prompt_file(v, err));
    QIE_TRY(cli_request_read(v, &request, err));
    QIE_TRY(cli_request_check_outputs(&request, err));
    qie_status st = cli_is_set(v, OPT_SERVER) ? QIE_OK : cli_request_load(&request, err);
    if (st == QIE_OK)
        st = open_place(v, where, err);
    if (st == QIE_OK)
        st = run_request(where, v, &request, &result, err);
    if (st == QIE_OK && cli_on(v, OPT_JSON))
        print_json(result);
    qie_json_free(result);
    cli_request_release(&request);
    return st;
}

/* ---------------------------------------------------------------- batch */

static qie_status run_line(const cli_values *base, const place *where, const char *text, size_t n,
                           qie_json **result, qie_error *err) {
    cli_values v = {.parent = base};
    cli_request request = {0};
    cli_line line = {.n_fds = 0};
    qie_json *object = NULL;
    qie_status st;
    QIE_TRY(qie_json_parse(text, n, "the line", &object, err));
    QIE_TRY_GOTO(cli_line_parse(&line, &v, object, err));
    QIE_TRY_GOTO(cli_request_read(&v, &request, err));
    QIE_TRY_GOTO(cli_request_check_outputs(&request, err));
    if (where->engine)
        QIE_TRY_GOTO(cli_request_load(&request, err));
    QIE_TRY_GOTO(run_request(where, &v, &request, result, err));
fail:
    cli_request_release(&request);
    cli_values_release(&v);
    cli_line_release(&line);
    qie_json_free(object);
    return st;
}

/* {"line": n, ...result} or {"line": n, "error": {...}} */
static void tell_line(int line, qie_json *result, const qie_error *error) {
    qie_json *o = result ? result : qie_json_new_object();
    qie_json_put(o, "line", qie_json_new_int(line));
    if (!result)
        qie_json_put(o, "error", cli_error_json(error));
    print_json(o);
    if (!result)
        qie_json_free(o);
}

typedef struct batch {
    FILE *file;
    int line, n_done, n_failed;
    qie_status first_failure;
} batch;

static void finish_line(batch *b, bool json, qie_status st, qie_json *result,
                        const qie_error *error) {
    b->n_done += st == QIE_OK;
    b->n_failed += st != QIE_OK;
    if (st != QIE_OK && b->first_failure == QIE_OK)
        b->first_failure = st;
    if (st != QIE_OK)
        cli_report(error);
    if (json)
        tell_line(b->line, result, error);
}

static qie_status run_lines(const cli_values *v, const place *where, batch *b, qie_error *err) {
    char *text = NULL;
    size_t cap = 0;
    ssize_t n;
    qie_status st = QIE_OK;
    while (!cli_interrupted() && (n = getline(&text, &cap, b->file)) >= 0) {
        b->line++;
        if (text[strspn(text, " \t\r\n")] == 0)
            continue;
        cli_ui_set_line(b->line);
        qie_json *result = NULL;
        qie_error line_error = {0};
        qie_status line_st =
            (size_t)n > LINE_MAX_BYTES
                ? qie_fail(&line_error, QIE_E_TOO_LARGE, "line",
                           "the line has %zd bytes, the limit is %u", n, LINE_MAX_BYTES)
                : run_line(v, where, text, (size_t)n, &result, &line_error);
        finish_line(b, cli_on(v, OPT_JSON), line_st, result, &line_error);
        qie_json_free(result);
        cli_ui_set_line(0);
    }
    free(text);
    if (cli_interrupted())
        st = qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted; line %d was the last one read",
                      b->line);
    else if (ferror(b->file))
        st = qie_fail(err, QIE_E_IO, "--batch", "cannot read the batch file: %s", strerror(errno));
    return st;
}

static qie_status check_batch_flags(const cli_values *v, qie_error *err) {
    QIE_FAIL_IF(cli_get(v, OPT_OUTPUT)->source == FROM_FLAG, QIE_E_USAGE, err, "--output",
                "--output has no place beside --batch: each line names its own output_path");
    QIE_FAIL_IF(cli_get(v, OPT_PREVIEW)->source == FROM_FLAG, QIE_E_USAGE, err, "--preview",
                "--preview has no place beside --batch: a line may name its own preview");
    return QIE_OK;
}

static qie_status run_batch(cli_values *v, place *where, qie_error *err) {
    const char *path = cli_text(v, OPT_BATCH, NULL);
    QIE_TRY(check_batch_flags(v, err));
    QIE_TRY(cli_read_prompt_file(v, err));
    batch b = {.file = strcmp(path, "-") ? fopen(path, "re") : stdin};
    QIE_FAIL_IF(!b.file, errno == ENOENT ? QIE_E_NOT_FOUND : QIE_E_IO, err, "--batch",
                "cannot open '%s': %s", path, strerror(errno));
    qie_status st = open_place(v, where, err);
    if (st == QIE_OK)
        st = run_lines(v, where, &b, err);
    if (b.file != stdin)
        fclose(b.file);
    if (b.n_done + b.n_failed == 0 && st == QIE_OK)
        return qie_fail(err, QIE_E_INVALID, "--batch", "'%s' holds no line with an edit", path);
    cli_note("%d edit%s done, %d failed", b.n_done, b.n_done == 1 ? "" : "s", b.n_failed);
    if (st == QIE_OK && b.first_failure != QIE_OK) {
        /* Reported with its line already: only the exit code is left to tell. */
        qie_error_clear(err);
        return b.first_failure;
    }
    return st;
}

static qie_status check_place(const cli_values *v, qie_error *err) {
    static const cli_option_id keys[] = {OPT_API_KEY, OPT_API_KEY_FILE};
    const char *importance = cli_text(v, OPT_COLLECT_IMPORTANCE, NULL);
    QIE_FAIL_IF(importance && cli_on(v, OPT_DRY_RUN), QIE_E_USAGE, err, "--collect-importance",
                "--collect-importance needs an edit that runs, not --dry-run");
    if (importance)
        QIE_TRY(qie_file_check_writable(importance, err));
    if (cli_is_set(v, OPT_SERVER))
        return cli_remote_check_flags(v, err);
    for (size_t i = 0; i < 2; i++)
        QIE_FAIL_IF(cli_get(v, keys[i])->source == FROM_FLAG, QIE_E_USAGE, err, "--server",
                    "--%s has no use without --server URL", CLI_OPTIONS[keys[i]].name);
    return QIE_OK;
}

qie_status cli_run_edit(cli_values *values, qie_error *err) {
    place where = {0};
    qie_status st;
    QIE_FAIL_IF(
        values->n_args > 0, QIE_E_USAGE, err, NULL,
        "unexpected argument '%s': pictures are given with -i, the instruction with -p, quoted",
        values->args[0]);
    prepare_process(values);
    st = check_place(values, err);
    if (st == QIE_OK)
        st = cli_is_set(values, OPT_BATCH) ? run_batch(values, &where, err)
                                           : run_single(values, &where, err);
    cli_progress_end();
    cli_interrupt_set_engine(NULL);
    if (st == QIE_OK && where.engine && cli_is_set(values, OPT_COLLECT_IMPORTANCE))
        st = qie_engine_save_importance(where.engine, cli_text(values, OPT_COLLECT_IMPORTANCE, ""),
                                        err);
    qie_engine_close(where.engine);
    cli_service_close(where.service);
    return st;
}
