/* Status codes and the error object shared by the whole program.
 *
 * One list makes the enum, the name, the process exit code and the HTTP status, so that the shell,
 * the service and docs/ERRORS.md cannot disagree. Whose fault decides the category: what a request
 * carries is INVALID, UNSUPPORTED or TOO_LARGE; CORRUPT, IO and NETWORK are about our own model,
 * state and hub. */
#ifndef QIE_ERROR_H
#define QIE_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* X(name, exit code, HTTP status, one line for people) */
#define QIE_STATUS_MAP(X)                                                       \
    X(OK, 0, 200, "success")                                                    \
    X(USAGE, 2, 400, "unknown flag or command")                                 \
    X(SYNTAX, 2, 400, "malformed JSON or multipart")                            \
    X(INVALID, 2, 422, "a value is missing, of the wrong type or out of range") \
    X(DENIED, 1, 401, "key missing or wrong")                                   \
    X(NOT_FOUND, 3, 404, "no such model, file or job")                          \
    X(CONFLICT, 3, 409, "not possible in this state")                           \
    X(GONE, 3, 410, "result expired")                                           \
    X(TOO_LARGE, 2, 413, "body, picture or plan above the limit")               \
    X(UNSUPPORTED, 2, 415, "format not supported")                              \
    X(BUSY, 4, 429, "queue full")                                               \
    X(UNAVAILABLE, 4, 503, "loading, or worker down")                           \
    X(NO_MEMORY, 5, 503, "the plan does not fit into the free memory")          \
    X(CORRUPT, 6, 500, "damaged model or state file")                           \
    X(IO, 6, 500, "file system")                                                \
    X(NETWORK, 6, 502, "hub or peer unreachable")                               \
    X(UNHEALTHY, 7, 500, "doctor found a failure")                              \
    X(CANCELLED, 130, 409, "cancelled or interrupted")                          \
    X(TIMEOUT, 124, 504, "time limit reached")                                  \
    X(INTERNAL, 1, 500, "broken invariant of the program")

typedef enum qie_status {
#define X(name, exit_code, http, text) QIE_E_##name,
    QIE_STATUS_MAP(X)
#undef X
        QIE_E_COUNT
} qie_status;
#define QIE_OK QIE_E_OK

/* What went wrong, for people. Plain data: copy it freely; nothing to release.
 * `message` is lower case, cause first, without a full stop; `param` names the request field, flag
 * or file at fault ("" if none). */
typedef struct qie_error {
    qie_status status;
    char param[64];
    char message[960];
} qie_error;

/* "INVALID" for QIE_E_INVALID; never NULL. */
const char *qie_status_name(qie_status status);
/* One line for people; never NULL. */
const char *qie_status_text(qie_status status);
/* Exit code of the process for this status (0 for OK). */
int qie_status_exit_code(qie_status status);
/* HTTP status code for this status (200 for OK). */
int qie_status_http(qie_status status);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
