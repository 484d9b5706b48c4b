/* The worker process: owns the model, runs one job at a time, is expendable. */
#ifndef QIE_SERVICE_WORKER_H
#define QIE_SERVICE_WORKER_H

#include "qie/edit.h"
#include "qie/error.h"

typedef struct svc_worker_options {
    int channel;
    qie_engine_options engine;
    const char *lora_dir; /* of those that jobs name; NULL: none */
    qie_cache cache;      /* of jobs that name none */
} svc_worker_options;

/* Serve jobs until the master goes away or says so. Errors: those of qie_engine_open, QIE_E_IO. */
qie_status svc_worker_run(const svc_worker_options *options, qie_error *err);

#endif
