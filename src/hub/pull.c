#define _GNU_SOURCE
#include "hub/pull.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/log.h"
#include "base/parallel.h"
#include "hub/cache.h"
#include "hub/fetch.h"

/* Left free beside the model: logs, other programs. */
#define DISK_RESERVE ((int64_t)64 << 20)

/* One path of the listing and where it goes. */
typedef struct item {
    const qie_hub_file *file;
    char *target; /* where the content lies: blobs/ETAG, or D/path */
    char *partial;
    bool present;       /* complete and, where it was looked at, right */
    bool damaged;       /* present and wrong */
    bool same_as_other; /* another path of the listing has the same content and the same blob */
    int64_t partial_bytes;
} item;

typedef struct pull {
    const qie_pull_options *o;
    qie_hub_client client;
    qie_hub_listing list;
    qie_hub_kind listed_by;
    char *cache, *repo_dir, *snapshot, *notes; /* notes: folder that has trees/ */
    item *items;
    size_t n;
    double started;
    qie_pull_progress progress;
    _Atomic int64_t checked_bytes;
    double shown_at;
    int64_t bytes, bytes_present;
    unsigned mode;
} pull;

static void say(const pull *p, const char *kind, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void say(const pull *p, const char *kind, const char *fmt, ...) {
    char text[1200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (p->o->say)
        p->o->say(p->o->arg, kind, text);
}

static void show(pull *p, bool now) {
    double t = qie_now_s();
    if (!p->o->progress || (!now && t - p->shown_at < 0.1))
        return;
    p->shown_at = t;
    p->o->progress(p->o->arg, &p->progress);
}

static bool stopped(void *arg) {
    const pull *p = arg;
    return p->o->stop && p->o->stop(p->o->arg);
}

static qie_status no_memory(qie_error *err) {
    return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
}

/* ------------------------------------------------------------------ places */

static qie_status parent_dirs(const char *path, qie_error *err) {
    char *dir = strdup(path);
    QIE_FAIL_IF(!dir, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    char *slash = strrchr(dir, '/');
    qie_status st = QIE_OK;
    if (slash && slash != dir) {
        *slash = 0;
        st = qie_mkdirs(dir, err);
    }
    free(dir);
    return st;
}

/* Names from the server go below `root` only: a folder on the way that is a link to elsewhere is
 * refused. */
static qie_status check_no_links(const char *root, const char *path, qie_error *err) {
    char *full = qie_path_join(root, path);
    QIE_FAIL_IF(!full, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    size_t from = strlen(full) - strlen(path);
    qie_status st = QIE_OK;
    for (char *q = full + from; st == QIE_OK && (q = strchr(q, '/')); *q++ = '/') {
        struct stat s;
        *q = 0;
        if (lstat(full, &s) == 0 && !S_ISDIR(s.st_mode))
            st = qie_fail(
                err, QIE_E_IO, full,
                "'%s' is %s, a folder is needed there: remove it and type the command again", full,
                S_ISLNK(s.st_mode) ? "a link" : "a file");
    }
    free(full);
    return st;
}

static qie_status choose_places(pull *p, qie_error *err) {
    const qie_pull_options *o = p->o;
    if (o->cache)
        p->cache = strdup(o->cache);
    else
        QIE_TRY(qie_cache_dir(&p->cache, NULL, err));
    if (!p->cache)
        return no_memory(err);
    QIE_TRY(qie_cache_repo_dir(p->cache, o->repo, &p->repo_dir, err));
    QIE_FAIL_IF(o->revision && !qie_hub_revision_is_valid(o->revision), QIE_E_INVALID, err,
                "--revision", "'%.120s' is no name of a revision", o->revision);
    QIE_FAIL_IF(o->local_dir && !*o->local_dir, QIE_E_INVALID, err, "--local-dir",
                "--local-dir needs the name of a folder");
    int n = o->local_dir ? asprintf(&p->notes, "%s/.cache/huggingface", o->local_dir)
                         : asprintf(&p->notes, "%s", p->repo_dir);
    return n < 0 ? no_memory(err) : QIE_OK;
}

/* The folders and marks that huggingface_hub makes too. */
static qie_status make_places(const pull *p, qie_error *err) {
    static const char tag[] = "Signature: 8a477f597d28d172789f06886806bc55\n"
                              "# This folder is a cache and can be fetched again.\n"
                              "# For information about cache directory tags, see:\n"
                              "#\thttps://bford.info/cachedir/\n";
    const char *root = p->o->local_dir ? p->notes : p->cache;
    QIE_TRY(qie_mkdirs(root, err));
    char *path = qie_path_join(root, "CACHEDIR.TAG");
    if (path && !qie_file_exists(path))
        qie_file_write_note(path, tag, sizeof tag - 1, NULL);
    free(path);
    if (!p->o->local_dir) {
        path = qie_path_join(p->repo_dir, "blobs");
        qie_status st = path ? qie_mkdirs(path, err) : no_memory(err);
        free(path);
        QIE_TRY(st);
        return qie_mkdirs(p->snapshot, err);
    }
    path = qie_path_join(root, ".gitignore");
    if (path && !qie_file_exists(path))
        qie_file_write_note(path, "*", 1, NULL);
    free(path);
    return QIE_OK;
}

/* ------------------------------------------------------------------ what is there */

static int64_t size_at(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode) ? (int64_t)s.st_size : -1;
}

/* True when the file has the hash that is listed. Also copies it to `copy_to` when not NULL. */
static bool content_is(pull *p, const char *path, const qie_hub_file *f, const char *copy_to) {
    int fd = open(path, O_RDONLY | O_CLOEXEC), out = -1;
    qie_hash *h = NULL;
    size_t cap = (size_t)1 << 20;
    unsigned char *buf = malloc(cap);
    bool ok = fd >= 0 && buf;
    if (ok && copy_to) {
        out = open(copy_to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, p->mode);
        ok = out >= 0;
    }
    if (ok && f->hash != QIE_HASH_NONE)
        ok = qie_hash_create(f->hash, f->size, &h, NULL) == QIE_OK;
    int64_t sum = 0;
    while (ok) {
        ssize_t n = read(fd, buf, cap);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        if (h)
            qie_hash_update(h, buf, (size_t)n);
        ok = out < 0 || write(out, buf, (size_t)n) == n;
        sum += n;
        atomic_fetch_add(&p->checked_bytes, n);
        ok = ok && !stopped(p);
    }
    ok = ok && sum == f->size;
    if (ok && h) {
        char hex[QIE_HASH_HEX_MAX];
        qie_hash_final(h, hex);
        ok = !strcmp(hex, f->etag);
    }
    qie_hash_destroy(h);
    if (fd >= 0)
        close(fd);
    if (out >= 0 && close(out))
        ok = false;
    free(buf);
    return ok;
}

static char *metadata_path(const pull *p, const char *path) {
    char *m = NULL;
    return asprintf(&m, "%s/download/%s.metadata", p->notes, path) < 0 ? NULL : m;
}

/* D/.cache/huggingface/download/PATH.metadata: commit, etag, time of writing. True when it vouches
 * for the file. */
static bool metadata_vouches(const pull *p, const item *it) {
    char *path = metadata_path(p, it->file->path), commit[64] = "", etag[200] = "";
    double when = 0;
    bool ok = false;
    FILE *f = path ? fopen(path, "re") : NULL;
    struct stat s;
    if (f) {
        ok = fscanf(f, "%60s %190s %lf", commit, etag, &when) == 3 &&
             !strcmp(etag, it->file->etag) && stat(it->target, &s) == 0 &&
             (double)s.st_mtime - 1 <= when;
        fclose(f);
    }
    free(path);
    return ok;
}

static qie_status metadata_write(const pull *p, const item *it, qie_error *err) {
    char *path = metadata_path(p, it->file->path), text[400];
    if (!path)
        return no_memory(err);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int n = snprintf(text, sizeof text, "%s\n%s\n%lld.%06ld\n", p->list.commit, it->file->etag,
                     (long long)now.tv_sec, now.tv_nsec / 1000);
    qie_status st = parent_dirs(path, err);
    if (st == QIE_OK)
        st = qie_file_write_note(path, text, (size_t)n, err);
    free(path);
    return st;
}

static void check_local(pull *p, item *it) {
    int64_t size = size_at(it->target);
    if (size == it->file->size) {
        it->present = !p->o->recheck && metadata_vouches(p, it);
        if (!it->present)
            it->present = content_is(p, it->target, it->file, NULL);
        it->damaged = !it->present;
    } else
        it->damaged = size >= 0;
    if (it->present || p->o->dry_run)
        return;
    /* The cache may have it: copied and checked on the way. */
    char *blob = NULL;
    if (asprintf(&blob, "%s/blobs/%s", p->repo_dir, it->file->etag) < 0)
        return;
    if (size_at(blob) == it->file->size && parent_dirs(it->partial, NULL) == QIE_OK &&
        parent_dirs(it->target, NULL) == QIE_OK) {
        char *tmp = NULL;
        if (asprintf(&tmp, "%s.copy", it->partial) > 0) {
            it->present = content_is(p, blob, it->file, tmp) && rename(tmp, it->target) == 0;
            if (!it->present)
                unlink(tmp);
            it->damaged = it->damaged && !it->present;
        }
        free(tmp);
    }
    free(blob);
}

static void check_cached(pull *p, item *it) {
    int64_t size = size_at(it->target);
    it->present = size == it->file->size;
    it->damaged = size >= 0 && !it->present;
    if (it->present && p->o->recheck && !content_is(p, it->target, it->file, NULL)) {
        it->present = false;
        it->damaged = true;
    }
    if (it->present || size >= 0)
        return;
    /* Where links are not possible the content itself lies in the snapshot. */
    char *in_snapshot = qie_path_join(p->snapshot, it->file->path);
    struct stat s;
    if (in_snapshot && lstat(in_snapshot, &s) == 0 && S_ISREG(s.st_mode) &&
        (int64_t)s.st_size == it->file->size &&
        (!p->o->recheck || content_is(p, in_snapshot, it->file, NULL)))
        it->present = true;
    free(in_snapshot);
}

static void check_one(void *arg, size_t i, int i_thread) {
    (void)i_thread;
    pull *p = arg;
    item *it = &p->items[i];
    if (it->same_as_other || stopped(p))
        return;
    if (p->o->local_dir)
        check_local(p, it);
    else
        check_cached(p, it);
    struct stat s;
    if (!it->present && stat(it->partial, &s) == 0) {
        it->partial_bytes = (int64_t)s.st_blocks * 512;
        if (it->partial_bytes > it->file->size)
            it->partial_bytes = it->file->size;
    }
    /* Shown by whoever is here; the interface takes one call at a time from this loop's first
     * thread only. */
    if (i_thread == 0 && p->o->recheck) {
        p->progress.phase = QIE_PULL_CHECKING;
        p->progress.bytes_done = atomic_load(&p->checked_bytes);
        show(p, false);
    }
}

/* Items of the listing, largest content last, and which of them are there. */
static int by_size(const void *a, const void *b) {
    int64_t x = ((const item *)a)->file->size, y = ((const item *)b)->file->size;
    return x < y ? -1 : x > y;
}

static qie_status make_items(pull *p, qie_error *err) {
    p->items = calloc(p->list.n + 1, sizeof *p->items);
    if (!p->items)
        return no_memory(err);
    p->n = p->list.n;
    for (size_t i = 0; i < p->n; i++) {
        item *it = &p->items[i];
        const qie_hub_file *f = it->file = &p->list.files[i];
        int a, b;
        if (p->o->local_dir) {
            QIE_TRY(check_no_links(p->o->local_dir, f->path, err));
            a = asprintf(&it->target, "%s/%s", p->o->local_dir, f->path);
            b = asprintf(&it->partial, "%s/download/%s.%s.qwen-edit.incomplete", p->notes, f->path,
                         f->etag);
        } else {
            QIE_TRY(check_no_links(p->snapshot, f->path, err));
            a = asprintf(&it->target, "%s/blobs/%s", p->repo_dir, f->etag);
            b = asprintf(&it->partial, "%s/blobs/%s.qwen-edit.incomplete", p->repo_dir, f->etag);
            for (size_t j = 0; j < i && !it->same_as_other; j++)
                it->same_as_other = !strcmp(p->list.files[j].etag, f->etag);
        }
        if (a < 0 || b < 0)
            return no_memory(err);
    }
    qie_parallel_for(qie_cpu_count(), p->n, check_one, p);
    QIE_FAIL_IF(stopped(p), QIE_E_CANCELLED, err, NULL, "interrupted");
    qsort(p->items, p->n, sizeof *p->items, by_size);
    p->bytes = p->bytes_present = 0;
    for (size_t i = 0; i < p->n; i++) {
        const item *it = &p->items[i];
        if (it->same_as_other)
            continue;
        p->bytes += it->file->size;
        if (it->present)
            p->bytes_present += it->file->size;
        else if (it->damaged && !p->o->dry_run)
            say(p, "warning", "'%s' is there but damaged: it is fetched again", it->file->path);
    }
    return QIE_OK;
}

/* ------------------------------------------------------------------ disk */

static qie_status check_disk(const pull *p, qie_error *err) {
    const char *where = p->o->local_dir ? p->o->local_dir : p->repo_dir;
    char *dir = strdup(where);
    struct statvfs v;
    int64_t need = 0;
    if (!dir)
        return no_memory(err);
    for (size_t i = 0; i < p->n; i++)
        if (!p->items[i].present && !p->items[i].same_as_other)
            need += p->items[i].file->size - p->items[i].partial_bytes;
    bool ok = statvfs(dir, &v) == 0;
    while (!ok) { /* the folder is made later: the nearest one that exists */
        char *slash = strrchr(dir, '/');
        if (!slash || slash == dir)
            break;
        *slash = 0;
        ok = statvfs(dir, &v) == 0;
    }
    if (!ok)
        ok = statvfs(where[0] == '/' ? "/" : ".", &v) == 0;
    int64_t free_bytes = ok ? (int64_t)v.f_bavail * (int64_t)v.f_frsize : INT64_MAX;
    qie_status st = QIE_OK;
    if (need > 0 && free_bytes - DISK_RESERVE < need)
        st = qie_fail(
            err, QIE_E_IO, p->o->local_dir ? "--local-dir" : "HF_HOME",
            "not enough room for %s: %.2f GB are missing and '%s' has %.2f GB free; free %.2f GB "
            "there, or %s",
            p->o->repo, (double)need / 1e9, dir, (double)free_bytes / 1e9,
            (double)(need + DISK_RESERVE - free_bytes) / 1e9,
            p->o->local_dir ? "choose a --local-dir on another disk"
                            : "set HF_HOME to a folder on another disk");
    free(dir);
    return st;
}

/* ------------------------------------------------------------------ fetching */

static void tick(void *arg, qie_fetch *f) {
    pull *p = arg;
    qie_pull_progress *g = &p->progress;
    g->phase = QIE_PULL_FETCHING;
    g->n_done = p->n - f->n_files;
    g->n_waiting = 0;
    g->current = NULL;
    for (size_t i = 0; i < f->n_files; i++) {
        int s = atomic_load(&f->files[i].state);
        g->n_done += s == QIE_FETCH_DONE;
        g->n_waiting += s == QIE_FETCH_LOCKED;
        if (!g->current && f->files[i].n_connections)
            g->current = f->files[i].file->path;
    }
    g->bytes_done = p->bytes_present + f->bytes_present;
    g->bytes_per_s = f->bytes_per_s;
    g->n_connections = f->n_connections;
    g->seconds_left = f->bytes_per_s > 1 ? (double)(g->bytes - g->bytes_done) / f->bytes_per_s : -1;
    show(p, false);
}

static bool fetch_stop(void *arg) {
    return stopped(arg);
}

static void fetch_say(void *arg, const char *kind, const char *text) {
    say(arg, kind, "%s", text);
}

static qie_status add_fetch(const pull *p, const item *it, qie_fetch_file *f, qie_error *err) {
    f->file = it->file;
    f->final_path = strdup(it->target);
    f->partial_path = strdup(it->partial);
    f->replace = it->damaged;
    if (p->o->local_dir) {
        if (asprintf(&f->lock_path, "%s/download/%s.lock", p->notes, it->file->path) < 0)
            f->lock_path = NULL;
        QIE_TRY(parent_dirs(it->target, err));
    } else {
        f->lock_path = qie_cache_lock_path(p->cache, p->repo_dir, it->file->etag);
        if (asprintf(&f->older_path, "%s.incomplete", it->target) < 0)
            f->older_path = NULL;
    }
    if (!f->final_path || !f->partial_path || !f->lock_path)
        return no_memory(err);
    return parent_dirs(it->partial, err);
}

static qie_status fetch_missing(pull *p, qie_pull_result *out, bool *relist, qie_error *err) {
    qie_fetch f = {.repo = p->o->repo,
                   .revision = p->o->revision,
                   .listed_by = p->listed_by,
                   .settings = p->o->settings,
                   .http = p->client.http,
                   .jobs = p->o->jobs > 0 ? p->o->jobs : 8,
                   .max_tries = p->client.max_tries,
                   .mode = p->mode,
                   .stop = fetch_stop,
                   .tick = tick,
                   .say = fetch_say,
                   .arg = p};
    snprintf(f.commit, sizeof f.commit, "%s", p->list.commit);
    f.files = calloc(p->n + 1, sizeof *f.files);
    size_t *from = calloc(p->n + 1, sizeof *from);
    qie_status st = f.files && from ? QIE_OK : no_memory(err);
    for (size_t i = 0; st == QIE_OK && i < p->n; i++)
        if (!p->items[i].present && !p->items[i].same_as_other) {
            from[f.n_files] = i;
            st = add_fetch(p, &p->items[i], &f.files[f.n_files++], err);
        }
    p->progress.n_files = p->n;
    p->progress.bytes = p->bytes;
    if (st == QIE_OK && f.n_files) {
        st = qie_fetch_run(&f, err);
        tick(p, &f);
        for (size_t i = 0; i < f.n_files; i++) {
            if (atomic_load(&f.files[i].state) == QIE_FETCH_DONE) {
                p->items[from[i]].present = true;
                out->n_fetched += f.files[i].fetched_any;
            } else if (atomic_load(&f.files[i].state) == QIE_FETCH_FAILED)
                *relist = true; /* perhaps the revision has moved on: the list will tell */
        }
        out->bytes_fetched += f.bytes_received;
        qie_fetch_release(&f);
    }
    for (size_t i = 0; i < f.n_files; i++) {
        free(f.files[i].final_path);
        free(f.files[i].partial_path);
        free(f.files[i].older_path);
        free(f.files[i].lock_path);
    }
    free(f.files);
    free(from);
    return st;
}

/* ------------------------------------------------------------------ finishing */

/* snapshots/COMMIT/a/b -> ../../../blobs/ETAG, or the content itself where the file system has no
 * links. */
static qie_status link_one(const pull *p, const item *it, qie_error *err) {
    char *path = qie_path_join(p->snapshot, it->file->path), *to = NULL, *tmp = NULL;
    qie_status st = path ? parent_dirs(path, err) : no_memory(err);
    char up[3 * 512 + 1] = "../../";
    size_t n_up = strlen(up);
    for (const char *c = it->file->path; *c; c++)
        if (*c == '/' && n_up + 4 < sizeof up)
            n_up += (size_t)snprintf(up + n_up, sizeof up - n_up, "../");
    if (st == QIE_OK && (asprintf(&to, "%sblobs/%s", up, it->file->etag) < 0 ||
                         asprintf(&tmp, "%s.%d.link", path, (int)getpid()) < 0))
        st = no_memory(err);
    char now[4096];
    ssize_t n = st == QIE_OK ? readlink(path, now, sizeof now - 1) : -1;
    struct stat s;
    bool there = st == QIE_OK && n > 0 && (size_t)n == strlen(to) && !strncmp(now, to, (size_t)n);
    if (n < 0 && st == QIE_OK && size_at(it->target) < 0 && lstat(path, &s) == 0 &&
        S_ISREG(s.st_mode))
        there = true; /* the content lies here */
    if (st == QIE_OK && !there) {
        if (symlink(to, tmp) == 0) {
            if (rename(tmp, path)) {
                st = qie_fail(err, QIE_E_IO, path, "cannot make the link '%s': %s", path,
                              strerror(errno));
                unlink(tmp);
            }
        } else if (errno == EPERM || errno == EOPNOTSUPP || errno == ENOSYS) {
            if (rename(it->target, path))
                st = qie_fail(err, QIE_E_IO, path, "cannot move a file to '%s': %s", path,
                              strerror(errno));
        } else
            st = qie_fail(err, QIE_E_IO, path, "cannot make the link '%s': %s", path,
                          strerror(errno));
    }
    free(path);
    free(to);
    free(tmp);
    return st;
}

static qie_status write_ref(const pull *p, qie_error *err) {
    const char *revision = p->o->revision ? p->o->revision : "main";
    if (!strcmp(revision, p->list.commit))
        return QIE_OK;
    char *path = NULL;
    if (asprintf(&path, "%s/refs/%s", p->repo_dir, revision) < 0)
        return no_memory(err);
    unsigned char *old = NULL;
    size_t n = 0;
    qie_status st = QIE_OK;
    /* Unchanged: not written, so that a finished pull also succeeds in a cache that may only be
     * read. */
    if (qie_file_read(path, 4096, &old, &n, NULL) != QIE_OK ||
        strcmp((char *)old, p->list.commit)) {
        st = parent_dirs(path, err);
        if (st == QIE_OK)
            st = qie_file_write_note(path, p->list.commit, strlen(p->list.commit), err);
    }
    free(old);
    free(path);
    return st;
}

/* What a plain folder was made from: so that `verify` can name the command that mends it. */
static qie_status write_local_notes(const pull *p, qie_error *err) {
    char *path = qie_path_join(p->notes, "qwen-edit.json");
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "repo", qie_json_new_string(p->o->repo));
    qie_json_put(o, "revision", qie_json_new_string(p->o->revision ? p->o->revision : "main"));
    qie_json_put(o, "commit", qie_json_new_string(p->list.commit));
    char *text = qie_json_text(o, 0);
    qie_status st =
        path && text ? qie_file_write_note(path, text, strlen(text), err) : no_memory(err);
    free(text);
    qie_json_free(o);
    free(path);
    return st;
}

static qie_status finish(const pull *p, qie_error *err) {
    for (size_t i = 0; i < p->n; i++)
        QIE_TRY(p->o->local_dir
                    ? (metadata_vouches(p, &p->items[i]) ? QIE_OK
                                                         : metadata_write(p, &p->items[i], err))
                    : link_one(p, &p->items[i], err));
    return p->o->local_dir ? QIE_OK : write_ref(p, err);
}

/* ------------------------------------------------------------------ the whole */

static void forget_listing(pull *p) {
    for (size_t i = 0; i < p->n; i++) {
        free(p->items[i].target);
        free(p->items[i].partial);
    }
    free(p->items);
    p->items = NULL;
    p->n = 0;
    qie_hub_listing_release(&p->list);
    free(p->snapshot);
    p->snapshot = NULL;
}

static qie_status set_snapshot(pull *p, qie_error *err) {
    free(p->snapshot);
    if (asprintf(&p->snapshot, "%s/snapshots/%s", p->repo_dir, p->list.commit) < 0) {
        p->snapshot = NULL;
        return no_memory(err);
    }
    return QIE_OK;
}

static qie_status list_somewhere(pull *p, qie_error *err) {
    const qie_hub_settings *s = p->o->settings;
    qie_error first = {0}, e = {0};
    p->progress.phase = QIE_PULL_LISTING;
    show(p, true);
    for (size_t i = 0; i < s->n_endpoints; i++) {
        if (qie_hub_list(&p->client, &s->endpoints[i], p->o->repo, p->o->revision, &p->list, &e) ==
            QIE_OK) {
            p->listed_by = s->endpoints[i].kind;
            return set_snapshot(p, err);
        }
        if (e.status == QIE_E_CANCELLED) {
            first = e;
            break;
        }
        if (!first.status)
            first = e;
        if (i + 1 < s->n_endpoints)
            say(p, "warning", "%s; asking %s", e.message, s->endpoints[i + 1].url);
    }
    if (err)
        *err = first;
    return first.status;
}

typedef struct offline_missing {
    const pull *p;
    size_t n;
    char names[300];
} offline_missing;

static bool note_offline(void *arg, const char *path) {
    offline_missing *m = arg;
    size_t len = strlen(m->names);
    if (m->n < 3)
        snprintf(m->names + len, sizeof m->names - len, "%s%.80s", m->n ? ", " : "", path);
    m->n++;
    if (m->p->o->missing)
        m->p->o->missing(m->p->o->arg, path, -1, 0);
    return true;
}

/* No connection at all: what does the list of the last pull say, or failing that the model's own
 * index? */
static qie_status pull_offline(pull *p, qie_pull_result *out, qie_error *err) {
    const qie_pull_options *o = p->o;
    const char *why = o->settings->offline_origin;
    offline_missing m = {.p = p};
    char commit[41] = "", *dir = NULL;
    if (o->local_dir)
        dir = strdup(o->local_dir);
    else {
        qie_error e = {0};
        if (qie_cache_commit(p->cache, o->repo, o->revision, commit, &e) != QIE_OK)
            return qie_fail(
                err, QIE_E_NOT_FOUND, why,
                "%s=1 forbids connections and %s is not in the cache '%s': unset %s and type "
                "qwen-edit pull %s where there is a network",
                why, o->repo, p->cache, why, o->repo);
        if (asprintf(&dir, "%s/snapshots/%s", p->repo_dir, commit) < 0)
            dir = NULL;
    }
    if (!dir)
        return no_memory(err);
    bool listed = commit[0] && qie_hub_tree_read(p->notes, commit, &p->list, NULL) == QIE_OK;
    if (listed) {
        qie_hub_listing_filter(&p->list, o->include, o->n_include, o->exclude, o->n_exclude);
        for (size_t i = 0; i < p->list.n; i++) {
            char *path = qie_path_join(dir, p->list.files[i].path);
            out->bytes += p->list.files[i].size;
            if (!path || size_at(path) != p->list.files[i].size) {
                out->bytes_missing += p->list.files[i].size;
                note_offline(&m, p->list.files[i].path);
            }
            free(path);
        }
        out->n_files = p->list.n;
    } else
        qie_model_missing(dir, note_offline, &m);
    snprintf(out->commit, sizeof out->commit, "%s", commit);
    out->dir = dir;
    if (m.n)
        return qie_fail(
            err, QIE_E_NOT_FOUND, why,
            "%s=1 forbids connections and %zu file%s of %s missing (%s%s): unset %s and type the "
            "same command where there is a network",
            why, m.n, m.n == 1 ? " is" : "s are", o->repo, m.names, m.n > 3 ? ", ..." : "", why);
    return QIE_OK;
}

static void report_dry_run(const pull *p, const qie_pull_result *out) {
    (void)out;
    for (size_t i = 0; i < p->n; i++)
        if (!p->items[i].present && !p->items[i].same_as_other && p->o->missing)
            p->o->missing(p->o->arg, p->items[i].file->path, p->items[i].file->size,
                          p->items[i].partial_bytes);
}

/* One listing carried out. *relist: something was not as listed. */
static qie_status pull_once(pull *p, qie_pull_result *out, bool *relist, qie_error *err) {
    const qie_pull_options *o = p->o;
    *relist = false;
    if (o->n_include || o->n_exclude) {
        /* The notes hold the whole commit, whatever part of it is wanted today. */
        if (!o->dry_run && (qie_mkdirs(p->notes, err) != QIE_OK ||
                            qie_hub_tree_write(p->notes, &p->list, err) != QIE_OK))
            return err ? err->status : QIE_E_IO;
        qie_hub_listing_filter(&p->list, o->include, o->n_include, o->exclude, o->n_exclude);
        if (!p->list.n)
            return qie_fail(err, QIE_E_NOT_FOUND, "--include",
                            "no file of %s matches --include and --exclude", o->repo);
    } else if (!o->dry_run) {
        QIE_TRY(qie_mkdirs(p->notes, err));
        QIE_TRY(qie_hub_tree_write(p->notes, &p->list, err));
    }
    QIE_TRY(make_items(p, err));
    out->n_files = p->n;
    out->bytes = p->bytes;
    if (!out->bytes_fetched)
        out->bytes_missing = p->bytes - p->bytes_present;
    snprintf(out->commit, sizeof out->commit, "%s", p->list.commit);
    for (size_t i = 0; i < p->n; i++)
        out->unchecked = out->unchecked || p->items[i].file->hash == QIE_HASH_NONE;
    free(out->dir);
    out->dir = strdup(o->local_dir ? o->local_dir : p->snapshot);
    if (!out->dir)
        return no_memory(err);
    qie_status disk = check_disk(p, err);
    if (o->dry_run) {
        report_dry_run(p, out);
        return disk;
    }
    QIE_TRY(disk);
    QIE_TRY(make_places(p, err));
    if (o->local_dir)
        QIE_TRY(write_local_notes(p, err));
    QIE_TRY(fetch_missing(p, out, relist, err));
    return finish(p, err);
}

static bool same_content(const qie_hub_listing *a, const qie_hub_listing *b) {
    bool same = !strcmp(a->commit, b->commit);
    for (size_t i = 0; same && i < a->n; i++) {
        const qie_hub_file *f = qie_hub_listing_find(b, a->files[i].path);
        same = f && !strcmp(f->etag, a->files[i].etag);
    }
    return same;
}

static qie_status pull_online(pull *p, qie_pull_result *out, qie_error *err) {
    QIE_TRY(list_somewhere(p, err));
    for (int round = 0;; round++) {
        bool relist;
        qie_error e = {0};
        qie_status st = pull_once(p, out, &relist, &e);
        if (st != QIE_OK && relist && st != QIE_E_CANCELLED && st != QIE_E_IO && round < 2) {
            qie_hub_listing old = p->list;
            size_t n = p->n;
            memset(&p->list, 0, sizeof p->list);
            bool moved = list_somewhere(p, NULL) == QIE_OK && !same_content(&old, &p->list);
            if (moved) {
                say(p, "warning", "%s has changed at the hub: going on with commit %.12s",
                    p->o->repo, p->list.commit);
                qie_hub_listing fresh = p->list;
                char *snapshot = p->snapshot;
                p->snapshot = NULL;
                p->list = old;
                p->n = n;
                forget_listing(p);
                p->list = fresh;
                p->snapshot = snapshot;
                continue;
            }
            qie_hub_listing_release(&p->list);
            p->list = old;
        }
        if (st != QIE_OK && err)
            *err = e;
        return st;
    }
}

qie_status qie_pull(const qie_pull_options *options, qie_pull_result *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    pull p = {.o = options, .started = qie_now_s()};
    mode_t mask = umask(0);
    umask(mask);
    p.mode = 0666 & ~(unsigned)mask;
    p.client.settings = options->settings;
    p.client.max_tries = options->max_tries > 0 ? options->max_tries : 16;
    p.client.stop = stopped;
    p.client.stop_arg = &p;
    qie_status st = choose_places(&p, err);
    if (st == QIE_OK && options->settings->offline)
        st = pull_offline(&p, out, err);
    else if (st == QIE_OK) {
        qie_http_options ho = qie_http_options_default();
        ho.stall_timeout_s = options->settings->stall_timeout_s;
        ho.ca_bundle = options->settings->ca_bundle;
        ho.user_agent = "qwen-edit/" QIE_VERSION;
        st = qie_http_create(&ho, &p.client.http, err);
        if (st == QIE_OK)
            st = pull_online(&p, out, err);
        qie_http_destroy(p.client.http);
    }
    p.progress.phase = QIE_PULL_DONE;
    show(&p, true);
    out->seconds = qie_now_s() - p.started;
    forget_listing(&p);
    free(p.cache);
    free(p.repo_dir);
    free(p.notes);
    return st;
}

void qie_pull_result_release(qie_pull_result *r) {
    free(r->dir);
    memset(r, 0, sizeof *r);
}
