/* How long the stages of an edit and the operations inside them take on an open engine.
 *
 * Thread: as qie_engine_edit. Times are wall-clock seconds. */
#ifndef QIE_BENCH_H
#define QIE_BENCH_H

#include "qie/edit.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef enum qie_bench_stage_id {
    QIE_BENCH_TEXT = 0,   /* pictures and prompts through the text encoder; vision and language */
    QIE_BENCH_VAE_ENCODE, /* all references */
    QIE_BENCH_MODULATION, /* of all steps, once per edit */
    QIE_BENCH_FORWARD,    /* one pass of the transformer */
    QIE_BENCH_VAE_DECODE,
    QIE_BENCH_EDIT,       /* all of it */
    QIE_BENCH_TEXT_NEXT,  /* as TEXT, in a process that has encoded other pictures and prompts */
    QIE_BENCH_TEXT_AGAIN, /* as TEXT, in a process that has encoded these pictures */
    QIE_BENCH_STAGES
} qie_bench_stage_id;
/* "text", "vae_encode", "modulation", "forward", "vae_decode", "edit", "text_next", "text_again" */
const char *qie_bench_stage_name(qie_bench_stage_id stage);

#define QIE_BENCH_MAX_REPEATS 64

typedef struct qie_bench_options {
    int repeats;                   /* 1..64; each stage runs once more, first, to warm up */
    bool stages[QIE_BENCH_STAGES]; /* which ones */
    /* Each run of a stage finds the model's files out of memory (as far as that needs no rights):
     * its time includes the first touch of the weights. */
    bool cold;
    bool ops, roof; /* each operation's shape alone, too; beside oneDNN */
    /* The whole edit is left out when the stages say that it takes longer than this; 0: never. */
    double edit_limit_s;
    void (*tell)(void *arg, const char *what); /* before each measurement; NULL: silent */
    void *tell_arg;
} qie_bench_options;
qie_bench_options qie_bench_options_default(void);

/* A part of a stage made of equal layers: one more of them costs layer_s more. */
typedef struct qie_bench_layers {
    const char *name; /* "vision", "language", "blocks"; NULL: none */
    int n;            /* that the model has */
    double seconds;   /* of them all; median */
    double layer_s;
} qie_bench_layers;

typedef struct qie_bench_stage {
    bool measured;
    double first_s; /* of the run before the repeats */
    int n;
    double times[QIE_BENCH_MAX_REPEATS]; /* ascending */
    double fastest_s, median_s;
    double gflop;    /* products of one run; multiply-adds count as two */
    double ops_s;    /* spent in operations; the rest is between them */
    double resident; /* share of the model's files in memory when the runs began; cold only */
    qie_bench_layers layers[2];
} qie_bench_stage;

typedef struct qie_bench_op {
    char op[16];              /* "linear", "attention", "conv2d", else one that is no product */
    char act[12], weight[12]; /* types: "F32", "BF16" ... */
    bool int8;                /* multiplied in 8-bit integers; the roof is that of act */
    int64_t dims[7]; /* linear: m n k; attention: nq nk heads kv_heads head_dim causal segment;
                        conv2d: h w in out kernel stride up; others: rows columns */
    int n_dims;
    qie_bench_stage_id stage;
    double calls;                       /* in one run of the stage */
    double in_stage_s;                  /* of all calls of one run, there */
    double gflop;                       /* of one call */
    double fastest_s, median_s, roof_s; /* alone; 0: not measured */
} qie_bench_op;

typedef struct qie_bench_result {
    qie_edit_plan plan;
    qie_bench_stage stages[QIE_BENCH_STAGES];
    qie_bench_op *ops; /* by stage, the longest first */
    size_t n_ops;
    bool edit_left_out;
    int64_t rss_anon_peak_bytes; /* of the process when done; -1: not known */
    int64_t working_peak_bytes;  /* of the working memory's arena */
} qie_bench_result;

/* Run it. *out is released with qie_bench_result_release in any case. Errors: as qie_engine_edit.
 */
qie_status qie_engine_bench(qie_engine *engine, const qie_edit_options *edit,
                            const qie_bench_options *options, qie_bench_result *out,
                            qie_error *err);
void qie_bench_result_release(qie_bench_result *result);

/* What a mode of step caching costs and gains in one edit. */
typedef struct qie_bench_cache {
    qie_cache mode; /* in force: OFF where the edit has too few steps for one */
    double denoise_s, total_s;
    int n_forwards, n_skipped;
    double psnr, ssim; /* of the first picture against OFF's: dB (INFINITY: equal), -1..1 */
} qie_bench_cache;
/* The edit once in each mode, OFF first. tell: before each; may be NULL. Errors: as
 * qie_engine_edit. */
qie_status qie_engine_bench_cache(qie_engine *engine, const qie_edit_options *edit,
                                  void (*tell)(void *arg, const char *mode), void *tell_arg,
                                  qie_bench_cache out[QIE_CACHE_COUNT], qie_error *err);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
