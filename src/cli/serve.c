/* The commands serve and worker: values to options of the service. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/error.h"
#include "base/nvml.h"
#include "base/parallel.h"
#include "cli/commands.h"
#include "cli/loras.h"
#include "cli/model_choice.h"
#include "cli/place.h"
#include "cli/ui.h"
#include "service/common/message.h"
#include "service/master/master.h"
#include "service/worker/worker.h"

#define HEADROOM_VARIABLE "QWEN_EDIT_GPU_HEADROOM_GIB"

typedef struct prepared {
    svc_options o;
    char self[PATH_MAX], state[PATH_MAX], gpus[4096], numbers[6][32], revision[64];
    qie_gpus found;
    char *model;
    qie_place place;
} prepared;

static void copy_list(const cli_values *v, cli_option_id id, const char **out) {
    const cli_value *value = cli_get(v, id);
    size_t n = value->n < SVC_MAX_LIST - 1 ? value->n : SVC_MAX_LIST - 1;
    for (size_t i = 0; i < n; i++)
        out[i] = value->texts[i];
    out[n] = NULL;
}

static qie_status find_state_dir(const cli_values *v, prepared *p, qie_error *err) {
    const char *given = cli_text(v, OPT_STATE_DIR, NULL), *xdg = getenv("XDG_STATE_HOME"),
               *home = getenv("HOME");
    if (given)
        snprintf(p->state, sizeof p->state, "%s", given);
    else if (xdg && *xdg == '/')
        snprintf(p->state, sizeof p->state, "%s/qwen-edit", xdg);
    else if (home && *home)
        snprintf(p->state, sizeof p->state, "%s/.local/state/qwen-edit", home);
    else
        return qie_fail(err, QIE_E_USAGE, "--state-dir",
                        "neither --state-dir nor HOME says where the state is kept");
    p->o.state_dir = p->state;
    return QIE_OK;
}

/* The GPU that an entry of --gpus names: a physical index or a UUID (or the start of one, as CUDA
 * takes it). -1: none. */
static int gpu_of(const qie_gpus *g, const char *text) {
    char *end;
    long index = strtol(text, &end, 10);
    for (int i = 0; i < g->n; i++)
        if (*end ? !strncasecmp(g->gpus[i].uuid, text, strlen(text)) : g->gpus[i].index == index)
            return i;
    return -1;
}

static qie_status add_gpu(prepared *p, const char *text, const qie_gpu_choice *visible,
                          int n_visible, qie_error *err) {
    svc_options *o = &p->o;
    bool digits = strspn(text, "0123456789") == strlen(text) && strlen(text) < 4;
    QIE_FAIL_IF(!digits && strncasecmp(text, "GPU-", 4), QIE_E_INVALID, err, "--gpus",
                "--gpus: '%s' is neither an index nor a UUID", text);
    QIE_FAIL_IF(o->n_gpus == SVC_MAX_WORKERS, QIE_E_INVALID, err, "--gpus", "--gpus: too many");
    svc_gpu *gpu = &o->gpus[o->n_gpus];
    if (p->found.state != QIE_GPUS_OK) { /* a stand-in for the worker runs without a driver */
        gpu->index = digits ? (int)strtol(text, NULL, 10) : o->n_gpus;
        snprintf(gpu->bind, sizeof gpu->bind, "%s", text);
        snprintf(gpu->name, sizeof gpu->name, "%s", text);
        o->n_gpus++;
        return QIE_OK;
    }
    int at = gpu_of(&p->found, text);
    QIE_FAIL_IF(at < 0, QIE_E_INVALID, err, "--gpus",
                "--gpus: there is no GPU '%s', only %d of them", text, p->found.n);
    bool seen = false;
    for (int i = 0; i < n_visible; i++)
        seen = seen || visible[i].i_gpu == at;
    const qie_gpu *g = &p->found.gpus[at];
    QIE_FAIL_IF(!seen, QIE_E_INVALID, err, "--gpus",
                "--gpus: GPU %d is not among those that CUDA_VISIBLE_DEVICES leaves", g->index);
    for (int i = 0; i < o->n_gpus; i++)
        QIE_FAIL_IF(o->gpus[i].index == g->index, QIE_E_INVALID, err, "--gpus",
                    "--gpus names GPU %d twice", g->index);
    gpu->index = g->index;
    memcpy(gpu->bind, g->uuid, sizeof gpu->bind); /* an index depends on who counts */
    memcpy(gpu->name, g->name, sizeof gpu->name);
    o->n_gpus++;
    return QIE_OK;
}

static qie_status place_workers(const cli_values *v, prepared *p, const char *list,
                                qie_error *err) {
    char headroom[32];
    QIE_TRY(cli_place(v, p->model, list, true, &p->place, err));
    snprintf(headroom, sizeof headroom, "%g",
             cli_number(v, OPT_HEADROOM, QIE_DEFAULT_HEADROOM_GIB));
    setenv(HEADROOM_VARIABLE, headroom, 1); /* of the workers too, wherever it came from */
    for (int i = 0; i < p->place.n_slots && i < SVC_MAX_WORKERS; i++) {
        const qie_place_slot *slot = &p->place.slots[i];
        svc_gpu *gpu = &p->o.gpus[p->o.n_gpus++];
        gpu->index = slot->gpus[0];
        /* no snprintf: GCC takes two parts of one structure for overlapping */
        _Static_assert(sizeof gpu->bind == sizeof slot->visible, "bind");
        _Static_assert(sizeof gpu->name == sizeof slot->name, "name");
        memcpy(gpu->bind, slot->visible, sizeof gpu->bind);
        memcpy(gpu->name, slot->name, sizeof gpu->name);
    }
    return QIE_OK;
}

/* The cards of the workers: "4,5,GPU-uuid", or all that have room. A stand-in for the worker
 * (tests) takes what is named, whatever this program could do with it. */
static qie_status read_gpus(const cli_values *v, prepared *p, qie_error *err) {
    const char *text = cli_text(v, OPT_GPUS, "auto");
    bool stand_in = cli_is_set(v, OPT_WORKER_PROGRAM), all = !strcmp(text, "auto");
    qie_gpu_choice visible[QIE_GPUS_MAX];
    if (!strcmp(text, "none") || (all && stand_in && !cli_is_set(v, OPT_GPUS)))
        return QIE_OK;
    if (!stand_in)
        return place_workers(v, p, all ? NULL : text, err);
    qie_gpus_probe(5000, &p->found);
    int n = qie_gpus_visible(&p->found, getenv("CUDA_VISIBLE_DEVICES"), visible, NULL);
    for (int i = 0; all && i < n; i++)
        QIE_TRY(add_gpu(p, p->found.gpus[visible[i].i_gpu].uuid, visible, n, err));
    if (all)
        return QIE_OK;
    snprintf(p->gpus, sizeof p->gpus, "%s", text);
    char *save = NULL;
    for (char *t = strtok_r(p->gpus, ",", &save); t; t = strtok_r(NULL, ",", &save))
        QIE_TRY(add_gpu(p, t, visible, n, err));
    QIE_FAIL_IF(!p->o.n_gpus, QIE_E_INVALID, err, "--gpus", "--gpus names none");
    return QIE_OK;
}

/* Of a snapshot in the cache: .../snapshots/REVISION. */
static void find_revision(prepared *p) {
    const char *at = strstr(p->model, "/snapshots/");
    size_t n = at ? strspn(at + 11, "0123456789abcdef") : 0;
    if (n >= 7 && n < sizeof p->revision && (at[11 + n] == 0 || at[11 + n] == '/'))
        snprintf(p->revision, sizeof p->revision, "%.*s", (int)n, at + 11);
    p->o.model_revision = p->revision;
}

static void add(prepared *p, int *n, const char *flag, const char *value) {
    if (!value)
        return;
    p->o.worker_args[(*n)++] = flag;
    p->o.worker_args[(*n)++] = value;
}

static void make_worker_args(const cli_values *v, prepared *p) {
    int n = 0, half = qie_cpu_count() / 2 / (p->o.n_workers > 1 ? p->o.n_workers : 1);
    p->o.worker_args[n++] = "qwen-edit";
    p->o.worker_args[n++] = "worker";
    snprintf(p->numbers[0], 32, "%d", (int)cli_number(v, OPT_THREADS, half > 1 ? half : 1));
    add(p, &n, "--device", p->place.n_slots ? "cuda" : "cpu");
    add(p, &n, "--model", *p->model ? p->model : NULL);
    add(p, &n, "--transformer", cli_text(v, OPT_TRANSFORMER, NULL));
    add(p, &n, "--text-encoder", cli_text(v, OPT_TEXT_ENCODER, NULL));
    add(p, &n, "--mmproj", cli_text(v, OPT_MMPROJ, NULL));
    add(p, &n, "--vae", cli_text(v, OPT_VAE, NULL));
    add(p, &n, "--variant", cli_text(v, OPT_VARIANT, NULL));
    add(p, &n, "--threads", p->numbers[0]);
    add(p, &n, "--precision", cli_text(v, OPT_PRECISION, NULL));
    add(p, &n, "--backend", cli_text(v, OPT_BACKEND, NULL));
    add(p, &n, "--cache", cli_text(v, OPT_CACHE, NULL));
    add(p, &n, "--lora-dir", cli_text(v, OPT_LORA_DIR, NULL));
    for (size_t i = 0; i < cli_get(v, OPT_LORA)->n; i++)
        add(p, &n, "--lora", cli_get(v, OPT_LORA)->texts[i]);
    if (cli_is_set(v, OPT_NICE)) {
        snprintf(p->numbers[1], 32, "%d", (int)cli_number(v, OPT_NICE, 0));
        add(p, &n, "--nice", p->numbers[1]);
    }
    if (cli_is_set(v, OPT_MEMORY_LIMIT)) {
        snprintf(p->numbers[2], 32, "%g", cli_number(v, OPT_MEMORY_LIMIT, 0));
        add(p, &n, "--memory-limit", p->numbers[2]);
    }
    p->o.worker_args[n] = NULL;
}

static qie_status prepare(const cli_values *v, prepared *p, qie_error *err) {
    svc_options *o = &p->o;
    bool named;
    ssize_t n = readlink("/proc/self/exe", p->self, sizeof p->self - 1);
    QIE_FAIL_IF(n <= 0, QIE_E_IO, err, NULL, "cannot find the program's own file: %s",
                strerror(errno));
    o->program = cli_text(v, OPT_WORKER_PROGRAM, p->self);
    o->host = cli_text(v, OPT_HOST, "127.0.0.1");
    o->port = (int)cli_number(v, OPT_PORT, 7860);
    o->api_port = (int)cli_number(v, OPT_API_PORT, 0);
    o->n_workers = (int)cli_number(v, OPT_WORKERS, 1);
    o->output_dir = cli_text(v, OPT_OUTPUT_DIR, NULL);
    o->lora_dir = cli_text(v, OPT_LORA_DIR, NULL);
    o->cache = qie_cache_from_name(cli_text(v, OPT_CACHE, "off"));
    o->key_file = cli_text(v, OPT_API_KEY_FILE, NULL);
    o->queue_size = (int)cli_number(v, OPT_QUEUE_SIZE, 64);
    o->max_images = (int)cli_number(v, OPT_MAX_IMAGES, 3);
    o->max_connections = (int)cli_number(v, OPT_MAX_CONNECTIONS, 1024);
    o->max_body_memory = (int64_t)cli_number(v, OPT_MAX_BODY_MEMORY, 512) << 20;
    o->sync_timeout_s = cli_number(v, OPT_SYNC_TIMEOUT, 600);
    o->keep_s = cli_number(v, OPT_KEEP, 24) * 3600;
    o->hang_limit_s = cli_number(v, OPT_HANG_LIMIT, 120);
    o->no_image_url = cli_on(v, OPT_NO_IMAGE_URL);
    o->reject_while_loading = cli_on(v, OPT_REJECT_WHILE_LOADING);
    o->log_json = !strcmp(cli_text(v, OPT_LOG_FORMAT, "text"), "json");
    o->version = qie_version();
    copy_list(v, OPT_API_KEY, o->keys);
    copy_list(v, OPT_CORS_ORIGIN, o->origins);
    copy_list(v, OPT_ALLOW_URL_CIDR, o->cidrs);
    copy_list(v, OPT_TRUSTED_PROXY, o->proxies);
    QIE_TRY(find_state_dir(v, p, err));
    QIE_TRY(cli_choose_model(v, &p->model, &named, err));
    if (!strcmp(p->model, "demo") && !named)
        cli_note("no model named: this is the built-in demo model; --model or QWEN_EDIT_2511_DIR "
                 "names another");
    QIE_FAIL_IF(cli_get(v, OPT_LORA)->n > QIE_MAX_LORAS, QIE_E_INVALID, err, "--lora",
                "--lora: %zu LoRAs, at most %d", cli_get(v, OPT_LORA)->n, QIE_MAX_LORAS);
    find_revision(p);
    QIE_TRY(read_gpus(v, p, err));
    make_worker_args(v, p);
    return QIE_OK;
}

qie_status cli_run_serve(cli_values *values, qie_error *err) {
    prepared *p = calloc(1, sizeof *p);
    QIE_FAIL_IF(!p, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_status st = values->n_args ? qie_fail(err, QIE_E_USAGE, NULL, "unexpected argument '%s'",
                                              values->args[0])
                                   : prepare(values, p, err);
    if (st == QIE_OK)
        st = svc_master_run(&p->o, err);
    free(p->model);
    free(p);
    return st;
}

qie_status cli_run_worker(cli_values *values, qie_error *err) {
    svc_worker_options o = {.channel = SVC_CHANNEL_FD, .engine = qie_engine_options_default()};
    if (cli_is_set(values, OPT_NICE))
        setpriority(PRIO_PROCESS, 0, (int)cli_number(values, OPT_NICE, 0));
    o.engine.model = cli_text(values, OPT_MODEL, NULL);
    cli_part_files(values, &o.engine);
    o.engine.precision = qie_precision_from_name(cli_text(values, OPT_PRECISION, "auto"));
    o.engine.n_threads = (int)cli_number(values, OPT_THREADS, 1);
    const char *headroom = getenv(HEADROOM_VARIABLE);
    o.engine.backend = cli_text(values, OPT_BACKEND, NULL);
    o.engine.device = cli_text(values, OPT_DEVICE, "cpu");
    o.engine.gpu_offload_folder = getenv("QWEN_EDIT_OFFLOAD_FOLDER");
    if (headroom && *headroom)
        o.engine.gpu_headroom_bytes = (int64_t)(strtod(headroom, NULL) * 1073741824.0);
    o.engine.memory_limit_bytes = (int64_t)(cli_number(values, OPT_MEMORY_LIMIT, 0) * 1073741824.0);
    o.lora_dir = cli_text(values, OPT_LORA_DIR, NULL);
    o.cache = qie_cache_from_name(cli_text(values, OPT_CACHE, "off"));
    cli_loras *loras = malloc(sizeof *loras); /* as long as the process */
    QIE_FAIL_IF(!loras, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    QIE_TRY(cli_read_loras(values, false, loras, err));
    o.engine.loras = loras->uses;
    o.engine.n_loras = loras->n;
    return svc_worker_run(&o, err);
}
