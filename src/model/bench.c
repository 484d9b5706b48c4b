#include "model/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "compute/op_record.h"
#include "image/compare.h"

const char *qie_bench_stage_name(qie_bench_stage_id stage) {
    static const char *const names[QIE_BENCH_STAGES] = {"text",      "vae_encode", "modulation",
                                                        "forward",   "vae_decode", "edit",
                                                        "text_next", "text_again"};
    return (unsigned)stage < QIE_BENCH_STAGES ? names[stage] : "";
}

qie_bench_options qie_bench_options_default(void) {
    qie_bench_options o = {.repeats = 3, .ops = true, .roof = true, .edit_limit_s = 600};
    for (int i = 0; i < QIE_BENCH_STAGES; i++)
        o.stages[i] = true;
    return o;
}

typedef struct bench {
    qie_model *m;
    const qie_run *run;
    qie_run reusing; /* the same with a cache of prompts */
    qie_prepared *p;
    const qie_bench_options *o;
    qie_bench_result *out;
    qie_op_record *record, *noted; /* of the run in hand; of all stages, calls summed */
    double resident;
    bool recording;
} bench;

static void say(const bench *b, const char *what) {
    if (b->o->tell)
        b->o->tell(b->o->tell_arg, what);
}

static void before_run(void *arg) {
    bench *b = arg;
    if (b->o->cold) {
        qie_files_drop_pages(b->m->files);
        b->resident = qie_files_resident_share(b->m->files);
    }
    if (b->recording)
        qie_op_record_begin(b->run->compute, b->record);
}

static void after_run(void *arg) {
    bench *b = arg;
    qie_op_record_end(b->run->compute);
}

/* Add what one run noted to the sums of its stage. */
static void keep_uses(bench *b, int stage) {
    qie_op_record *to = b->noted;
    for (size_t i = 0; i < b->record->n; i++) {
        const qie_op_use *u = &b->record->uses[i];
        size_t k = 0;
        while (k < to->n &&
               (to->uses[k].group != stage || !qie_op_equal(&to->uses[k].shape, &u->shape)))
            k++;
        if (k == QIE_MAX_OP_USES)
            continue;
        if (k == to->n)
            to->uses[to->n++] = (qie_op_use){.shape = u->shape, .group = stage};
        to->uses[k].calls += u->calls;
        to->uses[k].seconds += u->seconds;
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double middle(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, compare);
    return v[n / 2];
}

static qie_status run_stage(bench *b, int stage, qie_error *err) {
    static const char *const parts[QIE_BENCH_STAGES][2] = {
        {"vision", "language"}, {0}, {"blocks"}, {"blocks"}, {0}, {0}, {"vision", "language"},
        {"vision", "language"}};
    const qie_run *run = stage < QIE_BENCH_TEXT_NEXT ? b->run : &b->reusing;
    qie_bench_stage *s = &b->out->stages[stage];
    double seconds[2][QIE_BENCH_MAX_REPEATS], layer[2][QIE_BENCH_MAX_REPEATS];
    qie_stage_timing t = {.before = before_run, .after = after_run, .arg = b};
    say(b, qie_bench_stage_name((qie_bench_stage_id)stage));
    b->recording = false;
    /* Of stages that reuse something this one fills the cache: nothing is there yet. */
    QIE_TRY(qie_pipeline_time_stage(b->m, run, b->p, stage, &t, err));
    s->first_s = t.seconds;
    /* The operations of the others are those of the stages: they run as they are. */
    b->recording = stage < QIE_BENCH_EDIT;
    for (s->n = 0; s->n < b->o->repeats; s->n++) {
        QIE_TRY(qie_pipeline_time_stage(b->m, run, b->p, stage, &t, err));
        s->times[s->n] = t.seconds;
        for (int i = 0; i < 2; i++) {
            seconds[i][s->n] = t.layers[i].seconds;
            layer[i][s->n] = t.layers[i].layer_s;
        }
        if (b->recording)
            keep_uses(b, stage);
    }
    s->measured = true;
    s->median_s = middle(s->times, s->n);
    s->fastest_s = s->times[0];
    s->resident = b->o->cold ? b->resident : 1;
    for (int i = 0; i < 2; i++)
        if (parts[stage][i] && t.layers[i].n)
            s->layers[i] = (qie_bench_layers){parts[stage][i], t.layers[i].n,
                                              middle(seconds[i], s->n), middle(layer[i], s->n)};
    return QIE_OK;
}

/* ---- operations */

static int by_stage_and_time(const void *a, const void *b) {
    const qie_bench_op *x = a, *y = b;
    if (x->stage != y->stage)
        return (x->stage > y->stage) - (x->stage < y->stage);
    return (x->in_stage_s < y->in_stage_s) - (x->in_stage_s > y->in_stage_s);
}

static void describe_op(const qie_op_use *u, int n_runs, qie_bench_op *op) {
    const qie_op_shape *s = &u->shape;
    snprintf(op->op, sizeof op->op, "%s", s->op);
    snprintf(op->act, sizeof op->act, "%s", qie_dtype_name(s->act));
    snprintf(op->weight, sizeof op->weight, "%s", qie_dtype_name(s->weight));
    memcpy(op->dims, s->dims, sizeof op->dims);
    op->n_dims = qie_op_n_dims(s->op);
    op->int8 = s->int8;
    op->stage = (qie_bench_stage_id)u->group;
    op->calls = (double)u->calls / n_runs;
    op->in_stage_s = u->seconds / n_runs;
    op->gflop = qie_op_gflop(s);
}

/* The same shape in two stages is timed once. */
static const qie_bench_op *timed_before(const qie_bench_op *ops, size_t n, const qie_bench_op *op) {
    for (size_t i = 0; i < n; i++)
        if (ops[i].fastest_s > 0 && !strcmp(ops[i].op, op->op) && !strcmp(ops[i].act, op->act) &&
            ops[i].int8 == op->int8 && !strcmp(ops[i].weight, op->weight) &&
            !memcmp(ops[i].dims, op->dims, sizeof op->dims))
            return &ops[i];
    return NULL;
}

static qie_status time_op(bench *b, const qie_bench_op *ops, size_t n, qie_bench_op *op,
                          qie_error *err) {
    const qie_bench_op *same = timed_before(ops, n, op);
    qie_op_shape s = {.act = (qie_dtype)qie_dtype_from_name(op->act),
                      .weight = (qie_dtype)qie_dtype_from_name(op->weight),
                      .int8 = op->int8};
    qie_op_bench_options o = {.repeats = b->o->repeats, .roof = b->o->roof};
    qie_op_time t = {0};
    if (op->gflop <= 0)
        return QIE_OK;
    if (same) {
        op->fastest_s = same->fastest_s;
        op->median_s = same->median_s;
        op->roof_s = same->roof_s;
        return QIE_OK;
    }
    QIE_TRY(qie_run_check(b->run, err));
    snprintf(s.op, sizeof s.op, "%s", op->op);
    memcpy(s.dims, op->dims, sizeof s.dims);
    say(b, op->op);
    qie_status st = qie_op_bench(b->run->compute, &s, &o, &t, err);
    if (st == QIE_E_UNSUPPORTED) { /* weights in blocks: known from the stage alone */
        qie_error_clear(err);
        return QIE_OK;
    }
    op->fastest_s = t.fastest;
    op->median_s = t.median;
    op->roof_s = t.roof;
    return st;
}

static qie_status list_ops(bench *b, qie_error *err) {
    qie_bench_result *out = b->out;
    out->ops = calloc(b->noted->n + 1, sizeof *out->ops);
    QIE_FAIL_IF(!out->ops, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    for (size_t i = 0; i < b->noted->n; i++) {
        const qie_op_use *u = &b->noted->uses[i];
        qie_bench_op *op = &out->ops[out->n_ops++];
        describe_op(u, out->stages[u->group].n, op);
        out->stages[u->group].gflop += op->gflop * op->calls;
        out->stages[u->group].ops_s += op->in_stage_s;
    }
    qsort(out->ops, out->n_ops, sizeof *out->ops, by_stage_and_time);
    for (size_t i = 0; b->o->ops && i < out->n_ops; i++)
        QIE_TRY(time_op(b, out->ops, i, &out->ops[i], err));
    return QIE_OK;
}

/* Seconds that one whole edit will take, by its stages; 0 if they were not measured. */
static double edit_estimate(const bench *b) {
    const qie_bench_stage *s = b->out->stages;
    const qie_edit_options *o = &b->p->options;
    if (!s[QIE_BENCH_FORWARD].measured)
        return 0;
    return s[QIE_BENCH_TEXT].median_s + s[QIE_BENCH_VAE_ENCODE].median_s +
           s[QIE_BENCH_MODULATION].median_s +
           o->num_images *
               (s[QIE_BENCH_FORWARD].median_s * b->p->n_passes * o->num_inference_steps +
                s[QIE_BENCH_VAE_DECODE].median_s);
}

/* Most anonymous memory that this process has held, by the kernel's account of now: the arena keeps
 * its pages until the engine rests. */
static int64_t anonymous_bytes(void) {
    unsigned char *text = NULL;
    size_t n;
    long long kb = -1;
    if (qie_file_read("/proc/self/status", 1 << 16, &text, &n, NULL) != QIE_OK)
        return -1;
    const char *at = strstr((const char *)text, "RssAnon:");
    if (at)
        kb = strtoll(at + 8, NULL, 10);
    free(text);
    return kb < 0 ? -1 : kb * 1024;
}

qie_status qie_bench_run(qie_model *m, const qie_run *run, qie_prepared *p,
                         const qie_bench_options *o, qie_bench_result *out, qie_error *err) {
    qie_status st = QIE_OK;
    bench b = {.m = m, .run = run, .reusing = *run, .p = p, .o = o, .out = out};
    b.record = calloc(1, sizeof *b.record);
    b.noted = calloc(1, sizeof *b.noted);
    if (!b.record || !b.noted) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    for (int i = 0; i < QIE_BENCH_STAGES; i++) {
        if (!o->stages[i])
            continue;
        if (i == QIE_BENCH_EDIT && o->edit_limit_s > 0 && edit_estimate(&b) > o->edit_limit_s) {
            out->edit_left_out = true;
            continue;
        }
        qie_prompt_cache_destroy(b.reusing.prompt_cache);
        QIE_TRY_GOTO(qie_prompt_cache_create(QIE_PROMPT_CACHE_BYTES, &b.reusing.prompt_cache, err));
        QIE_TRY_GOTO(run_stage(&b, i, err));
    }
    out->rss_anon_peak_bytes = anonymous_bytes();
    out->working_peak_bytes = (int64_t)qie_arena_peak(run->arena);
    QIE_TRY_GOTO(list_ops(&b, err));
fail:
    qie_prompt_cache_destroy(b.reusing.prompt_cache);
    free(b.record);
    free(b.noted);
    return st;
}

void qie_bench_result_release(qie_bench_result *r) {
    if (!r)
        return;
    free(r->ops);
    memset(r, 0, sizeof *r);
}

qie_status qie_engine_bench_cache(qie_engine *engine, const qie_edit_options *edit,
                                  void (*tell)(void *arg, const char *mode), void *tell_arg,
                                  qie_bench_cache out[QIE_CACHE_COUNT], qie_error *err) {
    qie_edit_result results[QIE_CACHE_COUNT];
    qie_status st = QIE_OK;
    memset(results, 0, sizeof results);
    memset(out, 0, sizeof *out * QIE_CACHE_COUNT);
    for (int i = 0; i < QIE_CACHE_COUNT && st == QIE_OK; i++) {
        qie_edit_options o = *edit;
        qie_edit_result *r = &results[i];
        o.cache = (qie_cache)i;
        if (tell)
            tell(tell_arg, qie_cache_name(o.cache));
        st = qie_engine_edit(engine, &o, r, err);
        if (st == QIE_OK)
            out[i] = (qie_bench_cache){.mode = r->plan.cache,
                                       .denoise_s = r->denoise_s,
                                       .total_s = r->total_s,
                                       .n_forwards = r->n_forwards,
                                       .n_skipped = r->n_skipped,
                                       .psnr = qie_image_psnr(results[0].images[0], r->images[0]),
                                       .ssim = qie_image_ssim(results[0].images[0], r->images[0])};
    }
    for (int i = 0; i < QIE_CACHE_COUNT; i++)
        qie_edit_result_release(&results[i]);
    return st;
}
