/* Where an edit or a service computes: doctor's question, asked before a model is opened, and
 * answered with doctor's arithmetic (plan/placement), words and remedies.
 *
 * Without a GPU: the CPU. With GPUs of which none has room, or with a driver that does not work: a
 * refusal that names the command for the CPU, never a silent run of hours. Looks at the driver once
 * (2.5 s at most), or not at all where the answer is the CPU anyway. */
#ifndef QIE_HUB_PLACE_H
#define QIE_HUB_PLACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/nvml.h"
#include "plan/placement.h"
#include "qie/error.h"

typedef enum qie_device { QIE_DEVICE_AUTO = 0, QIE_DEVICE_CPU, QIE_DEVICE_CUDA } qie_device;

typedef struct qie_place_options {
    const char *model_dir; /* NULL: the demo, which AUTO computes on the CPU */
    qie_device device;
    const char *gpus; /* "0,GPU-uuid": these only; "0+1,2+3": one worker's with '+' between them;
                         NULL: all that are visible */
    bool each;        /* a worker on every card or group that has room, instead of one edit */
    int64_t headroom; /* bytes left to others on every card */
    const char *cuda_visible; /* CUDA_VISIBLE_DEVICES; NULL: not set */
    const char *plugin;       /* path of the GPU plugin; NULL: this copy has none */
    const char *root;         /* "" for this machine (doctor.h) */
    bool chinese;
} qie_place_options;

/* The card, or the cards together, of one process. */
typedef struct qie_place_slot {
    qie_placement_kind kind; /* RESIDENT, STREAMED, SHARDED or PARALLEL */
    int n_gpus;
    int gpus[QIE_PLACEMENT_GPUS_MAX]; /* physical indices */
    char name[96];                    /* of the first: "NVIDIA A100-SXM4-80GB" */
    char visible[2048]; /* what to set CUDA_VISIBLE_DEVICES to: UUIDs, in the order of gpus */
} qie_place_slot;

typedef struct qie_place {
    int n_slots; /* 0: on the CPU */
    qie_place_slot slots[QIE_GPUS_MAX];
    bool warned;     /* note is a warning: GPUs are there and are not used */
    char note[2000]; /* what to tell the user; "" */
} qie_place;

/* Errors, with doctor's text and remedy: QIE_E_NO_MEMORY (no card has room now), QIE_E_TOO_LARGE
 * (none has when empty), QIE_E_UNAVAILABLE (driver, or a GPU is demanded and there is none or no
 * plugin), QIE_E_INVALID (gpus). */
qie_status qie_place_choose(const qie_place_options *options, qie_place *out, qie_error *err);

/* The arithmetic for this machine, whatever the device: what doctor and info show. words: the one
 * sentence of it. model_dir, headroom, cuda_visible, root and chinese count. */
void qie_place_describe(const qie_place_options *options, qie_placement *out, char *words,
                        size_t cap);

#endif
