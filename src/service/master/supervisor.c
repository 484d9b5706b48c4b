#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "service/master/log.h"
#include "service/master/master.h"
#include "service/master/parse.h"
#include "service/master/tokens.h"

#define YOUNG_S 10.0
#define MAX_WAIT_S 30.0
#define MAX_WAIT_KILLED_S 2.0 /* SIGKILL from outside says nothing about the program */
#define HOPELESS_AFTER 5
#define CANCEL_WITHIN_S 60.0
#define MAX_RESULT_BYTES (256ll << 20)
#define SOCKET_BYTES (1 << 20)

static const char *const STATES[] = {"starting", "loading",    "ready",
                                     "busy",     "restarting", "failed"};

static void on_channel(void *arg, uint32_t events);
static void on_output(void *arg, uint32_t events);
static void on_death(void *arg, uint32_t events);

/* ---------------------------------------------------------------- processes */

/* Between fork and exec: system calls only. */
static void become_worker(const svc_worker *w, int channel, int output, char *const *argv,
                          char *const *envp) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != w->master->pid)
        _exit(127); /* it died before the line above */
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    if (channel == SVC_CHANNEL_FD)
        fcntl(channel, F_SETFD, 0);
    else if (dup2(channel, SVC_CHANNEL_FD) < 0)
        _exit(127);
    close_range(SVC_CHANNEL_FD + 1, ~0u, 0);
    execve(w->master->o.program, argv, envp);
    _exit(127);
}

/* The environment with the device: a worker sees its own GPU and no other. */
static char **environment_of(const svc_worker *w, char *device, size_t cap) {
    size_t n = 0, k = 0;
    while (environ[n])
        n++;
    char **e = calloc(n + 3, sizeof *e);
    for (size_t i = 0; e && i < n; i++)
        if (!w->gpu || (strncmp(environ[i], "CUDA_VISIBLE_DEVICES=", 21) &&
                        strncmp(environ[i], "CUDA_DEVICE_ORDER=", 18)))
            e[k++] = environ[i];
    if (e && w->gpu) {
        static char order[] = "CUDA_DEVICE_ORDER=PCI_BUS_ID";
        snprintf(device, cap, "CUDA_VISIBLE_DEVICES=%s", w->gpu);
        e[k++] = device;
        e[k++] = order;
    }
    return e;
}

static void note(svc_worker *w, const char *text) {
    snprintf(w->last_error, sizeof w->last_error, "%s", text);
    w->last_error_at = svc_clock();
}

/* Wait longer each time it dies young. */
static void plan_restart(svc_worker *w) {
    double wait = 0, most = w->was_killed ? MAX_WAIT_KILLED_S : MAX_WAIT_S;
    if (w->deaths_young > 0) {
        wait = 0.5;
        for (int64_t i = 1; i < w->deaths_young && wait < most; i++)
            wait *= 2;
        if (wait > most)
            wait = most;
    }
    w->hopeless = w->deaths_unready >= HOPELESS_AFTER;
    w->state = w->hopeless ? SVC_W_FAILED : SVC_W_RESTARTING;
    w->restart_at_s = qie_now_s() + wait;
}

static void close_if(int fd) {
    if (fd >= 0)
        close(fd);
}

static bool start(svc_worker *w) {
    svc_master *m = w->master;
    int pair[2];
    char device[2100]; /* a list of UUIDs where cards are used together */
    union {
        const char *const *in;
        char *const *out;
    } argv = {.in = m->o.worker_args}; /* exec does not write to them */
    char **envp = environment_of(w, device, sizeof device);
    int output[2] = {-1, -1};
    pair[0] = pair[1] = -1;
    bool ok = envp && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) &&
              !pipe2(output, O_CLOEXEC);
    pid_t pid = -1;
    if (ok) {
        int size = SOCKET_BYTES;
        fcntl(pair[0], F_SETFL, O_NONBLOCK);
        fcntl(output[0], F_SETFL, O_NONBLOCK);
        setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        pid = fork();
        if (pid == 0)
            become_worker(w, pair[1], output[1], argv.out, envp);
    }
    free(envp);
    close_if(pair[1]);
    close_if(output[1]);
    if (pid < 0) {
        note(w, "no worker can be started now for lack of processes, descriptors or memory");
        close_if(pair[0]);
        close_if(output[0]);
        return false;
    }
    w->output = output[0];
    w->n_line = 0;
    w->output_watch = svc_loop_watch(m->loop, w->output, EPOLLIN, on_output, w);
    w->pid = pid;
    w->channel = pair[0];
    w->pidfd = pidfd_open(pid, 0);
    w->channel_watch = svc_loop_watch(m->loop, w->channel, EPOLLIN, on_channel, w);
    w->pid_watch = w->pidfd >= 0 ? svc_loop_watch(m->loop, w->pidfd, EPOLLIN, on_death, w) : NULL;
    w->state = SVC_W_STARTING;
    w->started_s = w->last_beat_s = qie_now_s();
    w->ready_s = 0;
    w->death_note[0] = 0;
    w->was_killed = false;
    if (!w->pid_watch || !w->channel_watch)
        kill(pid, SIGKILL);
    svc_log(QIE_LOG_INFO, "worker", NULL, "worker %d started, process %d%s%s", w->index, (int)pid,
            w->gpu ? ", GPU " : "", w->gpu ? w->gpu : "");
    return true;
}

static void kill_worker(svc_worker *w, const char *why, int reason) {
    if (w->pid <= 0)
        return;
    if (!w->death_note[0]) {
        snprintf(w->death_note, sizeof w->death_note, "%s", why);
        w->master->death_reasons[w->index][reason]++;
    }
    w->state = SVC_W_RESTARTING; /* nothing is given to it any more */
    kill(w->pid, SIGKILL);
}

static void describe_death(svc_worker *w, int status) {
    if (w->death_note[0])
        return;
    w->master->death_reasons[w->index][0]++;
    w->was_killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    if (WIFSIGNALED(status)) /* SIGBUS: weights are mapped, and there is no page behind them */
        snprintf(w->death_note, sizeof w->death_note, "the worker was ended by signal %d (%s)%s",
                 WTERMSIG(status), strsignal(WTERMSIG(status)),
                 WTERMSIG(status) == SIGBUS
                     ? ": a file of the model or of a LoRA was cut while in use, or its disk fails"
                     : "");
    else
        snprintf(w->death_note, sizeof w->death_note, "the worker left with exit code %d",
                 WEXITSTATUS(status));
}

/* Close what belonged to a process that is gone. */
static void forget_process(svc_worker *w) {
    svc_loop *loop = w->master->loop;
    svc_loop_unwatch(loop, w->channel_watch);
    svc_loop_unwatch(loop, w->output_watch);
    svc_loop_unwatch(loop, w->pid_watch);
    close_if(w->channel);
    close_if(w->output);
    close_if(w->pidfd);
    w->channel = w->output = w->pidfd = -1;
    w->channel_watch = w->output_watch = w->pid_watch = NULL;
    w->pid = 0;
    w->placement[0] = 0;
}

static void buried(svc_worker *w, int status) {
    svc_master *m = w->master;
    double now = qie_now_s();
    /* What it said before it died still counts: a result may have been sent. */
    if (w->channel >= 0)
        on_channel(w, 0);
    on_output(w, 0);
    describe_death(w, status);
    forget_process(w);
    w->cancel_at_s = 0;
    bool young = w->ready_s <= 0 || now - w->ready_s < YOUNG_S;
    w->deaths_unready = w->ready_s <= 0 && !w->was_killed ? w->deaths_unready + 1 : 0;
    w->deaths_young = young && !w->job ? w->deaths_young + 1 : young ? w->deaths_young : 0;
    if (!m->stopping) {
        note(w, w->death_note);
        svc_log(QIE_LOG_ERROR, "worker", w->job ? w->job->row.id : NULL, "worker %d lost: %s",
                w->index, w->death_note);
    }
    svc_job *job = w->job;
    w->job = NULL;
    w->token = 0;
    if (job)
        svc_job_retry(m, job, w->death_note);
    w->restarts++;
    plan_restart(w);
}

static void on_death(void *arg, uint32_t events) {
    svc_worker *w = arg;
    int status = 0;
    (void)events;
    if (w->pid > 0 && waitpid(w->pid, &status, WNOHANG) == w->pid)
        buried(w, status);
}

/* What a worker writes to its standard error (the crash handler, a library) becomes lines of the
 * log, with the job it was at. */
static void on_output(void *arg, uint32_t events) {
    svc_worker *w = arg;
    (void)events;
    for (int i = 0; i < 64 && w->output >= 0; i++) {
        ssize_t n = read(w->output, w->line + w->n_line, sizeof w->line - 1 - w->n_line);
        if (n == 0) {
            svc_loop_unwatch(w->master->loop, w->output_watch);
            w->output_watch = NULL;
        }
        if (n <= 0)
            return;
        w->n_line += (size_t)n;
        char *start = w->line, *end;
        while ((end = memchr(start, '\n', w->n_line - (size_t)(start - w->line))) != NULL ||
               (start == w->line && w->n_line == sizeof w->line - 1 &&
                (end = w->line + w->n_line) != NULL)) {
            *end = 0;
            if (*start)
                svc_log(QIE_LOG_WARN, "output", w->job ? w->job->row.id : NULL, "worker %d: %s",
                        w->index, start);
            start = end < w->line + w->n_line ? end + 1 : end;
        }
        w->n_line -= (size_t)(start - w->line);
        memmove(w->line, start, w->n_line);
    }
}

/* ---------------------------------------------------------------- giving a job away */

typedef struct packing {
    svc_task task; /* first */
    svc_master *master;
    svc_worker *worker;
    uint64_t token;
    svc_job_head head;
    char *prompt, *negative;
    char inputs[SVC_MAX_PICTURES][QIE_HASH_HEX_MAX];
    int fd, cause;
} packing;

/* Pictures go from their files into the memory file without passing through this process' memory.
 */
static bool append_input(packing *p, int i) {
    int from = svc_store_read(p->master->store, p->inputs[i]);
    int64_t n = from >= 0 ? svc_file_size(from) : -1;
    off_t at = 0;
    bool ok = n > 0;
    p->head.image_bytes[i] = ok ? (uint64_t)n : 0;
    while (ok && at < n)
        ok = copy_file_range(from, &at, p->fd, NULL, (size_t)(n - at), 0) > 0;
    if (!ok && n > 0) { /* another kind of file system */
        char buffer[65536];
        ssize_t k;
        ok = true;
        while (ok && at < n && (k = pread(from, buffer, sizeof buffer, at)) > 0) {
            ok = qie_write_all(p->fd, buffer, (size_t)k) == 0;
            at += k;
        }
        ok = ok && at == n;
    }
    p->cause = errno;
    if (from >= 0)
        close(from);
    return ok;
}

static void pack(svc_task *t) {
    packing *p = (packing *)(void *)t;
    svc_part parts[3] = {{&p->head, sizeof p->head},
                         {p->prompt, (size_t)p->head.n_prompt},
                         {p->negative, (size_t)p->head.n_negative}};
    p->fd = svc_memory_file("job", parts, 3);
    p->cause = errno;
    bool ok = p->fd >= 0;
    for (int i = 0; ok && i < (int)p->head.n_images; i++)
        ok = append_input(p, i);
    ok = ok && pwrite(p->fd, &p->head, sizeof p->head, 0) == (ssize_t)sizeof p->head;
    if (!ok && p->fd >= 0) {
        close(p->fd);
        p->fd = -1;
    }
}

static void put_back(svc_master *m, svc_worker *w, svc_job *job) {
    w->job = NULL;
    w->token = 0;
    w->state = SVC_W_READY;
    job->worker = NULL;
    job->row.status = SVC_QUEUED;
    svc_job_waiting(m, job, 1);
}

static void packed(svc_task *t) {
    packing *p = (packing *)(void *)t;
    svc_worker *w = p->worker;
    svc_job *job = w->token == p->token ? w->job : NULL;
    qie_error e;
    if (job && w->pid > 0 && job->cancel) {
        put_back(p->master, w, job);
        svc_job_cancel(p->master, job);
    } else if (job && w->pid > 0 && p->fd < 0 && p->cause == ENOENT) {
        w->job = NULL;
        w->state = SVC_W_READY;
        job->worker = NULL;
        qie_fail(&e, QIE_E_IO, NULL, "a picture of this job is no longer in the state folder");
        svc_job_finish(p->master, job, SVC_FAILED, NULL, &e);
    } else if (job && w->pid > 0) {
        svc_message m;
        svc_message_init(&m, SVC_MSG_JOB, p->token);
        snprintf(m.job_id, sizeof m.job_id, "%s", job->row.id);
        if (p->fd < 0 || !svc_message_send(w->channel, &m, p->fd)) {
            /* No descriptors or memory now: later, without blame. */
            svc_note_error(
                p->master,
                "a job could not be handed to its worker for lack of descriptors or memory");
            p->master->storage_broken_until_s = qie_now_s() + 1;
            put_back(p->master, w, job);
        } else {
            w->dispatched = true;
            w->last_beat_s = qie_now_s();
            qie_json *o = qie_json_new_object();
            qie_json_put(o, "worker", qie_json_new_int(w->index));
            qie_json_put(o, "gpu_id", qie_json_new_int(w->gpu_id));
            svc_job_event(p->master, job, "started", o, true);
        }
    }
    if (p->fd >= 0)
        close(p->fd);
    free(p->prompt);
    free(p->negative);
    free(p);
}

static void give(svc_worker *w, svc_job *job) {
    svc_master *m = w->master;
    packing *p = calloc(1, sizeof *p);
    if (p) {
        p->prompt = strdup(job->row.prompt);
        p->negative = strdup(job->row.negative);
    }
    if (!p || !p->prompt || !p->negative) {
        if (p) {
            free(p->prompt);
            free(p->negative);
        }
        free(p);
        return;
    }
    p->task.run = pack;
    p->task.done = packed;
    p->master = m;
    p->worker = w;
    p->token = ++m->next_token;
    p->head.params = job->params;
    p->head.n_prompt = strlen(p->prompt);
    p->head.n_negative = strlen(p->negative);
    p->head.n_images = (uint64_t)job->n_inputs;
    memcpy(p->inputs, job->inputs, sizeof p->inputs);
    w->job = job;
    w->token = job->token = p->token;
    w->dispatched = false;
    w->stage_limit_s = 0;
    w->state = SVC_W_BUSY;
    w->last_beat_s = qie_now_s();
    job->worker = w;
    job->stage[0] = 0;
    job->step = job->total = 0;
    svc_jobs_served(m, job);
    svc_pool_post(m->pool, &p->task);
}

void svc_worker_cancel(svc_worker *w) {
    svc_message m;
    if (w->pid <= 0 || !w->job)
        return;
    svc_message_init(&m, SVC_MSG_CANCEL, w->token);
    svc_message_send(w->channel, &m, -1);
    if (w->cancel_at_s <= 0)
        w->cancel_at_s = qie_now_s();
}

/* ---------------------------------------------------------------- taking a result */

typedef struct collecting {
    svc_task task; /* first */
    svc_master *master;
    svc_job *job;
    int worker, gpu_id, fd;
    pid_t pid; /* of the process that sent it */
    int format, n_expected, output_fd;
    char id[SVC_ID_BYTES], *output_path;
    char model[128], precision[16];
    svc_result_head head;
    double queued_s;
    char names[SVC_MAX_RESULTS][QIE_HASH_HEX_MAX];
    int n_stored;
    bool garbage;
    char *result;
    qie_status status;
    qie_error error;
    double retry_at_s;
} collecting;

static bool head_is_sane(const collecting *c) {
    const svc_result_head *h = &c->head;
    int64_t total = (int64_t)sizeof *h;
    bool ok = h->n_images == (uint64_t)c->n_expected && h->n_warnings >= 0 && h->n_warnings <= 10 &&
              h->n_loras >= 0 && h->n_loras <= SVC_MAX_LORAS && h->cache >= 0 &&
              h->cache < QIE_CACHE_COUNT && h->seed <= SVC_MAX_SEED && h->width > 0 &&
              h->height > 0;
    for (uint64_t i = 0; ok && i < h->n_images; i++) {
        ok = h->image_bytes[i] > 0 && h->image_bytes[i] < (uint64_t)MAX_RESULT_BYTES;
        total += (int64_t)h->image_bytes[i];
    }
    return ok && svc_file_size(c->fd) == total;
}

/* The file under its name, whole or not at all. */
static qie_status write_output(collecting *c, const uint8_t *bytes, size_t n) {
    char aside[64], folder[256];
    const char *slash = strrchr(c->output_path, '/'), *name = slash ? slash + 1 : c->output_path;
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - c->output_path) : 1,
             slash ? c->output_path : ".");
    int dir = dup(c->output_fd);
    /* Part by part, so that no link on the way leads out. */
    for (char *part = folder; dir >= 0 && part && *part;) {
        char *next = strchr(part, '/');
        if (next)
            *next++ = 0;
        int inner = openat(dir, part, O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC);
        if (inner < 0 && errno == ENOENT && mkdirat(dir, part, 0777) == 0)
            inner = openat(dir, part, O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC);
        close(dir);
        dir = inner;
        part = next;
    }
    snprintf(aside, sizeof aside, ".%.40s.part", c->id);
    int fd = dir >= 0
                 ? openat(dir, aside, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644)
                 : -1;
    int cause = fd < 0 ? errno : qie_write_all(fd, bytes, n);
    bool ok = !cause && fsync(fd) == 0 && renameat(dir, aside, dir, name) == 0;
    cause = cause ? cause : errno;
    if (fd >= 0)
        close(fd);
    if (!ok && fd >= 0)
        unlinkat(dir, aside, 0);
    if (dir >= 0)
        close(dir);
    return ok ? QIE_OK
              : qie_fail(&c->error, QIE_E_INVALID, "output_path", "cannot write '%s': %s",
                         c->output_path, strerror(cause));
}

static bool collect_picture(collecting *c, int i, int64_t at) {
    size_t n = (size_t)c->head.image_bytes[i];
    uint8_t *bytes = malloc(n);
    qie_image_format format;
    int w, h;
    if (!bytes) {
        c->status = qie_fail(&c->error, QIE_E_NO_MEMORY, NULL, "no memory for the result");
        return false;
    }
    c->garbage = !svc_read_at(c->fd, bytes, n, at) ||
                 qie_image_probe(bytes, n, NULL, &format, &w, &h, NULL) != QIE_OK ||
                 (int)format != c->format || w != c->head.width || h != c->head.height;
    if (!c->garbage) {
        c->status = svc_store_put(c->master->store, bytes, n, c->names[i], &c->error);
        if (c->status == QIE_OK)
            c->n_stored = i + 1;
        if (c->status == QIE_OK && c->output_path)
            c->status = write_output(c, bytes, n);
    }
    free(bytes);
    return !c->garbage && c->status == QIE_OK;
}

static char *result_text(const collecting *c) {
    const svc_result_head *h = &c->head;
    qie_json *o = qie_json_new_object(), *files = qie_json_new_array(), *t = qie_json_new_object(),
             *warnings = qie_json_new_array(), *loras = qie_json_new_array();
    for (int i = 0; i < c->n_stored; i++) {
        qie_json *f = qie_json_new_object();
        qie_json_put(f, "file", qie_json_new_string(c->names[i]));
        qie_json_put(f, "bytes", qie_json_new_int((int64_t)h->image_bytes[i]));
        qie_json_push(files, f);
    }
    for (int i = 0; i < h->n_warnings; i++)
        qie_json_push(warnings, qie_json_new_string(h->warnings[i]));
    if (h->retried_f32)
        qie_json_push(warnings,
                      qie_json_new_string("computed again in f32: the fast precision overflowed"));
    for (int i = 0; i < h->n_loras; i++) {
        qie_json *l = qie_json_new_object();
        qie_json_put(l, "name", qie_json_new_string(h->loras[i].name));
        qie_json_put(l, "weight", qie_json_new_double(h->loras[i].weight));
        qie_json_push(loras, l);
    }
    qie_json_put(t, "queued_s", qie_json_new_double(c->queued_s));
    qie_json_put(t, "encode_s", qie_json_new_double(h->encode_s));
    qie_json_put(t, "denoise_s", qie_json_new_double(h->denoise_s));
    qie_json_put(t, "decode_s", qie_json_new_double(h->decode_s));
    qie_json_put(t, "total_s", qie_json_new_double(h->total_s));
    qie_json_put(o, "seed", qie_json_new_int((int64_t)h->seed));
    qie_json_put(o, "width", qie_json_new_int(h->width));
    qie_json_put(o, "height", qie_json_new_int(h->height));
    qie_json_put(o, "num_inference_steps", qie_json_new_int(h->num_inference_steps));
    qie_json_put(o, "true_cfg_scale", qie_json_new_double(h->true_cfg_scale));
    qie_json_put(o, "cfg", qie_json_new_bool(h->cfg != 0));
    qie_json_put(o, "model", qie_json_new_string(c->model));
    qie_json_put(o, "precision", qie_json_new_string(c->precision));
    qie_json_put(o, "cache", qie_json_new_string(qie_cache_name((qie_cache)h->cache)));
    if (h->cache != QIE_CACHE_OFF)
        qie_json_put(o, "skipped_forwards", qie_json_new_int(h->n_skipped));
    qie_json_put(o, "loras", loras);
    qie_json_put(o, "gpu_id", qie_json_new_int(c->gpu_id));
    if (h->placement[0])
        qie_json_put(o, "placement", qie_json_new_string(h->placement));
    qie_json_put(o, "output_format",
                 qie_json_new_string(svc_format_mime(c->format) + strlen("image/")));
    qie_json_put(o, "timings", t);
    qie_json_put(o, "warnings", warnings);
    if (c->output_path)
        qie_json_put(o, "output_path", qie_json_new_string(c->output_path));
    qie_json_put(o, "files", files);
    char *text = qie_json_text(o, 0);
    qie_json_free(o);
    return text;
}

static void collect(svc_task *t) {
    collecting *c = (collecting *)(void *)t;
    int64_t at = sizeof c->head;
    c->status = QIE_OK;
    c->garbage = !svc_read_at(c->fd, &c->head, sizeof c->head, 0) || !head_is_sane(c);
    for (int i = 0; i < 10; i++)
        svc_text_clean(c->head.warnings[i], sizeof c->head.warnings[i]);
    svc_text_clean(c->head.placement, sizeof c->head.placement);
    for (int i = 0; i < SVC_MAX_LORAS; i++)
        svc_text_clean(c->head.loras[i].name, sizeof c->head.loras[i].name);
    for (int i = 0; !c->garbage && i < c->n_expected; i++) {
        if (!collect_picture(c, i, at))
            return;
        at += (int64_t)c->head.image_bytes[i];
    }
    if (!c->garbage && !(c->result = result_text(c)))
        c->status = qie_fail(&c->error, QIE_E_NO_MEMORY, NULL, "out of memory");
}

static void release_collecting(collecting *c) {
    for (int i = 0; i < c->n_stored; i++)
        svc_store_unpin(c->master->store, c->names[i]);
    close(c->fd);
    free(c->output_path);
    free(c);
}

static void wait_and_collect(svc_task *t) {
    struct timespec pause = {.tv_sec = 1};
    nanosleep(&pause, NULL);
    collect(t);
}

static void collected(svc_task *t) {
    collecting *c = (collecting *)(void *)t;
    svc_master *m = c->master;
    svc_job *job = c->job;
    if (c->garbage) {
        svc_worker *w = &m->workers[c->worker];
        if (w->pid == c->pid)
            kill_worker(w, "the worker returned garbage", 2);
        job->finishing = false;
        svc_job_retry(m, job, "the worker returned garbage");
        release_collecting(c);
    } else if (c->status == QIE_E_IO && !m->stopping) {
        /* State folder full: the picture stays in memory until there is room; nothing new is
         * started. */
        svc_note_error(m, c->error.message);
        m->storage_broken_until_s = qie_now_s() + 3;
        for (int i = 0; i < c->n_stored; i++)
            svc_store_unpin(m->store, c->names[i]);
        c->n_stored = 0;
        c->task.run = wait_and_collect;
        svc_pool_post(m->pool, &c->task);
    } else if (c->status == QIE_E_IO)
        release_collecting(c); /* stays running in the file: run again after the restart */
    else {
        if (m->workers[c->worker].pid == c->pid)
            memcpy(m->workers[c->worker].placement, c->head.placement, sizeof c->head.placement);
        svc_histogram_add(&m->stage_s[0], c->head.encode_s);
        svc_histogram_add(&m->stage_s[1], c->head.denoise_s);
        svc_histogram_add(&m->stage_s[2], c->head.decode_s);
        svc_histogram_add(&m->stage_s[3], c->head.total_s);
        svc_histogram_add(&m->step_s, c->head.denoise_s / c->head.num_inference_steps);
        /* The pins go when the row that names the files is in. */
        memcpy(job->outputs, c->names, sizeof job->outputs);
        job->n_outputs = c->n_stored;
        c->n_stored = 0;
        svc_job_finish(m, job, c->status == QIE_OK ? SVC_COMPLETED : SVC_FAILED, c->result,
                       c->status == QIE_OK ? NULL : &c->error);
        release_collecting(c);
    }
}

static void take_result(svc_worker *w, svc_job *job, int fd) {
    collecting *c = calloc(1, sizeof *c);
    if (!c) {
        close(fd);
        svc_job_retry(w->master, job, "no memory for the result");
        return;
    }
    c->task.run = collect;
    c->task.done = collected;
    c->master = w->master;
    c->job = job;
    c->worker = w->index;
    c->pid = w->pid;
    c->gpu_id = w->gpu_id;
    c->fd = fd;
    c->format = job->params.format;
    c->n_expected = job->params.num_images;
    c->queued_s = job->started_s - job->created_s;
    c->output_fd = w->master->output_fd;
    memcpy(c->id, job->row.id, sizeof c->id);
    memcpy(c->model, w->master->model.name, sizeof c->model);
    memcpy(c->precision, w->master->model.precision, sizeof c->precision);
    qie_json *o = NULL;
    const char *path = NULL;
    if (qie_json_parse(job->row.response, strlen(job->row.response), "response", &o, NULL) ==
            QIE_OK &&
        qie_json_get_string(o, "output_path", NULL, &path, NULL) == QIE_OK && path)
        c->output_path = strdup(path);
    qie_json_free(o);
    job->worker = NULL;
    job->finishing = true; /* no cancel any more */
    svc_pool_post(w->master->pool, &c->task);
}

/* ---------------------------------------------------------------- messages */

static void on_ready(svc_worker *w, const svc_message *m, int fd) {
    svc_model_info info;
    if (fd < 0 || svc_file_size(fd) < (int64_t)sizeof info ||
        !svc_read_at(fd, &info, sizeof info, 0)) {
        kill_worker(w, "the worker spoke nonsense at its start", 2);
        return;
    }
    svc_text_clean(info.model, sizeof info.model);
    svc_text_clean(info.name, sizeof info.name);
    svc_text_clean(info.precision, sizeof info.precision);
    svc_text_clean(info.backend, sizeof info.backend);
    svc_text_clean(info.cpu_level, sizeof info.cpu_level);
    svc_text_clean(info.about_en, sizeof info.about_en);
    svc_text_clean(info.about_zh, sizeof info.about_zh);
    if (!w->master->tokens) /* all workers have the same model */
        w->master->tokens = svc_tokens_create(&info, fd);
    w->master->model = info;
    w->master->has_model = true;
    w->state = SVC_W_READY;
    w->ready_s = qie_now_s();
    w->deaths_unready = 0;
    w->hopeless = false;
    svc_log(QIE_LOG_INFO, "worker", NULL, "worker %d ready after %.1f s: model %s, %s (%s)",
            w->index, w->ready_s - w->started_s, info.name, info.precision, m->text);
}

static void on_progress(svc_worker *w, const svc_message *m) {
    svc_job *job = w->job;
    snprintf(job->stage, sizeof job->stage, "%s", m->stage);
    job->step = m->step;
    job->total = m->total;
    job->seconds_left = m->seconds_left;
    if (m->kind != SVC_MSG_PROGRESS)
        return;
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "stage", qie_json_new_string(m->stage));
    qie_json_put(o, "step", qie_json_new_int(m->step));
    qie_json_put(o, "total", qie_json_new_int(m->total));
    if (m->n_images > 1) {
        qie_json_put(o, "i_image", qie_json_new_int(m->i_image));
        qie_json_put(o, "n_images", qie_json_new_int(m->n_images));
    }
    qie_json_put(o, "eta_s",
                 m->seconds_left < 0 ? qie_json_new_null() : qie_json_new_double(m->seconds_left));
    svc_job_event(w->master, job, "progress", o, true);
}

static void on_preview(svc_worker *w, const svc_message *m, int fd) {
    int64_t n = fd >= 0 ? svc_file_size(fd) : 0;
    bool wanted = false;
    for (const svc_listener *l = w->job->listeners; l; l = l->next)
        wanted = wanted || l->wants_previews;
    if (!wanted || n <= 0 || n > (1 << 20))
        return;
    uint8_t *bytes = malloc((size_t)n);
    char *text = malloc(svc_base64_length((size_t)n) + 1);
    if (bytes && text && svc_read_at(fd, bytes, (size_t)n, 0)) {
        svc_base64_encode(bytes, (size_t)n, text);
        text[svc_base64_length((size_t)n)] = 0;
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "step", qie_json_new_int(m->step));
        qie_json_put(o, "total", qie_json_new_int(m->total));
        qie_json_put(o, "b64_json", qie_json_new_string(text));
        svc_job_event(w->master, w->job, "preview", o, false);
    }
    free(bytes);
    free(text);
}

static void on_failed(svc_worker *w, const svc_message *m) {
    svc_job *job = w->job;
    svc_master *master = w->master;
    qie_error e;
    bool known = m->status > QIE_OK && m->status < QIE_E_COUNT;
    qie_fail(&e, known ? (qie_status)m->status : QIE_E_INTERNAL, m->param, "%s", m->text);
    w->job = NULL;
    w->token = 0;
    w->state = SVC_W_READY;
    w->cancel_at_s = 0;
    job->worker = NULL;
    svc_job_finish(master, job, e.status == QIE_E_CANCELLED ? SVC_CANCELLED : SVC_FAILED, NULL, &e);
}

static void on_done(svc_worker *w, int fd) {
    svc_job *job = w->job;
    w->job = NULL;
    w->token = 0;
    w->state = SVC_W_READY;
    w->cancel_at_s = 0;
    w->jobs_done++;
    w->deaths_young = 0;
    take_result(w, job, fd);
}

/* Returns the descriptor when it is still to be closed. */
static int on_message(svc_worker *w, const svc_message *m, int fd) {
    bool mine = w->job && w->dispatched && m->token == w->token;
    w->last_beat_s = qie_now_s();
    w->stage_limit_s = m->stage_limit_s > 0 ? m->stage_limit_s : w->stage_limit_s;
    if (m->memory_used_bytes > 0) {
        w->memory_used = m->memory_used_bytes;
        w->memory_free = m->memory_free_bytes;
    }
    if (m->kind == SVC_MSG_READY && w->state < SVC_W_READY)
        on_ready(w, m, fd);
    else if (m->kind == SVC_MSG_BEAT && w->state == SVC_W_STARTING)
        w->state = SVC_W_LOADING;
    else if (m->kind == SVC_MSG_FAILED && !m->token) {
        if (!w->death_note[0]) {
            snprintf(w->death_note, sizeof w->death_note, "%s", m->text);
            w->master->death_reasons[w->index][3]++;
        }
    } else if (mine && (m->kind == SVC_MSG_PROGRESS || m->kind == SVC_MSG_BEAT))
        on_progress(w, m);
    else if (mine && m->kind == SVC_MSG_PREVIEW)
        on_preview(w, m, fd);
    else if (mine && m->kind == SVC_MSG_FAILED)
        on_failed(w, m);
    else if (mine && m->kind == SVC_MSG_DONE && fd >= 0) {
        on_done(w, fd);
        return -1;
    } else if (m->kind == SVC_MSG_DONE || m->kind == SVC_MSG_FAILED || m->kind > SVC_MSG_FAILED ||
               m->kind < SVC_MSG_BEAT)
        kill_worker(w, "the worker sent a message that makes no sense and was ended", 2);
    return fd;
}

static void on_channel(void *arg, uint32_t events) {
    svc_worker *w = arg;
    svc_message m;
    int fd, rc;
    (void)events;
    /* A bounded number at once, so that a flood from one worker does not starve the others. */
    for (int i = 0;
         i < 64 && w->channel_watch && (rc = svc_message_receive(w->channel, &m, &fd)) != 0; i++) {
        if (rc < 0) {
            svc_loop_unwatch(w->master->loop, w->channel_watch);
            w->channel_watch = NULL;
            if (rc == SVC_NONSENSE)
                kill_worker(w, "the worker sent garbage and was ended", 2);
            else if (w->pid > 0)
                kill(w->pid, SIGKILL); /* a closed channel is a death in progress */
            return;
        }
        fd = on_message(w, &m, fd);
        if (fd >= 0)
            close(fd);
    }
}

/* ---------------------------------------------------------------- the whole */

void svc_workers_start(svc_master *m) {
    m->n_workers = m->o.n_gpus ? m->o.n_gpus : m->o.n_workers;
    for (int i = 0; i < m->n_workers; i++) {
        svc_worker *w = &m->workers[i];
        memset(w, 0, sizeof *w);
        w->master = m;
        w->index = i;
        w->gpu = m->o.n_gpus ? m->o.gpus[i].bind : NULL;
        w->gpu_id = w->gpu ? m->o.gpus[i].index : -1;
        w->pidfd = w->channel = w->output = -1;
        if (!start(w))
            plan_restart(w);
    }
}

static void check(svc_worker *w, double now) {
    svc_master *m = w->master;
    if (w->pid == 0) {
        if (!m->stopping && now >= w->restart_at_s && !start(w)) {
            w->deaths_young++;
            plan_restart(w);
        }
        return;
    }
    double limit = m->o.hang_limit_s;
    if (5 * w->stage_limit_s > limit)
        limit = 5 * w->stage_limit_s;
    if (w->state == SVC_W_BUSY && w->dispatched && now - w->last_beat_s > limit)
        kill_worker(w, "the worker gave no sign of life and was ended", 1);
    else if (w->state < SVC_W_READY && now - w->last_beat_s > m->o.hang_limit_s)
        kill_worker(w, "the worker gave no sign of life at its start", 1);
    else if (w->cancel_at_s > 0 && now - w->cancel_at_s > CANCEL_WITHIN_S)
        kill_worker(w, "the worker did not obey a cancel", 1);
}

void svc_workers_tick(svc_master *m) {
    double now = qie_now_s();
    for (int i = 0; i < m->n_workers; i++) {
        svc_worker *w = &m->workers[i];
        check(w, now);
        svc_job *job;
        if (w->state == SVC_W_READY && w->pid > 0 && !m->stopping &&
            now >= m->storage_broken_until_s && (job = svc_jobs_pick(m)) != NULL)
            give(w, job);
    }
}

void svc_workers_stop(svc_master *m) {
    for (int i = 0; i < m->n_workers; i++) {
        svc_worker *w = &m->workers[i];
        if (w->pid > 0) {
            kill(w->pid, SIGKILL);
            waitpid(w->pid, NULL, 0);
        }
        forget_process(w);
    }
}

int svc_workers_ready(const svc_master *m) {
    int n = 0;
    for (int i = 0; i < m->n_workers; i++)
        n += m->workers[i].state == SVC_W_READY || m->workers[i].state == SVC_W_BUSY;
    return n;
}

static qie_json *worker_json(const svc_worker *w) {
    qie_json *o = qie_json_new_object(), *mem = qie_json_new_object();
    bool ready = w->state == SVC_W_READY || w->state == SVC_W_BUSY;
    qie_json_put(o, "id", qie_json_new_int(w->index));
    qie_json_put(o, "gpu_id", qie_json_new_int(w->gpu_id));
    qie_json_put(o, "gpu_name",
                 qie_json_new_string(w->gpu ? w->master->o.gpus[w->index].name : "CPU"));
    if (w->gpu)
        qie_json_put(o, "placement",
                     w->placement[0] ? qie_json_new_string(w->placement) : qie_json_new_null());
    qie_json_put(o, "pid", qie_json_new_int(w->pid));
    qie_json_put(o, "ready", qie_json_new_bool(ready));
    qie_json_put(o, "state", qie_json_new_string(STATES[w->state]));
    qie_json_put(o, "queue_len", qie_json_new_int(w->job ? 1 : 0));
    qie_json_put(o, "jobs_done", qie_json_new_int(w->jobs_done));
    qie_json_put(o, "restarts", qie_json_new_int(w->restarts));
    qie_json_put(o, "last_error",
                 w->last_error[0] ? qie_json_new_string(w->last_error) : qie_json_new_null());
    qie_json_put(o, "last_error_at",
                 w->last_error[0] ? qie_json_new_int((int64_t)w->last_error_at)
                                  : qie_json_new_null());
    qie_json_put(o, "uptime_s", qie_json_new_double(w->pid > 0 ? qie_now_s() - w->started_s : 0));
    qie_json_put(mem, "used_mb", qie_json_new_int(w->memory_used >> 20));
    qie_json_put(mem, "free_mb", qie_json_new_int(w->memory_free >> 20));
    qie_json_put(o, "memory", mem);
    if (w->job) {
        qie_json *c = qie_json_new_object();
        qie_json_put(c, "job_id", qie_json_new_string(w->job->row.id));
        qie_json_put(c, "step", qie_json_new_int(w->job->step));
        qie_json_put(c, "total", qie_json_new_int(w->job->total));
        qie_json_put(o, "current", c);
    } else
        qie_json_put(o, "current", qie_json_new_null());
    return o;
}

qie_json *svc_workers_json(svc_master *m) {
    qie_json *a = qie_json_new_array();
    for (int i = 0; i < m->n_workers; i++)
        qie_json_push(a, worker_json(&m->workers[i]));
    return a;
}
