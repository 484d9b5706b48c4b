#define _GNU_SOURCE
#include "cli/remote.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/strbuf.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/ui.h"
#include "service/master/parse.h"

#define BODY_MAX_BYTES (256u << 20)   /* the service has its own limit and says so */
#define ANSWER_MAX_BYTES (1u << 20)   /* of JSON */
#define RESULT_MAX_BYTES (256u << 20) /* of one picture */

/* ---------------------------------------------------------------- flags */

qie_status cli_remote_check_flags(const cli_values *values, qie_error *err) {
    static const cli_option_id ids[] = {
        OPT_MODEL,   OPT_DEVICE, OPT_PRECISION, OPT_THREADS, OPT_NICE,     OPT_MEMORY_LIMIT,
        OPT_BACKEND, OPT_NOISE,  OPT_POSITIONS, OPT_INJECT,  OPT_SCHEDULE, OPT_COLLECT_IMPORTANCE};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        QIE_FAIL_IF(cli_get(values, ids[i])->source == FROM_FLAG, QIE_E_USAGE, err, "--server",
                    "--%s has no place beside --server: the service decides that for itself",
                    CLI_OPTIONS[ids[i]].name);
    return QIE_OK;
}

/* ---------------------------------------------------------------- the form */

typedef struct form {
    qie_strbuf body;
    char boundary[40], type[96], key[40];
} form;

static void random_name(char *out, size_t cap, const char *prefix) {
    unsigned char bytes[12] = {0};
    ssize_t ignored = getrandom(bytes, sizeof bytes, 0);
    (void)ignored;
    int n = snprintf(out, cap, "%s", prefix);
    for (size_t i = 0; i < sizeof bytes && (size_t)n + 3 <= cap; i++)
        n += snprintf(out + n, cap - (size_t)n, "%02x", bytes[i]);
}

static void part(form *f, const char *name, const char *more) {
    qie_strbuf_printf(&f->body, "--%s\r\nContent-Disposition: form-data; name=\"%s\"%s\r\n\r\n",
                      f->boundary, name, more);
}

static void add_text(form *f, const char *name, const char *text) {
    part(f, name, "");
    qie_strbuf_puts(&f->body, text);
    qie_strbuf_puts(&f->body, "\r\n");
}

static void add_int(form *f, const char *name, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)value);
    add_text(f, name, text);
}

static void add_real(form *f, const char *name, double value) {
    char text[40];
    snprintf(text, sizeof text, "%.17g", value);
    add_text(f, name, text);
}

static const char *format_word(qie_image_format format) {
    return format == QIE_IMAGE_JPEG ? "jpeg" : format == QIE_IMAGE_WEBP ? "webp" : "png";
}

static void add_sizes(form *f, const qie_edit_options *o) {
    if (o->max_side > 0)
        add_int(f, "max_side", o->max_side);
    else if (o->max_side < 0)
        add_text(f, "max_side", "none");
    if (o->width)
        add_int(f, "width", o->width);
    if (o->height)
        add_int(f, "height", o->height);
    if (o->ref_area)
        add_int(f, "ref_area", o->ref_area);
    if (o->keep_size >= 0)
        add_text(f, "keep_size", o->keep_size ? "true" : "false");
}

/* By name: what lies in the service's folder of LoRAs. */
static void add_loras(form *f, const cli_request *r) {
    for (size_t i = 0; i < r->n_named_loras; i++) {
        const qie_lora_use *u = &r->loras.uses[i];
        part(f, "lora", "");
        qie_strbuf_printf(&f->body, "%s:%.17g\r\n", u->path, u->weight);
    }
}

static void add_fields(form *f, const cli_request *r) {
    const qie_edit_options *o = &r->options;
    add_text(f, "prompt", o->prompt);
    add_text(f, "negative_prompt", o->negative_prompt);
    if (r->seed_named)
        add_int(f, "seed", (int64_t)o->seed);
    if (r->force_seed)
        add_text(f, "force_seed", "true");
    if (o->num_inference_steps)
        add_int(f, "num_inference_steps", o->num_inference_steps);
    if (o->true_cfg_scale >= 0)
        add_real(f, "true_cfg_scale", o->true_cfg_scale);
    add_real(f, "guidance_scale", o->guidance_scale);
    add_int(f, "num_images", o->num_images);
    add_sizes(f, o);
    add_loras(f, r);
    if (r->cache_named)
        add_text(f, "cache", qie_cache_name(o->cache));
    if (r->output)
        add_text(f, "output_format", format_word(r->format));
    if (r->quality && r->format != QIE_IMAGE_PNG)
        add_int(f, "output_compression", r->quality);
    if (!r->metadata)
        add_text(f, "metadata", "false");
    if (r->preview)
        add_text(f, "preview", "true");
}

static qie_status add_pictures(form *f, const cli_request *r, qie_error *err) {
    for (size_t i = 0; i < r->n_paths; i++) {
        unsigned char *bytes = NULL;
        size_t n;
        QIE_TRY(cli_request_read_picture(r, i, &bytes, &n, err));
        part(f, "image", "; filename=\"picture\"");
        qie_strbuf_append(&f->body, bytes, n);
        qie_strbuf_puts(&f->body, "\r\n");
        free(bytes);
    }
    return QIE_OK;
}

static qie_status make_form(form *f, const cli_request *r, bool dry_run, qie_error *err) {
    qie_strbuf_init(&f->body, BODY_MAX_BYTES);
    random_name(f->boundary, sizeof f->boundary, "qwen-edit-");
    random_name(f->key, sizeof f->key, "cli-");
    snprintf(f->type, sizeof f->type, "multipart/form-data; boundary=%s", f->boundary);
    add_fields(f, r);
    if (dry_run)
        add_text(f, "dry_run", "true");
    else /* an answer that gets lost does not make a second job */
        add_text(f, "idempotency_key", f->key);
    QIE_TRY(add_pictures(f, r, err));
    qie_strbuf_printf(&f->body, "--%s--\r\n", f->boundary);
    QIE_FAIL_IF(f->body.failed, QIE_E_TOO_LARGE, err, "image",
                "the pictures are more than %u MB together", BODY_MAX_BYTES >> 20);
    return QIE_OK;
}

/* ---------------------------------------------------------------- the job */

typedef struct remote {
    cli_service *service;
    const cli_request *request;
    char job[64];
    double start_s;
    bool preview_failed;
    qie_json *result; /* of the completed job; owned */
    qie_status status;
    qie_error error; /* of one that did not complete */
} remote;

static qie_status post_form(cli_service *service, const form *f, qie_json **answer,
                            qie_error *err) {
    char *body = NULL;
    size_t n;
    cli_call call = {.path = "/v1/jobs",
                     .post = true,
                     .body = f->body.data,
                     .n_body = f->body.len,
                     .content_type = f->type,
                     .max_bytes = ANSWER_MAX_BYTES};
    QIE_TRY(cli_service_call(service, &call, &body, &n, err));
    qie_status st = qie_json_parse(body, n, "answer", answer, NULL);
    free(body);
    QIE_FAIL_IF(st != QIE_OK, QIE_E_NETWORK, err, "--server",
                "'%s' answers with something that is no JSON", cli_service_address(service));
    return QIE_OK;
}

static qie_status submit(remote *r, const form *f, qie_error *err) {
    qie_json *o = NULL;
    QIE_TRY(post_form(r->service, f, &o, err));
    const char *id = qie_json_string(qie_json_member(o, "id"), NULL);
    bool ok = id && strlen(id) < sizeof r->job &&
              strspn(id, "abcdefghijklmnopqrstuvwxyz"
                         "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                         "0123456789_-") == strlen(id);
    snprintf(r->job, sizeof r->job, "%s", ok ? id : "");
    qie_json_free(o);
    QIE_FAIL_IF(!ok, QIE_E_NETWORK, err, "--server", "'%s' accepts the edit without naming a job",
                cli_service_address(r->service));
    if (cli_ui_is_json()) {
        qie_json *start = qie_json_new_object();
        qie_json_put(start, "server", qie_json_new_string(cli_service_address(r->service)));
        qie_json_put(start, "job_id", qie_json_new_string(r->job));
        cli_event("start", start);
    } else
        cli_note("%s accepted the edit as %s", cli_service_address(r->service), r->job);
    return QIE_OK;
}

static double number_of(const qie_json *o, const char *key, double def) {
    const qie_json *v = qie_json_member(o, key);
    return qie_json_is_number(v) ? qie_json_number(v) : def;
}

static int int_of(const qie_json *o, const char *key) {
    double v = number_of(o, key, 0);
    return v >= 0 && v < 1e6 ? (int)v : 0;
}

static void show_progress(const remote *r, const qie_json *data) {
    const char *stage = qie_json_string(qie_json_member(data, "stage"), NULL);
    qie_progress p = {.stage = stage ? stage : "",
                      .step = int_of(data, "step"),
                      .total = int_of(data, "total"),
                      .i_image = int_of(data, "i_image"),
                      .n_images = int_of(data, "n_images"),
                      .elapsed_s = qie_now_s() - r->start_s,
                      .seconds_left = number_of(data, "eta_s", -1)};
    cli_progress(&p);
}

/* Jobs before this one as a stage of its own: step counts them. */
static void show_place(const remote *r, const qie_json *data) {
    qie_progress p = {.stage = "queue",
                      .step = int_of(data, "position"),
                      .elapsed_s = qie_now_s() - r->start_s,
                      .seconds_left = number_of(data, "eta_s", -1)};
    cli_progress(&p);
}

static void keep_preview(remote *r, const qie_json *data) {
    size_t n = 0, n_bytes = 0;
    const char *text = qie_json_string(qie_json_member(data, "b64_json"), &n);
    uint8_t *bytes = NULL;
    qie_image *image = NULL;
    qie_error e = {0};
    if (!r->request->preview || !text || !svc_base64_decode(text, n, &bytes, &n_bytes))
        return;
    qie_status st = qie_image_decode(bytes, n_bytes, NULL, &image, &e);
    if (st == QIE_OK)
        st = cli_write_picture(r->request->preview, image, r->request->preview_format, 0, NULL, &e);
    if (st != QIE_OK && !r->preview_failed && !cli_interrupted()) {
        r->preview_failed = true; /* a preview is no reason to lose the edit */
        cli_warn("preview: %s", e.message);
    }
    qie_image_destroy(image);
    free(bytes);
}

static qie_json *copy_of(const qie_json *v) {
    char *text = qie_json_text(v, 0);
    qie_json *copy = NULL;
    if (text && qie_json_parse(text, strlen(text), "result", &copy, NULL) != QIE_OK)
        copy = NULL;
    free(text);
    return copy;
}

static void end_badly(remote *r, const char *name, const qie_json *data) {
    if (!strcmp(name, "cancelled"))
        r->status = qie_fail(&r->error, QIE_E_CANCELLED, NULL, "the job was cancelled there");
    else if (!strcmp(name, "expired"))
        r->status = qie_fail(&r->error, QIE_E_GONE, NULL, "the result has expired");
    else
        r->status = cli_service_error(qie_json_member(data, "error"), 500, &r->error);
}

static bool on_event(void *arg, const char *name, const qie_json *data) {
    remote *r = arg;
    if (!strcmp(name, "queued"))
        show_place(r, data);
    else if (!strcmp(name, "progress"))
        show_progress(r, data);
    else if (!strcmp(name, "preview"))
        keep_preview(r, data);
    else if (!strcmp(name, "retrying")) {
        const char *reason = qie_json_string(qie_json_member(data, "reason"), NULL);
        cli_note("the service starts the edit again: %s", reason ? reason : "no reason given");
    } else if (!strcmp(name, "completed"))
        r->result = copy_of(qie_json_member(data, "result"));
    else if (!strcmp(name, "failed") || !strcmp(name, "cancelled") || !strcmp(name, "expired"))
        end_badly(r, name, data);
    else
        return false;
    return !strcmp(name, "completed") || r->status != QIE_OK;
}

/* ---------------------------------------------------------------- the results */

static qie_status fetch_one(remote *r, int i, cli_output *out, qie_error *err) {
    char path[160];
    snprintf(path, sizeof path, "/v1/jobs/%s/result?n=%d", r->job, i);
    cli_call call = {.path = path, .max_bytes = RESULT_MAX_BYTES};
    QIE_TRY(cli_service_call(r->service, &call, (char **)&out->bytes, &out->n, err));
    QIE_FAIL_IF(qie_image_sniff(out->bytes, out->n) != r->request->format, QIE_E_NETWORK, err,
                "--server", "the service answers with something that is no %s picture",
                format_word(r->request->format));
    out->path = cli_output_path(r->request->output, i, r->request->options.num_images);
    QIE_FAIL_IF(!out->path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}

typedef struct copying {
    qie_json *to;
} copying;

/* Where the service keeps its files is nobody's business. */
static bool copy_member(void *arg, const char *key, qie_json *v) {
    copying *c = arg;
    qie_json *copy = NULL;
    if (!strcmp(key, "files") || !strcmp(key, "warnings"))
        return true;
    if (qie_json_is_string(v))
        copy = qie_json_new_string(qie_json_string(v, NULL));
    else if (qie_json_is_bool(v))
        copy = qie_json_new_bool(qie_json_bool(v));
    else if (qie_json_is_integer(v))
        copy = qie_json_new_int(qie_json_integer(v));
    else if (qie_json_is_number(v))
        copy = qie_json_new_double(qie_json_number(v));
    else if (qie_json_is_object(v) || qie_json_is_array(v))
        copy = copy_of(v);
    if (copy)
        qie_json_put(c->to, key, copy);
    return true;
}

static qie_json *result_json(const remote *r, const cli_output *list, size_t n) {
    qie_json *o = qie_json_new_object();
    copying c = {o};
    cli_outputs_json(list, n, o);
    qie_json_each(r->result, copy_member, &c);
    qie_json_put(o, "warnings", cli_warnings_json());
    qie_json_put(o, "server", qie_json_new_string(cli_service_address(r->service)));
    qie_json_put(o, "job_id", qie_json_new_string(r->job));
    return o;
}

static void tell_warnings(const qie_json *list) {
    for (size_t i = 0; i < qie_json_size(list); i++) {
        const char *text = qie_json_string(qie_json_at(list, i), NULL);
        if (text)
            cli_warn("%s", text);
    }
}

static void tell_result(const remote *r, const cli_output *list) {
    const qie_json *o = r->result;
    const char *model = qie_json_string(qie_json_member(o, "model"), NULL),
               *precision = qie_json_string(qie_json_member(o, "precision"), NULL);
    char time[32], scale[64] = "no CFG";
    int steps = int_of(o, "num_inference_steps");
    if (qie_json_bool(qie_json_member(o, "cfg")))
        snprintf(scale, sizeof scale, "true CFG %g (two passes a step)",
                 number_of(o, "true_cfg_scale", 0));
    tell_warnings(qie_json_member(o, "warnings"));
    cli_note("%s, %s, %d step%s, %s, seed %lld", model ? model : "?", precision ? precision : "?",
             steps, steps == 1 ? "" : "s", scale,
             (long long)qie_json_integer(qie_json_member(o, "seed")));
    cli_note("wrote %s (%dx%d) in %s",
             r->request->options.num_images > 1 ? r->request->output : list[0].path,
             int_of(o, "width"), int_of(o, "height"),
             cli_duration(qie_now_s() - r->start_s, time, sizeof time));
}

static qie_status deliver(remote *r, bool paths, qie_json **result, qie_error *err) {
    cli_output list[16] = {{0}};
    size_t n = (size_t)r->request->options.num_images;
    qie_status st = QIE_OK;
    QIE_FAIL_IF(!qie_json_is_object(r->result), QIE_E_NETWORK, err, "--server",
                "the service ends job %s without a result", r->job);
    for (size_t i = 0; i < n && st == QIE_OK; i++)
        st = fetch_one(r, (int)i, &list[i], err);
    if (st == QIE_OK)
        st = cli_outputs_write(list, n, paths, err);
    if (st == QIE_OK) {
        tell_result(r, list);
        *result = result_json(r, list, n);
    }
    cli_outputs_release(list, n);
    return st;
}

/* ---------------------------------------------------------------- one edit */

static void cancel(const remote *r) {
    qie_error e = {0};
    if (!r->job[0])
        return;
    qie_status st = cli_service_cancel(r->service, r->job, &e);
    if (st == QIE_OK)
        cli_note("job %s is cancelled at the service", r->job);
    else if (st != QIE_E_CONFLICT) /* a conflict: it has ended meanwhile */
        cli_warn("job %s could not be cancelled: %s", r->job, e.message);
}

static qie_status run_job(remote *r, const form *f, bool paths, qie_json **result, qie_error *err) {
    QIE_TRY(submit(r, f, err));
    qie_status st = cli_service_follow(r->service, r->job, on_event, r, err);
    cli_progress_end();
    if (st == QIE_OK && r->status != QIE_OK) {
        st = r->status;
        if (err)
            *err = r->error;
    }
    if (st == QIE_OK)
        st = deliver(r, paths, result, err);
    if (st != QIE_OK && cli_interrupted()) {
        cancel(r);
        st = qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted");
    }
    return st;
}

static qie_status run_plan(const remote *r, const form *f, bool text, qie_json **result,
                           qie_error *err) {
    QIE_TRY(post_form(r->service, f, result, err));
    const qie_json *o = *result;
    tell_warnings(qie_json_member(o, "warnings"));
    if (!text)
        return QIE_OK;
    const char *model = qie_json_string(qie_json_member(o, "model"), NULL);
    printf("service    %s (%s)\n", cli_service_address(r->service), model ? model : "?");
    printf("result     %dx%d", int_of(o, "width"), int_of(o, "height"));
    if (int_of(o, "output_width") != int_of(o, "width") ||
        int_of(o, "output_height") != int_of(o, "height"))
        printf(", written as %dx%d", int_of(o, "output_width"), int_of(o, "output_height"));
    printf("\nsteps      %d, %s\n", int_of(o, "num_inference_steps"),
           qie_json_bool(qie_json_member(o, "cfg")) ? "each computed twice (guidance is on)"
                                                    : "each computed once (guidance is off)");
    printf("memory     %.1f MiB working\n", number_of(o, "working_bytes", 0) / 1048576.0);
    printf("queue      %d before this edit\n", int_of(o, "queue_position"));
    return QIE_OK;
}

qie_status cli_remote_run(cli_service *service, const cli_request *request, bool dry_run,
                          bool paths, qie_json **result, qie_error *err) {
    form f;
    remote r = {.service = service, .request = request, .start_s = qie_now_s()};
    *result = NULL;
    qie_status st = make_form(&f, request, dry_run, err);
    if (st == QIE_OK)
        st = dry_run ? run_plan(&r, &f, paths, result, err) : run_job(&r, &f, paths, result, err);
    qie_strbuf_release(&f.body);
    qie_json_free(r.result);
    return st;
}
