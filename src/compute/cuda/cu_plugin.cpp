/* The plugin's one exported symbol, and making and destroying the back end. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* O_TMPFILE */
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <new>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_state.hpp"

/* Oldest cards that the kernels run on: bf16 in mma.sync came with Ampere. */
#define LEAST_CC 8

static qie_status cu_status(int rc, qie_error *err) {
    switch (rc) {
    case CU_OOM: return qie_fail(err, QIE_E_NO_MEMORY, "device", "the GPU: %s", cu_text());
    case CU_DRIVER:
        return qie_fail(err, QIE_E_UNAVAILABLE, "device",
                        "the NVIDIA driver is missing or too old for this program: %s", cu_text());
    case CU_ARCH:
        return qie_fail(err, QIE_E_UNAVAILABLE, "device",
                        "this GPU is of a generation that the kernels are not built for: %s",
                        cu_text());
    case CU_LOST:
        return qie_fail(err, QIE_E_UNAVAILABLE, "device", "the GPU was lost: %s", cu_text());
    default: return qie_fail(err, QIE_E_UNAVAILABLE, "device", "the GPU failed: %s", cu_text());
    }
}

static qie_status devices(qie_device_info *out, int most, int *n, qie_error *err) {
    int count = 0, rc = cu_count(&count);
    *n = 0;
    if (rc != CU_OK)
        return cu_status(rc, err);
    QIE_FAIL_IF(count < 1, QIE_E_UNAVAILABLE, err, "device", "the driver shows no GPU");
    for (int i = 0; i < count && i < most; i++) {
        cu_device_info x;
        if ((rc = cu_info(i, &x)) != CU_OK)
            return cu_status(rc, err);
        qie_device_info *d = &out[(*n)++];
        memset(d, 0, sizeof *d);
        memcpy(d->uuid, x.uuid, sizeof d->uuid);
        memcpy(d->name, x.name, sizeof d->name);
        d->total = (int64_t)x.total;
        d->cc_major = x.cc_major;
        d->cc_minor = x.cc_minor;
    }
    return QIE_OK;
}

static void sizes(const qie_compute_limits *l, cu_backend *b) {
    qie_gpu_space s = qie_gpu_space_make(l->max_k, l->max_n, l->max_conv_k, l->max_conv_n);
    static_assert(QIE_CU_LIBS_WORKSPACE == (size_t)32 << 20, "plan/assign.c");
    static_assert(CU_SMALL_BYTES == (size_t)1 << 20, "plan/assign.c");
    static_assert(CU_ALIGN == QIE_GPU_ALIGN, "plan/assign.h");
    b->product_bytes = (size_t)s.product;
    b->panel_bytes = (size_t)s.panel;
    b->low_bytes = (size_t)s.low;
    b->work_bytes = (size_t)s.total;
}

static size_t workspace(const qie_compute_limits *l) {
    return (size_t)qie_gpu_space_make(l->max_k, l->max_n, l->max_conv_k, l->max_conv_n).total;
}

static void release(void *state) {
    cu_backend *b = (cu_backend *)state;
    cu_profile_release(b);
    if (b->offload >= 0)
        close(b->offload);
    cu_memory_release((cu_backend *)state);
}

static qie_status create(const qie_device_options *o, const qie_compute_limits *limits,
                         qie_compute **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(o->n_devices < 1 || o->n_devices > CU_DEVICES, QIE_E_INVALID, err, "gpus",
                "%d GPUs are named, 1 to %d can be used", o->n_devices, (int)CU_DEVICES);
    cu_backend *b = (cu_backend *)calloc(1, sizeof *b);
    QIE_FAIL_IF(!b, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    size_t room[CU_DEVICES] = {0};
    b->options = *o;
    for (int i = 0; i < o->n_devices; i++) {
        cu_card card;
        memset(&card, 0, sizeof card);
        card.id = o->devices[i];
        card.number = o->numbers[i];
        card.listed = o->listed[i];
        int rc = cu_info(card.id, &card.info);
        if (rc != CU_OK) {
            free(b);
            return cu_status(rc, err);
        }
        if (card.info.cc_major < LEAST_CC) {
            qie_status st =
                qie_fail(err, QIE_E_UNAVAILABLE, "gpus",
                         "GPU %d (%s) has compute capability %d.%d, 8.0 is the least", card.number,
                         card.info.name, card.info.cc_major, card.info.cc_minor);
            free(b);
            return st;
        }
        size_t now = 0, total = 0;
        if ((rc = cu_memory(card.id, &now, &total)) != CU_OK) {
            free(b);
            return cu_status(rc, err);
        }
        int at = b->n++;
        room[at] = now;
        for (; at > 0 && room[at - 1] < now; at--) {
            b->cards[at] = b->cards[at - 1];
            room[at] = room[at - 1];
            room[at - 1] = now;
        }
        b->cards[at] = card;
    }
    b->offload = -1;
    b->options.offload_folder = NULL; /* the caller's */
    if (o->offload_folder && *o->offload_folder) {
        /* without a name: gone with the process, however it ends */
        b->offload = open(o->offload_folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (b->offload < 0) {
            qie_status st = qie_fail(err, QIE_E_IO, "QWEN_EDIT_OFFLOAD_FOLDER",
                                     "no file can be made in the offload folder '%s': %s",
                                     o->offload_folder, strerror(errno));
            free(b);
            return st;
        }
    }
    const char *random = getenv("QIE_CUDA_RANDOM"), *profile = getenv("QIE_CUDA_PROFILE"),
               *graphs = getenv("QIE_CUDA_GRAPHS");
    b->graphs = !graphs || *graphs != '0';
    b->random = random && *random == '1';
    if (profile && *profile)
        cu_profile_create(b, profile);
    sizes(limits, b);
    cu_ops_fill(&b->compute.ops);
    b->compute.mem = &cu_mem_ops;
    b->compute.name = "cuda";
    b->compute.n_threads = o->n_threads < 1 ? 1 : o->n_threads;
    b->compute.bf16_native = true;
    b->compute.state = b;
    b->compute.release_state = release;
    int rc = cu_memory_create(b, limits);
    if (rc != CU_OK) {
        qie_status st = cu_status(rc, err);
        release(b);
        free(b);
        return st;
    }
    *out = &b->compute;
    return QIE_OK;
}

static const qie_plugin PLUGIN = {QIE_PLUGIN_API, "cuda", devices, create, workspace};

extern "C" __attribute__((visibility("default"))) const qie_plugin *qie_plugin_entry(void) {
    return &PLUGIN;
}
