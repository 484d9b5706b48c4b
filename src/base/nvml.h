/* The GPUs of this machine as the NVIDIA driver tells them, through libnvidia-ml loaded at run
 * time: no build dependency, and a machine without a driver is an answer, not an error.
 *
 * The question is asked in a child process with a deadline, because a sick driver can hang its
 * callers. Plain data: copy freely. QIE_NVML names another library (tests). */
#ifndef QIE_BASE_NVML_H
#define QIE_BASE_NVML_H

#include <stdbool.h>
#include <stdint.h>

#define QIE_GPUS_MAX 32
#define QIE_GPU_PROCESSES_MAX 64
#define QIE_MIG_MAX 8

typedef enum qie_gpus_state {
    QIE_GPUS_OK = 0,
    QIE_GPUS_NO_DRIVER,  /* no libnvidia-ml: no NVIDIA driver, or a container without it */
    QIE_GPUS_NOT_LOADED, /* the library is there, the kernel module is not */
    QIE_GPUS_MISMATCH,   /* library and kernel module of different versions: a reboot is due */
    QIE_GPUS_NO_PERMISSION,
    QIE_GPUS_LOST, /* a GPU has fallen off the bus */
    QIE_GPUS_HUNG, /* no answer in time */
    QIE_GPUS_ERROR /* anything else */
} qie_gpus_state;

typedef struct qie_gpu_process {
    unsigned pid;
    int64_t used_bytes; /* -1: the driver does not tell */
    bool graphics;
} qie_gpu_process;

typedef struct qie_mig {
    char uuid[96];
    int64_t total, free; /* -1: not told */
} qie_mig;

typedef struct qie_gpu {
    int index; /* physical: the driver's order, by bus */
    char name[96], uuid[96], bus[32];
    int64_t total, free, used; /* bytes; -1: not told */
    int cc_major, cc_minor;    /* compute capability; 0: not told */
    bool mig;                  /* divided into instances: only these can be used */
    int n_mig;
    qie_mig migs[QIE_MIG_MAX];
    int n_processes;
    qie_gpu_process processes[QIE_GPU_PROCESSES_MAX];
    int code;       /* NVML's, why the memory is not told; 0: it is */
    char error[96]; /* the driver's words for it; "" */
} qie_gpu;

#define QIE_NVML_CRASHED (-1) /* the library did, when it was asked */
#define QIE_NVML_TOO_OLD (-2) /* it lacks functions of every driver since 2018 */

typedef struct qie_gpus {
    qie_gpus_state state;
    int code;         /* NVML's, or QIE_NVML_CRASHED, QIE_NVML_TOO_OLD; 0: none */
    char detail[256]; /* the driver's words for it; "" when OK */
    char driver[80];  /* "550.54.15" */
    int cuda_version; /* 12040 for 12.4; 0: not told */
    int n;
    qie_gpu gpus[QIE_GPUS_MAX];
} qie_gpus;

/* Takes at most timeout_ms from when the driver is asked, which a busy machine does late. */
void qie_gpus_probe(int timeout_ms, qie_gpus *out);

/* One entry of CUDA_VISIBLE_DEVICES: a card, or one MIG instance of it. */
typedef struct qie_gpu_choice {
    int i_gpu; /* position in gpus */
    int i_mig; /* position in its migs; -1: the card, or of its instances the driver's first */
} qie_gpu_choice;

/* What a value of CUDA_VISIBLE_DEVICES (NULL: not set) leaves, in its order. *refused (may be
 * NULL): where CUDA stops reading because an entry names no GPU, as an index into value, else -1;
 * "-1" in the first place is such an entry, and the usual way to hide all. Returns how many. */
int qie_gpus_visible(const qie_gpus *g, const char *value, qie_gpu_choice choices[QIE_GPUS_MAX],
                     int *refused);

#endif
