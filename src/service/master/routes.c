/* What is served where, who may ask, and the answers that need no job to run. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "base/hash.h"
#include "base/strbuf.h"
#include "service/master/log.h"
#include "service/master/loras.h"
#include "service/master/master.h"
#include "service/master/page.h"

#define OPEN 1u /* without a key */

typedef void (*handler)(svc_master *m, svc_call *call);
typedef struct route {
    const char *method, *pattern; /* "{}" stands for one part */
    handler fn;
    unsigned flags;
    const char *label; /* in metrics */
} route;

double svc_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---------------------------------------------------------------- answers */

void svc_reply_json(svc_call *call, int status, qie_json *take) {
    char *text = qie_json_text(take, 0);
    qie_json_free(take);
    svc_call_reply(call, status, "application/json", text ? text : "{}", text ? strlen(text) : 2,
                   false);
    free(text);
}

qie_json *svc_error_json(const qie_error *e) {
    qie_json *o = qie_json_new_object();
    qie_error clean = *e; /* it may quote a client's bytes, and JSON is UTF-8 */
    svc_text_clean(clean.message, sizeof clean.message);
    svc_text_clean(clean.param, sizeof clean.param);
    qie_json_put(o, "message", qie_json_new_string(clean.message));
    qie_json_put(o, "type", qie_json_new_string(qie_status_name(e->status)));
    qie_json_put(o, "param",
                 clean.param[0] ? qie_json_new_string(clean.param) : qie_json_new_null());
    qie_json_put(o, "code", qie_json_new_int(qie_status_http(e->status)));
    return o;
}

void svc_reply_error(svc_call *call, int status, const qie_error *e) {
    qie_json *o = qie_json_new_object(), *inner = svc_error_json(e);
    if (!status)
        status = qie_status_http(e->status);
    qie_json_put(inner, "code", qie_json_new_int(status));
    qie_json_put(o, "error", inner);
    svc_reply_json(call, status, o);
}

__attribute__((format(printf, 5, 6))) static void fail(svc_call *call, int status, qie_status st,
                                                       const char *param, const char *fmt, ...) {
    qie_error e;
    va_list ap;
    va_start(ap, fmt);
    qie_fail_v(&e, st, param, fmt, ap);
    va_end(ap);
    svc_reply_error(call, status, &e);
}

void svc_note_error(svc_master *m, const char *text) {
    if (strcmp(m->last_error, text))
        svc_log(QIE_LOG_ERROR, "error", NULL, "%s", text);
    snprintf(m->last_error, sizeof m->last_error, "%s", text);
    m->last_error_at = svc_clock();
}

/* ---------------------------------------------------------------- health, models, metrics */

static const char *health_of(const svc_master *m, int ready) {
    bool loading = false, failed = false;
    for (int i = 0; i < m->n_workers; i++) {
        loading = loading || m->workers[i].state <= SVC_W_LOADING;
        failed = failed || m->workers[i].state == SVC_W_FAILED;
    }
    if (!ready)
        return loading && !failed && m->workers[0].restarts == 0 ? "starting" : "down";
    return ready < m->n_workers || qie_now_s() < m->storage_broken_until_s ? "degraded" : "ok";
}

static void health(svc_master *m, svc_call *call) {
    int ready = svc_workers_ready(m);
    qie_json *o = qie_json_new_object(), *q = qie_json_new_object();
    qie_json_put(o, "status", qie_json_new_string(health_of(m, ready)));
    qie_json_put(o, "version", qie_json_new_string(m->o.version));
    qie_json_put(o, "model",
                 m->has_model ? qie_json_new_string(m->model.name) : qie_json_new_null());
    qie_json_put(o, "model_revision",
                 *m->o.model_revision ? qie_json_new_string(m->o.model_revision)
                                      : qie_json_new_null());
    qie_json_put(o, "precision",
                 m->has_model ? qie_json_new_string(m->model.precision) : qie_json_new_null());
    qie_json_put(o, "uptime_s", qie_json_new_double(qie_now_s() - m->start_s));
    qie_json_put(q, "depth", qie_json_new_int(m->n_queued));
    qie_json_put(q, "capacity", qie_json_new_int(m->o.queue_size));
    qie_json_put(q, "oldest_s", qie_json_new_double(svc_jobs_oldest(m)));
    qie_json_put(o, "queue", q);
    qie_json_put(o, "workers", svc_workers_json(m));
    qie_json_put(o, "last_error",
                 m->last_error[0] ? qie_json_new_string(m->last_error) : qie_json_new_null());
    qie_json_put(o, "last_error_at",
                 m->last_error[0] ? qie_json_new_int((int64_t)m->last_error_at)
                                  : qie_json_new_null());
    svc_call_set_header(call, "Cache-Control", "no-store");
    if (!ready)
        svc_call_set_header(call, "Retry-After", "5");
    svc_reply_json(call, ready ? 200 : 503, o);
}

static void live(svc_master *m, svc_call *call) {
    qie_json *o = qie_json_new_object();
    (void)m;
    qie_json_put(o, "status", qie_json_new_string("live"));
    svc_reply_json(call, 200, o);
}

static void ready(svc_master *m, svc_call *call) {
    bool ok = svc_workers_ready(m) > 0;
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "status", qie_json_new_string(ok ? "ready" : "not ready"));
    if (!ok)
        svc_call_set_header(call, "Retry-After", "5");
    svc_reply_json(call, ok ? 200 : 503, o);
}

static qie_json *range(double a, double b) {
    qie_json *r = qie_json_new_array();
    qie_json_push(r, qie_json_new_double(a));
    qie_json_push(r, qie_json_new_double(b));
    return r;
}

static qie_json *model_json(const svc_master *m) {
    const svc_model_info *i = &m->model;
    qie_json *o = qie_json_new_object(), *d = qie_json_new_object(), *l = qie_json_new_object(),
             *about = qie_json_new_object();
    qie_json_put(o, "id", qie_json_new_string(m->has_model ? i->name : "loading"));
    qie_json_put(o, "object", qie_json_new_string("model"));
    qie_json_put(o, "created", qie_json_new_int((int64_t)m->start_at));
    qie_json_put(o, "owned_by", qie_json_new_string("qwen-edit"));
    qie_json_put(o, "precision", qie_json_new_string(i->precision));
    if (m->has_model) {
        qie_json_put(d, "num_inference_steps", qie_json_new_int(i->num_inference_steps));
        qie_json_put(d, "true_cfg_scale", qie_json_new_double(i->true_cfg_scale));
        qie_json_put(d, "guidance_scale", qie_json_new_double(1));
        qie_json_put(d, "cache", qie_json_new_string(qie_cache_name(m->o.cache)));
        qie_json_put(d, "negative_prompt", qie_json_new_string(" "));
        qie_json_put(d, "max_side",
                     i->max_side ? qie_json_new_int(i->max_side) : qie_json_new_null());
        qie_json_put(about, "en", qie_json_new_string(i->about_en));
        qie_json_put(about, "zh", qie_json_new_string(i->about_zh));
    }
    qie_json_put(l, "max_images", qie_json_new_int(m->o.max_images));
    qie_json_put(l, "max_body_bytes", qie_json_new_int(64 << 20));
    qie_json_put(l, "max_prompt_chars", qie_json_new_int(SVC_MAX_PROMPT_CHARS));
    qie_json_put(l, "num_inference_steps", range(1, 200));
    qie_json_put(l, "true_cfg_scale", range(0, 20));
    qie_json_put(l, "guidance_scale", range(0, 1000));
    qie_json_put(l, "max_side", range(64, 4096));
    qie_json_put(o, "defaults", d);
    qie_json_put(o, "limits", l);
    qie_json_put(o, "loras", svc_loras_json(m->lora_presets));
    qie_json_put(o, "about", about);
    return o;
}

static void models(svc_master *m, svc_call *call) {
    qie_json *o = qie_json_new_object(), *a = qie_json_new_array();
    qie_json_push(a, model_json(m));
    qie_json_put(o, "object", qie_json_new_string("list"));
    qie_json_put(o, "data", a);
    svc_reply_json(call, 200, o);
}

static void model(svc_master *m, svc_call *call) {
    if (!m->has_model || strcmp(call->args[0], m->model.name))
        fail(call, 404, QIE_E_NOT_FOUND, NULL, "there is no model '%.60s'", call->args[0]);
    else
        svc_reply_json(call, 200, model_json(m));
}

/* ---------------------------------------------------------------- files inside the program */

static const char *type_of(const char *name) {
    static const char *const types[][2] = {{".html", "text/html; charset=utf-8"},
                                           {".css", "text/css; charset=utf-8"},
                                           {".js", "text/javascript; charset=utf-8"},
                                           {".json", "application/json"},
                                           {".svg", "image/svg+xml"},
                                           {".png", "image/png"}};
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; dot && i < sizeof types / sizeof *types; i++)
        if (!strcmp(dot, types[i][0]))
            return types[i][1];
    return "application/octet-stream";
}

static void send_file(svc_call *call, const char *name) {
    const svc_page_file *f = svc_page_files;
    while (f->name && strcmp(f->name, name))
        f++;
    if (!f->name) {
        fail(call, 404, QIE_E_NOT_FOUND, NULL, "there is nothing at this path");
        return;
    }
    svc_call_set_header(
        call, "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
    svc_call_set_header(call, "Referrer-Policy", "no-referrer");
    svc_call_set_header(call, "Cache-Control", "no-cache");
    svc_call_reply(call, 200, type_of(name), f->data, (size_t)(f->end - f->data), false);
}

static void page(svc_master *m, svc_call *call) {
    (void)m;
    send_file(call, "index.html");
}

static void asset(svc_master *m, svc_call *call) {
    (void)m;
    send_file(call, strcmp(call->args[0], "index.html") ? call->args[0] : "");
}

static void openapi(svc_master *m, svc_call *call) {
    (void)m;
    send_file(call, "openapi.json");
}

/* ---------------------------------------------------------------- jobs */

/* A job as its row and, while it lives, its place in memory. */
typedef struct found {
    svc_job *job; /* NULL when ended */
    svc_row row;  /* owned when job is NULL */
} found;

static const svc_row *row_of(const found *f) {
    return f->job ? &f->job->row : &f->row;
}

static void release(found *f) {
    if (!f->job)
        svc_row_release(&f->row);
}

/* Answers itself when there is none or it is another client's. */
static bool find(svc_master *m, svc_call *call, found *f) {
    memset(f, 0, sizeof *f);
    f->job = svc_job_find(m, call->args[0]);
    if (f->job && !f->job->accepted)
        f->job = NULL;
    if (!f->job && !svc_db_find(m->db, call->args[0], &f->row)) {
        fail(call, 404, QIE_E_NOT_FOUND, NULL, "there is no job '%.60s'", call->args[0]);
        return false;
    }
    if (strcmp(row_of(f)->client, call->client)) {
        fail(call, 403, QIE_E_DENIED, NULL, "the job belongs to another client");
        release(f);
        return false;
    }
    return true;
}

static qie_json *parsed(const char *text) {
    qie_json *o = NULL;
    if (text)
        qie_json_parse(text, strlen(text), "text", &o, NULL);
    return o;
}

static qie_json *seconds(double t) {
    return t > 0 ? qie_json_new_int((int64_t)t) : qie_json_new_null();
}

static qie_json *job_json(svc_master *m, const svc_job *job, const svc_row *row) {
    char url[128];
    qie_json *o = qie_json_new_object();
    /* The end is told when it is in the file. */
    svc_status status = job && job->finishing ? SVC_RUNNING : row->status;
    qie_json_put(o, "id", qie_json_new_string(row->id));
    qie_json_put(o, "status", qie_json_new_string(svc_status_name(status)));
    qie_json_put(o, "priority", qie_json_new_int(row->priority));
    qie_json_put(o, "attempts", qie_json_new_int(row->attempts));
    qie_json_put(o, "created_at", seconds(row->created));
    qie_json_put(o, "started_at", seconds(row->started));
    qie_json_put(o, "finished_at",
                 status == SVC_RUNNING ? qie_json_new_null() : seconds(row->finished));
    qie_json_put(o, "prompt", qie_json_new_string(row->prompt));
    if (status == SVC_QUEUED && job) {
        int position = svc_job_position(m, job);
        double eta = svc_job_eta(m, position);
        qie_json_put(o, "queue_position", qie_json_new_int(position));
        qie_json_put(o, "eta_s", eta < 0 ? qie_json_new_null() : qie_json_new_double(eta));
    }
    if (status == SVC_RUNNING && job) {
        qie_json *p = qie_json_new_object();
        qie_json_put(p, "stage", qie_json_new_string(job->stage));
        qie_json_put(p, "step", qie_json_new_int(job->step));
        qie_json_put(p, "total", qie_json_new_int(job->total));
        qie_json_put(p, "eta_s",
                     job->seconds_left < 0 ? qie_json_new_null()
                                           : qie_json_new_double(job->seconds_left));
        qie_json_put(o, "progress", p);
    }
    if (status == SVC_COMPLETED) {
        qie_json_put(o, "result", parsed(row->result));
        snprintf(url, sizeof url, "/v1/jobs/%s/result", row->id);
        qie_json_put(o, "result_url", qie_json_new_string(url));
    }
    if (status == SVC_FAILED || status == SVC_CANCELLED)
        qie_json_put(o, "error", parsed(row->error));
    return o;
}

static void get_job(svc_master *m, svc_call *call) {
    found f;
    if (!find(m, call, &f))
        return;
    svc_reply_json(call, 200, job_json(m, f.job, row_of(&f)));
    release(&f);
}

typedef struct listing {
    svc_master *m;
    qie_json *list;
    char last[SVC_ID_BYTES];
    int n, limit;
    bool more;
} listing;

static bool add_row(void *arg, const svc_row *row) {
    listing *l = arg;
    if (l->n == l->limit) {
        l->more = true;
        return false;
    }
    l->n++;
    qie_json_push(l->list, job_json(l->m, svc_job_find(l->m, row->id), row));
    snprintf(l->last, sizeof l->last, "%s", row->id);
    return true;
}

/* 1..200 in plain digits, else 0. */
static int small_number(const char *text) {
    size_t n = strlen(text);
    if (n < 1 || n > 3 || strspn(text, "0123456789") != n)
        return 0;
    long v = strtol(text, NULL, 10);
    return v <= 200 ? (int)v : 0;
}

static void list_jobs(svc_master *m, svc_call *call) {
    static const char *const known[] = {"status", "limit", "after", NULL};
    const char *status = svc_call_query(call, "status"), *limit = svc_call_query(call, "limit"),
               *after = svc_call_query(call, "after"), *other = svc_call_unknown_query(call, known);
    listing l = {.m = m, .limit = 50};
    int wanted = -1;
    int64_t seq = 0;
    svc_row row;
    if (other) {
        fail(call, 422, QIE_E_INVALID, other, "there is no parameter '%.60s'", other);
        return;
    }
    if (status && (wanted = svc_status_find(status)) < 0) {
        fail(call, 422, QIE_E_INVALID, "status",
             "'status' is none of queued, running, completed, failed, cancelled, expired");
        return;
    }
    if (limit && (l.limit = small_number(limit)) < 1) {
        fail(call, 422, QIE_E_INVALID, "limit", "'limit' must be within 1..200");
        return;
    }
    if (after && !svc_db_find(m->db, after, &row)) {
        fail(call, 422, QIE_E_INVALID, "after", "'after' names no job");
        return;
    }
    if (after) {
        seq = row.seq;
        svc_row_release(&row);
    }
    l.list = qie_json_new_array();
    svc_db_each(m->db, call->client, wanted, seq, l.limit + 1, add_row, &l);
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "object", qie_json_new_string("list"));
    qie_json_put(o, "data", l.list);
    qie_json_put(o, "has_more", qie_json_new_bool(l.more));
    qie_json_put(o, "next", l.more ? qie_json_new_string(l.last) : qie_json_new_null());
    svc_reply_json(call, 200, o);
}

/* One of the names in a JSON array, by the index in a text. */
static bool index_of(const char *text, size_t n, size_t *i) {
    char *end;
    errno = 0;
    unsigned long v = strtoul(text, &end, 10);
    *i = v;
    return *text >= '0' && *text <= '9' && !*end && !errno && v < n;
}

static void send_stored(svc_master *m, svc_call *call, const char *name, const char *type) {
    int fd = name ? svc_store_read(m->store, name) : -1;
    int64_t n = fd >= 0 ? svc_file_size(fd) : -1;
    if (n < 0) {
        if (fd >= 0)
            close(fd);
        fail(call, 410, QIE_E_GONE, NULL, "the picture is no longer kept");
        return;
    }
    svc_call_set_header(call, "Cache-Control", "private, no-cache");
    svc_call_set_header(call, "Content-Security-Policy", "default-src 'none'");
    svc_call_reply_file(call, 200, type, fd, (size_t)n);
}

static void get_result(svc_master *m, svc_call *call) {
    found f;
    const char *which = svc_call_query(call, "n");
    size_t i = 0;
    if (!find(m, call, &f))
        return;
    const svc_row *row = row_of(&f);
    svc_status status = f.job && f.job->finishing ? SVC_RUNNING : row->status;
    if (status == SVC_EXPIRED)
        fail(call, 410, QIE_E_GONE, NULL, "the result has expired");
    else if (status != SVC_COMPLETED)
        fail(call, 409, QIE_E_CONFLICT, NULL, "the job is %s: there is no result",
             svc_status_name(status));
    else {
        qie_json *result = parsed(row->result), *params = parsed(row->params);
        const qie_json *files = qie_json_member(result, "files");
        if (which && !index_of(which, qie_json_size(files), &i))
            fail(call, 404, QIE_E_NOT_FOUND, "n", "there is no picture of that number");
        else
            send_stored(m, call,
                        qie_json_string(qie_json_member(qie_json_at(files, i), "file"), NULL),
                        svc_format_mime((int)qie_json_integer(qie_json_member(params, "format"))));
        qie_json_free(result);
        qie_json_free(params);
    }
    release(&f);
}

static const char *sniffed(svc_master *m, const char *name) {
    unsigned char head[16] = {0};
    int fd = svc_store_read(m->store, name);
    ssize_t n = fd >= 0 ? read(fd, head, sizeof head) : 0;
    if (fd >= 0)
        close(fd);
    return svc_format_mime((int)qie_image_sniff(head, n > 0 ? (size_t)n : 0));
}

static void get_input(svc_master *m, svc_call *call) {
    found f;
    size_t i;
    if (!find(m, call, &f))
        return;
    qie_json *inputs = parsed(row_of(&f)->inputs);
    if (!index_of(call->args[1], qie_json_size(inputs), &i))
        fail(call, 404, QIE_E_NOT_FOUND, NULL, "there is no picture of that number");
    else {
        const char *name = qie_json_string(qie_json_at(inputs, i), NULL);
        send_stored(m, call, name, name ? sniffed(m, name) : "");
    }
    qie_json_free(inputs);
    release(&f);
}

static void cancel_job(svc_master *m, svc_call *call) {
    found f;
    if (!find(m, call, &f))
        return;
    if (!f.job || !svc_job_cancel(m, f.job))
        fail(call, 409, QIE_E_CONFLICT, NULL, "the job is %s and cannot be cancelled",
             f.job ? "about to end" : svc_status_name(f.row.status));
    else {
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "id", qie_json_new_string(call->args[0]));
        qie_json_put(o, "status", qie_json_new_string("cancelling"));
        svc_reply_json(call, 202, o);
    }
    release(&f);
}

typedef struct deleting {
    svc_write write; /* first */
    svc_call *call;
} deleting;

static void deletion_gone(svc_call *call) {
    ((deleting *)call->state)->call = NULL;
}

static void deleted(svc_task *t) {
    deleting *d = (deleting *)(void *)t;
    if (d->call) {
        d->call->on_gone = NULL;
        if (d->write.status == QIE_OK)
            svc_call_reply(d->call, 204, NULL, "", 0, false);
        else
            svc_reply_error(d->call, 507, &d->write.error);
    }
    free(d);
}

static void delete_job(svc_master *m, svc_call *call) {
    found f;
    if (!find(m, call, &f))
        return;
    if (f.job) {
        fail(call, 409, QIE_E_CONFLICT, NULL, "the job is not over: cancel it first");
        return;
    }
    deleting *d = calloc(1, sizeof *d);
    if (d) {
        d->write.kind = SVC_WRITE_DELETE;
        d->write.task.done = deleted;
        memcpy(d->write.row.id, f.row.id, sizeof f.row.id);
        d->call = call;
        call->state = d;
        call->on_gone = deletion_gone;
        svc_db_write(m->db, &d->write);
    }
    release(&f);
}

/* ---------------------------------------------------------------- events */

typedef struct stream {
    svc_listener listener; /* first */
    svc_call *call;
} stream;

static bool is_end(const char *name) {
    return !strcmp(name, "completed") || !strcmp(name, "failed") || !strcmp(name, "cancelled");
}

/* To a reader that is too slow everything is dropped but the end. */
static void send_event(svc_call *call, const svc_event *e) {
    qie_strbuf b;
    qie_strbuf_init(&b, 8u << 20);
    qie_strbuf_printf(&b, "id: %lld\nevent: %s\ndata: ", (long long)e->id, e->name);
    qie_strbuf_puts(&b, e->data);
    qie_strbuf_puts(&b, "\n\n");
    if (!b.failed)
        svc_call_send(call, b.data, b.len, !is_end(e->name));
    qie_strbuf_release(&b);
}

static void stream_gone(svc_call *call) {
    stream *s = call->state;
    svc_job_unlisten(&s->listener);
    free(s);
    call->state = NULL;
}

static void on_event(svc_listener *l, svc_job *job, const svc_event *e) {
    stream *s = (stream *)(void *)l;
    (void)job;
    send_event(s->call, e);
    if (is_end(e->name)) {
        svc_call_end(s->call);
        svc_job_unlisten(l);
    }
}

/* An ended job has one event left: its end. */
static void stream_end(svc_call *call, const svc_row *row) {
    qie_json *o = qie_json_new_object();
    const char *name = svc_status_name(row->status);
    qie_json_put(o, "id", qie_json_new_string(row->id));
    qie_json_put(o, "status", qie_json_new_string(name));
    if (row->result)
        qie_json_put(o, "result", parsed(row->result));
    if (row->error)
        qie_json_put(o, "error", parsed(row->error));
    svc_event e = {.id = SVC_MAX_SEED, .name = name, .data = qie_json_text(o, 0)};
    qie_json_free(o);
    svc_call_stream(call, "text/event-stream");
    if (e.data)
        send_event(call, &e);
    free(e.data);
    svc_call_end(call);
}

static void events(svc_master *m, svc_call *call) {
    found f;
    if (!find(m, call, &f))
        return;
    if (!f.job) {
        stream_end(call, &f.row);
        release(&f);
        return;
    }
    stream *s = calloc(1, sizeof *s);
    if (!s)
        return;
    const char *last = svc_call_header(call, "Last-Event-ID");
    int64_t seen = last ? strtoll(last, NULL, 10) : 0;
    if (seen > f.job->next_event) /* of another life of the service */
        seen = 0;
    s->call = call;
    s->listener.fn = on_event;
    s->listener.wants_previews = s->listener.wants_places = true;
    svc_job_tell_place(m, f.job);
    call->state = s;
    call->on_gone = stream_gone;
    svc_call_stream(call, "text/event-stream");
    svc_call_send(call, "retry: 1000\n\n", 13, true);
    for (int i = 0; i < f.job->n_events; i++)
        if (f.job->events[i].id > seen)
            send_event(call, &f.job->events[i]);
    svc_job_listen(f.job, &s->listener);
}

void svc_streams_stop(svc_master *m) {
    for (svc_job *j = m->jobs; j; j = j->next)
        for (svc_listener *l = j->listeners; l; l = l->next)
            if (l->fn == on_event)
                svc_call_end(((stream *)(void *)l)->call);
}

void svc_streams_tick(svc_master *m) {
    for (svc_job *j = m->jobs; j; j = j->next)
        for (svc_listener *l = j->listeners; l; l = l->next)
            if (l->fn == on_event)
                svc_call_send(((stream *)(void *)l)->call, ": wait\n\n", 8, true);
}

/* ---------------------------------------------------------------- the table */

static void edit(svc_master *m, svc_call *call) {
    svc_submit(m, call, SVC_EDIT);
}
static void job(svc_master *m, svc_call *call) {
    svc_submit(m, call, SVC_JOB);
}
static void openai_edit(svc_master *m, svc_call *call) {
    svc_submit(m, call, SVC_OPENAI);
}

static const route ROUTES[] = {
    {"GET", "/", page, OPEN, "/"},
    {"GET", "/assets/{}", asset, OPEN, "/assets"},
    {"GET", "/health", health, 0, "/health"},
    {"GET", "/health/live", live, OPEN, "/health/live"},
    {"GET", "/health/ready", ready, 0, "/health/ready"},
    {"POST", "/edit", edit, 0, "/edit"},
    {"POST", "/v1/jobs", job, 0, "/v1/jobs"},
    {"GET", "/v1/jobs", list_jobs, 0, "/v1/jobs"},
    {"GET", "/v1/jobs/{}", get_job, 0, "/v1/jobs/{id}"},
    {"DELETE", "/v1/jobs/{}", delete_job, 0, "/v1/jobs/{id}"},
    {"GET", "/v1/jobs/{}/result", get_result, 0, "/v1/jobs/{id}/result"},
    {"GET", "/v1/jobs/{}/inputs/{}", get_input, 0, "/v1/jobs/{id}/inputs"},
    {"POST", "/v1/jobs/{}/cancel", cancel_job, 0, "/v1/jobs/{id}/cancel"},
    {"GET", "/v1/jobs/{}/events", events, 0, "/v1/jobs/{id}/events"},
    {"POST", "/v1/images/edits", openai_edit, 0, "/v1/images/edits"},
    {"GET", "/v1/models", models, 0, "/v1/models"},
    {"GET", "/v1/models/{}", model, 0, "/v1/models/{id}"},
    {"GET", "/openapi.json", openapi, OPEN, "/openapi.json"},
    {"GET", "/metrics", svc_metrics, 0, "/metrics"},
};
#define N_ROUTES (sizeof ROUTES / sizeof *ROUTES)

static bool matches(const char *pattern, const char *path, char args[2][80]) {
    int n = 0;
    while (*pattern) {
        if (pattern[0] == '{') {
            size_t len = strcspn(path, "/");
            if (len == 0 || len >= 80 || n == 2)
                return false;
            memcpy(args[n], path, len);
            args[n++][len] = 0;
            path += len;
            pattern += 2;
        } else if (*pattern++ != *path++)
            return false;
    }
    return *path == 0;
}

static const route *route_of(svc_call *call, char allow[64]) {
    const char *method = strcmp(call->method, "HEAD") ? call->method : "GET";
    allow[0] = 0;
    for (size_t i = 0; i < N_ROUTES; i++) {
        if (!matches(ROUTES[i].pattern, call->path, call->args))
            continue;
        if (!strcmp(ROUTES[i].method, method))
            return &ROUTES[i];
        size_t n = strlen(allow);
        snprintf(allow + n, 64 - n, "%s%s", n ? ", " : "", ROUTES[i].method);
    }
    return NULL;
}

/* ---------------------------------------------------------------- who asks */

static bool same_text(const char *a, const char *b) {
    size_t n = strlen(a), k = strlen(b);
    unsigned char diff = n != k;
    for (size_t i = 0; i < k; i++) /* as long as what the client sent, whatever the key */
        diff |= (unsigned char)((n ? a[i % n] : 0) ^ b[i]);
    return diff == 0;
}

static void address_text(const struct sockaddr_storage *a, char *out, size_t cap) {
    if (a->ss_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr, out,
                  (socklen_t)cap);
    else
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)a)->sin_addr, out,
                  (socklen_t)cap);
}

static void client_by_address(const svc_master *m, svc_call *call) {
    char text[64] = "local";
    address_text(&call->peer, text, sizeof text);
    for (const char *const *p = m->o.proxies; *p; p++) {
        const char *forwarded = svc_call_header(call, "X-Forwarded-For");
        if (!forwarded || !svc_cidr_has(*p, &call->peer))
            continue;
        /* The proxy has appended the address it saw: the last one. */
        const char *last = strrchr(forwarded, ',');
        last = last ? last + 1 : forwarded;
        last += strspn(last, " ");
        snprintf(text, sizeof text, "%.60s", last);
        break;
    }
    snprintf(call->client, sizeof call->client, "addr:%s", text);
}

static bool knows(svc_master *m, svc_call *call, bool open) {
    if (m->n_keys == 0) {
        client_by_address(m, call);
        return true;
    }
    const char *given = svc_call_header(call, "Authorization");
    char hash[QIE_HASH_HEX_MAX];
    bool ok = false;
    if (given && !strncasecmp(given, "Bearer ", 7))
        for (int i = 0; i < m->n_keys; i++)
            ok |= same_text(m->keys[i], given + 7);
    if (ok) {
        qie_sha1_hex(given + 7, strlen(given + 7), hash);
        snprintf(call->client, sizeof call->client, "key:%.16s", hash);
    }
    return ok || open;
}

/* Pages of other sites must not use a service that trusts its address. */
static bool origin_allowed(const svc_master *m, svc_call *call) {
    const char *origin = svc_call_header(call, "Origin"), *host = svc_call_header(call, "Host");
    if (!origin)
        return true;
    for (const char *const *o = m->o.origins; *o; o++)
        if (!strcmp(*o, origin)) {
            svc_call_set_header(call, "Access-Control-Allow-Origin", origin);
            svc_call_set_header(call, "Vary", "Origin");
            return true;
        }
    const char *sep = strstr(origin, "://");
    return sep && host && !strcmp(sep + 3, host);
}

static bool preflight(svc_call *call) {
    if (strcmp(call->method, "OPTIONS") || !svc_call_header(call, "Access-Control-Request-Method"))
        return false;
    svc_call_set_header(call, "Access-Control-Allow-Methods", "GET, POST, DELETE");
    svc_call_set_header(call, "Access-Control-Allow-Headers",
                        "Authorization, Content-Type, X-Request-Id, Last-Event-ID");
    svc_call_set_header(call, "Access-Control-Max-Age", "600");
    svc_call_reply(call, 204, NULL, "", 0, false);
    return true;
}

void svc_route_head(void *arg, svc_call *call) {
    svc_master *m = arg;
    char allow[64];
    const route *r = route_of(call, allow);
    call->route = r;
    if (!origin_allowed(m, call)) {
        fail(call, 403, QIE_E_DENIED, NULL,
             "requests from pages of other sites are refused: see --cors-origin");
        return;
    }
    if (preflight(call))
        return;
    if (!knows(m, call, r && r->flags & OPEN)) {
        svc_call_set_header(call, "WWW-Authenticate", "Bearer");
        fail(call, 401, QIE_E_DENIED, "Authorization",
             "an API key is needed: Authorization: Bearer KEY");
        return;
    }
    if (r)
        return;
    if (allow[0]) {
        svc_call_set_header(call, "Allow", allow);
        fail(call, 405, QIE_E_USAGE, NULL, "this path takes %s", allow);
    } else
        fail(call, 404, QIE_E_NOT_FOUND, NULL, "there is nothing at this path");
}

void svc_route_request(void *arg, svc_call *call) {
    const route *r = call->route;
    r->fn(arg, call);
}

void svc_route_answer(void *arg, svc_call *call, int status) {
    svc_master *m = arg;
    const route *r = call->route;
    const char *label = r ? r->label : "other";
    int i = 0;
    while (i < m->n_counts && (m->counts[i].code != status || strcmp(m->counts[i].route, label)))
        i++;
    if (i == m->n_counts) {
        if (i == (int)(sizeof m->counts / sizeof *m->counts))
            return;
        snprintf(m->counts[i].route, sizeof m->counts[i].route, "%s", label);
        m->counts[i].code = status;
        m->n_counts++;
    }
    m->counts[i].n++;
}

/* ---------------------------------------------------------------- keys */

static qie_status add_key(char **keys, int *n, const char *key, size_t len, qie_error *err) {
    QIE_FAIL_IF(*n == 64, QIE_E_INVALID, err, "--api-key", "more than 64 keys");
    QIE_FAIL_IF(len < 8, QIE_E_INVALID, err, "--api-key", "a key must have at least 8 characters");
    keys[*n] = strndup(key, len);
    QIE_FAIL_IF(!keys[*n], QIE_E_NO_MEMORY, err, NULL, "out of memory");
    ++*n;
    return QIE_OK;
}

static qie_status read_key_file(const char *path, char **keys, int *n, qie_error *err) {
    unsigned char *bytes;
    size_t size;
    QIE_TRY(qie_file_read(path, 65536, &bytes, &size, err));
    qie_status st = QIE_OK;
    for (char *p = (char *)bytes; *p && st == QIE_OK;) {
        size_t len = strcspn(p, "\r\n");
        if (len && *p != '#')
            st = add_key(keys, n, p, len, err);
        p += len;
        p += strspn(p, "\r\n");
    }
    free(bytes);
    /* An empty file would open the service to everybody. */
    QIE_FAIL_IF(st == QIE_OK && *n == 0, QIE_E_INVALID, err, "--api-key-file", "'%s' holds no key",
                path);
    return st;
}

qie_status svc_keys_load(svc_master *m, qie_error *err) {
    char *keys[64];
    int n = 0;
    qie_status st = QIE_OK;
    for (const char *const *k = m->o.keys; *k && st == QIE_OK; k++)
        st = add_key(keys, &n, *k, strlen(*k), err);
    if (st == QIE_OK && m->o.key_file)
        st = read_key_file(m->o.key_file, keys, &n, err);
    if (st == QIE_OK) {
        for (int i = 0; i < m->n_keys; i++)
            free(m->keys[i]);
        memcpy(m->keys, keys, sizeof keys);
        m->n_keys = n;
    } else
        for (int i = 0; i < n; i++)
            free(keys[i]);
    return st;
}
