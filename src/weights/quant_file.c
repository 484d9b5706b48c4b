#define _GNU_SOURCE
#include "weights/quant_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/parallel.h"
#include "weights/quant_rows.h"

enum {
    CHUNK_BYTES = 16 << 20,  /* of the result, converted before it is written */
    TASK_ELEMENTS = 1 << 17, /* a thread's share of a chunk */
    AHEAD_BYTES = 32 << 20,  /* of the source, asked for before it is needed */
};

struct qie_quant_file {
    char *path;
    const qie_quant_plan *plan;
    int fd, n_threads;
    unsigned char *chunk; /* CHUNK_BYTES, or one row if that is longer */
    size_t chunk_bytes;
    float *rows; /* max_k for each thread */
    float *scales;
    int64_t max_rows, bytes;
};

static qie_status io_fail(const qie_quant_file *f, const char *what, qie_error *err) {
    int e = errno;
    return qie_fail(err, QIE_E_IO, f->path, "cannot %s '%s': %s%s", what, f->path, strerror(e),
                    e == ENOSPC ? "; make room, then give the same command again" : "");
}

static qie_status write_at(const qie_quant_file *f, const void *data, size_t n, int64_t at,
                           qie_error *err) {
    const unsigned char *p = data;
    while (n) {
        ssize_t k = pwrite(f->fd, p, n, (off_t)at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k == 0)
            errno = EIO;
        if (k <= 0)
            return io_fail(f, "write", err);
        p += k;
        n -= (size_t)k;
        at += k;
    }
    return QIE_OK;
}

static qie_status take_room(qie_quant_file *f, size_t n_done, qie_error *err) {
    off_t size = (off_t)f->plan->layout.n_file;
    if (!n_done && ftruncate(f->fd, 0))
        return io_fail(f, "write", err);
    /* Without fallocate the file grows when it is written, and may meet a full disk later. */
    if (fallocate(f->fd, 0, 0, size) && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
        return io_fail(f, "make room for", err);
    if (ftruncate(f->fd, size))
        return io_fail(f, "write", err);
    return write_at(f, f->plan->layout.head, f->plan->layout.n_head, 0, err);
}

qie_status qie_quant_file_open(const char *path, const qie_quant_plan *plan, size_t n_done,
                               int n_threads, qie_quant_file **out, qie_error *err) {
    qie_status st = QIE_OK;
    *out = NULL;
    qie_quant_file *f = calloc(1, sizeof *f);
    QIE_FAIL_IF(!f, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    f->plan = plan;
    f->n_threads = n_threads > 0 ? n_threads : qie_cpu_count();
    f->fd = -1;
    f->path = strdup(path);
    f->chunk_bytes = CHUNK_BYTES > 4 * (size_t)plan->max_k ? CHUNK_BYTES : 4 * (size_t)plan->max_k;
    for (size_t i = 0; i < plan->n_tensors; i++)
        if (plan->tensors[i].n_dims && plan->tensors[i].shape[0] > f->max_rows)
            f->max_rows = plan->tensors[i].shape[0];
    f->chunk = malloc(f->chunk_bytes);
    f->rows = calloc((size_t)f->n_threads * ((size_t)plan->max_k + 1), sizeof *f->rows);
    f->scales = calloc((size_t)f->max_rows + 1, sizeof *f->scales);
    if (!f->path || !f->chunk || !f->rows || !f->scales) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    f->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    QIE_TRY_GOTO(f->fd < 0 ? io_fail(f, "write", err) : QIE_OK);
    QIE_TRY_GOTO(take_room(f, n_done, err));
    *out = f;
    return QIE_OK;
fail:
    qie_quant_file_close(f);
    return st;
}

void qie_quant_file_close(qie_quant_file *f) {
    if (!f)
        return;
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    free(f->chunk);
    free(f->rows);
    free(f->scales);
    free(f);
}

qie_status qie_quant_file_sync(qie_quant_file *f, qie_error *err) {
    return fdatasync(f->fd) ? io_fail(f, "write", err) : QIE_OK;
}

/* ---- a chunk of rows */

typedef struct chunk_job {
    const qie_quant_file *f;
    const qie_tensor *t;
    const float *importance;
    qie_dtype to;
    int64_t row0, n, k, task_rows;
    size_t row_bytes;     /* of the result */
    atomic_llong bad_row; /* the first that cannot be written; n rows: none */
} chunk_job;

static void load_row(const qie_tensor *t, int64_t row, int64_t k, float *x) {
    const unsigned char *p =
        (const unsigned char *)t->data + (size_t)row * qie_dtype_row_bytes(t->dtype, k);
    qie_to_f32(x, p, t->dtype, (size_t)k);
    if (t->scale) {
        float s = t->scale[t->n_scale > 1 ? row : 0];
        for (int64_t i = 0; i < k; i++)
            x[i] *= s;
    }
}

/* False when the values do not fit the type. */
static bool convert_row(const chunk_job *job, const float *x, int64_t row, unsigned char *to) {
    if (qie_quant_makes_blocks(job->to))
        return qie_quant_blocks(job->to, x, job->importance, job->k, to);
    if (job->to == QIE_I8 || job->to == QIE_F8_E4M3)
        return qie_quant_scaled(job->to, x, job->importance, job->k, to, &job->f->scales[row]);
    for (int64_t i = 0; i < job->k; i++) {
        qie_bf16 h = qie_f32_to_bf16(x[i]);
        memcpy(to + 2 * i, &h, 2);
    }
    return true;
}

static void chunk_task(void *arg, size_t index, int i_thread) {
    chunk_job *job = arg;
    float *x = job->f->rows + (size_t)i_thread * ((size_t)job->f->plan->max_k + 1);
    int64_t from = (int64_t)index * job->task_rows, to = from + job->task_rows;
    for (int64_t r = from; r < to && r < job->n; r++) {
        load_row(job->t, job->row0 + r, job->k, x);
        if (convert_row(job, x, job->row0 + r, job->f->chunk + (size_t)r * job->row_bytes))
            continue;
        long long seen = atomic_load(&job->bad_row);
        while (seen > r && !atomic_compare_exchange_weak(&job->bad_row, &seen, r))
            ;
    }
}

static qie_status stopped(qie_error *err) {
    return qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted; the same command goes on from here");
}

/* Bytes as they are. */
static qie_status copy_item(qie_quant_file *f, const qie_tensor *t, int64_t at,
                            qie_quant_step_fn step, void *arg, qie_error *err) {
    for (size_t done = 0, n; done < t->n_bytes; done += n) {
        n = t->n_bytes - done < CHUNK_BYTES ? t->n_bytes - done : CHUNK_BYTES;
        QIE_TRY(write_at(f, (const unsigned char *)t->data + done, n, at + (int64_t)done, err));
        f->bytes += (int64_t)n;
        if (!step(arg, f->bytes, t->name))
            return stopped(err);
    }
    return QIE_OK;
}

static qie_status convert_item(qie_quant_file *f, const qie_weights *w, const qie_quant_item *item,
                               const qie_layout_tensor *o, qie_quant_step_fn step, void *arg,
                               qie_error *err) {
    const qie_tensor *t = item->source;
    int64_t rows = t->n_dims ? t->shape[0] : 1, k = rows ? t->n_elements / rows : 0;
    if (!k)
        return QIE_OK;
    size_t in_bytes = t->n_bytes / (size_t)rows;
    chunk_job job = {.f = f, .t = t, .importance = item->importance, .to = o->dtype, .k = k};
    job.row_bytes = qie_dtype_row_bytes(o->dtype, k);
    job.task_rows = k >= TASK_ELEMENTS ? 1 : TASK_ELEMENTS / k;
    int64_t most = (int64_t)(f->chunk_bytes / job.row_bytes);
    for (; job.row0 < rows; job.row0 += job.n) {
        job.n = rows - job.row0 < most ? rows - job.row0 : most;
        const unsigned char *next =
            (const unsigned char *)t->data + in_bytes * (size_t)(job.row0 + job.n);
        size_t left = in_bytes * (size_t)(rows - job.row0 - job.n);
        qie_weights_prefetch(next, left < AHEAD_BYTES ? left : AHEAD_BYTES);
        atomic_store(&job.bad_row, job.n);
        qie_parallel_for(f->n_threads, (size_t)((job.n + job.task_rows - 1) / job.task_rows),
                         chunk_task, &job);
        long long bad = atomic_load(&job.bad_row);
        QIE_FAIL_IF(bad < job.n, QIE_E_CORRUPT, err, t->name,
                    "tensor '%s' in '%s' has a value in row %lld that is not finite or too large "
                    "for %s",
                    t->name, qie_weights_file_of(w, t), (long long)job.row0 + bad,
                    qie_dtype_name(o->dtype));
        QIE_TRY(write_at(f, f->chunk, job.row_bytes * (size_t)job.n,
                         o->offset + (int64_t)job.row_bytes * job.row0, err));
        f->bytes += (int64_t)in_bytes * job.n;
        if (!step(arg, f->bytes, t->name))
            return stopped(err);
    }
    return QIE_OK;
}

qie_status qie_quant_file_item(qie_quant_file *f, const qie_weights *w, size_t i,
                               qie_quant_step_fn step, void *arg, qie_error *err) {
    const qie_quant_item *item = &f->plan->items[i];
    const qie_layout_tensor *o = &f->plan->tensors[item->tensor];
    const qie_tensor *t = item->source;
    if (!t) {
        memset(f->chunk, 0, (size_t)o->n_bytes < f->chunk_bytes ? (size_t)o->n_bytes : 0);
        return write_at(f, f->chunk, (size_t)o->n_bytes, o->offset, err);
    }
    if (o->dtype == t->dtype && !t->scale)
        return copy_item(f, t, o->offset, step, arg, err);
    QIE_TRY(convert_item(f, w, item, o, step, arg, err));
    if (item->scale == QIE_QUANT_NO_SCALE)
        return QIE_OK;
    const qie_layout_tensor *s = &f->plan->tensors[item->scale];
    return write_at(f, f->scales, (size_t)s->n_bytes, s->offset, err);
}
