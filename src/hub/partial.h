/* A file that is being fetched: its bytes at their final places, and behind them a note of which
 * are there.
 *
 * The content is divided into segments of QIE_PARTIAL_SEGMENT bytes, each filled from its start;
 * the note holds one count per segment. So several connections fill one file, a kill at any moment
 * loses only what had not reached the kernel, and the note can never be separated from the bytes.
 * Bytes once noted are never written again: what has been hashed stays what it was. Not safe
 * against power loss, which is why the whole content is hashed before the file gets its name. One
 * writer at a time (a lock file sees to that). */
#ifndef QIE_HUB_PARTIAL_H
#define QIE_HUB_PARTIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

#define QIE_PARTIAL_SEGMENT ((int64_t)8 << 20)

typedef struct qie_partial {
    int fd; /* -1: closed */
    char *path;
    int64_t size;
    size_t n_segments;
    int64_t *done;   /* bytes present of each segment */
    size_t i_prefix; /* first segment that is not full */
} qie_partial;

/* Open or make `path` for a content of `size` bytes called `etag`. What is there is gone on with
 * when its note fits; anything else at that path is emptied. `older`: NULL, or the path of a plain
 * file whose bytes are the beginning of the content (huggingface_hub's ETAG.incomplete): taken over
 * by renaming when `path` is new. Errors: QIE_E_IO, QIE_E_NO_MEMORY. */
qie_status qie_partial_open(qie_partial *p, const char *path, const char *older, int64_t size,
                            const char *etag, qie_error *err);
/* Close; the file stays for the next time. */
void qie_partial_close(qie_partial *p);
/* n bytes for offset `at`, which must not lie beyond what its segment has. Bytes that are there are
 * skipped. Errors: QIE_E_IO with the remedy when the disk is full. */
qie_status qie_partial_write(qie_partial *p, int64_t at, const void *data, size_t n,
                             qie_error *err);
/* Bytes present from the start without a gap; in all. */
int64_t qie_partial_prefix(qie_partial *p);
int64_t qie_partial_total(const qie_partial *p);
/* Length of segment i. */
int64_t qie_partial_length(const qie_partial *p, size_t i);
/* Forget every byte. */
qie_status qie_partial_reset(qie_partial *p, const char *etag, qie_error *err);
/* Cut the note off, set the permissions, rename to `final_path`. Closes. */
qie_status qie_partial_finish(qie_partial *p, const char *final_path, unsigned mode,
                              qie_error *err);

#endif
