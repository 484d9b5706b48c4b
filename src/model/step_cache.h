/* Step caching: most of a forward is left out where its result would hardly differ from the last
 * one's.
 *
 * The first block is always computed. What it adds to the target rows is compared with what it
 * added when the blocks were last all computed; while the relative change, mean|now - then| /
 * mean|then|, is below a threshold, the other blocks are taken to add what they added then. Each
 * guidance pass has a memory of its own. The first steps, which lay the picture out, and the last
 * ones, which finish it, are always computed, as is every step after `most` skipped ones. Reading
 * and copying only: with a threshold of 0 every number is as without a cache. */
#ifndef QIE_MODEL_STEP_CACHE_H
#define QIE_MODEL_STEP_CACHE_H

#include "model/run.h"
#include "qie/edit.h"

typedef struct qie_cache_rules {
    double threshold; /* of the relative change; 0: never skip */
    int first, last;  /* steps computed at the beginning and at the end */
    int most;         /* skipped in a row */
} qie_cache_rules;

/* Rules of a mode for an edit of n_steps; false: nothing is cached (mode off, or so few steps that
 * each counts: QIE_CACHE_MIN_STEPS - 1 or less). threshold >= 0 replaces the mode's own. */
bool qie_cache_rules_make(qie_cache mode, double threshold, int n_steps, qie_cache_rules *out);

typedef struct qie_step_cache {
    qie_cache_rules rules;
    int n_steps;
    int64_t n; /* values of a buffer: target rows x width */
    /* Kept with the opposite sign, as the operations give them. */
    float *scratch;  /* what the first block adds now */
    float *first[2]; /* what it added when all blocks were computed */
    float *rest[2];  /* what the others added then */
    bool filled[2];
    int n_row[2]; /* skipped in a row */
    int n_skipped;
    double *partial; /* [2 * qie_step_cache_chunks(n)], host */
} qie_step_cache;

/* Buffers of n values in the run's arena: 1 + 2 n_passes of them, and the partial sums. */
qie_status qie_step_cache_init(qie_step_cache *c, const qie_run *run, const qie_cache_rules *rules,
                               int n_steps, int n_passes, int64_t n, qie_error *err);
/* Pieces in which n values are summed, whatever the number of threads. */
int64_t qie_step_cache_chunks(int64_t n);

/* x [n]: the rows before the first block; */
void qie_step_cache_before(qie_step_cache *c, const qie_run *run, int i_step, int i_pass,
                           const float *x);
/* behind it: *skip tells that the other blocks are left out, x is then what they would have left;
 */
qie_status qie_step_cache_decide(qie_step_cache *c, const qie_run *run, int i_step, int i_pass,
                                 float *x, bool *skip, qie_error *err);
/* and behind the last one, if they were computed. */
void qie_step_cache_keep(qie_step_cache *c, const qie_run *run, int i_pass, const float *x);

/* mean|a - b| / mean|b| of n values on up to n_threads threads; 0 when both are zeros. partial:
 * scratch of 2 * qie_step_cache_chunks(n). Exposed for tests. */
double qie_relative_change(const float *a, const float *b, int64_t n, int n_threads,
                           double *partial);

#endif
