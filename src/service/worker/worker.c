/* One thread computes; one listens, so that a cancel or the master's end reaches a running edit.
 * Pictures are decoded here, in the process that may be lost. */
#define _GNU_SOURCE
#include "service/worker/worker.h"

#include <errno.h>
#include <execinfo.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "base/rng.h"
#include "model/model.h"
#include "plan/memory.h"
#include "service/common/message.h"
#include "service/worker/sandbox.h"

#define PREVIEW_QUALITY 75
#define BEAT_EVERY_S 0.2     /* a block of a small model takes microseconds */
#define LOADING_BEAT_MS 1000 /* while the model is opened */
#define MAX_INPUT_BYTES (64ull << 20)
#define DECODE_BYTES_PER_PIXEL 8 /* RGB, a rotated copy, RGBA rows of the codec */
#define PROBE_ABOVE_FLOPS 5e10   /* of one block: a second on a slow core */
#define SLOWEST_FLOPS_PER_S 2e9  /* one core without vector units: the limit until the probe */

typedef struct worker {
    int channel;
    const char *lora_dir; /* NULL: none */
    qie_cache cache;      /* of jobs that name none */
    qie_engine *engine;
    pthread_mutex_t lock; /* of everything below, and of sends */
    pthread_cond_t wake;
    uint64_t running, cancelled; /* tokens */
    bool has_job, quit, loading, gpu;
    svc_message job;
    int job_fd;
    int n_blocks; /* of the transformer */
    /* of the running job, computing thread only */
    double last_beat, block_s; /* block_s: the longest silence to expect */
    int last_step, last_image;
    char last_stage[24];
} worker;

/* For the crash handler: what was being done. */
static char crash_job[SVC_ID_BYTES], crash_stage[24];
static volatile int crash_step;

static void on_crash(int signal_number) {
    char line[160];
    void *frames[32];
    int n = snprintf(line, sizeof line, "worker: signal %d in job %s, stage %s, step %d\n",
                     signal_number, crash_job, crash_stage, crash_step);
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)n);
    (void)ignored;
    backtrace_symbols_fd(frames, backtrace(frames, 32), STDERR_FILENO);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void install_crash_handler(void) {
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    void *frames[2];
    backtrace(frames, 2); /* loads libgcc now, while files may be opened */
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        signal(signals[i], on_crash);
}

static void tell_memory(svc_message *m) {
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%*s %ld", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    m->memory_used_bytes = (int64_t)pages * sysconf(_SC_PAGESIZE);
    m->memory_free_bytes = qie_memory_available();
}

static void say(worker *w, const svc_message *m, int fd) {
    pthread_mutex_lock(&w->lock);
    bool ok = svc_message_send(w->channel, m, fd);
    pthread_mutex_unlock(&w->lock);
    if (!ok)
        _exit(0); /* the master is gone, and so is the reason to go on */
}

/* ---------------------------------------------------------------- the listening thread */

static void take(worker *w, const svc_message *m, int fd) {
    pthread_mutex_lock(&w->lock);
    if (m->kind == SVC_MSG_JOB && !w->has_job) {
        w->job = *m;
        w->job_fd = fd;
        w->has_job = true;
        fd = -1;
    } else if (m->kind == SVC_MSG_CANCEL) {
        w->cancelled = m->token;
        if (w->running == m->token)
            qie_engine_cancel(w->engine);
    } else if (m->kind == SVC_MSG_QUIT)
        w->quit = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    if (fd >= 0)
        close(fd);
}

/* What shows from outside that something goes on: bytes and pages read from the disk, and while
 * the model is opened also time on the processor. An endless loop in an edit must not count. */
static int64_t signs_of_life(bool loading) {
    struct rusage r;
    if (getrusage(RUSAGE_SELF, &r))
        return 0;
    int64_t n = (int64_t)r.ru_inblock + r.ru_majflt;
    if (loading) /* in units of 10 ms: this thread itself takes less than one between two looks */
        n += (int64_t)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 100 +
             (r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 10000;
    return n;
}

static void *listen_to_master(void *arg) {
    worker *w = arg;
    int64_t seen = 0;
    for (;;) {
        struct pollfd p = {.fd = w->channel, .events = POLLIN};
        int n = poll(&p, 1, LOADING_BEAT_MS);
        pthread_mutex_lock(&w->lock);
        bool loading = w->loading, running = w->running != 0;
        pthread_mutex_unlock(&w->lock);
        int64_t now = n == 0 && (loading || running) ? signs_of_life(loading) : seen;
        if (now != seen) {
            seen = now;
            svc_message beat;
            svc_message_init(&beat, SVC_MSG_BEAT, 0);
            snprintf(beat.stage, sizeof beat.stage, "load");
            tell_memory(&beat);
            say(w, &beat, -1);
        }
        if (n <= 0)
            continue;
        svc_message m;
        int fd;
        int rc = svc_message_receive(w->channel, &m, &fd);
        if (rc < 0)
            _exit(0);
        if (rc > 0)
            take(w, &m, fd);
    }
    return NULL;
}

/* ---------------------------------------------------------------- progress */

static void send_preview(worker *w, const qie_progress *p) {
    qie_image_encode_options o = qie_image_encode_options_default();
    uint8_t *bytes;
    size_t n;
    o.format = QIE_IMAGE_JPEG;
    o.quality = PREVIEW_QUALITY;
    if (qie_image_encode(p->preview, &o, &bytes, &n, NULL) != QIE_OK)
        return;
    svc_part part = {bytes, n};
    int fd = svc_memory_file("preview", &part, 1);
    if (fd >= 0) {
        svc_message m;
        svc_message_init(&m, SVC_MSG_PREVIEW, w->running);
        m.step = p->step;
        m.total = p->total;
        say(w, &m, fd);
        close(fd);
    }
    free(bytes);
}

static void on_progress(void *arg, const qie_progress *p) {
    worker *w = arg;
    double now = qie_now_s();
    bool news =
        strcmp(w->last_stage, p->stage) || p->step != w->last_step || p->i_image != w->last_image;
    crash_step = p->step;
    if (!news && now - w->last_beat < BEAT_EVERY_S)
        return;
    /* The longest silence so far is the estimate of how long a block takes. */
    if (w->last_beat > 0 && now - w->last_beat > w->block_s)
        w->block_s = now - w->last_beat;
    w->last_beat = now;
    w->last_step = p->step;
    w->last_image = p->i_image;
    snprintf(w->last_stage, sizeof w->last_stage, "%s", p->stage);
    snprintf(crash_stage, sizeof crash_stage, "%s", p->stage);
    svc_message m;
    svc_message_init(&m, news ? SVC_MSG_PROGRESS : SVC_MSG_BEAT, w->running);
    snprintf(m.stage, sizeof m.stage, "%s", p->stage);
    m.step = p->step;
    m.total = p->total;
    m.i_image = p->i_image;
    m.n_images = p->n_images;
    m.seconds_left = p->seconds_left;
    m.elapsed_s = p->elapsed_s;
    m.stage_limit_s = w->block_s;
    tell_memory(&m);
    say(w, &m, -1);
    if (p->preview)
        send_preview(w, p);
}

/* ---------------------------------------------------------------- one job */

typedef struct job {
    svc_job_head head;
    char *prompt, *negative;
    uint8_t *bytes[SVC_MAX_PICTURES];
    qie_image *pictures[SVC_MAX_PICTURES];
    char *lora_paths[SVC_MAX_LORAS];
    qie_lora_use loras[SVC_MAX_LORAS];
    bool seed_repeated;
    uint64_t made_with;
} job;

static char *read_text(int fd, uint64_t n, int64_t *at) {
    char *s = n <= (1u << 20) ? malloc((size_t)n + 1) : NULL;
    if (s && !svc_read_at(fd, s, (size_t)n, *at)) {
        free(s);
        return NULL;
    }
    if (s)
        s[n] = 0;
    *at += (int64_t)n;
    return s;
}

static qie_status read_job(int fd, job *j, qie_error *err) {
    int64_t at = sizeof j->head;
    memset(j, 0, sizeof *j);
    QIE_FAIL_IF(!svc_read_at(fd, &j->head, sizeof j->head, 0) ||
                    j->head.n_images > SVC_MAX_PICTURES || j->head.params.n_loras > SVC_MAX_LORAS,
                QIE_E_INTERNAL, err, NULL, "the job cannot be read");
    j->prompt = read_text(fd, j->head.n_prompt, &at);
    j->negative = read_text(fd, j->head.n_negative, &at);
    QIE_FAIL_IF(!j->prompt || !j->negative, QIE_E_INTERNAL, err, NULL, "the job cannot be read");
    for (uint64_t i = 0; i < j->head.n_images; i++) {
        uint64_t n = j->head.image_bytes[i];
        j->bytes[i] = n <= MAX_INPUT_BYTES ? malloc((size_t)n + 1) : NULL;
        QIE_FAIL_IF(!j->bytes[i], QIE_E_NO_MEMORY, err, "image", "no memory for picture %d",
                    (int)i + 1);
        QIE_FAIL_IF(!svc_read_at(fd, j->bytes[i], (size_t)n, at), QIE_E_INTERNAL, err, NULL,
                    "the job cannot be read");
        at += (int64_t)n;
    }
    return QIE_OK;
}

static void job_release(job *j) {
    free(j->prompt);
    free(j->negative);
    for (int i = 0; i < SVC_MAX_PICTURES; i++) {
        free(j->bytes[i]);
        qie_image_destroy(j->pictures[i]);
    }
    for (int i = 0; i < SVC_MAX_LORAS; i++)
        free(j->lora_paths[i]);
}

/* The seed in the parameters that we wrote into a picture; all ones when it has none. Damaged
 * metadata is no reason to refuse a picture. */
static uint64_t seed_of(const uint8_t *bytes, size_t n) {
    char *text = NULL;
    qie_json *o = NULL;
    int64_t value = -1;
    if (qie_image_read_parameters(bytes, n, &text, NULL) == QIE_OK && text &&
        qie_json_parse(text, strlen(text), "metadata", &o, NULL) == QIE_OK &&
        qie_json_get_int(o, "seed", -1, 0, INT64_MAX, &value, NULL) != QIE_OK)
        value = -1;
    qie_json_free(o);
    free(text);
    return (uint64_t)value;
}

static qie_status decode(job *j, qie_error *err) {
    for (uint64_t i = 0; i < j->head.n_images; i++) {
        qie_status st = qie_image_decode(j->bytes[i], (size_t)j->head.image_bytes[i], NULL,
                                         &j->pictures[i], err);
        if (st != QIE_OK) {
            qie_error_context(err, "decoding picture %d", (int)i + 1);
            if (err)
                snprintf(err->param, sizeof err->param, "image");
            return st;
        }
        j->seed_repeated |=
            seed_of(j->bytes[i], (size_t)j->head.image_bytes[i]) == j->head.params.seed;
    }
    j->made_with = j->head.params.seed;
    if (j->seed_repeated && !j->head.params.force_seed)
        j->head.params.seed = qie_derived_seed(j->made_with);
    return QIE_OK;
}

/* The files that the job's LoRAs stand for; *bytes: the room that copies of parts of them may take
 * at most. */
static qie_status find_loras(const worker *w, job *j, int64_t *bytes, qie_error *err) {
    _Static_assert(SVC_MAX_LORAS == QIE_MAX_LORAS && SVC_LORA_NAME == QIE_LORA_NAME, "one limit");
    *bytes = 0;
    for (int i = 0; i < j->head.params.n_loras; i++) {
        svc_lora *l = &j->head.params.loras[i];
        struct stat s;
        svc_text_clean(l->name, sizeof l->name);
        j->lora_paths[i] = w->lora_dir ? svc_lora_path(w->lora_dir, l->name) : NULL;
        QIE_FAIL_IF(!j->lora_paths[i] || stat(j->lora_paths[i], &s) || !S_ISREG(s.st_mode),
                    QIE_E_NOT_FOUND, err, "lora", "LoRA '%s' is no longer in the service's folder",
                    l->name);
        j->loras[i] =
            (qie_lora_use){.path = j->lora_paths[i], .weight = l->weight, .name = l->name};
        *bytes += s.st_size;
    }
    return QIE_OK;
}

/* Where the service keeps its files is nobody's business: of a LoRA's path the message keeps the
 * name. */
static void hide_folder(const job *j, qie_error *err) {
    for (int i = 0; i < SVC_MAX_LORAS; i++) {
        const char *path = j->lora_paths[i], *slash = path ? strrchr(path, '/') : NULL;
        size_t n_folder = slash ? (size_t)(slash - path) + 1 : 0;
        for (char *at = err->message; n_folder && (at = strstr(at, path)) != NULL;)
            memmove(at, at + n_folder, strlen(at + n_folder) + 1);
    }
}

static qie_edit_options options_of(worker *w, const job *j, const qie_image **views) {
    qie_edit_options o = qie_edit_options_default();
    const svc_params *p = &j->head.params;
    for (uint64_t i = 0; i < j->head.n_images; i++)
        views[i] = j->pictures[i];
    o.images = views;
    o.n_images = (size_t)j->head.n_images;
    o.prompt = j->prompt;
    o.negative_prompt = j->negative;
    o.seed = p->seed;
    o.num_inference_steps = p->num_inference_steps;
    o.true_cfg_scale = p->true_cfg_scale;
    o.guidance_scale = p->guidance_scale;
    o.max_side = p->max_side;
    o.width = p->width;
    o.height = p->height;
    o.ref_area = p->ref_area;
    o.keep_size = p->keep_size;
    o.num_images = p->num_images;
    o.cache = p->cache >= 0 ? (qie_cache)p->cache : w->cache;
    if (p->n_loras >= 0) {
        o.loras = j->loras;
        o.n_loras = (size_t)p->n_loras;
    }
    o.preview_max_px = p->preview_px;
    o.progress = on_progress;
    o.progress_arg = w;
    return o;
}

static qie_image_encode_options encoding_of(const svc_params *p) {
    qie_image_encode_options o = qie_image_encode_options_default();
    o.format = (qie_image_format)p->format;
    if (p->compression >= 0 && o.format == QIE_IMAGE_PNG)
        o.compression = p->compression * 9 / 100;
    else if (p->compression >= 0)
        o.quality = p->compression > 0 ? p->compression : 1;
    return o;
}

static bool is_constant(const qie_image *image) {
    size_t n = (size_t)qie_image_width(image) * (size_t)qie_image_height(image);
    const uint8_t *p = qie_image_pixels_const(image);
    return n > 1 && !memcmp(p, p + 3, 3 * (n - 1));
}

static void head_of(svc_result_head *h, const job *j, const qie_edit_result *r) {
    memset(h, 0, sizeof *h);
    h->seed = r->seed;
    h->width = qie_image_width(r->images[0]);
    h->height = qie_image_height(r->images[0]);
    h->num_inference_steps = r->plan.num_inference_steps;
    h->cfg = r->plan.cfg;
    h->true_cfg_scale = r->plan.true_cfg_scale;
    h->retried_f32 = r->retried_f32;
    h->encode_s = r->encode_s;
    h->denoise_s = r->denoise_s;
    h->decode_s = r->decode_s;
    h->total_s = r->total_s;
    h->n_images = r->n_images;
    h->cache = (int32_t)r->plan.cache;
    h->n_skipped = r->n_skipped;
    memcpy(h->placement, r->plan.placement, sizeof h->placement);
    h->n_loras = (int32_t)r->plan.n_loras;
    for (size_t i = 0; i < r->plan.n_loras; i++) {
        memcpy(h->loras[i].name, r->plan.loras[i].name, sizeof h->loras[i].name);
        h->loras[i].weight = r->plan.loras[i].weight;
    }
    for (int i = 0; i < r->plan.n_warnings && i < QIE_MAX_WARNINGS; i++)
        memcpy(h->warnings[h->n_warnings++], r->plan.warnings[i], sizeof h->warnings[0]);
    char *next = h->warnings[h->n_warnings];
    if (j->seed_repeated && h->seed == j->made_with)
        snprintf(next, sizeof h->warnings[0],
                 "an input picture was made with this seed; edits chained with one seed degrade");
    else if (j->seed_repeated)
        snprintf(
            next, sizeof h->warnings[0],
            "an input picture was made with seed %llu; edits chained with one seed degrade, so "
            "seed %llu is used (force_seed keeps yours)",
            (unsigned long long)j->made_with, (unsigned long long)h->seed);
    h->n_warnings += j->seed_repeated;
    if (is_constant(r->images[0]))
        snprintf(h->warnings[h->n_warnings++], sizeof h->warnings[0],
                 "the result is one single colour");
}

static qie_status send_result(worker *w, const job *j, const qie_edit_options *o,
                              const qie_edit_result *r, qie_error *err) {
    svc_result_head head;
    svc_part parts[1 + SVC_MAX_RESULTS] = {{&head, sizeof head}};
    uint8_t *encoded[SVC_MAX_RESULTS] = {0};
    qie_status st = QIE_OK;
    head_of(&head, j, r);
    for (size_t i = 0; i < r->n_images && i < SVC_MAX_RESULTS && st == QIE_OK; i++) {
        qie_image_encode_options how = encoding_of(&j->head.params);
        char *text =
            j->head.params.no_metadata ? NULL : qie_edit_parameters_json(w->engine, o, r, i);
        size_t n = 0;
        how.parameters = text;
        st = qie_image_encode(r->images[i], &how, &encoded[i], &n, err);
        free(text);
        head.image_bytes[i] = n;
        parts[1 + i] = (svc_part){encoded[i], n};
    }
    if (st == QIE_OK) {
        int fd = svc_memory_file("result", parts, 1 + r->n_images);
        svc_message m;
        svc_message_init(&m, SVC_MSG_DONE, w->running);
        tell_memory(&m);
        if (fd < 0)
            st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "no memory for the result: %s",
                          strerror(errno));
        else {
            say(w, &m, fd);
            close(fd);
        }
    }
    for (int i = 0; i < SVC_MAX_RESULTS; i++)
        free(encoded[i]);
    return st;
}

/* Pixels of the pictures, as their headers say: what decoding may take. */
static int64_t decoded_bytes(const job *j) {
    int64_t n = 0;
    for (uint64_t i = 0; i < j->head.n_images; i++) {
        int w = 0, h = 0;
        if (qie_image_probe(j->bytes[i], (size_t)j->head.image_bytes[i], NULL, NULL, &w, &h,
                            NULL) == QIE_OK)
            n += (int64_t)w * h * DECODE_BYTES_PER_PIXEL;
    }
    return n;
}

static double flops_of_block(const worker *w, const qie_edit_plan *plan) {
    int passes = plan->num_inference_steps * (plan->cfg ? 2 : 1);
    return plan->flops / (double)passes / w->n_blocks;
}

/* How long a silence may be in this edit, told before it starts: from the engine's probe of one
 * block when blocks are so large that the master's own limit could be too short, else nothing. */
static qie_status tell_estimate(worker *w, const job *j, const qie_edit_options *o,
                                qie_edit_plan *plan, qie_error *err) {
    double flops = flops_of_block(w, plan);
    int passes = plan->num_inference_steps * (plan->cfg ? 2 : 1) * j->head.params.num_images;
    svc_message m;
    if (flops < PROBE_ABOVE_FLOPS)
        return QIE_OK;
    svc_message_init(&m, SVC_MSG_BEAT, w->running);
    snprintf(m.stage, sizeof m.stage, "probe");
    m.seconds_left = -1;
    m.stage_limit_s = flops / SLOWEST_FLOPS_PER_S;
    tell_memory(&m);
    say(w, &m, -1);
    QIE_TRY(qie_engine_plan(w->engine, o, true, plan, err));
    if (plan->seconds_estimate <= 0)
        return QIE_OK;
    w->block_s = plan->seconds_estimate / passes / w->n_blocks;
    m.kind = SVC_MSG_PROGRESS;
    m.stage_limit_s = w->block_s;
    m.total = plan->num_inference_steps;
    m.seconds_left = plan->seconds_estimate;
    say(w, &m, -1);
    return QIE_OK;
}

static qie_status compute(worker *w, job *j, qie_error *err) {
    const qie_image *views[SVC_MAX_PICTURES];
    qie_edit_plan plan;
    qie_edit_result result;
    int64_t lora_bytes;
    bool gpu = w->gpu; /* the driver's own mappings follow no plan of ours */
    QIE_TRY(find_loras(w, j, &lora_bytes, err));
    if (!gpu)
        svc_sandbox_memory(decoded_bytes(j) + lora_bytes);
    QIE_TRY(decode(j, err));
    qie_edit_options o = options_of(w, j, views);
    QIE_TRY(qie_engine_plan(w->engine, &o, false, &plan, err));
    if (!gpu)
        svc_sandbox_memory(plan.working_bytes);
    QIE_TRY(tell_estimate(w, j, &o, &plan, err));
    QIE_TRY(qie_engine_edit(w->engine, &o, &result, err));
    qie_status st = send_result(w, j, &o, &result, err);
    qie_edit_result_release(&result);
    return st;
}

static void begin(worker *w, uint64_t token) {
    pthread_mutex_lock(&w->lock);
    qie_engine_reset_cancel(w->engine);
    w->running = token;
    if (w->cancelled == token)
        qie_engine_cancel(w->engine);
    pthread_mutex_unlock(&w->lock);
    w->last_beat = w->block_s = 0; /* an estimate comes with the plan */
    w->last_step = -1;
    w->last_stage[0] = 0;
}

/* A failed job is told to the master, but for one: on a device that failed for good it is no fault
 * of the job, which another process may finish. Then this one has to end. */
static qie_status run_job(worker *w, qie_error *err) {
    job j;
    qie_error e = {0};
    pthread_mutex_lock(
        &w->lock); /* the slot is free again before the answer: the next job may follow at once */
    svc_message order = w->job;
    int fd = w->job_fd;
    w->has_job = false;
    pthread_mutex_unlock(&w->lock);
    begin(w, order.token);
    snprintf(crash_job, sizeof crash_job, "%s", order.job_id);
    snprintf(crash_stage, sizeof crash_stage, "read");
    qie_status st = read_job(fd, &j, &e);
    close(fd);
    if (st == QIE_OK)
        st = compute(w, &j, &e);
    if (st != QIE_OK)
        hide_folder(&j, &e);
    job_release(&j);
    pthread_mutex_lock(&w->lock);
    w->running = 0;
    pthread_mutex_unlock(&w->lock);
    snprintf(crash_job, sizeof crash_job, "none");
    if (st == QIE_OK)
        return QIE_OK;
    QIE_TRY(qie_engine_check(w->engine, err));
    svc_message m;
    svc_message_init(&m, SVC_MSG_FAILED, order.token);
    m.status = (int32_t)st;
    snprintf(m.param, sizeof m.param, "%s", e.param);
    snprintf(m.text, sizeof m.text, "%s", e.message);
    tell_memory(&m);
    say(w, &m, -1);
    return QIE_OK;
}

/* ---------------------------------------------------------------- start */

static void describe(const worker *w, svc_model_info *out) {
    qie_engine_info info;
    qie_engine_get_info(w->engine, &info);
    memset(out, 0, sizeof *out);
    snprintf(out->model, sizeof out->model, "%s", info.model);
    snprintf(out->name, sizeof out->name, "%s", info.model_name);
    snprintf(out->precision, sizeof out->precision, "%s", info.precision);
    snprintf(out->backend, sizeof out->backend, "%s", info.backend);
    snprintf(out->cpu_level, sizeof out->cpu_level, "%s", info.cpu_level);
    snprintf(out->about_en, sizeof out->about_en, "%s", info.about_en ? info.about_en : "");
    snprintf(out->about_zh, sizeof out->about_zh, "%s", info.about_zh ? info.about_zh : "");
    out->n_threads = info.n_threads;
    out->num_inference_steps = info.num_inference_steps;
    out->max_side = info.max_side;
    out->keep_size = info.keep_size;
    out->is_demo = info.is_demo;
    out->act_dtype = strcmp(info.activations, "bf16") ? QIE_F32 : QIE_BF16;
    out->true_cfg_scale = info.true_cfg_scale;
    out->weights_bytes = info.weights_bytes;
    out->ref_area = info.ref_area;
    out->config = *qie_engine_config(w->engine);
}

/* What the master wants to know of the model, with the tokenizer's files: it counts tokens with
 * them and without them leaves long prompts to us. Made while files may still be opened. */
static qie_status make_model_file(worker *w, int *fd, qie_error *err) {
    svc_model_info info;
    svc_part parts[1 + SVC_TOKENIZER_FILES] = {{&info, sizeof info}};
    describe(w, &info);
    for (int i = 0; i < SVC_TOKENIZER_FILES; i++) {
        const unsigned char *data = NULL;
        size_t n = 0;
        if (qie_engine_tokenizer_file(w->engine, svc_tokenizer_files[i], &data, &n, NULL) == QIE_OK)
            parts[1 + i] = (svc_part){data, n};
        info.tokenizer_bytes[i] = parts[1 + i].n;
    }
    w->n_blocks = info.config.transformer.num_layers > 0 ? info.config.transformer.num_layers : 1;
    *fd = svc_memory_file("model", parts, 1 + SVC_TOKENIZER_FILES);
    QIE_FAIL_IF(*fd < 0, QIE_E_NO_MEMORY, err, NULL, "no memory file: %s", strerror(errno));
    return QIE_OK;
}

static void tell_ready(worker *w, const char *files, const char *calls, int fd) {
    svc_message m;
    svc_message_init(&m, SVC_MSG_READY, 0);
    snprintf(m.text, sizeof m.text, "files: %s, calls: %s", files, calls);
    tell_memory(&m);
    pthread_mutex_lock(&w->lock);
    w->loading = false;
    pthread_mutex_unlock(&w->lock);
    say(w, &m, fd);
    close(fd);
}

static qie_status serve(worker *w, const svc_worker_options *o, qie_error *err) {
    pthread_t thread;
    const char *device = o->engine.device;
    w->gpu = device && !strcmp(device, "cuda");
    /* Starting CUDA may have the kernel's module loaded by a program of the driver. */
    const char *files = w->gpu ? NULL : svc_sandbox_files(false);
    QIE_FAIL_IF(pthread_create(&thread, NULL, listen_to_master, w), QIE_E_NO_MEMORY, err, NULL,
                "no thread");
    pthread_detach(thread);
    QIE_TRY(qie_engine_open(&o->engine, &w->engine, err));
    int model_fd;
    QIE_TRY(make_model_file(w, &model_fd, err));
    if (w->gpu)
        files = svc_sandbox_files(true);
    tell_ready(w, files, svc_sandbox_calls(w->gpu), model_fd);
    for (;;) {
        pthread_mutex_lock(&w->lock);
        while (!w->has_job && !w->quit)
            pthread_cond_wait(&w->wake, &w->lock);
        bool quit = w->quit && !w->has_job;
        pthread_mutex_unlock(&w->lock);
        if (quit)
            return QIE_OK;
        QIE_TRY(run_job(w, err));
    }
}

qie_status svc_worker_run(const svc_worker_options *options, qie_error *err) {
    worker w = {.channel = options->channel,
                .lora_dir = options->lora_dir,
                .cache = options->cache,
                .loading = true,
                .job_fd = -1};
    int kind = 0;
    socklen_t n = sizeof kind;
    QIE_FAIL_IF(getsockopt(w.channel, SOL_SOCKET, SO_TYPE, &kind, &n) || kind != SOCK_SEQPACKET,
                QIE_E_USAGE, err, NULL, "a worker is started by 'qwen-edit serve', not by hand");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN); /* Ctrl-C in the terminal of the service is the master's business */
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    install_crash_handler();
    pthread_mutex_init(&w.lock, NULL);
    pthread_cond_init(&w.wake, NULL);
    qie_error e = {0};
    qie_status st = serve(&w, options, &e);
    if (st != QIE_OK) {
        svc_message m;
        svc_message_init(&m, SVC_MSG_FAILED, 0);
        m.status = (int32_t)st;
        snprintf(m.param, sizeof m.param, "%s", e.param);
        snprintf(m.text, sizeof m.text, "%s", e.message);
        svc_message_send(w.channel, &m, -1);
        if (err)
            *err = e;
    }
    /* The listening thread still uses `w`: leave without returning through it. */
    fflush(NULL);
    _exit(qie_status_exit_code(st));
}
