#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"
#include "service/master/log.h"
#include "service/master/master.h"

#define EVENTS_PER_GENERATION 1000000

#define PLACES_EVERY_S 0.2
#define MAX_CLIENTS 1024
#define RETRY_STUCK_S 0.5

/* ---------------------------------------------------------------- clients */

static unsigned slot_of(const char *name) {
    uint32_t h = 2166136261u; /* FNV-1a */
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return h % SVC_CLIENT_SLOTS;
}

/* Clients without jobs are kept for their turn; when there are many, all of those go at once. A
 * forgotten client counts as never served, which harms nobody for longer than one job. */
static void forget_idle(svc_master *m, bool all) {
    for (int i = 0; i < SVC_CLIENT_SLOTS; i++)
        for (svc_client **at = &m->clients[i]; *at;) {
            svc_client *c = *at;
            if (!all && (c->n_jobs || c->n_waiting)) {
                at = &c->next;
                continue;
            }
            *at = c->next;
            m->n_clients--;
            free(c);
        }
}

svc_client *svc_client_get(svc_master *m, const char *name) {
    svc_client **slot = &m->clients[slot_of(name)], *c = *slot;
    while (c && strcmp(c->name, name))
        c = c->next;
    if (c)
        return c;
    if (m->n_clients >= MAX_CLIENTS)
        forget_idle(m, false);
    c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    snprintf(c->name, sizeof c->name, "%s", name);
    c->next = *slot;
    *slot = c;
    m->n_clients++;
    return c;
}

/* ---------------------------------------------------------------- making and finding */

svc_job *svc_job_from_row(svc_master *m, svc_row *row) {
    svc_job *j = calloc(1, sizeof *j);
    qie_json *params = NULL, *inputs = NULL;
    bool ok = j &&
              qie_json_parse(row->params, strlen(row->params), "params", &params, NULL) == QIE_OK &&
              svc_params_from_json(params, &j->params, NULL) == QIE_OK &&
              qie_json_parse(row->inputs, strlen(row->inputs), "inputs", &inputs, NULL) == QIE_OK &&
              qie_json_size(inputs) <= SVC_MAX_PICTURES;
    for (size_t i = 0; ok && i < qie_json_size(inputs); i++) {
        const char *name = qie_json_string(qie_json_at(inputs, i), NULL);
        ok = name && strlen(name) < QIE_HASH_HEX_MAX;
        if (ok)
            snprintf(j->inputs[j->n_inputs++], QIE_HASH_HEX_MAX, "%s", name);
    }
    qie_json_free(params);
    qie_json_free(inputs);
    if (ok)
        ok = (j->client = svc_client_get(m, row->client)) != NULL;
    if (!ok) {
        free(j);
        return NULL;
    }
    j->client->n_jobs++;
    j->row = *row;
    memset(row, 0, sizeof *row);
    j->created_s = qie_now_s();
    j->seconds_left = j->told = -1;
    j->next_event = svc_db_generation(m->db) * EVENTS_PER_GENERATION;
    return j;
}

void svc_job_free(svc_job *j) {
    for (int i = 0; i < j->n_events; i++)
        free(j->events[i].data);
    while (j->listeners) {
        svc_listener *l = j->listeners;
        j->listeners = l->next;
        l->job = NULL;
    }
    j->client->n_jobs--;
    svc_row_release(&j->row);
    free(j);
}

void svc_job_waiting(svc_master *m, svc_job *job, int change) {
    m->n_queued += change;
    job->client->n_waiting += change;
    svc_jobs_changed(m);
}

void svc_job_append(svc_master *m, svc_job *job) {
    *m->last_job = job;
    m->last_job = &job->next;
    job->order = ++m->next_order;
    svc_job_waiting(m, job, 1);
}

void svc_job_take_out(svc_master *m, svc_job *job) {
    for (svc_job **at = &m->jobs; *at; at = &(*at)->next)
        if (*at == job) {
            *at = job->next;
            if (m->last_job == &job->next)
                m->last_job = at;
            break;
        }
}

static bool recover_row(void *arg, const svc_row *row) {
    svc_master *m = arg;
    svc_row copy;
    if (!svc_db_find(m->db, row->id, &copy))
        return true;
    svc_job *j = svc_job_from_row(m, &copy);
    if (!j) {
        svc_log(QIE_LOG_ERROR, "recover", row->id, "the row cannot be read and stays as it is");
        svc_row_release(&copy);
        return true;
    }
    j->accepted = true;
    svc_job_append(m, j);
    return true;
}

qie_status svc_jobs_recover(svc_master *m, qie_error *err) {
    QIE_FAIL_IF(!svc_db_each_queued(m->db, recover_row, m), QIE_E_IO, err, "state-dir",
                "the queue cannot be read");
    if (svc_db_note(m->db))
        svc_note_error(m, svc_db_note(m->db));
    if (m->n_queued)
        svc_log(QIE_LOG_INFO, "recover", NULL, "%d jobs go on", m->n_queued);
    return QIE_OK;
}

svc_job *svc_job_find(svc_master *m, const char *id) {
    for (svc_job *j = m->jobs; j; j = j->next)
        if (!strcmp(j->row.id, id))
            return j;
    return NULL;
}

svc_job *svc_job_find_key(svc_master *m, const char *client, const char *key) {
    for (svc_job *j = m->jobs; j; j = j->next)
        if (j->row.idempotency_key && !strcmp(j->row.idempotency_key, key) &&
            !strcmp(j->row.client, client))
            return j;
    return NULL;
}

/* ---------------------------------------------------------------- events */

void svc_job_listen(svc_job *job, svc_listener *l) {
    l->job = job;
    l->next = job->listeners;
    job->listeners = l;
}

void svc_job_unlisten(svc_listener *l) {
    if (!l->job)
        return;
    for (svc_listener **at = &l->job->listeners; *at; at = &(*at)->next)
        if (*at == l) {
            *at = l->next;
            break;
        }
    l->job = NULL;
}

static void tell(svc_job *job, const svc_event *e) {
    for (svc_listener *l = job->listeners, *next; l; l = next) {
        next = l->next; /* a listener may leave while it is told */
        l->fn(l, job, e);
    }
}

/* Of states that replace each other only the last is kept. */
static void keep_event(svc_job *job, const svc_event *e) {
    const int max = (int)(sizeof job->events / sizeof *job->events);
    int at = job->n_events;
    if (at > 0 && !strcmp(job->events[at - 1].name, e->name))
        at--;
    else if (at == max) {
        free(job->events[0].data);
        memmove(job->events, job->events + 1, (size_t)(max - 1) * sizeof *job->events);
        at--;
        job->n_events--;
        job->events[at].data = NULL;
    } else
        job->events[at].data = NULL;
    free(job->events[at].data);
    job->events[at] = *e;
    job->n_events = at + 1;
}

void svc_job_event(svc_master *m, svc_job *job, const char *name, qie_json *data, bool keep) {
    svc_event e = {.id = ++job->next_event, .name = name, .data = qie_json_text(data, 0)};
    (void)m;
    qie_json_free(data);
    if (!e.data)
        return;
    tell(job, &e);
    if (keep)
        keep_event(job, &e);
    else
        free(e.data);
}

/* ---------------------------------------------------------------- ends */

typedef struct svc_ending {
    svc_write write; /* first */
    svc_master *master;
    svc_job *job;
    struct svc_ending *next;
} ending;

static void count_end(svc_master *m, const svc_job *job) {
    m->n_ended[job->row.status]++;
    if (job->row.status == SVC_COMPLETED && job->started_s > 0) {
        double t = qie_now_s() - job->started_s;
        m->average_job_s = m->average_job_s > 0 ? 0.8 * m->average_job_s + 0.2 * t : t;
    }
}

static qie_json *parsed(const char *text) {
    qie_json *o = NULL;
    if (text)
        qie_json_parse(text, strlen(text), "text", &o, NULL);
    return o ? o : qie_json_new_object();
}

static void tell_end(svc_master *m, svc_job *job) {
    qie_json *data = parsed(job->row.status == SVC_COMPLETED ? job->row.result : job->row.error);
    const char *name = svc_status_name(job->row.status);
    qie_json *all = qie_json_new_object();
    qie_json_put(all, "id", qie_json_new_string(job->row.id));
    qie_json_put(all, "status", qie_json_new_string(name));
    if (job->row.status == SVC_COMPLETED)
        qie_json_put(all, "result", data);
    else
        qie_json_put(all, "error", data);
    svc_log(QIE_LOG_INFO, name, job->row.id, "after %.3f s%s%s", qie_now_s() - job->created_s,
            job->row.error ? ": " : "", job->row.error ? job->row.error : "");
    svc_job_event(m, job, name, all, true);
}

static void on_ended(svc_task *t);

static void write_end(ending *e) {
    e->write.kind = SVC_WRITE_FINISH;
    e->write.task.done = on_ended;
    e->write.row = e->job->row;
    svc_db_write(e->master->db, &e->write);
}

static void on_ended(svc_task *t) {
    ending *e = (ending *)(void *)t;
    svc_master *m = e->master;
    svc_job *job = e->job;
    if (e->write.status != QIE_OK) {
        /* The state folder is full or broken: the end is kept in memory and written when it can be;
         * nobody is told before. */
        svc_note_error(m, e->write.error.message);
        m->storage_broken_until_s = qie_now_s() + 2;
        m->retry_stuck_s = qie_now_s() + RETRY_STUCK_S;
        e->next = m->stuck;
        m->stuck = e;
        return;
    }
    for (int i = 0; i < job->n_outputs; i++)
        svc_store_unpin(m->store, job->outputs[i]);
    count_end(m, job);
    tell_end(m, job);
    svc_job_take_out(m, job);
    svc_job_free(job);
    free(e);
    svc_jobs_changed(m);
}

void svc_job_finish(svc_master *m, svc_job *job, svc_status status, char *result,
                    const qie_error *error) {
    ending *e = calloc(1, sizeof *e);
    if (!e) {
        free(result);
        return; /* stays as it is and is run again */
    }
    if (job->row.status == SVC_QUEUED)
        svc_job_waiting(m, job, -1);
    job->finishing = true;
    job->row.status = status;
    job->row.finished = svc_clock();
    free(job->row.result);
    free(job->row.error);
    job->row.result = result;
    job->row.error = NULL;
    if (error) {
        qie_json *o = svc_error_json(error);
        job->row.error = qie_json_text(o, 0);
        qie_json_free(o);
    }
    e->master = m;
    e->job = job;
    write_end(e);
}

static void written(svc_task *t) {
    svc_row_release(&((svc_write *)(void *)t)->row);
    free(t);
}

static void write_state(svc_master *m, svc_write_kind kind, const svc_job *job) {
    svc_write *w = calloc(1, sizeof *w);
    if (!w)
        return;
    w->kind = kind;
    w->task.done = written;
    memcpy(w->row.id, job->row.id, sizeof w->row.id);
    w->row.started = job->row.started;
    w->row.attempts = job->row.attempts;
    svc_db_write(m->db, w);
}

void svc_job_retry(svc_master *m, svc_job *job, const char *reason) {
    qie_error e;
    job->worker = NULL;
    job->row.attempts++;
    if (job->cancel) {
        qie_fail(&e, QIE_E_CANCELLED, NULL, "cancelled");
        svc_job_finish(m, job, SVC_CANCELLED, NULL, &e);
        return;
    }
    if (job->row.attempts >= SVC_MAX_ATTEMPTS) {
        qie_fail(&e, QIE_E_INTERNAL, NULL,
                 "the worker was lost %d times with this job, the last time: %s", job->row.attempts,
                 reason);
        svc_job_finish(m, job, SVC_FAILED, NULL, &e);
        return;
    }
    svc_log(QIE_LOG_WARN, "retry", job->row.id, "attempt %d: %s", job->row.attempts + 1, reason);
    job->row.status = SVC_QUEUED;
    svc_job_waiting(m, job, 1);
    write_state(m, SVC_WRITE_REQUEUE, job);
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "reason", qie_json_new_string(reason));
    qie_json_put(o, "attempt", qie_json_new_int(job->row.attempts + 1));
    svc_job_event(m, job, "retrying", o, true);
}

bool svc_job_cancel(svc_master *m, svc_job *job) {
    qie_error e;
    if (job->finishing)
        return false;
    job->cancel = true;
    if (job->worker)
        svc_worker_cancel(job->worker);
    else if (job->accepted && job->row.status == SVC_QUEUED) {
        qie_fail(&e, QIE_E_CANCELLED, NULL, "cancelled");
        svc_job_finish(m, job, SVC_CANCELLED, NULL, &e);
    }
    return true;
}

/* ---------------------------------------------------------------- order */

static bool waits(const svc_job *j) {
    return j->accepted && !j->finishing && !j->worker && j->row.status == SVC_QUEUED;
}

static bool before(const svc_job *a, const svc_job *b) {
    if (a->row.priority != b->row.priority)
        return a->row.priority > b->row.priority;
    return a->client->turn < b->client->turn;
}

svc_job *svc_jobs_pick(svc_master *m) {
    svc_job *best = NULL;
    for (svc_job *j = m->jobs; j; j = j->next)
        if (waits(j) && (!best || before(j, best)))
            best = j;
    return best;
}

void svc_jobs_served(svc_master *m, svc_job *job) {
    job->client->turn = ++m->turn;
    job->row.status = SVC_RUNNING;
    job->row.started = svc_clock();
    job->started_s = qie_now_s();
    svc_job_waiting(m, job, -1);
    svc_histogram_add(&m->wait_s, job->started_s - job->created_s);
    write_state(m, SVC_WRITE_START, job);
}

void svc_jobs_changed(svc_master *m) {
    m->places_stale = m->places_untold = true;
}

static int by_place(const void *a, const void *b) {
    const svc_job *x = *(svc_job *const *)a, *y = *(svc_job *const *)b;
    if (x->row.priority != y->row.priority)
        return x->row.priority > y->row.priority ? -1 : 1;
    if (x->rank != y->rank)
        return x->rank < y->rank ? -1 : 1;
    if (x->client->turn != y->client->turn)
        return x->client->turn < y->client->turn ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* The order as it stands now: by priority, then in rounds that take one job of each client, those
 * served longest ago first. */
static void reckon(svc_master *m) {
    svc_job **list = malloc(((size_t)m->n_queued + 1) * sizeof *list);
    int n = 0;
    if (!list || !m->places_stale) {
        free(list);
        return;
    }
    m->places_stale = false;
    for (svc_job *j = m->jobs; j; j = j->next)
        memset(j->client->ranks, 0, sizeof j->client->ranks);
    for (svc_job *j = m->jobs; j; j = j->next)
        if (waits(j) && n < m->n_queued) {
            j->rank = j->client->ranks[j->row.priority]++;
            list[n++] = j;
        }
    qsort(list, (size_t)n, sizeof *list, by_place);
    for (int i = 0; i < n; i++)
        list[i]->position = i;
    free(list);
}

int svc_job_position(svc_master *m, const svc_job *job) {
    if (m->places_stale)
        reckon(m);
    return job->position;
}

double svc_job_eta(const svc_master *m, int position) {
    int n = svc_workers_ready(m);
    if (m->average_job_s <= 0 || n == 0)
        return -1;
    return m->average_job_s * ((double)(position / n) + 1);
}

void svc_job_tell_place(svc_master *m, svc_job *job) {
    int position = svc_job_position(m, job);
    if (!waits(job) || position == job->told)
        return;
    job->told = position;
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "position", qie_json_new_int(position));
    double eta = svc_job_eta(m, position);
    qie_json_put(o, "eta_s", eta < 0 ? qie_json_new_null() : qie_json_new_double(eta));
    svc_job_event(m, job, "queued", o, true);
}

/* Every start of a job moves all that wait: told in bundles, and only to those who watch. */
static void tell_places(svc_master *m) {
    m->places_untold = false;
    m->next_places_s = qie_now_s() + PLACES_EVERY_S;
    for (svc_job *j = m->jobs; j; j = j->next) {
        bool watched = false;
        for (const svc_listener *l = j->listeners; l && !watched; l = l->next)
            watched = l->wants_places;
        if (watched)
            svc_job_tell_place(m, j);
    }
}

void svc_jobs_tick(svc_master *m) {
    double now = qie_now_s();
    if (m->places_untold && now >= m->next_places_s)
        tell_places(m);
    if (!m->stuck || now < m->retry_stuck_s)
        return;
    ending *e = m->stuck;
    m->stuck = NULL;
    while (e) {
        ending *next = e->next;
        write_end(e);
        e = next;
    }
}

/* Jobs whose end is not in the file run again at the next start. */
void svc_jobs_close(svc_master *m) {
    while (m->stuck) {
        ending *e = m->stuck;
        m->stuck = e->next;
        free(e);
    }
    while (m->jobs) {
        svc_job *j = m->jobs;
        m->jobs = j->next;
        svc_job_free(j);
    }
    forget_idle(m, true);
}

int svc_retry_after(const svc_master *m) {
    double t = m->average_job_s > 0 ? m->average_job_s : 5;
    int n = svc_workers_ready(m);
    t = t * (double)(m->n_queued + 1) / (n > 0 ? n : 1) / 2;
    return t < 1 ? 1 : t > 3600 ? 3600 : (int)t;
}

qie_status svc_jobs_admit(svc_master *m, const char *client, qie_error *err) {
    int waiting = m->n_queued + m->n_reserved;
    QIE_FAIL_IF(waiting >= m->o.queue_size, QIE_E_BUSY, err, NULL, "the queue is full (%d jobs)",
                waiting);
    svc_client *c = svc_client_get(m, client);
    QIE_FAIL_IF(!c, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    int own = c->n_waiting;
    QIE_FAIL_IF(waiting > own && 2 * own >= m->o.queue_size, QIE_E_BUSY, err, NULL,
                "this client has %d jobs waiting, half of the queue, while others wait too", own);
    return QIE_OK;
}

double svc_jobs_oldest(const svc_master *m) {
    for (svc_job *j = m->jobs; j; j = j->next)
        if (waits(j))
            return qie_now_s() - j->created_s;
    return 0;
}
