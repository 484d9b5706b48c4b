/* The public interface of include/qie/edit.h on top of the pipeline. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/parallel.h"
#include "base/rng.h"
#include "base/trace.h"
#include "compute/op_record.h"
#include "model/bench.h"
#include "model/device.h"
#include "model/importance.h"
#include "model/pipeline.h"
#include "plan/placement.h"
#include "qie/edit.h"

#ifndef QIE_VERSION
#define QIE_VERSION "0"
#endif

struct qie_engine {
    qie_model model;
    qie_compute *compute;
    qie_arena *arena;     /* as large as the largest edit so far */
    qie_arena *device;    /* the same on a device; NULL on the CPU */
    qie_device_said said; /* in the running edit */
    qie_prompt_cache *prompts;
    qie_op_inputs *inputs; /* NULL: importance is not collected */
    qie_dtype act;
    bool int8;
    int64_t memory_limit;
    char *path, *name;
    qie_lora_use loras[QIE_MAX_LORAS]; /* given at the start; texts owned */
    size_t n_loras;
    bool is_demo;
    atomic_int cancel;
};

const char *qie_version(void) {
    return QIE_VERSION;
}

qie_engine_options qie_engine_options_default(void) {
    qie_engine_options o = {.gpu_headroom_bytes =
                                (int64_t)(QIE_DEFAULT_HEADROOM_GIB * 1073741824.0)};
    return o;
}

qie_edit_options qie_edit_options_default(void) {
    qie_edit_options o = {.negative_prompt = " ",
                          .true_cfg_scale = -1,
                          .guidance_scale = 1.0,
                          .cache_threshold = -1,
                          .keep_size = -1,
                          .num_images = 1};
    return o;
}

uint64_t qie_seed_random(void) {
    return qie_random_seed();
}

/* Last part of a path, without a trailing slash; of a hub snapshot the model's name, not the
 * commit's. */
static char *name_of(const char *path) {
    const char *snapshot = strstr(path, "/models--");
    if (snapshot) {
        const char *p = snapshot + 9, *sep = strstr(p, "--");
        const char *start = sep ? sep + 2 : p;
        return strndup(start, strcspn(start, "/"));
    }
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    size_t from = n;
    while (from > 0 && path[from - 1] != '/')
        from--;
    return strndup(path + from, n - from);
}

qie_precision qie_precision_from_name(const char *name) {
    return !strcmp(name, "f32")    ? QIE_PRECISION_F32
           : !strcmp(name, "bf16") ? QIE_PRECISION_BF16
           : !strcmp(name, "int8") ? QIE_PRECISION_INT8
                                   : QIE_PRECISION_AUTO;
}

static const char *const CACHE_NAMES[QIE_CACHE_COUNT] = {"off", "balanced", "fast"};

const char *qie_cache_name(qie_cache cache) {
    return (unsigned)cache < QIE_CACHE_COUNT ? CACHE_NAMES[cache] : "";
}

qie_cache qie_cache_from_name(const char *name) {
    for (int i = 0; i < QIE_CACHE_COUNT; i++)
        if (!strcmp(name, CACHE_NAMES[i]))
            return (qie_cache)i;
    return QIE_CACHE_OFF;
}

static int thread_count(int asked) {
    int cores = qie_cpu_count(), half = cores / 2 > 0 ? cores / 2 : 1;
    return asked > 0 ? asked : half;
}

/* Copies of the LoRAs given at the start; a file that cannot be used is refused now. */
static qie_status keep_loras(qie_engine *e, const qie_engine_options *options, qie_error *err) {
    QIE_FAIL_IF(options->n_loras > QIE_MAX_LORAS, QIE_E_INVALID, err, "lora",
                "%zu LoRAs, at most %d at once", options->n_loras, QIE_MAX_LORAS);
    for (size_t i = 0; i < options->n_loras; i++) {
        const qie_lora_use *from = &options->loras[i];
        qie_lora_use *to = &e->loras[e->n_loras++];
        *to = (qie_lora_use){.path = strdup(from->path),
                             .weight = from->weight,
                             .name = from->name ? strdup(from->name) : NULL};
        QIE_FAIL_IF(!to->path || (from->name && !to->name), QIE_E_NO_MEMORY, err, NULL,
                    "out of memory");
    }
    return qie_adapters_select(e->model.adapters, e->loras, e->n_loras, err);
}

/* The LoRAs that these options ask for, in force. */
static qie_status select_loras(qie_engine *e, const qie_edit_options *o, qie_error *err) {
    return o->loras ? qie_adapters_select(e->model.adapters, o->loras, o->n_loras, err)
                    : qie_adapters_select(e->model.adapters, e->loras, e->n_loras, err);
}

static const char *or_null(const char *s) {
    return s && *s ? s : NULL;
}

static qie_model_source source_of(const qie_engine_options *o) {
    return (qie_model_source){.model = o->model,
                              .transformer = or_null(o->transformer),
                              .text_encoder = or_null(o->text_encoder),
                              .mmproj = or_null(o->mmproj),
                              .vae = or_null(o->vae),
                              .variant = or_null(o->variant)};
}

/* Is one of the layers that may be multiplied in integers stored as such? */
static void find_int8_blocks(void *arg, const char *name, qie_linear *l) {
    bool *found = arg;
    (void)name;
    *found = *found || (l->int8 && qie_blocks_are_int8(l->w.dtype));
}

qie_status qie_engine_open(const qie_engine_options *options, qie_engine **out, qie_error *err) {
    *out = NULL;
    qie_model_source source = source_of(options);
    bool named = options->model && *options->model;
    QIE_FAIL_IF(!named && !source.transformer, QIE_E_INVALID, err, "model", "no model is named");
    QIE_FAIL_IF(options->n_threads < 0 || options->n_threads > 1024, QIE_E_INVALID, err, "threads",
                "threads is %d, not within 1..1024", options->n_threads);
    qie_status st = QIE_OK;
    qie_engine *e = calloc(1, sizeof *e);
    if (e) {
        /* What people see as the model is the transformer. */
        e->path = strdup(source.transformer ? source.transformer : options->model);
        e->name = name_of(e->path ? e->path : "");
    }
    if (!e || !e->path || !e->name) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    e->is_demo = named && !source.transformer && !strcmp(options->model, "demo");
    e->memory_limit = options->memory_limit_bytes;
    atomic_init(&e->cancel, 0);
    QIE_TRY_GOTO(qie_model_open_source(&source, &e->model, err));
    qie_model_find_preset(&e->model, e->name);
    QIE_TRY_GOTO(keep_loras(e, options, err));
    QIE_TRY_GOTO(qie_prompt_cache_create(QIE_PROMPT_CACHE_BYTES, &e->prompts, err));
    qie_compute_limits limits = qie_model_limits(&e->model.config);
    bool integers = options->precision == QIE_PRECISION_INT8;
    if (options->precision != QIE_PRECISION_F32)
        qie_transformer_each_linear(e->model.transformer, find_int8_blocks, &integers);
    if (integers)
        limits.max_int8_k = 4ll * e->model.config.transformer.inner_dim;
    if (options->device && !strcmp(options->device, "cuda"))
        QIE_TRY_GOTO(qie_device_open(options, &e->model, &e->said, &e->compute, err));
    else
        QIE_TRY_GOTO(qie_compute_create(options->backend, thread_count(options->n_threads), &limits,
                                        &e->compute, err));
    if (options->collect_importance) {
        if (e->compute->mem)
            st = qie_fail(err, QIE_E_UNSUPPORTED, "device",
                          "importance is collected on the CPU only: --device cpu");
        else
            st = qie_importance_begin(e->compute, e->model.w_transformer, e->model.w_text_encoder,
                                      &e->inputs, err);
        QIE_TRY_GOTO(st);
    }
    bool bf16 = options->precision == QIE_PRECISION_BF16 ||
                (options->precision != QIE_PRECISION_F32 && e->compute->bf16_native);
    e->act = bf16 ? QIE_BF16 : QIE_F32;
    e->int8 = options->precision == QIE_PRECISION_INT8;
    *out = e;
    return QIE_OK;
fail:
    qie_engine_close(e);
    return st;
}

void qie_engine_close(qie_engine *e) {
    if (!e)
        return;
    qie_arena_destroy(e->device);
    qie_arena_destroy(e->arena);
    qie_compute_destroy(e->compute);
    qie_op_inputs_destroy(e->inputs);
    qie_model_release(&e->model);
    qie_prompt_cache_destroy(e->prompts);
    for (size_t i = 0; i < e->n_loras; i++) {
        free((void *)(uintptr_t)e->loras[i].path);
        free((void *)(uintptr_t)e->loras[i].name);
    }
    free(e->path);
    free(e->name);
    free(e);
}

qie_status qie_engine_save_importance(const qie_engine *e, const char *path, qie_error *err) {
    QIE_FAIL_IF(!e->inputs, QIE_E_CONFLICT, err, NULL, "this engine does not collect importance");
    return qie_importance_save(e->inputs, path, err);
}

static const char *precision_name(const qie_engine *e) {
    return e->int8 ? "int8" : e->act == QIE_BF16 ? "bf16" : "f32";
}

const qie_model_config *qie_engine_config(const qie_engine *e) {
    return &e->model.config;
}

qie_status qie_engine_tokenizer_file(const qie_engine *e, const char *name,
                                     const unsigned char **data, size_t *n, qie_error *err) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", e->model.config.tokenizer_folder, name);
    return qie_files_get(e->model.files, path, data, n, err);
}

qie_prompt_cache_stats qie_engine_prompt_cache(const qie_engine *e) {
    return qie_prompt_cache_get_stats(e->prompts);
}

void qie_engine_get_info(const qie_engine *e, qie_engine_info *info) {
    const qie_defaults_config *d = &e->model.config.defaults;
    qie_model_defaults now = qie_model_defaults_now(&e->model);
    *info =
        (qie_engine_info){.model = e->path,
                          .model_name = e->name,
                          .is_demo = e->is_demo,
                          .about_en = *d->about_en ? d->about_en : NULL,
                          .about_zh = *d->about_zh ? d->about_zh : NULL,
                          .precision = precision_name(e),
                          .activations = e->act == QIE_BF16 ? "bf16" : "f32",
                          .backend = e->compute->name,
                          .placement = e->compute->mem ? e->compute->mem->describe(e->compute) : "",
                          .cpu_level = qie_cpu_level_name(e->compute->level),
                          .n_threads = e->compute->n_threads,
                          .n_parameters = qie_model_parameters(&e->model),
                          .weights_bytes = qie_model_weights_bytes(&e->model),
                          .zero_cond_t = e->model.config.transformer.zero_cond_t,
                          .num_inference_steps = now.num_inference_steps,
                          .true_cfg_scale = now.true_cfg_scale,
                          .lightning = now.lightning,
                          .keep_size = d->keep_size,
                          .max_side = d->max_side,
                          .ref_area = d->ref_area};
}

qie_status qie_engine_check(const qie_engine *e, qie_error *err) {
    return e->compute->mem ? e->compute->mem->check(e->compute, err) : QIE_OK;
}

void qie_engine_cancel(qie_engine *e) {
    atomic_store_explicit(&e->cancel, 1, memory_order_relaxed);
}

void qie_engine_reset_cancel(qie_engine *e) {
    atomic_store_explicit(&e->cancel, 0, memory_order_relaxed);
}

/* What an edit may take: the caller's limit, else what is free now and what an earlier edit left in
 * our hands. A device that cannot tell has failed: that is the error, not too little memory. */
static qie_status find_limit(const qie_engine *e, int64_t *limit, qie_error *err) {
    int64_t held = e->arena ? (int64_t)qie_arena_peak(e->arena) : 0;
    int64_t room = e->compute->mem       ? e->compute->mem->room(e->compute)
                   : e->memory_limit > 0 ? e->memory_limit
                                         : qie_memory_available() + held;
    *limit = e->memory_limit > 0 && e->memory_limit < room ? e->memory_limit : room;
    return qie_engine_check(e, err);
}

static size_t arena_bytes(int64_t planned) {
    return (size_t)(planned + QIE_ARENA_SLACK);
}

/* The matrices of the LoRAs in force to the devices, once. */
static qie_status adapt_device(qie_engine *e, qie_error *err) {
    const qie_mem_ops *mem = e->compute->mem;
    if (!mem)
        return QIE_OK;
    size_t n = qie_adapters_spans(e->model.adapters, NULL, 0);
    qie_weight_span *spans = calloc(n + 1, sizeof *spans);
    QIE_FAIL_IF(!spans, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_adapters_spans(e->model.adapters, spans, n);
    bool moved = false;
    mem->adapt(e->compute, spans, n, &moved);
    free(spans);
    if (moved) {
        qie_arena_destroy(e->device);
        e->device = NULL;
    }
    return mem->check(e->compute, err);
}

/* The arena for a plan: kept when it is large enough, since an arena is only reserved addresses
 * until touched. A device needs as much of its own: every buffer of a plan is on one side or on
 * both. */
static qie_status need_arena(qie_engine *e, int64_t bytes, qie_error *err) {
    size_t want = arena_bytes(bytes);
    const qie_mem_ops *mem = e->compute->mem;
    if (e->device)
        qie_arena_release(e->device, 0);
    if (e->arena)
        qie_arena_release(e->arena, 0);
    if (!e->arena || qie_arena_capacity(e->arena) < want) {
        qie_arena_destroy(e->arena);
        e->arena = NULL;
        QIE_TRY(qie_arena_create(want, &e->arena, err));
    }
    if (!mem || (e->device && qie_arena_capacity(e->device) >= want))
        return QIE_OK;
    void *base;
    qie_arena_destroy(e->device);
    e->device = NULL;
    QIE_TRY(mem->reserve(e->compute, want, &base, err));
    return qie_arena_create_over(base, want, &e->device, err);
}

/* Small edits keep their pages for the next one; large ones give them back. */
static void rest_arena(qie_engine *e) {
    if (qie_arena_peak(e->arena) > (256u << 20))
        qie_arena_reset(e->arena);
    else
        qie_arena_release(e->arena, 0);
}

static qie_run run_of(qie_engine *e, qie_dtype act, bool int8, qie_observer *observer) {
    qie_run run = {.compute = e->compute,
                   .arena = e->arena,
                   .device = e->device ? e->device : e->arena,
                   .act = act,
                   .int8 = int8,
                   .cancel = &e->cancel,
                   .observer = observer};
    return run;
}

qie_status qie_engine_plan(qie_engine *e, const qie_edit_options *options, bool probe,
                           qie_edit_plan *plan, qie_error *err) {
    qie_prepared p;
    memset(plan, 0, sizeof *plan);
    QIE_TRY(qie_engine_check(e, err));
    QIE_TRY(select_loras(e, options, err));
    int64_t limit;
    QIE_TRY(find_limit(e, &limit, err));
    qie_status st = qie_prepare(&e->model, options, e->act, limit, &p, err);
    if (st == QIE_OK) {
        qie_prepared_describe(&e->model, &p, plan);
        plan->available_bytes = limit;
        if (e->compute->mem)
            st = e->compute->mem->plan(e->compute, arena_bytes(p.memory.total), plan->placement,
                                       sizeof plan->placement, err);
    }
    if (st == QIE_OK && probe && !e->compute->mem) { /* a device would have to be filled first */
        double block = 0;
        st = need_arena(e, p.memory.total, err);
        qie_run run = run_of(e, e->act, e->int8, NULL);
        if (st == QIE_OK)
            st = qie_pipeline_probe(&e->model, &run, &p, &block, err);
        if (st == QIE_OK) {
            int blocks = e->model.config.transformer.num_layers;
            double per_flop = block * blocks * p.n_passes / p.memory.flops_step;
            plan->seconds_estimate = plan->flops * per_flop;
        }
        if (e->arena)
            rest_arena(e);
    }
    qie_prepared_release(&p);
    return st;
}

qie_status qie_engine_bench(qie_engine *e, const qie_edit_options *edit,
                            const qie_bench_options *options, qie_bench_result *out,
                            qie_error *err) {
    qie_prepared p;
    memset(out, 0, sizeof *out);
    QIE_FAIL_IF(options->repeats < 1 || options->repeats > QIE_BENCH_MAX_REPEATS, QIE_E_INVALID,
                err, "repeats", "repeats is %d, not within 1..%d", options->repeats,
                QIE_BENCH_MAX_REPEATS);
    QIE_TRY(select_loras(e, edit, err));
    QIE_TRY(adapt_device(e, err));
    int64_t limit;
    QIE_TRY(find_limit(e, &limit, err));
    qie_status st = qie_prepare(&e->model, edit, e->act, limit, &p, err);
    if (st == QIE_OK)
        st = need_arena(e, p.memory.total, err);
    if (st == QIE_OK) {
        qie_run run = run_of(e, e->act, e->int8, NULL);
        st = qie_bench_run(&e->model, &run, &p, options, out, err);
        rest_arena(e);
    }
    if (st == QIE_OK) {
        qie_prepared_describe(&e->model, &p, &out->plan);
        out->plan.available_bytes = limit;
    }
    qie_prepared_release(&p);
    return st;
}

/* Where on GPUs it ran, and what was said about that. */
static void describe_device(const qie_engine *e, qie_edit_plan *plan) {
    if (e->compute->mem)
        snprintf(plan->placement, sizeof plan->placement, "%s",
                 e->compute->mem->describe(e->compute));
    for (int i = 0; i < e->said.n && plan->n_warnings < QIE_MAX_WARNINGS; i++)
        memcpy(plan->warnings[plan->n_warnings++], e->said.text[i], sizeof *plan->warnings);
}

/* One attempt in one precision. */
static qie_status attempt(qie_engine *e, const qie_edit_options *options, qie_dtype act, bool int8,
                          qie_observer *observer, qie_edit_result *out, bool *non_finite,
                          qie_error *err) {
    qie_prepared p;
    int64_t limit;
    *non_finite = false;
    QIE_TRY(find_limit(e, &limit, err));
    qie_status st = qie_prepare(&e->model, options, act, limit, &p, err);
    if (st == QIE_OK)
        st = need_arena(e, p.memory.total, err);
    if (st == QIE_OK) {
        qie_run run = run_of(e, act, int8, observer);
        run.prompt_cache = e->prompts; /* only here: benchmarks measure the work */
        qie_op_record *ops = qie_trace_on() ? malloc(sizeof *ops) : NULL;
        if (ops)
            qie_op_record_begin(e->compute, ops);
        st = qie_pipeline_run(&e->model, &run, &p, out, non_finite, err);
        qie_op_record_end(e->compute);
        free(ops);
        qie_log(QIE_LOG_DEBUG, "pipeline", "working memory: %zu of %zu bytes planned",
                qie_arena_peak(e->arena), qie_arena_capacity(e->arena));
        rest_arena(e);
    }
    if (st == QIE_OK) {
        qie_prepared_describe(&e->model, &p, &out->plan);
        describe_device(e, &out->plan);
        out->plan.available_bytes = limit;
    }
    qie_prepared_release(&p);
    return st;
}

qie_status qie_engine_edit(qie_engine *e, const qie_edit_options *options, qie_edit_result *out,
                           qie_error *err) {
    memset(out, 0, sizeof *out);
    e->said.n = 0;
    QIE_TRY(
        qie_engine_check(e, err)); /* a device that failed stays failed: no guess about memory */
    QIE_TRY(select_loras(e, options, err));
    QIE_TRY(adapt_device(e, err));
    qie_observer *observer = NULL;
    QIE_TRY(qie_observer_create_from_env(&observer, err));
    bool non_finite;
    qie_status st = attempt(e, options, e->act, e->int8, observer, out, &non_finite, err);
    if (st != QIE_OK && non_finite && (e->act != QIE_F32 || e->int8)) {
        qie_log(QIE_LOG_WARN, "pipeline", "%s; computing again in f32",
                err ? err->message : "not finite");
        qie_error_clear(err);
        st = attempt(e, options, QIE_F32, false, observer, out, &non_finite, err);
        out->retried_f32 = st == QIE_OK;
    }
    if (st == QIE_OK && observer)
        st = qie_observer_save(observer, err);
    qie_error trace = {0};
    if (qie_trace_save(&trace) != QIE_OK)
        qie_log(QIE_LOG_WARN, "trace", "%s", trace.message);
    if (st != QIE_OK)
        qie_edit_result_release(out);
    qie_observer_destroy(observer);
    return st;
}

void qie_edit_result_release(qie_edit_result *r) {
    if (!r)
        return;
    for (size_t i = 0; i < r->n_images; i++)
        qie_image_destroy(r->images[i]);
    free(r->images);
    memset(r, 0, sizeof *r);
}

char *qie_edit_parameters_json(const qie_engine *e, const qie_edit_options *options,
                               const qie_edit_result *result, size_t i_image) {
    const qie_edit_plan *p = &result->plan;
    qie_json *j = qie_json_new_object();
    qie_json_put(j, "program", qie_json_new_string("qwen-edit"));
    qie_json_put(j, "version", qie_json_new_string(QIE_VERSION));
    qie_json_put(j, "model", qie_json_new_string(e->name));
    qie_json_put(j, "precision",
                 qie_json_new_string(result->retried_f32 ? "f32" : precision_name(e)));
    qie_json_put(j, "prompt", qie_json_new_string(options->prompt));
    if (p->cfg)
        qie_json_put(j, "negative_prompt", qie_json_new_string(options->negative_prompt));
    qie_json_put(j, "seed", qie_json_new_int((int64_t)result->seed));
    if (result->n_images > 1) {
        qie_json_put(j, "i_image", qie_json_new_int((int64_t)i_image));
        qie_json_put(j, "num_images", qie_json_new_int((int64_t)result->n_images));
    }
    qie_json_put(j, "num_inference_steps", qie_json_new_int(p->num_inference_steps));
    qie_json_put(j, "true_cfg_scale", qie_json_new_double(p->true_cfg_scale));
    qie_json_put(j, "cfg", qie_json_new_bool(p->cfg));
    if (p->lightning)
        qie_json_put(j, "schedule", qie_json_new_string("lightning"));
    if (p->cache != QIE_CACHE_OFF) {
        qie_json_put(j, "cache", qie_json_new_string(qie_cache_name(p->cache)));
        qie_json_put(j, "skipped_forwards", qie_json_new_int(result->n_skipped));
    }
    qie_json *loras = qie_json_new_array();
    for (size_t i = 0; i < p->n_loras; i++) {
        qie_json *one = qie_json_new_object();
        qie_json_put(one, "name", qie_json_new_string(p->loras[i].name));
        qie_json_put(one, "weight", qie_json_new_double(p->loras[i].weight));
        qie_json_push(loras, one);
    }
    if (p->n_loras)
        qie_json_put(j, "loras", loras);
    else
        qie_json_free(loras);
    qie_json_put(j, "width", qie_json_new_int(p->output_width));
    qie_json_put(j, "height", qie_json_new_int(p->output_height));
    if (p->output_width != p->width || p->output_height != p->height) {
        qie_json_put(j, "generated_width", qie_json_new_int(p->width));
        qie_json_put(j, "generated_height", qie_json_new_int(p->height));
    }
    qie_json *images = qie_json_new_array();
    for (int i = 0; i < p->n_images; i++) {
        qie_json *one = qie_json_new_object();
        qie_json_put(one, "width", qie_json_new_int(p->images[i].width));
        qie_json_put(one, "height", qie_json_new_int(p->images[i].height));
        qie_json_put(one, "reference_width", qie_json_new_int(p->images[i].vae_width));
        qie_json_put(one, "reference_height", qie_json_new_int(p->images[i].vae_height));
        qie_json_push(images, one);
    }
    qie_json_put(j, "images", images);
    char *text = qie_json_text(j, 0);
    qie_json_free(j);
    return text;
}

/* ---- describing a model or a weight file */

static qie_json *describe_dtypes(const qie_weights *w) {
    int64_t bytes[QIE_DTYPE_COUNT] = {0};
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        if ((unsigned)t->dtype < QIE_DTYPE_COUNT)
            bytes[t->dtype] += (int64_t)t->n_bytes;
    }
    qie_json *j = qie_json_new_object();
    for (int d = 0; d < QIE_DTYPE_COUNT; d++)
        if (bytes[d])
            qie_json_put(j, qie_dtype_name((qie_dtype)d), qie_json_new_int(bytes[d]));
    return j;
}

static qie_json *describe_weights(const qie_weights *w) {
    qie_json *j = qie_json_new_object();
    qie_json_put(j, "tensors", qie_json_new_int((int64_t)qie_weights_count(w)));
    qie_json_put(j, "parameters", qie_json_new_int(qie_weights_elements(w)));
    qie_json_put(j, "bytes", qie_json_new_int(qie_weights_bytes(w)));
    qie_json_put(j, "dtypes", describe_dtypes(w));
    return j;
}

static qie_json *describe_model(const qie_model *m, const char *path) {
    const qie_model_config *c = &m->config;
    qie_json *j = qie_json_new_object(), *parts = qie_json_new_object();
    qie_json_put(j, "kind", qie_json_new_string("model"));
    qie_json_put(j, "path", qie_json_new_string(path));
    qie_json_put(j, "pipeline", qie_json_new_string("QwenImageEditPlusPipeline"));
    qie_json *t = describe_weights(m->w_transformer), *e = describe_weights(m->w_text_encoder),
             *v = describe_weights(m->w_vae);
    qie_json_put(t, "num_layers", qie_json_new_int(c->transformer.num_layers));
    qie_json_put(t, "inner_dim", qie_json_new_int(c->transformer.inner_dim));
    qie_json_put(t, "zero_cond_t", qie_json_new_bool(c->transformer.zero_cond_t));
    qie_json_put(e, "num_hidden_layers", qie_json_new_int(c->text.num_hidden_layers));
    qie_json_put(e, "hidden_size", qie_json_new_int(c->text.hidden_size));
    qie_json_put(e, "vision_depth", qie_json_new_int(c->vision.depth));
    qie_json_put(v, "base_dim", qie_json_new_int(c->vae.base_dim));
    qie_json_put(v, "z_dim", qie_json_new_int(c->vae.z_dim));
    qie_json_put(parts, "transformer", t);
    qie_json_put(parts, "text_encoder", e);
    qie_json_put(parts, "vae", v);
    qie_json_put(j, "components", parts);
    qie_json_put(j, "parameters", qie_json_new_int(qie_model_parameters(m)));
    qie_json_put(j, "bytes", qie_json_new_int(qie_model_weights_bytes(m)));
    qie_json *d = qie_json_new_object();
    qie_json_put(d, "num_inference_steps", qie_json_new_int(c->defaults.num_inference_steps));
    qie_json_put(d, "true_cfg_scale", qie_json_new_double(c->defaults.true_cfg_scale));
    if (c->defaults.max_side)
        qie_json_put(d, "max_side", qie_json_new_int(c->defaults.max_side));
    if (c->defaults.ref_area)
        qie_json_put(d, "ref_area", qie_json_new_int(c->defaults.ref_area));
    if (c->defaults.keep_size)
        qie_json_put(d, "size", qie_json_new_string("keep"));
    qie_json_put(j, "defaults", d);
    return j;
}

static qie_json *describe_file(const qie_weights *w, const char *path) {
    qie_json *j = describe_weights(w), *list = qie_json_new_array();
    qie_json_put(j, "kind", qie_json_new_string(qie_weights_format(w)));
    qie_json_put(j, "path", qie_json_new_string(path));
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        qie_json *one = qie_json_new_object(), *shape = qie_json_new_array();
        for (int d = 0; d < t->n_dims; d++)
            qie_json_push(shape, qie_json_new_int(t->shape[d]));
        qie_json_put(one, "name", qie_json_new_string(t->name));
        qie_json_put(one, "dtype", qie_json_new_string(qie_dtype_name(t->dtype)));
        qie_json_put(one, "shape", shape);
        qie_json_push(list, one);
    }
    qie_json_put(j, "list", list);
    return j;
}

/* ---- a LoRA */

static bool is_lora(const qie_weights *w) {
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const char *name = qie_weights_at(w, i)->name;
        if (strstr(name, ".lora_") || strstr(name, ".lora.") || strstr(name, "lokr_w") ||
            strstr(name, "hada_w"))
            return true;
    }
    return false;
}

static qie_json *describe_lora(const qie_lora *l, const char *path) {
    qie_json *j = describe_weights(l->file), *list = qie_json_new_array();
    bool from_metadata;
    const char *base = qie_lora_base(l, &from_metadata);
    qie_json_put(j, "kind", qie_json_new_string("lora"));
    qie_json_put(j, "path", qie_json_new_string(path));
    qie_json_put(j, "min_rank", qie_json_new_int(l->min_rank));
    qie_json_put(j, "max_rank", qie_json_new_int(l->max_rank));
    if (base)
        qie_json_put(j, "made_for", qie_json_new_string(base));
    if (l->preset.lightning) {
        int steps = l->preset.num_inference_steps;
        qie_json_put(j, "preset", qie_json_new_string("lightning"));
        qie_json_put(j, "preset_from", qie_json_new_string(l->preset_from));
        qie_json_put(j, "num_inference_steps",
                     qie_json_new_int(steps ? steps : QIE_LIGHTNING_STEPS));
    }
    qie_json_put(j, "n_modules", qie_json_new_int((int64_t)l->n_modules));
    for (size_t i = 0; i < l->n_modules; i++) {
        const qie_lora_module *m = &l->modules[i];
        qie_json *one = qie_json_new_object();
        qie_json_put(one, "name", qie_json_new_string(m->name));
        qie_json_put(one, "rank", qie_json_new_int(m->rank));
        qie_json_put(one, "scale", qie_json_new_double(m->scale));
        qie_json_put(one, "in", qie_json_new_int(m->k));
        qie_json_put(one, "out", qie_json_new_int(m->n));
        qie_json_push(list, one);
    }
    qie_json_put(j, "modules", list);
    return j;
}

qie_status qie_model_describe(const char *path, char **json_out, qie_error *err) {
    *json_out = NULL;
    qie_json *j;
    qie_weights *w = NULL;
    qie_model m;
    struct stat is;
    if (strcmp(path, "demo") && stat(path, &is) == 0 && S_ISREG(is.st_mode)) {
        QIE_TRY(qie_weights_open_file(path, &w, err));
        bool lora = is_lora(w);
        j = lora ? NULL : describe_file(w, path);
        qie_weights_close(w);
        if (lora) {
            qie_lora *l;
            QIE_TRY(qie_lora_open(path, &l, err));
            j = describe_lora(l, path);
            qie_lora_close(l);
        }
    } else {
        QIE_TRY(qie_model_open(path, &m, err));
        j = describe_model(&m, path);
        qie_model_release(&m);
    }
    *json_out = qie_json_text(j, 0);
    qie_json_free(j);
    QIE_FAIL_IF(!*json_out, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}
