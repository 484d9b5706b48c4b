/* One edit from decoded pictures to pictures: QwenImageEditPlusPipeline's __call__.
 *
 * The order of work: plan (sizes, tokens, memory: everything that can be refused is refused here),
 * pictures and prompts through the text encoder, references through the VAE, the step loop, the
 * decoder. Each stage releases its memory before the next. */
#ifndef QIE_MODEL_PIPELINE_H
#define QIE_MODEL_PIPELINE_H

#include "model/model.h"
#include "plan/memory.h"
#include "qie/edit.h"
#include "text/prompt.h"

/* Everything decided before anything is computed. */
typedef struct qie_prepared {
    qie_edit_options options; /* defaults filled in */
    qie_size_plan sizes;
    qie_prompt prompts[2];
    qie_memory_request request;
    qie_memory_plan memory;
    qie_scheduler_config scheduler; /* in force */
    bool lightning, caching;
    qie_cache_rules cache;    /* of the steps, if caching */
    qie_weights *injected[8]; /* open files of the injections, same order */
    int n_passes;
    int64_t n_text[2];
} qie_prepared;

/* Resolve defaults, sizes, tokens and memory; check every limit. limit_bytes: working memory that
 * may be used. out is zeroed first; release it in any case. Errors: as qie_engine_plan. */
qie_status qie_prepare(const qie_model *m, const qie_edit_options *options, qie_dtype act,
                       int64_t limit_bytes, qie_prepared *out, qie_error *err);
void qie_prepared_release(qie_prepared *p);
/* The numbers for people. */
void qie_prepared_describe(const qie_model *m, const qie_prepared *p, qie_edit_plan *plan);

/* Run it. result->images, timings are filled on success; on failure it holds nothing.
 * *non_finite is set when the failure was a NaN or infinity in the computed values. */
qie_status qie_pipeline_run(qie_model *m, const qie_run *run, qie_prepared *p,
                            qie_edit_result *result, bool *non_finite, qie_error *err);
/* One stage of an edit on its own, timed. */
typedef struct qie_stage_timing {
    void (*before)(void *arg); /* just before the time is taken, and just after; may be NULL */
    void (*after)(void *arg);
    void *arg;
    /* out: */
    double seconds;
    struct {
        int n;                   /* layers; 0: none */
        double seconds, layer_s; /* all of them; one more */
    } layers[2];                 /* text: vision tower, language model; else the blocks */
} qie_stage_timing;
/* stage: a qie_bench_stage_id. Inputs that earlier stages would give are made up. */
qie_status qie_pipeline_time_stage(qie_model *m, const qie_run *run, qie_prepared *p, int stage,
                                   qie_stage_timing *t, qie_error *err);
/* Seconds for one transformer block of this edit's size. */
qie_status qie_pipeline_probe(qie_model *m, const qie_run *run, qie_prepared *p,
                              double *seconds_per_block, qie_error *err);

#endif
