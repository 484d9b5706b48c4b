#define _GNU_SOURCE
#include "hub/http.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <curl/curl.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/strbuf.h"

#define REDIRECT_BODY_MAX \
    65536 /* what is read of a redirect's body to keep the connection; above: closed */

/* ------------------------------------------------------------------ header lines */

static void clear_answer(qie_http_reply *r) {
    r->status = 0;
    r->content_length = r->range_from = r->range_to = r->range_total = -1;
    r->retry_after_s = -1;
    r->etag[0] = r->next[0] = r->location[0] = r->error_code[0] = 0;
    r->etag_weak = r->encoded = false;
}

void qie_http_reply_clear(qie_http_reply *r) {
    memset(r, 0, sizeof *r);
    r->linked_size = -1;
    clear_answer(r);
}

/* Digits only, no sign, no overflow: -1 for anything else. Stops at `end`, which is set when not
 * NULL. */
static int64_t number(const char *s, const char **end) {
    int64_t v = 0;
    const char *p = s;
    while (*p >= '0' && *p <= '9') {
        if (v > (INT64_MAX - 9) / 10)
            return -1;
        v = v * 10 + (*p++ - '0');
    }
    if (end)
        *end = p;
    else if (*p)
        return -1;
    return p == s ? -1 : v;
}

static void take_text(char *out, size_t cap, const char *value) {
    if (strlen(value) < cap) /* a longer one is no value of ours: as if absent */
        memcpy(out, value, strlen(value) + 1);
}

static void take_etag(char *out, size_t cap, bool *weak, const char *value) {
    bool w = !strncmp(value, "W/", 2);
    if (w)
        value += 2;
    size_t n = strlen(value);
    if (n >= 2 && value[0] == '"' && value[n - 1] == '"') {
        value++;
        n -= 2;
    }
    if (n < cap) {
        memcpy(out, value, n);
        out[n] = 0;
        if (weak)
            *weak = w;
    }
}

static void take_content_range(qie_http_reply *r, const char *v) {
    if (strncasecmp(v, "bytes", 5))
        return;
    v += 5;
    while (*v == ' ' || *v == '=')
        v++;
    const char *p;
    int64_t from = -1, to = -1, total = -1;
    if (*v == '*')
        p = v + 1;
    else {
        from = number(v, &p);
        if (from < 0 || *p != '-')
            return;
        to = number(p + 1, &p);
        if (to < from)
            return;
    }
    if (*p != '/')
        return;
    if (p[1] != '*') {
        total = number(p + 1, NULL);
        if (total < 0)
            return;
    }
    r->range_from = from;
    r->range_to = to;
    r->range_total = total;
}

/* Link: <url>; rel="next", <url2>; rel="last" */
static void take_link(qie_http_reply *r, const char *v) {
    while ((v = strchr(v, '<'))) {
        const char *end = strchr(v, '>');
        if (!end)
            return;
        const char *stop = strchr(end, '<'), *rel = strstr(end, "rel=");
        if (rel && (!stop || rel < stop)) {
            rel += 4 + (rel[4] == '"');
            size_t n = (size_t)(end - v - 1);
            if (!strncasecmp(rel, "next", 4) && n < sizeof r->next) {
                memcpy(r->next, v + 1, n);
                r->next[n] = 0;
                return;
            }
        }
        v = end;
    }
}

bool qie_http_reply_line(qie_http_reply *r, const char *line, size_t n, bool trusted) {
    r->header_bytes += n;
    if (r->header_bytes > QIE_HTTP_HEADERS_MAX)
        return false;
    while (n && (line[n - 1] == '\r' || line[n - 1] == '\n' || line[n - 1] == ' ' ||
                 line[n - 1] == '\t'))
        n--;
    if (n >= 9 && !strncasecmp(line, "HTTP/", 5)) {
        clear_answer(r);
        const char *sp = memchr(line, ' ', n);
        for (int i = 0; sp && i < 3; i++) {
            size_t at = (size_t)(sp - line) + 1 + (size_t)i;
            if (at >= n || !isdigit((unsigned char)line[at]))
                break;
            r->status = r->status * 10 + (line[at] - '0');
        }
        return true;
    }
    char name[32], value[QIE_HTTP_URL_MAX];
    const char *colon = n ? memchr(line, ':', n) : NULL;
    if (!colon || (size_t)(colon - line) >= sizeof name || memchr(line, 0, n))
        return true; /* no header that we read */
    memcpy(name, line, (size_t)(colon - line));
    name[colon - line] = 0;
    const char *v = colon + 1, *end = line + n;
    while (v < end && (*v == ' ' || *v == '\t'))
        v++;
    if ((size_t)(end - v) >= sizeof value)
        return true;
    memcpy(value, v, (size_t)(end - v));
    value[end - v] = 0;

    if (!strcasecmp(name, "content-length"))
        r->content_length = number(value, NULL);
    else if (!strcasecmp(name, "content-range"))
        take_content_range(r, value);
    else if (!strcasecmp(name, "content-encoding"))
        r->encoded = strcasecmp(value, "identity") != 0 && value[0];
    else if (!strcasecmp(name, "location"))
        take_text(r->location, sizeof r->location, value);
    else if (!strcasecmp(name, "link"))
        take_link(r, value);
    else if (!strcasecmp(name, "etag")) {
        take_etag(r->etag, sizeof r->etag, &r->etag_weak, value);
        /* A redirect's own ETag describes the text of the redirect, not the file. */
        if (trusted && !r->hub_etag[0] && r->status / 100 == 2)
            take_etag(r->hub_etag, sizeof r->hub_etag, NULL, value);
    } else if (!strcasecmp(name, "retry-after")) {
        int64_t s = number(value, NULL);
        if (s < 0) {
            time_t when = curl_getdate(value, NULL);
            s = when == (time_t)-1 ? -1 : when > time(NULL) ? (int64_t)(when - time(NULL)) : 0;
        }
        r->retry_after_s = s > 600 ? 600 : (int)s;
    } else if (trusted && !strcasecmp(name, "x-linked-etag"))
        take_etag(r->hub_etag, sizeof r->hub_etag, NULL, value);
    else if (trusted && !strcasecmp(name, "x-linked-size"))
        r->linked_size = number(value, NULL);
    else if (trusted && !strcasecmp(name, "x-repo-commit"))
        take_text(r->commit, sizeof r->commit, value);
    else if (trusted && !strcasecmp(name, "x-error-code"))
        take_text(r->error_code, sizeof r->error_code, value);
    return true;
}

/* ------------------------------------------------------------------ URLs */

/* Lower-case scheme://host:port; false when the text is no http or https URL. */
static bool origin_of(const char *url, char *out, size_t cap) {
    CURLU *u = curl_url();
    char *scheme = NULL, *host = NULL, *port = NULL;
    bool ok = u && !curl_url_set(u, CURLUPART_URL, url, 0) &&
              !curl_url_get(u, CURLUPART_SCHEME, &scheme, 0) &&
              !curl_url_get(u, CURLUPART_HOST, &host, 0) &&
              !curl_url_get(u, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT) &&
              (!strcasecmp(scheme, "http") || !strcasecmp(scheme, "https"));
    if (ok) {
        int n = snprintf(out, cap, "%s://%s:%s", scheme, host, port);
        ok = n > 0 && (size_t)n < cap;
        for (char *p = out; ok && *p; p++)
            *p = (char)tolower((unsigned char)*p);
    }
    curl_free(scheme);
    curl_free(host);
    curl_free(port);
    curl_url_cleanup(u);
    return ok;
}

bool qie_http_same_origin(const char *a, const char *b) {
    char x[1024], y[1024];
    return origin_of(a, x, sizeof x) && origin_of(b, y, sizeof y) && !strcmp(x, y);
}

void qie_http_origin(const char *url, char *out, size_t n) {
    char x[1024];
    if (!origin_of(url, x, sizeof x))
        snprintf(x, sizeof x, "(not a URL)");
    /* The usual ports say nothing. */
    size_t len = strlen(x);
    if (len > 4 && !strncmp(x, "https:", 6) && !strcmp(x + len - 4, ":443"))
        x[len - 4] = 0;
    else if (len > 3 && !strncmp(x, "http:", 5) && !strcmp(x + len - 3, ":80"))
        x[len - 3] = 0;
    snprintf(out, n, "%s", x);
}

static bool resolve_url(const char *base, const char *location, char *out, size_t cap) {
    CURLU *u = curl_url();
    char *full = NULL;
    bool ok = u && !curl_url_set(u, CURLUPART_URL, base, 0) &&
              !curl_url_set(u, CURLUPART_URL, location, CURLU_URLENCODE) &&
              !curl_url_get(u, CURLUPART_URL, &full, 0) && strlen(full) < cap;
    if (ok)
        memcpy(out, full, strlen(full) + 1);
    curl_free(full);
    curl_url_cleanup(u);
    return ok;
}

bool qie_http_resolve(const char *base, const char *location, char *out, size_t cap) {
    return resolve_url(base, location, out, cap);
}

void qie_url_escape(char *out, size_t cap, const char *text, bool keep_slash) {
    size_t n = strlen(out);
    for (const unsigned char *p = (const unsigned char *)text; *p && n + 4 < cap; p++) {
        if (isalnum(*p) || strchr("-._~", *p) || (keep_slash && *p == '/'))
            out[n++] = (char)*p;
        else
            n += (size_t)snprintf(out + n, 4, "%%%02X", *p);
    }
    out[n] = 0;
}

static const char *env2(const char *a, const char *b) {
    const char *v = getenv(a);
    if (!v || !*v)
        v = getenv(b);
    return v && *v ? v : NULL;
}

/* Hosts of NO_PROXY: "host", ".domain", "*", with an optional port, comma or blank between. */
static bool no_proxy_has(const char *host) {
    const char *list = env2("no_proxy", "NO_PROXY");
    size_t hn = strlen(host);
    while (list && *list) {
        size_t n = strcspn(list, ", ");
        const char *e = list;
        size_t en = n;
        if (en == 1 && *e == '*')
            return true;
        while (en && *e == '.') {
            e++;
            en--;
        }
        if (en && hn >= en && !strncasecmp(host + hn - en, e, en) &&
            (hn == en || host[hn - en - 1] == '.'))
            return true;
        list += n + (list[n] != 0);
    }
    return false;
}

void qie_http_proxy_for(const char *url, char *out, size_t n) {
    char origin[1024];
    out[0] = 0;
    if (!origin_of(url, origin, sizeof origin))
        return;
    bool tls = !strncmp(origin, "https", 5);
    const char *p = tls ? env2("https_proxy", "HTTPS_PROXY") : env2("http_proxy", "HTTP_PROXY");
    if (!p)
        p = env2("all_proxy", "ALL_PROXY");
    char *host = strstr(origin, "://") + 3, *colon = strrchr(host, ':');
    if (colon)
        *colon = 0;
    if (!p || no_proxy_has(host))
        return;
    const char *sep = strstr(p, "://"), *at = strrchr(p, '@');
    if (at && sep && at > sep) /* user:password@ is nobody's business */
        snprintf(out, n, "%.*s%s", (int)(sep + 3 - p), p, at + 1);
    else
        snprintf(out, n, "%s", at ? at + 1 : p);
}

/* ------------------------------------------------------------------ transfers */

typedef struct transfer {
    struct qie_http *owner;
    CURL *easy;
    struct curl_slist *headers, *connect_to;
    qie_http_request req; /* strings owned */
    qie_http_reply reply;
    char error[CURL_ERROR_SIZE];
    bool headers_done, redirecting, stopped, too_large, trusted;
    size_t discarded;
    struct transfer *next;
} transfer;

struct qie_http {
    CURLM *multi;
    qie_http_options opt;
    transfer *active;
    CURL *spare[16]; /* easy handles kept for their connections' settings */
    int n_spare;
};

qie_http_options qie_http_options_default(void) {
    return (qie_http_options){
        .connect_timeout_s = 15, .stall_timeout_s = 30, .buffer_bytes = 262144};
}

qie_status qie_http_create(const qie_http_options *options, qie_http **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(curl_global_init(CURL_GLOBAL_DEFAULT), QIE_E_INTERNAL, err, NULL,
                "libcurl does not start");
    qie_http *h = calloc(1, sizeof *h);
    if (h)
        h->multi = curl_multi_init();
    if (!h || !h->multi) {
        free(h);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "no memory for HTTP");
    }
    h->opt = options ? *options : qie_http_options_default();
    curl_multi_setopt(h->multi, CURLMOPT_MAXCONNECTS, 32L);
    *out = h;
    return QIE_OK;
}

static void transfer_free(transfer *t) {
    if (!t)
        return;
    curl_slist_free_all(t->headers);
    curl_slist_free_all(t->connect_to);
    free((void *)(uintptr_t)t->req.url);
    free((void *)(uintptr_t)t->req.token);
    free((void *)(uintptr_t)t->req.token_origin);
    free((void *)(uintptr_t)t->req.content_type);
    free((void *)(uintptr_t)t->req.header);
    free(t);
}

static void unlink_transfer(qie_http *h, transfer *t) {
    for (transfer **p = &h->active; *p; p = &(*p)->next)
        if (*p == t) {
            *p = t->next;
            return;
        }
}

void qie_http_destroy(qie_http *h) {
    if (!h)
        return;
    while (h->active) {
        transfer *t = h->active;
        h->active = t->next;
        curl_multi_remove_handle(h->multi, t->easy);
        curl_easy_cleanup(t->easy);
        transfer_free(t);
    }
    for (int i = 0; i < h->n_spare; i++)
        curl_easy_cleanup(h->spare[i]);
    curl_multi_cleanup(h->multi);
    free(h);
}

static bool is_redirect(const qie_http_reply *r) {
    return (r->status == 301 || r->status == 302 || r->status == 303 || r->status == 307 ||
            r->status == 308) &&
           r->location[0];
}

/* Called at the blank line behind an answer's headers. */
static bool headers_complete(transfer *t) {
    if (t->reply.status >= 100 && t->reply.status < 200)
        return true; /* the real answer follows */
    t->headers_done = true;
    if (is_redirect(&t->reply) && !t->req.post) {
        char next[QIE_HTTP_URL_MAX];
        t->redirecting = !(t->req.stop_at_redirect && t->req.token_origin &&
                           resolve_url(t->reply.url, t->reply.location, next, sizeof next) &&
                           !qie_http_same_origin(next, t->req.token_origin));
        if (t->redirecting)
            return true;
    }
    if (t->req.on_head && !t->req.on_head(t->req.arg, &t->reply)) {
        t->stopped = true;
        return false;
    }
    return true;
}

static size_t on_header(char *data, size_t size, size_t n, void *arg) {
    transfer *t = arg;
    n *= size;
    if (t->headers_done && !(n >= 5 && !strncasecmp(data, "HTTP/", 5)))
        return n; /* trailers behind a chunked body */
    if (n <= 2 && (n == 0 || data[0] == '\r' || data[0] == '\n'))
        return headers_complete(t) ? n : 0;
    if (n >= 5 && !strncasecmp(data, "HTTP/", 5))
        t->headers_done = false;
    if (!qie_http_reply_line(&t->reply, data, n, t->trusted)) {
        t->too_large = true;
        return 0;
    }
    return n;
}

static size_t on_data(char *data, size_t size, size_t n, void *arg) {
    transfer *t = arg;
    n *= size;
    if (t->redirecting) {
        t->discarded += n;
        return t->discarded > REDIRECT_BODY_MAX ? 0 : n;
    }
    if (t->reply.encoded)
        return 0;
    if (t->req.on_body && !t->req.on_body(t->req.arg, data, n)) {
        t->stopped = true;
        return 0;
    }
    return n;
}

static qie_status add_header(transfer *t, const char *line, qie_error *err) {
    struct curl_slist *l = curl_slist_append(t->headers, line);
    QIE_FAIL_IF(!l, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    t->headers = l;
    return QIE_OK;
}

/* What an answer that is refused at its headers has already put into the socket is lost. To a hub
 * or proxy on this machine that can be megabytes, because nothing slows it down once the window has
 * grown: each request has a connection of its own there, whose window is small until its bytes are
 * wanted. (A lasting small window instead costs a tenth of the throughput.) */
static curl_socket_t open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *a) {
    const transfer *t = arg;
    (void)purpose;
    struct sockaddr_in in;
    memcpy(&in, &a->addr, sizeof in);
    if (a->family == AF_INET && (ntohl(in.sin_addr.s_addr) >> 24) == 127)
        curl_easy_setopt(t->easy, CURLOPT_FORBID_REUSE, 1L);
    int fd = socket(a->family, a->socktype | SOCK_CLOEXEC, a->protocol);
    return fd < 0 ? CURL_SOCKET_BAD : fd;
}

/* Set the handle up for the URL in reply.url: first request or redirect. */
static qie_status prepare(transfer *t, qie_error *err) {
    CURL *c = t->easy;
    const qie_http_options *o = &t->owner->opt;
    const char *url = t->reply.url;
    curl_easy_reset(c);
    curl_slist_free_all(t->headers);
    t->headers = NULL;
    t->headers_done = t->redirecting = false;
    t->discarded = 0;
    t->error[0] = 0;
    t->reply.header_bytes = 0;
    t->trusted = t->req.token_origin && qie_http_same_origin(url, t->req.token_origin);
    QIE_TRY(add_header(t, "Accept-Encoding: identity", err));
    QIE_TRY(add_header(t, "Accept: */*", err));
    if (t->req.token && t->trusted) {
        char line[1100];
        snprintf(line, sizeof line, "Authorization: Bearer %s", t->req.token);
        qie_status st = add_header(t, line, err);
        explicit_bzero(line, sizeof line);
        QIE_TRY(st);
    }
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_OPENSOCKETFUNCTION, open_socket);
    curl_easy_setopt(c, CURLOPT_OPENSOCKETDATA, t);
    curl_easy_setopt(c, CURLOPT_PRIVATE, t);
    if (t->req.head)
        curl_easy_setopt(c, CURLOPT_NOBODY, 1L);
    if (t->req.header)
        QIE_TRY(add_header(t, t->req.header, err));
    if (t->req.post) {
        char line[256] = "Content-Type:"; /* without a value: none is sent */
        if (t->req.content_type)
            snprintf(line, sizeof line, "Content-Type: %.200s", t->req.content_type);
        QIE_TRY(add_header(t, line, err));
        curl_easy_setopt(c, CURLOPT_POST, 1L);
        curl_easy_setopt(c, CURLOPT_POSTFIELDS, t->req.body ? t->req.body : "");
        curl_easy_setopt(c, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)t->req.n_body);
    }
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, t->headers);
    curl_easy_setopt(c, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
    /* HTTP/2 would put all ranges on one TCP connection, which is what parallel ranges are to
     * avoid. */
    curl_easy_setopt(c, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(c, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(c, CURLOPT_QUICK_EXIT, 1L); /* do not wait for a name server that is silent */
    curl_easy_setopt(c, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(c, CURLOPT_CONNECTTIMEOUT, (long)o->connect_timeout_s);
    if (!t->req.may_be_silent) {
        curl_easy_setopt(c, CURLOPT_LOW_SPEED_LIMIT, QIE_HTTP_STALL_BYTES);
        curl_easy_setopt(c, CURLOPT_LOW_SPEED_TIME, (long)o->stall_timeout_s);
    }
    curl_easy_setopt(c, CURLOPT_BUFFERSIZE, o->buffer_bytes);
    curl_easy_setopt(c, CURLOPT_ERRORBUFFER, t->error);
    curl_easy_setopt(c, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(c, CURLOPT_HEADERDATA, t);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, on_data);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, t);
    if (t->req.timeout_s > 0)
        curl_easy_setopt(c, CURLOPT_TIMEOUT, (long)t->req.timeout_s);
    if (o->user_agent)
        curl_easy_setopt(c, CURLOPT_USERAGENT, o->user_agent);
    if (o->ca_bundle)
        curl_easy_setopt(c, CURLOPT_CAINFO, o->ca_bundle);
    /* libcurl reads http_proxy but not HTTP_PROXY (a CGI server's variable); other programs of this
     * field do. */
    if (!strncasecmp(url, "http:", 5) && !getenv("http_proxy") && getenv("HTTP_PROXY"))
        curl_easy_setopt(c, CURLOPT_PROXY, getenv("HTTP_PROXY"));
    if (t->connect_to) {
        curl_easy_setopt(c, CURLOPT_CONNECT_TO, t->connect_to);
        curl_easy_setopt(c, CURLOPT_PROXY, "");
    }
    if (t->req.from >= 0 && !t->req.head) {
        char range[64];
        if (t->req.to >= 0)
            snprintf(range, sizeof range, "%lld-%lld", (long long)t->req.from,
                     (long long)t->req.to);
        else
            snprintf(range, sizeof range, "%lld-", (long long)t->req.from);
        curl_easy_setopt(c, CURLOPT_RANGE, range);
    }
    return QIE_OK;
}

qie_status qie_http_start(qie_http *h, const qie_http_request *request, qie_error *err) {
    char origin[1024];
    QIE_FAIL_IF(
        strlen(request->url) >= QIE_HTTP_URL_MAX || !origin_of(request->url, origin, sizeof origin),
        QIE_E_INVALID, err, "endpoint", "'%.200s' is not an http or https address", request->url);
    QIE_FAIL_IF(request->token && strlen(request->token) > 1000, QIE_E_INVALID, err, "HF_TOKEN",
                "the token is longer than 1000 characters");
    transfer *t = calloc(1, sizeof *t);
    QIE_FAIL_IF(!t, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    t->owner = h;
    t->req = *request;
    t->req.url = strdup(request->url);
    t->req.token = request->token ? strdup(request->token) : NULL;
    t->req.token_origin = request->token_origin ? strdup(request->token_origin) : NULL;
    t->req.content_type = request->content_type ? strdup(request->content_type) : NULL;
    t->req.header = request->header ? strdup(request->header) : NULL;
    t->easy = h->n_spare ? h->spare[--h->n_spare] : curl_easy_init();
    qie_http_reply_clear(&t->reply);
    snprintf(t->reply.url, sizeof t->reply.url, "%s", request->url);
    if (request->address) {
        char line[128];
        snprintf(line, sizeof line, "::%s:", request->address);
        t->connect_to = curl_slist_append(NULL, line);
    }
    t->req.address = NULL; /* kept in connect_to */
    qie_status st = QIE_OK;
    if (!t->req.url || !t->easy || (request->address && !t->connect_to) ||
        (request->token && !t->req.token) || (request->token_origin && !t->req.token_origin) ||
        (request->content_type && !t->req.content_type) || (request->header && !t->req.header))
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (st == QIE_OK)
        st = prepare(t, err);
    if (st == QIE_OK && curl_multi_add_handle(h->multi, t->easy))
        st = qie_fail(err, QIE_E_INTERNAL, NULL, "libcurl refuses a transfer");
    if (st != QIE_OK) {
        if (t->easy)
            curl_easy_cleanup(t->easy);
        transfer_free(t);
        return st;
    }
    t->next = h->active;
    h->active = t;
    return QIE_OK;
}

/* Start over at the Location. Returns true when the transfer goes on; else *why says why not. */
static bool follow(qie_http *h, transfer *t, char *why, size_t why_n) {
    char next[QIE_HTTP_URL_MAX], from[300], to[300];
    if (!resolve_url(t->reply.url, t->reply.location, next, sizeof next)) {
        snprintf(why, why_n, "redirected to something that is no address");
        return false;
    }
    bool from_tls = !strncasecmp(t->reply.url, "https:", 6),
         to_tls = !strncasecmp(next, "https:", 6);
    if (strncasecmp(next, "http", 4) || (next[4] != ':' && !to_tls)) {
        snprintf(why, why_n, "redirected to an address that is not http or https");
        return false;
    }
    qie_http_origin(t->reply.url, from, sizeof from);
    qie_http_origin(next, to, sizeof to);
    if (from_tls && !to_tls) {
        snprintf(why, why_n, "%.100s redirects to unencrypted %.100s", from, to);
        return false;
    }
    if (++t->reply.n_redirects > QIE_HTTP_REDIRECTS_MAX) {
        snprintf(why, why_n, "more than %d redirects, the last to %.100s", QIE_HTTP_REDIRECTS_MAX,
                 to);
        return false;
    }
    if (strcmp(from, to))
        qie_log(QIE_LOG_INFO, "http", "%s redirects to %s", from, to);
    snprintf(t->reply.url, sizeof t->reply.url, "%s", next);
    curl_multi_remove_handle(h->multi, t->easy);
    qie_error e = {0};
    if (prepare(t, &e) != QIE_OK || curl_multi_add_handle(h->multi, t->easy)) {
        snprintf(why, why_n, "out of memory");
        return false;
    }
    return true;
}

static qie_http_end classify(transfer *t, CURLcode code, char *why, size_t why_n) {
    const char *text = t->error[0] ? t->error : curl_easy_strerror(code);
    double connected = 0;
    long tunnel = 0; /* the proxy's answer to CONNECT */
    char host[300];
    qie_http_origin(t->reply.url, host, sizeof host);
    snprintf(why, why_n, "%.120s: %.120s", host, text);
    curl_easy_getinfo(t->easy, CURLINFO_HTTP_CONNECTCODE, &tunnel);
    if (code != CURLE_OK && tunnel == 407)
        return QIE_HTTP_PROXY_AUTH;
    if (code != CURLE_OK && tunnel >= 300)
        return QIE_HTTP_NO_CONNECT;
    switch ((int)code) {
    case CURLE_OK: return QIE_HTTP_OK;
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT:
    case CURLE_PROXY: return QIE_HTTP_NO_CONNECT;
    case CURLE_OPERATION_TIMEDOUT:
        curl_easy_getinfo(t->easy, CURLINFO_PRETRANSFER_TIME, &connected);
        return connected > 0 ? QIE_HTTP_STALLED : QIE_HTTP_NO_CONNECT;
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_ISSUER_ERROR: return QIE_HTTP_TLS;
    case CURLE_WRITE_ERROR:
        if (t->too_large || t->reply.encoded) {
            snprintf(why, why_n, "%.120s: %s", host,
                     t->too_large ? "the headers of the answer are too large"
                                  : "the answer is compressed, which was not asked for");
            return QIE_HTTP_BAD_ANSWER;
        }
        snprintf(why, why_n, "stopped");
        return QIE_HTTP_STOPPED;
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_URL_MALFORMAT:
    case CURLE_BAD_CONTENT_ENCODING:
    case CURLE_HTTP2: return QIE_HTTP_BAD_ANSWER;
    default: return QIE_HTTP_CUT;
    }
}

static void finish(qie_http *h, transfer *t, CURLcode code) {
    char why[300] = "";
    if (t->redirecting &&
        (code == CURLE_OK || code == CURLE_WRITE_ERROR || code == CURLE_PARTIAL_FILE)) {
        if (follow(h, t, why, sizeof why))
            return;
        code = CURLE_OK;
        curl_multi_remove_handle(h->multi, t->easy);
        unlink_transfer(h, t);
        if (t->req.on_end)
            t->req.on_end(t->req.arg, &t->reply, QIE_HTTP_REDIRECT, why);
        curl_easy_cleanup(t->easy);
        transfer_free(t);
        return;
    }
    qie_http_end end = classify(t, code, why, sizeof why);
    if (end == QIE_HTTP_OK && !t->headers_done) {
        end = QIE_HTTP_CUT;
        snprintf(why, sizeof why, "the connection ended without an answer");
    }
    curl_multi_remove_handle(h->multi, t->easy);
    unlink_transfer(h, t);
    if (t->req.on_end)
        t->req.on_end(t->req.arg, &t->reply, end, why);
    if (h->n_spare < (int)(sizeof h->spare / sizeof *h->spare))
        h->spare[h->n_spare++] = t->easy;
    else
        curl_easy_cleanup(t->easy);
    transfer_free(t);
}

int qie_http_run(qie_http *h, int timeout_ms) {
    int running = 0;
    curl_multi_perform(h->multi, &running);
    CURLMsg *m;
    int left;
    bool ended = false;
    while ((m = curl_multi_info_read(h->multi, &left)))
        if (m->msg == CURLMSG_DONE) {
            transfer *t = NULL;
            CURLcode code = m->data.result;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&t);
            finish(h, t, code);
            ended = true;
        }
    /* After an end the caller has something to decide before waiting makes sense. */
    if (!ended)
        curl_multi_poll(h->multi, NULL, 0, timeout_ms, NULL);
    running = 0;
    for (transfer *t = h->active; t; t = t->next)
        running++;
    return running;
}

void qie_http_stop_all(qie_http *h) {
    while (h->active) {
        transfer *t = h->active;
        h->active = t->next;
        curl_multi_remove_handle(h->multi, t->easy);
        if (t->req.on_end)
            t->req.on_end(t->req.arg, &t->reply, QIE_HTTP_STOPPED, "stopped");
        curl_easy_cleanup(t->easy);
        transfer_free(t);
    }
}

/* ------------------------------------------------------------------ one request, waited for */

typedef struct fetch {
    qie_strbuf body;
    qie_http_reply *reply;
    char *why;
    qie_http_end end;
    bool done;
} fetch;

static bool fetch_body(void *arg, const void *data, size_t n) {
    fetch *f = arg;
    qie_strbuf_append(&f->body, data, n);
    return !f->body.failed;
}

static void fetch_end(void *arg, const qie_http_reply *reply, qie_http_end end, const char *text) {
    fetch *f = arg;
    *f->reply = *reply;
    f->end = end;
    f->done = true;
    snprintf(f->why, 256, "%s", text);
}

qie_http_end qie_http_fetch(qie_http *h, const qie_http_request *request, size_t max_bytes,
                            char **text, size_t *n, qie_http_reply *reply, char why[256],
                            bool (*stop)(void *), void *stop_arg) {
    fetch f = {.reply = reply, .why = why};
    qie_http_request r = *request;
    qie_error e = {0};
    qie_http_reply_clear(reply);
    qie_strbuf_init(&f.body, max_bytes);
    why[0] = 0;
    if (text)
        *text = NULL;
    r.on_body = fetch_body;
    r.on_end = fetch_end;
    r.arg = &f;
    if (qie_http_start(h, &r, &e) != QIE_OK) {
        snprintf(why, 256, "%.250s", e.message);
        return QIE_HTTP_BAD_ANSWER;
    }
    while (!f.done) {
        qie_http_run(h, 200);
        if (!f.done && stop && stop(stop_arg)) {
            transfer *t = h->active; /* the one just started is the first */
            curl_multi_remove_handle(h->multi, t->easy);
            unlink_transfer(h, t);
            curl_easy_cleanup(t->easy);
            transfer_free(t);
            f.end = QIE_HTTP_STOPPED;
            snprintf(why, 256, "interrupted");
            break;
        }
    }
    if (f.end == QIE_HTTP_STOPPED && f.body.failed) {
        f.end = QIE_HTTP_BAD_ANSWER;
        snprintf(why, 256, "the answer is larger than %zu bytes", max_bytes);
    }
    if (text && f.end == QIE_HTTP_OK) {
        *n = f.body.len;
        *text = qie_strbuf_take(&f.body);
    }
    qie_strbuf_release(&f.body);
    return f.end;
}
