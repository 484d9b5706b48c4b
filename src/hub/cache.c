#define _GNU_SOURCE
#include "hub/cache.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/strbuf.h"

/* ------------------------------------------------------------------ places */

static const char *env_set(const char *name) {
    const char *v = getenv(name);
    return v && *v ? v : NULL;
}

/* "~/x" with the home folder put in. */
static char *expand(const char *path) {
    const char *home = env_set("HOME");
    if (path[0] == '~' && (path[1] == '/' || !path[1]) && home)
        return path[1] ? qie_path_join(home, path + 2) : strdup(home);
    return strdup(path);
}

static char *home_dir(const char **origin) {
    const char *v = env_set("HF_HOME");
    if (v) {
        *origin = "HF_HOME";
        return expand(v);
    }
    v = env_set("XDG_CACHE_HOME");
    *origin = v ? "XDG_CACHE_HOME" : "default";
    char *base = v ? expand(v) : expand("~/.cache");
    char *p = base ? qie_path_join(base, "huggingface") : NULL;
    free(base);
    return p;
}

char *qie_cache_home(void) {
    const char *origin;
    return home_dir(&origin);
}

qie_status qie_cache_dir(char **out, const char **origin, qie_error *err) {
    static const char *const names[] = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"};
    const char *from = NULL;
    *out = NULL;
    for (size_t i = 0; !*out && i < 2; i++)
        if (env_set(names[i])) {
            from = names[i];
            *out = expand(env_set(names[i]));
            QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
        }
    if (!*out) {
        char *home = home_dir(&from);
        *out = home ? qie_path_join(home, "hub") : NULL;
        free(home);
    }
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    if (**out == '~') {
        free(*out);
        *out = NULL;
        return qie_fail(err, QIE_E_INVALID, "HF_HOME",
                        "there is no home folder for the cache: set HF_HOME to a folder");
    }
    if (origin)
        *origin = from;
    return QIE_OK;
}

qie_status qie_cache_repo_dir(const char *cache, const char *repo, char **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(!qie_hub_repo_is_valid(repo), QIE_E_INVALID, err, "repository",
                "'%.120s' is no name of a model repository; write it as OWNER/NAME, for example %s",
                repo, QIE_HUB_DEFAULT_REPO);
    char folder[256];
    const char *slash = strchr(repo, '/');
    if (slash)
        snprintf(folder, sizeof folder, "models--%.*s--%s", (int)(slash - repo), repo, slash + 1);
    else
        snprintf(folder, sizeof folder, "models--%s", repo);
    *out = qie_path_join(cache, folder);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}

qie_status qie_cache_commit(const char *cache, const char *repo, const char *revision,
                            char commit[41], qie_error *err) {
    char *dir;
    commit[0] = 0;
    if (!revision)
        revision = "main";
    QIE_FAIL_IF(!qie_hub_revision_is_valid(revision), QIE_E_INVALID, err, "revision",
                "'%.120s' is no name of a revision", revision);
    QIE_TRY(qie_cache_repo_dir(cache, repo, &dir, err));
    char path[4096];
    snprintf(path, sizeof path, "%s/refs/%s", dir, revision);
    unsigned char *text = NULL;
    size_t n = 0;
    if (qie_file_read(path, 4096, &text, &n, NULL) == QIE_OK) {
        while (n && (text[n - 1] == '\n' || text[n - 1] == ' ' || text[n - 1] == '\r'))
            text[--n] = 0;
        if (qie_hub_is_commit((char *)text))
            memcpy(commit, text, 41);
    }
    free(text);
    if (!commit[0] && qie_hub_is_commit(revision)) {
        snprintf(path, sizeof path, "%s/snapshots/%s", dir, revision);
        if (qie_dir_exists(path))
            snprintf(commit, 41, "%.40s", revision);
    }
    free(dir);
    QIE_FAIL_IF(!commit[0], QIE_E_NOT_FOUND, err, "model",
                "revision '%s' of %s is not in the cache '%s': type qwen-edit pull %s", revision,
                repo, cache, repo);
    return QIE_OK;
}

/* ------------------------------------------------------------------ is a folder complete */

typedef struct missing {
    const char *dir;
    qie_missing_fn fn;
    void *arg;
    size_t n;
    bool stop;
} missing;

static bool has(missing *m, const char *name) {
    char *p = qie_path_join(m->dir, name);
    bool ok = p && qie_file_exists(p);
    free(p);
    return ok;
}

static void lacks(missing *m, const char *name) {
    m->n++;
    if (m->fn && !m->stop)
        m->stop = !m->fn(m->arg, name);
}

static void need(missing *m, const char *name) {
    if (!has(m, name))
        lacks(m, name);
}

static bool shard(void *arg, const char *key, qie_json *v) {
    (void)key;
    qie_strbuf *seen = arg;
    const char *s = qie_json_string(v, NULL);
    char line[300];
    if (s && strlen(s) < 256 && qie_hub_path_is_safe(s, strlen(s))) {
        snprintf(line, sizeof line, "\n%s\n", s);
        if (!seen->data || !strstr(seen->data, line))
            qie_strbuf_puts(seen, line);
    }
    return true;
}

/* The weights of a component: the index and the shards that it names, else the single file, which
 * may be of either format. */
static void need_weights(missing *m, const char *component, const char *stem) {
    char index[300], single[300];
    snprintf(index, sizeof index, "%s/%s.safetensors.index.json", component, stem);
    snprintf(single, sizeof single, "%s/%s.safetensors", component, stem);
    if (!has(m, index)) {
        char gguf[300];
        snprintf(gguf, sizeof gguf, "%s/%s.gguf", component, stem);
        if (has(m, single) || !has(m, gguf))
            need(m, single);
        return;
    }
    char *path = qie_path_join(m->dir, index);
    qie_json *root = NULL;
    qie_strbuf shards;
    qie_strbuf_init(&shards, 1 << 20);
    if (!path || qie_json_parse_file(path, QIE_HUB_JSON_MAX, &root, NULL) != QIE_OK ||
        !qie_json_is_object(qie_json_member(root, "weight_map")))
        lacks(m, index);
    else
        qie_json_each(qie_json_member(root, "weight_map"), shard, &shards);
    for (char *p = shards.data; p && *p;) {
        p += strspn(p, "\n");
        size_t n = strcspn(p, "\n");
        if (n) {
            char name[600];
            snprintf(name, sizeof name, "%s/%.*s", component, (int)n, p);
            need(m, name);
        }
        p += n;
    }
    qie_strbuf_release(&shards);
    qie_json_free(root);
    free(path);
}

size_t qie_model_missing(const char *dir, qie_missing_fn fn, void *arg) {
    missing m = {.dir = dir, .fn = fn, .arg = arg};
    need(&m, "model_index.json");
    need(&m, "scheduler/scheduler_config.json");
    need(&m, "transformer/config.json");
    need_weights(&m, "transformer", "diffusion_pytorch_model");
    need(&m, "text_encoder/config.json");
    need_weights(&m, "text_encoder", "model");
    need(&m, "vae/config.json");
    need_weights(&m, "vae", "diffusion_pytorch_model");
    /* The tokenizer lies in its own folder or with the processor, as one file or as two. */
    if (!has(&m, "tokenizer/tokenizer.json") && !has(&m, "processor/tokenizer.json")) {
        need(&m, "tokenizer/vocab.json");
        need(&m, "tokenizer/merges.txt");
    }
    return m.n;
}

typedef struct first_missing {
    char names[400];
    int n;
} first_missing;

static bool note_missing(void *arg, const char *path) {
    first_missing *f = arg;
    size_t len = strlen(f->names);
    if (f->n < 3)
        snprintf(f->names + len, sizeof f->names - len, "%s%.100s", f->n ? ", " : "", path);
    f->n++;
    return true;
}

bool qie_hub_is_repo(const char *name) {
    return strchr(name, '/') && qie_hub_repo_is_valid(name);
}

qie_status qie_hub_find_snapshot(const char *repo, const char *revision, char **dir,
                                 qie_error *err) {
    char *cache = NULL, *repo_dir = NULL, commit[41];
    *dir = NULL;
    QIE_TRY(qie_cache_dir(&cache, NULL, err));
    qie_status st = qie_cache_repo_dir(cache, repo, &repo_dir, err);
    if (st == QIE_OK)
        st = qie_cache_commit(cache, repo, revision, commit, err);
    if (st == QIE_OK && asprintf(dir, "%s/snapshots/%s", repo_dir, commit) < 0) {
        *dir = NULL;
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    if (st == QIE_OK && !qie_dir_exists(*dir)) {
        free(*dir);
        *dir = NULL;
        st = qie_fail(err, QIE_E_NOT_FOUND, "model",
                      "no file of %s is in the cache '%s' yet: type qwen-edit pull %s", repo, cache,
                      repo);
    }
    free(repo_dir);
    free(cache);
    return st;
}

bool qie_cache_repo_of(const char *dir, char *repo, size_t cap) {
    const char *s = strstr(dir, "/snapshots/"), *p = s;
    while (p && p > dir && p[-1] != '/')
        p--;
    if (!p || strncmp(p, "models--", 8))
        return false;
    p += 8;
    int n = snprintf(repo, cap, "%.*s", (int)(s - p), p);
    char *sep = strstr(repo, "--");
    if (n < 0 || (size_t)n >= cap)
        return false;
    if (sep) {
        *sep = '/';
        memmove(sep + 1, sep + 2, strlen(sep + 2) + 1);
    }
    return qie_hub_repo_is_valid(repo);
}

qie_status qie_hub_check_complete(const char *dir, qie_error *err) {
    first_missing f = {0};
    char repo[128], word[PATH_MAX + 300];
    if (!qie_model_missing(dir, note_missing, &f))
        return QIE_OK;
    qie_shell_word(dir, word, sizeof word);
    bool cached = qie_cache_repo_of(dir, repo, sizeof repo);
    return qie_fail(err, QIE_E_NOT_FOUND, "model",
                    "'%s' is not complete, %d file%s missing (%s%s): type %s%s%s", dir, f.n,
                    f.n == 1 ? " is" : "s are", f.names, f.n > 3 ? ", ..." : "", "qwen-edit pull ",
                    cached ? repo : "REPO --local-dir ", cached ? "" : word);
}

/* ------------------------------------------------------------------ locks */

char *qie_cache_lock_path(const char *cache, const char *repo_dir, const char *etag) {
    const char *slash = strrchr(repo_dir, '/');
    char *p = NULL;
    return asprintf(&p, "%s/.locks/%s/%s.lock", cache, slash ? slash + 1 : repo_dir, etag) < 0
               ? NULL
               : p;
}

qie_status qie_lock_try(const char *path, int *fd, qie_error *err) {
    *fd = -1;
    char *dir = strdup(path);
    QIE_FAIL_IF(!dir, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    *strrchr(dir, '/') = 0;
    qie_status st = qie_mkdirs(dir, err);
    free(dir);
    QIE_TRY(st);
    for (;;) {
        int f = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0664);
        QIE_FAIL_IF(f < 0, QIE_E_IO, err, path, "cannot make the lock file '%s': %s", path,
                    strerror(errno));
        if (flock(f, LOCK_EX | LOCK_NB)) {
            int e = errno;
            close(f);
            if (e == EINTR)
                continue;
            if (e == EWOULDBLOCK || e == EAGAIN || e == EACCES)
                return QIE_OK;
            return qie_fail(err, QIE_E_IO, path, "cannot lock '%s': %s", path, strerror(e));
        }
        /* `prune` may have unlinked the file between our open and our lock: then the name is
         * another file. */
        struct stat a, b;
        if (fstat(f, &a) == 0 && stat(path, &b) == 0 && a.st_ino == b.st_ino &&
            a.st_dev == b.st_dev) {
            *fd = f;
            return QIE_OK;
        }
        close(f);
    }
}

void qie_lock_drop(int fd) {
    if (fd >= 0)
        close(fd); /* the lock goes with the last descriptor of the open file */
}
