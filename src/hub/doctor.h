/* Can this machine run the model, where, and what is in the way: checks with words for people and
 * numbers for machines. Reads only; needs no root; ends within a few seconds whatever the driver,
 * disk or network do. */
#ifndef QIE_HUB_DOCTOR_H
#define QIE_HUB_DOCTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "base/nvml.h"
#include "hub/endpoint.h"
#include "plan/placement.h"
#include "qie/error.h"

#define QIE_DOCTOR_CHECKS_MAX 160

typedef enum qie_doctor_level {
    QIE_DOCTOR_OK = 0,
    QIE_DOCTOR_INFO,
    QIE_DOCTOR_WARN,
    QIE_DOCTOR_FAIL
} qie_doctor_level;

typedef struct qie_doctor_check {
    char id[24]; /* "driver", "gpu", "process", "placement", "cpu", "memory", "model", "disk",
                    "network", ... */
    qie_doctor_level level;
    char text[900];
    char remedy[900]; /* "" if nothing is to be done */
} qie_doctor_check;

typedef struct qie_doctor_options {
    const char *root;      /* "" for this machine; another root replays a recorded one */
    const char *model;     /* as named; NULL: nobody named one */
    const char *model_dir; /* its folder; NULL: none, or the demo */
    bool is_demo;
    const char *model_error; /* why the named model is none; NULL */
    const qie_hub_settings *hub;
    const char *cache; /* where a pull would put the model */
    int64_t headroom;
    const char *cuda_visible; /* CUDA_VISIBLE_DEVICES; NULL: not set */
    bool force_cpu;
    const char *plugin; /* path of the GPU plugin; NULL: this copy has none */
    int port;           /* to look whether it is free; 0: not */
    bool chinese;
} qie_doctor_options;

typedef struct qie_doctor_report {
    qie_doctor_check checks[QIE_DOCTOR_CHECKS_MAX];
    size_t n;
    int n_failed, n_warned;
    char next[900]; /* the one best next step */
    qie_placement placement;
    qie_json *details; /* numbers; owned */
    double seconds;
} qie_doctor_report;

void qie_doctor_run(const qie_doctor_options *options, qie_doctor_report *out);
void qie_doctor_release(qie_doctor_report *r);

/* A card, or the MIG instance of it, that this process could use. */
typedef struct qie_doctor_card {
    qie_placement_gpu memory;
    char uuid[96]; /* for CUDA_VISIBLE_DEVICES */
    char name[96];
} qie_doctor_card;
/* Those of the choices whose memory is known. Returns how many. */
int qie_doctor_cards(const qie_gpus *gpus, const qie_gpu_choice *choices, int n,
                     qie_doctor_card out[QIE_GPUS_MAX]);
/* The weights in a model folder as the engine divides them, the released ones where it has none. */
void qie_doctor_model(const char *dir, qie_placement_model *out);

#endif
