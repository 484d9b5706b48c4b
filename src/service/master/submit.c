/* From a request to an accepted job, and from its end to the answer. A submission goes: parse
 * (thread) -> fetch (thread, only with addresses) -> admit (loop) -> keep the pictures (thread) ->
 * row (writer) -> accepted (loop). Its client may leave at any point: `call` is NULL from then on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/strbuf.h"
#include "plan/memory.h"
#include "service/master/log.h"
#include "service/master/loras.h"
#include "service/master/master.h"
#include "service/master/parse.h"
#include "service/master/tokens.h"

typedef struct submission {
    svc_task task; /* first */
    svc_write write;
    svc_listener listener;
    svc_master *master;
    svc_call *call; /* NULL: the client left */
    svc_flavour flavour;
    svc_request request;
    const char *text;
    size_t n_text;
    svc_body *body;
    char *content_type;
    char client[96];
    svc_client *reserved; /* a place in the queue is kept for it */
    svc_request_rules rules;
    int widths[SVC_MAX_PICTURES], heights[SVC_MAX_PICTURES];
    struct svc_tokens *tokens;
    bool planned; /* the model is known: sizes, memory and guided are set */
    bool guided;  /* the negative prompt is used */
    qie_size_plan sizes;
    qie_memory_plan memory;
    bool keyed, streaming, awaits_accept;
    int n_previews;
    svc_job *job;
    double deadline_s;
    qie_status status;
    qie_error error;
} submission;

static void reserve(submission *s, svc_client *client) {
    s->reserved = client;
    client->n_waiting++;
    s->master->n_reserved++;
}

static void give_back_place(submission *s) {
    if (!s->reserved)
        return;
    s->reserved->n_waiting--;
    s->master->n_reserved--;
    s->reserved = NULL;
}

static void release(submission *s) {
    svc_job_unlisten(&s->listener);
    for (size_t i = 0; i < s->request.n_pictures; i++)
        if (s->request.pictures[i].stored)
            svc_store_unpin(s->master->store, s->request.pictures[i].name);
    give_back_place(s);
    if (s->call) {
        s->call->on_gone = NULL;
        s->call->state = NULL;
    }
    svc_request_release(&s->request);
    svc_body_free(s->body);
    free(s->content_type);
    free(s);
}

static void refuse(submission *s, const qie_error *e, int status) {
    if (s->call) {
        char text[16];
        s->call->on_gone = NULL;
        if (e->status == QIE_E_BUSY || e->status == QIE_E_NO_MEMORY ||
            e->status == QIE_E_UNAVAILABLE) {
            snprintf(text, sizeof text, "%d", svc_retry_after(s->master));
            svc_call_set_header(s->call, "Retry-After", text);
        }
        svc_reply_error(s->call, status, e);
        s->call = NULL;
    }
    release(s);
}

/* ---------------------------------------------------------------- answers with pictures */

typedef struct answering {
    svc_task task; /* first */
    svc_master *master;
    svc_call *call;
    svc_flavour flavour;
    bool as_url, stream;
    char id[SVC_ID_BYTES], host[200];
    char *result;
    char *text;
    int status;
    const char *event; /* of a stream */
} answering;

static char *base64_file(svc_master *m, const char *name) {
    int fd = svc_store_read(m->store, name);
    int64_t n = fd >= 0 ? svc_file_size(fd) : -1;
    uint8_t *bytes = n > 0 ? malloc((size_t)n) : NULL;
    char *text = bytes ? malloc(svc_base64_length((size_t)n) + 1) : NULL;
    if (text && svc_read_at(fd, bytes, (size_t)n, 0)) {
        svc_base64_encode(bytes, (size_t)n, text);
        text[svc_base64_length((size_t)n)] = 0;
    } else {
        free(text);
        text = NULL;
    }
    free(bytes);
    if (fd >= 0)
        close(fd);
    return text;
}

static void copy_member(const qie_json *from, qie_json *to, const char *key) {
    const qie_json *v = qie_json_member(from, key);
    if (!v)
        return;
    if (qie_json_is_string(v))
        qie_json_put(to, key, qie_json_new_string(qie_json_string(v, NULL)));
    else if (qie_json_is_bool(v))
        qie_json_put(to, key, qie_json_new_bool(qie_json_bool(v)));
    else if (qie_json_is_integer(v))
        qie_json_put(to, key, qie_json_new_int(qie_json_integer(v)));
    else if (qie_json_is_number(v))
        qie_json_put(to, key, qie_json_new_double(qie_json_number(v)));
    else { /* small objects and arrays: through their text */
        char *text = qie_json_text(v, 0);
        qie_json *copy = NULL;
        if (text && qie_json_parse(text, strlen(text), key, &copy, NULL) == QIE_OK)
            qie_json_put(to, key, copy);
        free(text);
    }
}

/* The pictures of a result as base64 strings or addresses; NULL when one is gone. */
static qie_json *pictures_json(answering *a, const qie_json *files) {
    qie_json *list = qie_json_new_array();
    for (size_t i = 0; i < qie_json_size(files); i++) {
        const char *name = qie_json_string(qie_json_member(qie_json_at(files, i), "file"), NULL);
        qie_json *item = NULL;
        if (a->as_url) {
            char url[400];
            snprintf(url, sizeof url, "http://%s/v1/jobs/%s/result?n=%zu", a->host, a->id, i);
            item = qie_json_new_string(url);
        } else {
            char *text = name ? base64_file(a->master, name) : NULL;
            item = text ? qie_json_new_string(text) : NULL;
            free(text);
        }
        if (!item) {
            qie_json_free(list);
            return NULL;
        }
        qie_json_push(list, item);
    }
    return list;
}

static const char *format_of(const qie_json *result, char out[8]) {
    const char *f = qie_json_string(qie_json_member(result, "output_format"), NULL);
    snprintf(out, 8, "%s", f ? f : "png");
    return out;
}

static qie_json *usage_json(void) {
    static const char *const keys[] = {"input_tokens", "output_tokens", "total_tokens"};
    static const char *const parts[] = {"image_tokens", "text_tokens"};
    qie_json *u = qie_json_new_object(), *d = qie_json_new_object();
    for (int i = 0; i < 3; i++)
        qie_json_put(u, keys[i], qie_json_new_int(0)); /* nothing is billed */
    for (int i = 0; i < 2; i++)
        qie_json_put(d, parts[i], qie_json_new_int(0));
    qie_json_put(u, "input_tokens_details", d);
    return u;
}

static qie_json *openai_json(answering *a, const qie_json *result, qie_json *pictures) {
    qie_json *o = qie_json_new_object(), *data = qie_json_new_array();
    char size[32], format[8];
    snprintf(size, sizeof size, "%lldx%lld",
             (long long)qie_json_integer(qie_json_member(result, "width")),
             (long long)qie_json_integer(qie_json_member(result, "height")));
    qie_json_put(o, "created", qie_json_new_int((int64_t)svc_clock()));
    if (a->stream) {
        qie_json_put(o, "type", qie_json_new_string("image_edit.completed"));
        qie_json_put(o, "created_at", qie_json_new_int((int64_t)svc_clock()));
        qie_json_put(o, "b64_json",
                     qie_json_new_string(qie_json_string(qie_json_at(pictures, 0), NULL)));
        qie_json_put(o, "background", qie_json_new_string("opaque"));
        qie_json_put(o, "quality", qie_json_new_string("high"));
        qie_json_free(data);
    } else {
        for (size_t i = 0; i < qie_json_size(pictures); i++) {
            qie_json *d = qie_json_new_object();
            qie_json_put(d, a->as_url ? "url" : "b64_json",
                         qie_json_new_string(qie_json_string(qie_json_at(pictures, i), NULL)));
            qie_json_push(data, d);
        }
        qie_json_put(o, "data", data);
    }
    qie_json_put(o, "size", qie_json_new_string(size));
    qie_json_put(o, "output_format", qie_json_new_string(format_of(result, format)));
    qie_json_put(o, "usage", usage_json());
    copy_member(result, o, "seed");
    qie_json_free(pictures);
    return o;
}

static qie_json *edit_json(answering *a, const qie_json *result, qie_json *pictures) {
    static const char *const keys[] = {
        "output_path", "seed",      "width",     "height",  "num_inference_steps", "true_cfg_scale",
        "cfg",         "model",     "precision", "cache",   "skipped_forwards",    "loras",
        "gpu_id",      "placement", "timings",   "warnings"};
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "job_id", qie_json_new_string(a->id));
    bool path = qie_json_member(result, "output_path") != NULL;
    if (!path && qie_json_size(pictures) == 1)
        qie_json_put(o, "image_base64",
                     qie_json_new_string(qie_json_string(qie_json_at(pictures, 0), NULL)));
    else if (!path) {
        qie_json_put(o, "images", pictures);
        pictures = NULL;
    }
    qie_json_free(pictures);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        copy_member(result, o, keys[i]);
    return o;
}

static void answer_run(svc_task *t) {
    answering *a = (answering *)(void *)t;
    qie_json *result = NULL, *pictures = NULL, *o = NULL;
    a->status = 500;
    if (a->result &&
        qie_json_parse(a->result, strlen(a->result), "result", &result, NULL) == QIE_OK)
        pictures = pictures_json(a, qie_json_member(result, "files"));
    if (pictures) {
        o = a->flavour == SVC_OPENAI ? openai_json(a, result, pictures)
                                     : edit_json(a, result, pictures);
        a->status = 200;
    }
    a->text = o ? qie_json_text(o, 0) : NULL;
    qie_json_free(o);
    qie_json_free(result);
}

static void answer_gone(svc_call *call) {
    ((answering *)call->state)->call = NULL;
}

static void stream_event(svc_call *call, const char *event, const char *data, bool droppable) {
    qie_strbuf b;
    qie_strbuf_init(&b, 400u << 20);
    qie_strbuf_printf(&b, "event: %s\ndata: ", event);
    qie_strbuf_puts(&b, data);
    qie_strbuf_puts(&b, "\n\n");
    if (!b.failed)
        svc_call_send(call, b.data, b.len, droppable);
    qie_strbuf_release(&b);
}

static void answer_done(svc_task *t) {
    answering *a = (answering *)(void *)t;
    if (a->call) {
        qie_error e;
        a->call->on_gone = NULL;
        if (a->stream) {
            if (a->text)
                stream_event(a->call, "image_edit.completed", a->text, false);
            svc_call_end(a->call);
        } else if (a->text) {
            svc_call_reply(a->call, a->status, "application/json", a->text, strlen(a->text), true);
            a->text = NULL;
        } else {
            qie_fail(&e, QIE_E_INTERNAL, NULL, "the result is no longer in the state folder");
            svc_reply_error(a->call, 500, &e);
        }
    }
    free(a->text);
    free(a->result);
    free(a);
}

static void answer(svc_master *m, svc_call *call, svc_flavour flavour, const char *id,
                   const char *result, bool as_url, bool stream) {
    answering *a = calloc(1, sizeof *a);
    if (!a)
        return;
    a->task.run = answer_run;
    a->task.done = answer_done;
    a->master = m;
    a->call = call;
    a->flavour = flavour;
    a->as_url = as_url;
    a->stream = stream;
    snprintf(a->id, sizeof a->id, "%s", id);
    const char *host = svc_call_header(call, "Host");
    if (!host || strspn(host, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                              ".-_:[]") != strlen(host))
        host = "localhost";
    snprintf(a->host, sizeof a->host, "%s", host);
    a->result = result ? strdup(result) : NULL;
    call->state = a;
    call->on_gone = answer_gone;
    svc_pool_post(m->pool, &a->task);
}

/* ---------------------------------------------------------------- waiting for the end */

/* No result for who waits, whether or not its answer has begun as a stream. */
static void dismiss(submission *s, const qie_error *e, int status) {
    if (!s->streaming) {
        refuse(s, e, status);
        return;
    }
    qie_json *all = qie_json_new_object();
    qie_json_put(all, "type", qie_json_new_string("error"));
    qie_json_put(all, "error", svc_error_json(e));
    char *text = qie_json_text(all, 0);
    qie_json_free(all);
    if (s->call && text)
        stream_event(s->call, "error", text, false);
    if (s->call)
        svc_call_end(s->call);
    free(text);
    release(s);
}

static void reply_failed(submission *s, const svc_job *job) {
    qie_error e;
    qie_json *o = NULL, *inner;
    qie_status st = QIE_E_INTERNAL;
    const char *message = "failed", *param = "";
    if (job->row.error &&
        qie_json_parse(job->row.error, strlen(job->row.error), "error", &o, NULL) == QIE_OK) {
        inner = o;
        message = qie_json_string(qie_json_member(inner, "message"), NULL);
        const char *type = qie_json_string(qie_json_member(inner, "type"), NULL);
        const char *p = qie_json_string(qie_json_member(inner, "param"), NULL);
        param = p ? p : "";
        for (int i = 1; type && i < QIE_E_COUNT; i++)
            if (!strcmp(type, qie_status_name((qie_status)i)))
                st = (qie_status)i;
    }
    qie_fail(&e, st, param, "%s", message ? message : "failed");
    qie_json_free(o);
    dismiss(s, &e, 0);
}

/* A preview as the OpenAI interface tells it. */
static void partial(submission *s, const svc_job *job, const svc_event *e) {
    qie_json *in = NULL, *o = qie_json_new_object();
    char size[32];
    if (qie_json_parse(e->data, strlen(e->data), "event", &in, NULL) != QIE_OK) {
        qie_json_free(o);
        return;
    }
    snprintf(size, sizeof size, "%dx%d", job->params.width, job->params.height);
    qie_json_put(o, "type", qie_json_new_string("image_edit.partial_image"));
    qie_json_put(o, "partial_image_index", qie_json_new_int(s->n_previews++));
    qie_json_put(o, "b64_json",
                 qie_json_new_string(qie_json_string(qie_json_member(in, "b64_json"), NULL)));
    qie_json_put(o, "created_at", qie_json_new_int((int64_t)svc_clock()));
    qie_json_put(o, "size", qie_json_new_string(job->params.width ? size : "auto"));
    qie_json_put(o, "quality", qie_json_new_string("high"));
    qie_json_put(o, "background", qie_json_new_string("opaque"));
    qie_json_put(o, "output_format", qie_json_new_string("jpeg"));
    char *text = qie_json_text(o, 0);
    if (text)
        stream_event(s->call, "image_edit.partial_image", text, true);
    free(text);
    qie_json_free(o);
    qie_json_free(in);
}

static bool preview_due(const submission *s, const svc_event *e) {
    qie_json *o = NULL;
    if (s->n_previews >= s->request.partial_images ||
        qie_json_parse(e->data, strlen(e->data), "event", &o, NULL) != QIE_OK)
        return false;
    /* Spread over the steps. */
    int64_t step = qie_json_integer(qie_json_member(o, "step")),
            total = qie_json_integer(qie_json_member(o, "total"));
    qie_json_free(o);
    return step * (s->request.partial_images + 1) >= total * (s->n_previews + 1);
}

static void reply_accepted(submission *s, svc_job *job);

static void on_event(svc_listener *l, svc_job *job, const svc_event *e) {
    submission *s = (submission *)(void *)((char *)l - offsetof(submission, listener));
    if (!s->call)
        return;
    if (s->awaits_accept) { /* the first event: the row is in the file */
        reply_accepted(s, job);
        release(s);
    } else if (!strcmp(e->name, "preview") && s->streaming && preview_due(s, e))
        partial(s, job, e);
    else if (!strcmp(e->name, "completed")) {
        svc_call *call = s->call;
        bool streaming = s->streaming, as_url = s->request.as_url;
        svc_flavour flavour = s->flavour;
        svc_master *m = s->master;
        release(s);
        answer(m, call, flavour, job->row.id, job->row.result, as_url, streaming);
    } else if (!strcmp(e->name, "failed") || !strcmp(e->name, "cancelled"))
        reply_failed(s, job);
}

/* Wait on a job that is in the table: this call is one of its listeners from now on. */
static void attach(submission *s, svc_job *job) {
    s->job = job;
    s->listener.fn = on_event;
    s->listener.wants_previews = s->request.partial_images > 0;
    svc_job_listen(job, &s->listener);
    s->awaits_accept = s->flavour == SVC_JOB;
    if (s->request.stream && s->call && !s->streaming) {
        s->streaming = true;
        svc_call_stream(s->call, "text/event-stream");
    }
}

static void reply_accepted(submission *s, svc_job *job) {
    char url[128];
    qie_json *o = qie_json_new_object();
    int position = svc_job_position(s->master, job);
    double eta = svc_job_eta(s->master, position);
    qie_json_put(o, "id", qie_json_new_string(job->row.id));
    qie_json_put(o, "status", qie_json_new_string(svc_status_name(job->row.status)));
    qie_json_put(o, "queue_position", qie_json_new_int(position));
    qie_json_put(o, "eta_s", eta < 0 ? qie_json_new_null() : qie_json_new_double(eta));
    snprintf(url, sizeof url, "/v1/jobs/%s", job->row.id);
    qie_json_put(o, "poll_url", qie_json_new_string(url));
    snprintf(url, sizeof url, "/v1/jobs/%s/events", job->row.id);
    qie_json_put(o, "events_url", qie_json_new_string(url));
    s->call->on_gone = NULL;
    svc_reply_json(s->call, 202, o);
    s->call = NULL;
}

/* ---------------------------------------------------------------- the steps of a submission */

static void on_gone(svc_call *call) {
    submission *s = call->state;
    s->call = NULL;
    svc_job *job = s->listener.job;
    if (!job)
        return; /* a thread holds it, or the writer: noticed there */
    bool cancel = s->flavour != SVC_JOB && !s->keyed;
    svc_master *m = s->master;
    release(s);
    if (cancel && !job->listeners && !m->closing)
        svc_job_cancel(m, job);
}

static void refuse_listeners(svc_job *job, const qie_error *e) {
    for (svc_listener *l = job->listeners, *next; l; l = next) {
        next = l->next;
        if (l->fn == on_event)
            dismiss((submission *)(void *)((char *)l - offsetof(submission, listener)), e, 507);
    }
}

/* The row is in the file (or not): the job exists from here on. */
static void on_inserted(svc_task *t) {
    submission *s = (submission *)(void *)((char *)t - offsetof(submission, write));
    svc_job *job = s->job;
    svc_master *m = s->master;
    if (s->write.status != QIE_OK) {
        qie_error e = s->write.error;
        svc_job_take_out(m, job);
        svc_job_waiting(m, job, -1);
        s->job = NULL;
        svc_note_error(m, e.message);
        refuse(s, &e, 507);
        refuse_listeners(job, &e); /* the same key, sent twice at once */
        svc_job_free(job);
        return;
    }
    job->accepted = true;
    svc_jobs_changed(m);
    svc_log(QIE_LOG_INFO, "accepted", job->row.id, "client=%s pictures=%d priority=%d",
            job->row.client, job->n_inputs, job->row.priority);
    svc_job_tell_place(m, job);
    if (s->flavour == SVC_JOB) {
        if (s->call)
            reply_accepted(s, job);
        release(s);
    } else if (!s->call) {
        bool cancel = !s->keyed;
        release(s);
        if (cancel)
            svc_job_cancel(m, job);
    } else
        attach(s, job);
}

static char *response_text(const submission *s) {
    qie_json *o = qie_json_new_object();
    if (s->request.output_path)
        qie_json_put(o, "output_path", qie_json_new_string(s->request.output_path));
    char *text = qie_json_text(o, 0);
    qie_json_free(o);
    return text;
}

static void fill_row(submission *s, svc_row *row, const char *fingerprint) {
    uint64_t id[2] = {0, 0};
    ssize_t ignored = getrandom(id, sizeof id, 0);
    (void)ignored;
    memset(row, 0, sizeof *row);
    snprintf(row->id, sizeof row->id, "job_%016llx%08llx", (unsigned long long)id[0],
             (unsigned long long)(id[1] & 0xffffffffu));
    row->client = strdup(s->client);
    row->idempotency_key = s->request.idempotency_key ? strdup(s->request.idempotency_key) : NULL;
    row->fingerprint = strdup(fingerprint);
    row->prompt = strdup(s->request.prompt);
    row->negative = strdup(s->request.negative);
    row->response = response_text(s);
    row->priority = s->request.priority;
    row->created = svc_clock();
    qie_json *p = svc_params_to_json(&s->request.params), *in = qie_json_new_array();
    for (size_t i = 0; i < s->request.n_pictures; i++)
        qie_json_push(in, qie_json_new_string(s->request.pictures[i].name));
    row->params = qie_json_text(p, 0);
    row->inputs = qie_json_text(in, 0);
    qie_json_free(p);
    qie_json_free(in);
}

static void accept_new(submission *s, const char *fingerprint) {
    svc_master *m = s->master;
    svc_row row;
    qie_error e;
    fill_row(s, &row, fingerprint);
    bool ok = row.client && row.fingerprint && row.prompt && row.negative && row.response &&
              row.params && row.inputs;
    svc_job *job = ok ? svc_job_from_row(m, &row) : NULL;
    if (!job) {
        svc_row_release(&row);
        qie_fail(&e, QIE_E_NO_MEMORY, NULL, "out of memory");
        refuse(s, &e, 503);
        return;
    }
    s->job = job;
    give_back_place(s); /* counted as waiting from here on */
    svc_job_append(m, job);
    s->write.kind = SVC_WRITE_INSERT;
    s->write.task.done = on_inserted;
    s->write.row = job->row;
    svc_db_write(m->db, &s->write);
}

/* A key seen before stands for the job it made. True when the submission has been answered. */
static bool known_key(submission *s, const char *fingerprint) {
    svc_master *m = s->master;
    qie_error e;
    svc_row row;
    if (!s->keyed)
        return false;
    svc_job *job = svc_job_find_key(m, s->client, s->request.idempotency_key);
    bool in_file = !job && svc_db_find_key(m->db, s->client, s->request.idempotency_key, &row);
    if (!job && !in_file)
        return false;
    const char *print = job ? job->row.fingerprint : row.fingerprint;
    if (!print || strcmp(print, fingerprint)) {
        qie_fail(&e, QIE_E_CONFLICT, "idempotency_key",
                 "'idempotency_key' was used with another request");
        refuse(s, &e, 0);
    } else if (job && s->flavour == SVC_JOB && (job->accepted || !s->call)) {
        if (s->call)
            reply_accepted(s, job);
        release(s);
    } else if (job)
        attach(s, job);
    else {
        svc_job view;
        memset(&view, 0, sizeof view);
        view.row = row;
        if (!s->call)
            release(s);
        else if (s->flavour == SVC_JOB) {
            reply_accepted(s, &view);
            release(s);
        } else if (row.status == SVC_COMPLETED) {
            svc_call *call = s->call;
            bool as_url = s->request.as_url;
            svc_flavour flavour = s->flavour;
            release(s);
            answer(m, call, flavour, row.id, row.result, as_url, false);
        } else if (row.status == SVC_EXPIRED) {
            qie_fail(&e, QIE_E_GONE, "idempotency_key", "the result of this key has expired");
            refuse(s, &e, 0);
        } else
            reply_failed(s, &view);
    }
    if (in_file)
        svc_row_release(&row);
    return true;
}

static bool is_storage(qie_status st) {
    return st == QIE_E_IO;
}

static void after_store(svc_task *t) {
    submission *s = (submission *)(void *)t;
    char fingerprint[QIE_HASH_HEX_MAX];
    if (s->status != QIE_OK) {
        if (is_storage(s->status))
            svc_note_error(s->master, s->error.message);
        refuse(s, &s->error, is_storage(s->status) ? 507 : 0);
        return;
    }
    svc_body_free(s->body);
    s->body = NULL;
    if (!s->call && s->flavour != SVC_JOB && !s->keyed) {
        release(s);
        return;
    }
    svc_request_fingerprint(&s->request, fingerprint);
    if (!known_key(s, fingerprint))
        accept_new(s, fingerprint);
}

/* What the prompt takes; before the model is known the worker counts. */
static void check_text(svc_task *t) {
    submission *s = (submission *)(void *)t;
    const svc_request *r = &s->request;
    if (s->planned)
        s->status = svc_tokens_check(s->tokens, r->prompt, s->guided ? r->negative : NULL,
                                     &s->sizes, &s->error);
}

static void check_and_store(svc_task *t) {
    submission *s = (submission *)(void *)t;
    check_text(t);
    if (s->status != QIE_OK)
        return;
    for (size_t i = 0; i < s->request.n_pictures; i++) {
        svc_source *p = &s->request.pictures[i];
        s->status = svc_store_put(s->master->store, p->bytes, p->n, p->name, &s->error);
        if (s->status != QIE_OK)
            return;
        p->stored = true;
        free(p->own);
        p->own = NULL;
        p->bytes = NULL;
    }
}

/* Steps and guidance as the worker will take them: what the request leaves out is a Lightning
 * LoRA's, else the model's. */
static int steps_of(const svc_master *m, const svc_params *p, double *true_cfg_scale) {
    int steps = m->model.num_inference_steps;
    *true_cfg_scale = m->model.true_cfg_scale;
    svc_loras_defaults(m->lora_presets, p, &steps, true_cfg_scale);
    if (p->true_cfg_scale >= 0)
        *true_cfg_scale = p->true_cfg_scale;
    return p->num_inference_steps ? p->num_inference_steps : steps;
}

/* As the worker decides: nothing is cached in few steps. */
static qie_cache cache_of(const svc_master *m, const svc_params *p, int steps) {
    qie_cache asked = p->cache >= 0 ? (qie_cache)p->cache : m->o.cache;
    return steps < QIE_CACHE_MIN_STEPS ? QIE_CACHE_OFF : asked;
}

/* R17: what the worker would refuse for its size is refused before it waits in the queue. */
static qie_status check_plan(submission *s, qie_error *err) {
    const svc_model_info *model = &s->master->model;
    const svc_params *p = &s->request.params;
    qie_size_request r = {.n_images = (int)s->request.n_pictures,
                          .width = p->width,
                          .height = p->height,
                          .max_side = p->max_side < 0 ? 0
                                      : p->max_side   ? p->max_side
                                                      : model->max_side,
                          .ref_area = p->ref_area ? p->ref_area : model->ref_area,
                          .keep_size = p->keep_size < 0 ? model->keep_size : p->keep_size};
    for (int i = 0; i < r.n_images; i++)
        r.images[i] = (qie_size){s->widths[i], s->heights[i]};
    QIE_TRY(qie_size_plan_make(&model->config, &r, &s->sizes, err));
    const qie_size_plan *sizes = &s->sizes;
    qie_memory_plan *plan = &s->memory;
    double cfg;
    int steps = steps_of(s->master, p, &cfg);
    int64_t text =
        64 + (int64_t)strlen(s->request.prompt) / 8; /* a lower bound: the worker counts */
    qie_memory_request q = {
        .model = &model->config,
        .sizes = sizes,
        .act = (qie_dtype)model->act_dtype,
        .n_passes = cfg > 1 ? 2 : 1,
        .n_ids = {text + sizes->n_vision_tokens, text + sizes->n_vision_tokens},
        .n_text = {text + sizes->n_vision_tokens, text + sizes->n_vision_tokens},
        .n_steps = steps,
        .step_cache = cache_of(s->master, p, steps) != QIE_CACHE_OFF,
        .n_outputs = p->num_images,
        .preview_px = p->preview_px,
        .limit_bytes = qie_memory_total()};
    int64_t total = qie_memory_total();
    QIE_FAIL_IF(!qie_memory_plan_make(&q, plan) || (total > 0 && plan->total > total),
                QIE_E_TOO_LARGE, err, "image",
                "this edit needs %lld MB of working memory, the machine has %lld MB in all",
                (long long)(plan->total >> 20), (long long)(total >> 20));
    s->guided = cfg > 1;
    s->tokens = s->master->tokens;
    s->planned = true;
    return QIE_OK;
}

/* What the edit would be, without one: sizes, passes, memory, place in the queue. */
static void reply_plan(submission *s) {
    const qie_size_plan *sizes = &s->sizes;
    const svc_master *m = s->master;
    const svc_params *p = &s->request.params;
    double cfg;
    int steps = steps_of(m, p, &cfg);
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "dry_run", qie_json_new_bool(true));
    qie_json_put(o, "model", qie_json_new_string(m->model.name));
    qie_json_put(o, "precision", qie_json_new_string(m->model.precision));
    qie_json_put(o, "width", qie_json_new_int(sizes->generated.w));
    qie_json_put(o, "height", qie_json_new_int(sizes->generated.h));
    qie_json_put(o, "output_width", qie_json_new_int(sizes->output.w));
    qie_json_put(o, "output_height", qie_json_new_int(sizes->output.h));
    qie_json_put(o, "target_tokens", qie_json_new_int(sizes->n_target));
    qie_json_put(o, "reference_tokens", qie_json_new_int(sizes->n_reference));
    qie_json_put(o, "num_inference_steps", qie_json_new_int(steps));
    qie_json_put(o, "true_cfg_scale", qie_json_new_double(cfg));
    qie_json_put(o, "cfg", qie_json_new_bool(cfg > 1));
    qie_json_put(o, "cache", qie_json_new_string(qie_cache_name(cache_of(m, p, steps))));
    qie_json_put(o, "working_bytes", qie_json_new_int(s->memory.total));
    qie_json_put(o, "queue_position", qie_json_new_int(m->n_queued));
    s->call->on_gone = NULL;
    svc_reply_json(s->call, 200, o);
    s->call = NULL;
    release(s);
}

static void after_dry_run(svc_task *t) {
    submission *s = (submission *)(void *)t;
    if (s->status != QIE_OK)
        refuse(s, &s->error, 0);
    else if (s->call)
        reply_plan(s);
    else
        release(s);
}

static void admit(submission *s) {
    svc_master *m = s->master;
    qie_error e;
    qie_status st = QIE_OK;
    svc_client *client = svc_client_get(m, s->client);
    bool repeated = s->keyed && svc_job_find_key(m, s->client, s->request.idempotency_key);
    if (m->stopping)
        st = qie_fail(&e, QIE_E_UNAVAILABLE, NULL, "the service is stopping");
    else if (!client)
        st = qie_fail(&e, QIE_E_NO_MEMORY, NULL, "out of memory");
    else if (!repeated)
        st = svc_jobs_admit(m, s->client, &e);
    if (st == QIE_OK && m->has_model)
        st = check_plan(s, &e);
    else if (st == QIE_OK && s->request.dry_run)
        st = qie_fail(&e, QIE_E_UNAVAILABLE, NULL, "the model is loading: nothing can be planned");
    if (st != QIE_OK) {
        refuse(s, &e, 0);
        return;
    }
    s->status = QIE_OK;
    if (s->request.dry_run) {
        s->task.run = check_text;
        s->task.done = after_dry_run;
    } else {
        reserve(s, client);
        s->task.run = check_and_store;
        s->task.done = after_store;
    }
    svc_pool_post(m->pool, &s->task);
}

static void after_fetch(svc_task *t) {
    submission *s = (submission *)(void *)t;
    if (s->status != QIE_OK)
        refuse(s, &s->error, 0);
    else if (!s->call && s->flavour != SVC_JOB && !s->keyed)
        release(s);
    else
        admit(s);
}

static void fetch_pictures(svc_task *t) {
    submission *s = (submission *)(void *)t;
    svc_fetch_rules rules = {.cidrs = s->master->o.cidrs};
    for (size_t i = 0; i < s->request.n_pictures; i++) {
        svc_source *p = &s->request.pictures[i];
        if (!p->url)
            continue;
        s->status = svc_fetch(&rules, p->url, &p->own, &p->n, &s->error);
        if (s->status != QIE_OK)
            return;
        p->bytes = p->own;
    }
    s->status = svc_request_check_pictures(&s->request, s->widths, s->heights, &s->error);
}

static void parse(svc_task *t) {
    submission *s = (submission *)(void *)t;
    bool urls = false;
    s->status = svc_request_parse(&s->rules, s->flavour, s->content_type, s->text, s->n_text,
                                  &s->request, &s->error);
    for (size_t i = 0; i < s->request.n_pictures; i++)
        urls = urls || s->request.pictures[i].url;
    if (s->status == QIE_OK && !urls)
        s->status = svc_request_check_pictures(&s->request, s->widths, s->heights, &s->error);
}

static void after_parse(svc_task *t) {
    submission *s = (submission *)(void *)t;
    bool urls = false;
    if (s->status != QIE_OK || !s->call) {
        refuse(s, &s->error, 0);
        return;
    }
    s->keyed = s->request.idempotency_key != NULL;
    for (size_t i = 0; i < s->request.n_pictures; i++)
        urls = urls || s->request.pictures[i].url;
    if (!urls) {
        admit(s);
        return;
    }
    s->task.run = fetch_pictures;
    s->task.done = after_fetch;
    svc_pool_post(s->master->fetchers, &s->task);
}

static qie_status may_submit(const svc_master *m, qie_error *err) {
    const svc_worker *failed = NULL;
    int n_failed = 0;
    QIE_FAIL_IF(m->stopping, QIE_E_UNAVAILABLE, err, NULL, "the service is stopping");
    QIE_FAIL_IF(m->o.reject_while_loading && !svc_workers_ready(m), QIE_E_UNAVAILABLE, err, NULL,
                "the model is loading");
    for (int i = 0; i < m->n_workers; i++)
        if (m->workers[i].hopeless) {
            failed = &m->workers[i];
            n_failed++;
        }
    QIE_FAIL_IF(failed && n_failed == m->n_workers, QIE_E_UNAVAILABLE, err, NULL,
                "no worker can become ready: %s", failed->last_error);
    return QIE_OK;
}

void svc_submit(svc_master *m, svc_call *call, svc_flavour flavour) {
    qie_error e;
    submission *s = calloc(1, sizeof *s);
    const char *type = svc_call_header(call, "Content-Type");
    qie_status st = !s ? qie_fail(&e, QIE_E_NO_MEMORY, NULL, "out of memory") : may_submit(m, &e);
    if (st != QIE_OK) {
        free(s);
        svc_call_set_header(call, "Retry-After", "5");
        svc_reply_error(call, 503, &e);
        return;
    }
    s->master = m;
    s->call = call;
    s->flavour = flavour;
    s->text = call->body;
    s->n_text = call->n_body;
    s->body = svc_call_take_body(call); /* a thread reads it while the client may leave */
    s->deadline_s = qie_now_s() + m->o.sync_timeout_s;
    if (!s->body)
        s->text = "";
    s->content_type = strdup(type ? type : "");
    s->rules = (svc_request_rules){.max_pictures = (size_t)m->o.max_images,
                                   .allow_url = !m->o.no_image_url,
                                   .has_output_dir = m->output_fd >= 0,
                                   .lora_dir = m->o.lora_dir};
    snprintf(s->client, sizeof s->client, "%s", call->client);
    call->state = s;
    call->on_gone = on_gone;
    s->task.run = parse;
    s->task.done = after_parse;
    svc_pool_post(m->pool, &s->task);
}

/* Calls that wait for an end: those that have waited too long are told so, streams get a sign of
 * life. */
void svc_submit_tick(svc_master *m, bool comment) {
    double now = qie_now_s();
    for (svc_job *j = m->jobs; j; j = j->next)
        for (svc_listener *l = j->listeners, *next; l; l = next) {
            next = l->next;
            if (l->fn != on_event)
                continue;
            submission *s = (submission *)(void *)((char *)l - offsetof(submission, listener));
            if (s->streaming && comment && s->call)
                svc_call_send(s->call, ": wait\n\n", 8, true);
            if (s->streaming || now < s->deadline_s)
                continue;
            qie_error e;
            qie_fail(&e, QIE_E_TIMEOUT, NULL,
                     "the edit takes longer than %.0f s; it goes on as job %s", m->o.sync_timeout_s,
                     j->row.id);
            refuse(s, &e, 504);
        }
}

void svc_submit_stop(svc_master *m) {
    for (svc_job *j = m->jobs; j; j = j->next)
        for (svc_listener *l = j->listeners, *next; l; l = next) {
            next = l->next;
            if (l->fn != on_event)
                continue;
            submission *s = (submission *)(void *)((char *)l - offsetof(submission, listener));
            qie_error e;
            qie_fail(&e, QIE_E_UNAVAILABLE, NULL,
                     "the service is stopping; the edit goes on as job %s at its next start",
                     j->row.id);
            dismiss(s, &e, 0);
        }
}
