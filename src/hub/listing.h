/* What a model repository holds at one commit: paths, sizes, hashes. Parsed from a hub's answers
 * and kept beside the files (trees/<commit>.json, as huggingface_hub does), so that completeness
 * can be told offline.
 *
 * Guarantees: every path is relative, UTF-8, without "..", ".", empty parts, control characters or
 * backslashes, none is a folder of another, none appears twice; every etag can be a file name; the
 * commit is 40 hex digits. An answer that says otherwise is refused as a whole. */
#ifndef QIE_HUB_LISTING_H
#define QIE_HUB_LISTING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "qie/error.h"

#define QIE_HUB_FILES_MAX 20000
#define QIE_HUB_SIZE_MAX ((int64_t)1 << 44) /* 16 TiB: one file of a repository */
#define QIE_HUB_JSON_MAX ((size_t)64 << 20) /* one page of an answer */
#define QIE_HUB_ETAG_MAX 129

typedef struct qie_hub_file {
    char *path;
    int64_t size;                /* -1: not told */
    char etag[QIE_HUB_ETAG_MAX]; /* name of the blob in the cache: the hash where the hub tells one
                                  */
    qie_hash_kind hash;          /* what etag is; QIE_HASH_NONE: content cannot be checked */
    char blob_id[41];            /* git's sha1 of the entry; "" if not told */
    bool lfs;
} qie_hub_file;

typedef struct qie_hub_listing {
    char commit[41];
    qie_hub_file *files; /* ordered by path after qie_hub_listing_finish */
    size_t n, cap;
} qie_hub_listing;

void qie_hub_listing_release(qie_hub_listing *l);
/* Add one file (etag may be ""). Errors: QIE_E_CORRUPT (unsafe name or number), QIE_E_NO_MEMORY. */
qie_status qie_hub_listing_add(qie_hub_listing *l, const char *path, size_t path_bytes,
                               int64_t size, const char *etag, const char *blob_id, bool lfs,
                               qie_error *err);
/* Sort and refuse duplicates and files that are folders of others. */
qie_status qie_hub_listing_finish(qie_hub_listing *l, qie_error *err);
const qie_hub_file *qie_hub_listing_find(const qie_hub_listing *l, const char *path);
/* Drop what the patterns (as in a shell, '*' also matches '/'; "folder/" means all in it) do not
 * select. */
void qie_hub_listing_filter(qie_hub_listing *l, char *const *include, size_t n_include,
                            char *const *exclude, size_t n_exclude);

/* One page of GET /api/models/R/tree/C?recursive=true. */
qie_status qie_hub_parse_tree(const char *text, size_t n, qie_hub_listing *l, qie_error *err);
/* GET /api/models/R/revision/REV: the commit; with `files` also the siblings (sizes and hashes when
 * told). */
qie_status qie_hub_parse_revision(const char *text, size_t n, bool files, qie_hub_listing *l,
                                  qie_error *err);
/* ModelScope's GET /api/v1/models/R/repo/files: makes a commit from the content when none is told.
 */
qie_status qie_hub_parse_modelscope(const char *text, size_t n, qie_hub_listing *l, qie_error *err);

/* trees/<commit>.json: the same as in huggingface_hub. Reading: QIE_E_NOT_FOUND, QIE_E_CORRUPT. */
qie_status qie_hub_tree_read(const char *folder, const char *commit, qie_hub_listing *l,
                             qie_error *err);
qie_status qie_hub_tree_write(const char *folder, const qie_hub_listing *l, qie_error *err);

/* True if the text can be a path inside a folder of ours. */
bool qie_hub_path_is_safe(const char *path, size_t n);
/* True for "name" and "owner/name" as the hubs allow them. */
bool qie_hub_repo_is_valid(const char *repo);
/* True for a branch, tag or commit that can also be a path below refs/. */
bool qie_hub_revision_is_valid(const char *revision);
bool qie_hub_is_commit(const char *text);

#endif
