#define _GNU_SOURCE
#include "model/pipeline.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/rng.h"
#include "base/trace.h"
#include "image/geometry.h"
#include "image/resample.h"
#include "model/latents.h"
#include "model/scheduler.h"
#include "qie/bench.h"

/* State of one running edit. */
typedef struct edit {
    qie_model *m;
    qie_run run; /* own copy: its beat reports progress */
    qie_prepared *p;
    int n_threads;
    int n_reused; /* of what the text stage can take from the cache: see text_keys */
    /* progress */
    double started, last_told;
    const char *stage;
    int step, total, i_image;
    double denoise_started, flops_done; /* of the denoising so far */
    int n_beats, beats_per_step;        /* blocks since the step began */
    /* arena, persistent over the stages */
    float *prompt_embeds[2], *image_latents, *velocity[2];
    float *latents[10];
    float *sigmas, *timesteps;
    int n_forwards, n_skipped;
} edit;

static double left_of_denoise(const edit *e, double now) {
    const qie_memory_plan *mem = &e->p->memory;
    int n_steps = e->p->options.num_inference_steps, n = e->p->options.num_images;
    double passes = e->beats_per_step > 0 ? (double)e->n_beats / e->beats_per_step : 0;
    double done = e->i_image * n_steps + e->step + (passes < 1 ? passes : 1);
    double all = (double)n * n_steps, spent = now - e->denoise_started;
    if (done <= 0 || spent <= 0.05)
        return -1;
    double per_step = spent / done;
    /* The decoder's convolutions run at about the speed of the blocks' products. */
    double decode = mem->flops_vae_decode / (mem->flops_step / per_step) * n;
    return per_step * (all - done) + decode;
}

static void tell(edit *e, const char *stage, int step, int total, const qie_image *preview) {
    e->stage = stage;
    e->step = step;
    e->total = total;
    const qie_edit_options *o = &e->p->options;
    double now = qie_now_s();
    e->last_told = now;
    if (!o->progress)
        return;
    qie_progress p = {.stage = stage,
                      .step = step,
                      .total = total,
                      .i_image = e->i_image,
                      .n_images = o->num_images,
                      .elapsed_s = now - e->started,
                      .seconds_left = -1,
                      .preview = preview};
    if (!strcmp(stage, "denoise"))
        p.seconds_left = left_of_denoise(e, now);
    o->progress(o->progress_arg, &p);
}

/* Called from every block, layer and VAE level: a long step shows that it lives. */
static void on_beat(void *arg) {
    edit *e = arg;
    e->n_beats++;
    if (e->stage && qie_now_s() - e->last_told > 0.5)
        tell(e, e->stage, e->step, e->total, NULL);
}

/* ---- values given from files */

static qie_status injected(const edit *e, const char *name, int64_t n, float *out, bool *found,
                           qie_error *err) {
    *found = false;
    const qie_edit_options *o = &e->p->options;
    for (size_t i = 0; i < o->n_injections; i++) {
        if (strcmp(o->injections[i].name, name))
            continue;
        const qie_tensor *t = qie_weights_find(e->p->injected[i], name);
        QIE_FAIL_IF(!t || t->n_elements != n || qie_to_f32(out, t->data, t->dtype, (size_t)n),
                    QIE_E_INVALID, err, "inject",
                    "tensor '%s' in '%s' has %lld values, %lld floating ones are needed", name,
                    o->injections[i].path, (long long)(t ? t->n_elements : 0), (long long)n);
        *found = true;
    }
    return QIE_OK;
}

/* ---- dumps in the shapes of the reference recording */

/* A dump is of the first picture. */
static bool observing(const edit *e) {
    return e->i_image == 0 || qie_observer_checks(e->run.observer);
}

static void observe_map(const edit *e, const char *name, const float *map, int h, int w, int c) {
    if (!qie_observer_wants(e->run.observer, name))
        return;
    int64_t n = (int64_t)h * w, shape[5] = {1, c, 1, h, w};
    float *t = malloc(sizeof(float) * (size_t)(n * c));
    for (int64_t i = 0; t && i < n; i++)
        for (int k = 0; k < c; k++)
            t[k * n + i] = map[i * c + k];
    if (t)
        qie_observe_f32(e->run.observer, name, t, 5, shape);
    free(t);
}

static void observe_rows(const edit *e, const char *name, const float *rows, int64_t n, int64_t c) {
    int64_t shape[3] = {1, n, c};
    qie_observe_f32(e->run.observer, name, rows, 3, shape);
}

/* The same for rows that operations computed. */
static void observe_computed(const edit *e, const char *name, const float *rows, int64_t n,
                             int64_t c) {
    int64_t shape[3] = {1, n, c};
    qie_run_observe(&e->run, name, rows, 3, shape);
}

static void observe_ids(const edit *e, const char *prefix, const qie_prompt *p) {
    if (!e->run.observer)
        return;
    char name[64];
    int64_t shape[2] = {1, (int64_t)p->n_ids}, *ids = malloc(sizeof *ids * p->n_ids * 2);
    for (size_t i = 0; ids && i < p->n_ids; i++) {
        ids[i] = p->ids[i];
        ids[p->n_ids + i] = 1;
    }
    if (ids) {
        snprintf(name, sizeof name, "%sinput_ids", prefix);
        qie_observe_i64(e->run.observer, name, ids, 2, shape);
        snprintf(name, sizeof name, "%sattention_mask", prefix);
        qie_observe_i64(e->run.observer, name, ids + p->n_ids, 2, shape);
    }
    free(ids);
}

/* ---- text stage */

static qie_status fill_patches(edit *e, float *patches, qie_error *err) {
    const qie_vision_config *v = &e->m->config.vision;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    int64_t grid[QIE_MAX_PICTURES * 3];
    for (int i = 0; i < e->p->sizes.n_images; i++) {
        qie_size cond = e->p->sizes.images[i].cond, px = e->p->sizes.images[i].grid_px;
        qie_image *a = NULL, *b = NULL;
        QIE_TRY(qie_run_check(&e->run, err));
        /* Two resamplings of 8-bit data: Lanczos by the pipeline, bicubic by the processor. */
        qie_status st = qie_resample(e->p->options.images[i], cond.w, cond.h, QIE_FILTER_LANCZOS,
                                     QIE_RESAMPLE_PILLOW_13, e->n_threads, &a, err);
        if (st == QIE_OK)
            st = qie_resample(a, px.w, px.h, QIE_FILTER_BICUBIC, QIE_RESAMPLE_PILLOW_13,
                              e->n_threads, &b, err);
        if (st == QIE_OK)
            qie_patches_from_image(&e->m->config.processor, v, b, patches);
        qie_image_destroy(a);
        qie_image_destroy(b);
        QIE_TRY(st);
        patches += e->p->sizes.images[i].n_patches * patch;
        grid[i * 3] = 1;
        grid[i * 3 + 1] = px.h / v->patch_size;
        grid[i * 3 + 2] = px.w / v->patch_size;
    }
    int64_t shape[2] = {e->p->sizes.n_images, 3};
    qie_observe_i64(e->run.observer, "image_grid_thw", grid, 2, shape);
    return QIE_OK;
}

static qie_status encode_prompt(edit *e, int pass, const float *features,
                                qie_language_prefix *prefix, float *hidden, qie_error *err) {
    const qie_prompt *p = &e->p->prompts[pass];
    int64_t width = e->m->config.text.hidden_size, n = (int64_t)p->n_ids;
    const char *names[2][2] = {{"hidden_last", "prompt_embeds"},
                               {"neg.hidden_last", "neg.prompt_embeds"}};
    bool given;
    QIE_TRY(injected(e, names[pass][1], e->p->n_text[pass] * width, e->prompt_embeds[pass], &given,
                     err));
    observe_ids(e, pass ? "neg." : "", p);
    if (!given) {
        bool seen = qie_language_start(prefix) > (int64_t)p->parts[0];
        QIE_TRY(qie_language_encode(e->m->text_encoder, &e->run, &e->p->sizes, p->ids, n,
                                    p->image_pad_id, features,
                                    seen ? 0 : e->p->sizes.n_vision_tokens, e->p->options.positions,
                                    prefix, e->run.observer ? 0 : (int64_t)p->n_drop, hidden, err));
        observe_rows(e, names[pass][0], hidden, n, width);
        memcpy(e->prompt_embeds[pass], hidden + (int64_t)p->n_drop * width,
               sizeof(float) * (size_t)(e->p->n_text[pass] * width));
    }
    observe_rows(e, names[pass][1], e->prompt_embeds[pass], e->p->n_text[pass], width);
    return QIE_OK;
}

/* Numbers that the host works on; those of operations come from qie_run_alloc. */
static qie_status alloc(const qie_run *run, int64_t n, float **out, qie_error *err) {
    void *p;
    QIE_TRY(qie_run_alloc_host(run, sizeof(float) * (size_t)n, &p, err));
    *out = p;
    return QIE_OK;
}

/* What the text stage takes from earlier edits, and its keys. The conditioning of each prompt;
 * where rows do not depend on their neighbours, keys, values and conditioning of what the prompts
 * begin with; else, or if those are too large, the vision features. */
enum { REUSE_ALL = QIE_PROMPT_PARTS + 1 }; /* parts, and conditioning */
typedef struct text_keys {
    int n_parts;           /* that may be taken and kept */
    bool features, embeds; /* these, too */
    bool kept[2];          /* conditioning that was found */
    qie_prompt_key features_key, parts_key[QIE_PROMPT_PARTS], embeds_key[2];
} text_keys;

/* The first n tokens of the prompt as a part of a key. */
static qie_prompt_part tokens(const edit *e, int pass, size_t n) {
    return (qie_prompt_part){e->p->prompts[pass].ids, n * sizeof(int32_t)};
}

static size_t part_floats(const edit *e, int i_part) {
    const qie_memory_request *r = &e->p->request;
    int64_t from = i_part ? r->parts[0] : 0;
    return (size_t)qie_memory_part_bytes(r, from, r->parts[i_part]) / sizeof(float);
}

/* Where rows depend on their neighbours, the second pass starts behind what it has in common with
 * the first: both prompts belong to its key. */
static qie_status make_embeds_keys(const edit *e, text_keys *out, qie_error *err) {
    bool alone = e->run.compute->rows_alone;
    for (int i = 0; i < e->p->n_passes; i++) {
        int own = alone ? -1 : i;
        qie_prompt_part parts[4] = {{out->features_key.hex, sizeof out->features_key.hex},
                                    {&own, sizeof own}};
        size_t n = 2;
        for (int k = 0; k < e->p->n_passes; k++)
            if (!alone || k == i)
                parts[n++] = tokens(e, k, e->p->prompts[k].n_ids);
        QIE_TRY(qie_prompt_key_make(parts, n, &out->embeds_key[i], err));
    }
    return QIE_OK;
}

static qie_status make_keys(const edit *e, const float *patches, size_t patch_bytes, text_keys *out,
                            qie_error *err) {
    const qie_size_plan *s = &e->p->sizes;
    const qie_adapters_active *a = qie_adapters_get(e->m->adapters);
    int32_t act = (int32_t)e->run.act,
            head[1 + 2 * QIE_MAX_PICTURES] = {(int32_t)e->p->options.positions};
    double loras[2 * QIE_MAX_LORAS + 1];
    memset(out, 0, sizeof *out);
    if (!e->run.prompt_cache || e->run.observer || e->p->options.n_injections)
        return QIE_OK;
    if (e->run.compute->rows_alone && !e->run.compute->mem)
        out->n_parts = e->n_reused < QIE_PROMPT_PARTS ? e->n_reused : QIE_PROMPT_PARTS;
    out->embeds = e->n_reused == REUSE_ALL;
    for (int i = 0; i < s->n_images; i++) {
        head[1 + 2 * i] = s->images[i].grid_px.h;
        head[2 + 2 * i] = s->images[i].grid_px.w;
    }
    for (size_t i = 0; i < a->n; i++) {
        loras[2 * i] = (double)a->loras[i].id;
        loras[2 * i + 1] = a->loras[i].weight;
    }
    size_t n_template = e->p->prompts[0].parts[0];
    const qie_prompt_part from[] = {{&act, sizeof act},
                                    {loras, 2 * a->n * sizeof *loras},
                                    tokens(e, 0, n_template),
                                    {head, sizeof *head * (size_t)(1 + 2 * s->n_images)},
                                    {patches, patch_bytes}};
    QIE_TRY(qie_prompt_key_make(from, 3, &out->parts_key[0], err));
    QIE_TRY(qie_prompt_key_make(from, 5, &out->features_key, err));
    const qie_prompt_part pictures[] = {{out->features_key.hex, sizeof out->features_key.hex},
                                        tokens(e, 0, n_template + e->p->prompts[0].parts[1])};
    QIE_TRY(qie_prompt_key_make(pictures, 2, &out->parts_key[1], err));
    out->features = e->n_reused >= QIE_PROMPT_PARTS &&
                    (out->n_parts < QIE_PROMPT_PARTS ||
                     !qie_prompt_cache_fits(e->run.prompt_cache, part_floats(e, 1)));
    return make_embeds_keys(e, out, err);
}

/* Conditioning of the passes from and to the cache. */
static size_t embeds_floats(const edit *e, int pass) {
    return (size_t)(e->p->n_text[pass] * e->m->config.text.hidden_size);
}
static bool find_embeds(const edit *e, text_keys *keys) {
    bool all = true;
    for (int i = 0; i < e->p->n_passes; i++) {
        keys->kept[i] =
            keys->embeds && qie_prompt_cache_get(e->run.prompt_cache, &keys->embeds_key[i],
                                                 e->prompt_embeds[i], embeds_floats(e, i));
        all = all && keys->kept[i];
    }
    if (!all && !e->run.compute->rows_alone) /* the second needs the first */
        keys->kept[0] = keys->kept[1] = false;
    return all;
}
static void keep_embeds(const edit *e, const text_keys *keys) {
    for (int i = 0; i < e->p->n_passes && keys->embeds; i++)
        if (!keys->kept[i])
            qie_prompt_cache_put(e->run.prompt_cache, &keys->embeds_key[i], e->prompt_embeds[i],
                                 embeds_floats(e, i));
}

/* Rows of `hidden` that part i holds behind its keys and values. */
static void exchange_hidden(const edit *e, const qie_language_prefix *prefix, int i_part,
                            float *hidden, bool fetch) {
    const qie_language_part *p = &prefix->parts[i_part];
    int64_t width = e->m->config.text.hidden_size, from = i_part ? prefix->parts[0].n : 0,
            end = from + p->n, drop = e->p->request.n_drop;
    from = from < drop ? drop : from;
    if (end <= from)
        return;
    size_t n = (size_t)((end - from) * width);
    float *kept = (float *)p->data + part_floats(e, i_part) - n, *rows = hidden + from * width;
    memcpy(fetch ? rows : kept, fetch ? kept : rows, n * sizeof(float));
}

static void find_parts(const edit *e, const text_keys *keys, qie_language_prefix *prefix,
                       float *hidden) {
    for (int i = 0; i < keys->n_parts; i++) {
        qie_language_part *p = &prefix->parts[i];
        p->filled = qie_prompt_cache_get(e->run.prompt_cache, &keys->parts_key[i], p->data,
                                         part_floats(e, i));
        if (!p->filled)
            return;
        exchange_hidden(e, prefix, i, hidden, true);
    }
}
static void keep_parts(const edit *e, const text_keys *keys, const qie_language_prefix *prefix,
                       int n_found, float *hidden) {
    for (int i = n_found; i < keys->n_parts; i++) {
        exchange_hidden(e, prefix, i, hidden, false);
        qie_prompt_cache_put(e->run.prompt_cache, &keys->parts_key[i], prefix->parts[i].data,
                             part_floats(e, i));
    }
}

static qie_status see_pictures(edit *e, const text_keys *keys, const float *patches,
                               float *features, qie_error *err) {
    const qie_size_plan *s = &e->p->sizes;
    size_t n = (size_t)(s->n_vision_tokens * e->m->config.vision.out_hidden_size);
    if (keys->features &&
        qie_prompt_cache_get(e->run.prompt_cache, &keys->features_key, features, n))
        return QIE_OK;
    QIE_TRY(qie_vision_encode(e->m->text_encoder, &e->run, s, patches, features, err));
    if (keys->features)
        qie_prompt_cache_put(e->run.prompt_cache, &keys->features_key, features, n);
    int64_t shape[2] = {s->n_vision_tokens, e->m->config.vision.out_hidden_size};
    qie_observe_f32(e->run.observer, "vision_features", features, 2, shape);
    return QIE_OK;
}

/* Both towers, for the passes whose conditioning was not kept. */
static qie_status encode_prompts(edit *e, const text_keys *keys, const float *patches,
                                 qie_error *err) {
    size_t most = 0;
    for (int i = 0; i < e->p->n_passes; i++)
        most = e->p->prompts[i].n_ids > most ? e->p->prompts[i].n_ids : most;
    float *features, *hidden;
    qie_language_prefix prefix = {0};
    QIE_TRY(alloc(&e->run, e->p->sizes.n_vision_tokens * e->m->config.vision.out_hidden_size,
                  &features, err));
    QIE_TRY(alloc(&e->run, (int64_t)most * e->m->config.text.hidden_size, &hidden, err));
    for (int i = 0; i < QIE_PROMPT_PARTS; i++) {
        prefix.parts[i].n = e->p->request.parts[i];
        QIE_TRY(
            qie_run_alloc(&e->run, part_floats(e, i) * sizeof(float), &prefix.parts[i].data, err));
    }
    find_parts(e, keys, &prefix, hidden);
    int n_found = prefix.parts[0].filled + prefix.parts[1].filled;
    if (n_found < QIE_PROMPT_PARTS)
        QIE_TRY(see_pictures(e, keys, patches, features, err));
    for (int i = 0; i < e->p->n_passes; i++) {
        if (keys->kept[i])
            continue;
        tell(e, "encode_text", 1 + i, 1 + e->p->n_passes, NULL);
        QIE_TRY(encode_prompt(e, i, features, &prefix, hidden, err));
    }
    keep_parts(e, keys, &prefix, n_found, hidden);
    return QIE_OK;
}

static qie_status text_stage(edit *e, qie_error *err) {
    const qie_vision_config *v = &e->m->config.vision;
    const qie_size_plan *s = &e->p->sizes;
    int64_t patch = 3ll * v->temporal_patch_size * v->patch_size * v->patch_size;
    qie_run_mark mark = qie_run_mark_get(&e->run);
    float *patches;
    text_keys keys;
    QIE_TRY(alloc(&e->run, s->n_patches * patch, &patches, err));
    tell(e, "encode_text", 0, 1 + e->p->n_passes, NULL);
    QIE_TRY(fill_patches(e, patches, err));
    int64_t shape[2] = {s->n_patches, patch};
    qie_observe_f32(e->run.observer, "pixel_values", patches, 2, shape);
    QIE_TRY(make_keys(e, patches, sizeof *patches * (size_t)(s->n_patches * patch), &keys, err));
    if (!find_embeds(e, &keys)) {
        QIE_TRY(encode_prompts(e, &keys, patches, err));
        keep_embeds(e, &keys);
    }
    tell(e, "encode_text", 1 + e->p->n_passes, 1 + e->p->n_passes, NULL);
    qie_run_release(&e->run, mark);
    return QIE_OK;
}

/* ---- references */

/* The picture at its reference size: resampled, or padded without resampling. */
static qie_status reference_picture(edit *e, int i, qie_image **out, qie_error *err) {
    qie_size s = e->p->sizes.images[i].vae;
    if (e->p->sizes.images[i].vae_fit == QIE_FIT_PAD)
        return qie_image_pad_edge(e->p->options.images[i], s.w, s.h, out, err);
    return qie_resample(e->p->options.images[i], s.w, s.h, QIE_FILTER_LANCZOS,
                        QIE_RESAMPLE_PILLOW_13, e->n_threads, out, err);
}

static qie_status encode_reference(edit *e, int i, float *packed, qie_error *err) {
    const qie_vae_config *c = &e->m->config.vae;
    qie_size s = e->p->sizes.images[i].vae;
    int h = s.h / c->scale_factor, w = s.w / c->scale_factor;
    qie_run_mark mark = qie_run_mark_get(&e->run);
    float *pixels, *mean;
    char name[64];
    QIE_TRY(alloc(&e->run, 3ll * s.w * s.h, &pixels, err));
    QIE_TRY(alloc(&e->run, (int64_t)h * w * c->z_dim, &mean, err));
    qie_image *picture;
    QIE_TRY(reference_picture(e, i, &picture, err));
    qie_pixels_from_image(picture, pixels);
    qie_image_destroy(picture);
    snprintf(name, sizeof name, "vae_input.%d", i);
    observe_map(e, name, pixels, s.h, s.w, 3);
    QIE_TRY(
        qie_vae_encode(e->m->vae, &e->run, pixels, s.h, s.w, e->p->memory.vae_tiled, mean, err));
    snprintf(name, sizeof name, "ref_latents.%d", i);
    observe_map(e, name, mean, h, w, c->z_dim);
    qie_latents_pack(c, mean, h, w, true, packed);
    qie_run_release(&e->run, mark);
    return QIE_OK;
}

static qie_status reference_stage(edit *e, qie_error *err) {
    int64_t ch = e->m->config.transformer.in_channels, n = e->p->sizes.n_reference;
    bool given;
    QIE_TRY(injected(e, "image_latents", n * ch, e->image_latents, &given, err));
    float *to = e->image_latents;
    for (int i = 0; i < e->p->sizes.n_images && !given; i++) {
        tell(e, "encode_image", i, e->p->sizes.n_images, NULL);
        QIE_TRY(encode_reference(e, i, to, err));
        to += (int64_t)e->p->sizes.images[i].grid_h * e->p->sizes.images[i].grid_w * ch;
    }
    tell(e, "encode_image", e->p->sizes.n_images, e->p->sizes.n_images, NULL);
    observe_rows(e, "image_latents", e->image_latents, n, ch);
    return QIE_OK;
}

/* ---- the step loop */

/* Noise of all pictures from one generator, as torch draws a batch. */
static qie_status draw_noise(edit *e, qie_error *err) {
    const qie_edit_options *o = &e->p->options;
    int z = e->m->config.vae.z_dim, h = e->p->sizes.grid_h * 2, w = e->p->sizes.grid_w * 2;
    int64_t n = (int64_t)z * h * w;
    bool bf16 =
        o->noise == QIE_NOISE_BF16 || (o->noise == QIE_NOISE_AUTO && e->run.act == QIE_BF16);
    qie_rng rng;
    qie_rng_seed(&rng, o->seed);
    size_t bytes = sizeof(float) * (size_t)n;
    for (int i = 0; i < o->num_images; i++) {
        qie_run_mark mark = qie_run_mark_get(&e->run);
        void *noise, *to; /* velocity[0] is free until the first step, of the same size */
        QIE_TRY(qie_run_stage(&e->run, e->velocity[0], bytes, &noise, err));
        QIE_TRY(qie_run_stage(&e->run, e->latents[i], bytes, &to, err));
        qie_rng_normal(&rng, noise, (size_t)n, bf16);
        qie_noise_pack(z, noise, h, w, to);
        bool given;
        if (i == 0) {
            QIE_TRY(injected(e, "latents", n, to, &given, err));
            QIE_TRY(injected(e, "noise", n, to, &given, err));
            observe_rows(e, "noise", to, e->p->sizes.n_target, 4ll * z);
        }
        qie_run_commit(&e->run, e->latents[i], to, bytes);
        qie_run_release(&e->run, mark);
    }
    return QIE_OK;
}

/* Small picture of where the step is heading: x0 = x - sigma v, latents averaged down, then
 * decoded. */
static qie_status make_preview(edit *e, const float *latents, const float *velocity, float sigma,
                               qie_image **out, qie_error *err) {
    const qie_vae_config *c = &e->m->config.vae;
    int f = c->scale_factor, h = e->p->sizes.grid_h * 2, w = e->p->sizes.grid_w * 2, k = 1;
    int longest = (h > w ? h : w) * f;
    while (longest / k > e->p->options.preview_max_px && k < 64)
        k++;
    int sh = (h + k - 1) / k, sw = (w + k - 1) / k;
    int64_t n = (int64_t)h * w * c->z_dim;
    qie_run_mark mark = qie_run_mark_get(&e->run);
    float *x0, *map, *small, *pixels;
    QIE_TRY(alloc(&e->run, n, &x0, err));
    QIE_TRY(alloc(&e->run, n, &map, err));
    QIE_TRY(alloc(&e->run, (int64_t)sh * sw * c->z_dim, &small, err));
    QIE_TRY(alloc(&e->run, 3ll * sh * f * sw * f, &pixels, err));
    const void *x, *v;
    size_t bytes = sizeof(float) * (size_t)n;
    QIE_TRY(qie_run_view(&e->run, latents, bytes, &x, err));
    QIE_TRY(qie_run_view(&e->run, velocity, bytes, &v, err));
    for (int64_t i = 0; i < n; i++)
        x0[i] = ((const float *)x)[i] - sigma * ((const float *)v)[i];
    qie_latents_unpack(c, x0, h, w, map);
    qie_map_shrink(map, h, w, c->z_dim, k, small);
    QIE_TRY(qie_vae_decode(e->m->vae, &e->run, small, sh, sw, false, pixels, err));
    QIE_TRY(qie_image_create(sw * f, sh * f, out, err));
    qie_pixels_to_image(pixels, *out);
    qie_run_release(&e->run, mark);
    return QIE_OK;
}

static qie_status report_step(edit *e, int i_step, const float *latents, const float *velocity,
                              qie_error *err) {
    qie_image *preview = NULL;
    if (e->p->options.preview_max_px > 0 && e->p->options.progress)
        QIE_TRY(make_preview(e, latents, velocity, e->sigmas[i_step], &preview, err));
    e->n_beats = 0;
    tell(e, "denoise", i_step + 1, e->p->options.num_inference_steps, preview);
    qie_image_destroy(preview);
    return QIE_OK;
}

/* Velocity of one pass, possibly on a device of its own. */
static qie_status one_pass(edit *e, qie_denoiser *d, int i_step, int pass, float *latents,
                           qie_error *err) {
    const qie_mem_ops *mem = e->run.compute->mem;
    int64_t rows = e->p->sizes.n_target, ch = e->m->config.transformer.in_channels;
    size_t bytes = sizeof(float) * (size_t)(rows * ch);
    if (mem)
        mem->begin_pass(e->run.compute, pass, (qie_range){latents, bytes});
    QIE_TRY(qie_denoiser_forward(d, &e->run, i_step, pass, latents, e->velocity[pass], err));
    if (mem)
        mem->end_pass(e->run.compute, pass, (qie_range){e->velocity[pass], bytes});
    return QIE_OK;
}

static qie_status one_step(edit *e, qie_denoiser *d, int i_step, float *latents, bool *non_finite,
                           qie_error *err) {
    int64_t rows = e->p->sizes.n_target, ch = e->m->config.transformer.in_channels, n = rows * ch;
    const qie_edit_options *o = &e->p->options;
    qie_compute *c = e->run.compute;
    static const char *const names[2] = {"cond", "uncond"};
    char name[64];
    double started = qie_now_s();
    for (int p = 0; p < e->p->n_passes; p++)
        QIE_TRY(one_pass(e, d, i_step, p, latents, err));
    for (int p = 0; p < e->p->n_passes && observing(e); p++) {
        snprintf(name, sizeof name, "dit.%d.%s", i_step, names[p]);
        observe_computed(e, name, e->velocity[p], rows, ch);
    }
    float *v = e->velocity[0];
    if (e->p->n_passes > 1)
        c->ops.cfg_combine(c, e->velocity[0], e->velocity[1], (float)o->true_cfg_scale, rows, ch,
                           v);
    bool finite = c->ops.all_finite(c, v, n);
    QIE_TRY(qie_run_check(&e->run, err));
    if (!finite) {
        *non_finite = true;
        return qie_fail(err, QIE_E_INTERNAL, NULL,
                        "the transformer gave values that are no numbers in step %d", i_step + 1);
    }
    float dt = e->sigmas[i_step + 1] - e->sigmas[i_step];
    QIE_TRY(report_step(e, i_step, latents, v, err));
    c->ops.axpy(c, dt, v, latents, n);
    if (observing(e)) {
        snprintf(name, sizeof name, "latents.%d", i_step);
        observe_computed(e, name, latents, rows, ch);
    }
    qie_trace_span("step", started, "step %d", i_step + 1);
    return QIE_OK;
}

static qie_status make_denoiser(edit *e, qie_denoiser **d, qie_error *err) {
    qie_denoiser_inputs in = {.sizes = &e->p->sizes,
                              .image_latents = e->image_latents,
                              .n_passes = e->p->n_passes,
                              .n_steps = e->p->options.num_inference_steps,
                              .timesteps = e->sigmas,
                              .cache = e->p->caching ? &e->p->cache : NULL};
    for (int i = 0; i < e->p->n_passes; i++) {
        in.prompt_embeds[i] = e->prompt_embeds[i];
        in.n_text[i] = e->p->n_text[i];
    }
    return qie_denoiser_create(e->m->transformer, &e->run, &in, d, err);
}

static qie_status denoise_stage(edit *e, bool *non_finite, qie_error *err) {
    int n_steps = e->p->options.num_inference_steps;
    qie_run_mark mark = qie_run_mark_get(&e->run);
    qie_denoiser *d;
    QIE_TRY(draw_noise(e, err));
    int64_t shape[1] = {n_steps + 1};
    qie_observe_f32(e->run.observer, "sigmas", e->sigmas, 1, shape);
    shape[0] = n_steps;
    qie_observe_f32(e->run.observer, "timesteps", e->timesteps, 1, shape);
    e->denoise_started = qie_now_s();
    e->beats_per_step = e->m->config.transformer.num_layers * e->p->n_passes;
    e->n_beats = 0;
    tell(e, "denoise", 0, n_steps, NULL);
    QIE_TRY(make_denoiser(e, &d, err));
    for (e->i_image = 0; e->i_image < e->p->options.num_images; e->i_image++)
        for (int i = 0; i < n_steps; i++)
            QIE_TRY(one_step(e, d, i, e->latents[e->i_image], non_finite, err));
    e->i_image = 0;
    qie_denoiser_count(d, &e->n_forwards, &e->n_skipped);
    if (e->p->caching)
        qie_log(QIE_LOG_INFO, "cache", "%s: %d of %d passes cut short",
                qie_cache_name(e->p->options.cache), e->n_skipped, e->n_forwards);
    qie_run_release(&e->run, mark);
    return QIE_OK;
}

/* ---- back to a picture */

static bool constant(const qie_image *image) {
    const uint8_t *px = qie_image_pixels_const(image);
    size_t n = (size_t)qie_image_width(image) * (size_t)qie_image_height(image) * 3;
    for (size_t i = 3; i < n; i++)
        if (px[i] != px[i - 3])
            return false;
    return true;
}

/* The generated picture as it is written: cropped or resized back with keep-size. */
static qie_status fit_output(edit *e, qie_image *made, qie_image **out, qie_error *err) {
    const qie_size_plan *s = &e->p->sizes;
    if (s->output.w == s->generated.w && s->output.h == s->generated.h) {
        *out = made;
        return QIE_OK;
    }
    qie_status st = s->output_fit == QIE_FIT_PAD
                        ? qie_image_crop(made, 0, 0, s->output.w, s->output.h, out, err)
                        : qie_resample(made, s->output.w, s->output.h, QIE_FILTER_LANCZOS,
                                       QIE_RESAMPLE_PILLOW_13, e->n_threads, out, err);
    qie_image_destroy(made);
    return st;
}

static bool all_finite(const float *v, int64_t n) {
    float sum = 0; /* x * 0 is 0 for finite values only */
    for (int64_t i = 0; i < n; i++)
        sum += v[i] * 0.0f;
    return sum == 0;
}

static qie_status decode_image(edit *e, const float *latents, qie_image **out, bool *non_finite,
                               qie_error *err) {
    const qie_vae_config *c = &e->m->config.vae;
    int h = e->p->sizes.grid_h * 2, w = e->p->sizes.grid_w * 2;
    qie_size px = e->p->sizes.generated;
    qie_run_mark mark = qie_run_mark_get(&e->run);
    float *map, *pixels;
    QIE_TRY(alloc(&e->run, (int64_t)h * w * c->z_dim, &map, err));
    QIE_TRY(alloc(&e->run, 3ll * px.w * px.h, &pixels, err));
    const void *host;
    QIE_TRY(qie_run_view(&e->run, latents, sizeof(float) * (size_t)h * (size_t)w * (size_t)c->z_dim,
                         &host, err));
    qie_latents_unpack(c, host, h, w, map);
    if (observing(e))
        observe_map(e, "vae_decode_input", map, h, w, c->z_dim);
    QIE_TRY(qie_vae_decode(e->m->vae, &e->run, map, h, w, e->p->memory.vae_tiled, pixels, err));
    if (!all_finite(pixels, 3ll * px.w * px.h)) {
        *non_finite = true;
        return qie_fail(err, QIE_E_INTERNAL, NULL,
                        "the VAE's decoder gave values that are no numbers");
    }
    if (observing(e))
        observe_map(e, "decoded", pixels, px.h, px.w, 3);
    qie_image *made;
    QIE_TRY(qie_image_create(px.w, px.h, &made, err));
    qie_pixels_to_image(pixels, made);
    qie_run_release(&e->run, mark);
    return fit_output(e, made, out, err);
}

static qie_status decode_stage(edit *e, qie_edit_result *result, bool *non_finite, qie_error *err) {
    int n = e->p->options.num_images;
    result->images = calloc((size_t)n, sizeof *result->images);
    QIE_FAIL_IF(!result->images, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    for (e->i_image = 0; e->i_image < n; e->i_image++) {
        tell(e, "decode", e->i_image, n, NULL);
        QIE_TRY(
            decode_image(e, e->latents[e->i_image], &result->images[e->i_image], non_finite, err));
        result->n_images++;
        if (constant(result->images[e->i_image]))
            qie_log(QIE_LOG_WARN, "pipeline", "picture %d is of one colour throughout",
                    e->i_image + 1);
    }
    e->i_image = n - 1;
    tell(e, "decode", n, n, NULL);
    return QIE_OK;
}

/* ---- the whole */

static qie_status begin(edit *e, qie_model *m, const qie_run *run, qie_prepared *p,
                        qie_error *err) {
    memset(e, 0, sizeof *e);
    e->m = m;
    e->run = *run;
    e->run.beat = on_beat;
    e->run.beat_arg = e;
    e->p = p;
    e->n_threads = run->compute->n_threads;
    e->n_reused = REUSE_ALL;
    e->started = e->last_told = qie_now_s();
    int64_t ch = m->config.transformer.in_channels, n = p->sizes.n_target * ch;
    for (int i = 0; i < p->n_passes; i++)
        QIE_TRY(alloc(run, p->n_text[i] * m->config.text.hidden_size, &e->prompt_embeds[i], err));
    QIE_TRY(alloc(run, p->sizes.n_reference * ch, &e->image_latents, err));
    void *data;
    for (int i = 0; i < 2; i++) {
        QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)n, &data, err));
        e->velocity[i] = data;
    }
    for (int i = 0; i < p->options.num_images; i++) {
        QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)n, &data, err));
        e->latents[i] = data;
    }
    int n_steps = p->options.num_inference_steps;
    QIE_TRY(alloc(run, 2ll * n_steps + 1, &e->sigmas, err));
    e->timesteps = e->sigmas + n_steps + 1;
    if (p->request.lora_rank) {
        int64_t room = qie_memory_lora_rows(&p->request) * p->request.lora_rank;
        QIE_TRY(qie_run_alloc(run, sizeof(float) * (size_t)room, &data, err));
        e->run.lowrank_room = data;
    }
    qie_scheduler_sigmas(&p->scheduler, n_steps, p->sizes.n_target, e->sigmas, e->timesteps);
    return QIE_OK;
}

qie_status qie_pipeline_run(qie_model *m, const qie_run *run, qie_prepared *p,
                            qie_edit_result *result, bool *non_finite, qie_error *err) {
    edit e;
    *non_finite = false;
    memset(result, 0, sizeof *result);
    qie_status st = begin(&e, m, run, p, err);
    if (st == QIE_OK)
        st = text_stage(&e, err);
    qie_trace_span("stage", e.started, "text");
    double read = qie_now_s();
    if (st == QIE_OK)
        st = reference_stage(&e, err);
    qie_trace_span("stage", read, "reference");
    double encoded = qie_now_s(), denoised = encoded;
    if (st == QIE_OK)
        st = denoise_stage(&e, non_finite, err);
    qie_trace_span("stage", encoded, "denoise");
    if (st == QIE_OK) {
        denoised = qie_now_s();
        st = decode_stage(&e, result, non_finite, err);
        qie_trace_span("stage", denoised, "decode");
    }
    if (st != QIE_OK) {
        qie_edit_result_release(result);
        return st;
    }
    double now = qie_now_s();
    result->seed = p->options.seed;
    result->n_forwards = e.n_forwards;
    result->n_skipped = e.n_skipped;
    result->encode_s = encoded - e.started;
    result->denoise_s = denoised - encoded;
    result->decode_s = now - denoised;
    result->total_s = now - e.started;
    return QIE_OK;
}

qie_status qie_pipeline_probe(qie_model *m, const qie_run *run, qie_prepared *p,
                              double *seconds_per_block, qie_error *err) {
    edit e;
    qie_denoiser *d;
    QIE_TRY(begin(&e, m, run, p, err));
    for (int i = 0; i < p->n_passes; i++)
        memset(e.prompt_embeds[i], 0,
               sizeof(float) * (size_t)(p->n_text[i] * m->config.text.hidden_size));
    memset(e.image_latents, 0,
           sizeof(float) * (size_t)(p->sizes.n_reference * m->config.transformer.in_channels));
    QIE_TRY(make_denoiser(&e, &d, err));
    return qie_denoiser_probe(d, &e.run, seconds_per_block, err);
}

/* ---- stages on their own */

/* When each block, layer and VAE level began. */
typedef struct beats {
    int n;
    double at[4096];
} beats;

static void note_beat(void *arg) {
    beats *b = arg;
    if (b->n < (int)(sizeof b->at / sizeof *b->at))
        b->at[b->n++] = qie_now_s();
}

/* n layers began at beats from .. from + n - 1 in each of `passes` rounds; the last one ended at
 * `end`. One more would have cost the mean of those whose end is known: the last one may do less.
 */
static void count_layers(const beats *b, int from, int n, int passes, double end, int i,
                         qie_stage_timing *t) {
    if (n < 1 || from + n * passes > b->n)
        return;
    t->layers[i].n = n;
    t->layers[i].seconds = end - b->at[from];
    for (int p = 0; p < passes; p++) {
        const double *at = b->at + from + p * n;
        t->layers[i].layer_s +=
            n > 1 ? (at[n - 1] - at[0]) / (n - 1) : (p + 1 < passes ? at[1] : end) - at[0];
    }
}

static bool is_text(int stage) {
    return stage == QIE_BENCH_TEXT || stage == QIE_BENCH_TEXT_NEXT || stage == QIE_BENCH_TEXT_AGAIN;
}

static void divide_time(const edit *e, int stage, const beats *b, double end, qie_stage_timing *t) {
    const qie_model_config *c = &e->m->config;
    int first = e->p->sizes.n_images, depth = stage == QIE_BENCH_TEXT_AGAIN ? 0 : c->vision.depth;
    int language = first + depth;
    if (is_text(stage)) {
        count_layers(b, first, depth, 1, language < b->n ? b->at[language] : end, 0, t);
        count_layers(b, language, c->text.num_hidden_layers, e->p->n_passes, end, 1, t);
    } else if (stage == QIE_BENCH_MODULATION || stage == QIE_BENCH_FORWARD)
        count_layers(b, 0, c->transformer.num_layers, 1, end, 0, t);
}

static void make_up_inputs(edit *e) {
    qie_rng rng;
    qie_rng_seed(&rng, 0);
    for (int i = 0; i < e->p->n_passes; i++)
        qie_rng_normal(&rng, e->prompt_embeds[i],
                       (size_t)(e->p->n_text[i] * e->m->config.text.hidden_size), false);
    int64_t ch = e->m->config.transformer.in_channels;
    qie_rng_normal(&rng, e->image_latents, (size_t)(e->p->sizes.n_reference * ch), false);
    for (int i = 0; i < e->p->options.num_images; i++)
        qie_rng_normal(&rng, e->latents[i], (size_t)(e->p->sizes.n_target * ch), false);
}

static qie_status time_stage(edit *e, int stage, beats *b, qie_stage_timing *t, qie_error *err) {
    qie_denoiser *d = NULL;
    qie_image *image = NULL;
    bool non_finite;
    qie_status st = QIE_OK;
    if (stage == QIE_BENCH_MODULATION || stage == QIE_BENCH_FORWARD)
        QIE_TRY(make_denoiser(e, &d, err));
    if (stage == QIE_BENCH_FORWARD)
        QIE_TRY(qie_denoiser_modulate(d, &e->run, 0, err));
    if (t->before)
        t->before(t->arg);
    b->n = 0;
    if (stage >= QIE_BENCH_TEXT_NEXT)
        e->n_reused = stage - QIE_BENCH_TEXT_NEXT + 1;
    double from = qie_now_s();
    if (is_text(stage))
        st = text_stage(e, err);
    else if (stage == QIE_BENCH_VAE_ENCODE)
        st = reference_stage(e, err);
    else if (stage == QIE_BENCH_MODULATION)
        st = qie_denoiser_modulate(d, &e->run, 0, err);
    else if (stage == QIE_BENCH_FORWARD)
        st = qie_denoiser_forward(d, &e->run, 0, 0, e->latents[0], e->velocity[0], err);
    else
        st = decode_image(e, e->latents[0], &image, &non_finite, err);
    double end = qie_now_s();
    if (t->after)
        t->after(t->arg);
    t->seconds = end - from;
    divide_time(e, stage, b, end, t);
    qie_image_destroy(image);
    return st;
}

static qie_status time_edit(qie_model *m, const qie_run *run, qie_prepared *p, qie_stage_timing *t,
                            qie_error *err) {
    qie_edit_result result;
    bool non_finite;
    if (t->before)
        t->before(t->arg);
    QIE_TRY(qie_pipeline_run(m, run, p, &result, &non_finite, err));
    if (t->after)
        t->after(t->arg);
    t->seconds = result.total_s;
    qie_edit_result_release(&result);
    return QIE_OK;
}

qie_status qie_pipeline_time_stage(qie_model *m, const qie_run *run, qie_prepared *p, int stage,
                                   qie_stage_timing *t, qie_error *err) {
    edit e;
    t->seconds = 0;
    memset(t->layers, 0, sizeof t->layers);
    qie_arena_release(run->arena, 0);
    if (stage == QIE_BENCH_EDIT)
        return time_edit(m, run, p, t, err);
    QIE_TRY(begin(&e, m, run, p, err));
    beats *b = malloc(sizeof *b);
    QIE_FAIL_IF(!b, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    b->n = 0;
    e.run.beat = note_beat;
    e.run.beat_arg = b;
    make_up_inputs(&e);
    qie_status st = time_stage(&e, stage, b, t, err);
    free(b);
    return st;
}
