#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "service/master/log.h"
#include "service/master/loras.h"
#include "service/master/master.h"
#include "service/master/tokens.h"

#define TICK_MS 100
#define FINISH_WITHIN_S 20.0 /* running jobs at SIGTERM; then they wait for the next start */
#define COMMENT_EVERY_S 15.0
#define EXPIRY_EVERY_S 60.0

/* ---------------------------------------------------------------- systemd */

/* The protocol of sd_notify(3): one datagram to a socket named in the environment. */
static void notify(const char *text) {
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (!path || (path[0] != '/' && path[0] != '@') || strlen(path) >= sizeof a.sun_path)
        return;
    memcpy(a.sun_path, path, strlen(path));
    if (a.sun_path[0] == '@')
        a.sun_path[0] = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    sendto(fd, text, strlen(text), MSG_NOSIGNAL, (struct sockaddr *)&a,
           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path)));
    close(fd);
}

static double watchdog_period(void) {
    const char *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
    if (!usec || (pid && strtol(pid, NULL, 10) != (long)getpid()))
        return 0;
    return (double)strtoll(usec, NULL, 10) * 1e-6 / 3;
}

/* ---------------------------------------------------------------- start */

static qie_status lock_state(svc_master *m, qie_error *err) {
    char *path = qie_path_join(m->o.state_dir, "lock");
    QIE_FAIL_IF(!path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    m->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int cause = errno;
    free(path);
    QIE_FAIL_IF(m->lock_fd < 0, QIE_E_IO, err, "--state-dir",
                "cannot write to the state folder '%s': %s", m->o.state_dir, strerror(cause));
    QIE_FAIL_IF(flock(m->lock_fd, LOCK_EX | LOCK_NB), QIE_E_CONFLICT, err, "--state-dir",
                "the state folder '%s' is in use by another service", m->o.state_dir);
    return QIE_OK;
}

static qie_status listen_on(const char *host, int port, int *out, qie_error *err) {
    struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM},
                    *list = NULL;
    char service[16];
    int on = 1;
    snprintf(service, sizeof service, "%d", port);
    int rc = getaddrinfo(host, service, &hints, &list);
    QIE_FAIL_IF(rc, QIE_E_INVALID, err, "--host", "'%s' is no address: %s", host, gai_strerror(rc));
    int fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool ok = fd >= 0 && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) &&
              !bind(fd, list->ai_addr, list->ai_addrlen) && !listen(fd, 1024);
    int cause = errno;
    freeaddrinfo(list);
    if (!ok && fd >= 0)
        close(fd);
    QIE_FAIL_IF(!ok, cause == EADDRINUSE ? QIE_E_CONFLICT : QIE_E_IO, err, "--port",
                "cannot listen on %s port %d: %s", host, port, strerror(cause));
    *out = fd;
    return QIE_OK;
}

/* As many descriptors as we may have. Connections get what is left when files, threads' work and
 * workers have theirs, so that a crowd of clients never keeps a worker from being started. */
static qie_status share_descriptors(svc_master *m, qie_error *err) {
    struct rlimit r;
    int reserve = 48 + 4 * (m->o.n_gpus ? m->o.n_gpus : m->o.n_workers);
    if (getrlimit(RLIMIT_NOFILE, &r))
        return QIE_OK;
    r.rlim_cur = r.rlim_max;
    setrlimit(RLIMIT_NOFILE, &r);
    if (r.rlim_cur == RLIM_INFINITY || r.rlim_cur >= (rlim_t)(m->o.max_connections + reserve))
        return QIE_OK;
    int left = (int)r.rlim_cur - reserve;
    QIE_FAIL_IF(left < 8, QIE_E_IO, err, "--max-connections",
                "the limit of %d open files leaves no room for connections: raise it (ulimit -n, "
                "LimitNOFILE) to %d",
                (int)r.rlim_cur, m->o.max_connections + reserve);
    svc_log(QIE_LOG_WARN, "start", NULL,
            "the limit of %d open files leaves %d connections instead of %d", (int)r.rlim_cur, left,
            m->o.max_connections);
    m->o.max_connections = left;
    return QIE_OK;
}

static qie_status open_http(svc_master *m, const char *spool, qie_error *err) {
    svc_http_options o = {.listen_fds = {-1, -1},
                          .max_connections = m->o.max_connections,
                          .max_body_bytes = 64u << 20,
                          .max_bodies_bytes = (size_t)m->o.max_body_memory,
                          .spool_dir = spool,
                          .arg = m,
                          .on_head = svc_route_head,
                          .on_request = svc_route_request,
                          .on_answer = svc_route_answer};
    QIE_TRY(listen_on(m->o.host, m->o.port, &o.listen_fds[0], err));
    if (m->o.api_port)
        QIE_TRY(listen_on(m->o.host, m->o.api_port, &o.listen_fds[1], err));
    return svc_http_create(&o, m->loop, &m->http, err);
}

static void on_done(void *arg, uint32_t events) {
    (void)events;
    svc_done_deliver(((svc_master *)arg)->done);
}

static qie_status open_state(svc_master *m, qie_error *err) {
    QIE_TRY(qie_mkdirs(m->o.state_dir, err));
    chmod(m->o.state_dir, 0700);
    QIE_TRY(lock_state(m, err));
    char *path = qie_path_join(m->o.state_dir, "queue.db");
    QIE_FAIL_IF(!path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_status st = svc_store_open(m->o.state_dir, &m->store, err);
    if (st == QIE_OK)
        st = svc_db_open(path, m->store, m->done, &m->db, err);
    free(path);
    if (st != QIE_OK)
        return st;
    if (m->o.output_dir) {
        QIE_TRY(qie_mkdirs(m->o.output_dir, err));
        m->output_fd = open(m->o.output_dir, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
        QIE_FAIL_IF(m->output_fd < 0, QIE_E_IO, err, "--output-dir", "cannot open '%s': %s",
                    m->o.output_dir, strerror(errno));
    }
    if (m->o.lora_dir) {
        svc_lora_list list;
        qie_status listed = svc_loras_read(m->o.lora_dir, &list, NULL);
        QIE_FAIL_IF(listed != QIE_OK, QIE_E_NOT_FOUND, err, "--lora-dir", "cannot read '%s'",
                    m->o.lora_dir);
        svc_log(QIE_LOG_INFO, "start", NULL, "%zu LoRA%s in '%s'", list.n, list.n == 1 ? "" : "s",
                m->o.lora_dir);
        svc_loras_release(&list);
    }
    return QIE_OK;
}

typedef struct reading {
    svc_task task; /* first */
    svc_lora_presets *presets;
} reading;

static void read_loras(svc_task *t) {
    qie_json_free(svc_loras_json(((reading *)(void *)t)->presets));
}
static void loras_read(svc_task *t) {
    free(t);
}

/* In a thread, so that the loop finds the files known. */
static qie_status open_loras(svc_master *m, qie_error *err) {
    if (!m->o.lora_dir)
        return QIE_OK;
    QIE_TRY(svc_lora_presets_create(m->o.lora_dir, &m->lora_presets, err));
    reading *r = calloc(1, sizeof *r);
    QIE_FAIL_IF(!r, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    r->task.run = read_loras;
    r->task.done = loras_read;
    r->presets = m->lora_presets;
    svc_pool_post(m->pool, &r->task);
    return QIE_OK;
}

static qie_status open_all(svc_master *m, qie_error *err) {
    QIE_TRY(share_descriptors(m, err));
    QIE_TRY(svc_loop_create(&m->loop, err));
    QIE_TRY(svc_done_create(&m->done, err));
    QIE_TRY(open_state(m, err));
    QIE_TRY(svc_keys_load(m, err));
    QIE_TRY(svc_pool_create(4, m->done, &m->pool, err));
    QIE_TRY(svc_pool_create(4, m->done, &m->fetchers, err));
    QIE_TRY(open_loras(m, err));
    QIE_FAIL_IF(!svc_loop_watch(m->loop, svc_done_fd(m->done), EPOLLIN, on_done, m), QIE_E_IO, err,
                NULL, "no epoll");
    QIE_TRY(svc_jobs_recover(m, err));
    QIE_TRY(open_http(m, m->o.state_dir, err));
    svc_workers_start(m);
    return QIE_OK;
}

/* ---------------------------------------------------------------- loop */

typedef struct signals {
    svc_master *m;
    int fd;
} signals;

static void on_signal(void *arg, uint32_t events) {
    signals *s = arg;
    struct signalfd_siginfo i;
    qie_error e;
    (void)events;
    while (read(s->fd, &i, sizeof i) == sizeof i) {
        if (i.ssi_signo == SIGHUP) {
            if (svc_keys_load(s->m, &e) == QIE_OK)
                svc_log(QIE_LOG_INFO, "keys", NULL, "%d keys in force", s->m->n_keys);
            else
                svc_log(QIE_LOG_ERROR, "keys", NULL, "the old keys stay: %s", e.message);
            continue;
        }
        if (s->m->stopping)
            s->m->stop_at_s = qie_now_s(); /* asked twice */
        else {
            svc_log(QIE_LOG_INFO, "stop", NULL, "signal %u: no new work, running jobs may end",
                    i.ssi_signo);
            notify("STOPPING=1");
            s->m->stopping = true;
            s->m->stop_at_s = qie_now_s() + FINISH_WITHIN_S;
            svc_http_stop_listening(s->m->http);
        }
    }
}

static bool is_idle(const svc_master *m) {
    for (const svc_job *j = m->jobs; j; j = j->next)
        if (j->worker || j->finishing || !j->accepted)
            return false;
    return true;
}

/* What a crowd of requests needed must not stay when it has gone: blocks of the size of bodies and
 * pictures come from the kernel and go back to it, and the rest shares one arena (threads allocate
 * a few blocks a request), which is trimmed every second. */
static void keep_memory_small(void) {
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 32 << 10);
    mallopt(M_TRIM_THRESHOLD, 64 << 10);
    mallopt(M_TOP_PAD, 0);
}

typedef struct expiring {
    svc_write write; /* first */
    svc_master *master;
} expiring;

static void expired(svc_task *t) {
    expiring *e = (expiring *)(void *)t;
    if (e->write.more && e->write.status == QIE_OK)
        e->master->next_expiry_s = 0;
    free(e);
}

static void expire(svc_master *m) {
    expiring *e = calloc(1, sizeof *e);
    if (!e)
        return;
    e->master = m;
    e->write.kind = SVC_WRITE_EXPIRE;
    e->write.task.done = expired;
    e->write.row.finished = svc_clock();
    e->write.before = e->write.row.finished - m->o.keep_s;
    svc_db_write(m->db, &e->write);
}

static void run_loop(svc_master *m) {
    double now, next_comment = 0, next_second = 0, period = watchdog_period(), next_watchdog = 0;
    while (!m->stopping || (!is_idle(m) && qie_now_s() < m->stop_at_s)) {
        svc_workers_tick(m);
        svc_jobs_tick(m);
        now = qie_now_s();
        if (now >= next_second) {
            bool comment = now >= next_comment;
            next_second = now + 1;
            if (comment) {
                svc_streams_tick(m);
                next_comment = now + COMMENT_EVERY_S;
            }
            svc_submit_tick(m, comment);
            malloc_trim(0); /* 0.1 ms for a heap of 1 MB */
        }
        if (now >= m->next_expiry_s) {
            m->next_expiry_s =
                now + (m->o.keep_s < EXPIRY_EVERY_S ? m->o.keep_s / 2 : EXPIRY_EVERY_S);
            expire(m);
        }
        if (period > 0 && now >= next_watchdog) {
            notify("WATCHDOG=1");
            next_watchdog = now + period;
        }
        svc_loop_run_once(m->loop, svc_http_run(m->http, TICK_MS));
    }
}

static void say_started(const svc_master *m) {
    bool everywhere = !strcmp(m->o.host, "0.0.0.0") || !strcmp(m->o.host, "::");
    bool local = !strncmp(m->o.host, "127.", 4) || !strcmp(m->o.host, "::1") ||
                 !strcmp(m->o.host, "localhost");
    printf("http://%s:%d/\n", everywhere ? "127.0.0.1" : m->o.host, m->o.port);
    fflush(stdout);
    svc_log(QIE_LOG_INFO, "start", NULL, "open http://%s:%d/ (state in %s)",
            everywhere ? "127.0.0.1" : m->o.host, m->o.port, m->o.state_dir);
    if (!local && m->n_keys == 0)
        svc_log(
            QIE_LOG_WARN, "start", NULL,
            "everybody who reaches %s port %d may use this service: --api-key KEY asks for a key",
            m->o.host, m->o.port);
}

/* Workers first, then the threads, then the answers: what a thread finished late may still be
 * written, what is written may still be told, and whoever waits for more is told that we stop. */
static void close_all(svc_master *m) {
    m->stopping = m->closing = true;
    if (m->loop)
        svc_workers_stop(m);
    svc_pool_stop(m->fetchers);
    svc_pool_stop(m->pool);
    if (m->done)
        svc_done_deliver(m->done);
    svc_db_stop(m->db);
    if (m->done)
        svc_done_deliver(m->done);
    if (m->http) {
        svc_submit_stop(m);
        svc_streams_stop(m);
        for (int i = 0; i < 5; i++) /* the last answers */
            svc_loop_run_once(m->loop, svc_http_run(m->http, 10));
    }
    svc_http_destroy(m->http);
    if (m->done)
        svc_done_deliver(m->done);
    svc_jobs_close(m);
    svc_tokens_destroy(m->tokens);
    svc_db_close(m->db);
    svc_pool_destroy(m->fetchers);
    svc_pool_destroy(m->pool);
    svc_lora_presets_destroy(m->lora_presets);
    svc_store_close(m->store);
    svc_done_destroy(m->done);
    svc_loop_destroy(m->loop);
    for (int i = 0; i < m->n_keys; i++)
        free(m->keys[i]);
    if (m->output_fd >= 0)
        close(m->output_fd);
    if (m->lock_fd >= 0)
        close(m->lock_fd);
}

qie_status svc_master_run(const svc_options *options, qie_error *err) {
    svc_master *m = calloc(1, sizeof *m);
    sigset_t set;
    QIE_FAIL_IF(!m, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    m->o = *options;
    m->last_job = &m->jobs;
    m->lock_fd = m->output_fd = -1;
    m->pid = getpid();
    m->start_s = qie_now_s();
    m->start_at = svc_clock();
    svc_log_start(options->log_json);
    keep_memory_small();
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signals s = {.m = m, .fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)};
    qie_status st = open_all(m, err);
    if (st == QIE_OK && !svc_loop_watch(m->loop, s.fd, EPOLLIN, on_signal, &s))
        st = qie_fail(err, QIE_E_IO, NULL, "no signalfd");
    if (st == QIE_OK) {
        say_started(m);
        notify("READY=1");
        run_loop(m);
        svc_log(QIE_LOG_INFO, "stop", NULL, "stopped with %d jobs left for the next start",
                m->n_queued);
    }
    close_all(m);
    if (s.fd >= 0)
        close(s.fd);
    free(m);
    return st;
}
