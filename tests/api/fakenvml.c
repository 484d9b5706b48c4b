/* A libnvidia-ml that tells what a text file says (FAKE_NVML=FILE), for tests of doctor. Lines:
 *   init CODE | hang SECONDS | crash 1 | driver TEXT | cuda N
 *   gpu NAME|UUID|TOTAL|FREE|USED|MAJOR|MINOR|MEMORY_CODE|MIG     sizes in bytes
 *   proc GPU PID BYTES GRAPHICS          BYTES -1: not told
 *   procrc GPU CODE                      the list of processes fails
 *   mig GPU UUID TOTAL FREE */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

typedef struct fake_gpu {
    char name[96], uuid[96];
    unsigned long long total, free, used;
    int major, minor, memory_code, mig, process_code;
    struct {
        unsigned pid;
        unsigned long long used;
        int graphics;
    } processes[64];
    unsigned n_processes;
    struct fake_mig {
        bool is_mig;
        char uuid[96];
        unsigned long long total, free;
    } migs[8];
    unsigned n_migs;
} fake_gpu;

static fake_gpu gpus[16];
static unsigned n_gpus;
static char driver[80] = "550.54.15";
static int cuda = 12040, init_code;

/* Handles: 1..16 a GPU, 100 + 8 * gpu + i an instance. */
static fake_gpu *gpu_of(void *h) {
    size_t k = (size_t)h;
    return k >= 100 ? NULL : &gpus[k - 1];
}
static struct fake_mig *mig_of(void *h) {
    size_t k = (size_t)h - 100;
    return &gpus[k / 8].migs[k % 8];
}

PUBLIC int nvmlInit_v2(void);
PUBLIC int nvmlInit_v2(void) {
    FILE *f = fopen(getenv("FAKE_NVML"), "re");
    char line[512];
    while (f && fgets(line, sizeof line, f)) {
        unsigned g, pid;
        int a;
        long long x, y;
        char text[96];
        fake_gpu *n = &gpus[n_gpus];
        if (sscanf(line, "init %d", &a) == 1)
            init_code = a;
        else if (sscanf(line, "hang %d", &a) == 1)
            sleep((unsigned)a);
        else if (sscanf(line, "crash %d", &a) == 1)
            abort();
        else if (sscanf(line, "driver %79s", text) == 1)
            snprintf(driver, sizeof driver, "%.79s", text);
        else if (sscanf(line, "cuda %d", &a) == 1)
            cuda = a;
        else if (sscanf(line, "gpu %95[^|]|%95[^|]|%llu|%llu|%llu|%d|%d|%d|%d", n->name, n->uuid,
                        &n->total, &n->free, &n->used, &n->major, &n->minor, &n->memory_code,
                        &n->mig) == 9)
            n_gpus++;
        else if (sscanf(line, "proc %u %u %lld %d", &g, &pid, &x, &a) == 4) {
            fake_gpu *d = &gpus[g];
            d->processes[d->n_processes].pid = pid;
            d->processes[d->n_processes].used = (unsigned long long)x;
            d->processes[d->n_processes++].graphics = a;
        } else if (sscanf(line, "procrc %u %d", &g, &a) == 2)
            gpus[g].process_code = a;
        else if (sscanf(line, "mig %u %95s %lld %lld", &g, text, &x, &y) == 4) {
            struct fake_mig *m = &gpus[g].migs[gpus[g].n_migs++];
            snprintf(m->uuid, sizeof m->uuid, "%.95s", text);
            m->total = (unsigned long long)x;
            m->free = (unsigned long long)y;
        }
    }
    if (f)
        fclose(f);
    return init_code;
}
PUBLIC int nvmlShutdown(void);
PUBLIC int nvmlShutdown(void) {
    return 0;
}
PUBLIC const char *nvmlErrorString(int code);
PUBLIC const char *nvmlErrorString(int code) {
    return code == 18   ? "Driver/library version mismatch"
           : code == 4  ? "Insufficient Permissions"
           : code == 9  ? "Driver Not Loaded"
           : code == 15 ? "GPU is lost"
                        : "Unknown Error";
}
PUBLIC int nvmlSystemGetDriverVersion(char *out, unsigned n);
PUBLIC int nvmlSystemGetDriverVersion(char *out, unsigned n) {
    snprintf(out, n, "%s", driver);
    return 0;
}
PUBLIC int nvmlSystemGetCudaDriverVersion_v2(int *out);
PUBLIC int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    *out = cuda;
    return 0;
}
PUBLIC int nvmlDeviceGetCount_v2(unsigned *out);
PUBLIC int nvmlDeviceGetCount_v2(unsigned *out) {
    *out = n_gpus;
    return 0;
}
PUBLIC int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out);
PUBLIC int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {
    *out = (void *)((size_t)i + 1);
    return i < n_gpus ? 0 : 2;
}
PUBLIC int nvmlDeviceGetName(void *d, char *out, unsigned n);
PUBLIC int nvmlDeviceGetName(void *d, char *out, unsigned n) {
    snprintf(out, n, "%s", gpu_of(d)->name);
    return 0;
}
PUBLIC int nvmlDeviceGetUUID(void *d, char *out, unsigned n);
PUBLIC int nvmlDeviceGetUUID(void *d, char *out, unsigned n) {
    snprintf(out, n, "%s", gpu_of(d) ? gpu_of(d)->uuid : mig_of(d)->uuid);
    return 0;
}
PUBLIC int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *out);
PUBLIC int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *out) {
    fake_gpu *g = gpu_of(d);
    if (g && g->memory_code)
        return g->memory_code;
    out[0] = g ? g->total : mig_of(d)->total;
    out[1] = g ? g->free : mig_of(d)->free;
    out[2] = g ? g->used : out[0] - out[1];
    return 0;
}
PUBLIC int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor);
PUBLIC int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) {
    *major = gpu_of(d)->major;
    *minor = gpu_of(d)->minor;
    return 0;
}
PUBLIC int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *pending);
PUBLIC int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *pending) {
    *now = *pending = gpu_of(d)->mig == 1;
    return gpu_of(d)->mig == 2 ? 3 : 0; /* 2: a card that knows no MIG */
}
PUBLIC int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned i, void **out);
PUBLIC int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned i, void **out) {
    size_t k = (size_t)d - 1;
    *out = (void *)(100 + 8 * k + i);
    return i < gpus[k].n_migs ? 0 : 6;
}

typedef struct record {
    unsigned pid;
    unsigned long long used;
    unsigned gi, ci;
} record;

static int processes(void *d, unsigned *n, record *out, int graphics) {
    fake_gpu *g = gpu_of(d);
    unsigned k = 0;
    if (g->process_code)
        return g->process_code;
    for (unsigned i = 0; i < g->n_processes; i++)
        if (g->processes[i].graphics == graphics && k < *n)
            out[k++] = (record){g->processes[i].pid, g->processes[i].used, ~0u, ~0u};
    *n = k;
    return 0;
}
PUBLIC int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, record *out);
PUBLIC int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, record *out) {
    return processes(d, n, out, 0);
}
PUBLIC int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *n, record *out);
PUBLIC int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *n, record *out) {
    return processes(d, n, out, 1);
}

/* A machine that is too busy to load the library at once: FAKE_NVML_LATE=SECONDS. */
__attribute__((constructor)) static void load_late(void) {
    const char *s = getenv("FAKE_NVML_LATE");
    if (s)
        sleep((unsigned)atoi(s));
}
