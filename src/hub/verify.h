/* Is everything of a model on disk there and right: names, sizes, hashes, headers, tensors.
 *
 * Sizes and hashes are those of the hub's list that lies beside the files (trees/COMMIT.json);
 * without one, the hashes in the names of the cache's blobs or in the download notes of a plain
 * folder. Reads every byte unless told not to; writes nothing. */
#ifndef QIE_HUB_VERIFY_H
#define QIE_HUB_VERIFY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

typedef struct qie_verify_problem {
    const char *path;   /* of the file, relative to the folder; "" for the folder itself */
    const char *kind;   /* "missing", "size", "hash", "unreadable", "header", "tensors", "config";
                           "note": no problem */
    const char *detail; /* lower case, no full stop */
    const char *remedy; /* a command, or what to do */
} qie_verify_problem;

typedef struct qie_verify_options {
    const char *dir;
    const char *repo;  /* NULL: found out from the path or the notes */
    const char *cache; /* --cache-dir, which a remedy must name too; NULL */
    char *const *include;
    size_t n_include;
    char *const *exclude;
    size_t n_exclude;
    bool no_hash;
    int n_threads; /* 0: all cores */
    bool (*stop)(void *arg);
    void (*progress)(void *arg, int64_t bytes_done, int64_t bytes, double bytes_per_s);
    void (*problem)(void *arg, const qie_verify_problem *p);
    void *arg;
} qie_verify_options;

typedef struct qie_verify_result {
    size_t n_files, n_hashed, n_unknown; /* n_unknown: no hash known */
    int64_t bytes, bytes_hashed;
    size_t n_missing, n_damaged; /* files */
    int64_t n_tensors;
    double seconds;
} qie_verify_result;

/* Problems are told through the callback (from the calling thread, after the hashing). Returns
 * QIE_OK when there is none, QIE_E_CORRUPT when something is damaged, QIE_E_NOT_FOUND when files
 * are only missing, each with a summary in err; QIE_E_CANCELLED; QIE_E_IO. */
qie_status qie_verify(const qie_verify_options *options, qie_verify_result *out, qie_error *err);

#endif
