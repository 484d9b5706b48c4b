#define _GNU_SOURCE
#include "hub/partial.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

/* In front of the counts. Fixed size, compared as a whole: a note of another size, version or
 * content is none. */
typedef struct note_head {
    char magic[32];
    char etag[160];
    int64_t size, segment;
} note_head;

static int64_t note_at(int64_t size) {
    return (size + 4095) / 4096 * 4096;
}

static note_head head_for(int64_t size, const char *etag) {
    note_head h;
    memset(&h, 0, sizeof h);
    snprintf(h.magic, sizeof h.magic, "qwen-edit partial 1\n");
    snprintf(h.etag, sizeof h.etag, "%s", etag);
    h.size = size;
    h.segment = QIE_PARTIAL_SEGMENT;
    return h;
}

static bool read_all(int fd, void *buf, size_t n, int64_t at) {
    char *b = buf;
    while (n) {
        ssize_t k = pread(fd, b, n, at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        b += k;
        at += k;
        n -= (size_t)k;
    }
    return true;
}

static int write_all(int fd, const void *buf, size_t n, int64_t at) {
    const char *b = buf;
    while (n) {
        ssize_t k = pwrite(fd, b, n, at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return k < 0 ? errno : EIO;
        b += k;
        at += k;
        n -= (size_t)k;
    }
    return 0;
}

static qie_status write_fail(const qie_partial *p, int e, qie_error *err) {
    return qie_fail(err, QIE_E_IO, p->path, "cannot write '%s': %s%s", p->path, strerror(e),
                    e == ENOSPC || e == EDQUOT
                        ? "; what is there is kept: make room and type the same "
                          "command again"
                        : "");
}

int64_t qie_partial_length(const qie_partial *p, size_t i) {
    int64_t from = (int64_t)i * QIE_PARTIAL_SEGMENT, left = p->size - from;
    return left < QIE_PARTIAL_SEGMENT ? left : QIE_PARTIAL_SEGMENT;
}

/* The counts of a note that fits this content; false when there is none. */
static bool load(qie_partial *p, const char *etag) {
    note_head want = head_for(p->size, etag), have;
    int64_t at = note_at(p->size);
    struct stat st;
    if (fstat(p->fd, &st))
        return false;
    if (st.st_size == p->size &&
        p->size > 0) { /* killed between cutting the note off and renaming */
        for (size_t i = 0; i < p->n_segments; i++)
            p->done[i] = qie_partial_length(p, i);
        return true;
    }
    if (!read_all(p->fd, &have, sizeof have, at) || memcmp(&have, &want, sizeof have) ||
        !read_all(p->fd, p->done, p->n_segments * sizeof *p->done, at + (int64_t)sizeof have))
        return false;
    for (size_t i = 0; i < p->n_segments; i++)
        if (p->done[i] < 0 || p->done[i] > qie_partial_length(p, i))
            return false;
    return true;
}

static qie_status save(qie_partial *p, const char *etag, qie_error *err) {
    note_head h = head_for(p->size, etag);
    int64_t at = note_at(p->size);
    int e = write_all(p->fd, p->done, p->n_segments * sizeof *p->done, at + (int64_t)sizeof h);
    if (!e)
        e = write_all(p->fd, &h, sizeof h, at);
    return e ? write_fail(p, e, err) : QIE_OK;
}

qie_status qie_partial_reset(qie_partial *p, const char *etag, qie_error *err) {
    memset(p->done, 0, p->n_segments * sizeof *p->done);
    p->i_prefix = 0;
    if (ftruncate(p->fd, 0))
        return write_fail(p, errno, err);
    return save(p, etag, err);
}

static void take_prefix(qie_partial *p, int64_t n) {
    for (size_t i = 0; i < p->n_segments && n > 0; i++) {
        int64_t len = qie_partial_length(p, i);
        p->done[i] = n < len ? n : len;
        n -= p->done[i];
    }
}

qie_status qie_partial_open(qie_partial *p, const char *path, const char *older, int64_t size,
                            const char *etag, qie_error *err) {
    memset(p, 0, sizeof *p);
    p->fd = -1;
    p->size = size;
    p->n_segments = (size_t)((size + QIE_PARTIAL_SEGMENT - 1) / QIE_PARTIAL_SEGMENT);
    p->path = strdup(path);
    p->done = calloc(p->n_segments + 1, sizeof *p->done);
    if (!p->path || !p->done) {
        qie_partial_close(p);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    struct stat st;
    bool adopted = older && lstat(path, &st) && lstat(older, &st) == 0 && S_ISREG(st.st_mode) &&
                   st.st_size > 0 && st.st_size <= size && rename(older, path) == 0;
    p->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    qie_status result = QIE_OK;
    if (p->fd < 0)
        result = write_fail(p, errno, err);
    else if (adopted) {
        take_prefix(p, st.st_size);
        result = save(p, etag, err);
    } else if (!load(p, etag))
        result = qie_partial_reset(p, etag, err);
    if (result != QIE_OK)
        qie_partial_close(p);
    return result;
}

void qie_partial_close(qie_partial *p) {
    if (p->fd >= 0 && p->path)
        close(p->fd);
    free(p->path);
    free(p->done);
    memset(p, 0, sizeof *p);
    p->fd = -1;
}

qie_status qie_partial_write(qie_partial *p, int64_t at, const void *data, size_t n,
                             qie_error *err) {
    const char *b = data;
    while (n) {
        size_t i = (size_t)(at / QIE_PARTIAL_SEGMENT);
        if (at < 0 || i >= p->n_segments)
            return qie_fail(err, QIE_E_INTERNAL, p->path, "bytes beyond the end of '%s'", p->path);
        int64_t from = (int64_t)i * QIE_PARTIAL_SEGMENT, len = qie_partial_length(p, i);
        int64_t have = from + p->done[i], end = from + len;
        size_t take = (int64_t)n < end - at ? n : (size_t)(end - at);
        if (at > have)
            return qie_fail(err, QIE_E_INTERNAL, p->path, "a gap in '%s'", p->path);
        if (at + (int64_t)take > have) {
            size_t skip = (size_t)(have - at);
            int e = write_all(p->fd, b + skip, take - skip, have);
            int64_t count = p->done[i] + (int64_t)(take - skip);
            if (!e)
                e = write_all(p->fd, &count, sizeof count,
                              note_at(p->size) + (int64_t)sizeof(note_head) +
                                  (int64_t)(i * sizeof count));
            if (e)
                return write_fail(p, e, err);
            p->done[i] = count;
        }
        b += take;
        at += (int64_t)take;
        n -= take;
    }
    return QIE_OK;
}

int64_t qie_partial_prefix(qie_partial *p) {
    while (p->i_prefix < p->n_segments &&
           p->done[p->i_prefix] == qie_partial_length(p, p->i_prefix))
        p->i_prefix++;
    return p->i_prefix == p->n_segments
               ? p->size
               : (int64_t)p->i_prefix * QIE_PARTIAL_SEGMENT + p->done[p->i_prefix];
}

int64_t qie_partial_total(const qie_partial *p) {
    int64_t sum = 0;
    for (size_t i = 0; i < p->n_segments; i++)
        sum += p->done[i];
    return sum;
}

qie_status qie_partial_finish(qie_partial *p, const char *final_path, unsigned mode,
                              qie_error *err) {
    qie_status st = QIE_OK;
    if (ftruncate(p->fd, p->size) || fchmod(p->fd, (mode_t)mode))
        st = write_fail(p, errno, err);
    else if (rename(p->path, final_path))
        st = qie_fail(err, QIE_E_IO, final_path, "cannot name '%s' '%s': %s", p->path, final_path,
                      strerror(errno));
    qie_partial_close(p);
    return st;
}
