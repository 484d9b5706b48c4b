/* The Hugging Face cache: where it is, what is in it, which snapshot of a model is complete.
 *
 * Layout (shared with huggingface_hub, in both directions):
 *   <cache>/models--OWNER--NAME/refs/REVISION           the commit
 *                              /snapshots/COMMIT/PATH    link to ../../blobs/ETAG
 *                              /blobs/ETAG               the content; ETAG.*.incomplete while it is
 * fetched /trees/COMMIT.json        what the commit holds
 *   <cache>/.locks/models--OWNER--NAME/ETAG.lock         flock while a blob is fetched or removed
 */
#ifndef QIE_HUB_CACHE_H
#define QIE_HUB_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hub/listing.h"
#include "qie/error.h"

#define QIE_HUB_DEFAULT_REPO "Qwen/Qwen-Image-Edit-2511"

/* The cache folder in force (new string): HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub,
 * XDG_CACHE_HOME/huggingface/hub, ~/.cache/huggingface/hub. *origin (may be NULL) names the
 * variable, static. */
qie_status qie_cache_dir(char **out, const char **origin, qie_error *err);
/* HF_HOME in force (new string; NULL when out of memory or without a home). */
char *qie_cache_home(void);
/* <cache>/models--OWNER--NAME (new string). Errors: QIE_E_INVALID (no repository name). */
qie_status qie_cache_repo_dir(const char *cache, const char *repo, char **out, qie_error *err);

/* Commit that `revision` (NULL: main) stands for in the cache: refs/REVISION or the commit itself.
 * Errors: QIE_E_NOT_FOUND. */
qie_status qie_cache_commit(const char *cache, const char *repo, const char *revision,
                            char commit[41], qie_error *err);

/* True for "OWNER/NAME". */
bool qie_hub_is_repo(const char *name);
/* Folder of the snapshot of a revision (NULL: main) in the cache in force, complete or not (new
 * string). Errors: QIE_E_NOT_FOUND with the command that fetches it. */
qie_status qie_hub_find_snapshot(const char *repo, const char *revision, char **dir,
                                 qie_error *err);
/* QIE_OK when the model folder has all files that it needs to be opened; else QIE_E_NOT_FOUND with
 * their names and the command that fetches them. */
qie_status qie_hub_check_complete(const char *dir, qie_error *err);

/* Called for each file that the folder lacks; return false to stop. */
typedef bool (*qie_missing_fn)(void *arg, const char *path);
/* Files that the folder's own index files name (model_index.json, *.index.json, configs) and that
 * are not there. Returns how many. `dir` need not exist. */
size_t qie_model_missing(const char *dir, qie_missing_fn fn, void *arg);

/* "owner/name" of a path inside the cache's layout; false for any other path. */
bool qie_cache_repo_of(const char *dir, char *repo, size_t cap);

/* ---- what the cache holds */

typedef struct qie_cache_revision {
    char commit[41];
    char *refs;    /* "main, v1"; "" if none */
    int64_t bytes; /* of its files, each blob once */
    int n_files;
    int n_broken;     /* links to blobs that are not there */
    int n_missing;    /* files that the commit has and the snapshot lacks; -1: not known */
    int64_t modified; /* seconds since 1970 */
} qie_cache_revision;

typedef struct qie_cache_repo {
    char *repo; /* "owner/name" */
    char *dir;
    qie_cache_revision *revisions;
    size_t n;
    int64_t bytes;            /* of all blobs */
    int64_t incomplete_bytes; /* allocated by partial files */
    int n_incomplete;
    int64_t unused_bytes; /* blobs that no snapshot links to */
    int n_unused;
} qie_cache_repo;

typedef struct qie_cache_scan {
    qie_cache_repo *repos;
    size_t n;
} qie_cache_scan;

/* Models of the cache (repo NULL: all). A cache that does not exist is an empty one. */
qie_status qie_cache_scan_read(const char *cache, const char *repo, qie_cache_scan *out,
                               qie_error *err);
void qie_cache_scan_release(qie_cache_scan *s);

/* What a removal did or would do. */
typedef struct qie_cache_removal {
    int64_t bytes;
    int n_files, n_snapshots, n_partial, n_busy;
} qie_cache_removal;

typedef void (*qie_removed_fn)(void *arg, const char *path, int64_t bytes);

/* Remove a model, or one revision of it (ref or commit) with the blobs that only it uses. Nothing
 * is removed while another process fetches a file of it (QIE_E_CONFLICT). dry: only report. */
qie_status qie_cache_remove(const char *cache, const char *repo, const char *revision, bool dry,
                            qie_removed_fn fn, void *arg, qie_cache_removal *out, qie_error *err);
/* Remove partial files, blobs without a link and lock files that nobody holds; with `detached` also
 * snapshots that no ref names. Files being fetched at this moment stay (n_busy). */
qie_status qie_cache_prune(const char *cache, bool detached, bool dry, qie_removed_fn fn, void *arg,
                           qie_cache_removal *out, qie_error *err);

/* ---- locks, as huggingface_hub's */

/* flock <path> (made with its folders). *fd -1 with QIE_OK: somebody else holds it. */
qie_status qie_lock_try(const char *path, int *fd, qie_error *err);
void qie_lock_drop(int fd);
/* <cache>/.locks/<repo folder>/<etag>.lock (new string). */
char *qie_cache_lock_path(const char *cache, const char *repo_dir, const char *etag);

#endif
