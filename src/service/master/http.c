#define _GNU_SOURCE
#include "service/master/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"

#define HEADERS_WITHIN_S 10.0
#define IDLE_CONNECTION_S 75.0
#define SILENCE_S 60u
#define POOL_BYTES \
    (20u << 10) /* headers of one request: the limit on them, and the cost of an idle listener */
#define SPOOL_ABOVE (1u << 20)
#define STREAM_MAX_BYTES (4u << 20)
#define MAX_HEADERS 6

/* A connection, for the time limit on its headers. */
typedef struct conn_link {
    svc_http *http;
    int fd;
    double deadline; /* 0: none */
    bool nul;        /* the path of the request holds an encoded NUL, which would end it early */
    struct conn_link *prev, *next;
} conn_link;

typedef struct request {
    svc_call call; /* first */
    svc_http *http;
    struct MHD_Connection *connection;
    conn_link *link;
    svc_watch *watch;
    char *own_path;
    /* body */
    size_t expected, got;
    char *memory;
    int spool;
    bool mapped;
    /* answer */
    bool begun, suspended, gone, replied, queued, streaming, ended, bad_length;
    int status;
    struct MHD_Response *response;
    struct {
        char name[40], value[400];
    } headers[MAX_HEADERS];
    int n_headers;
    char *out;
    size_t n_out, cap_out, sent;
} request;

struct svc_http {
    svc_http_options o;
    svc_loop *loop;
    struct MHD_Daemon *daemons[2];
    svc_watch *watches[2];
    conn_link *links;
    size_t bodies;
    int n_connections;
    double next_sweep;
};

/* ---------------------------------------------------------------- bodies */

struct svc_body {
    svc_http *http;
    char *memory;
    size_t counted;
    bool mapped;
    int spool;
};

void svc_body_free(svc_body *b) {
    if (!b)
        return;
    if (b->mapped)
        munmap(b->memory, b->counted);
    else
        free(b->memory);
    if (b->spool >= 0)
        close(b->spool);
    b->http->bodies -= b->counted;
    free(b);
}

/* Forget the body without freeing it. */
static void detach_body(request *r) {
    r->memory = NULL;
    r->mapped = r->begun = false;
    r->spool = -1;
    r->expected = r->got = 0;
    r->call.body = NULL;
    r->call.n_body = 0;
}

svc_body *svc_call_take_body(svc_call *call) {
    request *r = (request *)(void *)call;
    svc_body *b = r->begun ? calloc(1, sizeof *b) : NULL;
    if (!b)
        return NULL;
    *b = (svc_body){r->http, r->memory, r->expected, r->mapped, r->spool};
    detach_body(r);
    return b;
}

static void drop_body(request *r) {
    svc_body_free(svc_call_take_body(&r->call));
}

static bool begin_body(request *r) {
    r->begun = true;
    r->http->bodies += r->expected;
    if (r->expected <= SPOOL_ABOVE) {
        r->memory = malloc(r->expected + 1);
        return r->memory != NULL;
    }
    r->spool = open(r->http->o.spool_dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (r->spool < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) { /* not on every file system */
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/.spool-XXXXXX", r->http->o.spool_dir);
        r->spool = mkostemp(path, O_CLOEXEC);
        if (r->spool >= 0)
            unlink(path);
    }
    return r->spool >= 0;
}

static bool add_body(request *r, const char *data, size_t n) {
    if (n > r->expected - r->got)
        return false;
    if (r->spool < 0)
        memcpy(r->memory + r->got, data, n);
    else if (qie_write_all(r->spool, data, n))
        return false;
    r->got += n;
    return true;
}

static bool finish_body(request *r) {
    if (r->spool >= 0) {
        void *p = mmap(NULL, r->expected, PROT_READ, MAP_PRIVATE, r->spool, 0);
        if (p == MAP_FAILED)
            return false;
        r->memory = p;
        r->mapped = true;
    } else if (r->memory)
        r->memory[r->got] = 0;
    r->call.body = r->memory ? r->memory : "";
    r->call.n_body = r->got;
    return true;
}

/* ---------------------------------------------------------------- answers */

void svc_call_set_header(svc_call *call, const char *name, const char *value) {
    request *r = (request *)(void *)call;
    if (r->n_headers == MAX_HEADERS)
        return;
    snprintf(r->headers[r->n_headers].name, sizeof r->headers[0].name, "%s", name);
    snprintf(r->headers[r->n_headers++].value, sizeof r->headers[0].value, "%s", value);
}

/* Wake a suspended connection; the library then asks for the answer. */
static void resume(request *r) {
    if (r->suspended) {
        r->suspended = false;
        MHD_resume_connection(r->connection);
    }
}

static void forget(request *r) {
    if (r->call.on_gone) {
        void (*fn)(svc_call *) = r->call.on_gone;
        r->call.on_gone = NULL;
        fn(&r->call);
    }
}

static void set_response(request *r, int status, const char *type, struct MHD_Response *response) {
    if (r->replied || !response) {
        if (response)
            MHD_destroy_response(response);
        return;
    }
    r->replied = true;
    r->status = status;
    r->response = response;
    if (type)
        MHD_add_response_header(response, "Content-Type", type);
    MHD_add_response_header(response, "X-Request-Id", r->call.request_id);
    MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    for (int i = 0; i < r->n_headers; i++)
        MHD_add_response_header(response, r->headers[i].name, r->headers[i].value);
    r->http->o.on_answer(r->http->o.arg, &r->call, status);
    resume(r);
}

void svc_call_reply(svc_call *call, int status, const char *type, const void *body, size_t n,
                    bool take) {
    union {
        const void *in;
        void *out;
    } text = {.in = body}; /* the library's signature is older than const */
    set_response((request *)(void *)call, status, type,
                 MHD_create_response_from_buffer(
                     n, text.out, take ? MHD_RESPMEM_MUST_FREE : MHD_RESPMEM_MUST_COPY));
}

void svc_call_reply_file(svc_call *call, int status, const char *type, int fd, size_t n) {
    set_response((request *)(void *)call, status, type, MHD_create_response_from_fd64(n, fd));
}

static ssize_t read_stream(void *arg, uint64_t position, char *out, size_t max) {
    request *r = arg;
    (void)position;
    if (r->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    size_t n = r->n_out - r->sent;
    if (n > max)
        n = max;
    if (n) {
        memcpy(out, r->out + r->sent, n);
        r->sent += n;
        if (r->sent == r->n_out) {
            r->sent = r->n_out = 0;
            if (r->cap_out > 8192) {
                free(r->out);
                r->out = NULL;
                r->cap_out = 0;
            }
        }
        return (ssize_t)n;
    }
    if (r->ended)
        return MHD_CONTENT_READER_END_OF_STREAM;
    r->suspended = true;
    MHD_suspend_connection(r->connection);
    return 0;
}

void svc_call_stream(svc_call *call, const char *type) {
    request *r = (request *)(void *)call;
    svc_call_set_header(call, "Cache-Control", "no-store");
    svc_call_set_header(call, "X-Accel-Buffering", "no");
    r->streaming = true;
    set_response(r, 200, type,
                 MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 1024, read_stream, r, NULL));
}

bool svc_call_send(svc_call *call, const char *text, size_t n, bool droppable) {
    request *r = (request *)(void *)call;
    if (!r->streaming || r->ended || r->gone)
        return false;
    if (droppable && r->n_out - r->sent + n > STREAM_MAX_BYTES)
        return false;
    if (r->n_out + n > r->cap_out) {
        size_t cap = r->n_out + n + 1024;
        char *p = realloc(r->out, cap);
        if (!p) {
            r->ended = true;
            return false;
        }
        r->out = p;
        r->cap_out = cap;
    }
    memcpy(r->out + r->n_out, text, n);
    r->n_out += n;
    resume(r);
    return true;
}

void svc_call_end(svc_call *call) {
    request *r = (request *)(void *)call;
    r->ended = true;
    resume(r);
}

/* ---------------------------------------------------------------- requests */

const char *svc_call_header(const svc_call *call, const char *name) {
    const request *r = (const request *)(const void *)call;
    return MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, name);
}

const char *svc_call_query(const svc_call *call, const char *name) {
    const request *r = (const request *)(const void *)call;
    return MHD_lookup_connection_value(r->connection, MHD_GET_ARGUMENT_KIND, name);
}

typedef struct seeking {
    const char *const *known;
    const char *found;
} seeking;

static enum MHD_Result seek(void *arg, enum MHD_ValueKind kind, const char *key,
                            const char *value) {
    seeking *s = arg;
    (void)kind;
    (void)value;
    for (const char *const *k = s->known; *k; k++)
        if (!strcmp(*k, key))
            return MHD_YES;
    s->found = key;
    return MHD_NO;
}

const char *svc_call_unknown_query(const svc_call *call, const char *const *known) {
    const request *r = (const request *)(const void *)call;
    seeking s = {.known = known};
    MHD_get_connection_values(r->connection, MHD_GET_ARGUMENT_KIND, seek, &s);
    return s.found;
}

static void choose_id(request *r) {
    const char *given = svc_call_header(&r->call, "X-Request-Id");
    size_t n = given ? strlen(given) : 0;
    bool ok = n > 0 && n < sizeof r->call.request_id;
    for (size_t i = 0; ok && i < n; i++)
        ok = (given[i] >= '0' && given[i] <= '9') || (given[i] >= 'a' && given[i] <= 'z') ||
             (given[i] >= 'A' && given[i] <= 'Z') || strchr("._-:", given[i]);
    if (ok) {
        memcpy(r->call.request_id, given, n + 1);
        return;
    }
    uint64_t v[2] = {0, 0};
    ssize_t ignored = getrandom(v, sizeof v, 0);
    (void)ignored;
    snprintf(r->call.request_id, sizeof r->call.request_id, "%016llx%08llx",
             (unsigned long long)v[0], (unsigned long long)(v[1] & 0xffffffffu));
}

/* Refusals of the protocol itself. */
static void refuse(request *r, int status, const char *type, const char *text) {
    char body[400];
    int n = snprintf(body, sizeof body,
                     "{\"error\":{\"message\":\"%s\",\"type\":\"%s\",\"param\":null,\"code\":%d}}",
                     text, type, status);
    if (status == 503)
        svc_call_set_header(&r->call, "Retry-After", "5");
    svc_call_reply(&r->call, status, "application/json", body, (size_t)n, false);
}

static bool read_length(request *r) {
    const char *text = svc_call_header(&r->call, "Content-Length");
    char *end;
    if (!text)
        return true;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno || *end || !*text)
        return false;
    r->expected = (size_t)n;
    return true;
}

static void head(request *r) {
    svc_http *h = r->http;
    bool takes_body = !strcmp(r->call.method, "POST") || !strcmp(r->call.method, "PUT") ||
                      !strcmp(r->call.method, "PATCH");
    bool chunked = svc_call_header(&r->call, "Transfer-Encoding") != NULL;
    h->o.on_head(h->o.arg, &r->call);
    if (r->replied)
        r->expected = 0;
    else if (chunked || (takes_body && !svc_call_header(&r->call, "Content-Length")))
        refuse(r, 411, "TOO_LARGE", "the body needs a Content-Length");
    else if (!read_length(r))
        refuse(r, 400, "SYNTAX", "Content-Length is no number");
    else if (r->expected > h->o.max_body_bytes)
        refuse(r, 413, "TOO_LARGE", "the body is above the limit of 64 MB");
    else if (h->bodies + r->expected > h->o.max_bodies_bytes)
        refuse(r, 503, "UNAVAILABLE", "too many large requests at this moment");
    else if (r->expected && !begin_body(r))
        refuse(r, 507, "IO", "no room for the body in the state folder");
    if (r->replied && !r->begun)
        r->expected = 0;
}

static void on_hangup(void *arg, uint32_t events) {
    request *r = arg;
    (void)events;
    svc_loop_unwatch(r->http->loop, r->watch);
    r->watch = NULL;
    r->gone = true;
    resume(r);
}

static enum MHD_Result queue(request *r) {
    r->queued = true;
    enum MHD_Result ok = MHD_queue_response(r->connection, (unsigned)r->status, r->response);
    MHD_destroy_response(r->response);
    r->response = NULL;
    drop_body(r);
    if (!r->streaming)
        forget(r);
    return ok;
}

/* A suspended connection is not watched by the library, so its end would go unnoticed. */
static void watch(request *r) {
    if (!r->watch)
        r->watch = svc_loop_watch(r->http->loop, r->link->fd, EPOLLRDHUP, on_hangup, r);
}

static request *new_request(svc_http *h, struct MHD_Connection *c, conn_link *l, const char *url,
                            const char *method) {
    request *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->own_path = strdup(l->nul ? "" : url);
    if (!r->own_path) {
        free(r);
        return NULL;
    }
    r->http = h;
    r->connection = c;
    r->link = l;
    r->spool = -1;
    r->call.method = method;
    r->call.path = r->own_path;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    if (info && info->client_addr)
        memcpy(&r->call.peer, info->client_addr,
               info->client_addr->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6)
                                                        : sizeof(struct sockaddr_in));
    return r;
}

static enum MHD_Result on_access(void *arg, struct MHD_Connection *c, const char *url,
                                 const char *method, const char *version, const char *data,
                                 size_t *n, void **state) {
    svc_http *h = arg;
    request *r = *state;
    (void)version;
    if (!r) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
        conn_link *l = info ? info->socket_context : NULL;
        if (!l || !(r = new_request(h, c, l, url, method)))
            return MHD_NO;
        *state = r;
        l->deadline = 0;
        choose_id(r);
        head(r);
        /* An answer before the body closes the connection, which is what a refused upload deserves.
         */
        return r->replied ? queue(r) : MHD_YES;
    }
    if (r->gone && !r->queued)
        return MHD_NO;
    if (*n) {
        if (!r->replied && !add_body(r, data, *n))
            refuse(r, 507, "IO", "no room for the body in the state folder");
        *n = 0;
        return MHD_YES;
    }
    if (!r->replied && !r->call.state && !r->bad_length) {
        r->bad_length = true; /* dispatched once only */
        if (r->got != r->expected)
            refuse(r, 400, "SYNTAX", "the body is shorter than announced");
        else if (!finish_body(r))
            refuse(r, 507, "IO", "the body cannot be read back");
        else
            h->o.on_request(h->o.arg, &r->call);
    }
    if (r->replied) {
        if (r->streaming)
            watch(r);
        return queue(r);
    }
    watch(r);
    r->suspended = true;
    MHD_suspend_connection(c);
    return MHD_YES;
}

static void on_completed(void *arg, struct MHD_Connection *c, void **state,
                         enum MHD_RequestTerminationCode why) {
    svc_http *h = arg;
    request *r = *state;
    (void)c;
    (void)why;
    if (!r)
        return;
    *state = NULL;
    svc_loop_unwatch(h->loop, r->watch);
    forget(r);
    drop_body(r);
    if (r->response)
        MHD_destroy_response(r->response);
    r->link->deadline = qie_now_s() + IDLE_CONNECTION_S;
    free(r->out);
    free(r->own_path);
    free(r);
}

static void *on_request_line(void *arg, const char *uri, struct MHD_Connection *c) {
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    conn_link *l = info ? info->socket_context : NULL;
    double limit = qie_now_s() + HEADERS_WITHIN_S;
    (void)arg;
    if (l) {
        const char *at = strstr(uri, "%00"), *query = strchr(uri, '?');
        l->nul = at && (!query || at < query);
    }
    if (l && (l->deadline <= 0 || l->deadline > limit))
        l->deadline = limit;
    return NULL;
}

static void on_connection(void *arg, struct MHD_Connection *c, void **context,
                          enum MHD_ConnectionNotificationCode what) {
    svc_http *h = arg;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        conn_link *l = calloc(1, sizeof *l);
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
        if (!l)
            return;
        l->http = h;
        l->fd = info ? info->connect_fd : -1;
        l->deadline = qie_now_s() + HEADERS_WITHIN_S;
        l->next = h->links;
        if (l->next)
            l->next->prev = l;
        h->links = l;
        h->n_connections++;
        *context = l;
        return;
    }
    conn_link *l = *context;
    if (!l)
        return;
    if (l->prev)
        l->prev->next = l->next;
    else
        h->links = l->next;
    if (l->next)
        l->next->prev = l->prev;
    h->n_connections--;
    free(l);
    *context = NULL;
}

static void on_ready(void *arg, uint32_t events) {
    (void)arg; /* svc_http_run follows every round */
    (void)events;
}

qie_status svc_http_create(const svc_http_options *options, svc_loop *loop, svc_http **out,
                           qie_error *err) {
    svc_http *h = calloc(1, sizeof *h);
    *out = NULL;
    QIE_FAIL_IF(!h, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    h->o = *options;
    h->loop = loop;
    for (int i = 0; i < 2; i++) {
        if (options->listen_fds[i] < 0)
            continue;
        h->daemons[i] = MHD_start_daemon(
            MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC | MHD_USE_TURBO, 0, NULL, NULL,
            on_access, h, MHD_OPTION_LISTEN_SOCKET, options->listen_fds[i],
            MHD_OPTION_CONNECTION_LIMIT, (unsigned)options->max_connections,
            MHD_OPTION_CONNECTION_TIMEOUT, SILENCE_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
            (size_t)POOL_BYTES, MHD_OPTION_NOTIFY_COMPLETED, on_completed, h,
            MHD_OPTION_NOTIFY_CONNECTION, on_connection, h, MHD_OPTION_URI_LOG_CALLBACK,
            on_request_line, h, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
        const union MHD_DaemonInfo *info =
            h->daemons[i] ? MHD_get_daemon_info(h->daemons[i], MHD_DAEMON_INFO_EPOLL_FD) : NULL;
        if (info)
            h->watches[i] = svc_loop_watch(loop, info->epoll_fd, EPOLLIN, on_ready, NULL);
        if (!h->watches[i]) {
            svc_http_destroy(h);
            return qie_fail(err, QIE_E_INTERNAL, NULL, "the HTTP server does not start");
        }
    }
    *out = h;
    return QIE_OK;
}

void svc_http_destroy(svc_http *h) {
    if (!h)
        return;
    for (int i = 0; i < 2; i++) {
        svc_loop_unwatch(h->loop, h->watches[i]);
        if (!h->daemons[i])
            continue;
        for (int k = 0; k < 3; k++)
            MHD_run_wait(h->daemons[i], 0); /* what was resumed goes out */
        /* The library wants nothing suspended when it stops. */
        for (conn_link *l = h->links; l; l = l->next)
            shutdown(l->fd, SHUT_RDWR);
        MHD_stop_daemon(h->daemons[i]);
    }
    free(h);
}

/* Deadlines are enforced by closing the socket under the library, which then tidies up. */
static void sweep(svc_http *h) {
    double now = qie_now_s();
    if (now < h->next_sweep)
        return;
    h->next_sweep = now + 1;
    for (conn_link *l = h->links; l; l = l->next)
        if (l->deadline > 0 && now > l->deadline) {
            l->deadline = 0;
            shutdown(l->fd, SHUT_RDWR);
        }
}

int svc_http_run(svc_http *h, int limit_ms) {
    MHD_UNSIGNED_LONG_LONG wait;
    int timeout = limit_ms;
    sweep(h);
    for (int i = 0; i < 2; i++) {
        if (!h->daemons[i])
            continue;
        MHD_run_wait(h->daemons[i], 0);
        if (MHD_get_timeout(h->daemons[i], &wait) == MHD_YES && wait < (unsigned)timeout)
            timeout = (int)wait;
    }
    return timeout;
}

void svc_http_stop_listening(svc_http *h) {
    for (int i = 0; i < 2; i++)
        if (h->daemons[i]) {
            MHD_socket s = MHD_quiesce_daemon(h->daemons[i]);
            if (s != MHD_INVALID_SOCKET)
                close(s);
        }
}

int svc_http_connections(const svc_http *h) {
    return h->n_connections;
}
