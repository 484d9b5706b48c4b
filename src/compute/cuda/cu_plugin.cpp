/* The plugin's one exported symbol, and making and destroying the back end. */
#include <stdlib.h>
#include <string.h>

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

static size_t up(size_t n) {
    return (n + CU_ALIGN - 1) / CU_ALIGN * CU_ALIGN;
}

/* product: results before their epilogue, in pieces of rows; panel: converted weights, at least 64
 * rows of any, and whole weights of a convolution; low: low-rank factors and gathered rows. */
static void sizes(const qie_compute_limits *l, cu_backend *b) {
    size_t k = (size_t)l->max_k, n = (size_t)l->max_n, widest = k > n ? k : n;
    size_t conv = 4 * (size_t)l->max_conv_k * (size_t)l->max_conv_n;
    b->product_bytes = up(widest > 4096 ? (size_t)128 << 20 : 4 * 512 * n);
    b->panel_bytes = up(widest > 4096 ? (size_t)128 << 20 : 4 * 64 * widest);
    if (b->panel_bytes < conv)
        b->panel_bytes = up(conv);
    b->low_bytes = up(4 * 4 * 256 * widest);
    b->work_bytes =
        QIE_CU_LIBS_WORKSPACE + b->product_bytes + b->panel_bytes + b->low_bytes + CU_SMALL_BYTES;
}

static size_t workspace(const qie_compute_limits *limits) {
    cu_backend *b = (cu_backend *)calloc(1, sizeof *b);
    size_t n = 0;
    if (b) {
        sizes(limits, b);
        n = b->work_bytes;
    }
    free(b);
    return n;
}

static void release(void *state) {
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
        int rc = cu_info(card.id, &card.info);
        if (rc != CU_OK) {
            free(b);
            return cu_status(rc, err);
        }
        if (card.info.cc_major < LEAST_CC) {
            qie_status st =
                qie_fail(err, QIE_E_UNAVAILABLE, "gpus",
                         "GPU %d (%s) has compute capability %d.%d, 8.0 is the least", card.id,
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
        cu_memory_release(b);
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
