/* What /proc and /sys tell of this machine: processor, memory and its limits, processes,
 * containers. Every function takes `root`, "" for the machine itself, so that recorded situations
 * can be replayed. Nothing here needs root or starts a program. */
#ifndef QIE_BASE_MACHINE_H
#define QIE_BASE_MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct qie_process_info {
    bool found;         /* false: ended, or in another process namespace */
    char name[64];      /* /proc/PID/comm */
    char command[512];  /* command line, blanks between, cut */
    char owner[64];     /* user name, else the number */
    char container[80]; /* id of the container (12 digits are enough to find it), "" outside of one
                         */
    char kind[32];      /* what it is known as: "vLLM", "SGLang", "ComfyUI", ...; "" */
} qie_process_info;
void qie_process_read(const char *root, unsigned pid, qie_process_info *out);

typedef struct qie_machine {
    char cpu[128];
    int cores;                /* in the machine */
    int64_t total, available; /* bytes of memory */
    int64_t swap_total, swap_free;
    int64_t limit, limit_used; /* of the container; -1: none */
    int64_t limit_cache;       /* page cache in limit_used, which gives way */
    double cpu_quota;          /* cores that the container may use; 0: no quota */
    int cgroup_version;        /* 1, 2; 0: none */
    int64_t huge_total, huge_free, huge_page_bytes;
    char transparent_huge[16]; /* "always", "madvise", "never" */
    char kernel[80];
} qie_machine;
void qie_machine_read(const char *root, qie_machine *out);
/* Memory that may still be taken: available, cut by the limit. */
int64_t qie_machine_free(const qie_machine *m);

/* Share (0..1) of a file that lies in the page cache, from up to n_samples pages; -1 when it cannot
 * be told. */
double qie_file_cached_share(const char *path, int n_samples);
/* Bytes a second that reading a file from its disk (not the cache) brings, from pieces read in
 * about `seconds`; -1 when the file system does not allow direct reading. */
double qie_file_disk_speed(const char *path, double seconds);

#endif
