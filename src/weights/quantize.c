#define _GNU_SOURCE
#include "weights/quantize.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/fs.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/strbuf.h"
#include "plan/config.h"
#include "weights/names.h"
#include "weights/quant_file.h"

/* Raised when the same source would become other bytes: what was begun before is not gone on with.
 */
enum { WRITER = 1 };

enum { N_PARTS = 2, COPY_BYTES = 1 << 20, MAX_COPIES = 4096 };
static const int64_t ROOM_TO_SPARE = 16 << 20, SYNC_BYTES = 256 << 20, LET_GO_BYTES = 64 << 20;

typedef struct part_state {
    qie_weights *w;
    qie_quant_plan plan;
    char *partial, *final; /* full paths */
    size_t n_done;         /* items on the disk, as the record says */
    int64_t done_bytes;    /* of the source, before this call */
    char hash[QIE_HASH_HEX_MAX];
} part_state;

typedef struct work {
    const qie_quantize_options *o;
    qie_quantize_result *r;
    qie_error *err;
    qie_files *files;
    qie_weights *importance;  /* NULL: none */
    part_state part[N_PARTS]; /* by qie_part: transformer, text encoder */
    char in[PATH_MAX], out[PATH_MAX];
    char job[QIE_HASH_HEX_MAX]; /* what is made of what */
    int lock;
    char **copies; /* names below IN */
    size_t n_copies;
    double started, synced, sync_took;
    int64_t bytes, done; /* all of the source; this call's work */
    int64_t before;      /* done in earlier calls */
    int64_t let_go;      /* done when pages were last let go */
    const char *stage;
    size_t i_part, i_item;
} work;

static qie_status no_memory(const work *w) {
    return qie_fail(w->err, QIE_E_NO_MEMORY, NULL, "out of memory");
}

static bool stop_asked(const work *w) {
    return w->o->stop && w->o->stop(w->o->arg);
}

static void tell(const work *w, const char *tensor) {
    double s = qie_now_s() - w->started, speed = s > 0 ? (double)w->done / s : 0;
    qie_quantize_progress p = {.stage = w->stage,
                               .tensor = tensor,
                               .bytes = w->bytes,
                               .bytes_done = w->before + w->done,
                               .bytes_per_s = speed,
                               .seconds_left = -1};
    if (speed > 0 && s > 1)
        p.seconds_left = (double)(w->bytes - w->before - w->done) / speed;
    if (w->o->progress)
        w->o->progress(w->o->arg, &p);
}

/* ---- folders */

/* True if `path` is `dir` or lies in it; both are real paths. */
static bool lies_in(const char *path, const char *dir) {
    size_t n = strlen(dir);
    return !strncmp(path, dir, n) && (!path[n] || path[n] == '/');
}

/* OUT's real path, also where it is not there yet. */
static qie_status real_out(work *w) {
    char parent[PATH_MAX], real[PATH_MAX];
    if (realpath(w->o->out, w->out))
        return QIE_OK;
    size_t n = strlen(w->o->out);
    while (n > 1 && w->o->out[n - 1] == '/')
        n--;
    QIE_FAIL_IF(!n || n >= sizeof parent, QIE_E_INVALID, w->err, w->o->out, "no folder is named");
    snprintf(parent, sizeof parent, "%.*s", (int)n, w->o->out);
    char *slash = strrchr(parent, '/');
    const char *name = slash ? slash + 1 : parent, *dir = slash == parent ? "/"
                                                          : slash         ? parent
                                                                          : ".";
    if (slash)
        *slash = 0;
    QIE_FAIL_IF(!realpath(dir, real), QIE_E_NOT_FOUND, w->err, NULL,
                "there is no folder '%s' to make '%s' in", dir, name);
    QIE_FAIL_IF(snprintf(w->out, sizeof w->out, "%s/%s", strcmp(real, "/") ? real : "", name) >=
                    (int)sizeof w->out,
                QIE_E_INVALID, w->err, w->o->out, "path '%s' is too long", w->o->out);
    return QIE_OK;
}

static qie_status check_places(work *w) {
    QIE_FAIL_IF(!realpath(w->o->in, w->in), QIE_E_NOT_FOUND, w->err, w->o->in,
                "model folder '%s' does not exist", w->o->in);
    QIE_TRY(real_out(w));
    QIE_FAIL_IF(!strcmp(w->in, w->out), QIE_E_CONFLICT, w->err, w->o->out,
                "'%s' is the model itself: name another folder for the result", w->o->out);
    QIE_FAIL_IF(lies_in(w->out, w->in), QIE_E_CONFLICT, w->err, w->o->out,
                "'%s' lies in the model '%s': name a folder outside of it", w->o->out, w->o->in);
    QIE_FAIL_IF(qie_file_exists(w->out), QIE_E_CONFLICT, w->err, w->o->out,
                "'%s' is a file: name a folder", w->o->out);
    return QIE_OK;
}

/* The first name in OUT, for messages; "" if it is empty. Notes of an interrupted writer of the
 * record are taken away. */
static void first_name(const work *w, char out[256]) {
    DIR *d = opendir(w->out);
    struct dirent *e;
    out[0] = 0;
    while (d && (e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (!strncmp(e->d_name, QIE_QUANT_RECORD ".", sizeof QIE_QUANT_RECORD))
            (void)unlinkat(dirfd(d), e->d_name, 0);
        else
            snprintf(out, 256, "%s", e->d_name);
    }
    if (d)
        closedir(d);
}

/* ---- what is made of what */

static void add_tensor_ids(const qie_weights *w, qie_strbuf *b) {
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        qie_strbuf_printf(b, "%s %d %lld %lld;", t->name, (int)t->dtype, (long long)t->n_elements,
                          (long long)t->n_scale);
    }
}

/* Sizes and times of the weight files; links are followed. */
static void add_file_ids(const char *dir, qie_strbuf *b) {
    struct dirent **list = NULL;
    int n = scandir(dir, &list, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        struct stat s;
        char *path = qie_path_join(dir, list[i]->d_name);
        if (path && stat(path, &s) == 0 && S_ISREG(s.st_mode))
            qie_strbuf_printf(b, "%s %lld %lld.%ld;", list[i]->d_name, (long long)s.st_size,
                              (long long)s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
        free(path);
        free(list[i]);
    }
    free(list);
}

static qie_status make_job(work *w) {
    qie_strbuf b;
    qie_strbuf_init(&b, 64u << 20);
    qie_strbuf_printf(&b, "%d %s;", WRITER, w->o->to);
    for (size_t i = 0; i < w->o->n_keep; i++)
        qie_strbuf_printf(&b, "keep %s;", w->o->keep[i]);
    for (size_t i = 0; w->importance && i < qie_weights_count(w->importance); i++) {
        const qie_tensor *t = qie_weights_at(w->importance, i);
        char hash[QIE_HASH_HEX_MAX];
        qie_sha1_hex(t->data, t->n_bytes, hash);
        qie_strbuf_printf(&b, "importance %s %s;", t->name, hash);
    }
    for (int p = 0; p < N_PARTS; p++) {
        char *dir = qie_path_join(w->in, qie_part_name((qie_part)p));
        const qie_layout *l = &w->part[p].plan.layout;
        if (dir)
            add_file_ids(dir, &b);
        free(dir);
        add_tensor_ids(w->part[p].w, &b);
        qie_strbuf_append(&b, l->head, l->n_head);
    }
    if (!b.failed)
        qie_sha1_hex(b.data, b.len, w->job);
    bool failed = b.failed;
    qie_strbuf_release(&b);
    return failed ? no_memory(w) : QIE_OK;
}

/* ---- the record */

static qie_status write_record(const work *w, bool complete) {
    qie_json *root = qie_json_new_object(), *keep = qie_json_new_array(),
             *files = qie_json_new_object();
    for (size_t i = 0; i < w->o->n_keep; i++)
        qie_json_push(keep, qie_json_new_string(w->o->keep[i]));
    for (int p = 0; p < N_PARTS; p++) {
        const part_state *s = &w->part[p];
        qie_json *f = qie_json_new_object();
        qie_json_put(f, "bytes", qie_json_new_int(s->plan.layout.n_file));
        qie_json_put(f, "tensors", qie_json_new_int((int64_t)s->plan.n_items));
        if (complete)
            qie_json_put(f, "sha256", qie_json_new_string(s->hash));
        else
            qie_json_put(f, "done", qie_json_new_int((int64_t)s->n_done));
        qie_json_put(files, s->plan.file, f);
    }
    qie_json_put(root, "to", qie_json_new_string(w->o->to));
    qie_json_put(root, "keep", keep);
    qie_json_put(root, "importance",
                 w->o->importance ? qie_json_new_string(w->o->importance) : qie_json_new_null());
    qie_json_put(root, "source", qie_json_new_string(w->in));
    qie_json_put(root, "job", qie_json_new_string(w->job));
    qie_json_put(root, "complete", qie_json_new_bool(complete));
    qie_json_put(root, "files", files);
    char *text = qie_json_text(root, 2), *path = qie_path_join(w->out, QIE_QUANT_RECORD);
    qie_status st =
        text && path ? qie_file_write_atomic(path, text, strlen(text), w->err) : no_memory(w);
    qie_json_free(root);
    free(text);
    free(path);
    return st;
}

static qie_status foreign(const work *w, const char *what) {
    return qie_fail(w->err, QIE_E_CONFLICT, w->o->out,
                    "'%s' %s: name a new or an empty folder, or remove it first", w->o->out, what);
}

/* Where an earlier call stopped. */
static qie_status read_record(work *w, bool *complete) {
    char *path = qie_path_join(w->out, QIE_QUANT_RECORD), name[256];
    qie_json *root = NULL;
    const char *job = NULL, *to = "", *source = "";
    int64_t done;
    qie_status st = QIE_OK;
    *complete = false;
    if (!path)
        return no_memory(w);
    first_name(w, name);
    if (!qie_file_exists(path)) {
        if (*name) {
            char what[300];
            snprintf(what, sizeof what, "is not empty (it holds '%.200s')", name);
            st = foreign(w, what);
        }
        goto fail;
    }
    if (qie_json_parse_file(path, 1u << 20, &root, NULL) != QIE_OK) {
        st = foreign(w, "holds a damaged " QIE_QUANT_RECORD);
        goto fail;
    }
    QIE_TRY_GOTO(qie_json_get_string(root, "job", "", &job, w->err));
    QIE_TRY_GOTO(qie_json_get_string(root, "to", "?", &to, w->err));
    QIE_TRY_GOTO(qie_json_get_string(root, "source", "?", &source, w->err));
    QIE_TRY_GOTO(qie_json_get_bool(root, "complete", false, complete, w->err));
    if (strcmp(job, w->job)) {
        char what[600];
        snprintf(what, sizeof what,
                 "holds %s conversion of '%.300s' to %.20s, with other settings, from other files "
                 "or by another version",
                 *complete ? "a" : "an unfinished", source, to);
        st = foreign(w, what);
        goto fail;
    }
    w->r->resumed = true;
    for (int p = 0; p < N_PARTS; p++) {
        part_state *s = &w->part[p];
        const qie_json *f = qie_json_member(qie_json_member(root, "files"), s->plan.file);
        QIE_TRY_GOTO(qie_json_get_int(f, "done", 0, 0, (int64_t)s->plan.n_items, &done, w->err));
        s->n_done = (size_t)done;
    }
fail:
    qie_json_free(root);
    free(path);
    return st;
}

/* Make OUT, or find where it is; nobody else may work there. */
static qie_status claim(work *w, bool *complete) {
    *complete = false;
    QIE_TRY(qie_mkdirs(w->out, w->err));
    w->lock = open(w->out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    QIE_FAIL_IF(w->lock < 0, QIE_E_IO, w->err, w->o->out, "cannot open '%s': %s", w->o->out,
                strerror(errno));
    QIE_FAIL_IF(flock(w->lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK, QIE_E_BUSY, w->err,
                w->o->out, "another process is converting into '%s'", w->o->out);
    QIE_TRY(read_record(w, complete));
    if (!w->r->resumed)
        QIE_TRY(write_record(w, false));
    return QIE_OK;
}

/* ---- what is copied */

static bool wants_copy(const char *folder, const char *name) {
    static const char *const WEIGHTS[] = {".safetensors", ".gguf", ".index.json", ".bin", ".pt"};
    bool converted = !strcmp(folder, "transformer") || !strcmp(folder, "text_encoder");
    if (name[0] == '.' || !strcmp(name, QIE_QUANT_RECORD) || qie_name_ends_with(name, ".partial"))
        return false;
    if (!*folder)
        return qie_name_ends_with(name, ".json") || qie_name_ends_with(name, ".md") ||
               qie_name_ends_with(name, ".txt") || !strncmp(name, "LICENSE", 7);
    for (size_t i = 0; i < sizeof WEIGHTS / sizeof *WEIGHTS && converted; i++)
        if (qie_name_ends_with(name, WEIGHTS[i]))
            return false;
    return true;
}

static qie_status list_folder(work *w, const char *folder) {
    char *dir = *folder ? qie_path_join(w->in, folder) : strdup(w->in);
    struct dirent **list = NULL;
    qie_status st = QIE_OK;
    int n = dir ? scandir(dir, &list, NULL, alphasort) : -1;
    for (int i = 0; i < n; i++) {
        char *name = *folder ? qie_path_join(folder, list[i]->d_name) : strdup(list[i]->d_name);
        char *full = name ? qie_path_join(w->in, name) : NULL;
        if (!full)
            st = no_memory(w);
        else if (wants_copy(folder, list[i]->d_name) && qie_file_exists(full) &&
                 w->n_copies < MAX_COPIES) {
            w->copies[w->n_copies++] = name;
            name = NULL;
        }
        free(full);
        free(name);
        free(list[i]);
    }
    free(list);
    free(dir);
    return st;
}

/* The top folder comes last: model_index.json makes the folder a model. */
static qie_status list_copies(work *w) {
    static const char *const FOLDERS[] = {"vae",         "tokenizer",    "processor", "scheduler",
                                          "transformer", "text_encoder", ""};
    w->copies = calloc(MAX_COPIES, sizeof *w->copies);
    if (!w->copies)
        return no_memory(w);
    for (size_t i = 0; i < sizeof FOLDERS / sizeof *FOLDERS; i++)
        QIE_TRY(list_folder(w, FOLDERS[i]));
    return QIE_OK;
}

static bool is_top(const char *name) {
    return !strchr(name, '/');
}

static qie_status copy_bytes(work *w, int from, int to, const char *path) {
    char *buf = malloc(COPY_BYTES);
    qie_status st = buf ? QIE_OK : no_memory(w);
    while (st == QIE_OK) {
        ssize_t n = read(from, buf, COPY_BYTES);
        if (n < 0 && errno == EINTR)
            continue;
        for (ssize_t at = 0, k; n > 0 && at < n; at += k)
            if ((k = write(to, buf + at, (size_t)(n - at))) <= 0) {
                n = -1;
                break;
            }
        if (n < 0)
            st = qie_fail(w->err, QIE_E_IO, path, "cannot copy to '%s': %s", path, strerror(errno));
        if (n <= 0)
            break;
        if (stop_asked(w))
            st = qie_fail(w->err, QIE_E_CANCELLED, NULL,
                          "interrupted; the same command goes on from here");
    }
    if (st == QIE_OK && fsync(to))
        st = qie_fail(w->err, QIE_E_IO, path, "cannot write '%s': %s", path, strerror(errno));
    free(buf);
    return st;
}

static qie_status copy_one(work *w, const char *name) {
    char *from = qie_path_join(w->in, name), *to = qie_path_join(w->out, name), *partial = NULL;
    int in = -1, out = -1;
    qie_status st = QIE_OK;
    if (!from || !to || asprintf(&partial, "%s.partial", to) < 0) {
        partial = NULL;
        st = no_memory(w);
        goto fail;
    }
    if (qie_file_exists(to)) /* it has its name when it is complete */
        goto fail;
    char *slash = strrchr(to, '/');
    *slash = 0;
    st = qie_mkdirs(to, w->err);
    *slash = '/';
    QIE_TRY_GOTO(st);
    in = open(from, O_RDONLY | O_CLOEXEC);
    out = in < 0 ? -1 : open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (out < 0) {
        st = qie_fail(w->err, QIE_E_IO, name, "cannot %s '%s': %s", in < 0 ? "read" : "write",
                      in < 0 ? from : partial, strerror(errno));
        goto fail;
    }
    QIE_TRY_GOTO(copy_bytes(w, in, out, to));
    if (rename(partial, to))
        st = qie_fail(w->err, QIE_E_IO, name, "cannot write '%s': %s", to, strerror(errno));
fail:
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    free(from);
    free(to);
    free(partial);
    return st;
}

static qie_status copy_all(work *w, bool top) {
    w->stage = "copy";
    for (size_t i = 0; i < w->n_copies; i++)
        if (is_top(w->copies[i]) == top)
            QIE_TRY(copy_one(w, w->copies[i]));
    return QIE_OK;
}

/* ---- room */

/* Bytes of a file that are taken on the disk already. */
static int64_t taken(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 ? (int64_t)s.st_blocks * 512 : 0;
}

static qie_status check_room(const work *w) {
    struct statvfs fs;
    int64_t need = 0;
    for (int p = 0; p < N_PARTS; p++) {
        const part_state *s = &w->part[p];
        int64_t have = qie_file_exists(s->final) ? INT64_MAX : taken(s->partial);
        if (have < s->plan.layout.n_file)
            need += s->plan.layout.n_file - have;
    }
    for (size_t i = 0; i < w->n_copies; i++) {
        char *from = qie_path_join(w->in, w->copies[i]), *to = qie_path_join(w->out, w->copies[i]);
        struct stat s;
        if (from && to && !qie_file_exists(to) && stat(from, &s) == 0)
            need += (int64_t)s.st_size;
        free(from);
        free(to);
    }
    if (!need || statvfs(w->out, &fs))
        return QIE_OK;
    int64_t room = (int64_t)fs.f_bavail * (int64_t)fs.f_frsize;
    QIE_FAIL_IF(need + ROOM_TO_SPARE > room, QIE_E_IO, w->err, w->o->out,
                "'%s' has %.2f GB free, the result needs %.2f GB%s: make room, or name a folder on "
                "another disk",
                w->o->out, (double)room / 1e9, (double)need / 1e9, w->r->resumed ? " more" : "");
    return QIE_OK;
}

/* ---- the conversion */

/* The disk is waited for so seldom that it costs a twentieth at most. */
static bool sync_is_due(const work *w, int64_t since_bytes) {
    double since = qie_now_s() - w->synced;
    return since_bytes >= SYNC_BYTES || (since > 0.02 && since > 20 * w->sync_took);
}

static qie_status sync_part(work *w, qie_quant_file *f, size_t n_done) {
    double t = qie_now_s();
    QIE_TRY(qie_quant_file_sync(f, w->err));
    w->part[w->i_part].n_done = n_done;
    QIE_TRY(write_record(w, false));
    w->synced = qie_now_s();
    w->sync_took = w->synced - t;
    return QIE_OK;
}

static bool step(void *arg, int64_t bytes, const char *name) {
    work *w = arg;
    w->done = w->part[w->i_part].done_bytes + bytes;
    if (w->done - w->let_go >= LET_GO_BYTES) { /* what was read is not needed again */
        qie_files_let_go(w->files);
        w->let_go = w->done;
    }
    tell(w, name);
    return !stop_asked(w);
}

static qie_status convert_part(work *w, size_t i) {
    part_state *s = &w->part[i];
    qie_quant_file *f = NULL;
    qie_status st = QIE_OK;
    w->i_part = i;
    w->stage = qie_part_name((qie_part)i);
    s->done_bytes = w->done;
    size_t n = s->plan.n_items;
    if (qie_file_exists(s->final)) /* it has its name when it is complete */
        return QIE_OK;
    QIE_TRY(qie_quant_file_open(s->partial, &s->plan, s->n_done, w->o->n_threads, &f, w->err));
    w->synced = qie_now_s();
    int64_t synced_bytes = w->done;
    for (size_t k = s->n_done; k < n; k++) {
        QIE_TRY_GOTO(qie_quant_file_item(f, s->w, k, step, w, w->err));
        if (k + 1 < n && sync_is_due(w, w->done - synced_bytes)) {
            QIE_TRY_GOTO(sync_part(w, f, k + 1));
            synced_bytes = w->done;
        }
    }
    QIE_TRY_GOTO(sync_part(w, f, n));
    if (rename(s->partial, s->final))
        st = qie_fail(w->err, QIE_E_IO, s->plan.file, "cannot write '%s': %s", s->final,
                      strerror(errno));
fail:
    qie_quant_file_close(f);
    return st;
}

static qie_status hash_part(work *w, part_state *s) {
    qie_hash *h = NULL;
    qie_status st = QIE_OK;
    unsigned char *buf = malloc(COPY_BYTES);
    int fd = open(s->final, O_RDONLY | O_CLOEXEC);
    w->stage = "hash";
    if (!buf || fd < 0) {
        st = qie_fail(w->err, QIE_E_IO, s->plan.file, "cannot read '%s'", s->final);
        goto fail;
    }
    QIE_TRY_GOTO(qie_hash_create(QIE_HASH_SHA256, s->plan.layout.n_file, &h, w->err));
    for (ssize_t n; (n = read(fd, buf, COPY_BYTES)) != 0;) {
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 || stop_asked(w)) {
            st = n < 0 ? qie_fail(w->err, QIE_E_IO, s->plan.file, "cannot read '%s': %s", s->final,
                                  strerror(errno))
                       : qie_fail(w->err, QIE_E_CANCELLED, NULL,
                                  "interrupted; the same command goes on from here");
            goto fail;
        }
        qie_hash_update(h, buf, (size_t)n);
    }
    qie_hash_final(h, s->hash);
fail:
    qie_hash_destroy(h);
    if (fd >= 0)
        close(fd);
    free(buf);
    return st;
}

/* ---- all of it */

static qie_status read_text(work *w, const char *name, char **out) {
    const unsigned char *data;
    size_t n;
    *out = NULL;
    QIE_TRY(qie_files_get(w->files, name, &data, &n, w->err));
    *out = strndup((const char *)data, n);
    return *out ? QIE_OK : no_memory(w);
}

static qie_status plan_part(work *w, int p, const qie_quant_choice *c,
                            const qie_model_config *config) {
    part_state *s = &w->part[p];
    char name[64], *text = NULL;
    snprintf(name, sizeof name, "%s/config.json", qie_part_name((qie_part)p));
    QIE_TRY(qie_weights_open(w->files, qie_part_name((qie_part)p), &s->w, w->err));
    QIE_TRY(qie_weights_check(s->w, (qie_part)p, config, w->err));
    QIE_TRY(read_text(w, name, &text));
    qie_status st = qie_quant_plan_make(s->w, (qie_part)p, c, text, config->transformer.zero_cond_t,
                                        &s->plan, w->err);
    free(text);
    QIE_TRY(st);
    s->final = qie_path_join(w->out, s->plan.file);
    if (!s->final || asprintf(&s->partial, "%s.partial", s->final) < 0) {
        s->partial = NULL;
        return no_memory(w);
    }
    w->bytes += s->plan.source_bytes;
    w->r->bytes_in += s->plan.source_bytes;
    w->r->bytes_out += s->plan.layout.n_file;
    w->r->n_converted += s->plan.n_converted;
    w->r->n_eight += s->plan.n_eight;
    w->r->n_kept += s->plan.n_kept;
    if (s->plan.n_again && w->o->warn) {
        char warning[300];
        snprintf(warning, sizeof warning,
                 "%zu matrices of the %s are quantised already: errors add up; the original model "
                 "gives a better result",
                 s->plan.n_again, qie_part_name((qie_part)p));
        w->o->warn(w->o->arg, warning);
    }
    return QIE_OK;
}

static qie_status plan_all(work *w) {
    qie_quant_choice c = {.kind = qie_quant_kind_find(w->o->to),
                          .keep = (const char *const *)w->o->keep,
                          .n_keep = w->o->n_keep};
    QIE_FAIL_IF(!c.kind, QIE_E_INVALID, w->err, "--to",
                "'%s' is not one of q8_0, q6_k, q5_k, q4_k, q4_0, int8, fp8", w->o->to);
    qie_model_config *config = calloc(1, sizeof *config);
    c.used = calloc(c.n_keep + 1, sizeof *c.used);
    qie_status st = config && c.used ? QIE_OK : no_memory(w);
    QIE_TRY_GOTO(st);
    QIE_TRY_GOTO(qie_files_open_dir(w->in, &w->files, w->err));
    QIE_TRY_GOTO(qie_model_config_read(w->files, config, w->err));
    if (w->o->importance)
        QIE_TRY_GOTO(qie_weights_open_file(w->o->importance, &w->importance, w->err));
    c.importance = w->importance;
    for (int p = 0; p < N_PARTS; p++)
        QIE_TRY_GOTO(plan_part(w, p, &c, config));
    if (w->importance && !w->part[0].plan.n_important && !w->part[1].plan.n_important)
        st = qie_fail(w->err, QIE_E_INVALID, "--importance",
                      "'%s' tells nothing of the weights that are converted: it is written by "
                      "`qwen-edit edit --collect-importance FILE` with this model",
                      w->o->importance);
    for (size_t i = 0; i < c.n_keep && st == QIE_OK; i++)
        if (!c.used[i])
            st = qie_fail(w->err, QIE_E_INVALID, "--keep",
                          "--keep '%s' meets no weight of the model (names as `qwen-edit info "
                          "FILE` lists them, * for any text)",
                          c.keep[i]);
    if (st == QIE_OK)
        st = make_job(w);
fail:
    free(c.used);
    free(config);
    return st;
}

/* Source bytes of what the record says is done. */
static int64_t bytes_before(const part_state *s) {
    int64_t n = 0;
    for (size_t i = 0; i < s->n_done; i++)
        n += s->plan.items[i].source ? (int64_t)s->plan.items[i].source->n_bytes : 0;
    return n;
}

static qie_status run(work *w) {
    bool complete;
    QIE_TRY(check_places(w));
    QIE_TRY(plan_all(w));
    QIE_TRY(list_copies(w));
    QIE_TRY(claim(w, &complete));
    w->r->was_complete = complete;
    if (complete)
        return QIE_OK;
    QIE_TRY(check_room(w));
    for (int p = 0; p < N_PARTS; p++) {
        part_state *s = &w->part[p];
        if (!qie_file_exists(s->partial) && !qie_file_exists(s->final))
            s->n_done = 0; /* somebody took it away */
        w->before += bytes_before(s);
    }
    QIE_TRY(copy_all(w, false));
    for (size_t p = 0; p < N_PARTS; p++)
        QIE_TRY(convert_part(w, p));
    for (size_t p = 0; p < N_PARTS; p++)
        QIE_TRY(hash_part(w, &w->part[p]));
    QIE_TRY(copy_all(w, true));
    return write_record(w, true);
}

qie_status qie_quantize(const qie_quantize_options *o, qie_quantize_result *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    work *w = calloc(1, sizeof *w);
    QIE_FAIL_IF(!w, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    w->o = o;
    w->r = out;
    w->err = err;
    w->lock = -1;
    w->stage = "copy";
    w->started = qie_now_s();
    qie_status st = run(w);
    for (int p = 0; p < N_PARTS; p++) {
        part_state *s = &w->part[p];
        qie_quant_plan_release(&s->plan);
        qie_weights_close(s->w);
        free(s->partial);
        free(s->final);
    }
    for (size_t i = 0; i < w->n_copies; i++)
        free(w->copies[i]);
    free(w->copies);
    qie_weights_close(w->importance);
    qie_files_close(w->files);
    if (w->lock >= 0)
        close(w->lock);
    out->seconds = qie_now_s() - w->started;
    free(w);
    return st;
}
