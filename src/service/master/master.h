/* The master: what it is started with, what it holds, and the parts it is made of. One thread (the
 * loop) owns everything here; files, parsing and the database's writes happen in threads that hand
 * results back to it (tasks.h). The parts: jobs.c        the queue in memory: states, order, events
 *   supervisor.c  worker processes
 *   tokens.c      how many tokens a prompt takes
 *   submit.c      from a request to an accepted job and to its answer
 *   routes.c      what is served where
 *   metrics.c     numbers for whoever watches
 *   master.c      start, loop, end */
#ifndef QIE_SERVICE_MASTER_H
#define QIE_SERVICE_MASTER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "qie/edit.h"
#include "service/common/job.h"
#include "service/common/message.h"
#include "service/master/http.h"
#include "service/master/loop.h"
#include "service/master/queue_db.h"
#include "service/master/request.h"
#include "service/master/store.h"
#include "service/master/tasks.h"

#define SVC_MAX_WORKERS 64
#define SVC_MAX_ATTEMPTS 3
#define SVC_MAX_LIST 32

typedef struct svc_gpu {
    int index;       /* physical */
    char bind[2048]; /* value of CUDA_VISIBLE_DEVICES: one card, or several used together */
    char name[96];   /* what people call it */
} svc_gpu;

typedef struct svc_options {
    const char *host;
    int port, api_port;                 /* api_port 0: none */
    const char *state_dir, *output_dir; /* output_dir NULL: none */
    const char *lora_dir;               /* NULL: requests may name no LoRA */
    qie_cache cache;                    /* of requests that name none */
    svc_gpu gpus[SVC_MAX_WORKERS];
    int n_gpus; /* 0: the CPU */
    int n_workers;
    const char *program;            /* of the workers */
    const char *worker_args[80];    /* ended by NULL */
    const char *keys[SVC_MAX_LIST]; /* ended by NULL */
    const char *key_file;
    const char *origins[SVC_MAX_LIST], *cidrs[SVC_MAX_LIST], *proxies[SVC_MAX_LIST];
    int queue_size, max_images, max_connections;
    int64_t max_body_memory;
    double sync_timeout_s, keep_s, hang_limit_s;
    bool no_image_url, reject_while_loading, log_json;
    const char *version, *model_revision; /* revision "": unknown */
} svc_options;

typedef struct svc_event {
    int64_t id;
    const char *name; /* static */
    char *data;       /* JSON; owned */
} svc_event;

typedef struct svc_job svc_job;
typedef struct svc_worker svc_worker;
typedef struct svc_master svc_master;

/* One who asks: its turn in the round, and what it has waiting. */
typedef struct svc_client {
    char name[96];
    uint64_t turn; /* when it was served last; 0: never */
    int n_jobs;    /* in the table */
    int n_waiting; /* of them in the queue, and submissions on their way there */
    int ranks[10]; /* scratch: its waiting jobs seen so far, by priority */
    struct svc_client *next;
} svc_client;
#define SVC_CLIENT_SLOTS 512

/* Somebody who waits for what happens to a job. */
typedef struct svc_listener svc_listener;
struct svc_listener {
    void (*fn)(svc_listener *l, svc_job *job, const svc_event *e);
    svc_job *job; /* NULL: detached */
    svc_listener *next;
    bool wants_previews, wants_places;
};

struct svc_job {
    svc_row row;
    svc_params params;
    char inputs[SVC_MAX_PICTURES][QIE_HASH_HEX_MAX];
    int n_inputs;
    char outputs[SVC_MAX_RESULTS][QIE_HASH_HEX_MAX]; /* pinned until the end is in the file */
    int n_outputs;
    svc_client *client;
    uint64_t order; /* of acceptance */
    bool accepted;  /* in the file */
    bool finishing; /* its end is being written */
    bool cancel;    /* asked for */
    svc_worker *worker;
    uint64_t token;
    double created_s, started_s; /* monotonic */
    char stage[24];
    int step, total;
    double seconds_left;
    int rank, position; /* as of the last reckoning */
    int told;           /* the place that listeners know; -1: none */
    int64_t next_event;
    svc_event events[40];
    int n_events;
    svc_listener *listeners;
    svc_job *next;
};

typedef enum svc_worker_state {
    SVC_W_STARTING = 0,
    SVC_W_LOADING,
    SVC_W_READY,
    SVC_W_BUSY,
    SVC_W_RESTARTING,
    SVC_W_FAILED
} svc_worker_state;

struct svc_worker {
    svc_master *master;
    int index;
    const char *gpu; /* NULL: CPU */
    int gpu_id;
    svc_worker_state state;
    pid_t pid;
    int pidfd, channel, output;
    svc_watch *pid_watch, *channel_watch, *output_watch;
    char line[600]; /* begun by its standard error */
    size_t n_line;
    svc_job *job;
    uint64_t token;
    bool dispatched; /* the job has reached the process */
    int64_t jobs_done, restarts, deaths_young, deaths_unready;
    bool was_killed; /* the last one, by SIGKILL that was not ours */
    bool hopeless;   /* died again and again before it was ready */
    double started_s, ready_s, last_beat_s, restart_at_s, stage_limit_s, cancel_at_s;
    int64_t memory_used, memory_free;
    char last_error[1024], death_note[1024];
    char placement[512]; /* of its last edit, on GPUs; "": none yet */
    double last_error_at;
};

typedef struct svc_count {
    char route[40];
    int code;
    int64_t n;
} svc_count;

#define SVC_BUCKETS 12
typedef struct svc_histogram {
    int64_t counts[SVC_BUCKETS + 1]; /* the last one: above all bounds */
    double sum;
} svc_histogram;

struct svc_master {
    svc_options o;
    svc_loop *loop;
    svc_done *done;
    svc_pool *pool, *fetchers;
    struct svc_lora_presets *lora_presets; /* NULL: no folder of LoRAs */
    svc_store *store;
    svc_db *db;
    svc_http *http;
    svc_worker workers[SVC_MAX_WORKERS];
    int n_workers;
    svc_job *jobs, **last_job; /* accepted or nearly so, not ended; in order of acceptance */
    int n_queued, n_reserved;
    uint64_t next_token, turn, next_order;
    svc_client *clients[SVC_CLIENT_SLOTS]; /* by hash of the name */
    int n_clients;
    bool places_stale, places_untold;
    double next_places_s;
    struct svc_ending *stuck; /* ends that wait for room in the state folder */
    double retry_stuck_s;
    svc_model_info model;
    bool has_model;
    struct svc_tokens *tokens; /* NULL: the model is not known yet, or its worker gave none */
    pid_t pid;
    double start_s, start_at;
    double average_job_s; /* 0: unknown */
    char *keys[64];
    int n_keys;
    bool stopping;
    bool closing; /* workers are gone: whoever leaves now cancels nothing */
    double stop_at_s;
    char last_error[512];
    double last_error_at, storage_broken_until_s;
    int lock_fd, output_fd;
    /* metrics */
    svc_count counts[256];
    int n_counts;
    int64_t n_ended[6];
    svc_histogram stage_s[4], wait_s, step_s;
    int64_t death_reasons[SVC_MAX_WORKERS][4];
    double next_expiry_s;
};

double svc_clock(void); /* seconds since 1970 */
/* {"error":{...}} with the proper status. status 0: from the error's category. */
void svc_reply_error(svc_call *call, int status, const qie_error *e);
void svc_reply_json(svc_call *call, int status, qie_json *take);
qie_json *svc_error_json(const qie_error *e);
void svc_note_error(svc_master *m, const char *text);

/* jobs.c */
qie_status svc_jobs_recover(svc_master *m, qie_error *err);
/* From a row (its strings are taken over). NULL and the row untouched on failure. */
svc_job *svc_job_from_row(svc_master *m, svc_row *row);
void svc_job_append(svc_master *m, svc_job *job);
svc_job *svc_job_find(svc_master *m, const char *id);
svc_job *svc_job_find_key(svc_master *m, const char *client, const char *key);
void svc_job_listen(svc_job *job, svc_listener *l);
void svc_job_unlisten(svc_listener *l);
/* Takes data. Kept for later listeners when `keep`. */
void svc_job_event(svc_master *m, svc_job *job, const char *name, qie_json *data, bool keep);
/* Write the end and then tell it. status, result (JSON text, taken) or error. */
void svc_job_finish(svc_master *m, svc_job *job, svc_status status, char *result,
                    const qie_error *error);
/* Worker died under it. */
void svc_job_retry(svc_master *m, svc_job *job, const char *reason);
bool svc_job_cancel(svc_master *m, svc_job *job);
void svc_job_free(svc_job *job);
/* The next to run, or NULL. */
svc_job *svc_jobs_pick(svc_master *m);
void svc_jobs_served(svc_master *m, svc_job *job);
/* Now and then: tell waiting jobs their new places when someone listens, write what is stuck. */
void svc_jobs_tick(svc_master *m);
int svc_job_position(svc_master *m, const svc_job *job);
/* The place as an event, unless it was told. */
void svc_job_tell_place(svc_master *m, svc_job *job);
/* The order of waiting jobs is another one. */
void svc_jobs_changed(svc_master *m);
/* The job enters (+1) or leaves (-1) those that wait. */
void svc_job_waiting(svc_master *m, svc_job *job, int change);
/* Made when there is none of the name; NULL: no memory. */
svc_client *svc_client_get(svc_master *m, const char *name);
/* Take a job that never came to be out of the table; does not free it. */
void svc_job_take_out(svc_master *m, svc_job *job);
void svc_jobs_close(svc_master *m);
double svc_job_eta(const svc_master *m, int position);
/* May this client put another job in? Errors: QIE_E_BUSY. */
qie_status svc_jobs_admit(svc_master *m, const char *client, qie_error *err);
int svc_retry_after(const svc_master *m);
double svc_jobs_oldest(const svc_master *m);

/* supervisor.c */
void svc_workers_start(svc_master *m);
/* Give jobs to free workers, restart dead ones, kill hung ones. */
void svc_workers_tick(svc_master *m);
void svc_worker_cancel(svc_worker *w);
void svc_workers_stop(svc_master *m);
int svc_workers_ready(const svc_master *m);
qie_json *svc_workers_json(svc_master *m);

/* submit.c */
void svc_submit(svc_master *m, svc_call *call, svc_flavour flavour);
void svc_submit_tick(svc_master *m, bool comment);
/* The service ends: whoever waits is told so. */
void svc_submit_stop(svc_master *m);
/* fetch.c: from a thread. Errors: QIE_E_INVALID (param image_url). */
typedef struct svc_fetch_rules {
    const char *const *cidrs;
} svc_fetch_rules;
qie_status svc_fetch(const svc_fetch_rules *rules, const char *url, uint8_t **out, size_t *n,
                     qie_error *err);
/* "10.0.0.0/8" holds the address? Also IPv4 inside IPv6. */
bool svc_cidr_has(const char *cidr, const void *sockaddr_storage);

/* metrics.c */
void svc_histogram_add(svc_histogram *h, double seconds);
/* GET /metrics: Prometheus text. */
void svc_metrics(svc_master *m, svc_call *call);

/* routes.c */
void svc_route_head(void *arg, svc_call *call);
void svc_route_request(void *arg, svc_call *call);
void svc_streams_tick(svc_master *m);
void svc_streams_stop(svc_master *m);
void svc_route_answer(void *arg, svc_call *call, int status);
qie_status svc_keys_load(svc_master *m, qie_error *err);

/* Run until told to stop. Errors: QIE_E_IO, QIE_E_CONFLICT (another master), QIE_E_CORRUPT. */
qie_status svc_master_run(const svc_options *options, qie_error *err);

#endif
