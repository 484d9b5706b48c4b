/* JSON behind a small interface (jansson inside json.c): parse with limits, read fields with type
 * checks.
 *
 * A qie_json is a borrowed view into its document unless said otherwise. Readers come in two kinds:
 * `qie_json_get_*` returns a default when the key is absent and an error naming the key when its
 * type is wrong; `qie_json_need_*` also fails when it is absent. JSON null counts as absent. */
#ifndef QIE_BASE_JSON_H
#define QIE_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

typedef struct json_t qie_json;

/* Parse n bytes of UTF-8 (whole text, duplicates of a key refused, depth limited by the library).
 * The root may be of any type. Free with qie_json_free. Errors: QIE_E_SYNTAX with line and column;
 * `what` names the text in the message. */
qie_status qie_json_parse(const char *text, size_t n, const char *what, qie_json **out,
                          qie_error *err);
/* Parse a file of at most max_bytes. A broken file is QIE_E_CORRUPT. */
qie_status qie_json_parse_file(const char *path, size_t max_bytes, qie_json **out, qie_error *err);
void qie_json_free(qie_json *root);

bool qie_json_is_object(const qie_json *v);
bool qie_json_is_array(const qie_json *v);
bool qie_json_is_string(const qie_json *v);
bool qie_json_is_number(const qie_json *v);
bool qie_json_is_integer(const qie_json *v);
bool qie_json_is_bool(const qie_json *v);
/* Member of an object; NULL if absent, null, or v no object. */
qie_json *qie_json_member(const qie_json *v, const char *key);
size_t qie_json_size(const qie_json *array_or_object);
qie_json *qie_json_at(const qie_json *array, size_t i);
/* Text of a string (borrowed, UTF-8; *n its bytes, which may contain NUL); NULL if v is no string.
 */
const char *qie_json_string(const qie_json *v, size_t *n);
double qie_json_number(const qie_json *v);
int64_t qie_json_integer(const qie_json *v);
bool qie_json_bool(const qie_json *v);

/* Walk the members in file order: returns false when fn stopped the walk by returning false. */
typedef bool (*qie_json_member_fn)(void *arg, const char *key, qie_json *value);
bool qie_json_each(const qie_json *object, qie_json_member_fn fn, void *arg);

qie_status qie_json_get_int(const qie_json *obj, const char *key, int64_t def, int64_t min,
                            int64_t max, int64_t *out, qie_error *err);
qie_status qie_json_need_int(const qie_json *obj, const char *key, int64_t min, int64_t max,
                             int64_t *out, qie_error *err);
qie_status qie_json_get_double(const qie_json *obj, const char *key, double def, double *out,
                               qie_error *err);
qie_status qie_json_get_bool(const qie_json *obj, const char *key, bool def, bool *out,
                             qie_error *err);
/* *out borrowed; def when absent. */
qie_status qie_json_get_string(const qie_json *obj, const char *key, const char *def,
                               const char **out, qie_error *err);

/* Building. Objects take over the values given to them. NULL results mean out of memory; adding a
 * NULL value to an object or array is a no-op that returns false. */
qie_json *qie_json_new_object(void);
qie_json *qie_json_new_array(void);
qie_json *qie_json_new_string(const char *utf8);
qie_json *qie_json_new_int(int64_t v);
qie_json *qie_json_new_double(double v); /* non-finite numbers become null */
qie_json *qie_json_new_bool(bool v);
qie_json *qie_json_new_null(void);
bool qie_json_put(qie_json *obj, const char *key, qie_json *value);
bool qie_json_push(qie_json *array, qie_json *value);
/* Compact UTF-8 text (indent 0) or indented; new string, free with free(). Keys stay in insertion
 * order. */
char *qie_json_text(const qie_json *v, int indent);

#endif
