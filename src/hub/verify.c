#define _GNU_SOURCE
#include "hub/verify.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/fs.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/parallel.h"
#include "base/strbuf.h"
#include "hub/cache.h"
#include "hub/listing.h"
#include "plan/config.h"
#include "plan/tensors.h"
#include "weights/quantize.h"
#include "weights/weights.h"

typedef struct check {
    char *path; /* below the folder */
    char *full;
    int64_t want_size; /* -1: not known */
    int64_t size;      /* -1: not there */
    char want_hash[QIE_HUB_ETAG_MAX];
    qie_hash_kind kind;
    char got_hash[QIE_HASH_HEX_MAX];
    int read_errno;
    bool hashed, made; /* made: by `quantize`, no hub has it */
} check;

typedef struct verify {
    const qie_verify_options *o;
    qie_verify_result *out;
    char repo[128], revision[48]; /* for remedies */
    bool cached;
    char cache[PATH_MAX + 64]; /* that the folder lies in */
    check *checks;
    size_t n, cap;
    int64_t bytes;
    _Atomic int64_t done;
    double started;
} verify;

static qie_status no_memory(qie_error *err) {
    return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
}

/* ------------------------------------------------------------------ words */

/* The folder lies in the cache that a command without --cache-dir takes. */
static bool in_usual_cache(const verify *v) {
    char *usual = NULL, real[PATH_MAX];
    bool same = !v->o->cache && qie_cache_dir(&usual, NULL, NULL) == QIE_OK &&
                realpath(usual, real) && !strcmp(real, v->cache);
    free(usual);
    return same;
}

/* As it can be typed. */
static void remedy_for(const verify *v, const char *path, char *out, size_t cap) {
    char place[PATH_MAX + 300] = "", file[2048];
    const char *flag = !v->cached ? " --local-dir " : in_usual_cache(v) ? "" : " --cache-dir ";
    if (*flag)
        qie_shell_word(v->cached ? v->cache : v->o->dir, place, sizeof place);
    qie_shell_word(path, file, sizeof file);
    snprintf(out, cap, "qwen-edit pull %s%s%s%s%s --recheck --include %s",
             v->repo[0] ? v->repo : "REPO", v->revision[0] ? " --revision " : "", v->revision, flag,
             place, file);
}

static void problem(const verify *v, const char *path, const char *kind, const char *remedy,
                    const char *fmt, ...) __attribute__((format(printf, 5, 6)));
static void problem(const verify *v, const char *path, const char *kind, const char *remedy,
                    const char *fmt, ...) {
    char detail[1100], mend[2 * PATH_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(detail, sizeof detail, fmt, ap);
    va_end(ap);
    if (!remedy) {
        remedy_for(v, path, mend, sizeof mend);
        remedy = mend;
    }
    qie_verify_problem p = {path, kind, detail, remedy};
    if (v->o->problem)
        v->o->problem(v->o->arg, &p);
}

/* ------------------------------------------------------------------ what should be there */

static check *add(verify *v, const char *path) {
    for (size_t i = 0; i < v->n; i++)
        if (!strcmp(v->checks[i].path, path))
            return &v->checks[i];
    if (v->n == v->cap) {
        size_t cap = v->cap ? 2 * v->cap : 64;
        check *p = realloc(v->checks, cap * sizeof *p);
        if (!p)
            return NULL;
        v->checks = p;
        v->cap = cap;
    }
    check *c = &v->checks[v->n];
    memset(c, 0, sizeof *c);
    c->path = strdup(path);
    c->full = qie_path_join(v->o->dir, path);
    c->want_size = c->size = -1;
    if (!c->path || !c->full) {
        free(c->path);
        free(c->full);
        return NULL;
    }
    v->n++;
    return c;
}

static void expect_hash(check *c, const char *etag) {
    c->kind = qie_hash_kind_of(etag);
    if (c->kind != QIE_HASH_NONE)
        snprintf(c->want_hash, sizeof c->want_hash, "%s", etag);
}

static bool add_missing(void *arg, const char *path) {
    return add(arg, path) != NULL;
}

/* All files of the folder itself, for one without a list. */
static void add_found(verify *v, const char *below, int depth) {
    char *dir = *below ? qie_path_join(v->o->dir, below) : strdup(v->o->dir);
    DIR *d = dir && depth < 16 ? opendir(dir) : NULL;
    struct dirent *e;
    while (d && (e = readdir(d))) {
        if (e->d_name[0] == '.')
            continue;
        char *path = *below ? qie_path_join(below, e->d_name) : strdup(e->d_name);
        char *full = path ? qie_path_join(v->o->dir, path) : NULL;
        struct stat s;
        if (full && stat(full, &s) == 0) {
            if (S_ISDIR(s.st_mode))
                add_found(v, path, depth + 1);
            else
                add(v, path);
        } else if (full && lstat(full, &s) == 0)
            add(v, path); /* a link to nothing */
        free(full);
        free(path);
    }
    if (d)
        closedir(d);
    free(dir);
}

/* The hash of a blob's name behind a link, or of a download note. */
static void hash_from_place(const verify *v, check *c) {
    char buf[PATH_MAX], etag[200] = "";
    ssize_t n = readlink(c->full, buf, sizeof buf - 1);
    if (n > 0) {
        buf[n] = 0;
        const char *slash = strrchr(buf, '/');
        snprintf(etag, sizeof etag, "%.190s", slash ? slash + 1 : buf);
    } else {
        snprintf(buf, sizeof buf, "%s/.cache/huggingface/download/%s.metadata", v->o->dir, c->path);
        FILE *f = fopen(buf, "re");
        if (f) {
            if (fscanf(f, "%*60s %190s", etag) != 1)
                etag[0] = 0;
            fclose(f);
        }
    }
    expect_hash(c, etag);
}

/* Commit of the download notes of a plain folder. */
static void local_notes(verify *v, char commit[41]) {
    char path[PATH_MAX];
    qie_json *root = NULL;
    commit[0] = 0;
    snprintf(path, sizeof path, "%s/.cache/huggingface/qwen-edit.json", v->o->dir);
    if (qie_file_exists(path) && qie_json_parse_file(path, 65536, &root, NULL) == QIE_OK) {
        const char *repo = NULL, *revision = NULL, *c = NULL;
        qie_json_get_string(root, "repo", "", &repo, NULL);
        qie_json_get_string(root, "revision", "", &revision, NULL);
        qie_json_get_string(root, "commit", "", &c, NULL);
        if (!v->repo[0] && repo && qie_hub_repo_is_valid(repo))
            snprintf(v->repo, sizeof v->repo, "%s", repo);
        if (revision && strcmp(revision, "main") && strlen(revision) < sizeof v->revision)
            snprintf(v->revision, sizeof v->revision, "%s", revision);
        if (c && qie_hub_is_commit(c))
            snprintf(commit, 41, "%.40s", c);
    }
    qie_json_free(root);
    snprintf(path, sizeof path, "%s/.cache/huggingface/download/model_index.json.metadata",
             v->o->dir);
    FILE *f = commit[0] ? NULL : fopen(path, "re");
    if (f) {
        char text[64];
        if (fscanf(f, "%60s", text) == 1 && qie_hub_is_commit(text))
            snprintf(commit, 41, "%.40s", text);
        fclose(f);
    }
}

/* What `quantize` noted when it had made the folder: sizes and hashes of the files it wrote. */
static bool expect_made(void *arg, const char *path, qie_json *file) {
    verify *v = arg;
    check *c = qie_hub_path_is_safe(path, strlen(path)) ? add(v, path) : NULL;
    const char *hash = "";
    int64_t bytes = -1;
    if (!c || qie_json_get_int(file, "bytes", -1, -1, INT64_MAX, &bytes, NULL) != QIE_OK ||
        qie_json_get_string(file, "sha256", "", &hash, NULL) != QIE_OK)
        return true;
    c->want_size = bytes;
    c->made = true;
    expect_hash(c, hash);
    return true;
}

static void made_here(verify *v) {
    char path[PATH_MAX];
    qie_json *root = NULL;
    snprintf(path, sizeof path, "%s/" QIE_QUANT_RECORD, v->o->dir);
    if (qie_file_exists(path) && qie_json_parse_file(path, 1u << 20, &root, NULL) == QIE_OK) {
        const qie_json *files = qie_json_member(root, "files"),
                       *whole = qie_json_member(root, "complete");
        if (qie_json_is_object(files) && qie_json_is_bool(whole) && qie_json_bool(whole))
            qie_json_each(files, expect_made, v);
    }
    qie_json_free(root);
}

static qie_status expectations(verify *v, qie_error *err) {
    const char *dir = v->o->dir;
    char real[PATH_MAX], notes[PATH_MAX + 64], commit[41] = "", repo[128];
    qie_hub_listing l = {0};
    QIE_FAIL_IF(!realpath(dir, real), QIE_E_NOT_FOUND, err, dir, "there is no folder '%s'", dir);
    const char *snapshots = strstr(real, "/snapshots/");
    v->cached = snapshots && qie_cache_repo_of(real, repo, sizeof repo);
    if (v->cached) {
        snprintf(v->repo, sizeof v->repo, "%s", repo);
        snprintf(notes, sizeof notes, "%.*s", (int)(snapshots - real), real);
        snprintf(v->cache, sizeof v->cache, "%s", notes);
        *strrchr(v->cache, '/') = 0;
        const char *c = snapshots + strlen("/snapshots/");
        if (strlen(c) == 40)
            snprintf(commit, sizeof commit, "%.40s", c);
    } else {
        local_notes(v, commit);
        snprintf(notes, sizeof notes, "%s/.cache/huggingface", dir);
    }
    bool listed = commit[0] && qie_hub_tree_read(notes, commit, &l, NULL) == QIE_OK;
    qie_hub_listing_filter(&l, v->o->include, v->o->n_include, v->o->exclude, v->o->n_exclude);
    for (size_t i = 0; i < l.n; i++) {
        check *c = add(v, l.files[i].path);
        if (!c) {
            qie_hub_listing_release(&l);
            return no_memory(err);
        }
        c->want_size = l.files[i].size;
        expect_hash(c, l.files[i].etag);
    }
    qie_hub_listing_release(&l);
    bool part = v->o->n_include || v->o->n_exclude;
    if (!listed && !part)
        add_found(v, "", 0);
    if (!part) {
        qie_model_missing(dir, add_missing, v);
        made_here(v);
    }
    for (size_t i = 0; i < v->n; i++) {
        check *c = &v->checks[i];
        struct stat s;
        c->size = stat(c->full, &s) == 0 && S_ISREG(s.st_mode) ? (int64_t)s.st_size : -1;
        if (c->kind == QIE_HASH_NONE && c->size >= 0)
            hash_from_place(v, c);
        v->out->bytes += c->size > 0 ? c->size : 0;
    }
    v->out->n_files = v->n;
    return QIE_OK;
}

/* ------------------------------------------------------------------ hashing */

static void hash_one(void *arg, size_t i, int i_thread) {
    verify *v = arg;
    check *c = &v->checks[i];
    if (c->size < 0 || c->kind == QIE_HASH_NONE || (c->want_size >= 0 && c->size != c->want_size))
        return;
    qie_hash *h = NULL;
    size_t cap = (size_t)1 << 20;
    unsigned char *buf = malloc(cap);
    int fd = open(c->full, O_RDONLY | O_CLOEXEC);
    if (!buf || fd < 0 || qie_hash_create(c->kind, c->size, &h, NULL) != QIE_OK) {
        c->read_errno = fd < 0 ? errno : ENOMEM;
        goto done;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    for (;;) {
        ssize_t n = read(fd, buf, cap);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            c->read_errno = errno;
        if (n <= 0 || (v->o->stop && v->o->stop(v->o->arg)))
            break;
        qie_hash_update(h, buf, (size_t)n);
        int64_t done = atomic_fetch_add(&v->done, n) + n;
        if (i_thread == 0 && v->o->progress) {
            double s = qie_now_s() - v->started;
            v->o->progress(v->o->arg, done, v->bytes, s > 0 ? (double)done / s : 0);
        }
    }
    qie_hash_final(h, c->got_hash);
    c->hashed = true;
done:
    qie_hash_destroy(h);
    if (fd >= 0)
        close(fd);
    free(buf);
}

/* Large ones first, so that the last core to finish has a small one. */
static int by_size(const void *a, const void *b) {
    int64_t x = ((const check *)a)->size, y = ((const check *)b)->size;
    return x > y ? -1 : x < y;
}

static int by_path(const void *a, const void *b) {
    return strcmp(((const check *)a)->path, ((const check *)b)->path);
}

static qie_status hash_all(verify *v, qie_error *err) {
    if (v->n) /* qsort takes no NULL */
        qsort(v->checks, v->n, sizeof *v->checks, by_size);
    for (size_t i = 0; i < v->n; i++)
        if (v->checks[i].kind != QIE_HASH_NONE && v->checks[i].size > 0)
            v->bytes += v->checks[i].size;
    v->started = qie_now_s();
    int n = v->o->n_threads > 0 ? v->o->n_threads : qie_cpu_count();
    qie_parallel_for(n, v->n, hash_one, v);
    QIE_FAIL_IF(v->o->stop && v->o->stop(v->o->arg), QIE_E_CANCELLED, err, NULL, "interrupted");
    return QIE_OK;
}

/* Of files that no hub has. */
static const char MAKE_AGAIN[] =
    "remove the folder and convert the original model again (qwen-edit quantize)";

static void report_files(verify *v) {
    if (v->n)
        qsort(v->checks, v->n, sizeof *v->checks, by_path);
    for (size_t i = 0; i < v->n; i++) {
        const check *c = &v->checks[i];
        const char *mend = c->made ? MAKE_AGAIN : NULL;
        if (c->size < 0) {
            v->out->n_missing++;
            problem(v, c->path, "missing", mend, "is not there");
        } else if (c->want_size >= 0 && c->size != c->want_size) {
            v->out->n_damaged++;
            problem(v, c->path, "size", mend, "has %lld bytes instead of %lld", (long long)c->size,
                    (long long)c->want_size);
        } else if (c->read_errno) {
            v->out->n_damaged++;
            problem(v, c->path, "unreadable", mend, "cannot be read: %s%s", strerror(c->read_errno),
                    c->read_errno == EIO ? " (the disk may be failing)" : "");
        } else if (c->hashed && strcmp(c->got_hash, c->want_hash)) {
            v->out->n_damaged++;
            problem(v, c->path, "hash", mend,
                    "its content is damaged: %s %.16s... instead of %.16s...",
                    c->kind == QIE_HASH_SHA256 ? "sha256" : "git sha1", c->got_hash, c->want_hash);
        }
        v->out->n_hashed += c->hashed;
        v->out->n_unknown += c->size >= 0 && c->kind == QIE_HASH_NONE;
    }
    v->out->bytes_hashed = atomic_load(&v->done);
}

/* ------------------------------------------------------------------ headers and tensors */

typedef struct tensors {
    verify *v;
    qie_weights *w;
    const char *component;
    int n_bad;
    const qie_tensor **seen;
    size_t n_seen, cap;
} tensors;

/* Matrices may be of any type that the matrix operations read, all else are floats. */
static qie_status need(const tensors *t, const qie_tensor_spec *spec, const qie_tensor **x,
                       qie_error *err) {
    int64_t k = 1;
    for (int d = 1; d < spec->n_dims; d++)
        k *= spec->shape[d];
    if (spec->n_dims >= 2 && strcmp(t->component, "vae"))
        return qie_weights_need_linear(t->w, spec->name, spec->shape[0], k, x, err);
    return qie_weights_need(t->w, spec->name, spec->n_dims, spec->shape, x, err);
}

static bool one_tensor(void *arg, const qie_tensor_spec *spec) {
    tensors *t = arg;
    const qie_tensor *x = NULL;
    qie_error e = {0};
    if (spec->unused && !qie_weights_find(t->w, spec->name))
        return true;
    if (need(t, spec, &x, &e) != QIE_OK) {
        if (t->n_bad++ < 5)
            problem(t->v, t->component, "tensors",
                    "check that the folder holds files of one model only", "%s", e.message);
        return t->n_bad < 200;
    }
    if (t->n_seen < t->cap)
        t->seen[t->n_seen++] = x;
    return true;
}

static int by_pointer(const void *a, const void *b) {
    uintptr_t x = (uintptr_t) * (const qie_tensor *const *)a,
              y = (uintptr_t) * (const qie_tensor *const *)b;
    return x < y ? -1 : x > y;
}

/* Names in the files that no config asks for. */
static void report_extra(const tensors *t) {
    qie_strbuf names;
    size_t n = 0;
    qie_strbuf_init(&names, 600);
    qsort(t->seen, t->n_seen, sizeof *t->seen, by_pointer);
    for (size_t i = 0; i < qie_weights_count(t->w); i++) {
        const qie_tensor *x = qie_weights_at(t->w, i);
        if (bsearch(&x, t->seen, t->n_seen, sizeof *t->seen, by_pointer))
            continue;
        /* Weights of the time axis, which single pictures never use: released files have them. */
        if (strstr(x->name, ".time_conv."))
            continue;
        if (n++ < 3)
            qie_strbuf_printf(&names, "%s%.100s", n > 1 ? ", " : "", x->name);
    }
    if (n)
        problem(t->v, t->component, "note",
                "check that config.json and the weights belong together",
                "the files hold %zu tensors that the config does not imply (%s%s)", n,
                names.data ? names.data : "", n > 3 ? ", ..." : "");
    qie_strbuf_release(&names);
}

static void check_component(verify *v, qie_files *files, const qie_model_config *c,
                            const char *name) {
    tensors t = {.v = v, .component = name};
    qie_error e = {0};
    if (qie_weights_open(files, name, &t.w, &e) != QIE_OK) {
        /* A missing shard has been told already. */
        if (e.status != QIE_E_NOT_FOUND)
            problem(v, name, "header", v->repo[0] ? NULL : "fetch the files of this folder again",
                    "%s", e.message);
        v->out->n_damaged += e.status != QIE_E_NOT_FOUND;
        return;
    }
    t.cap = qie_weights_count(t.w);
    t.seen = calloc(t.cap + 1, sizeof *t.seen);
    v->out->n_tensors += (int64_t)t.cap;
    int part = 0;
    while (part < QIE_PART_COUNT && strcmp(name, qie_part_name((qie_part)part)))
        part++;
    /* What is all right needs no list; one that is not is made here, name by name. */
    if (t.seen && c && qie_weights_check(t.w, (qie_part)part, c, NULL) != QIE_OK) {
        if (!strcmp(name, "transformer"))
            qie_tensors_transformer(&c->transformer, one_tensor, &t);
        else if (!strcmp(name, "vae"))
            qie_tensors_vae(&c->vae, one_tensor, &t);
        else
            qie_tensors_text_encoder(&c->text, &c->vision, one_tensor, &t);
        if (t.n_bad > 5)
            problem(v, name, "tensors", "check that the folder holds files of one model only",
                    "%d tensors in all are not as the config says", t.n_bad);
        if (!t.n_bad)
            report_extra(&t);
        v->out->n_damaged += t.n_bad > 0;
    }
    free(t.seen);
    qie_weights_close(t.w);
}

static void check_structure(verify *v) {
    static const char *const components[] = {"transformer", "text_encoder", "vae"};
    qie_files *files = NULL;
    qie_model_config *config = calloc(1, sizeof *config);
    qie_error e = {0};
    if (!config || qie_files_open_dir(v->o->dir, &files, &e) != QIE_OK) {
        free(config);
        return;
    }
    bool have_config = qie_model_config_read(files, config, &e) == QIE_OK;
    if (!have_config && e.status != QIE_E_NOT_FOUND) {
        problem(v, "", "config", "qwen-edit runs Qwen-Image-Edit models in the layout of diffusers",
                "%s", e.message);
        v->out->n_damaged++;
    }
    for (size_t i = 0; i < 3; i++) {
        char *dir = qie_path_join(v->o->dir, components[i]);
        if (dir && qie_dir_exists(dir))
            check_component(v, files, have_config ? config : NULL, components[i]);
        free(dir);
    }
    qie_files_close(files);
    free(config);
}

qie_status qie_verify(const qie_verify_options *options, qie_verify_result *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    verify v = {.o = options, .out = out};
    double t0 = qie_now_s();
    if (options->repo)
        snprintf(v.repo, sizeof v.repo, "%s", options->repo);
    qie_status st = expectations(&v, err);
    if (st == QIE_OK && !options->no_hash)
        st = hash_all(&v, err);
    if (st == QIE_OK) {
        report_files(&v);
        if (!options->n_include && !options->n_exclude)
            check_structure(&v);
        if (out->n_damaged)
            st = qie_fail(err, QIE_E_CORRUPT, NULL,
                          "'%s' is damaged: %zu problem%s, %zu file%s missing", options->dir,
                          out->n_damaged, out->n_damaged == 1 ? "" : "s", out->n_missing,
                          out->n_missing == 1 ? "" : "s");
        else if (out->n_missing)
            st = qie_fail(err, QIE_E_NOT_FOUND, NULL, "'%s' is not complete: %zu file%s missing",
                          options->dir, out->n_missing, out->n_missing == 1 ? " is" : "s are");
    }
    for (size_t i = 0; i < v.n; i++) {
        free(v.checks[i].path);
        free(v.checks[i].full);
    }
    free(v.checks);
    out->seconds = qie_now_s() - t0;
    return st;
}
