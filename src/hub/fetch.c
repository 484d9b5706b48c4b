/* How the work is divided: index 0 of one qie_parallel_for is the network loop (every connection,
 * all decisions, all writes), the others hash. A file belongs to the network until its last byte is
 * there; the hasher only reads below `prefix`, and bytes below it are never written again, so no
 * lock is held while either works. The state changes that cross over: COMPLETE (network -> hasher),
 * DONE and DAMAGED (hasher -> network).
 *
 * If the pool gives a single thread, the network loop ends when nothing is left to fetch, the
 * hashing follows, and qie_fetch_run starts another round for what was damaged. */
#define _GNU_SOURCE
#include "hub/fetch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/parallel.h"
#include "hub/cache.h"

/* What a connection collects before it writes: fewer system calls than libcurl's 16 KiB pieces, and
 * little enough to lose when killed. */
#define BUFFER_BYTES ((size_t)128 << 10)
/* A second connection to one file only while all together bring less: above, the one is not what
 * limits, and a file that arrives in order is hashed in step. */
#define SPLIT_BELOW_BYTES_PER_S 3e8
#define FIRST_CLAIM ((int64_t)32 << 20)
#define LARGE_BYTES ((int64_t)1 << 20)
#define MAX_CLAIM ((int64_t)1 << 30)
#define CLAIM_SECONDS \
    4.0 /* of one connection's speed: long against a round trip, short against the end */
/* Signed addresses live an hour or less. */
#define URL_LIFETIME_S 600.0
#define HASH_TRIES 5
#define ASKING_MAX 4
typedef struct conn {
    qie_fetch *f;
    qie_fetch_file *it;
    int64_t at, end; /* next byte to take and end of the claim */
    int64_t skip;    /* bytes to drop before: an answer from the start although a range was asked */
    size_t i_from, i_to; /* claimed segments */
    bool ranged, direct; /* asked for a range; asked at it->url */
    size_t endpoint;
    bool answered; /* with a head */
    bool complete; /* the claim is filled */
    bool part;     /* answered with the range that was asked */
    int64_t got;
    double started;
    char refused[300]; /* why on_head stopped it; "" if it did not */
    bool counts_as_status;
    qie_status write_status;
    qie_error write_error;
    size_t fill;
    /* Its own and nobody else's, so that it stays in the cache of the processor that fills and
     * writes it: handing such buffers over to a hasher cost a third of the network's time. */
    unsigned char data[BUFFER_BYTES];
} conn;

/* ------------------------------------------------------------------ words */

static void say(qie_fetch *f, const char *kind, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void say(qie_fetch *f, const char *kind, const char *fmt, ...) {
    char text[1200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (f->say)
        f->say(f->arg, kind, text);
}

static void note_host(qie_fetch *f, const char *url) {
    char origin[300];
    qie_http_origin(url, origin, sizeof origin);
    for (size_t i = 0; i < f->n_hosts; i++)
        if (!strcmp(f->hosts[i], origin))
            return;
    if (f->n_hosts < sizeof f->hosts / sizeof *f->hosts)
        memcpy(f->hosts[f->n_hosts++], origin, sizeof origin);
    say(f, "note", "files come from %s", origin);
}

/* ------------------------------------------------------------------ opening */

static const qie_endpoint *endpoint_of(const qie_fetch *f, size_t i) {
    return &f->settings->endpoints[i];
}

static void publish_prefix(qie_fetch_file *it) {
    atomic_store(&it->prefix, qie_partial_prefix(&it->part));
}

static void set_done(qie_fetch_file *it) {
    qie_partial_close(&it->part);
    it->open = false;
    free(it->claimed);
    it->claimed = NULL;
    qie_hash_destroy(it->hash);
    it->hash = NULL;
    qie_lock_drop(it->lock_fd);
    it->lock_fd = -1;
}

/* What is open stays open until qie_fetch_release: a hasher may be reading it. */
static void fail_file(qie_fetch_file *it, const qie_error *cause) {
    if (cause)
        it->cause = *cause;
    atomic_store(&it->state, QIE_FETCH_FAILED);
}

/* Take the lock and open the partial file. Afterwards the state is QUEUED (and open), COMPLETE,
 * LOCKED, DONE or FAILED. */
static void open_file(qie_fetch *f, qie_fetch_file *it) {
    qie_error e = {0};
    qie_status st = QIE_OK;
    if (it->lock_fd < 0)
        st = qie_lock_try(it->lock_path, &it->lock_fd, &e);
    if (st == QIE_OK && it->lock_fd < 0) {
        atomic_store(&it->state, QIE_FETCH_LOCKED);
        it->not_before = qie_now_s() + 0.3;
        return;
    }
    /* Somebody else may have finished it while we waited. */
    if (st == QIE_OK && !it->replace) {
        int fd = open(it->final_path, O_RDONLY | O_CLOEXEC);
        int64_t size = fd >= 0 ? (int64_t)lseek(fd, 0, SEEK_END) : -1;
        if (fd >= 0)
            close(fd);
        if (size == it->file->size) {
            set_done(it);
            atomic_store(&it->state, QIE_FETCH_DONE);
            return;
        }
    }
    if (st == QIE_OK)
        st = qie_partial_open(&it->part, it->partial_path, it->older_path, it->file->size,
                              it->file->etag, &e);
    if (st == QIE_OK) {
        it->open = true;
        it->claimed = calloc(it->part.n_segments + 1, 1);
        if (!it->claimed)
            st = qie_fail(&e, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    if (st != QIE_OK) {
        fail_file(it, &e);
        f->fatal = e; /* the folder does not let itself be written: no other file will do better */
        return;
    }
    it->hashed = 0;
    publish_prefix(it);
    atomic_store(&it->state, atomic_load(&it->prefix) == it->file->size ? QIE_FETCH_COMPLETE
                                                                        : QIE_FETCH_QUEUED);
}

/* ------------------------------------------------------------------ one connection */

static bool flush(conn *c) {
    if (c->write_status == QIE_OK && c->fill) {
        qie_fetch_file *it = c->it;
        c->write_status = qie_partial_write(&it->part, c->at, c->data, c->fill, &c->write_error);
        if (c->write_status == QIE_OK) {
            c->at += (int64_t)c->fill;
            publish_prefix(it);
        }
    }
    c->fill = 0;
    return c->write_status == QIE_OK;
}

static bool refuse(conn *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool refuse(conn *c, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->refused, sizeof c->refused, fmt, ap);
    va_end(ap);
    return false;
}

/* The hub's own word on the file against what it listed. */
static bool check_etag(conn *c, const qie_http_reply *r) {
    qie_fetch_file *it = c->it;
    const char *listed = it->file->etag;
    if (it->file->hash != QIE_HASH_NONE) {
        /* Only names of the same kind can be compared: a CDN has its own. */
        if (r->hub_etag[0] && qie_hash_kind_of(r->hub_etag) == it->file->hash &&
            strcmp(r->hub_etag, listed))
            return refuse(
                c, "the hub now calls the file %.20s... instead of %.20s... (its ETag changed)",
                r->hub_etag, listed);
        return true; /* the hash of the content decides in the end */
    }
    /* Nothing to compare the content with: parts of two versions must not be put together. */
    const char *etag = r->hub_etag[0] ? r->hub_etag : r->etag;
    if (it->seen_etag[0] && strcmp(it->seen_etag, etag)) {
        it->restart = true;
        return refuse(c, "the file changed while it was fetched (its ETag did): starting it again");
    }
    snprintf(it->seen_etag, sizeof it->seen_etag, "%s", etag);
    return true;
}

static bool accept_whole(conn *c, const qie_http_reply *r) {
    qie_fetch_file *it = c->it;
    if (r->content_length >= 0 && r->content_length != it->file->size)
        return refuse(c, "the server sends %lld bytes, the file has %lld",
                      (long long)r->content_length, (long long)it->file->size);
    if (!c->ranged)
        c->skip = c->at;
    else if (c->at > 0)
        return refuse(c, "the server sends the whole file instead of the range");
    if (c->ranged && it->n_connections > 1)
        return true; /* the first claim from its start; the rest is asked again */
    /* The one connection there is gets everything. */
    c->end = it->file->size;
    c->i_to = it->part.n_segments;
    memset(it->claimed, 1, it->part.n_segments);
    return true;
}

/* One stream with everything costs what is there already: only where ranges do not work, which a
 * server that has answered one with its bytes does not show by stumbling. */
static void count_range_refusal(const qie_fetch *f, qie_fetch_file *it) {
    it->range_refusals++;
    if (it->range_refusals >= (f->ranges_work[it->endpoint] ? 10 : 3))
        it->no_ranges = true;
}

static void note_answer(conn *c) {
    if (!c->answered)
        c->f->n_asking--;
    c->answered = true;
}

static bool on_head(void *arg, const qie_http_reply *r) {
    conn *c = arg;
    note_answer(c);
    qie_fetch_file *it = c->it;
    int64_t size = it->file->size;
    if (r->status == 206) {
        if (!c->ranged)
            return refuse(c, "the server sends a part although the whole was asked for");
        if (r->range_from >= 0) {
            if (r->range_from != c->at || r->range_to >= c->end)
                return refuse(c, "the server sends bytes %lld-%lld instead of %lld-%lld",
                              (long long)r->range_from, (long long)r->range_to, (long long)c->at,
                              (long long)c->end - 1);
            if (r->range_total >= 0 && r->range_total != size)
                return refuse(c, "the server says the file has %lld bytes, it was listed with %lld",
                              (long long)r->range_total, (long long)size);
        } else if (r->content_length != c->end - c->at)
            return refuse(c, "the server does not say which part it sends");
        c->part = true;
    } else if (r->status == 200) {
        if (!accept_whole(c, r)) {
            if (c->ranged && c->at > 0)
                count_range_refusal(c->f, it);
            return false;
        }
    } else {
        c->counts_as_status = true;
        return refuse(c, "the server answers %d", r->status);
    }
    if (!check_etag(c, r))
        return false;
    note_host(c->f, r->url);
    if (r->n_redirects > 0 && !c->direct) {
        snprintf(it->url, sizeof it->url, "%s", r->url);
        it->url_at = qie_now_s();
    }
    return true;
}

static void note_received(qie_fetch *f, int64_t n) {
    f->bytes_received += n;
    if (f->large_at > 0 || f->bytes_received < LARGE_BYTES)
        return;
    f->large_at = f->window_at = qie_now_s();
    f->window_bytes = f->bytes_received;
    f->bytes_per_s = 0;
}

static bool on_body(void *arg, const void *data, size_t n) {
    conn *c = arg;
    const unsigned char *p = data;
    note_received(c->f, (int64_t)n);
    if (c->skip > 0) {
        size_t drop = (int64_t)n < c->skip ? n : (size_t)c->skip;
        c->skip -= (int64_t)drop;
        p += drop;
        n -= drop;
    }
    int64_t room = c->end - c->at - (int64_t)c->fill;
    bool more = (int64_t)n > room;
    if (more)
        n = (size_t)room;
    c->got += (int64_t)n;
    while (n) {
        size_t take = BUFFER_BYTES - c->fill < n ? BUFFER_BYTES - c->fill : n;
        memcpy(c->data + c->fill, p, take);
        c->fill += take;
        p += take;
        n -= take;
        if (c->fill == BUFFER_BYTES && !flush(c))
            return false;
    }
    if (c->at + (int64_t)c->fill == c->end) {
        if (!flush(c))
            return false;
        c->complete = true;
    }
    return !more;
}

/* ------------------------------------------------------------------ what an end means */

static void wait_before(qie_fetch_file *it, int k, int retry_after_s) {
    it->not_before = qie_now_s() + qie_hub_backoff(k, retry_after_s);
}

/* The next hub of the list, if there is one. */
static bool next_endpoint(qie_fetch *f, qie_fetch_file *it) {
    if (it->endpoint + 1 >= f->settings->n_endpoints)
        return false;
    it->endpoint++;
    it->url[0] = 0;
    it->failures = it->status_failures = it->range_refusals = it->hash_failures = 0;
    it->no_ranges = false;
    it->not_before = 0;
    say(f, "warning", "'%s': %s; going on with %s", it->file->path, it->cause.message,
        endpoint_of(f, it->endpoint)->url);
    return true;
}

static void count_failure(qie_fetch *f, qie_fetch_file *it, int retry_after_s) {
    wait_before(it, it->failures, retry_after_s);
    it->failures++;
    qie_log(QIE_LOG_INFO, "hub", "'%s': %s; try %d of %d in %.1f s", it->file->path,
            it->cause.message, it->failures + 1, f->max_tries, it->not_before - qie_now_s());
    if (it->failures >= f->max_tries && !next_endpoint(f, it) && it->n_connections == 0)
        fail_file(it, NULL);
}

static void on_status(qie_fetch *f, conn *c, const qie_http_reply *r) {
    qie_fetch_file *it = c->it;
    const qie_endpoint *e = endpoint_of(f, c->endpoint);
    if (!c->direct && r->status != 416 && !qie_http_same_origin(r->url, e->url)) {
        char origin[300];
        qie_http_origin(r->url, origin, sizeof origin);
        qie_fail(
            &it->cause, QIE_E_NETWORK, NULL,
            "%s, to which %s sends for '%s', answers %d: try again later, or name another hub with "
            "--endpoint",
            origin, e->url, it->file->path, r->status);
        count_failure(f, it, r->retry_after_s);
        return;
    }
    if (c->direct) { /* a signed address that is over: the hub knows a new one */
        it->url[0] = 0;
        if (r->status == 416 || qie_hub_may_retry(r->status)) {
            qie_fail(&it->cause, QIE_E_NETWORK, NULL, "the server answers %d", r->status);
            count_failure(f, it, r->retry_after_s);
        }
        return;
    }
    if (qie_hub_may_retry(r->status)) {
        qie_hub_refusal(f->settings, e, f->repo, f->revision, it->file->path, r, &it->cause);
        count_failure(f, it, r->retry_after_s);
        return;
    }
    if (r->status == 416) {
        qie_fail(&it->cause, QIE_E_NETWORK, NULL,
                 "%s says that '%s' is shorter than the %lld bytes that were listed (416)", e->url,
                 it->file->path, (long long)it->file->size);
        count_range_refusal(f, it);
        count_failure(f, it, -1);
        return;
    }
    /* 401, 403, 404: said once more in case it was a stumble of a mirror, then believed. */
    qie_hub_refusal(f->settings, e, f->repo, f->revision, it->file->path, r, &it->cause);
    wait_before(it, 1, -1);
    if (++it->status_failures >= 3 && !next_endpoint(f, it) && it->n_connections == 0)
        fail_file(it, NULL);
}

static void measure(qie_fetch *f, const conn *c) {
    double s = qie_now_s() - c->started;
    if (c->got < (1 << 20) || s <= 0)
        return;
    double claim = (double)c->got / s * CLAIM_SECONDS;
    f->claim_bytes = claim < (double)QIE_PARTIAL_SEGMENT ? QIE_PARTIAL_SEGMENT
                     : claim > (double)MAX_CLAIM         ? MAX_CLAIM
                                                         : (int64_t)claim;
}

static void on_end(void *arg, const qie_http_reply *r, qie_http_end end, const char *text) {
    conn *c = arg;
    qie_fetch *f = c->f;
    qie_fetch_file *it = c->it;
    flush(c);
    note_answer(c);
    it->n_connections--;
    f->n_connections--;
    for (size_t i = c->i_from; i < c->i_to; i++)
        it->claimed[i] = 0;
    if (f->fatal.status) {
        free(c);
        return;
    }
    measure(f, c);
    if (c->got > 0) {
        it->failures = it->status_failures = 0;
        it->fetched_any = true;
        if (c->part) {
            it->range_refusals = 0;
            f->ranges_work[c->endpoint] = true;
        }
    }
    if (c->write_status != QIE_OK) {
        f->fatal = c->write_error;
        it->cause = c->write_error;
    } else if (c->complete)
        it->not_before = 0;
    else if (c->counts_as_status)
        on_status(f, c, r);
    else if (c->refused[0]) {
        qie_fail(&it->cause, QIE_E_NETWORK, NULL, "%s, '%s': %s", endpoint_of(f, c->endpoint)->url,
                 it->file->path, c->refused);
        count_failure(f, it, -1);
    } else {
        char bytes[64];
        if (end == QIE_HTTP_OK) {
            snprintf(bytes, sizeof bytes, "the answer ended early");
            text = bytes;
        }
        if (c->got > 0) { /* bytes came: ask for the rest soon */
            it->not_before = qie_now_s() + 0.1;
            qie_log(QIE_LOG_INFO, "hub", "'%s': %s after %lld bytes; asking for the rest",
                    it->file->path, text, (long long)c->got);
        } else {
            if (end == QIE_HTTP_OK)
                end = QIE_HTTP_CUT;
            qie_hub_unreachable(f->settings, endpoint_of(f, c->endpoint), end, text, &it->cause);
            if (c->direct)
                it->url[0] = 0;
            count_failure(f, it, -1);
        }
    }
    free(c);
    if (it->open && it->n_connections == 0 && atomic_load(&it->state) == QIE_FETCH_QUEUED &&
        atomic_load(&it->prefix) == it->file->size)
        atomic_store(&it->state, QIE_FETCH_COMPLETE);
}

/* ------------------------------------------------------------------ giving out work */

/* The first free run of bytes; false if everything is there or claimed. */
static bool find_run(const qie_fetch *f, const qie_fetch_file *it, size_t *i_from, size_t *i_to,
                     int64_t *at, int64_t *end) {
    const qie_partial *p = &it->part;
    size_t i = 0;
    if (it->no_ranges) { /* one answer with everything; what is there is dropped as it comes */
        if (it->n_connections)
            return false;
        while (i < p->n_segments && p->done[i] == qie_partial_length(p, i))
            i++;
        *i_from = i;
        *i_to = p->n_segments;
        *at = (int64_t)i * QIE_PARTIAL_SEGMENT + (i < p->n_segments ? p->done[i] : 0);
        *end = p->size;
        return i < p->n_segments;
    }
    while (i < p->n_segments && (it->claimed[i] || p->done[i] == qie_partial_length(p, i)))
        i++;
    if (i == p->n_segments)
        return false;
    *i_from = i;
    *at = (int64_t)i * QIE_PARTIAL_SEGMENT + p->done[i];
    do {
        *end = (int64_t)i * QIE_PARTIAL_SEGMENT + qie_partial_length(p, i);
        i++;
    } while (i < p->n_segments && !it->claimed[i] && p->done[i] == 0 &&
             *end - *at < f->claim_bytes);
    *i_to = i;
    return true;
}

static const char *revision_at(const qie_fetch *f, const qie_endpoint *e) {
    return e->kind == f->listed_by && e->kind == QIE_HUB_HF
               ? f->commit
               : qie_hub_revision_for(e->kind, f->revision);
}

static bool start_one(qie_fetch *f, qie_fetch_file *it) {
    size_t i_from, i_to;
    int64_t at, end;
    if (!find_run(f, it, &i_from, &i_to, &at, &end))
        return false;
    conn *c = calloc(1, sizeof *c);
    if (!c) {
        qie_fail(&f->fatal, QIE_E_NO_MEMORY, NULL, "out of memory");
        return false;
    }
    c->f = f;
    c->it = it;
    c->at = at;
    c->end = end;
    c->i_from = i_from;
    c->i_to = i_to;
    c->endpoint = it->endpoint;
    c->started = qie_now_s();
    const qie_endpoint *e = endpoint_of(f, it->endpoint);
    char url[QIE_HTTP_URL_MAX];
    c->direct = it->url[0] && c->started - it->url_at < URL_LIFETIME_S;
    if (c->direct)
        snprintf(url, sizeof url, "%s", it->url);
    else
        qie_hub_file_url(e, f->repo, revision_at(f, e), it->file->path, url, sizeof url);
    c->ranged = !it->no_ranges && !(at == 0 && end == it->file->size);
    qie_http_request q = {
        .url = url,
        .token = f->settings->token[0] && e->kind == QIE_HUB_HF ? f->settings->token : NULL,
        .token_origin = e->url,
        .from = c->ranged ? at : -1,
        .to = c->ranged ? end - 1 : -1,
        .on_head = on_head,
        .on_body = on_body,
        .on_end = on_end,
        .arg = c,
    };
    qie_error err = {0};
    if (qie_http_start(f->http, &q, &err) != QIE_OK) {
        free(c);
        f->fatal = err;
        return false;
    }
    for (size_t i = i_from; i < i_to; i++)
        it->claimed[i] = 1;
    it->n_connections++;
    f->n_connections++;
    f->n_asking++;
    f->asked_at = c->started;
    return true;
}

/* Measured while something large comes: the small files in front of it say nothing of the line. */
static bool is_slow(const qie_fetch *f, double now) {
    return f->bytes_per_s < SPLIT_BELOW_BYTES_PER_S &&
           (f->large_at > 0 ? now - f->large_at > 0.2 : now - f->started_at > 0.5);
}

/* Another large file at once? As many as there are hashers, each of which then keeps in step with
 * one; more only where the line is slow, because on a fast one they take the processor from each
 * other. */
static bool may_begin(const qie_fetch *f, const qie_fetch_file *it, double now) {
    int n_large = 0;
    if (it->file->size <= FIRST_CLAIM)
        return true;
    for (size_t i = 0; i < f->n_files; i++)
        n_large += f->files[i].n_connections > 0 && f->files[i].file->size > FIRST_CLAIM;
    return n_large < f->n_hash_threads || is_slow(f, now);
}

/* Many small servers take five connections that nobody has accepted yet (Python's, say) and let the
 * next one wait for a second: above this many without an answer, one more now and then. */
static bool may_ask(const qie_fetch *f) {
    return f->n_asking < ASKING_MAX || qie_now_s() - f->asked_at > 0.25;
}

static void schedule(qie_fetch *f) {
    double now = qie_now_s();
    qie_fetch_file *most = NULL;
    int64_t most_left = 0;
    for (size_t i = 0; i < f->n_files && !f->fatal.status; i++) {
        qie_fetch_file *it = &f->files[i];
        int state = atomic_load(&it->state);
        if (state == QIE_FETCH_DAMAGED) {
            qie_error e = {0};
            int tries = it->endpoint + 1 < f->settings->n_endpoints ? 2 : HASH_TRIES;
            if (it->hash_failures >= tries && !next_endpoint(f, it)) {
                fail_file(it, NULL);
                continue;
            }
            it->hashed = 0;
            it->seen_etag[0] = it->url[0] = 0;
            it->fetched_any = false;
            if (qie_partial_reset(&it->part, it->file->etag, &e) != QIE_OK) {
                f->fatal = e;
                return;
            }
            publish_prefix(it);
            atomic_store(&it->state,
                         state = it->file->size ? QIE_FETCH_QUEUED : QIE_FETCH_COMPLETE);
        }
        if ((state != QIE_FETCH_QUEUED && state != QIE_FETCH_LOCKED) || it->not_before > now)
            continue;
        if (it->restart) {
            if (it->n_connections)
                continue;
            qie_error e = {0};
            it->restart = false;
            it->seen_etag[0] = 0;
            if (qie_partial_reset(&it->part, it->file->etag, &e) != QIE_OK) {
                f->fatal = e;
                return;
            }
            publish_prefix(it);
        }
        if (it->failures >= f->max_tries && it->n_connections == 0) {
            fail_file(it, NULL);
            continue;
        }
        if (f->n_connections >= f->jobs || !may_ask(f) ||
            (it->n_connections == 0 && !may_begin(f, it, now)))
            continue;
        if (!it->open) {
            open_file(f, it);
            if (atomic_load(&it->state) != QIE_FETCH_QUEUED)
                continue;
        }
        if (it->n_connections == 0)
            start_one(f, it);
        else if (!it->no_ranges) {
            int64_t left = it->file->size - qie_partial_total(&it->part);
            if (left > most_left) {
                most_left = left;
                most = it;
            }
        }
    }
    /* Spare connections go to the file with the most left, one after the other while that helps. */
    if (most && f->n_connections < f->jobs && may_ask(f) && now - f->split_at > 0.1 &&
        is_slow(f, now) && most_left > QIE_PARTIAL_SEGMENT && !f->fatal.status) {
        f->split_at = now;
        start_one(f, most);
    }
}

static bool all_settled(qie_fetch *f) {
    bool hashers = atomic_load(&f->n_hashers) > 0;
    for (size_t i = 0; i < f->n_files; i++) {
        int s = atomic_load(&f->files[i].state);
        if (s != QIE_FETCH_DONE && s != QIE_FETCH_FAILED && (s != QIE_FETCH_COMPLETE || hashers))
            return false;
    }
    return true;
}

int64_t qie_fetch_present(const qie_fetch *f) {
    int64_t sum = 0;
    for (size_t i = 0; i < f->n_files; i++) {
        const qie_fetch_file *it = &f->files[i];
        int s = atomic_load(&it->state);
        if (s == QIE_FETCH_DONE || s == QIE_FETCH_COMPLETE)
            sum += it->file->size;
        else if (it->open && s == QIE_FETCH_QUEUED)
            sum += qie_partial_total(&it->part);
    }
    return sum;
}

static void tick(qie_fetch *f) {
    double now = qie_now_s(), s = now - f->window_at;
    if (s >= 0.1) {
        double speed = (double)(f->bytes_received - f->window_bytes) / s;
        double keep = f->bytes_per_s > 0 ? 0.8 : 0;
        f->bytes_per_s = keep * f->bytes_per_s + (1 - keep) * speed;
        f->window_at = now;
        f->window_bytes = f->bytes_received;
    }
    if (now - f->ticked_at >= 0.1) {
        f->ticked_at = now;
        f->bytes_present = qie_fetch_present(f);
        if (f->tick)
            f->tick(f->arg, f);
    }
}

static void network_loop(qie_fetch *f) {
    while (!f->fatal.status) {
        if (f->stop && f->stop(f->arg)) {
            qie_fail(&f->fatal, QIE_E_CANCELLED, NULL,
                     "interrupted; what is there is kept: type the same command again to go on");
            break;
        }
        schedule(f);
        if (all_settled(f))
            break;
        /* With no transfer there is nothing to wake the poll: look again soon for hashes and waits.
         */
        qie_http_run(f->http, f->n_connections ? 50 : 5);
        tick(f);
    }
    qie_http_stop_all(f->http); /* what has arrived is written and noted */
    atomic_store(&f->network_done, true);
}

/* ------------------------------------------------------------------ hashing */

static void hash_ended(qie_fetch *f, qie_fetch_file *it) {
    char hex[QIE_HASH_HEX_MAX] = "";
    qie_error e = {0};
    if (it->hash)
        qie_hash_final(it->hash, hex);
    qie_hash_destroy(it->hash);
    it->hash = NULL;
    if (it->file->hash != QIE_HASH_NONE && strcmp(hex, it->file->etag)) {
        it->hash_failures++;
        qie_fail(&it->cause, QIE_E_CORRUPT, it->file->path,
                 "the content of '%s' from %s has not the hash that was listed (%.16s..., expected "
                 "%.16s...), %d times: try another hub with --endpoint",
                 it->file->path, endpoint_of(f, it->endpoint)->url, hex, it->file->etag,
                 it->hash_failures);
        qie_log(QIE_LOG_WARN, "hub",
                "'%s' arrived damaged (wrong hash): thrown away, fetched again", it->file->path);
        atomic_store(&it->state, QIE_FETCH_DAMAGED);
        return;
    }
    if (qie_partial_finish(&it->part, it->final_path, f->mode, &e) != QIE_OK) {
        it->cause = e;
        it->open = false;
        atomic_store(&it->state, QIE_FETCH_FAILED);
        return;
    }
    it->open = false;
    qie_lock_drop(it->lock_fd);
    it->lock_fd = -1;
    atomic_store(&it->state, QIE_FETCH_DONE);
}

/* One piece of one file; false when there is nothing to hash now. */
static bool hash_some(qie_fetch *f, unsigned char *buffer, size_t cap) {
    qie_fetch_file *it = NULL;
    qie_mutex_lock(&f->mutex);
    for (size_t i = 0; i < f->n_files && !it; i++) {
        qie_fetch_file *c = &f->files[i];
        int s = atomic_load(&c->state);
        if ((s != QIE_FETCH_COMPLETE && s != QIE_FETCH_QUEUED) || atomic_load(&c->hashing))
            continue;
        if (s == QIE_FETCH_COMPLETE || atomic_load(&c->prefix) - c->hashed >= (int64_t)cap) {
            it = c;
            atomic_store(&it->hashing, true);
        }
    }
    qie_mutex_unlock(&f->mutex);
    if (!it)
        return false;
    qie_error e = {0};
    /* In this order: what is complete now has its last prefix already. */
    bool complete = atomic_load(&it->state) == QIE_FETCH_COMPLETE;
    int64_t upto = atomic_load(&it->prefix);
    if (!it->hash && it->file->hash != QIE_HASH_NONE)
        qie_hash_create(it->file->hash, it->file->size, &it->hash, &e);
    while (it->hashed < upto && !atomic_load(&f->give_up)) {
        size_t n = upto - it->hashed < (int64_t)cap ? (size_t)(upto - it->hashed) : cap;
        ssize_t got = pread(it->part.fd, buffer, n, it->hashed);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break; /* shorter than noted: the hash will say so */
        if (it->hash)
            qie_hash_update(it->hash, buffer, (size_t)got);
        it->hashed += got;
    }
    if (complete && !atomic_load(&f->give_up))
        hash_ended(f, it);
    atomic_store(&it->hashing, false);
    return true;
}

static void hash_loop(qie_fetch *f) {
    size_t cap = (size_t)256 << 10;
    unsigned char *buffer = malloc(cap);
    atomic_fetch_add(&f->n_hashers, 1);
    while (buffer && !atomic_load(&f->give_up)) {
        if (hash_some(f, buffer, cap))
            continue;
        bool left = false;
        for (size_t i = 0; i < f->n_files; i++)
            left = left || atomic_load(&f->files[i].state) == QIE_FETCH_COMPLETE;
        if (!left && atomic_load(&f->network_done))
            break;
        struct timespec ts = {0, 1000000};
        nanosleep(&ts, NULL);
    }
    atomic_fetch_sub(&f->n_hashers, 1);
    free(buffer);
}

static void worker(void *arg, size_t index, int i_thread) {
    (void)i_thread;
    qie_fetch *f = arg;
    if (index == 0) {
        network_loop(f);
        if (f->fatal.status)
            atomic_store(&f->give_up, true);
    } else
        hash_loop(f);
}

qie_status qie_fetch_run(qie_fetch *f, qie_error *err) {
    int hashers = f->n_hash_threads = qie_cpu_count() < 4 ? 1 : 4;
    qie_mutex_init(&f->mutex);
    for (size_t i = 0; i < f->n_files; i++) {
        f->files[i].lock_fd = -1;
        f->files[i].part.fd = -1;
    }
    f->claim_bytes = FIRST_CLAIM;
    f->started_at = f->window_at = qie_now_s();
    for (bool again = true; again && !f->fatal.status;) {
        atomic_store(&f->network_done, false);
        qie_parallel_for(1 + hashers, 1 + (size_t)hashers, worker, f);
        again = false;
        for (size_t i = 0; i < f->n_files; i++) {
            int s = atomic_load(&f->files[i].state);
            again = again || (s != QIE_FETCH_DONE && s != QIE_FETCH_FAILED);
        }
    }
    f->bytes_present = qie_fetch_present(f);
    qie_status st = QIE_OK;
    for (size_t i = 0; i < f->n_files; i++) {
        qie_fetch_file *it = &f->files[i];
        if (st == QIE_OK && atomic_load(&it->state) == QIE_FETCH_FAILED) {
            st = it->cause.status;
            if (err)
                *err = it->cause;
        }
    }
    if (f->fatal.status) {
        st = f->fatal.status;
        if (err)
            *err = f->fatal;
    }
    return st;
}

void qie_fetch_release(qie_fetch *f) {
    for (size_t i = 0; i < f->n_files; i++) {
        set_done(&f->files[i]);
    }
    qie_mutex_release(&f->mutex);
}
