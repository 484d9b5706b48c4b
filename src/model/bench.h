/* Times of the stages and operations of an edit: what qie_engine_bench does once it has a plan and
 * an arena. */
#ifndef QIE_MODEL_BENCH_H
#define QIE_MODEL_BENCH_H

#include "model/pipeline.h"
#include "qie/bench.h"

/* out is zeroed by the caller, released by it in any case. */
qie_status qie_bench_run(qie_model *m, const qie_run *run, qie_prepared *p,
                         const qie_bench_options *o, qie_bench_result *out, qie_error *err);

#endif
