/* The moving part of a pull: files over several connections, hashed as they arrive. */
#ifndef QIE_HUB_FETCH_H
#define QIE_HUB_FETCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/sync.h"
#include "hub/endpoint.h"
#include "hub/http.h"
#include "hub/listing.h"
#include "hub/partial.h"
#include "qie/error.h"

typedef enum qie_fetch_state {
    QIE_FETCH_QUEUED = 0, /* bytes are missing */
    QIE_FETCH_LOCKED,     /* another process fetches it */
    QIE_FETCH_COMPLETE,   /* all bytes are there, the hash is not */
    QIE_FETCH_DAMAGED,    /* all bytes were there and had the wrong hash */
    QIE_FETCH_DONE,
    QIE_FETCH_FAILED
} qie_fetch_state;

/* One file to fetch. The first block is the caller's, the rest starts as zero. */
typedef struct qie_fetch_file {
    const qie_hub_file *file;
    char *final_path, *partial_path, *older_path, *lock_path; /* older_path may be NULL */
    bool replace;                                             /* final_path is there and wrong */

    _Atomic int state; /* qie_fetch_state */
    int lock_fd;
    bool open;
    qie_partial part;
    unsigned char *claimed; /* of each segment: a connection is at it */
    int n_connections;
    size_t endpoint; /* index of the hub in use */
    int failures;    /* since the last byte */
    int range_refusals, hash_failures, status_failures;
    bool no_ranges, fetched_any, restart;
    double not_before;
    char url[QIE_HTTP_URL_MAX]; /* where the last answer came from; "" asks the hub */
    double url_at;
    char seen_etag[160];
    qie_error cause; /* of the last failure */

    _Atomic int64_t prefix; /* bytes without a gap: written by the network, read by the hasher */
    int64_t hashed;
    qie_hash *hash;
    _Atomic bool hashing;
} qie_fetch_file;

typedef struct qie_fetch {
    /* the caller's */
    qie_fetch_file *files; /* in the order in which they are to be fetched */
    size_t n_files;
    const char *repo, *revision; /* revision: the user's; commit: the listing's */
    char commit[41];
    qie_hub_kind listed_by;
    const qie_hub_settings *settings;
    qie_http *http;
    int jobs, max_tries;
    unsigned mode; /* permissions of a finished file */
    bool (*stop)(void *arg);
    void (*tick)(void *arg, struct qie_fetch *f); /* ten times a second, from the calling thread */
    void (*say)(void *arg, const char *kind, const char *text);
    void *arg;

    /* results, and what progress is made of */
    int64_t bytes_received;
    int64_t bytes_present; /* of all files */
    double bytes_per_s;
    int n_connections;
    qie_error fatal; /* disk full and the like: ends everything */
    char hosts[8][300];
    size_t n_hosts;

    /* private */
    qie_mutex mutex; /* of hashing */
    _Atomic bool network_done, give_up;
    _Atomic int n_hashers;
    int n_hash_threads;                      /* as many as are started */
    bool ranges_work[QIE_HUB_ENDPOINTS_MAX]; /* this hub has answered one with its bytes */
    int64_t claim_bytes, window_bytes;
    double window_at, split_at, started_at, ticked_at;
    int n_asking; /* connections without an answer yet */
    double asked_at;
    double large_at; /* when the first large content began to come; 0: not yet */
} qie_fetch;

/* Fetch until every file is DONE or FAILED, or `stop` says so (QIE_E_CANCELLED). Partial files and
 * their notes stay; locks are given back. Returns the cause of the first failure. */
qie_status qie_fetch_run(qie_fetch *f, qie_error *err);
/* After the http object is gone: closes partial files and gives locks back. */
void qie_fetch_release(qie_fetch *f);
/* Bytes that are there now, in finished and partial files. */
int64_t qie_fetch_present(const qie_fetch *f);

#endif
