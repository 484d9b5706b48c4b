/* HTTP transfers behind a small interface (libcurl inside http.c): many at once, driven by one
 * thread.
 *
 * Guarantees: redirects are followed here and not by the library, so that the token goes to the
 * origin it belongs to and nowhere else; https never falls back to http; headers and bodies of
 * answers have ceilings; a transfer that brings less than QIE_HTTP_STALL_BYTES a second over the
 * stall time ends; compressed answers are refused (they would break ranges and sizes). Does not
 * retry: callers know what a retry may cost. */
#ifndef QIE_HUB_HTTP_H
#define QIE_HUB_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

#define QIE_HTTP_URL_MAX 4096
#define QIE_HTTP_HEADERS_MAX 65536 /* bytes of all header lines of one answer */
#define QIE_HTTP_REDIRECTS_MAX 8
#define QIE_HTTP_STALL_BYTES 256L

typedef enum qie_http_end {
    QIE_HTTP_OK = 0,     /* whole answer received; look at status */
    QIE_HTTP_NO_CONNECT, /* name not resolved, refused, unreachable, proxy */
    QIE_HTTP_TLS,        /* certificate or handshake */
    QIE_HTTP_PROXY_AUTH, /* the proxy wants a password, or another one */
    QIE_HTTP_CUT,        /* connection lost before the end */
    QIE_HTTP_STALLED,    /* nothing for too long, or never an answer */
    QIE_HTTP_REDIRECT,   /* too many, or to something that is not http(s), or from https to http */
    QIE_HTTP_BAD_ANSWER, /* not HTTP, headers too large, compressed */
    QIE_HTTP_STOPPED     /* by the caller's callback */
} qie_http_end;

/* What an answer's headers said. Numbers are -1 when absent or not a number. */
typedef struct qie_http_reply {
    int status;
    int64_t content_length;
    int64_t range_from, range_to, range_total; /* Content-Range; total -1 for "*" */
    int64_t linked_size;                       /* X-Linked-Size, from the hub's own host */
    int retry_after_s;                         /* -1 if absent; at most 600 */
    char etag[160];                            /* of the last answer; without W/ and quotes */
    bool etag_weak;
    char hub_etag[160];  /* X-Linked-Etag, else ETag, of the first answer from the hub's own host */
    char commit[80];     /* X-Repo-Commit, from the hub's own host */
    char error_code[64]; /* X-Error-Code */
    char next[QIE_HTTP_URL_MAX]; /* Link: <...>; rel="next" */
    char location[QIE_HTTP_URL_MAX];
    bool encoded; /* a Content-Encoding other than identity */
    size_t header_bytes;
    int n_redirects;
    char url[QIE_HTTP_URL_MAX]; /* of the last answer */
} qie_http_reply;

void qie_http_reply_clear(qie_http_reply *r);
/* Take one header line (n bytes, any content, line end included or not). `trusted`: it comes from
 * the hub's own host. Returns false when the headers have become too large. */
bool qie_http_reply_line(qie_http_reply *r, const char *line, size_t n, bool trusted);

typedef struct qie_http qie_http;

typedef struct qie_http_options {
    int connect_timeout_s; /* default 15 */
    int stall_timeout_s;   /* default 30 */
    long buffer_bytes;     /* default 262144 */
    const char *ca_bundle; /* NULL: the system's */
    const char *user_agent;
} qie_http_options;
qie_http_options qie_http_options_default(void);

typedef struct qie_http_request {
    bool head;        /* HEAD instead of GET */
    bool post;        /* POST instead of GET; a redirect is then the answer and is not followed */
    const void *body; /* of a POST; borrowed until the end of the transfer; NULL: empty */
    size_t n_body;
    const char *content_type; /* of that body; NULL: none said */
    const char *header;       /* one more line, "Name: value"; NULL: none */
    bool may_be_silent;       /* no stall limit: the answer is a stream of events */
    const char *url;
    const char *token;        /* NULL: none */
    const char *token_origin; /* URL whose scheme, host and port may see the token */
    int64_t from, to;      /* bytes from..to, both inclusive; from < 0: whole; to < 0: to the end */
    bool stop_at_redirect; /* the 3xx itself is the answer when it leaves token_origin's host */
    int timeout_s;         /* of the whole transfer; 0: none */
    const char *address;   /* "1.2.3.4" or "[::1]": connect there whatever the host is, and to no
                              proxy; NULL: resolve */
    /* Headers of the final answer are complete; false stops. May be NULL. */
    bool (*on_head)(void *arg, const qie_http_reply *reply);
    /* Bytes of the final answer; false stops. Bodies of redirects are not delivered. May be NULL.
     */
    bool (*on_body)(void *arg, const void *data, size_t n);
    /* The transfer has ended; `text` explains anything but QIE_HTTP_OK. Called once, from
     * qie_http_run. */
    void (*on_end)(void *arg, const qie_http_reply *reply, qie_http_end end, const char *text);
    void *arg;
} qie_http_request;

/* Errors: QIE_E_NO_MEMORY, QIE_E_INTERNAL. */
qie_status qie_http_create(const qie_http_options *options, qie_http **out, qie_error *err);
/* Ends what runs without calling on_end. */
void qie_http_destroy(qie_http *h);
/* Strings of the request are copied. Errors: QIE_E_INVALID (URL), QIE_E_NO_MEMORY. */
qie_status qie_http_start(qie_http *h, const qie_http_request *request, qie_error *err);
/* Drive the transfers for at most timeout_ms; returns how many still run. */
int qie_http_run(qie_http *h, int timeout_ms);
/* End every transfer; each on_end is called with QIE_HTTP_STOPPED. */
void qie_http_stop_all(qie_http *h);

/* One request, waited for; the body, at most max_bytes, as a new string in *text (free(); NULL when
 * text is NULL). Returns QIE_HTTP_OK whatever the HTTP status was; *why explains other ends.
 * `stop`: may be NULL; looked at five times a second, ends the wait with QIE_HTTP_STOPPED when it
 * returns true. */
qie_http_end qie_http_fetch(qie_http *h, const qie_http_request *request, size_t max_bytes,
                            char **text, size_t *n, qie_http_reply *reply, char why[256],
                            bool (*stop)(void *), void *stop_arg);

/* True when both URLs have the same scheme, host and port. */
bool qie_http_same_origin(const char *a, const char *b);
/* "scheme://host:port" of a URL, for messages (credentials and path left out). */
void qie_http_origin(const char *url, char *out, size_t n);
/* The proxy that a URL would be fetched through, without credentials; "" for none. */
void qie_http_proxy_for(const char *url, char *out, size_t n);
/* What a Location means on a page; false when that is no address. */
bool qie_http_resolve(const char *base, const char *location, char *out, size_t cap);
/* Append `text` percent-encoded; '/' stays when keep_slash. */
void qie_url_escape(char *out, size_t cap, const char *text, bool keep_slash);

#endif
