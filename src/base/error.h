/* How functions of this program report failure: they return a qie_status and, when asked, fill a
 * qie_error.
 *
 * The deepest function that knows the cause writes the message once with qie_fail(); upper ones add
 * where they were with qie_error_context() and never overwrite. `err` may always be NULL. */
#ifndef QIE_BASE_ERROR_H
#define QIE_BASE_ERROR_H

#include <stdarg.h>

#include "qie/error.h"

/* Write status, param (may be NULL) and the formatted message into err (may be NULL); returns
 * status. The message is cut at the buffer's size on a UTF-8 boundary and control bytes are
 * replaced by '?'. */
qie_status qie_fail(qie_error *err, qie_status status, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
qie_status qie_fail_v(qie_error *err, qie_status status, const char *param, const char *fmt,
                      va_list ap);
/* Append " (while <text>)" to an error already written. No effect when err is NULL or OK. */
void qie_error_context(qie_error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void qie_error_clear(qie_error *err);

/* Forward a failure of `call` to the caller. */
#define QIE_TRY(call)                    \
    do {                                 \
        qie_status try_status_ = (call); \
        if (try_status_ != QIE_OK)       \
            return try_status_;          \
    } while (0)

/* Forward a failure of `call` to the label `fail`, with the status in the local variable `st`. */
#define QIE_TRY_GOTO(call) \
    do {                   \
        st = (call);       \
        if (st != QIE_OK)  \
            goto fail;     \
    } while (0)

/* Create a failure when cond holds: QIE_FAIL_IF(n == 0, QIE_E_INVALID, err, "prompt", "is empty").
 */
#define QIE_FAIL_IF(cond, status, err, param, ...)                  \
    do {                                                            \
        if (cond)                                                   \
            return qie_fail((err), (status), (param), __VA_ARGS__); \
    } while (0)

#endif
