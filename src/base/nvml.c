#define _GNU_SOURCE
#include "base/nvml.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fs.h"

#define START_WITHIN_S 20.0 /* a process of its own, and the library found in it */

/* The part of NVML's interface that is used, as its documentation gives it. */
typedef void *nv_device;
typedef struct nv_memory {
    unsigned long long total, free, used;
} nv_memory;
typedef struct nv_process_v1 {
    unsigned pid;
    unsigned long long used;
} nv_process_v1;
typedef struct nv_process_v2 {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} nv_process_v2;
typedef struct nv_pci {
    char bus_legacy[16];
    unsigned domain, bus, device, pci_device, pci_subsystem;
    char bus_id[32];
} nv_pci;

enum {
    NV_OK = 0,
    NV_NO_PERMISSION = 4,
    NV_INSUFFICIENT_SIZE = 7,
    NV_DRIVER_NOT_LOADED = 9,
    NV_GPU_LOST = 15,
    NV_MISMATCH = 18
};

typedef struct nvml {
    void *lib;
    int (*init)(void);
    int (*shutdown)(void);
    const char *(*text)(int);
    int (*driver)(char *, unsigned);
    int (*cuda)(int *);
    int (*count)(unsigned *);
    int (*handle)(unsigned, nv_device *);
    int (*name)(nv_device, char *, unsigned);
    int (*uuid)(nv_device, char *, unsigned);
    int (*memory)(nv_device, nv_memory *);
    int (*capability)(nv_device, int *, int *);
    int (*pci)(nv_device, nv_pci *);
    int (*mig_mode)(nv_device, unsigned *, unsigned *);
    int (*mig_handle)(nv_device, unsigned, nv_device *);
    int (*processes[2])(nv_device, unsigned *, void *); /* compute, graphics */
    bool v1[2];                                         /* the first layout of the records */
} nvml;

/* dlsym gives an object pointer; the copy says that a function is meant. */
static bool symbol(const nvml *n, void *slot, const char *name) {
    void *p = dlsym(n->lib, name);
    memcpy(slot, &p, sizeof p);
    return p != NULL;
}

static bool load(nvml *n) {
    static const char *const kinds[] = {"Compute", "Graphics"};
    char name[80];
    if (!symbol(n, &n->init, "nvmlInit_v2") && !symbol(n, &n->init, "nvmlInit"))
        return false;
    symbol(n, &n->shutdown, "nvmlShutdown");
    symbol(n, &n->text, "nvmlErrorString");
    symbol(n, &n->driver, "nvmlSystemGetDriverVersion");
    if (!symbol(n, &n->cuda, "nvmlSystemGetCudaDriverVersion_v2"))
        symbol(n, &n->cuda, "nvmlSystemGetCudaDriverVersion");
    if (!symbol(n, &n->count, "nvmlDeviceGetCount_v2"))
        symbol(n, &n->count, "nvmlDeviceGetCount");
    if (!symbol(n, &n->handle, "nvmlDeviceGetHandleByIndex_v2"))
        symbol(n, &n->handle, "nvmlDeviceGetHandleByIndex");
    symbol(n, &n->name, "nvmlDeviceGetName");
    symbol(n, &n->uuid, "nvmlDeviceGetUUID");
    symbol(n, &n->memory, "nvmlDeviceGetMemoryInfo");
    symbol(n, &n->capability, "nvmlDeviceGetCudaComputeCapability");
    if (!symbol(n, &n->pci, "nvmlDeviceGetPciInfo_v3"))
        symbol(n, &n->pci, "nvmlDeviceGetPciInfo_v2");
    symbol(n, &n->mig_mode, "nvmlDeviceGetMigMode");
    symbol(n, &n->mig_handle, "nvmlDeviceGetMigDeviceHandleByIndex");
    for (int k = 0; k < 2; k++) {
        for (int v = 3; v >= 2 && !n->processes[k]; v--) {
            snprintf(name, sizeof name, "nvmlDeviceGet%sRunningProcesses_v%d", kinds[k], v);
            symbol(n, &n->processes[k], name);
        }
        if (!n->processes[k]) {
            snprintf(name, sizeof name, "nvmlDeviceGet%sRunningProcesses", kinds[k]);
            n->v1[k] = symbol(n, &n->processes[k], name);
        }
    }
    return n->count && n->handle;
}

static const char *words(const nvml *n, int code) {
    const char *t = n->text ? n->text(code) : NULL;
    return t ? t : "unknown error";
}

static int64_t bytes_or_unknown(unsigned long long v) {
    return v > (unsigned long long)INT64_MAX ? -1 : (int64_t)v; /* NVML_VALUE_NOT_AVAILABLE is ~0 */
}

static void read_processes(const nvml *n, nv_device d, qie_gpu *g) {
    for (int k = 0; k < 2; k++) {
        if (!n->processes[k])
            continue;
        nv_process_v2 v2[QIE_GPU_PROCESSES_MAX];
        nv_process_v1 v1[QIE_GPU_PROCESSES_MAX];
        unsigned count = QIE_GPU_PROCESSES_MAX;
        int rc = n->processes[k](d, &count, n->v1[k] ? (void *)v1 : (void *)v2);
        if (rc == NV_INSUFFICIENT_SIZE)
            count = 0; /* more than anybody could read: told as not told */
        if (rc != NV_OK)
            continue;
        for (unsigned i = 0; i < count && g->n_processes < QIE_GPU_PROCESSES_MAX; i++) {
            unsigned pid = n->v1[k] ? v1[i].pid : v2[i].pid;
            bool seen = false;
            for (int j = 0; j < g->n_processes; j++)
                seen = seen || g->processes[j].pid == pid;
            if (!seen)
                g->processes[g->n_processes++] = (qie_gpu_process){
                    pid, bytes_or_unknown(n->v1[k] ? v1[i].used : v2[i].used), k == 1};
        }
    }
}

static void read_migs(const nvml *n, nv_device d, qie_gpu *g) {
    unsigned current = 0, pending = 0;
    if (!n->mig_mode || n->mig_mode(d, &current, &pending) != NV_OK || !current)
        return;
    g->mig = true;
    for (unsigned i = 0; n->mig_handle && i < QIE_MIG_MAX; i++) {
        nv_device m;
        nv_memory mem;
        if (n->mig_handle(d, i, &m) != NV_OK)
            continue;
        qie_mig *x = &g->migs[g->n_mig++];
        x->total = x->free = -1;
        if (n->uuid)
            n->uuid(m, x->uuid, sizeof x->uuid);
        if (n->memory && n->memory(m, &mem) == NV_OK) {
            x->total = bytes_or_unknown(mem.total);
            x->free = bytes_or_unknown(mem.free);
        }
    }
}

static void not_told(const nvml *n, int code, qie_gpu *g) {
    g->code = code;
    snprintf(g->error, sizeof g->error, "%.90s", words(n, code));
}

static void read_gpu(const nvml *n, unsigned index, qie_gpu *g) {
    nv_device d;
    nv_memory mem;
    nv_pci pci;
    g->index = (int)index;
    g->total = g->free = g->used = -1;
    int rc = n->handle(index, &d);
    if (rc != NV_OK) {
        not_told(n, rc, g);
        return;
    }
    if (n->name)
        n->name(d, g->name, sizeof g->name);
    if (n->uuid)
        n->uuid(d, g->uuid, sizeof g->uuid);
    if (n->pci && n->pci(d, &pci) == NV_OK)
        snprintf(g->bus, sizeof g->bus, "%.31s", pci.bus_id);
    if (n->capability)
        n->capability(d, &g->cc_major, &g->cc_minor);
    rc = n->memory ? n->memory(d, &mem) : -1;
    if (rc == NV_OK) {
        g->total = bytes_or_unknown(mem.total);
        g->free = bytes_or_unknown(mem.free);
        g->used = bytes_or_unknown(mem.used);
    } else
        not_told(n, rc, g);
    read_migs(n, d, g);
    read_processes(n, d, g);
}

/* The library and its functions; nothing of the driver has run yet but the loader. */
static bool find_library(nvml *n, qie_gpus *out) {
    const char *path = getenv("QIE_NVML");
    n->lib = dlopen(path && *path ? path : "libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!n->lib) {
        out->state = QIE_GPUS_NO_DRIVER;
        return false;
    }
    if (!load(n)) {
        out->state = QIE_GPUS_ERROR;
        out->code = QIE_NVML_TOO_OLD;
        snprintf(out->detail, sizeof out->detail,
                 "libnvidia-ml lacks functions of every driver since 2018");
        return false;
    }
    return true;
}

static void ask_driver(nvml *n, qie_gpus *out) {
    int rc = n->init();
    unsigned count = 0;
    if (rc == NV_OK) {
        if (n->driver)
            n->driver(out->driver, sizeof out->driver);
        if (n->cuda)
            n->cuda(&out->cuda_version);
        rc = n->count(&count);
    }
    if (rc != NV_OK) {
        out->state = rc == NV_DRIVER_NOT_LOADED ? QIE_GPUS_NOT_LOADED
                     : rc == NV_MISMATCH        ? QIE_GPUS_MISMATCH
                     : rc == NV_NO_PERMISSION   ? QIE_GPUS_NO_PERMISSION
                     : rc == NV_GPU_LOST        ? QIE_GPUS_LOST
                                                : QIE_GPUS_ERROR;
        out->code = rc;
        snprintf(out->detail, sizeof out->detail, "%.200s", words(n, rc));
        return;
    }
    for (unsigned i = 0; i < count && i < QIE_GPUS_MAX; i++)
        read_gpu(n, i, &out->gpus[out->n++]);
    if (n->shutdown)
        n->shutdown();
}

/* n bytes, or false: at `end` with *late set, or when the other side is gone. */
static bool take(int fd, void *data, size_t n, double end, bool *late) {
    char *p = data;
    while (n) {
        double left = end - qie_now_s();
        struct pollfd ready = {fd, POLLIN, 0};
        *late = left <= 0;
        int rc = *late ? 0 : poll(&ready, 1, (int)(left * 1000) + 1);
        if (rc == 0 && !*late)
            continue;
        ssize_t k = rc > 0 ? read(fd, p, n) : rc;
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        p += k;
        n -= (size_t)k;
    }
    return true;
}

static void probe_in_child(int fd, qie_gpus *out) {
    nvml n = {0};
    bool found = find_library(&n, out);
    int failed = qie_write_all(fd, &found, sizeof found);
    if (found)
        ask_driver(&n, out);
    _exit(failed || qie_write_all(fd, out, sizeof *out));
}

void qie_gpus_probe(int timeout_ms, qie_gpus *out) {
    int fds[2];
    bool found, late = false;
    memset(out, 0, sizeof *out);
    if (pipe(fds))
        fds[0] = fds[1] = -1;
    pid_t child = fds[0] < 0 ? -1 : fork();
    if (child < 0) {
        out->state = QIE_GPUS_ERROR;
        snprintf(out->detail, sizeof out->detail, "no process to ask it in: %s", strerror(errno));
        close(fds[0]);
        close(fds[1]);
        return;
    }
    if (child == 0) {
        close(fds[0]);
        probe_in_child(fds[1], out);
    }
    close(fds[1]);
    /* The driver has its time from when it is asked: a busy machine starts the child late. */
    if (!take(fds[0], &found, sizeof found, qie_now_s() + START_WITHIN_S, &late) ||
        !take(fds[0], out, sizeof *out, qie_now_s() + (found ? timeout_ms / 1e3 : START_WITHIN_S),
              &late)) {
        memset(out, 0, sizeof *out);
        out->state = late ? QIE_GPUS_HUNG : QIE_GPUS_ERROR;
        out->code = late ? 0 : QIE_NVML_CRASHED;
        snprintf(out->detail, sizeof out->detail, "%s", late ? "" : "its library crashed");
    }
    close(fds[0]);
    kill(child, SIGKILL);
    /* A child stuck in the driver cannot die: not waited for beyond this. */
    for (int i = 0; i < 20 && waitpid(child, NULL, WNOHANG) == 0; i++) {
        struct timespec ts = {0, 5000000};
        nanosleep(&ts, NULL);
    }
}

/* ------------------------------------------------------------------ CUDA_VISIBLE_DEVICES */

static qie_gpu_choice find_gpu(const qie_gpus *g, const char *e, size_t n) {
    static const qie_gpu_choice none = {-1, -1};
    qie_gpu_choice found = none;
    char *end, word[96];
    if (n == 0 || n >= sizeof word)
        return none;
    memcpy(word, e, n);
    word[n] = 0;
    long k = strtol(word, &end, 10);
    if (!*end && k >= 0) {
        for (int i = 0; i < g->n; i++)
            if (g->gpus[i].index == k)
                found.i_gpu = i;
        return found;
    }
    int hits = 0; /* CUDA takes the beginning of a UUID where it is the only one */
    for (int i = 0; i < g->n; i++) {
        if (!strncmp(g->gpus[i].uuid, word, n)) {
            found = (qie_gpu_choice){i, -1};
            hits++;
        }
        for (int m = 0; m < g->gpus[i].n_mig; m++)
            if (!strncmp(g->gpus[i].migs[m].uuid, word, n)) {
                found = (qie_gpu_choice){i, m};
                hits++;
            }
    }
    return hits == 1 ? found : none;
}

int qie_gpus_visible(const qie_gpus *g, const char *value, qie_gpu_choice choices[QIE_GPUS_MAX],
                     int *refused) {
    int n = 0;
    if (refused)
        *refused = -1;
    if (!value) {
        for (n = 0; n < g->n; n++)
            choices[n] = (qie_gpu_choice){n, -1};
        return n;
    }
    for (const char *p = value; *p && n < QIE_GPUS_MAX;) {
        p += strspn(p, " \t");
        size_t len = strcspn(p, ", \t");
        qie_gpu_choice c = find_gpu(g, p, len);
        if (c.i_gpu < 0) {
            if (refused)
                *refused = (int)(p - value);
            break;
        }
        bool seen = false;
        for (int j = 0; j < n; j++)
            seen = seen || (choices[j].i_gpu == c.i_gpu && choices[j].i_mig == c.i_mig);
        if (!seen)
            choices[n++] = c;
        p += len;
        p += strspn(p, ", \t");
    }
    return n;
}
