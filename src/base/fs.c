#define _GNU_SOURCE
#include "base/fs.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

static qie_status open_fail(qie_error *err, const char *what, const char *path) {
    int e = errno;
    return qie_fail(err, e == ENOENT || e == ENOTDIR ? QIE_E_NOT_FOUND : QIE_E_IO, path,
                    "cannot %s '%s': %s", what, path, strerror(e));
}

qie_status qie_file_read(const char *path, size_t max_bytes, unsigned char **out, size_t *n,
                         qie_error *err) {
    *out = NULL;
    *n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return open_fail(err, "open", path);
    struct stat st;
    if (fstat(fd, &st) || S_ISDIR(st.st_mode)) {
        close(fd);
        return qie_fail(err, QIE_E_IO, path, "cannot read '%s': it is not a file", path);
    }
    if (st.st_size > 0 && (uint64_t)st.st_size > max_bytes) {
        close(fd);
        return qie_fail(err, QIE_E_TOO_LARGE, path,
                        "'%s' has %lld bytes, more than the limit of %zu", path,
                        (long long)st.st_size, max_bytes);
    }
    /* Pipes and /proc files have no size: grow up to the limit. */
    size_t cap = st.st_size > 0 ? (size_t)st.st_size + 1 : 65536, len = 0;
    unsigned char *buf = malloc(cap + 1);
    while (buf) {
        if (len == cap) {
            if (cap > max_bytes)
                break;
            cap *= 2;
            unsigned char *p = realloc(buf, cap + 1);
            if (!p) {
                free(buf);
                buf = NULL;
                break;
            }
            buf = p;
        }
        ssize_t got = read(fd, buf + len, cap - len);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int e = errno;
            free(buf);
            close(fd);
            return qie_fail(err, QIE_E_IO, path, "cannot read '%s': %s", path, strerror(e));
        }
        if (got == 0)
            break;
        len += (size_t)got;
    }
    close(fd);
    QIE_FAIL_IF(!buf, QIE_E_NO_MEMORY, err, path, "no memory to read '%s'", path);
    if (len > max_bytes) {
        free(buf);
        return qie_fail(err, QIE_E_TOO_LARGE, path, "'%s' is larger than the limit of %zu bytes",
                        path, max_bytes);
    }
    buf[len] = 0;
    *out = buf;
    *n = len;
    return QIE_OK;
}

bool qie_file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

bool qie_dir_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

char *qie_path_join(const char *dir, const char *name) {
    size_t n = strlen(dir);
    char *p = NULL;
    if (asprintf(&p, "%s%s%s", dir, n && dir[n - 1] == '/' ? "" : "/", name) < 0)
        return NULL;
    return p;
}

qie_status qie_map_open(const char *path, qie_map *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return open_fail(err, "open", path);
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return qie_fail(err, QIE_E_IO, path, "cannot map '%s': it is not a regular file", path);
    }
    if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            int e = errno;
            close(fd);
            return qie_fail(err, QIE_E_IO, path, "cannot map '%s': %s", path, strerror(e));
        }
        out->data = p;
        out->size = (size_t)st.st_size;
    }
    close(fd);
    return QIE_OK;
}

void qie_map_close(qie_map *m) {
    if (m && m->data)
        munmap((void *)(uintptr_t)m->data, m->size);
    if (m)
        memset(m, 0, sizeof *m);
}

/* Temporary files in progress, for the signal handler. A slot's flag is set after its text is
 * complete. */
static struct {
    char path[PATH_MAX];
    volatile int used;
} partial[16];

void qie_file_remove_partial(void) {
    for (size_t i = 0; i < sizeof partial / sizeof *partial; i++)
        if (__atomic_load_n(&partial[i].used, __ATOMIC_ACQUIRE) == 2)
            unlink(partial[i].path);
}

static int partial_add(const char *path) {
    for (int i = 0; i < (int)(sizeof partial / sizeof *partial); i++) {
        int zero = 0;
        if (__atomic_compare_exchange_n(&partial[i].used, &zero, 1, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            snprintf(partial[i].path, sizeof partial[i].path, "%s", path);
            __atomic_store_n(&partial[i].used, 2, __ATOMIC_RELEASE);
            return i;
        }
    }
    return -1;
}

static void partial_drop(int i) {
    if (i >= 0)
        __atomic_store_n(&partial[i].used, 0, __ATOMIC_RELEASE);
}

int qie_write_all(int fd, const void *data, size_t n) {
    const char *p = data;
    while (n) {
        ssize_t k = write(fd, p, n);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return k < 0 ? errno : EIO;
        p += k;
        n -= (size_t)k;
    }
    return 0;
}

qie_status qie_file_check_writable(const char *path, qie_error *err) {
    QIE_FAIL_IF(!*path, QIE_E_INVALID, err, "output", "the output path is empty");
    QIE_FAIL_IF(qie_dir_exists(path), QIE_E_IO, err, path,
                "cannot write '%s': it is a folder, give a file name", path);
    const char *slash = strrchr(path, '/');
    char *dir = slash ? strndup(path, slash == path ? 1 : (size_t)(slash - path)) : strdup(".");
    QIE_FAIL_IF(!dir, QIE_E_NO_MEMORY, err, path, "out of memory");
    qie_status st = QIE_OK;
    if (access(dir, W_OK | X_OK)) {
        int e = errno;
        st = qie_fail(err, QIE_E_IO, path, "cannot write '%s': folder '%s': %s", path, dir,
                      strerror(e));
    }
    free(dir);
    return st;
}

qie_status qie_file_write_atomic(const char *path, const void *data, size_t n, qie_error *err) {
    char real[PATH_MAX], tmp[PATH_MAX];
    if (!realpath(path, real))
        snprintf(real, sizeof real, "%s", path);
    struct stat st;
    bool exists = stat(real, &st) == 0;
    if (exists && !S_ISREG(st.st_mode) &&
        !S_ISDIR(st.st_mode)) { /* /dev/stdout, a pipe: no rename */
        int fd = open(real, O_WRONLY | O_CLOEXEC), e = fd < 0 ? errno : qie_write_all(fd, data, n);
        if (fd >= 0)
            close(fd);
        return e ? qie_fail(err, QIE_E_IO, path, "cannot write '%s': %s", path, strerror(e))
                 : QIE_OK;
    }
    QIE_FAIL_IF(exists && S_ISDIR(st.st_mode), QIE_E_IO, err, path,
                "cannot write '%s': it is a folder, give a file name", path);
    int len = snprintf(tmp, sizeof tmp, "%s.XXXXXX", real);
    QIE_FAIL_IF(len < 0 || (size_t)len >= sizeof tmp, QIE_E_IO, err, path, "path '%s' is too long",
                path);
    int fd = mkostemp(tmp, O_CLOEXEC);
    QIE_FAIL_IF(fd < 0, QIE_E_IO, err, path, "cannot write '%s': %s", path, strerror(errno));
    int slot = partial_add(tmp);
    mode_t mask = umask(0);
    umask(mask);
    int e = qie_write_all(fd, data, n);
    if (!e && (fchmod(fd, exists ? st.st_mode & 07777 : 0666 & ~mask) || fsync(fd)))
        e = errno;
    if (close(fd) && !e)
        e = errno;
    if (!e && rename(tmp, real))
        e = errno;
    if (e)
        unlink(tmp);
    partial_drop(slot);
    return e ? qie_fail(err, QIE_E_IO, path, "cannot write '%s': %s", path, strerror(e)) : QIE_OK;
}

/* Give the unnamed file `fd` a name: at once where there is none, else by way of `tmp`, since a
 * link cannot replace. Returns an errno. */
static int name_file(int fd, const char *path, const char *tmp) {
    char self[64];
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    if (linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW) == 0)
        return 0;
    /* Another process may take tmp away or make it between the calls: then once more. */
    for (int i = 0; i < 100 && errno == EEXIST; i++) {
        if (linkat(AT_FDCWD, self, AT_FDCWD, tmp, AT_SYMLINK_FOLLOW) == 0) {
            if (rename(tmp, path) == 0)
                return 0;
            if (errno == ENOENT)
                errno = EEXIST;
        } else if (errno == EEXIST)
            unlink(tmp);
        else
            break;
        if (errno == ENOENT)
            errno = EEXIST;
    }
    return errno;
}

static bool has_content(const char *path, const void *data, size_t n) {
    unsigned char *old = NULL;
    size_t old_n = 0;
    bool same = qie_file_read(path, n, &old, &old_n, NULL) == QIE_OK && old_n == n &&
                (n == 0 || !memcmp(old, data, n));
    free(old);
    return same;
}

qie_status qie_file_write_note(const char *path, const void *data, size_t n, qie_error *err) {
    char dir[PATH_MAX], tmp[PATH_MAX];
    if (has_content(path, data, n)) /* also in a folder that may only be read */
        return QIE_OK;
    int len = snprintf(tmp, sizeof tmp, "%s.qwen-edit.tmp", path);
    QIE_FAIL_IF(len < 0 || (size_t)len >= sizeof tmp, QIE_E_IO, err, path, "path '%s' is too long",
                path);
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash)
        slash[slash == dir] = 0;
    mode_t mask = umask(0);
    umask(mask);
    int fd = open(slash ? dir : ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666 & ~mask);
    int e = fd < 0 ? errno : qie_write_all(fd, data, n);
    if (!e)
        e = name_file(fd, path, tmp);
    if (fd >= 0)
        close(fd);
    /* File systems without unnamed files, and without links (or without /proc). */
    if (e == EOPNOTSUPP || e == EISDIR || e == ENOENT || e == EPERM || e == EINVAL)
        return qie_file_write_atomic(path, data, n, err);
    return e ? qie_fail(err, QIE_E_IO, path, "cannot write '%s': %s", path, strerror(e)) : QIE_OK;
}

void qie_shell_word(const char *text, char *out, size_t cap) {
    size_t n = 0;
    snprintf(out, cap, "''");
    for (const char *p = text; *p; p++)
        n += *p == '\'' ? 4 : 1;
    if (n + 3 > cap)
        return;
    char *o = out;
    *o++ = '\'';
    for (const char *p = text; *p; p++) {
        if (*p == '\'') { /* ends the quotes, comes by itself, and begins them again */
            memcpy(o, "'\\''", 4);
            o += 4;
        } else
            *o++ = *p;
    }
    memcpy(o, "'", 2);
}

qie_status qie_mkdirs(const char *path, qie_error *err) {
    char buf[PATH_MAX];
    QIE_FAIL_IF(strlen(path) >= sizeof buf, QIE_E_IO, err, path, "path '%s' is too long", path);
    snprintf(buf, sizeof buf, "%s", path);
    for (char *p = buf + 1;; p++) {
        char c = *p;
        if (c != '/' && c != 0)
            continue;
        *p = 0;
        if (mkdir(buf, 0777) && errno != EEXIST)
            return qie_fail(err, QIE_E_IO, path, "cannot make folder '%s': %s", buf,
                            strerror(errno));
        *p = c;
        if (!c)
            break;
    }
    QIE_FAIL_IF(!qie_dir_exists(path), QIE_E_IO, err, path, "'%s' exists and is no folder", path);
    return QIE_OK;
}
