#define _GNU_SOURCE
#include "service/master/queue_db.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"

#define APPLICATION_ID 1364542788 /* "QUED" */
#define SCHEMA_VERSION 1
#define MAX_BATCH 256
#define PAGE_BYTES 4096 /* SQLite's default */
#define CACHED_PAGES 32 /* of each connection: enough for a busy queue, and full within minutes */
#define WRITABLE (SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE)
#define TEXT_OF_(x) #x
#define TEXT_OF(x) TEXT_OF_(x)

#define COLUMNS                                                                                \
    "seq,id,client,idempotency_key,fingerprint,prompt,negative,params,inputs,response,result," \
    "error,"                                                                                   \
    "status,priority,attempts,created,started,finished"
#define N_COLUMNS 18

static const char *const STATUS_NAMES[] = {"queued", "running",   "completed",
                                           "failed", "cancelled", "expired"};

const char *svc_status_name(svc_status s) {
    return (unsigned)s < 6 ? STATUS_NAMES[s] : "?";
}

int svc_status_find(const char *name) {
    for (int i = 0; i < 6; i++)
        if (!strcmp(name, STATUS_NAMES[i]))
            return i;
    return -1;
}

void svc_row_release(svc_row *r) {
    free(r->client);
    free(r->idempotency_key);
    free(r->fingerprint);
    free(r->prompt);
    free(r->negative);
    free(r->params);
    free(r->inputs);
    free(r->response);
    free(r->result);
    free(r->error);
    memset(r, 0, sizeof *r);
}

typedef enum statement {
    S_BEGIN,
    S_COMMIT,
    S_INSERT,
    S_INPUTS, /* file references of a row */
    S_START,
    S_REQUEUE,
    S_FINISH,
    S_OUTPUTS,
    S_OLD,     /* finished before */
    S_OLDER,   /* expired long ago */
    S_EXPIRED, /* mark */
    S_DELETE,
    S_FILES,
    S_UNREFER,
    S_REFERRED,
    S_COUNT
} statement;

/* Of the loop, on a connection of its own: never behind a commit. */
typedef enum reading { R_ID, R_KEY, R_QUEUED, R_LIST, R_COUNT } reading;

static const char *const SQL[S_COUNT] = {
    [S_BEGIN] = "BEGIN IMMEDIATE",
    [S_COMMIT] = "COMMIT",
    [S_INSERT] =
        "INSERT INTO jobs(id,client,idempotency_key,fingerprint,prompt,negative,params,inputs,"
        "response,status,priority,created) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
    [S_INPUTS] = "INSERT INTO files(job,name) SELECT ?1,value FROM json_each(?2)",
    [S_START] = "UPDATE jobs SET status=1,started=?2 WHERE id=?1 AND status=0",
    [S_REQUEUE] = "UPDATE jobs SET status=0,attempts=?2 WHERE id=?1 AND status<2",
    [S_FINISH] = "UPDATE jobs SET status=?2,result=?3,error=?4,finished=?5,attempts=?6 "
                 "WHERE id=?1 AND status<2",
    [S_OUTPUTS] = "INSERT INTO files(job,name) SELECT ?1,json_extract(value,'$.file') "
                  "FROM json_each(?2,'$.files')",
    [S_OLD] = "SELECT id FROM jobs WHERE status BETWEEN 2 AND 4 AND finished<?1 LIMIT 200",
    [S_OLDER] = "SELECT id FROM jobs WHERE status=5 AND finished<?1 LIMIT 200",
    [S_EXPIRED] = "UPDATE jobs SET status=5,prompt='',negative='',result=NULL WHERE id=?1",
    [S_DELETE] = "DELETE FROM jobs WHERE id=?1",
    [S_FILES] = "SELECT DISTINCT name FROM files WHERE job=?1",
    [S_UNREFER] = "DELETE FROM files WHERE job=?1",
    [S_REFERRED] = "SELECT 1 FROM files WHERE name=?1 LIMIT 1",
};

static const char *const READ_SQL[R_COUNT] = {
    [R_ID] = "SELECT " COLUMNS " FROM jobs WHERE id=?1",
    [R_KEY] = "SELECT " COLUMNS " FROM jobs WHERE client=?1 AND idempotency_key=?2",
    [R_QUEUED] = "SELECT " COLUMNS " FROM jobs WHERE status=0 ORDER BY seq",
    [R_LIST] = "SELECT " COLUMNS " FROM jobs WHERE (?1 IS NULL OR client=?1) AND "
               "(?2<0 OR status=?2) AND (?3=0 OR seq<?3) ORDER BY seq DESC LIMIT ?4",
};

struct svc_db {
    sqlite3 *writer, *reader;
    sqlite3_stmt *s[S_COUNT], *r[R_COUNT];
    void *pages; /* of both connections' caches */
    svc_store *store;
    svc_done *done;
    int64_t generation;
    char note[800]; /* what the opening found */
    pthread_t thread;
    bool has_thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    svc_task *first, **last;
    bool quit;
    /* names that may be removed after the commit */
    char (*doomed)[QIE_HASH_HEX_MAX];
    size_t n_doomed, cap_doomed;
};

static qie_status sql_fail(sqlite3 *c, const char *what, qie_error *err) {
    int code = sqlite3_errcode(c);
    qie_status st = code == SQLITE_CORRUPT || code == SQLITE_NOTADB ? QIE_E_CORRUPT : QIE_E_IO;
    return qie_fail(err, st, "state-dir", "the queue's file: %s: %s", what, sqlite3_errmsg(c));
}

static qie_status sql_run(sqlite3 *c, const char *sql, qie_error *err) {
    return sqlite3_exec(c, sql, NULL, NULL, NULL) == SQLITE_OK ? QIE_OK
                                                               : sql_fail(c, "cannot write", err);
}

static int64_t sql_number(sqlite3 *c, const char *sql, int64_t def) {
    sqlite3_stmt *s = NULL;
    int64_t v = def;
    if (sqlite3_prepare_v2(c, sql, -1, &s, NULL) == SQLITE_OK && sqlite3_step(s) == SQLITE_ROW)
        v = sqlite3_column_int64(s, 0);
    sqlite3_finalize(s);
    return v;
}

/* ---------------------------------------------------------------- writing */

static void bind_text(sqlite3_stmt *s, int i, const char *text) {
    if (text)
        sqlite3_bind_text(s, i, text, -1, SQLITE_STATIC);
    else
        sqlite3_bind_null(s, i);
}

/* A statement that is not reset keeps its view of the file, and the log from being emptied. */
static void done_with(sqlite3_stmt *s) {
    sqlite3_reset(s);
    sqlite3_clear_bindings(s);
}

static bool step(sqlite3_stmt *s) {
    int rc = sqlite3_step(s);
    done_with(s);
    return rc == SQLITE_DONE || rc == SQLITE_ROW;
}

static bool insert(svc_db *db, const svc_row *r) {
    sqlite3_stmt *s = db->s[S_INSERT];
    bind_text(s, 1, r->id);
    bind_text(s, 2, r->client);
    bind_text(s, 3, r->idempotency_key);
    bind_text(s, 4, r->fingerprint);
    bind_text(s, 5, r->prompt);
    bind_text(s, 6, r->negative);
    bind_text(s, 7, r->params);
    bind_text(s, 8, r->inputs);
    bind_text(s, 9, r->response);
    sqlite3_bind_int(s, 10, (int)r->status);
    sqlite3_bind_int(s, 11, r->priority);
    sqlite3_bind_double(s, 12, r->created);
    if (!step(s))
        return false;
    s = db->s[S_INPUTS];
    bind_text(s, 1, r->id);
    bind_text(s, 2, r->inputs);
    return step(s);
}

static bool finish(svc_db *db, const svc_row *r) {
    sqlite3_stmt *s = db->s[S_FINISH];
    bind_text(s, 1, r->id);
    sqlite3_bind_int(s, 2, (int)r->status);
    bind_text(s, 3, r->result);
    bind_text(s, 4, r->error);
    sqlite3_bind_double(s, 5, r->finished);
    sqlite3_bind_int(s, 6, r->attempts);
    if (!step(s))
        return false;
    if (!r->result || sqlite3_changes(db->writer) == 0)
        return true;
    s = db->s[S_OUTPUTS];
    bind_text(s, 1, r->id);
    bind_text(s, 2, r->result);
    return step(s);
}

static void doom(svc_db *db, const char *name) {
    if (db->n_doomed == db->cap_doomed) {
        size_t cap = db->cap_doomed ? 2 * db->cap_doomed : 64;
        void *p = realloc(db->doomed, cap * sizeof *db->doomed);
        if (!p)
            return; /* the sweep at the next start takes it */
        db->doomed = p;
        db->cap_doomed = cap;
    }
    snprintf(db->doomed[db->n_doomed++], sizeof *db->doomed, "%s", name);
}

/* Forget a row's files; those that no other row names are removed after the commit. */
static bool drop_files(svc_db *db, const char *id) {
    sqlite3_stmt *s = db->s[S_FILES];
    bind_text(s, 1, id);
    while (sqlite3_step(s) == SQLITE_ROW)
        doom(db, (const char *)sqlite3_column_text(s, 0));
    done_with(s);
    bind_text(db->s[S_UNREFER], 1, id);
    return step(db->s[S_UNREFER]);
}

static bool drop_row(svc_db *db, const char *id) {
    if (!drop_files(db, id))
        return false;
    bind_text(db->s[S_DELETE], 1, id);
    return step(db->s[S_DELETE]);
}

static bool drop_old(svc_db *db, statement which, double before, bool *more) {
    char ids[200][SVC_ID_BYTES];
    int n = 0;
    sqlite3_stmt *s = db->s[which];
    sqlite3_bind_double(s, 1, before);
    while (n < 200 && sqlite3_step(s) == SQLITE_ROW)
        snprintf(ids[n++], SVC_ID_BYTES, "%s", (const char *)sqlite3_column_text(s, 0));
    done_with(s);
    *more = *more || n == 200;
    bool ok = true;
    for (int i = 0; ok && i < n; i++) {
        if (which == S_OLDER) {
            ok = drop_row(db, ids[i]);
            continue;
        }
        bind_text(db->s[S_EXPIRED], 1, ids[i]);
        ok = drop_files(db, ids[i]) && step(db->s[S_EXPIRED]);
    }
    return ok;
}

static bool apply(svc_db *db, svc_write *w) {
    sqlite3_stmt *s;
    switch (w->kind) {
    case SVC_WRITE_INSERT: return insert(db, &w->row);
    case SVC_WRITE_START:
        s = db->s[S_START];
        bind_text(s, 1, w->row.id);
        sqlite3_bind_double(s, 2, w->row.started);
        return step(s);
    case SVC_WRITE_REQUEUE:
        s = db->s[S_REQUEUE];
        bind_text(s, 1, w->row.id);
        sqlite3_bind_int(s, 2, w->row.attempts);
        return step(s);
    case SVC_WRITE_FINISH: return finish(db, &w->row);
    case SVC_WRITE_EXPIRE:
        return drop_old(db, S_OLD, w->before, &w->more) &&
               drop_old(db, S_OLDER, 2 * w->before - w->row.finished, &w->more);
    case SVC_WRITE_DELETE: return drop_row(db, w->row.id);
    }
    return false;
}

static bool is_referred(void *arg, const char *name) {
    sqlite3_stmt *s = ((svc_db *)arg)->s[S_REFERRED];
    bind_text(s, 1, name);
    bool used = sqlite3_step(s) != SQLITE_DONE;
    done_with(s);
    return used;
}

static void remove_doomed(svc_db *db) {
    for (size_t i = 0; i < db->n_doomed; i++)
        if (!is_referred(db, db->doomed[i]))
            svc_store_remove(db->store, db->doomed[i]);
    db->n_doomed = 0;
}

static bool is_durable(const svc_task *t, int n) {
    for (int i = 0; t && i < n; t = t->next, i++) {
        svc_write_kind k = ((const svc_write *)(const void *)t)->kind;
        if (k == SVC_WRITE_INSERT || k == SVC_WRITE_FINISH)
            return true;
    }
    return false;
}

/* One transaction for the first n writes; false: nothing of it is in the file. */
static bool commit(svc_db *db, svc_task *t, int n) {
    bool ok;
    qie_error e = {0};
    db->n_doomed = 0;
    sqlite3_exec(db->writer,
                 is_durable(t, n) ? "PRAGMA synchronous=FULL" : "PRAGMA synchronous=NORMAL", NULL,
                 NULL, NULL);
    ok = step(db->s[S_BEGIN]);
    svc_task *at = t;
    for (int i = 0; ok && i < n; at = at->next, i++)
        ok = apply(db, (svc_write *)(void *)at);
    ok = ok && step(db->s[S_COMMIT]);
    if (!ok) {
        sql_fail(db->writer, "cannot write", &e);
        if (!sqlite3_get_autocommit(db->writer))
            sqlite3_exec(db->writer, "ROLLBACK", NULL, NULL, NULL);
        db->n_doomed = 0;
    } else
        remove_doomed(db);
    for (int i = 0; i < n; t = t->next, i++) {
        svc_write *w = (svc_write *)(void *)t;
        w->status = ok ? QIE_OK : e.status;
        w->error = e;
    }
    return ok;
}

static void commit_all(svc_db *db, svc_task *t) {
    while (t) {
        int n = 0;
        for (svc_task *at = t; at && n < MAX_BATCH; at = at->next)
            n++;
        /* One bad write must not take the others with it. */
        if (!commit(db, t, n) && n > 1) {
            svc_task *at = t;
            for (int i = 0; i < n; at = at->next, i++)
                commit(db, at, 1);
        }
        for (int i = 0; i < n; i++) {
            svc_task *next = t->next;
            svc_done_post(db->done, t);
            t = next;
        }
    }
}

static void *write_thread(void *arg) {
    svc_db *db = arg;
    pthread_mutex_lock(&db->lock);
    for (;;) {
        while (!db->first && !db->quit)
            pthread_cond_wait(&db->wake, &db->lock);
        svc_task *t = db->first;
        if (!t)
            break;
        db->first = NULL;
        db->last = &db->first;
        pthread_mutex_unlock(&db->lock);
        commit_all(db, t);
        pthread_mutex_lock(&db->lock);
    }
    pthread_mutex_unlock(&db->lock);
    return NULL;
}

static void no_run(svc_task *t) {
    (void)t;
}

void svc_db_write(svc_db *db, svc_write *w) {
    w->task.run = no_run;
    w->task.next = NULL;
    if (!db->has_thread) {
        w->status = qie_fail(&w->error, QIE_E_UNAVAILABLE, NULL, "the service is stopping");
        svc_done_post(db->done, &w->task);
        return;
    }
    pthread_mutex_lock(&db->lock);
    *db->last = &w->task;
    db->last = &w->task.next;
    pthread_cond_signal(&db->wake);
    pthread_mutex_unlock(&db->lock);
}

/* ---------------------------------------------------------------- opening */

/* Room for all pages that the connections keep. The reader drops its own with each commit of the
 * writer: taken from the heap, they would lie between everything else that comes and goes. What
 * does not fit (a large transaction) comes from the heap. */
static void reserve_pages(svc_db *db) {
    int header = 0;
    sqlite3_config(SQLITE_CONFIG_PCACHE_HDRSZ, &header);
    int slot = PAGE_BYTES + header;
    db->pages = malloc((size_t)slot * 2 * CACHED_PAGES);
    if (db->pages)
        sqlite3_config(SQLITE_CONFIG_PAGECACHE, db->pages, slot, 2 * CACHED_PAGES);
}

static qie_status connect_to(const char *path, int flags, sqlite3 **out, qie_error *err) {
    QIE_FAIL_IF(sqlite3_open_v2(path, out, flags | SQLITE_OPEN_NOMUTEX, NULL) != SQLITE_OK,
                QIE_E_IO, err, "state-dir", "cannot open '%s': %s", path, sqlite3_errmsg(*out));
    sqlite3_busy_timeout(*out, flags & SQLITE_OPEN_READONLY ? 1000 : 5000);
    return sql_run(*out, "PRAGMA cache_size=" TEXT_OF(CACHED_PAGES), err);
}

static const char *const SCHEMA =
    "BEGIN IMMEDIATE;"
    "CREATE TABLE jobs(seq INTEGER PRIMARY KEY AUTOINCREMENT,id TEXT NOT NULL UNIQUE,client TEXT "
    "NOT NULL,"
    "idempotency_key TEXT,fingerprint TEXT,prompt TEXT NOT NULL,negative TEXT NOT NULL,params TEXT "
    "NOT NULL,"
    "inputs TEXT NOT NULL,response TEXT NOT NULL,result TEXT,error TEXT,status INTEGER NOT NULL,"
    "priority INTEGER NOT NULL,attempts INTEGER NOT NULL DEFAULT 0,created REAL NOT NULL,"
    "started REAL NOT NULL DEFAULT 0,finished REAL NOT NULL DEFAULT 0);"
    "CREATE UNIQUE INDEX jobs_key ON jobs(client,idempotency_key) WHERE idempotency_key IS NOT "
    "NULL;"
    "CREATE INDEX jobs_status ON jobs(status,finished);"
    "CREATE TABLE files(job TEXT NOT NULL,name TEXT NOT NULL);"
    "CREATE INDEX files_job ON files(job);CREATE INDEX files_name ON files(name);"
    "CREATE TABLE meta(generation INTEGER NOT NULL);INSERT INTO meta VALUES(0);"
    "PRAGMA application_id=1364542788;PRAGMA user_version=1;COMMIT";

static qie_status check_schema(sqlite3 *c, bool *damaged, qie_error *err) {
    *damaged = false;
    int64_t app = sql_number(c, "PRAGMA application_id", -1);
    QIE_FAIL_IF(app < 0, sqlite3_errcode(c) == SQLITE_NOTADB ? QIE_E_CORRUPT : QIE_E_IO, err,
                "state-dir", "the queue's file cannot be read: %s", sqlite3_errmsg(c));
    int64_t version = sql_number(c, "PRAGMA user_version", -1);
    int64_t tables = sql_number(c, "SELECT count(*) FROM sqlite_schema", -1);
    *damaged = tables < 0;
    QIE_FAIL_IF(tables < 0, QIE_E_CORRUPT, err, "state-dir", "the queue's file is damaged: %s",
                sqlite3_errmsg(c));
    if (app == 0 && version == 0 && tables == 0)
        return sql_run(c, SCHEMA, err);
    QIE_FAIL_IF(app != APPLICATION_ID, QIE_E_CORRUPT, err, "state-dir",
                "the queue's file belongs to another program: name another --state-dir");
    QIE_FAIL_IF(
        version > SCHEMA_VERSION, QIE_E_CORRUPT, err, "state-dir",
        "the queue's file has version %lld, this program reads up to %d: it was written by a newer "
        "one",
        (long long)version, SCHEMA_VERSION);
    sqlite3_stmt *s = NULL;
    bool ok = sqlite3_prepare_v2(c, "PRAGMA quick_check(1)", -1, &s, NULL) == SQLITE_OK &&
              sqlite3_step(s) == SQLITE_ROW &&
              !strcmp((const char *)sqlite3_column_text(s, 0), "ok");
    sqlite3_finalize(s);
    *damaged = !ok;
    QIE_FAIL_IF(!ok, QIE_E_CORRUPT, err, "state-dir", "the queue's file is damaged");
    return QIE_OK;
}

/* ---------------------------------------------------------------- a damaged file */

/* Row by row, so that a page that cannot be read costs its own rows only. Returns how many came
 * over; *lost counts numbers that gave an error. */
static int64_t copy_rows(sqlite3 *from, sqlite3 *to, int64_t *lost) {
    int64_t last = sql_number(from, "SELECT max(seq) FROM jobs", 0), n = 0,
            counted = sql_number(from, "SELECT seq FROM sqlite_sequence WHERE name='jobs'", 0);
    sqlite3_stmt *get = NULL, *put = NULL;
    *lost = 0;
    last = counted > last ? counted : last;
    if (sqlite3_prepare_v2(from, "SELECT " COLUMNS " FROM jobs WHERE seq=?1", -1, &get, NULL) ==
            SQLITE_OK &&
        sqlite3_prepare_v2(to,
                           "INSERT OR IGNORE INTO jobs(" COLUMNS
                           ") VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                           -1, &put, NULL) == SQLITE_OK)
        for (int64_t seq = 1; seq <= last; seq++) {
            sqlite3_bind_int64(get, 1, seq);
            int rc = sqlite3_step(get);
            if (rc == SQLITE_ROW) {
                for (int i = 0; i < N_COLUMNS; i++)
                    sqlite3_bind_value(put, i + 1, sqlite3_column_value(get, i));
                n += step(put);
            }
            *lost += rc != SQLITE_ROW && rc != SQLITE_DONE;
            sqlite3_reset(get);
        }
    sqlite3_finalize(get);
    sqlite3_finalize(put);
    return n;
}

static const char *const REFERENCES =
    "INSERT INTO files SELECT jobs.id,value FROM jobs,json_each(inputs) WHERE status<>5;"
    "INSERT INTO files SELECT jobs.id,json_extract(value,'$.file') FROM "
    "jobs,json_each(result,'$.files') "
    "WHERE status=2 AND json_valid(result);";

static qie_status copy_all(svc_db *db, sqlite3 *to, const char *kept, qie_error *err) {
    int64_t lost;
    QIE_TRY(sql_run(to, SCHEMA, err));
    QIE_TRY(sql_run(to, "BEGIN", err));
    int64_t n = copy_rows(db->writer, to, &lost);
    QIE_TRY(sql_run(to, REFERENCES, err));
    QIE_TRY(sql_run(to, "UPDATE meta SET generation=unixepoch();COMMIT", err));
    snprintf(
        db->note, sizeof db->note,
        "the queue's file was damaged: %lld jobs were saved, %lld places could not be read; the "
        "damaged file is kept beside it as %.80s",
        (long long)n, (long long)lost, strrchr(kept, '/') + 1);
    return QIE_OK;
}

/* The new file takes the place of the damaged one, which stays under another name; a log that
 * belongs to the old one must not be applied to the new one. */
static bool put_in_place(const char *path, const char *new_path, const char *kept) {
    static const char *const logs[] = {"-wal", "-shm"};
    char from[4200], to[4300];
    for (int i = 0; i < 2; i++) {
        snprintf(from, sizeof from, "%s%s", path, logs[i]);
        snprintf(to, sizeof to, "%s%s", kept, logs[i]);
        if (rename(from, to) && errno != ENOENT)
            return false;
    }
    return (link(path, kept) == 0 || rename(path, kept) == 0) && rename(new_path, path) == 0;
}

/* Every row that can still be read goes into a new file; until that is complete the damaged one is
 * not touched. */
static qie_status salvage(svc_db *db, const char *path, qie_error *err) {
    char kept[4100], new_path[4100];
    sqlite3 *to = NULL;
    snprintf(kept, sizeof kept, "%s.damaged-%lld", path, (long long)time(NULL));
    snprintf(new_path, sizeof new_path, "%s.new", path);
    unlink(new_path);
    qie_status st = connect_to(new_path, WRITABLE, &to, err);
    if (st == QIE_OK)
        st = copy_all(db, to, kept, err);
    sqlite3_close(to);
    sqlite3_close(db->writer);
    db->writer = NULL;
    QIE_TRY(st);
    QIE_FAIL_IF(!put_in_place(path, new_path, kept), QIE_E_IO, err, "state-dir",
                "the queue's file is damaged and cannot be replaced: %s", strerror(errno));
    return connect_to(path, WRITABLE, &db->writer, err);
}

static qie_status prepare(sqlite3 *c, const char *const *sql, int n, sqlite3_stmt **out,
                          qie_error *err) {
    for (int i = 0; i < n; i++)
        if (sqlite3_prepare_v3(c, sql[i], -1, SQLITE_PREPARE_PERSISTENT, &out[i], NULL) !=
            SQLITE_OK)
            return sql_fail(c, "the schema does not fit", err);
    return QIE_OK;
}

static qie_status open_writer(svc_db *db, const char *path, qie_error *err) {
    bool damaged;
    QIE_TRY(connect_to(path, WRITABLE, &db->writer, err));
    qie_status st = check_schema(db->writer, &damaged, err);
    QIE_TRY(damaged ? salvage(db, path, err) : st);
    QIE_TRY(
        sql_run(db->writer,
                "PRAGMA journal_mode=WAL;PRAGMA synchronous=FULL;PRAGMA wal_autocheckpoint=1000;"
                "UPDATE meta SET generation=generation+1;"
                "UPDATE jobs SET status=0 WHERE status=1",
                err));
    db->generation = sql_number(db->writer, "SELECT generation FROM meta", 1);
    return prepare(db->writer, SQL, S_COUNT, db->s, err);
}

static qie_status open_reader(svc_db *db, const char *path, qie_error *err) {
    QIE_TRY(connect_to(path, SQLITE_OPEN_READONLY, &db->reader, err));
    return prepare(db->reader, READ_SQL, R_COUNT, db->r, err);
}

qie_status svc_db_open(const char *path, svc_store *store, svc_done *done, svc_db **out,
                       qie_error *err) {
    svc_db *db = calloc(1, sizeof *db);
    sigset_t all, old;
    *out = NULL;
    QIE_FAIL_IF(!db, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    db->store = store;
    db->done = done;
    db->last = &db->first;
    pthread_mutex_init(&db->lock, NULL);
    pthread_cond_init(&db->wake, NULL);
    reserve_pages(db);
    qie_status st = open_writer(db, path, err);
    if (st == QIE_OK)
        st = open_reader(db, path, err);
    if (st == QIE_OK) {
        if (!db->note[0]) /* pictures of lost rows stay for whoever looks at the damaged file */
            svc_store_sweep(store, is_referred, db);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        db->has_thread = pthread_create(&db->thread, NULL, write_thread, db) == 0;
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        if (!db->has_thread)
            st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "no thread");
    }
    if (st != QIE_OK) {
        svc_db_close(db);
        return st;
    }
    *out = db;
    return QIE_OK;
}

void svc_db_stop(svc_db *db) {
    if (!db || !db->has_thread)
        return;
    pthread_mutex_lock(&db->lock);
    db->quit = true;
    pthread_cond_signal(&db->wake);
    pthread_mutex_unlock(&db->lock);
    pthread_join(db->thread, NULL);
    db->has_thread = false;
}

void svc_db_close(svc_db *db) {
    if (!db)
        return;
    svc_db_stop(db);
    for (int i = 0; i < S_COUNT; i++)
        sqlite3_finalize(db->s[i]);
    for (int i = 0; i < R_COUNT; i++)
        sqlite3_finalize(db->r[i]);
    sqlite3_close(db->reader);
    sqlite3_close(db->writer);
    sqlite3_shutdown(); /* nobody uses the pages any more */
    free(db->pages);
    pthread_mutex_destroy(&db->lock);
    pthread_cond_destroy(&db->wake);
    free(db->doomed);
    free(db);
}

const char *svc_db_note(const svc_db *db) {
    return db->note[0] ? db->note : NULL;
}

int64_t svc_db_generation(const svc_db *db) {
    return db->generation;
}

/* ---------------------------------------------------------------- reading */

static char *column_text(sqlite3_stmt *s, int i) {
    const char *text = (const char *)sqlite3_column_text(s, i);
    return text ? strdup(text) : NULL;
}

static void read_row(sqlite3_stmt *s, svc_row *r) {
    memset(r, 0, sizeof *r);
    r->seq = sqlite3_column_int64(s, 0);
    snprintf(r->id, sizeof r->id, "%s", (const char *)sqlite3_column_text(s, 1));
    r->client = column_text(s, 2);
    r->idempotency_key = column_text(s, 3);
    r->fingerprint = column_text(s, 4);
    r->prompt = column_text(s, 5);
    r->negative = column_text(s, 6);
    r->params = column_text(s, 7);
    r->inputs = column_text(s, 8);
    r->response = column_text(s, 9);
    r->result = column_text(s, 10);
    r->error = column_text(s, 11);
    r->status = (svc_status)sqlite3_column_int(s, 12);
    r->priority = sqlite3_column_int(s, 13);
    r->attempts = sqlite3_column_int(s, 14);
    r->created = sqlite3_column_double(s, 15);
    r->started = sqlite3_column_double(s, 16);
    r->finished = sqlite3_column_double(s, 17);
}

static bool find_one(sqlite3_stmt *s, svc_row *out) {
    bool found = sqlite3_step(s) == SQLITE_ROW;
    if (found)
        read_row(s, out);
    done_with(s);
    return found;
}

bool svc_db_find(svc_db *db, const char *id, svc_row *out) {
    bind_text(db->r[R_ID], 1, id);
    return find_one(db->r[R_ID], out);
}

bool svc_db_find_key(svc_db *db, const char *client, const char *key, svc_row *out) {
    bind_text(db->r[R_KEY], 1, client);
    bind_text(db->r[R_KEY], 2, key);
    return find_one(db->r[R_KEY], out);
}

static bool each(sqlite3_stmt *s, bool (*fn)(void *, const svc_row *), void *arg) {
    bool go_on = true;
    while (go_on && sqlite3_step(s) == SQLITE_ROW) {
        svc_row r;
        read_row(s, &r);
        go_on = fn(arg, &r);
        svc_row_release(&r);
    }
    done_with(s);
    return go_on;
}

bool svc_db_each_queued(svc_db *db, bool (*fn)(void *arg, const svc_row *row), void *arg) {
    return each(db->r[R_QUEUED], fn, arg);
}

bool svc_db_each(svc_db *db, const char *client, int status, int64_t after, int limit,
                 bool (*fn)(void *arg, const svc_row *row), void *arg) {
    sqlite3_stmt *s = db->r[R_LIST];
    bind_text(s, 1, client);
    sqlite3_bind_int(s, 2, status);
    sqlite3_bind_int64(s, 3, after);
    sqlite3_bind_int(s, 4, limit);
    return each(s, fn, arg);
}
