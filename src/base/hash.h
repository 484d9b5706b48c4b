/* Hashes of files, fed piece by piece: sha256 (large files of a hub) and git's blob sha1 (small
 * ones). */
#ifndef QIE_BASE_HASH_H
#define QIE_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

typedef enum qie_hash_kind {
    QIE_HASH_NONE = 0, /* nothing to compare with */
    QIE_HASH_SHA256,
    QIE_HASH_GIT_SHA1 /* sha1 of "blob <size>\0" and the content */
} qie_hash_kind;

#define QIE_HASH_HEX_MAX 65 /* with the NUL */

typedef struct qie_hash qie_hash;

/* `size` is the content's length, which git's form hashes first. Errors: QIE_E_NO_MEMORY,
 * QIE_E_INTERNAL. */
qie_status qie_hash_create(qie_hash_kind kind, int64_t size, qie_hash **out, qie_error *err);
void qie_hash_destroy(qie_hash *h);
void qie_hash_update(qie_hash *h, const void *data, size_t n);
/* Lower-case hex text of what was fed; the object is of no further use but to be destroyed. */
void qie_hash_final(qie_hash *h, char hex[QIE_HASH_HEX_MAX]);

/* Kind that a hex text of this length is of: 64 digits sha256, 40 git sha1, anything else none. */
qie_hash_kind qie_hash_kind_of(const char *hex);

/* sha1 of n bytes as hex: for names made from texts. */
void qie_sha1_hex(const void *data, size_t n, char hex[QIE_HASH_HEX_MAX]);

#endif
