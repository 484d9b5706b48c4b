#define _GNU_SOURCE
#include "cli/job.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "cli/interrupt.h"
#include "cli/loras.h"
#include "cli/output.h"
#include "cli/ui.h"

/* Side of a preview: enough to see whether the edit goes the right way. */
#define PREVIEW_PX 512

/* ---------------------------------------------------------------- the plan in words */

static const char *bytes_text(int64_t bytes, char out[32]) {
    double mib = (double)bytes / 1048576.0;
    snprintf(out, 32, mib < 1024 ? "%.1f MiB" : "%.2f GiB", mib < 1024 ? mib : mib / 1024);
    return out;
}

static void print_plan(const qie_engine_info *info, const cli_request *r, const qie_edit_plan *p) {
    char time[32], working[32], available[32], weights[32];
    printf("model      %s (%s, %s, %s, %d thread%s)\n", info->model_name, info->precision,
           info->backend, info->cpu_level, info->n_threads, info->n_threads == 1 ? "" : "s");
    printf("result     %dx%d", p->width, p->height);
    if (p->output_width != p->width || p->output_height != p->height)
        printf(", written as %dx%d", p->output_width, p->output_height);
    if (r->options.num_images > 1)
        printf(", %d times", r->options.num_images);
    printf("\n");
    for (int i = 0; i < p->n_images; i++)
        printf("picture %-2d %dx%d; to the vision tower %dx%d (%d tokens), to the VAE %dx%d (%d "
               "tokens)\n",
               i + 1, p->images[i].width, p->images[i].height, p->images[i].cond_width,
               p->images[i].cond_height, p->images[i].n_vision_tokens, p->images[i].vae_width,
               p->images[i].vae_height, p->images[i].n_latent_tokens);
    printf("tokens     %d of the instruction, %d of the negative prompt, %d of the result, %d of "
           "the references\n",
           p->n_prompt_tokens, p->n_negative_tokens, p->n_target_tokens, p->n_reference_tokens);
    printf("steps      %d, %s\n", p->num_inference_steps,
           p->cfg ? "each computed twice (guidance is on)"
                  : "each computed once (guidance is off)");
    if (p->cache != QIE_CACHE_OFF)
        printf("cache      %s\n", qie_cache_name(p->cache));
    for (size_t i = 0; i < p->n_loras; i++)
        printf("LoRA       %s, weight %g: %d modules of rank up to %d\n", p->loras[i].name,
               p->loras[i].weight, p->loras[i].n_modules, p->loras[i].max_rank);
    printf("memory     %s working, %s free; %s of weights stay in their files%s\n",
           bytes_text(p->working_bytes, working), bytes_text(p->available_bytes, available),
           bytes_text(p->weights_bytes, weights), p->vae_tiled ? "; the VAE works in tiles" : "");
    if (p->placement[0])
        printf("placement  %s\n", p->placement);
    printf("work       %.3g floating-point operations\n", p->flops);
    if (p->seconds_estimate >= 0)
        printf("time       about %s\n", cli_duration(p->seconds_estimate, time, sizeof time));
}

static qie_json *size_json(int width, int height) {
    qie_json *a = qie_json_new_array();
    qie_json_push(a, qie_json_new_int(width));
    qie_json_push(a, qie_json_new_int(height));
    return a;
}

static qie_json *warnings_json(const qie_edit_plan *p) {
    qie_json *a = qie_json_new_array();
    for (int i = 0; i < p->n_warnings; i++)
        qie_json_push(a, qie_json_new_string(p->warnings[i]));
    return a;
}

static qie_json *plan_json(const qie_edit_plan *p) {
    qie_json *o = qie_json_new_object(), *images = qie_json_new_array();
    qie_json_put(o, "width", qie_json_new_int(p->width));
    qie_json_put(o, "height", qie_json_new_int(p->height));
    qie_json_put(o, "output_width", qie_json_new_int(p->output_width));
    qie_json_put(o, "output_height", qie_json_new_int(p->output_height));
    for (int i = 0; i < p->n_images; i++) {
        qie_json *image = qie_json_new_object();
        qie_json_put(image, "size", size_json(p->images[i].width, p->images[i].height));
        qie_json_put(image, "vision_size",
                     size_json(p->images[i].cond_width, p->images[i].cond_height));
        qie_json_put(image, "vae_size", size_json(p->images[i].vae_width, p->images[i].vae_height));
        qie_json_put(image, "vision_tokens", qie_json_new_int(p->images[i].n_vision_tokens));
        qie_json_put(image, "latent_tokens", qie_json_new_int(p->images[i].n_latent_tokens));
        qie_json_push(images, image);
    }
    qie_json_put(o, "images", images);
    qie_json_put(o, "prompt_tokens", qie_json_new_int(p->n_prompt_tokens));
    qie_json_put(o, "negative_prompt_tokens", qie_json_new_int(p->n_negative_tokens));
    qie_json_put(o, "target_tokens", qie_json_new_int(p->n_target_tokens));
    qie_json_put(o, "reference_tokens", qie_json_new_int(p->n_reference_tokens));
    qie_json_put(o, "num_inference_steps", qie_json_new_int(p->num_inference_steps));
    qie_json_put(o, "true_cfg_scale", qie_json_new_double(p->true_cfg_scale));
    qie_json_put(o, "cfg", qie_json_new_bool(p->cfg));
    qie_json_put(o, "schedule", qie_json_new_string(p->lightning ? "lightning" : "model"));
    qie_json_put(o, "cache", qie_json_new_string(qie_cache_name(p->cache)));
    qie_json_put(o, "loras", cli_loras_json(p));
    qie_json_put(o, "vae_tiled", qie_json_new_bool(p->vae_tiled));
    qie_json_put(o, "working_bytes", qie_json_new_int(p->working_bytes));
    qie_json_put(o, "weights_bytes", qie_json_new_int(p->weights_bytes));
    qie_json_put(o, "available_bytes", qie_json_new_int(p->available_bytes));
    qie_json_put(o, "placement",
                 p->placement[0] ? qie_json_new_string(p->placement) : qie_json_new_null());
    qie_json_put(o, "flops", qie_json_new_double(p->flops));
    qie_json_put(o, "seconds_estimate",
                 p->seconds_estimate >= 0 ? qie_json_new_double(p->seconds_estimate)
                                          : qie_json_new_null());
    qie_json_put(o, "warnings", warnings_json(p));
    return o;
}

static void tell_warnings(const qie_edit_plan *plan) {
    for (int i = 0; i < plan->n_warnings; i++)
        cli_warn("%s", plan->warnings[i]);
}

qie_status cli_job_plan(qie_engine *engine, const cli_request *request, bool text,
                        qie_json **result, qie_error *err) {
    qie_edit_plan plan;
    qie_engine_info info;
    *result = NULL;
    QIE_TRY(qie_engine_plan(engine, &request->options, true, &plan, err));
    qie_engine_get_info(engine, &info);
    tell_warnings(&plan);
    if (text)
        print_plan(&info, request, &plan);
    *result = plan_json(&plan);
    qie_json_put(*result, "model", qie_json_new_string(info.model_name));
    qie_json_put(*result, "precision", qie_json_new_string(info.precision));
    return QIE_OK;
}

/* ---------------------------------------------------------------- computing */

typedef struct watcher {
    const cli_request *request;
    bool preview_failed; /* said once */
} watcher;

static void on_progress(void *arg, const qie_progress *progress) {
    watcher *w = arg;
    cli_progress(progress);
    if (!progress->preview || !w->request->preview || cli_interrupted())
        return;
    qie_error e;
    if (cli_write_picture(w->request->preview, progress->preview, w->request->preview_format, 0,
                          NULL, &e) != QIE_OK &&
        !w->preview_failed && !cli_interrupted()) {
        w->preview_failed = true; /* a preview is no reason to lose the edit */
        cli_warn("preview: %s", e.message);
    }
}

static void announce(qie_engine *engine, const cli_request *r, const qie_edit_plan *p) {
    qie_engine_info info;
    qie_engine_get_info(engine, &info);
    char size[64] = "", scale[96];
    if (p->output_width != p->width || p->output_height != p->height)
        snprintf(size, sizeof size, " (written as %dx%d)", p->output_width, p->output_height);
    if (p->cfg)
        snprintf(scale, sizeof scale, "true CFG %g (two passes a step)", p->true_cfg_scale);
    else
        snprintf(scale, sizeof scale, "no CFG");
    if (cli_ui_is_json()) {
        qie_json *start = plan_json(p);
        qie_json_put(start, "seed", qie_json_new_int((int64_t)r->options.seed));
        qie_json_put(start, "model", qie_json_new_string(info.model_name));
        qie_json_put(start, "precision", qie_json_new_string(info.precision));
        cli_event("start", start);
    } else
        cli_note("%s, %s, %s; %dx%d%s, %d step%s, %s, seed %llu", info.model_name, info.precision,
                 info.cpu_level, p->width, p->height, size, p->num_inference_steps,
                 p->num_inference_steps == 1 ? "" : "s", scale,
                 (unsigned long long)r->options.seed);
    tell_warnings(p);
}

/* All pictures are encoded before the first is written: a failure leaves as little behind as
 * possible. */
static qie_status encode_all(const qie_engine *engine, const cli_request *r,
                             const qie_edit_result *out, cli_output *list, qie_error *err) {
    for (size_t i = 0; i < out->n_images; i++) {
        qie_image_encode_options o = qie_image_encode_options_default();
        char *parameters =
            r->metadata ? qie_edit_parameters_json(engine, &r->options, out, i) : NULL;
        o.format = r->format;
        o.parameters = parameters;
        if (r->quality)
            o.quality = r->quality;
        list[i].path = cli_output_path(r->output, (int)i, (int)out->n_images);
        qie_status st = !list[i].path || (r->metadata && !parameters)
                            ? qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory")
                            : qie_image_encode(out->images[i], &o, &list[i].bytes, &list[i].n, err);
        free(parameters);
        QIE_TRY(st);
    }
    return QIE_OK;
}

static qie_json *timings_json(const qie_edit_result *out) {
    qie_json *t = qie_json_new_object();
    qie_json_put(t, "encode_s", qie_json_new_double(out->encode_s));
    qie_json_put(t, "denoise_s", qie_json_new_double(out->denoise_s));
    qie_json_put(t, "decode_s", qie_json_new_double(out->decode_s));
    qie_json_put(t, "total_s", qie_json_new_double(out->total_s));
    return t;
}

static qie_json *result_json(const qie_engine *engine, const qie_edit_result *out,
                             const cli_output *list) {
    qie_engine_info info;
    qie_engine_get_info(engine, &info);
    qie_json *o = qie_json_new_object();
    cli_outputs_json(list, out->n_images, o);
    qie_json_put(o, "seed", qie_json_new_int((int64_t)out->seed));
    qie_json_put(o, "width", qie_json_new_int(qie_image_width(out->images[0])));
    qie_json_put(o, "height", qie_json_new_int(qie_image_height(out->images[0])));
    qie_json_put(o, "num_inference_steps", qie_json_new_int(out->plan.num_inference_steps));
    qie_json_put(o, "true_cfg_scale", qie_json_new_double(out->plan.true_cfg_scale));
    qie_json_put(o, "cfg", qie_json_new_bool(out->plan.cfg));
    qie_json_put(o, "cache", qie_json_new_string(qie_cache_name(out->plan.cache)));
    if (out->plan.cache != QIE_CACHE_OFF)
        qie_json_put(o, "skipped_forwards", qie_json_new_int(out->n_skipped));
    qie_json_put(o, "loras", cli_loras_json(&out->plan));
    qie_json_put(o, "model", qie_json_new_string(info.model_name));
    qie_json_put(o, "precision", qie_json_new_string(out->retried_f32 ? "f32" : info.precision));
    qie_json_put(o, "timings", timings_json(out));
    qie_json_put(o, "warnings", cli_warnings_json());
    return o;
}

/* What came out, once the pictures are computed. */
static qie_status deliver(const qie_engine *engine, const cli_request *r,
                          const qie_edit_result *out, bool paths, qie_json **result,
                          qie_error *err) {
    cli_output list[16] = {{0}};
    char time[32];
    QIE_FAIL_IF(out->n_images == 0 || out->n_images > 16, QIE_E_INTERNAL, err, NULL,
                "%zu pictures computed", out->n_images);
    if (out->retried_f32)
        cli_warn("values were not finite in the fast precision; computed again in f32");
    qie_status st = encode_all(engine, r, out, list, err);
    if (st == QIE_OK)
        st = cli_outputs_write(list, out->n_images, paths, err);
    if (st == QIE_OK) {
        if (out->plan.cache != QIE_CACHE_OFF)
            cli_note("cache %s: %d of %d passes cut short", qie_cache_name(out->plan.cache),
                     out->n_skipped, out->n_forwards);
        cli_note("wrote %s (%dx%d) in %s", out->n_images > 1 ? r->output : list[0].path,
                 qie_image_width(out->images[0]), qie_image_height(out->images[0]),
                 cli_duration(out->total_s, time, sizeof time));
        *result = result_json(engine, out, list);
    }
    cli_outputs_release(list, out->n_images);
    return st;
}

qie_status cli_job_run(qie_engine *engine, cli_request *request, bool paths, qie_json **result,
                       qie_error *err) {
    qie_edit_plan plan;
    qie_edit_result out;
    watcher w = {.request = request};
    *result = NULL;
    QIE_TRY(qie_engine_plan(engine, &request->options, false, &plan, err));
    announce(engine, request, &plan);
    request->options.progress = on_progress;
    request->options.progress_arg = &w;
    request->options.preview_max_px = request->preview ? PREVIEW_PX : 0;
    qie_status st = qie_engine_edit(engine, &request->options, &out, err);
    cli_progress_end();
    QIE_TRY(st);
    st = cli_interrupted() ? qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted")
                           : deliver(engine, request, &out, paths, result, err);
    qie_edit_result_release(&out);
    return st;
}
