/* The command bench: how long the stages of an edit and the operations inside them take. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/error.h"
#include "base/machine.h"
#include "base/parallel.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/loras.h"
#include "cli/model_choice.h"
#include "cli/ui.h"
#include "qie/bench.h"

/* Layers of the released model, for models that have fewer (Qwen-Image-Edit-2511's configs). */
enum { RELEASED_BLOCKS = 60, RELEASED_LANGUAGE = 28, RELEASED_VISION = 32 };

#define PROMPT "Change the main subject's color to purple and keep the overall style consistent."

typedef struct bench {
    const cli_values *v;
    qie_bench_options options;
    qie_edit_options edit;
    qie_image *pictures[QIE_MAX_IMAGES];
    qie_bench_result result;
    bool caches; /* the modes of step caching are compared */
    qie_bench_cache cache[QIE_CACHE_COUNT];
} bench;

/* ---- what to measure */

static qie_status read_only(bench *b, qie_error *err) {
    const char *list = cli_text(b->v, OPT_ONLY, NULL);
    if (!list)
        return QIE_OK;
    memset(b->options.stages, 0, sizeof b->options.stages);
    for (const char *at = list; *at; at += strspn(at, ",")) {
        size_t n = strcspn(at, ",");
        int i = 0;
        while (i < QIE_BENCH_STAGES &&
               (strlen(qie_bench_stage_name((qie_bench_stage_id)i)) != n ||
                strncmp(qie_bench_stage_name((qie_bench_stage_id)i), at, n) != 0))
            i++;
        QIE_FAIL_IF(i == QIE_BENCH_STAGES, QIE_E_INVALID, err, "--only",
                    "--only: '%.*s' is not one of text, vae_encode, modulation, forward, "
                    "vae_decode, edit, text_next, text_again",
                    (int)n, at);
        b->options.stages[i] = true;
        if (i == QIE_BENCH_EDIT) /* asked for by name: as long as it takes */
            b->options.edit_limit_s = 0;
        at += n;
    }
    return QIE_OK;
}

static void tell(void *arg, const char *what) {
    (void)arg;
    cli_work(-1, what, NULL);
}

static qie_status read_options(bench *b, qie_error *err) {
    const cli_values *v = b->v;
    b->options = qie_bench_options_default();
    b->options.repeats = (int)cli_number(v, OPT_REPEATS, 3);
    b->options.cold = cli_on(v, OPT_COLD);
    b->options.ops = !cli_on(v, OPT_NO_OPS);
    b->options.roof = !cli_on(v, OPT_NO_ROOF);
    b->options.tell = cli_ui_is_json() ? NULL : tell;
    QIE_TRY(read_only(b, err));
    b->caches = strcmp(cli_text(v, OPT_CACHE, "off"), "off") != 0;
    qie_edit_options *o = &b->edit;
    *o = qie_edit_options_default();
    o->prompt = cli_text(v, OPT_PROMPT, PROMPT);
    o->negative_prompt = cli_text(v, OPT_NEGATIVE, " ");
    o->num_inference_steps = (int)cli_number(v, OPT_STEPS, 0);
    o->true_cfg_scale = cli_number(v, OPT_TRUE_CFG_SCALE, -1);
    o->max_side = cli_get(v, OPT_MAX_SIDE)->is_word ? -1 : (int)cli_number(v, OPT_MAX_SIDE, 0);
    o->width = (int)cli_number(v, OPT_WIDTH, 0);
    o->height = (int)cli_number(v, OPT_HEIGHT, 0);
    o->ref_area = (int64_t)cli_number(v, OPT_REF_AREA, 0);
    o->keep_size = 0;
    return QIE_OK;
}

/* A smooth picture with some texture: what it shows does not matter to the time. */
static qie_status make_picture(int w, int h, int seed, qie_image **out, qie_error *err) {
    QIE_TRY(qie_image_create(w, h, out, err));
    uint8_t *px = qie_image_pixels(*out);
    uint32_t r = (uint32_t)seed * 2654435761u + 1;
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            for (int c = 0; c < 3; c++) {
                r = r * 1664525u + 1013904223u;
                int v = (c == 0 ? 255 * x / w : c == 1 ? 255 * y / h : 128) + (int)(r >> 28) - 8;
                *px++ = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
            }
    return QIE_OK;
}

/* The pictures given, else made-up ones of the result's size, which then is also the references'.
 */
static qie_status read_pictures(bench *b, bool demo, qie_error *err) {
    const cli_value *paths = cli_get(b->v, OPT_IMAGE);
    qie_edit_options *o = &b->edit;
    size_t n = paths->n ? paths->n : (size_t)cli_number(b->v, OPT_REFERENCES, 1);
    QIE_FAIL_IF(paths->n && cli_is_set(b->v, OPT_REFERENCES), QIE_E_USAGE, err, "--references",
                "--references makes pictures up, --image gives them: one or the other");
    QIE_FAIL_IF(n > QIE_MAX_IMAGES, QIE_E_TOO_LARGE, err, "--image",
                "%zu pictures, the limit is %d", n, QIE_MAX_IMAGES);
    int side = demo ? 256 : 512, w = o->width ? o->width : side, h = o->height ? o->height : side;
    if (!paths->n && !o->max_side) {
        o->width = w;
        o->height = h;
        if (!o->ref_area)
            o->ref_area = (int64_t)w * h;
    }
    for (size_t i = 0; i < n; i++)
        QIE_TRY(paths->n ? qie_image_load(paths->texts[i], NULL, &b->pictures[i], err)
                         : make_picture(w, h, (int)i, &b->pictures[i], err));
    o->images = (const qie_image *const *)b->pictures;
    o->n_images = n;
    return QIE_OK;
}

static qie_status open_engine(const cli_values *v, qie_engine **engine, qie_error *err) {
    char *model = NULL;
    bool named;
    int half = qie_cpu_count() / 2;
    QIE_TRY(cli_choose_model(v, &model, &named, err));
    qie_engine_options o = qie_engine_options_default();
    o.model = model;
    o.precision = qie_precision_from_name(cli_text(v, OPT_PRECISION, "auto"));
    o.n_threads = (int)cli_number(v, OPT_THREADS, half > 1 ? half : 1);
    o.backend = cli_text(v, OPT_BACKEND, NULL);
    o.memory_limit_bytes = (int64_t)(cli_number(v, OPT_MEMORY_LIMIT, 0) * 1073741824.0);
    qie_status st = cli_open_with_loras(v, &o, engine, err);
    free(model);
    return st;
}

/* ---- what follows from the measurements */

static int released(const char *layers) {
    return !strcmp(layers, "vision")     ? RELEASED_VISION
           : !strcmp(layers, "language") ? RELEASED_LANGUAGE
                                         : RELEASED_BLOCKS;
}

/* Seconds of the stage in a model with the released number of layers: what the missing ones would
 * add. */
static double at_released_depth(const qie_bench_stage *s) {
    double t = s->median_s;
    for (int i = 0; i < 2; i++)
        if (s->layers[i].name && s->layers[i].n < released(s->layers[i].name))
            t += (released(s->layers[i].name) - s->layers[i].n) * s->layers[i].layer_s;
    return t;
}

static bool is_shallow(const qie_bench_result *r) {
    for (int i = 0; i < QIE_BENCH_STAGES; i++)
        if (r->stages[i].measured && at_released_depth(&r->stages[i]) > r->stages[i].median_s)
            return true;
    return false;
}

/* The whole edit from its stages; < 0 when one was not measured. */
static double sum_of_stages(const qie_bench_result *r, bool deep) {
    double sum = 0;
    for (int i = 0; i < QIE_BENCH_EDIT; i++) {
        const qie_bench_stage *s = &r->stages[i];
        int times =
            i == QIE_BENCH_FORWARD ? r->plan.num_inference_steps * (r->plan.cfg ? 2 : 1) : 1;
        if (!s->measured)
            return -1;
        sum += times * (deep ? at_released_depth(s) : s->median_s);
    }
    return sum;
}

/* Share of the roof of one kind of operation in a stage, on its own time there; op NULL: all
 * products beside the whole stage's time; < 0: not known. */
static double share_of_roof(const qie_bench_result *r, int stage, const char *op) {
    double roof = 0, spent = 0;
    for (size_t i = 0; i < r->n_ops; i++) {
        const qie_bench_op *o = &r->ops[i];
        if ((int)o->stage != stage || o->gflop <= 0 || (op && strcmp(op, o->op) != 0))
            continue;
        if (o->roof_s <= 0)
            return -1;
        roof += o->roof_s * o->calls;
        spent += o->in_stage_s;
    }
    if (!op)
        spent = r->stages[stage].median_s;
    return roof > 0 && spent > 0 ? roof / spent : -1;
}

static const char *const PRODUCTS[] = {"linear", "attention", "conv2d"};
#define N_PRODUCTS (sizeof PRODUCTS / sizeof *PRODUCTS)

/* ---- the table */

static void shape_text(const qie_bench_op *o, char *out, size_t cap) {
    size_t n = 0;
    *out = 0;
    for (int i = 0; i < o->n_dims; i++) {
        if (!strcmp(o->op, "attention") && i == 6 && !o->dims[i])
            break;
        n += (size_t)snprintf(out + n, n < cap ? cap - n : 0, "%s%lld", i ? " " : "",
                              (long long)o->dims[i]);
    }
}

static void print_ops(const qie_bench_result *r, int stage, bool alone) {
    if (!r->stages[stage].measured || stage >= QIE_BENCH_EDIT)
        return;
    const qie_bench_stage *s = &r->stages[stage];
    printf("\n%s: operations, by time\n", qie_bench_stage_name((qie_bench_stage_id)stage));
    printf("  %-12s %-32s %-9s %6s %9s %6s", "op", "shape", "types", "calls", "ms", "share");
    if (alone)
        printf(" | %9s %9s %8s %8s %6s", "alone ms", "median", "GFLOP/s", "roof", "share");
    printf("\n");
    for (size_t i = 0; i < r->n_ops; i++) {
        const qie_bench_op *o = &r->ops[i];
        char shape[96], types[32];
        if ((int)o->stage != stage)
            continue;
        shape_text(o, shape, sizeof shape);
        snprintf(types, sizeof types, "%s%s%s%s", o->int8 ? "i8:" : "", o->act,
                 o->gflop > 0 ? "*" : "", o->gflop > 0 ? o->weight : "");
        printf("  %-12s %-32s %-9s %6.0f %9.2f %5.1f%%", o->op, shape, types, o->calls,
               o->in_stage_s * 1e3, 100 * o->in_stage_s / s->median_s);
        if (o->fastest_s > 0) {
            printf(" | %9.2f %9.2f %8.1f", o->fastest_s * 1e3, o->median_s * 1e3,
                   o->gflop / o->fastest_s);
            if (o->roof_s > 0)
                printf(" %8.1f %5.0f%%", o->gflop / o->roof_s, 100 * o->roof_s / o->fastest_s);
        }
        printf("\n");
    }
    double between = s->median_s - s->ops_s;
    printf("  %-12s %-32s %-9s %6s %9.2f %5.1f%%\n", "(between)", "", "", "", between * 1e3,
           100 * between / s->median_s);
    for (size_t i = 0; i < N_PRODUCTS; i++) {
        double share = share_of_roof(r, stage, PRODUCTS[i]);
        if (share >= 0)
            printf("  %s: %.0f %% of the roof on its own time\n", PRODUCTS[i], 100 * share);
    }
    if (share_of_roof(r, stage, NULL) >= 0)
        printf("  the whole stage: %.0f %% of the roof\n", 100 * share_of_roof(r, stage, NULL));
}

static void print_stages(const qie_bench_result *r, bool cold) {
    bool shallow = is_shallow(r);
    printf("%-11s %9s %9s %9s %9s %9s%s%s\n", "stage", "median s", "fastest", "first", "GFLOP",
           "GFLOP/s", shallow ? "   released" : "", cold ? "  in memory" : "");
    for (int i = 0; i < QIE_BENCH_STAGES; i++) {
        const qie_bench_stage *s = &r->stages[i];
        if (!s->measured)
            continue;
        printf("%-11s %9.3f %9.3f %9.3f", qie_bench_stage_name((qie_bench_stage_id)i), s->median_s,
               s->fastest_s, s->first_s);
        if (s->gflop > 0)
            printf(" %9.1f %9.1f", s->gflop, s->gflop / s->median_s);
        else
            printf(" %9s %9s", "", "");
        if (shallow && i != QIE_BENCH_EDIT)
            printf(" %10.2f", at_released_depth(s));
        else if (shallow)
            printf(" %10s", "");
        if (cold)
            printf(" %8.0f %%", 100 * s->resident);
        printf("\n");
        for (int k = 0; k < 2; k++)
            if (s->layers[k].name)
                printf("  %-9s %9.3f  in %d layers; %.4f s for one more\n", s->layers[k].name,
                       s->layers[k].seconds, s->layers[k].n, s->layers[k].layer_s);
    }
    double sum = sum_of_stages(r, false);
    if (sum >= 0)
        printf("sum of the stages of an edit: %.2f s (%d steps, %d pass%s each)\n", sum,
               r->plan.num_inference_steps, r->plan.cfg ? 2 : 1, r->plan.cfg ? "es" : "");
    if (r->stages[QIE_BENCH_TEXT_NEXT].measured || r->stages[QIE_BENCH_TEXT_AGAIN].measured)
        printf(
            "\"text_next\": other pictures and prompts were encoded before; \"text_again\": these "
            "pictures were, with another prompt; first: nothing was\n");
    if (r->edit_left_out)
        printf("the whole edit was not run: it would take long (--only edit runs it)\n");
    if (shallow) {
        printf("\"released\": extrapolated to %d blocks, %d language and %d vision layers from one "
               "layer of this model\n",
               RELEASED_BLOCKS, RELEASED_LANGUAGE, RELEASED_VISION);
        if (sum >= 0)
            printf("sum at the released depth: %.1f s\n", sum_of_stages(r, true));
    }
}

/* Each mode beside the full computation. */
static void print_caches(const bench *b) {
    const qie_bench_cache *off = &b->cache[QIE_CACHE_OFF];
    if (!b->caches)
        return;
    printf("\n%-11s %9s %9s %9s %8s %8s %16s\n", "cache", "denoise s", "total s", "time", "PSNR dB",
           "SSIM", "cut short");
    for (int i = 0; i < QIE_CACHE_COUNT; i++) {
        const qie_bench_cache *c = &b->cache[i];
        printf("%-11s %9.3f %9.3f %8.0f%% %8.2f %8.5f %7d of %5d\n", qie_cache_name((qie_cache)i),
               c->denoise_s, c->total_s, 100 * c->denoise_s / off->denoise_s, c->psnr, c->ssim,
               c->n_skipped, c->n_forwards);
    }
    if (b->cache[QIE_CACHE_BALANCED].mode == QIE_CACHE_OFF)
        printf("nothing is cached in so few steps\n");
}

static void print_table(const bench *b, const qie_engine *engine) {
    const qie_bench_result *r = &b->result;
    qie_engine_info info;
    qie_machine machine;
    qie_engine_get_info(engine, &info);
    qie_machine_read("", &machine);
    cli_progress_end();
    printf("qwen-edit %s, %s, %s, back end %s, level %s, %d thread%s\n", qie_version(),
           info.model_name, info.precision, info.backend, info.cpu_level, info.n_threads,
           info.n_threads == 1 ? "" : "s");
    printf("%s, %d cores; median and fastest of %d%s\n", machine.cpu, machine.cores,
           b->options.repeats,
           b->options.cold ? "; each run finds the files out of memory" : " after a first run");
    printf("result %dx%d", r->plan.width, r->plan.height);
    for (int i = 0; i < r->plan.n_images; i++)
        printf(", reference %dx%d", r->plan.images[i].vae_width, r->plan.images[i].vae_height);
    printf("; %d + %d image rows, %d text rows\n\n", r->plan.n_target_tokens,
           r->plan.n_reference_tokens, r->plan.n_prompt_tokens);
    print_stages(r, b->options.cold);
    printf("working memory %.1f MiB", (double)r->working_peak_bytes / 1048576);
    if (r->rss_anon_peak_bytes >= 0)
        printf(", anonymous memory of the process %.1f MiB",
               (double)r->rss_anon_peak_bytes / 1048576);
    printf("; weights %.2f GiB stay in their files\n", (double)r->plan.weights_bytes / 1073741824);
    for (int i = 0; i < QIE_BENCH_STAGES; i++)
        print_ops(r, i, b->options.ops);
    print_caches(b);
}

/* ---- JSON */

static qie_json *share_json(double share) {
    return share >= 0 ? qie_json_new_double(share) : qie_json_new_null();
}

static qie_json *layers_json(const qie_bench_stage *s) {
    qie_json *all = qie_json_new_array();
    for (int k = 0; k < 2; k++) {
        if (!s->layers[k].name)
            continue;
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "name", qie_json_new_string(s->layers[k].name));
        qie_json_put(o, "n", qie_json_new_int(s->layers[k].n));
        qie_json_put(o, "released_n", qie_json_new_int(released(s->layers[k].name)));
        qie_json_put(o, "seconds", qie_json_new_double(s->layers[k].seconds));
        qie_json_put(o, "layer_s", qie_json_new_double(s->layers[k].layer_s));
        qie_json_push(all, o);
    }
    return all;
}

static qie_json *stage_json(const qie_bench_result *r, int stage, bool cold) {
    const qie_bench_stage *s = &r->stages[stage];
    qie_json *o = qie_json_new_object(), *times = qie_json_new_array();
    qie_json_put(o, "stage", qie_json_new_string(qie_bench_stage_name((qie_bench_stage_id)stage)));
    qie_json_put(o, "median_s", qie_json_new_double(s->median_s));
    qie_json_put(o, "fastest_s", qie_json_new_double(s->fastest_s));
    qie_json_put(o, "first_s", qie_json_new_double(s->first_s));
    for (int i = 0; i < s->n; i++)
        qie_json_push(times, qie_json_new_double(s->times[i]));
    qie_json_put(o, "times_s", times);
    if (cold)
        qie_json_put(o, "resident_share", qie_json_new_double(s->resident));
    if (stage == QIE_BENCH_EDIT)
        return o;
    qie_json_put(o, "layers", layers_json(s));
    qie_json_put(o, "released_depth_s", qie_json_new_double(at_released_depth(s)));
    if (stage > QIE_BENCH_EDIT)
        return o;
    qie_json_put(o, "gflop", qie_json_new_double(s->gflop));
    qie_json_put(o, "gflop_per_s", qie_json_new_double(s->gflop / s->median_s));
    qie_json_put(o, "ops_s", qie_json_new_double(s->ops_s));
    qie_json *shares = qie_json_new_object();
    for (size_t i = 0; i < N_PRODUCTS; i++)
        qie_json_put(shares, PRODUCTS[i], share_json(share_of_roof(r, stage, PRODUCTS[i])));
    qie_json_put(shares, "stage", share_json(share_of_roof(r, stage, NULL)));
    qie_json_put(o, "share_of_roof", shares);
    return o;
}

static qie_json *op_json(const qie_bench_op *op) {
    qie_json *o = qie_json_new_object(), *dims = qie_json_new_array();
    qie_json_put(o, "stage", qie_json_new_string(qie_bench_stage_name(op->stage)));
    qie_json_put(o, "op", qie_json_new_string(op->op));
    for (int i = 0; i < op->n_dims; i++)
        qie_json_push(dims, qie_json_new_int(op->dims[i]));
    qie_json_put(o, "shape", dims);
    qie_json_put(o, "act", qie_json_new_string(op->act));
    qie_json_put(o, "weight", qie_json_new_string(op->weight));
    qie_json_put(o, "int8", qie_json_new_bool(op->int8));
    qie_json_put(o, "calls", qie_json_new_double(op->calls));
    qie_json_put(o, "in_stage_s", qie_json_new_double(op->in_stage_s));
    qie_json_put(o, "gflop", qie_json_new_double(op->gflop));
    if (op->fastest_s <= 0)
        return o;
    qie_json_put(o, "median_s", qie_json_new_double(op->median_s));
    qie_json_put(o, "fastest_s", qie_json_new_double(op->fastest_s));
    qie_json_put(o, "gflop_per_s", qie_json_new_double(op->gflop / op->fastest_s));
    if (op->roof_s > 0) {
        qie_json_put(o, "roof_gflop_per_s", qie_json_new_double(op->gflop / op->roof_s));
        qie_json_put(o, "share_of_roof", qie_json_new_double(op->roof_s / op->fastest_s));
    }
    return o;
}

static qie_json *sizes_json(const qie_edit_plan *p) {
    qie_json *o = qie_json_new_object(), *references = qie_json_new_array();
    qie_json_put(o, "width", qie_json_new_int(p->width));
    qie_json_put(o, "height", qie_json_new_int(p->height));
    for (int i = 0; i < p->n_images; i++) {
        qie_json *one = qie_json_new_array();
        qie_json_push(one, qie_json_new_int(p->images[i].vae_width));
        qie_json_push(one, qie_json_new_int(p->images[i].vae_height));
        qie_json_push(references, one);
    }
    qie_json_put(o, "references", references);
    qie_json_put(o, "target_rows", qie_json_new_int(p->n_target_tokens));
    qie_json_put(o, "reference_rows", qie_json_new_int(p->n_reference_tokens));
    qie_json_put(o, "text_rows", qie_json_new_int(p->n_prompt_tokens));
    qie_json_put(o, "steps", qie_json_new_int(p->num_inference_steps));
    qie_json_put(o, "passes", qie_json_new_int(p->cfg ? 2 : 1));
    return o;
}

static qie_json *caches_json(const bench *b) {
    qie_json *all = qie_json_new_array();
    for (int i = 0; i < QIE_CACHE_COUNT; i++) {
        const qie_bench_cache *c = &b->cache[i];
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "cache", qie_json_new_string(qie_cache_name((qie_cache)i)));
        qie_json_put(o, "denoise_s", qie_json_new_double(c->denoise_s));
        qie_json_put(o, "total_s", qie_json_new_double(c->total_s));
        qie_json_put(o, "forwards", qie_json_new_int(c->n_forwards));
        qie_json_put(o, "skipped_forwards", qie_json_new_int(c->n_skipped));
        qie_json_put(o, "psnr_db", qie_json_new_double(c->psnr)); /* null: equal pictures */
        qie_json_put(o, "ssim", qie_json_new_double(c->ssim));
        qie_json_push(all, o);
    }
    return all;
}

static qie_json *result_json(const bench *b, const qie_engine *engine) {
    const qie_bench_result *r = &b->result;
    qie_engine_info info;
    qie_machine machine;
    qie_engine_get_info(engine, &info);
    qie_machine_read("", &machine);
    qie_json *o = qie_json_new_object(), *stages = qie_json_new_array(),
             *ops = qie_json_new_array();
    qie_json_put(o, "version", qie_json_new_string(qie_version()));
    qie_json_put(o, "cpu", qie_json_new_string(machine.cpu));
    qie_json_put(o, "cores", qie_json_new_int(machine.cores));
    qie_json_put(o, "model", qie_json_new_string(info.model_name));
    qie_json_put(o, "precision", qie_json_new_string(info.precision));
    qie_json_put(o, "backend", qie_json_new_string(info.backend));
    qie_json_put(o, "cpu_level", qie_json_new_string(info.cpu_level));
    qie_json_put(o, "threads", qie_json_new_int(info.n_threads));
    qie_json_put(o, "repeats", qie_json_new_int(b->options.repeats));
    qie_json_put(o, "cold", qie_json_new_bool(b->options.cold));
    qie_json_put(o, "sizes", sizes_json(&r->plan));
    for (int i = 0; i < QIE_BENCH_STAGES; i++)
        if (r->stages[i].measured)
            qie_json_push(stages, stage_json(r, i, b->options.cold));
    qie_json_put(o, "stages", stages);
    if (sum_of_stages(r, false) >= 0) {
        qie_json_put(o, "sum_of_stages_s", qie_json_new_double(sum_of_stages(r, false)));
        qie_json_put(o, "sum_at_released_depth_s", qie_json_new_double(sum_of_stages(r, true)));
    }
    qie_json_put(o, "working_peak_bytes", qie_json_new_int(r->working_peak_bytes));
    qie_json_put(o, "rss_anon_bytes", qie_json_new_int(r->rss_anon_peak_bytes));
    qie_json_put(o, "weights_bytes", qie_json_new_int(r->plan.weights_bytes));
    for (size_t i = 0; i < r->n_ops; i++)
        qie_json_push(ops, op_json(&r->ops[i]));
    qie_json_put(o, "ops", ops);
    if (b->caches)
        qie_json_put(o, "caches", caches_json(b));
    return o;
}

static void print_result(const bench *b, const qie_engine *engine) {
    if (!cli_on(b->v, OPT_JSON)) {
        print_table(b, engine);
        return;
    }
    qie_json *o = result_json(b, engine);
    char *text = qie_json_text(o, 0);
    puts(text ? text : "{}");
    free(text);
    qie_json_free(o);
}

qie_status cli_run_bench(cli_values *v, qie_error *err) {
    qie_engine *engine = NULL;
    bench b = {.v = v};
    qie_engine_info info;
    qie_status st = QIE_OK;
    QIE_FAIL_IF(v->n_args > 0, QIE_E_USAGE, err, NULL, "unexpected argument '%s'", v->args[0]);
    if (cli_is_set(v, OPT_NICE) && setpriority(PRIO_PROCESS, 0, (int)cli_number(v, OPT_NICE, 0)))
        cli_warn("the priority stays as it was: %s", strerror(errno));
    cli_interrupt_install();
    QIE_TRY_GOTO(read_options(&b, err));
    QIE_TRY_GOTO(open_engine(v, &engine, err));
    cli_interrupt_set_engine(engine);
    qie_engine_get_info(engine, &info);
    if (b.options.cold && info.is_demo)
        cli_warn("the built-in model is part of the program: its pages stay in memory");
    QIE_TRY_GOTO(read_pictures(&b, info.is_demo, err));
    QIE_TRY_GOTO(qie_engine_bench(engine, &b.edit, &b.options, &b.result, err));
    if (b.caches)
        QIE_TRY_GOTO(qie_engine_bench_cache(engine, &b.edit, b.options.tell, NULL, b.cache, err));
    print_result(&b, engine);
fail:
    cli_progress_end();
    cli_interrupt_set_engine(NULL);
    qie_bench_result_release(&b.result);
    for (size_t i = 0; i < QIE_MAX_IMAGES; i++)
        qie_image_destroy(b.pictures[i]);
    qie_engine_close(engine);
    return st;
}
