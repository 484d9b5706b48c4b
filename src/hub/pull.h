/* Fetch a model: what is missing of a revision, from the first hub that has it, checked, into the
 * cache or a plain folder.
 *
 * Guarantees: a file gets its name only when its whole content has the hash that the hub lists (or,
 * where a hub tells none, the size); an interrupted pull leaves complete files and partial ones,
 * and the next goes on from there; two pulls at once share the files between them through lock
 * files; nothing is written outside the target. One network thread, hashing beside it. */
#ifndef QIE_HUB_PULL_H
#define QIE_HUB_PULL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hub/endpoint.h"
#include "qie/error.h"

typedef enum qie_pull_phase {
    QIE_PULL_LISTING = 0,
    QIE_PULL_CHECKING, /* files that are there are being hashed */
    QIE_PULL_FETCHING,
    QIE_PULL_DONE
} qie_pull_phase;

typedef struct qie_pull_progress {
    qie_pull_phase phase;
    size_t n_files, n_done; /* n_waiting: being fetched by another process */
    size_t n_waiting;
    int64_t bytes, bytes_done;
    double bytes_per_s, seconds_left; /* < 0: unknown */
    int n_connections;
    const char *current; /* a file in work; NULL */
} qie_pull_progress;

typedef struct qie_pull_options {
    const char *repo;
    const char *revision;  /* NULL: main */
    const char *local_dir; /* NULL: the cache */
    const char *cache;     /* NULL: the one in force */
    char *const *include;
    size_t n_include;
    char *const *exclude;
    size_t n_exclude;
    const qie_hub_settings *settings;
    int jobs;      /* connections at once; 0: 8 */
    int max_tries; /* of one request without a byte of progress; 0: 16 */
    bool dry_run;
    bool recheck;            /* hash what is there, and fetch again what is damaged */
    bool (*stop)(void *arg); /* polled; true ends the pull with QIE_E_CANCELLED */
    void (*progress)(void *arg, const qie_pull_progress *p);
    /* Things that a user wants to know: "note" or "warning". From the calling thread. */
    void (*say)(void *arg, const char *kind, const char *text);
    /* Of a dry run, and offline: one file that is missing. */
    void (*missing)(void *arg, const char *path, int64_t bytes, int64_t bytes_partial);
    void *arg;
} qie_pull_options;

typedef struct qie_pull_result {
    char *dir; /* the snapshot or local_dir; owned */
    char commit[41];
    size_t n_files, n_fetched;
    int64_t bytes, bytes_missing; /* before the pull */
    int64_t bytes_fetched;        /* over the network, again included */
    double seconds;
    bool unchecked; /* some files had no hash to check */
} qie_pull_result;

/* Errors: QIE_E_INVALID, QIE_E_NOT_FOUND, QIE_E_DENIED, QIE_E_NETWORK, QIE_E_CORRUPT (the hub's
 * content never has its hash), QIE_E_IO (disk, with how much is missing), QIE_E_CANCELLED. *out is
 * released by the caller in every case. */
qie_status qie_pull(const qie_pull_options *options, qie_pull_result *out, qie_error *err);
void qie_pull_result_release(qie_pull_result *r);

#endif
