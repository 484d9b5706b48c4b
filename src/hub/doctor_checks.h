/* Inside of doctor: the state that its checks share. For doctor*.c and place.c only. */
#ifndef QIE_HUB_DOCTOR_CHECKS_H
#define QIE_HUB_DOCTOR_CHECKS_H

#include "base/machine.h"
#include "base/nvml.h"
#include "hub/doctor.h"

#define QIE_NVML_TIMEOUT_MS 2500
#define QIE_CPU_COMMAND "qwen-edit edit ... --device cpu --max-side 512 -s 10"

typedef struct qie_doctor {
    const qie_doctor_options *o;
    qie_doctor_report *r;
    bool zh;
    double started;
    qie_gpus gpus;
    qie_gpu_choice visible[QIE_GPUS_MAX];
    int n_visible;
    qie_machine machine;
    qie_placement_model model;
    bool model_complete;
    /* the process whose end would help most, for the next step */
    char culprit[300], stop_it[200];
    int64_t culprit_bytes;
} qie_doctor;

/* Append a check; never NULL. */
qie_doctor_check *qie_doctor_say(qie_doctor *d, const char *id, qie_doctor_level level,
                                 const char *fmt, ...) __attribute__((format(printf, 4, 5)));
/* What to do about it. */
void qie_doctor_mend(qie_doctor_check *c, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* Each reads what qie_doctor_run has filled in (gpus, machine, model) and appends. */
void qie_doctor_check_gpus(qie_doctor *d);
void qie_doctor_check_placement(qie_doctor *d);

#endif
