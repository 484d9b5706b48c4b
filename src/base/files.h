/* The files of a model, read-only, by relative name: from a folder (mapped) or from the program
 * itself.
 *
 * Everything above (configs, tokenizer, weights) reads through this, so the embedded demo model
 * takes the same path as a downloaded one. Views live until qie_files_close. */
#ifndef QIE_BASE_FILES_H
#define QIE_BASE_FILES_H

#include <stdbool.h>
#include <stddef.h>

#include "qie/error.h"

typedef struct qie_files qie_files;

/* One file inside the program. `end` is one past the last byte. */
typedef struct qie_builtin_file {
    const char *name;
    const unsigned char *data, *end;
} qie_builtin_file;

/* A folder on disk. Errors: QIE_E_NOT_FOUND. */
qie_status qie_files_open_dir(const char *dir, qie_files **out, qie_error *err);
/* A table ended by a NULL name; it must outlive the object. `label` names it in messages. */
qie_status qie_files_open_builtin(const qie_builtin_file *table, const char *label, qie_files **out,
                                  qie_error *err);
/* No files but those that qie_files_put will add. */
qie_status qie_files_open_empty(const char *label, qie_files **out, qie_error *err);
void qie_files_close(qie_files *f);
/* A file made by this program, taken instead of one of the same name; data is copied. */
qie_status qie_files_put(qie_files *f, const char *name, const void *data, size_t n,
                         qie_error *err);
/* The folder's path or the label. */
const char *qie_files_label(const qie_files *f);
bool qie_files_exists(const qie_files *f, const char *name);
/* Content of the file `name` ("vae/config.json"); mapped once, the same view again later. Names
 * that leave the folder (absolute, "..") are refused with QIE_E_CORRUPT. Not thread-safe. Errors:
 * QIE_E_NOT_FOUND, QIE_E_IO. */
qie_status qie_files_get(qie_files *f, const char *name, const unsigned char **data, size_t *n,
                         qie_error *err);

/* Take the files that are mapped out of memory as far as that needs no rights: our pages are let go
 * and the page cache is asked to. What another process maps stays. Nothing for files inside the
 * program. */
void qie_files_drop_pages(const qie_files *f);
/* Let our own pages of the mapped files go; the page cache keeps them. For work that passes over a
 * large file once. */
void qie_files_let_go(const qie_files *f);
/* Share (0..1) of the mapped bytes that lie in memory; 1 for files inside the program. */
double qie_files_resident_share(const qie_files *f);

#endif
