/* What is decided before an edit computes: defaults, sizes, tokens, memory, and every refusal. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/strbuf.h"
#include "model/pipeline.h"

#define MAX_PROMPT_CHARACTERS 32000 /* http-api.md, POST /edit */

static qie_status check_text(const char *text, const char *param, bool may_be_empty,
                             qie_error *err) {
    size_t n = strlen(text);
    QIE_FAIL_IF(!qie_utf8_valid(text, n), QIE_E_INVALID, err, param, "the %s is not valid UTF-8",
                param);
    size_t chars = qie_utf8_length(text, n);
    QIE_FAIL_IF(!chars && !may_be_empty, QIE_E_INVALID, err, param,
                "the %s is empty: say what to change", param);
    QIE_FAIL_IF(chars > MAX_PROMPT_CHARACTERS, QIE_E_INVALID, err, param,
                "the %s has %zu characters, more than the limit of %d", param, chars,
                MAX_PROMPT_CHARACTERS);
    return QIE_OK;
}

static qie_status check_options(const qie_edit_options *o, qie_error *err) {
    QIE_FAIL_IF(o->n_images < 1 || o->n_images > QIE_MAX_IMAGES, QIE_E_INVALID, err, "image",
                "%zu pictures given, 1 to %d are possible", o->n_images, QIE_MAX_IMAGES);
    QIE_FAIL_IF(!o->prompt, QIE_E_INVALID, err, "prompt", "the prompt is missing");
    QIE_TRY(check_text(o->prompt, "prompt", false, err));
    if (o->negative_prompt)
        QIE_TRY(check_text(o->negative_prompt, "negative_prompt", true, err));
    QIE_FAIL_IF(o->seed > (UINT64_C(1) << 53) - 1, QIE_E_INVALID, err, "seed",
                "seed is above 9007199254740991 (2^53 - 1)");
    QIE_FAIL_IF(o->num_inference_steps < 1 || o->num_inference_steps > 200, QIE_E_INVALID, err,
                "num_inference_steps", "num_inference_steps is %d, not within 1..200",
                o->num_inference_steps);
    QIE_FAIL_IF(!(o->true_cfg_scale >= 0 && o->true_cfg_scale <= 20), QIE_E_INVALID, err,
                "true_cfg_scale", "true_cfg_scale is %g, not within 0..20", o->true_cfg_scale);
    QIE_FAIL_IF(!isfinite(o->guidance_scale), QIE_E_INVALID, err, "guidance_scale",
                "guidance_scale is no number");
    QIE_FAIL_IF((unsigned)o->cache >= QIE_CACHE_COUNT, QIE_E_INVALID, err, "cache",
                "cache is none of off, balanced, fast");
    QIE_FAIL_IF(o->num_images < 1 || o->num_images > 10, QIE_E_INVALID, err, "num_images",
                "num_images is %d, not within 1..10", o->num_images);
    return QIE_OK;
}

static void fill_defaults(const qie_model *m, qie_edit_options *o) {
    const qie_defaults_config *d = &m->config.defaults;
    qie_model_defaults now = qie_model_defaults_now(m);
    if (o->num_inference_steps == 0)
        o->num_inference_steps = now.num_inference_steps;
    if (o->true_cfg_scale < 0)
        o->true_cfg_scale = now.true_cfg_scale;
    if (o->max_side == 0)
        o->max_side = d->max_side;
    if (o->max_side == -1)
        o->max_side = 0;
    if (o->ref_area == 0)
        o->ref_area = d->ref_area;
    if (o->keep_size == -1)
        o->keep_size = d->keep_size && !o->width && !o->height;
    if (o->num_images == 0)
        o->num_images = 1;
}

static void choose_schedule(const qie_model *m, qie_prepared *p) {
    p->scheduler = m->config.scheduler;
    p->lightning =
        p->options.schedule == QIE_SCHEDULE_LIGHTNING ||
        (p->options.schedule == QIE_SCHEDULE_AUTO && qie_model_defaults_now(m).lightning);
    if (p->lightning)
        qie_scheduler_set_lightning(&p->scheduler);
}

static qie_status make_sizes(const qie_model *m, const qie_edit_options *o, qie_size_plan *s,
                             qie_error *err) {
    qie_size_request r = {.n_images = (int)o->n_images,
                          .width = o->width,
                          .height = o->height,
                          .max_side = o->max_side,
                          .ref_area = o->ref_area,
                          .keep_size = o->keep_size == 1};
    QIE_FAIL_IF(r.keep_size && (o->width || o->height), QIE_E_INVALID, err, "keep_size",
                "keep_size and width or height exclude each other");
    QIE_FAIL_IF(o->width < 0 || o->height < 0 || o->max_side < 0 || o->ref_area < 0, QIE_E_INVALID,
                err, "width", "sizes must not be negative");
    for (size_t i = 0; i < o->n_images; i++)
        r.images[i] = (qie_size){qie_image_width(o->images[i]), qie_image_height(o->images[i])};
    return qie_size_plan_make(&m->config, &r, s, err);
}

/* Rows of conditioning, from the prompt or from an injected tensor. */
static qie_status count_text(const qie_model *m, qie_prepared *p, int pass, qie_error *err) {
    static const char *const names[2] = {"prompt_embeds", "neg.prompt_embeds"};
    p->n_text[pass] = (int64_t)(p->prompts[pass].n_ids - p->prompts[pass].n_drop);
    for (size_t i = 0; i < p->options.n_injections; i++) {
        if (strcmp(p->options.injections[i].name, names[pass]))
            continue;
        const qie_tensor *t = qie_weights_find(p->injected[i], names[pass]);
        int64_t width = m->config.text.hidden_size;
        QIE_FAIL_IF(!t || t->n_dims < 2 || t->shape[t->n_dims - 1] != width ||
                        t->n_elements != t->shape[t->n_dims - 2] * width || t->n_elements < 1,
                    QIE_E_INVALID, err, "inject", "'%s' holds no tensor '%s' of [rows, %lld]",
                    p->options.injections[i].path, names[pass], (long long)width);
        p->n_text[pass] = t->shape[t->n_dims - 2];
    }
    return QIE_OK;
}

static qie_status tokenize(const qie_model *m, qie_prepared *p, qie_error *err) {
    int counts[QIE_MAX_IMAGES];
    const char *texts[2] = {p->options.prompt, p->options.negative_prompt};
    for (int i = 0; i < p->sizes.n_images; i++)
        counts[i] = p->sizes.images[i].n_vision_tokens;
    for (int pass = 0; pass < p->n_passes; pass++) {
        qie_status st = qie_prompt_build(m->tokenizer, texts[pass], strlen(texts[pass]), counts,
                                         (size_t)p->sizes.n_images, &p->prompts[pass], err);
        if (st != QIE_OK && pass && err && !strcmp(err->param, "prompt"))
            snprintf(err->param, sizeof err->param, "negative_prompt");
        QIE_TRY(st);
        QIE_TRY(count_text(m, p, pass, err));
        QIE_TRY(qie_size_plan_check_text(&p->sizes, p->n_text[pass],
                                         (int64_t)p->prompts[pass].n_prompt,
                                         pass ? "negative_prompt" : "prompt", err));
    }
    return QIE_OK;
}

static qie_status open_injections(qie_prepared *p, qie_error *err) {
    static const char *const known[] = {"noise", "latents", "prompt_embeds", "neg.prompt_embeds",
                                        "image_latents"};
    QIE_FAIL_IF(p->options.n_injections > sizeof p->injected / sizeof *p->injected, QIE_E_INVALID,
                err, "inject", "more than %zu injections",
                sizeof p->injected / sizeof *p->injected);
    for (size_t i = 0; i < p->options.n_injections; i++) {
        const qie_injection *j = &p->options.injections[i];
        bool ok = false;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++)
            ok = ok || !strcmp(known[k], j->name);
        QIE_FAIL_IF(
            !ok, QIE_E_INVALID, err, "inject",
            "'%s' cannot be injected: one of noise, latents, prompt_embeds, neg.prompt_embeds, "
            "image_latents",
            j->name);
        QIE_TRY(qie_weights_open_file(j->path, &p->injected[i], err));
        QIE_FAIL_IF(!qie_weights_find(p->injected[i], j->name), QIE_E_INVALID, err, "inject",
                    "'%s' holds no tensor '%s'", j->path, j->name);
    }
    return QIE_OK;
}

static qie_status plan_memory(qie_prepared *p, int64_t limit, qie_error *err) {
    QIE_FAIL_IF(!qie_memory_plan_make(&p->request, &p->memory), QIE_E_TOO_LARGE, err, "image",
                "an edit of this size needs more memory than can be counted");
    int64_t total = qie_memory_total(), mb = 1 << 20;
    const char *help = "a smaller --max-side, fewer pictures or a smaller --ref-area need less";
    QIE_FAIL_IF(total > 0 && p->memory.total > total, QIE_E_TOO_LARGE, err, "max_side",
                "this edit needs %lld MB of working memory, the machine has %lld MB in all: %s",
                (long long)(p->memory.total / mb), (long long)(total / mb), help);
    QIE_FAIL_IF(limit && p->memory.total > limit, QIE_E_NO_MEMORY, err, "max_side",
                "this edit needs %lld MB of working memory, %lld MB are free: %s",
                (long long)(p->memory.total / mb), (long long)(limit / mb), help);
    return QIE_OK;
}

qie_status qie_prepare(const qie_model *m, const qie_edit_options *options, qie_dtype act,
                       int64_t limit_bytes, qie_prepared *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    out->options = *options;
    fill_defaults(m, &out->options);
    choose_schedule(m, out);
    QIE_TRY(check_options(&out->options, err));
    out->caching = qie_cache_rules_make(out->options.cache, out->options.cache_threshold,
                                        out->options.num_inference_steps, &out->cache);
    QIE_TRY(make_sizes(m, &out->options, &out->sizes, err));
    out->n_passes = out->options.true_cfg_scale > 1 && out->options.negative_prompt ? 2 : 1;
    QIE_TRY(open_injections(out, err));
    QIE_TRY(tokenize(m, out, err));
    out->request = (qie_memory_request){.model = &m->config,
                                        .sizes = &out->sizes,
                                        .act = act,
                                        .n_passes = out->n_passes,
                                        .n_steps = out->options.num_inference_steps,
                                        .step_cache = out->caching,
                                        .n_outputs = out->options.num_images,
                                        .lora_rank = qie_adapters_get(m->adapters)->rank,
                                        .lora_flops = qie_adapters_get(m->adapters)->flops,
                                        .preview_px = out->options.preview_max_px,
                                        .limit_bytes = limit_bytes};
    for (int i = 0; i < out->n_passes; i++) {
        out->request.n_ids[i] = (int64_t)out->prompts[i].n_ids;
        out->request.n_text[i] = out->n_text[i];
    }
    for (int i = 0; i < QIE_PROMPT_PARTS; i++)
        out->request.parts[i] = (int64_t)out->prompts[0].parts[i];
    out->request.n_drop = (int64_t)out->prompts[0].n_drop;
    return plan_memory(out, limit_bytes, err);
}

void qie_prepared_release(qie_prepared *p) {
    for (int i = 0; i < 2; i++)
        qie_prompt_release(&p->prompts[i]);
    for (size_t i = 0; i < sizeof p->injected / sizeof *p->injected; i++)
        qie_weights_close(p->injected[i]);
    memset(p, 0, sizeof *p);
}

__attribute__((format(printf, 2, 3))) static void warn(qie_edit_plan *plan, const char *fmt, ...) {
    if (plan->n_warnings >= QIE_MAX_WARNINGS)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(plan->warnings[plan->n_warnings++], sizeof plan->warnings[0], fmt, ap);
    va_end(ap);
}

/* What a preset changed, and that it was one. */
static void describe_preset(const qie_model *m, const qie_prepared *p, qie_edit_plan *plan) {
    qie_model_defaults now = qie_model_defaults_now(m);
    const qie_edit_options *o = &p->options;
    if (!now.lightning)
        return;
    if (p->lightning && o->num_inference_steps == now.num_inference_steps && p->n_passes == 1)
        warn(plan, "Lightning, %s: %d steps, no CFG, its own schedule", now.preset_from,
             o->num_inference_steps);
    else
        warn(plan, "Lightning, %s, is made for %d steps without CFG: %d steps%s%s asked for",
             now.preset_from, now.num_inference_steps, o->num_inference_steps,
             p->n_passes > 1 ? " with CFG" : "", p->lightning ? "" : " on the model's schedule");
}

static void describe_loras(const qie_model *m, qie_edit_plan *plan) {
    const qie_adapters_active *a = qie_adapters_get(m->adapters);
    plan->n_loras = a->n;
    for (size_t i = 0; i < a->n; i++) {
        memcpy(plan->loras[i].name, a->loras[i].name, sizeof plan->loras[i].name);
        plan->loras[i].weight = a->loras[i].weight;
        plan->loras[i].n_modules = a->loras[i].n_modules;
        plan->loras[i].max_rank = (int)a->loras[i].max_rank;
    }
}

void qie_prepared_describe(const qie_model *m, const qie_prepared *p, qie_edit_plan *plan) {
    memset(plan, 0, sizeof *plan);
    const qie_size_plan *s = &p->sizes;
    plan->width = s->generated.w;
    plan->height = s->generated.h;
    plan->output_width = s->output.w;
    plan->output_height = s->output.h;
    plan->n_images = s->n_images;
    for (int i = 0; i < s->n_images; i++) {
        plan->images[i].width = qie_image_width(p->options.images[i]);
        plan->images[i].height = qie_image_height(p->options.images[i]);
        plan->images[i].cond_width = s->images[i].cond.w;
        plan->images[i].cond_height = s->images[i].cond.h;
        plan->images[i].vae_width = s->images[i].vae.w;
        plan->images[i].vae_height = s->images[i].vae.h;
        plan->images[i].n_vision_tokens = s->images[i].n_vision_tokens;
        plan->images[i].n_latent_tokens = s->images[i].grid_w * s->images[i].grid_h;
    }
    plan->n_prompt_tokens = (int)p->n_text[0];
    plan->n_negative_tokens = p->n_passes > 1 ? (int)p->n_text[1] : 0;
    plan->n_target_tokens = (int)s->n_target;
    plan->n_reference_tokens = (int)s->n_reference;
    plan->num_inference_steps = p->options.num_inference_steps;
    plan->true_cfg_scale = p->options.true_cfg_scale;
    plan->cfg = p->n_passes > 1;
    plan->lightning = p->lightning;
    plan->cache = p->caching ? p->options.cache : QIE_CACHE_OFF;
    describe_loras(m, plan);
    describe_preset(m, p, plan);
    plan->vae_tiled = p->memory.vae_tiled;
    plan->working_bytes = p->memory.total;
    plan->weights_bytes = qie_model_weights_bytes(m);
    plan->flops = p->memory.flops_text + p->memory.flops_vae_encode +
                  p->options.num_images * (p->memory.flops_step * p->options.num_inference_steps +
                                           p->memory.flops_vae_decode);
    plan->seconds_estimate = -1;
    if (s->floored)
        warn(plan, "width and height are floored to multiples of 16: %dx%d", s->generated.w,
             s->generated.h);
    if (s->kept_by_resize)
        warn(plan,
             "the picture is larger than this model works on: generated at %dx%d and resized back "
             "to %dx%d",
             s->generated.w, s->generated.h, s->output.w, s->output.h);
    if (p->options.guidance_scale != 1.0)
        warn(plan,
             "guidance_scale %g has no effect on this model: true_cfg_scale is the one that guides",
             p->options.guidance_scale);
    if (p->options.cache != QIE_CACHE_OFF && !p->caching)
        warn(plan, "cache '%s' does nothing in %d steps: each of %d or fewer counts",
             qie_cache_name(p->options.cache), p->options.num_inference_steps,
             QIE_CACHE_MIN_STEPS - 1);
    if (p->options.true_cfg_scale > 1 && !p->options.negative_prompt)
        warn(plan, "true_cfg_scale %g needs a negative prompt (a space will do): CFG is off",
             p->options.true_cfg_scale);
    if (p->memory.vae_tiled)
        warn(plan,
             "the VAE works in tiles to fit into memory: seams may differ slightly from diffusers");
    if (p->options.num_inference_steps == 1 && p->scheduler.shift_terminal > 0)
        warn(plan, "one step: the schedule is 1, 0 (diffusers divides zero by zero here)");
}
