#define _GNU_SOURCE
#include "base/files.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fs.h"

typedef struct entry {
    char *name;
    qie_map map;
    unsigned char *made; /* instead of a mapping: bytes that were put here */
    struct entry *next;
} entry;

struct qie_files {
    char *label;                     /* folder, or what the table is called */
    const qie_builtin_file *builtin; /* NULL: a folder */
    entry *mapped;
};

static qie_status create(const char *label, qie_files **out, qie_error *err) {
    qie_files *f = calloc(1, sizeof *f);
    *out = NULL;
    if (f)
        f->label = strdup(label);
    if (!f || !f->label) {
        free(f);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    *out = f;
    return QIE_OK;
}

qie_status qie_files_open_dir(const char *dir, qie_files **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(!qie_dir_exists(dir), QIE_E_NOT_FOUND, err, "model",
                qie_file_exists(dir) ? "'%s' is a file, a model folder is needed"
                                     : "model folder '%s' does not exist",
                dir);
    return create(dir, out, err);
}

qie_status qie_files_open_builtin(const qie_builtin_file *table, const char *label, qie_files **out,
                                  qie_error *err) {
    QIE_TRY(create(label, out, err));
    (*out)->builtin = table;
    return QIE_OK;
}

qie_status qie_files_open_empty(const char *label, qie_files **out, qie_error *err) {
    static const qie_builtin_file NOTHING[] = {{NULL, NULL, NULL}};
    return qie_files_open_builtin(NOTHING, label, out, err);
}

qie_status qie_files_put(qie_files *f, const char *name, const void *data, size_t n,
                         qie_error *err) {
    entry *e = calloc(1, sizeof *e);
    if (e) {
        e->name = strdup(name);
        e->made = malloc(n + 1);
    }
    if (!e || !e->name || !e->made) {
        if (e)
            free(e->name);
        free(e);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    memcpy(e->made, data, n);
    e->map = (qie_map){e->made, n};
    e->next = f->mapped; /* before an older one of the same name */
    f->mapped = e;
    return QIE_OK;
}

void qie_files_close(qie_files *f) {
    if (!f)
        return;
    while (f->mapped) {
        entry *e = f->mapped;
        f->mapped = e->next;
        if (e->made)
            free(e->made);
        else
            qie_map_close(&e->map);
        free(e->name);
        free(e);
    }
    free(f->label);
    free(f);
}

const char *qie_files_label(const qie_files *f) {
    return f->label;
}

static bool name_is_safe(const char *name) {
    if (!*name || *name == '/')
        return false;
    for (const char *p = name; *p;) {
        size_t n = strcspn(p, "/");
        if (n == 0 || (n == 2 && p[0] == '.' && p[1] == '.') || (n == 1 && p[0] == '.'))
            return false;
        p += n + (p[n] == '/');
    }
    return true;
}

static const entry *find_entry(const qie_files *f, const char *name) {
    for (const entry *e = f->mapped; e; e = e->next)
        if (!strcmp(e->name, name))
            return e;
    return NULL;
}

bool qie_files_exists(const qie_files *f, const char *name) {
    if (!name_is_safe(name))
        return false;
    if (find_entry(f, name))
        return true;
    for (const qie_builtin_file *b = f->builtin; b && b->name; b++)
        if (!strcmp(b->name, name))
            return true;
    if (f->builtin)
        return false;
    char *path = qie_path_join(f->label, name);
    bool ok = path && qie_file_exists(path);
    free(path);
    return ok;
}

qie_status qie_files_get(qie_files *f, const char *name, const unsigned char **data, size_t *n,
                         qie_error *err) {
    static const unsigned char nothing[1];
    *data = NULL;
    *n = 0;
    QIE_FAIL_IF(!name_is_safe(name), QIE_E_CORRUPT, err, name,
                "file name '%s' leaves the model folder", name);
    const entry *have = find_entry(f, name);
    if (have) {
        *data = have->map.data ? have->map.data : nothing;
        *n = have->map.size;
        return QIE_OK;
    }
    if (f->builtin) {
        for (const qie_builtin_file *b = f->builtin; b->name; b++)
            if (!strcmp(b->name, name)) {
                *data = b->data;
                *n = (size_t)(b->end - b->data);
                return QIE_OK;
            }
        return qie_fail(err, QIE_E_NOT_FOUND, name, "%s has no file '%s'", f->label, name);
    }
    entry *e = calloc(1, sizeof *e);
    char *path = qie_path_join(f->label, name);
    qie_status st = QIE_OK;
    if (e)
        e->name = strdup(name);
    if (!e || !path || !e->name) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    QIE_TRY_GOTO(qie_map_open(path, &e->map, err));
    e->next = f->mapped;
    f->mapped = e;
    *data = e->map.data ? e->map.data : nothing;
    *n = e->map.size;
    free(path);
    return QIE_OK;
fail:
    if (e)
        free(e->name);
    free(e);
    free(path);
    return st;
}

void qie_files_drop_pages(const qie_files *f) {
    for (const entry *e = f->mapped; e; e = e->next) {
        if (!e->map.data || e->made)
            continue;
        char *path = qie_path_join(f->label, e->name);
        int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        /* First our own use of the pages: the cache keeps what is mapped somewhere. */
        (void)madvise((void *)(uintptr_t)e->map.data, e->map.size, MADV_DONTNEED);
        if (fd >= 0) {
            (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            close(fd);
        }
        free(path);
    }
}

void qie_files_let_go(const qie_files *f) {
    for (const entry *e = f->mapped; e; e = e->next)
        if (e->map.data && !e->made)
            (void)madvise((void *)(uintptr_t)e->map.data, e->map.size, MADV_DONTNEED);
}

double qie_files_resident_share(const qie_files *f) {
    enum { PAGES = 4096 }; /* asked about at once */
    size_t page = (size_t)sysconf(_SC_PAGESIZE), there = 0, all = 0;
    unsigned char seen[PAGES];
    for (const entry *e = f->mapped; e; e = e->next)
        for (size_t at = 0; e->map.data && at < e->map.size; at += PAGES * page) {
            size_t n = e->map.size - at < PAGES * page ? e->map.size - at : PAGES * page;
            size_t n_pages = (n + page - 1) / page;
            if (mincore((void *)(uintptr_t)(e->map.data + at), n, seen))
                continue;
            for (size_t i = 0; i < n_pages; i++)
                there += seen[i] & 1;
            all += n_pages;
        }
    return all ? (double)there / (double)all : 1;
}
