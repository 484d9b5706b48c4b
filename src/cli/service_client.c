#define _GNU_SOURCE
#include "cli/service_client.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "cli/interrupt.h"
#include "cli/sse.h"
#include "cli/ui.h"
#include "hub/http.h"

#define STALL_S 120           /* a service that says nothing for so long is gone */
#define SILENCE_S 45          /* of a stream, which brings a comment every 15 s */
#define BUSY_PATIENCE_S 600   /* in all, for a queue that is full */
#define DOWN_PATIENCE_S 60    /* in all, for a service that is not ready */
#define BROKEN_PATIENCE_S 120 /* without a connection while a job is followed */
#define CANCEL_PATIENCE_S 5

struct cli_service {
    qie_http *http;
    char address[1024];
    char *key; /* NULL: none */
};

/* ---------------------------------------------------------------- address and key */

static qie_status read_address(const char *text, char *out, size_t cap, qie_error *err) {
    size_t n = strlen(text);
    while (n && text[n - 1] == '/')
        n--;
    int k = snprintf(out, cap, "%s%.*s", strstr(text, "://") ? "" : "http://", (int)n, text);
    QIE_FAIL_IF(k <= 0 || (size_t)k >= cap || !qie_http_same_origin(out, out), QIE_E_INVALID, err,
                "--server", "--server: '%.200s' is not an http or https address", text);
    return QIE_OK;
}

/* The first key of the file; the others are for other clients of the same service. */
static qie_status key_of_file(const char *path, char **key, qie_error *err) {
    unsigned char *bytes;
    size_t n;
    QIE_TRY(qie_file_read(path, 65536, &bytes, &n, err));
    for (char *p = (char *)bytes; *p && !*key; p += strspn(p, "\r\n")) {
        size_t len = strcspn(p, "\r\n");
        if (len && *p != '#')
            *key = strndup(p, len);
        p += len;
    }
    free(bytes);
    QIE_FAIL_IF(!*key, QIE_E_INVALID, err, "--api-key-file", "'%s' holds no key", path);
    return QIE_OK;
}

static qie_status read_key(const cli_values *v, char **key, qie_error *err) {
    const cli_value *file = cli_get(v, OPT_API_KEY_FILE), *given = cli_get(v, OPT_API_KEY);
    *key = NULL;
    if (file->source > given->source)
        QIE_TRY(key_of_file(file->texts[file->n - 1], key, err));
    else if (given->n)
        *key = strdup(given->texts[given->n - 1]);
    for (const char *p = *key ? *key : ""; *p; p++)
        QIE_FAIL_IF((unsigned char)*p < 32 || *p == 127 || p - *key >= 1000, QIE_E_INVALID, err,
                    "--api-key",
                    "the API key is longer than 1000 characters or holds one that is "
                    "not printable");
    return QIE_OK;
}

qie_status cli_service_open(const cli_values *values, cli_service **out, qie_error *err) {
    cli_service *s = calloc(1, sizeof *s);
    *out = NULL;
    QIE_FAIL_IF(!s, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_http_options o = qie_http_options_default();
    o.stall_timeout_s = STALL_S;
    o.user_agent = "qwen-edit/" QIE_VERSION;
    o.ca_bundle = getenv("SSL_CERT_FILE");
    qie_status st =
        read_address(cli_text(values, OPT_SERVER, ""), s->address, sizeof s->address, err);
    if (st == QIE_OK)
        st = read_key(values, &s->key, err);
    if (st == QIE_OK)
        st = qie_http_create(&o, &s->http, err);
    if (st != QIE_OK) {
        cli_service_close(s);
        return st;
    }
    *out = s;
    return QIE_OK;
}

void cli_service_close(cli_service *service) {
    if (!service)
        return;
    qie_http_destroy(service->http);
    if (service->key)
        explicit_bzero(service->key, strlen(service->key));
    free(service->key);
    free(service);
}

const char *cli_service_address(const cli_service *service) {
    return service->address;
}

/* ---------------------------------------------------------------- errors */

static qie_status status_of(const char *type, int http_status) {
    for (int i = 1; type && i < QIE_E_COUNT; i++)
        if (!strcmp(type, qie_status_name((qie_status)i)))
            return (qie_status)i;
    switch (http_status) {
    case 400: return QIE_E_SYNTAX;
    case 401:
    case 403: return QIE_E_DENIED;
    case 404: return QIE_E_NOT_FOUND;
    case 409: return QIE_E_CONFLICT;
    case 410: return QIE_E_GONE;
    case 413: return QIE_E_TOO_LARGE;
    case 415: return QIE_E_UNSUPPORTED;
    case 422: return QIE_E_INVALID;
    case 429: return QIE_E_BUSY;
    case 503: return QIE_E_UNAVAILABLE;
    case 504: return QIE_E_TIMEOUT;
    case 507: return QIE_E_IO;
    default: return QIE_E_INTERNAL;
    }
}

qie_status cli_service_error(const qie_json *error, int http_status, qie_error *err) {
    const char *message = qie_json_string(qie_json_member(error, "message"), NULL),
               *type = qie_json_string(qie_json_member(error, "type"), NULL),
               *param = qie_json_string(qie_json_member(error, "param"), NULL);
    qie_fail(err, status_of(type, http_status), param, "%s",
             message ? message : "the service gives no reason");
    return err ? err->status : status_of(type, http_status);
}

/* What an answer that is no success says. */
static qie_status refusal(const cli_service *s, const qie_http_reply *reply, const char *body,
                          size_t n, qie_error *err) {
    qie_json *o = NULL;
    const qie_json *error = NULL;
    if (body && qie_json_parse(body, n, "answer", &o, NULL) == QIE_OK)
        error = qie_json_member(o, "error");
    qie_status st;
    if (!qie_json_is_object(error))
        st =
            qie_fail(err, QIE_E_NETWORK, "--server",
                     "'%s' answers HTTP %d and is no qwen-edit service", s->address, reply->status);
    else
        st = cli_service_error(error, reply->status, err);
    if (reply->status == 401 && err && !s->key)
        qie_fail(err, QIE_E_DENIED, "--api-key",
                 "the service at %s asks for a key: give it with --api-key, --api-key-file or "
                 "QWEN_EDIT_API_KEY",
                 s->address);
    else if (reply->status == 401 && err)
        qie_fail(err, QIE_E_DENIED, "--api-key", "the service at %s does not know this API key",
                 s->address);
    qie_json_free(o);
    return st;
}

static qie_status unreachable(const char *why, qie_error *err) {
    return qie_fail(err, QIE_E_NETWORK, "--server",
                    "cannot reach the service at %s (is 'qwen-edit serve' running there?)", why);
}

static qie_status interrupted(qie_error *err) {
    return qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted");
}

/* ---------------------------------------------------------------- calls */

static bool stop_now(void *arg) {
    (void)arg;
    return cli_interrupted();
}

static bool stop_at(void *arg) {
    return qie_now_s() > *(double *)arg;
}

static void request_of(const cli_service *s, const char *path, qie_http_request *r, char *url) {
    snprintf(url, QIE_HTTP_URL_MAX, "%s%s", s->address, path);
    *r = (qie_http_request){
        .url = url, .from = -1, .to = -1, .token = s->key, .token_origin = s->address};
}

/* False when interrupted. */
static bool pause_s(double seconds) {
    double end = qie_now_s() + seconds;
    while (!cli_interrupted() && qie_now_s() < end) {
        struct timespec t = {.tv_nsec = 100000000};
        nanosleep(&t, NULL);
    }
    return !cli_interrupted();
}

/* Wait as long as a busy service asks for, and say so. False: there is no point. */
static bool wait_for(const cli_service *s, const qie_http_reply *reply, double *waited,
                     const qie_error *why) {
    int asked = reply->retry_after_s > 0 ? reply->retry_after_s : 1;
    double patience = reply->status == 429 ? BUSY_PATIENCE_S : DOWN_PATIENCE_S;
    if ((reply->status != 429 && reply->status != 503) || reply->retry_after_s < 0 ||
        *waited + asked > patience)
        return false;
    cli_note("%s: %s; asking again in %d s", s->address, why->message, asked);
    *waited += asked;
    return pause_s(asked);
}

static qie_status call_once(cli_service *s, const cli_call *call, char **body, size_t *n,
                            qie_http_reply *reply, qie_http_end *end, qie_error *err) {
    qie_http_request r;
    char url[QIE_HTTP_URL_MAX], why[256];
    double deadline = qie_now_s() + CANCEL_PATIENCE_S;
    *body = NULL;
    *n = 0;
    request_of(s, call->path, &r, url);
    r.post = call->post;
    r.body = call->body;
    r.n_body = call->n_body;
    r.content_type = call->content_type;
    *end = qie_http_fetch(s->http, &r, call->max_bytes, body, n, reply, why,
                          call->once ? stop_at : stop_now, &deadline);
    if (*end == QIE_HTTP_STOPPED && !call->once)
        return interrupted(err);
    if (*end != QIE_HTTP_OK)
        return unreachable(why, err);
    if (reply->status / 100 == 2)
        return QIE_OK;
    qie_status st = refusal(s, reply, *body, *n, err);
    free(*body);
    *body = NULL;
    return st;
}

qie_status cli_service_call(cli_service *service, const cli_call *call, char **body, size_t *n,
                            qie_error *err) {
    qie_http_reply *reply = malloc(sizeof *reply);
    QIE_FAIL_IF(!reply, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    double waited = 0;
    qie_status st;
    for (int cuts = 0;;) {
        qie_error e = {0};
        qie_http_end end;
        st = call_once(service, call, body, n, reply, &end, &e);
        bool again = st != QIE_OK && !call->once && st != QIE_E_CANCELLED &&
                     (end == QIE_HTTP_OK ? wait_for(service, reply, &waited, &e)
                                         : end == QIE_HTTP_CUT && cuts++ < 3 && pause_s(0.5));
        if (again)
            continue;
        if (st != QIE_OK && cli_interrupted() && !call->once)
            st = interrupted(&e);
        if (st != QIE_OK && err)
            *err = e;
        break;
    }
    free(reply);
    return st;
}

qie_status cli_service_cancel(cli_service *service, const char *job_id, qie_error *err) {
    char path[128], *body = NULL;
    size_t n;
    snprintf(path, sizeof path, "/v1/jobs/%s/cancel", job_id);
    cli_call call = {.path = path, .post = true, .max_bytes = 1 << 20, .once = true};
    qie_status st = cli_service_call(service, &call, &body, &n, err);
    free(body);
    return st;
}

/* ---------------------------------------------------------------- events */

typedef struct following {
    cli_sse sse;
    cli_job_event_fn fn;
    void *arg;
    bool ended, over, refused;
    double heard_at;
    int status;
    char why[256];
    qie_http_reply reply;
    qie_strbuf body; /* of a refusal */
} following;

static bool on_sse(void *arg, const char *name, const char *data, size_t n) {
    following *f = arg;
    qie_json *o = NULL;
    if (qie_json_parse(data, n, "event", &o, NULL) == QIE_OK)
        f->ended = f->fn(f->arg, name, o);
    qie_json_free(o);
    return !f->ended;
}

static bool on_head(void *arg, const qie_http_reply *reply) {
    following *f = arg;
    f->status = reply->status;
    f->refused = reply->status != 200;
    f->heard_at = qie_now_s();
    return true;
}

static bool on_body(void *arg, const void *data, size_t n) {
    following *f = arg;
    f->heard_at = qie_now_s();
    if (f->refused) {
        qie_strbuf_append(&f->body, data, n);
        return !f->body.failed;
    }
    return cli_sse_feed(&f->sse, data, n, on_sse, f);
}

static void on_end(void *arg, const qie_http_reply *reply, qie_http_end end, const char *text) {
    following *f = arg;
    (void)end;
    f->over = true;
    f->reply = *reply;
    snprintf(f->why, sizeof f->why, "%s", text);
}

/* One connection, until it ends. */
static qie_status listen_once(cli_service *s, const char *job_id, following *f, qie_error *err) {
    qie_http_request r;
    char url[QIE_HTTP_URL_MAX], path[128], header[64];
    snprintf(path, sizeof path, "/v1/jobs/%s/events", job_id);
    request_of(s, path, &r, url);
    snprintf(header, sizeof header, "Last-Event-ID: %s", f->sse.id);
    r.header = f->sse.id[0] ? header : NULL;
    r.may_be_silent = true;
    r.on_head = on_head;
    r.on_body = on_body;
    r.on_end = on_end;
    r.arg = f;
    qie_strbuf_release(&f->body);
    qie_strbuf_init(&f->body, 1 << 20);
    f->over = f->refused = false;
    f->status = 0;
    f->heard_at = qie_now_s();
    cli_sse_restart(&f->sse);
    QIE_TRY(qie_http_start(s->http, &r, err));
    while (!f->over) {
        qie_http_run(s->http, 100);
        if (!f->over && (cli_interrupted() || qie_now_s() - f->heard_at > SILENCE_S))
            qie_http_stop_all(s->http);
    }
    return QIE_OK;
}

static bool is_final(int status) {
    return status == 401 || status == 403 || status == 404 || status == 410;
}

static qie_status follow(cli_service *s, const char *job_id, following *f, qie_error *err) {
    double lost_at = 0, wait = 0.25;
    for (;;) {
        QIE_TRY(listen_once(s, job_id, f, err));
        if (cli_interrupted())
            return interrupted(err);
        if (f->ended)
            return QIE_OK;
        if (f->refused && is_final(f->status))
            return refusal(s, &f->reply, f->body.data, f->body.len, err);
        double now = qie_now_s();
        if (f->status == 200) {
            lost_at = 0; /* it was there: the patience begins anew */
            wait = 0.25;
        }
        if (!lost_at) {
            lost_at = now;
            cli_note("the connection to the service is lost; the edit goes on there as job %s",
                     job_id);
        }
        if (now - lost_at > BROKEN_PATIENCE_S) {
            unreachable(f->why[0] ? f->why : s->address, err);
            qie_error_context(err, "following job %s, which goes on there", job_id);
            return QIE_E_NETWORK;
        }
        if (!pause_s(wait))
            return interrupted(err);
        wait = wait < 4 ? wait * 2 : 5;
    }
}

qie_status cli_service_follow(cli_service *service, const char *job_id, cli_job_event_fn fn,
                              void *arg, qie_error *err) {
    following *f = calloc(1, sizeof *f);
    QIE_FAIL_IF(!f, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    f->fn = fn;
    f->arg = arg;
    cli_sse_init(&f->sse);
    qie_status st = follow(service, job_id, f, err);
    cli_sse_release(&f->sse);
    qie_strbuf_release(&f->body);
    free(f);
    return st;
}
