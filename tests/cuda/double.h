/* The double of the CUDA runtime: how a test sets it up and what it tells. Exported by
 * qie_cuda_double.so, which also reads QIE_CUDA_DOUBLE ("devices=2,memory=64,seed=3": memory in
 * MiB, one number or one a device with ':' between), and at its end writes into the file that
 * QIE_CUDA_DOUBLE_REPORT names how many calls made an order, and from how many places. */
#ifndef TESTS_CUDA_DOUBLE_H
#define TESTS_CUDA_DOUBLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CU_DOUBLE_DEVICES 8
#define CU_DOUBLE_POLICIES 6
#define CU_DOUBLE_SITES 64

typedef struct cu_double_options {
    int n_devices;
    size_t memory[CU_DOUBLE_DEVICES]; /* bytes */
    int cc_major, cc_minor;
    int driver; /* as CUDA counts versions; 0: none */
    /* What fail_call fails with and a lost device says, as the runtime numbers its errors; 0: words
     * of our own. */
    int error;
    /* Of the order of work; its remainder by CU_DOUBLE_POLICIES chooses who is in a hurry:
     * 0 nobody: work runs when somebody waits for it; 1 every second stream (of this program: the
     * copies) runs at once, the others late; 2 the other way round; 3 streams drawn by lot; 4 work
     * drawn by lot; 5 one stream for long, while others starve. */
    uint64_t seed;
    int64_t fail_alloc; /* the N-th device allocation fails for want of memory, 1 based; 0: none */
    int64_t fail_host;  /* the same for pinned host memory */
    int64_t fail_call;  /* the N-th call of all fails; a launch's failure shows at the next call */
    int64_t lose_at;    /* the device is lost when the N-th piece of work runs */
    /* Forgotten: the N-th call that makes an order (an event recorded, waited for by a stream or by
     * the host, a stream waited for), or all such calls from the N-th place in the program. */
    int64_t drop, drop_site;
    /* May be NULL: asked in the middle of the run at each of them whether it is to be forgotten, at
     * each call whether it fails, at each piece of work whether its device is lost. A fork says yes
     * in the child and goes on, so that what comes before is computed once. */
    bool (*leave_out)(int64_t n), (*fail_here)(int64_t n), (*lose_here)(int64_t n);
    /* With drop or leave_out: from then on, what the forgotten call held back is in a hurry, and
     * what it waited for runs as late as may be; until then all work is late. */
    bool aim;
    int64_t fail_capture; /* the N-th end of a capture fails, as for want of memory */
} cu_double_options;

typedef struct cu_double_stats {
    int64_t allocs, host_allocs, works, orders, sites, copies_in_bytes, copies_peer_bytes;
    int64_t calls, graphs, graph_launches;
    size_t live[CU_DOUBLE_DEVICES], peak[CU_DOUBLE_DEVICES], host_live;
    int64_t works_of[CU_DOUBLE_DEVICES];
    size_t site_at[CU_DOUBLE_SITES]; /* address of the place within the object, for addr2line */
} cu_double_stats;

/* What a call that makes an order is worth, numbered as `drop` counts. */
typedef struct cu_double_order {
    size_t site_at; /* as in cu_double_stats */
    /* The other calls make the same order without it, whatever runs when: a wait for what the
     * waiting side comes behind anyway, a record that only such waits use. */
    bool implied;
} cu_double_order;
__attribute__((visibility("default"))) cu_double_order cu_double_order_get(int64_t n);

/* Forgets everything of before; nothing may be live. */
__attribute__((visibility("default"))) void cu_double_configure(const cu_double_options *o);
__attribute__((visibility("default"))) cu_double_options cu_double_options_default(void);
__attribute__((visibility("default"))) cu_double_stats cu_double_stats_get(void);

#ifdef __cplusplus
}
#include <functional>

#include "compute/cuda/cu_rt.h"
/* Queue work of the libraries' double; the ranges are checked to be live memory of the device. */
struct cu_double_range {
    const void *data;
    size_t n;
};
void cu_double_queue(cu_stream s, std::function<void()> work, const cu_double_range *ranges,
                     int n_ranges);
#endif
#endif
