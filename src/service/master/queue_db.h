/* The queue's file: one SQLite database in WAL mode. All writes go through one thread that commits
 * what has gathered in one transaction (synced when the batch accepts or finishes a job); reads
 * happen in the loop on a second connection. A write is told done only after its commit. */
#ifndef QIE_SERVICE_QUEUE_DB_H
#define QIE_SERVICE_QUEUE_DB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"
#include "service/common/job.h"
#include "service/master/store.h"
#include "service/master/tasks.h"

typedef enum svc_status {
    SVC_QUEUED = 0,
    SVC_RUNNING,
    SVC_COMPLETED,
    SVC_FAILED,
    SVC_CANCELLED,
    SVC_EXPIRED
} svc_status;
const char *svc_status_name(svc_status s);
/* -1 when there is none of that name. */
int svc_status_find(const char *name);

/* One job as the file holds it. Strings owned; NULL for none. */
typedef struct svc_row {
    int64_t seq;
    char id[SVC_ID_BYTES];
    char *client, *idempotency_key, *fingerprint; /* hash of the request behind the key */
    char *prompt, *negative, *params;             /* params: JSON */
    char *inputs;                                 /* JSON array of names in the store */
    char *response;                               /* JSON: how the answer is wanted */
    char *result, *error;                         /* JSON */
    svc_status status;
    int priority, attempts;
    double created, started, finished; /* seconds since 1970, 0 for none */
} svc_row;
void svc_row_release(svc_row *row);

typedef struct svc_db svc_db;

/* Open or create, check, put running jobs back into the queue. Of a damaged file what can be read
 * is carried over (svc_db_note tells). Errors: QIE_E_CORRUPT (no database, another program's,
 * newer), QIE_E_IO. */
qie_status svc_db_open(const char *path, svc_store *store, svc_done *done, svc_db **out,
                       qie_error *err);
/* Commits what waits and ends the writer; later writes fail. */
void svc_db_stop(svc_db *db);
void svc_db_close(svc_db *db);
/* What was found at the opening that somebody should know; NULL: nothing. */
const char *svc_db_note(const svc_db *db);
/* How often this file has been opened: makes event numbers grow over restarts. */
int64_t svc_db_generation(const svc_db *db);

typedef enum svc_write_kind {
    SVC_WRITE_INSERT = 0,
    SVC_WRITE_START,   /* running */
    SVC_WRITE_REQUEUE, /* queued again, with attempts */
    SVC_WRITE_FINISH,  /* completed, failed or cancelled, with result or error */
    SVC_WRITE_EXPIRE,  /* finished before `before`: files removed; twice as old: row removed. Some
                          at a time: `more` says that there are others */
    SVC_WRITE_DELETE   /* row and files removed */
} svc_write_kind;

/* One change. `task.done` is called in the loop with `status` and `error` set. Fields are read
 * until then and stay the caller's. */
typedef struct svc_write {
    svc_task task; /* first */
    svc_write_kind kind;
    svc_row row;
    double before;
    bool more;
    qie_status status;
    qie_error error;
} svc_write;
void svc_db_write(svc_db *db, svc_write *w);

/* Reads; false when there is none. */
bool svc_db_find(svc_db *db, const char *id, svc_row *out);
bool svc_db_find_key(svc_db *db, const char *client, const char *key, svc_row *out);
/* Rows in order of acceptance, for recovery: status queued; false from fn stops. */
bool svc_db_each_queued(svc_db *db, bool (*fn)(void *arg, const svc_row *row), void *arg);
/* A client's rows (NULL: everybody's), newest first, older than `after` (0: from the newest). */
bool svc_db_each(svc_db *db, const char *client, int status, int64_t after, int limit,
                 bool (*fn)(void *arg, const svc_row *row), void *arg);

#endif
