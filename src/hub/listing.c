#define _GNU_SOURCE
#include "hub/listing.h"

#include <ctype.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/strbuf.h"

/* ------------------------------------------------------------------ names */

bool qie_hub_path_is_safe(const char *path, size_t n) {
    if (n == 0 || n > 1024 || memchr(path, 0, n) || !qie_utf8_valid(path, n) || path[0] == '/')
        return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)path[i] < 0x20 || path[i] == 0x7f || path[i] == '\\')
            return false;
    /* "C:..." would be another drive where the folder is read later. */
    if (n >= 2 && path[1] == ':' && isalpha((unsigned char)path[0]))
        return false;
    for (size_t i = 0; i < n;) {
        size_t k = 0;
        while (i + k < n && path[i + k] != '/')
            k++;
        if (k == 0 || k > 255 || (k == 1 && path[i] == '.') ||
            (k == 2 && !strncmp(path + i, "..", 2)))
            return false;
        i += k + 1;
        if (i == n) /* ends in '/' */
            return false;
    }
    /* Our own notes (and huggingface_hub's) in a --local-dir. */
    return !(n >= 7 && !strncmp(path, ".cache/", 7)) && !(n == 6 && !strncmp(path, ".cache", 6));
}

bool qie_hub_repo_is_valid(const char *repo) {
    size_t n = strlen(repo);
    if (n == 0 || n > 96 || strstr(repo, "--") || strstr(repo, "..") || repo[n - 1] == '/')
        return false;
    int slashes = 0;
    for (size_t i = 0; i < n; i++) {
        if (repo[i] == '/') {
            if (++slashes > 1 || i == 0)
                return false;
        } else if (!isalnum((unsigned char)repo[i]) && !strchr("-_.", repo[i]))
            return false;
        if ((i == 0 || repo[i - 1] == '/') && (repo[i] == '-' || repo[i] == '.'))
            return false;
    }
    return true;
}

bool qie_hub_revision_is_valid(const char *revision) {
    return strlen(revision) <= 200 && !strpbrk(revision, " ~^:?*[") &&
           qie_hub_path_is_safe(revision, strlen(revision));
}

bool qie_hub_is_commit(const char *text) {
    return strlen(text) == 40 && strspn(text, "0123456789abcdef") == 40;
}

static bool etag_is_safe(const char *etag) {
    size_t n = strlen(etag);
    if (n == 0 || n >= QIE_HUB_ETAG_MAX || etag[0] == '.')
        return false;
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)etag[i]) && !strchr("-_.", etag[i]))
            return false;
    return true;
}

/* ------------------------------------------------------------------ the list */

void qie_hub_listing_release(qie_hub_listing *l) {
    for (size_t i = 0; i < l->n; i++)
        free(l->files[i].path);
    free(l->files);
    memset(l, 0, sizeof *l);
}

/* Text of the server for a message: cut, and without bytes that a terminal would obey (qie_fail
 * replaces them). */
static int cut(size_t n) {
    return n > 120 ? 120 : (int)n;
}

qie_status qie_hub_listing_add(qie_hub_listing *l, const char *path, size_t path_bytes,
                               int64_t size, const char *etag, const char *blob_id, bool lfs,
                               qie_error *err) {
    QIE_FAIL_IF(
        !qie_hub_path_is_safe(path, path_bytes), QIE_E_CORRUPT, err, NULL,
        "the server lists a file named '%.*s', which could leave the target folder: refused",
        cut(path_bytes), path);
    QIE_FAIL_IF(size < -1 || size > QIE_HUB_SIZE_MAX, QIE_E_CORRUPT, err, NULL,
                "the server lists '%.*s' with the impossible size %lld", cut(path_bytes), path,
                (long long)size);
    QIE_FAIL_IF(*etag && !etag_is_safe(etag), QIE_E_CORRUPT, err, NULL,
                "the server lists '%.*s' with a hash that is none: '%.80s'", cut(path_bytes), path,
                etag);
    QIE_FAIL_IF(l->n >= QIE_HUB_FILES_MAX, QIE_E_CORRUPT, err, NULL,
                "the server lists more than %d files", QIE_HUB_FILES_MAX);
    if (l->n == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        qie_hub_file *p = realloc(l->files, cap * sizeof *p);
        QIE_FAIL_IF(!p, QIE_E_NO_MEMORY, err, NULL, "out of memory");
        l->files = p;
        l->cap = cap;
    }
    qie_hub_file *f = &l->files[l->n];
    memset(f, 0, sizeof *f);
    f->path = strndup(path, path_bytes);
    QIE_FAIL_IF(!f->path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    f->size = size;
    snprintf(f->etag, sizeof f->etag, "%s", etag);
    f->hash = qie_hash_kind_of(etag);
    if (blob_id && qie_hub_is_commit(blob_id))
        snprintf(f->blob_id, sizeof f->blob_id, "%.40s", blob_id);
    f->lfs = lfs;
    l->n++;
    return QIE_OK;
}

static int by_path(const void *a, const void *b) {
    return strcmp(((const qie_hub_file *)a)->path, ((const qie_hub_file *)b)->path);
}

qie_status qie_hub_listing_finish(qie_hub_listing *l, qie_error *err) {
    QIE_FAIL_IF(!qie_hub_is_commit(l->commit), QIE_E_CORRUPT, err, NULL,
                "the server does not tell the commit of the model");
    if (l->n)
        qsort(l->files, l->n, sizeof *l->files, by_path);
    for (size_t i = 1; i < l->n; i++)
        QIE_FAIL_IF(!strcmp(l->files[i - 1].path, l->files[i].path), QIE_E_CORRUPT, err, NULL,
                    "the server lists '%.120s' twice", l->files[i].path);
    for (size_t i = 0; i < l->n; i++) {
        char buf[1100];
        snprintf(buf, sizeof buf, "%s", l->files[i].path);
        for (char *p = buf; (p = strchr(p, '/')); *p++ = '/') {
            *p = 0;
            QIE_FAIL_IF(qie_hub_listing_find(l, buf) != NULL, QIE_E_CORRUPT, err, NULL,
                        "the server lists '%.120s' both as a file and as a folder", buf);
        }
    }
    return QIE_OK;
}

const qie_hub_file *qie_hub_listing_find(const qie_hub_listing *l, const char *path) {
    qie_hub_file key = {.path = (char *)(uintptr_t)path};
    return l->n ? bsearch(&key, l->files, l->n, sizeof *l->files, by_path) : NULL;
}

static bool matches(const char *path, char *const *patterns, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char pattern[1100];
        size_t len = strlen(patterns[i]);
        snprintf(pattern, sizeof pattern, "%s%s", patterns[i],
                 len && patterns[i][len - 1] == '/' ? "*" : "");
        if (fnmatch(pattern, path, 0) == 0)
            return true;
    }
    return false;
}

void qie_hub_listing_filter(qie_hub_listing *l, char *const *include, size_t n_include,
                            char *const *exclude, size_t n_exclude) {
    size_t kept = 0;
    for (size_t i = 0; i < l->n; i++) {
        const char *path = l->files[i].path;
        if ((n_include && !matches(path, include, n_include)) || matches(path, exclude, n_exclude))
            free(l->files[i].path);
        else
            l->files[kept++] = l->files[i];
    }
    l->n = kept;
}

/* ------------------------------------------------------------------ answers of hubs */

/* A member that is a string without NUL; "" when absent or something else. */
static const char *text_of(const qie_json *o, const char *key, size_t *n) {
    size_t len = 0;
    const char *s = qie_json_string(qie_json_member(o, key), &len);
    if (n)
        *n = s ? len : 0;
    return s && (n || strlen(s) == len) ? s : "";
}

static qie_status size_of(const qie_json *o, const char *key, int64_t *out, qie_error *err) {
    *out = -1;
    qie_json *m = qie_json_member(o, key);
    QIE_FAIL_IF(m && (!qie_json_is_integer(m) || qie_json_integer(m) < 0), QIE_E_CORRUPT, err, NULL,
                "the server tells a size that is no number");
    if (m)
        *out = qie_json_integer(m);
    return QIE_OK;
}

/* An entry of the tree or a sibling: {path|rfilename, size, oid|blobId, lfs: {oid|sha256, size}}.
 */
static qie_status add_entry(const qie_json *e, const char *path_key, const char *oid_key,
                            qie_hub_listing *l, qie_error *err) {
    size_t path_n;
    const char *path = text_of(e, path_key, &path_n), *oid = text_of(e, oid_key, NULL), *etag = oid;
    const qie_json *lfs = qie_json_member(e, "lfs");
    int64_t size;
    QIE_TRY(size_of(e, "size", &size, err));
    if (qie_json_is_object(lfs)) {
        etag = text_of(lfs, "oid", NULL);
        if (!*etag)
            etag = text_of(lfs, "sha256", NULL);
        if (!strncmp(etag, "sha256:", 7))
            etag += 7;
        QIE_FAIL_IF(qie_hash_kind_of(etag) != QIE_HASH_SHA256, QIE_E_CORRUPT, err, NULL,
                    "the server lists '%.*s' without a sha256", cut(path_n), path);
        int64_t lfs_size;
        QIE_TRY(size_of(lfs, "size", &lfs_size, err));
        QIE_FAIL_IF(lfs_size >= 0 && size >= 0 && lfs_size != size, QIE_E_CORRUPT, err, NULL,
                    "the server tells two sizes of '%.*s': %lld and %lld", cut(path_n), path,
                    (long long)size, (long long)lfs_size);
        if (lfs_size >= 0)
            size = lfs_size;
    }
    return qie_hub_listing_add(l, path, path_n, size, etag, oid, qie_json_is_object(lfs), err);
}

static qie_status parse_answer(const char *text, size_t n, qie_json **root, qie_error *err) {
    qie_error e = {0};
    if (qie_json_parse(text, n, "the server's answer", root, &e) != QIE_OK)
        return qie_fail(err, QIE_E_NETWORK, NULL, "%s (is this address a hub?)", e.message);
    return QIE_OK;
}

qie_status qie_hub_parse_tree(const char *text, size_t n, qie_hub_listing *l, qie_error *err) {
    qie_json *root;
    QIE_TRY(parse_answer(text, n, &root, err));
    qie_status st = QIE_OK;
    if (!qie_json_is_array(root))
        st = qie_fail(err, QIE_E_NETWORK, NULL, "the server's list of files is no list");
    for (size_t i = 0; st == QIE_OK && i < qie_json_size(root); i++) {
        const qie_json *e = qie_json_at(root, i);
        if (!qie_json_is_object(e))
            st = qie_fail(err, QIE_E_NETWORK, NULL, "the server's list of files holds no files");
        else if (!strcmp(text_of(e, "type", NULL), "directory"))
            continue;
        else
            st = add_entry(e, "path", "oid", l, err);
    }
    qie_json_free(root);
    return st;
}

qie_status qie_hub_parse_revision(const char *text, size_t n, bool files, qie_hub_listing *l,
                                  qie_error *err) {
    qie_json *root;
    QIE_TRY(parse_answer(text, n, &root, err));
    qie_status st = QIE_OK;
    const char *sha = qie_json_is_object(root) ? text_of(root, "sha", NULL) : "";
    const qie_json *siblings = qie_json_member(root, "siblings");
    if (!qie_hub_is_commit(sha))
        st = qie_fail(err, QIE_E_NETWORK, NULL, "the server does not tell the commit of the model");
    else
        snprintf(l->commit, sizeof l->commit, "%.40s", sha);
    for (size_t i = 0;
         st == QIE_OK && files && qie_json_is_array(siblings) && i < qie_json_size(siblings); i++)
        st = add_entry(qie_json_at(siblings, i), "rfilename", "blobId", l, err);
    qie_json_free(root);
    return st;
}

/* The commit of a listing that has none: sha1 over names, sizes and hashes, so that the same
 * content gets the same snapshot folder whenever it is pulled. */
static qie_status commit_from_content(qie_hub_listing *l, qie_error *err) {
    qie_strbuf b;
    qie_strbuf_init(&b, (size_t)64 << 20);
    qsort(l->files, l->n, sizeof *l->files, by_path);
    for (size_t i = 0; i < l->n; i++)
        qie_strbuf_printf(&b, "%s %lld %s\n", l->files[i].path, (long long)l->files[i].size,
                          l->files[i].etag);
    bool ok = !b.failed && l->n > 0;
    char hex[QIE_HASH_HEX_MAX] = "";
    if (ok)
        qie_sha1_hex(b.data, b.len, hex);
    qie_strbuf_release(&b);
    QIE_FAIL_IF(!ok || !qie_hub_is_commit(hex), QIE_E_NETWORK, err, NULL,
                "the server lists no files");
    snprintf(l->commit, sizeof l->commit, "%.40s", hex);
    return QIE_OK;
}

qie_status qie_hub_parse_modelscope(const char *text, size_t n, qie_hub_listing *l,
                                    qie_error *err) {
    qie_json *root;
    QIE_TRY(parse_answer(text, n, &root, err));
    qie_status st = QIE_OK;
    const qie_json *files = qie_json_member(qie_json_member(root, "Data"), "Files");
    if (!qie_json_is_array(files)) {
        const char *m = text_of(root, "Message", NULL);
        st = qie_fail(err, QIE_E_NETWORK, NULL, "the server lists no files%s%.200s", *m ? ": " : "",
                      m);
    }
    for (size_t i = 0; st == QIE_OK && i < qie_json_size(files); i++) {
        const qie_json *e = qie_json_at(files, i);
        if (!strcmp(text_of(e, "Type", NULL), "tree"))
            continue;
        size_t path_n;
        int64_t size;
        const char *path = text_of(e, "Path", &path_n), *sha = text_of(e, "Sha256", NULL);
        st = size_of(e, "Size", &size, err);
        if (st == QIE_OK && qie_hash_kind_of(sha) != QIE_HASH_SHA256)
            st = qie_fail(err, QIE_E_CORRUPT, NULL, "the server lists '%.*s' without a sha256",
                          cut(path_n), path);
        if (st == QIE_OK)
            st = qie_hub_listing_add(l, path, path_n, size, sha, NULL, true, err);
    }
    if (st == QIE_OK)
        st = commit_from_content(l, err);
    qie_json_free(root);
    return st;
}

/* ------------------------------------------------------------------ trees/<commit>.json */

typedef struct tree_walk {
    qie_hub_listing *l;
    qie_status st;
    qie_error *err;
} tree_walk;

static bool tree_member(void *arg, const char *key, qie_json *v) {
    tree_walk *w = arg;
    const char *lfs = text_of(v, "lfs_sha256", NULL), *id = text_of(v, "blob_id", NULL);
    int64_t size;
    w->st = size_of(v, *lfs ? "lfs_size" : "size", &size, w->err);
    if (w->st == QIE_OK && size < 0)
        w->st = size_of(v, "size", &size, w->err);
    if (w->st == QIE_OK)
        w->st = qie_hub_listing_add(w->l, key, strlen(key), size, *lfs ? lfs : id, id, *lfs != 0,
                                    w->err);
    return w->st == QIE_OK;
}

static char *tree_path(const char *folder, const char *commit) {
    char *p = NULL;
    return asprintf(&p, "%s/trees/%s.json", folder, commit) < 0 ? NULL : p;
}

qie_status qie_hub_tree_read(const char *folder, const char *commit, qie_hub_listing *l,
                             qie_error *err) {
    memset(l, 0, sizeof *l);
    QIE_FAIL_IF(!qie_hub_is_commit(commit), QIE_E_NOT_FOUND, err, NULL, "'%.60s' is no commit",
                commit);
    char *path = tree_path(folder, commit);
    QIE_FAIL_IF(!path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_json *root = NULL;
    qie_status st = qie_json_parse_file(path, QIE_HUB_JSON_MAX, &root, err);
    if (st == QIE_OK && (qie_json_integer(qie_json_member(root, "format_version")) != 1 ||
                         !qie_json_is_object(qie_json_member(root, "files"))))
        st = qie_fail(err, QIE_E_CORRUPT, path, "'%s' is no list of files that this program knows",
                      path);
    if (st == QIE_OK) {
        tree_walk w = {l, QIE_OK, err};
        snprintf(l->commit, sizeof l->commit, "%s", commit);
        qie_json_each(qie_json_member(root, "files"), tree_member, &w);
        st = w.st;
    }
    if (st == QIE_OK)
        st = qie_hub_listing_finish(l, err);
    if (st != QIE_OK)
        qie_hub_listing_release(l);
    qie_json_free(root);
    free(path);
    return st;
}

qie_status qie_hub_tree_write(const char *folder, const qie_hub_listing *l, qie_error *err) {
    qie_json *root = qie_json_new_object(), *files = qie_json_new_object();
    bool ok = qie_json_put(root, "format_version", qie_json_new_int(1));
    for (size_t i = 0; ok && i < l->n; i++) {
        const qie_hub_file *f = &l->files[i];
        qie_json *e = qie_json_new_object();
        /* Where git's own id is not told (ModelScope) the content's hash stands in its place. */
        ok = f->size >= 0 && qie_json_put(e, "size", qie_json_new_int(f->size)) &&
             qie_json_put(e, "blob_id", qie_json_new_string(*f->blob_id ? f->blob_id : f->etag));
        if (ok && f->lfs)
            ok = qie_json_put(e, "lfs_sha256", qie_json_new_string(f->etag)) &&
                 qie_json_put(e, "lfs_size", qie_json_new_int(f->size));
        ok = qie_json_put(files, f->path, e) && ok;
    }
    ok = qie_json_put(root, "files", files) && ok;
    char *text = ok ? qie_json_text(root, 1) : NULL, *path = tree_path(folder, l->commit),
         *dir = NULL;
    qie_status st = QIE_OK;
    if (!text || !path || asprintf(&dir, "%s/trees", folder) < 0)
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "cannot note the list of files");
    if (st == QIE_OK)
        st = qie_mkdirs(dir, err);
    if (st == QIE_OK)
        st = qie_file_write_note(path, text, strlen(text), err);
    free(dir);
    free(path);
    free(text);
    qie_json_free(root);
    return st;
}
