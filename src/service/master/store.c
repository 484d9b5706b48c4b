#define _GNU_SOURCE
#include "service/master/store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fs.h"

typedef struct pin {
    char name[QIE_HASH_HEX_MAX];
    int n;
    struct pin *next;
} pin;

struct svc_store {
    char *dir;
    int fd;
    pthread_mutex_t lock;
    pin *pins; /* as many as requests are on their way: short */
    unsigned long n_temporary;
};

qie_status svc_store_open(const char *state_dir, svc_store **out, qie_error *err) {
    svc_store *s = calloc(1, sizeof *s);
    *out = NULL;
    QIE_FAIL_IF(!s, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    s->fd = -1;
    s->dir = qie_path_join(state_dir, "files");
    pthread_mutex_init(&s->lock, NULL);
    qie_status st =
        s->dir ? qie_mkdirs(s->dir, err) : qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (st == QIE_OK && (s->fd = open(s->dir, O_DIRECTORY | O_RDONLY | O_CLOEXEC)) < 0)
        st = qie_fail(err, QIE_E_IO, s->dir, "cannot open '%s': %s", s->dir, strerror(errno));
    if (st == QIE_OK && faccessat(s->fd, ".", W_OK, 0))
        st = qie_fail(err, QIE_E_IO, s->dir, "cannot write to '%s': %s", s->dir, strerror(errno));
    if (st != QIE_OK) {
        svc_store_close(s);
        return st;
    }
    *out = s;
    return QIE_OK;
}

void svc_store_close(svc_store *s) {
    if (!s)
        return;
    if (s->fd >= 0)
        close(s->fd);
    while (s->pins) {
        pin *p = s->pins;
        s->pins = p->next;
        free(p);
    }
    pthread_mutex_destroy(&s->lock);
    free(s->dir);
    free(s);
}

static void path_of(const char *name, char out[80]) {
    snprintf(out, 80, "%.2s/%.70s", name, name);
}

static pin *find_pin(const svc_store *s, const char *name) {
    pin *p = s->pins;
    while (p && strcmp(p->name, name))
        p = p->next;
    return p;
}

static bool pin_locked(svc_store *s, const char *name) {
    pin *p = find_pin(s, name);
    if (!p) {
        p = calloc(1, sizeof *p);
        if (!p)
            return false;
        snprintf(p->name, sizeof p->name, "%s", name);
        p->next = s->pins;
        s->pins = p;
    }
    p->n++;
    return true;
}

void svc_store_unpin(svc_store *s, const char *name) {
    pthread_mutex_lock(&s->lock);
    for (pin **at = &s->pins; *at; at = &(*at)->next)
        if (!strcmp((*at)->name, name)) {
            pin *p = *at;
            if (--p->n == 0) {
                *at = p->next;
                free(p);
            }
            break;
        }
    pthread_mutex_unlock(&s->lock);
}

/* Write aside, sync, rename, sync the folder. */
static bool write_file(svc_store *s, const char *path, const void *bytes, size_t n,
                       unsigned long serial) {
    char aside[96], folder[4] = {path[0], path[1], 0, 0};
    snprintf(aside, sizeof aside, "%.2s/.tmp-%ld-%lu", path, (long)getpid(), serial);
    if (mkdirat(s->fd, folder, 0700) == 0)
        fsync(s->fd);
    else if (errno != EEXIST)
        return false;
    int fd = openat(s->fd, aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int saved = fd < 0 ? errno : qie_write_all(fd, bytes, n);
    bool ok = !saved && fdatasync(fd) == 0;
    saved = saved ? saved : errno;
    if (fd >= 0)
        close(fd);
    if (ok && renameat(s->fd, aside, s->fd, path)) {
        ok = false;
        saved = errno;
    }
    if (ok) {
        int dir = openat(s->fd, folder, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
        ok = dir >= 0 && fsync(dir) == 0;
        saved = errno;
        if (dir >= 0)
            close(dir);
    } else if (fd >= 0)
        unlinkat(s->fd, aside, 0);
    errno = saved;
    return ok;
}

qie_status svc_store_put(svc_store *s, const void *bytes, size_t n, char name[QIE_HASH_HEX_MAX],
                         qie_error *err) {
    qie_hash *h;
    char path[80];
    struct stat info;
    QIE_TRY(qie_hash_create(QIE_HASH_SHA256, (int64_t)n, &h, err));
    qie_hash_update(h, bytes, n);
    qie_hash_final(h, name);
    qie_hash_destroy(h);
    path_of(name, path);
    pthread_mutex_lock(&s->lock);
    bool pinned = pin_locked(s, name);
    unsigned long serial = s->n_temporary++;
    bool there = fstatat(s->fd, path, &info, 0) == 0 && info.st_size == (off_t)n;
    pthread_mutex_unlock(&s->lock);
    QIE_FAIL_IF(!pinned, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    if (there || write_file(s, path, bytes, n, serial))
        return QIE_OK;
    int cause = errno;
    svc_store_unpin(s, name);
    return qie_fail(err, QIE_E_IO, "state-dir", "cannot write a picture below '%s': %s", s->dir,
                    strerror(cause));
}

void svc_store_remove(svc_store *s, const char *name) {
    char path[80];
    path_of(name, path);
    pthread_mutex_lock(&s->lock);
    if (!find_pin(s, name))
        unlinkat(s->fd, path, 0);
    pthread_mutex_unlock(&s->lock);
}

int svc_store_read(const svc_store *s, const char *name) {
    char path[80];
    path_of(name, path);
    return openat(s->fd, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}

static void sweep_folder(svc_store *s, const char *folder, bool (*wanted)(void *, const char *),
                         void *arg) {
    int fd = openat(s->fd, folder, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    struct dirent *e;
    while (d && (e = readdir(d)) != NULL) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (e->d_name[0] == '.' || !wanted(arg, e->d_name))
            unlinkat(dirfd(d), e->d_name, 0);
    }
    if (d)
        closedir(d);
    else if (fd >= 0)
        close(fd);
}

void svc_store_sweep(svc_store *s, bool (*wanted)(void *arg, const char *name), void *arg) {
    DIR *d = opendir(s->dir);
    struct dirent *e;
    while (d && (e = readdir(d)) != NULL)
        if (strlen(e->d_name) == 2 && e->d_name[0] != '.')
            sweep_folder(s, e->d_name, wanted, arg);
    if (d)
        closedir(d);
}
