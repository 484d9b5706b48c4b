/* Back ends that live in a shared object of their own, loaded when they are asked for: the CUDA
 * back end qie_cuda.so. The object gets everything it needs through these structs and exports one
 * symbol; it is refused when it was built against another version of them. */
#ifndef QIE_COMPUTE_PLUGIN_H
#define QIE_COMPUTE_PLUGIN_H

#include "compute/backend.h"
#include "plan/assign.h"

#define QIE_PLUGIN_API 4u
#define QIE_PLUGIN_ENTRY "qie_plugin_entry"

typedef struct qie_device_info {
    char uuid[48], name[96];
    int64_t total;
    int cc_major, cc_minor;
} qie_device_info;

typedef struct qie_device_options {
    int n_devices;
    int devices[QIE_ASSIGN_CARDS_MAX];    /* as qie_plugin.devices counts them */
    int numbers[QIE_ASSIGN_CARDS_MAX];    /* as people know them: the driver's indices */
    int64_t listed[QIE_ASSIGN_CARDS_MAX]; /* free bytes as the driver says; 0: not known */
    int64_t headroom;                     /* bytes left free on every card */
    int64_t limit;                        /* most bytes taken of a card, 0: what is free */
    int64_t host_bytes;         /* pinned host memory that may be taken for streamed weights */
    const char *offload_folder; /* see qie_engine_options; copied */
    int n_passes;               /* 2: plan for guidance passes on cards of their own */
    int n_threads;              /* of the host's own work */
    /* One line for people about what happened (a fall-back); may be NULL. */
    void (*say)(void *arg, const char *text);
    void *say_arg;
} qie_device_options;

typedef struct qie_plugin {
    uint32_t api;
    const char *name; /* "cuda" */
    /* Devices that answer; QIE_E_UNAVAILABLE with the driver's words when none does. */
    qie_status (*devices)(qie_device_info *out, int most, int *n, qie_error *err);
    qie_status (*create)(const qie_device_options *o, const qie_compute_limits *limits,
                         qie_compute **out, qie_error *err);
    /* Memory that operations need beside activations, on every card. */
    size_t (*workspace)(const qie_compute_limits *limits);
} qie_plugin;

/* Load `path` (NULL: QIE_CUDA_PLUGIN, else qie_cuda.so beside the program, in ../lib/qwen-edit, or
 * where the loader looks). Stays loaded. Errors: QIE_E_UNAVAILABLE, QIE_E_UNSUPPORTED (version). */
qie_status qie_plugin_open(const char *path, const qie_plugin **out, qie_error *err);

#endif
