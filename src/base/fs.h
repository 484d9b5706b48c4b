/* Files: read whole, map read-only, and write so that a reader sees the old content or the new,
 * never a part. */
#ifndef QIE_BASE_FS_H
#define QIE_BASE_FS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

/* Whole file into a new buffer with a NUL behind it (free with free()). Files above max_bytes are
 * refused with QIE_E_TOO_LARGE before they are read. Errors: QIE_E_NOT_FOUND, QIE_E_IO. */
qie_status qie_file_read(const char *path, size_t max_bytes, unsigned char **out, size_t *n,
                         qie_error *err);
bool qie_file_exists(const char *path);
bool qie_dir_exists(const char *path);
/* New string "dir/name" (free()); NULL when out of memory. */
char *qie_path_join(const char *dir, const char *name);

typedef struct qie_map {
    const unsigned char *data; /* NULL when the file is empty */
    size_t size;
} qie_map;
/* Map a regular file read-only, shared. The descriptor is closed; release with qie_map_close. A
 * file that another program truncates while it is mapped raises SIGBUS, as for every mapping. */
qie_status qie_map_open(const char *path, qie_map *out, qie_error *err);
void qie_map_close(qie_map *m);

/* Write to a temporary file beside `path`, fsync, rename over it. Nothing is left behind on
 * failure, and an existing file keeps its content. Symbolic links are followed. Errors: QIE_E_IO
 * naming the path and cause. */
qie_status qie_file_write_atomic(const char *path, const void *data, size_t n, qie_error *err);
/* The same for the notes of a cache: a process that is killed leaves nothing behind either (where
 * the file system has files without a name), except `path`.qwen-edit.tmp for an instant, which the
 * next writer takes away. Several processes may write the same note; links are not followed, and
 * nothing waits for the disk. */
qie_status qie_file_write_note(const char *path, const void *data, size_t n, qie_error *err);
/* Fails early when `path` could not be written: folder missing or not writable, path is a folder.
 */
qie_status qie_file_check_writable(const char *path, qie_error *err);
/* Remove the temporary files that writes in progress have made; async-signal-safe, for handlers. */
void qie_file_remove_partial(void);
/* All of it at the descriptor's place; 0 or an errno. */
int qie_write_all(int fd, const void *data, size_t n);
/* `text` as one word of a shell's command line, in quotes; "''" where it does not fit. */
void qie_shell_word(const char *text, char *out, size_t cap);
/* mkdir -p. */
qie_status qie_mkdirs(const char *path, qie_error *err);

#endif
