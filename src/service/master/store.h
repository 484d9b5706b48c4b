/* Pictures on disk, named by the sha256 of their content: files/ab/<hash>. A file that is there is
 * whole: it was written aside, synced and renamed. What is used by a request that has no row yet is
 * pinned, so that the removal of an old job cannot take it away. */
#ifndef QIE_SERVICE_STORE_H
#define QIE_SERVICE_STORE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/hash.h"
#include "qie/error.h"

typedef struct svc_store svc_store;

qie_status svc_store_open(const char *state_dir, svc_store **out, qie_error *err);
void svc_store_close(svc_store *s);
/* Keep the bytes, durable on return, and pin them. From any thread. Errors: QIE_E_IO. */
qie_status svc_store_put(svc_store *s, const void *bytes, size_t n, char name[QIE_HASH_HEX_MAX],
                         qie_error *err);
void svc_store_unpin(svc_store *s, const char *name);
/* Remove unless pinned. */
void svc_store_remove(svc_store *s, const char *name);
/* Open for reading; -1 when it is not there. */
int svc_store_read(const svc_store *s, const char *name);
/* Every file for which `wanted` says no is removed (left by a crash between file and row). */
void svc_store_sweep(svc_store *s, bool (*wanted)(void *arg, const char *name), void *arg);

#endif
