/* HTTP behind a small interface (libmicrohttpd inside http.c): requests come whole, answers and
 * streams go out from the loop. A call that waits costs its connection's small pool and no thread.
 */
#ifndef QIE_SERVICE_HTTP_H
#define QIE_SERVICE_HTTP_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"
#include "service/master/loop.h"

typedef struct svc_http svc_http;
typedef struct svc_call svc_call;

typedef struct svc_http_options {
    int listen_fds[2]; /* taken over; -1: none */
    int max_connections;
    size_t max_body_bytes;
    size_t max_bodies_bytes; /* of all requests together */
    const char *spool_dir;   /* bodies above 1 MB wait here */
    void *arg;
    /* Headers are complete. May answer (then the body is not read) or go on. */
    void (*on_head)(void *arg, svc_call *call);
    /* The body is complete: answer now or later. */
    void (*on_request)(void *arg, svc_call *call);
    /* An answer with this status has been queued. */
    void (*on_answer)(void *arg, svc_call *call, int status);
} svc_http_options;

struct svc_call {
    const char *method, *path; /* path decoded, without the query */
    char request_id[72];
    struct sockaddr_storage peer;
    const char *body;
    size_t n_body;
    const void *route; /* the router's */
    char client[96];   /* who asks: set by on_head */
    char args[2][80];  /* parts of the path that the route left open */
    void *state;       /* the handler's */
    void (*on_gone)(
        svc_call *call); /* the client went away, or the answer is out: forget the call */
};

qie_status svc_http_create(const svc_http_options *options, svc_loop *loop, svc_http **out,
                           qie_error *err);
void svc_http_destroy(svc_http *h);
/* Between two rounds of the loop: let the library work. Returns milliseconds until it wants to
 * again, at most `limit`. */
int svc_http_run(svc_http *h, int limit_ms);
/* No new connections. */
void svc_http_stop_listening(svc_http *h);
int svc_http_connections(const svc_http *h);

/* NULL when absent. */
const char *svc_call_header(const svc_call *call, const char *name);
const char *svc_call_query(const svc_call *call, const char *name);
/* Names of query arguments that are not in the list (ended by NULL): the first one, or NULL. */
const char *svc_call_unknown_query(const svc_call *call, const char *const *known);
/* Take the body over, so that it outlives the call; NULL when there is none. Freed in the loop. */
typedef struct svc_body svc_body;
svc_body *svc_call_take_body(svc_call *call);
void svc_body_free(svc_body *body);

/* Headers of the coming answer. */
void svc_call_set_header(svc_call *call, const char *name, const char *value);
/* Answer once. `body` is copied, or with `take` owned from now on (malloc). */
void svc_call_reply(svc_call *call, int status, const char *type, const void *body, size_t n,
                    bool take);
/* The rest of a file; the descriptor is taken over. */
void svc_call_reply_file(svc_call *call, int status, const char *type, int fd, size_t n);
/* Server-sent events. False when so much waits for a slow reader that this piece was dropped. */
void svc_call_stream(svc_call *call, const char *type);
bool svc_call_send(svc_call *call, const char *text, size_t n, bool droppable);
void svc_call_end(svc_call *call);

#endif
