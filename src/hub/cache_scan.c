/* What the cache holds, and taking things out of it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/strbuf.h"
#include "hub/cache.h"

#define DEPTH_MAX 32
/* A partial file of a program that does not lock (or on a file system without locks) that changed
 * this recently is taken for live. */
#define LIVE_SECONDS 120

/* ------------------------------------------------------------------ walking */

/* Called for each entry that is no folder, with its path below the root. False stops. */
typedef bool (*walk_fn)(void *arg, const char *path, const char *below, const struct stat *s);

static bool walk(const char *root, const char *below, int depth, walk_fn fn, void *arg) {
    char *dir = *below ? qie_path_join(root, below) : strdup(root);
    DIR *d = dir ? opendir(dir) : NULL;
    bool go = true;
    struct dirent *e;
    while (d && go && (e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        char *name = *below ? qie_path_join(below, e->d_name) : strdup(e->d_name);
        char *path = name ? qie_path_join(root, name) : NULL;
        struct stat s;
        if (path && lstat(path, &s) == 0)
            go = S_ISDIR(s.st_mode) ? depth >= DEPTH_MAX || walk(root, name, depth + 1, fn, arg)
                                    : fn(arg, path, name, &s);
        free(path);
        free(name);
    }
    if (d)
        closedir(d);
    free(dir);
    return go;
}

/* Entries of a folder, sorted; each and the array are freed by the caller. */
static char **entries(const char *dir, size_t *n) {
    char **names = NULL;
    struct dirent **list = NULL;
    int k = scandir(dir, &list, NULL, alphasort);
    *n = 0;
    if (k > 0)
        names = calloc((size_t)k, sizeof *names);
    for (int i = 0; i < k; i++) {
        if (names && list[i]->d_name[0] != '.')
            names[(*n)++] = strdup(list[i]->d_name);
        free(list[i]);
    }
    free(list);
    return names;
}

static void free_entries(char **names, size_t n) {
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

static bool is_partial(const char *name) {
    size_t n = strlen(name);
    return n > 11 && !strcmp(name + n - 11, ".incomplete");
}

/* Blob names that links point to. */
typedef struct names {
    char **v;
    size_t n, cap;
} names;

static void names_add(names *l, const char *name) {
    for (size_t i = 0; i < l->n; i++)
        if (!strcmp(l->v[i], name))
            return;
    if (l->n == l->cap) {
        char **p = realloc(l->v, (l->cap ? 2 * l->cap : 64) * sizeof *p);
        if (!p)
            return;
        l->cap = l->cap ? 2 * l->cap : 64;
        l->v = p;
    }
    l->v[l->n] = strdup(name);
    if (l->v[l->n])
        l->n++;
}

static bool names_have(const names *l, const char *name) {
    for (size_t i = 0; i < l->n; i++)
        if (!strcmp(l->v[i], name))
            return true;
    return false;
}

static void names_release(names *l) {
    free_entries(l->v, l->n);
    memset(l, 0, sizeof *l);
}

/* The blob that a link of a snapshot names; NULL for anything else. */
static const char *blob_of(const char *path, char *buf, size_t cap) {
    ssize_t n = readlink(path, buf, cap - 1);
    if (n <= 0)
        return NULL;
    buf[n] = 0;
    const char *slash = strrchr(buf, '/');
    return slash && slash[1] ? slash + 1 : NULL;
}

/* ------------------------------------------------------------------ reading */

typedef struct snapshot_walk {
    qie_cache_revision *r;
    names used;
} snapshot_walk;

static bool add_snapshot_file(void *arg, const char *path, const char *below,
                              const struct stat *s) {
    (void)below;
    snapshot_walk *w = arg;
    char buf[4096];
    struct stat t;
    const char *blob = blob_of(path, buf, sizeof buf);
    w->r->n_files++;
    if (stat(path, &t)) {
        w->r->n_broken++;
        return true;
    }
    if (!blob || !names_have(&w->used, blob))
        w->r->bytes += (int64_t)(S_ISREG(s->st_mode) ? s->st_size : t.st_size);
    if (blob)
        names_add(&w->used, blob);
    if ((int64_t)t.st_mtime > w->r->modified)
        w->r->modified = (int64_t)t.st_mtime;
    return true;
}

typedef struct refs_walk {
    const char *commit;
    qie_strbuf found;
} refs_walk;

static bool add_ref(void *arg, const char *path, const char *below, const struct stat *s) {
    (void)s;
    refs_walk *w = arg;
    unsigned char *text;
    size_t n;
    if (qie_file_read(path, 4096, &text, &n, NULL) != QIE_OK)
        return true;
    if (n >= 40 && !strncmp((char *)text, w->commit, 40))
        qie_strbuf_printf(&w->found, "%s%s", w->found.len ? ", " : "", below);
    free(text);
    return true;
}

static int count_missing(const char *repo_dir, const char *commit, const char *snapshot) {
    qie_hub_listing l;
    int n = 0;
    if (qie_hub_tree_read(repo_dir, commit, &l, NULL) != QIE_OK)
        return qie_model_missing(snapshot, NULL, NULL) == 0 ? 0 : -1;
    for (size_t i = 0; i < l.n; i++) {
        char *path = qie_path_join(snapshot, l.files[i].path);
        struct stat s;
        n += !path || stat(path, &s) || (int64_t)s.st_size != l.files[i].size;
        free(path);
    }
    qie_hub_listing_release(&l);
    return n;
}

static void read_revision(const char *repo_dir, const char *commit, qie_cache_revision *r,
                          names *used) {
    char snapshot[4096], refs[4096];
    snprintf(snapshot, sizeof snapshot, "%s/snapshots/%s", repo_dir, commit);
    snprintf(refs, sizeof refs, "%s/refs", repo_dir);
    snprintf(r->commit, sizeof r->commit, "%.40s", commit);
    snapshot_walk w = {.r = r};
    walk(snapshot, "", 0, add_snapshot_file, &w);
    for (size_t i = 0; i < w.used.n; i++)
        names_add(used, w.used.v[i]);
    names_release(&w.used);
    refs_walk rw = {.commit = commit};
    qie_strbuf_init(&rw.found, 4096);
    walk(refs, "", 0, add_ref, &rw);
    r->refs = qie_strbuf_take(&rw.found);
    r->n_missing = count_missing(repo_dir, commit, snapshot);
}

static bool read_repo(const char *cache, const char *folder, qie_cache_repo *out) {
    char name[256];
    memset(out, 0, sizeof *out);
    out->dir = qie_path_join(cache, folder);
    char probe[4096], blobs[4096];
    snprintf(probe, sizeof probe, "%s/snapshots/x", out->dir ? out->dir : "");
    if (!out->dir || !qie_cache_repo_of(probe, name, sizeof name) || !qie_dir_exists(out->dir)) {
        free(out->dir);
        return false;
    }
    out->repo = strdup(name);
    names used = {0};
    *strrchr(probe, '/') = 0;
    size_t n;
    char **commits = entries(probe, &n);
    out->revisions = calloc(n + 1, sizeof *out->revisions);
    for (size_t i = 0; out->revisions && i < n; i++)
        if (qie_hub_is_commit(commits[i]))
            read_revision(out->dir, commits[i], &out->revisions[out->n++], &used);
    free_entries(commits, n);
    snprintf(blobs, sizeof blobs, "%s/blobs", out->dir);
    char **b = entries(blobs, &n);
    for (size_t i = 0; i < n; i++) {
        char *path = qie_path_join(blobs, b[i]);
        struct stat s;
        if (path && stat(path, &s) == 0) {
            if (is_partial(b[i])) {
                out->n_incomplete++;
                out->incomplete_bytes += (int64_t)s.st_blocks * 512;
            } else {
                out->bytes += (int64_t)s.st_size;
                if (!names_have(&used, b[i])) {
                    out->n_unused++;
                    out->unused_bytes += (int64_t)s.st_size;
                }
            }
        }
        free(path);
    }
    free_entries(b, n);
    names_release(&used);
    return out->repo != NULL;
}

qie_status qie_cache_scan_read(const char *cache, const char *repo, qie_cache_scan *out,
                               qie_error *err) {
    memset(out, 0, sizeof *out);
    char *only = NULL;
    if (repo)
        QIE_TRY(qie_cache_repo_dir(cache, repo, &only, err));
    size_t n;
    char **folders = entries(cache, &n);
    out->repos = calloc(n + 1, sizeof *out->repos);
    for (size_t i = 0; out->repos && i < n; i++)
        if (!strncmp(folders[i], "models--", 8) &&
            (!only || !strcmp(strrchr(only, '/') + 1, folders[i])))
            out->n += read_repo(cache, folders[i], &out->repos[out->n]);
    free_entries(folders, n);
    free(only);
    QIE_FAIL_IF(!out->repos, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}

void qie_cache_scan_release(qie_cache_scan *s) {
    for (size_t i = 0; i < s->n; i++) {
        for (size_t j = 0; j < s->repos[i].n; j++)
            free(s->repos[i].revisions[j].refs);
        free(s->repos[i].revisions);
        free(s->repos[i].repo);
        free(s->repos[i].dir);
    }
    free(s->repos);
    memset(s, 0, sizeof *s);
}

/* ------------------------------------------------------------------ removing */

typedef struct removal {
    bool dry;
    qie_removed_fn fn;
    void *arg;
    qie_cache_removal *out;
    qie_error *err;
    qie_status st;
} removal;

static void drop(removal *r, const char *path, int64_t bytes) {
    if (r->st != QIE_OK)
        return;
    if (!r->dry && unlink(path) && errno != ENOENT) {
        r->st = qie_fail(r->err, QIE_E_IO, path, "cannot remove '%s': %s", path, strerror(errno));
        return;
    }
    r->out->n_files++;
    r->out->bytes += bytes;
    if (r->fn)
        r->fn(r->arg, path, bytes);
}

static bool drop_file(void *arg, const char *path, const char *below, const struct stat *s) {
    (void)below;
    removal *r = arg;
    drop(r, path, S_ISREG(s->st_mode) ? (int64_t)s->st_blocks * 512 : 0);
    return r->st == QIE_OK;
}

/* The folders of a tree whose files are gone. */
static void drop_folders(const char *dir, int depth) {
    DIR *d = opendir(dir);
    struct dirent *e;
    while (d && depth < DEPTH_MAX && (e = readdir(d))) {
        struct stat s;
        char *path = strcmp(e->d_name, ".") && strcmp(e->d_name, "..")
                         ? qie_path_join(dir, e->d_name)
                         : NULL;
        if (path && lstat(path, &s) == 0 && S_ISDIR(s.st_mode))
            drop_folders(path, depth + 1);
        free(path);
    }
    if (d)
        closedir(d);
    rmdir(dir);
}

static void drop_tree(removal *r, const char *dir) {
    if (!qie_dir_exists(dir))
        return;
    walk(dir, "", 0, drop_file, r);
    if (r->st == QIE_OK && !r->dry)
        drop_folders(dir, 0);
}

/* True when somebody holds a lock of the model: a pull is running. */
static bool busy(const char *cache, const char *repo_dir) {
    char *lock = qie_cache_lock_path(cache, repo_dir, "x");
    bool found = false;
    if (lock) {
        *strrchr(lock, '/') = 0;
        size_t n;
        char **locks = entries(lock, &n);
        for (size_t i = 0; i < n && !found; i++) {
            char *path = qie_path_join(lock, locks[i]);
            int fd = -1;
            if (path && qie_lock_try(path, &fd, NULL) == QIE_OK)
                found = fd < 0;
            qie_lock_drop(fd);
            free(path);
        }
        free_entries(locks, n);
    }
    free(lock);
    return found;
}

static qie_status remove_revision(removal *r, const char *cache, const char *repo,
                                  const char *repo_dir, const char *revision) {
    char commit[41], snapshots[4096], path[4200], buf[4096];
    QIE_TRY(qie_cache_commit(cache, repo, revision, commit, r->err));
    snprintf(snapshots, sizeof snapshots, "%s/snapshots", repo_dir);
    /* Blobs that other revisions use stay. */
    names used = {0};
    size_t n;
    char **commits = entries(snapshots, &n);
    qie_cache_revision scratch = {0};
    for (size_t i = 0; i < n; i++)
        if (strcmp(commits[i], commit)) {
            read_revision(repo_dir, commits[i], &scratch, &used);
            free(scratch.refs);
            memset(&scratch, 0, sizeof scratch);
        }
    free_entries(commits, n);
    names mine = {0};
    read_revision(repo_dir, commit, &scratch, &mine);
    /* The refs that point here go too: they would name a snapshot that is not there. */
    char *refs = scratch.refs;
    for (char *save = NULL, *ref = refs ? strtok_r(refs, ", ", &save) : NULL; ref;
         ref = strtok_r(NULL, ", ", &save)) {
        snprintf(path, sizeof path, "%s/refs/%s", repo_dir, ref);
        drop(r, path, 0);
    }
    free(refs);
    snprintf(path, sizeof path, "%s/%s", snapshots, commit);
    drop_tree(r, path);
    snprintf(path, sizeof path, "%s/trees/%s.json", repo_dir, commit);
    if (qie_file_exists(path))
        drop(r, path, 0);
    for (size_t i = 0; i < mine.n; i++)
        if (!names_have(&used, mine.v[i])) {
            struct stat s;
            snprintf(buf, sizeof buf, "%s/blobs/%s", repo_dir, mine.v[i]);
            if (lstat(buf, &s) == 0)
                drop(r, buf, (int64_t)s.st_blocks * 512);
        }
    names_release(&used);
    names_release(&mine);
    r->out->n_snapshots++;
    return r->st;
}

qie_status qie_cache_remove(const char *cache, const char *repo, const char *revision, bool dry,
                            qie_removed_fn fn, void *arg, qie_cache_removal *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    char *repo_dir;
    QIE_TRY(qie_cache_repo_dir(cache, repo, &repo_dir, err));
    removal r = {dry, fn, arg, out, err, QIE_OK};
    qie_status st = QIE_OK;
    if (!qie_dir_exists(repo_dir))
        st = qie_fail(err, QIE_E_NOT_FOUND, "repository",
                      "%s is not in the cache '%s': qwen-edit list shows what is", repo, cache);
    else if (busy(cache, repo_dir))
        st = qie_fail(err, QIE_E_CONFLICT, "repository",
                      "%s is being fetched by another process: stop that first", repo);
    else if (revision)
        st = remove_revision(&r, cache, repo, repo_dir, revision);
    else {
        size_t n;
        char path[4096];
        snprintf(path, sizeof path, "%s/snapshots", repo_dir);
        char **commits = entries(path, &n);
        out->n_snapshots = (int)n;
        free_entries(commits, n);
        drop_tree(&r, repo_dir);
        char *locks = qie_cache_lock_path(cache, repo_dir, "x");
        if (locks) {
            *strrchr(locks, '/') = 0;
            drop_tree(&r, locks);
        }
        free(locks);
        st = r.st;
    }
    free(repo_dir);
    return st;
}

/* ------------------------------------------------------------------ pruning */

/* Remove blobs/NAME while its lock is ours. */
static void prune_blob(removal *r, const char *cache, const qie_cache_repo *repo, const char *name,
                       bool partial) {
    char path[4096], etag[256];
    struct stat s;
    int fd = -1;
    snprintf(path, sizeof path, "%s/blobs/%s", repo->dir, name);
    snprintf(etag, sizeof etag, "%.*s", (int)strcspn(name, "."), name);
    char *lock = qie_cache_lock_path(cache, repo->dir, etag);
    bool mine = lock && qie_lock_try(lock, &fd, NULL) == QIE_OK && fd >= 0;
    if (lstat(path, &s))
        mine = false;
    else if (!mine ||
             (partial && !strstr(name, ".qwen-edit.") && time(NULL) - s.st_mtime < LIVE_SECONDS)) {
        r->out->n_busy++;
        mine = false;
    }
    if (mine) {
        r->out->n_partial += partial;
        drop(r, path, (int64_t)s.st_blocks * 512);
        if (!r->dry)
            unlink(lock); /* held: nobody else can be waiting on this name and miss it (qie_lock_try
                             looks) */
    }
    qie_lock_drop(fd);
    free(lock);
}

static void prune_locks(removal *r, const char *cache, const qie_cache_repo *repo) {
    char *dir = qie_cache_lock_path(cache, repo->dir, "x");
    if (!dir)
        return;
    *strrchr(dir, '/') = 0;
    size_t n;
    char **locks = entries(dir, &n);
    for (size_t i = 0; i < n; i++) {
        char *path = qie_path_join(dir, locks[i]);
        int fd = -1;
        if (path && qie_lock_try(path, &fd, NULL) == QIE_OK && fd >= 0)
            drop(r, path, 0);
        qie_lock_drop(fd);
        free(path);
    }
    free_entries(locks, n);
    if (!r->dry)
        rmdir(dir);
    free(dir);
}

static void prune_repo(removal *r, const char *cache, const qie_cache_repo *repo, bool detached) {
    for (size_t i = 0; detached && i < repo->n && r->st == QIE_OK; i++)
        if (repo->revisions[i].refs && !repo->revisions[i].refs[0])
            r->st = remove_revision(r, cache, repo->repo, repo->dir, repo->revisions[i].commit);
    names used = {0};
    char path[4096];
    snprintf(path, sizeof path, "%s/snapshots", repo->dir);
    size_t n;
    char **commits = entries(path, &n);
    for (size_t i = 0; i < n; i++) {
        qie_cache_revision scratch = {0};
        read_revision(repo->dir, commits[i], &scratch, &used);
        free(scratch.refs);
    }
    free_entries(commits, n);
    snprintf(path, sizeof path, "%s/blobs", repo->dir);
    char **blobs = entries(path, &n);
    for (size_t i = 0; i < n && r->st == QIE_OK; i++)
        if (is_partial(blobs[i]))
            prune_blob(r, cache, repo, blobs[i], true);
        else if (!names_have(&used, blobs[i]))
            prune_blob(r, cache, repo, blobs[i], false);
    free_entries(blobs, n);
    names_release(&used);
    if (r->st == QIE_OK)
        prune_locks(r, cache, repo);
}

qie_status qie_cache_prune(const char *cache, bool detached, bool dry, qie_removed_fn fn, void *arg,
                           qie_cache_removal *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    qie_cache_scan scan;
    QIE_TRY(qie_cache_scan_read(cache, NULL, &scan, err));
    removal r = {dry, fn, arg, out, err, QIE_OK};
    for (size_t i = 0; i < scan.n && r.st == QIE_OK; i++) {
        if (busy(cache, scan.repos[i].dir)) { /* a pull finishes blobs before it links them */
            out->n_busy++;
            continue;
        }
        prune_repo(&r, cache, &scan.repos[i], detached);
    }
    qie_cache_scan_release(&scan);
    return r.st;
}
