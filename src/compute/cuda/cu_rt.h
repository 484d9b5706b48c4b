/* The part of the CUDA runtime that the plugin uses, under names of our own.
 *
 * cu_rt.cpp answers with the real runtime; tests/cuda/double.cpp answers on the CPU, with streams
 * whose work runs in any order that events allow. Everything above is the same code in both.
 * Streams run their work in order; between streams only events make an order. All functions return
 * CU_OK or an error; after CU_LOST or CU_FAILED the device is of no use any more. */
#ifndef QIE_COMPUTE_CUDA_CU_RT_H
#define QIE_COMPUTE_CUDA_CU_RT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CU_OK = 0, CU_OOM, CU_LOST, CU_ARCH, CU_DRIVER, CU_FAILED };

typedef struct cu_stream_s *cu_stream;
typedef struct cu_event_s *cu_event;
typedef struct cu_graph_s *cu_graph;

typedef struct cu_device_info {
    char uuid[48]; /* "GPU-..." */
    char name[96];
    size_t total; /* bytes */
    int cc_major, cc_minor;
    int n_sm;
} cu_device_info;

int cu_count(int *n);
int cu_info(int device, cu_device_info *out);
/* Bytes now. Makes the process known to the card, which costs some of its memory: ask only for
 * cards that are used. */
int cu_memory(int device, size_t *free, size_t *total);
int cu_malloc(int device, size_t n, void **out);
int cu_free(int device, void *p);
/* Host memory that copies may read and write while the host goes on. */
int cu_host_alloc(size_t n, void **out);
int cu_host_free(void *p);

int cu_stream_create(int device, cu_stream *out);
void cu_stream_destroy(cu_stream s);
int cu_stream_device(cu_stream s);
int cu_stream_sync(cu_stream s);
int cu_event_create(int device, cu_event *out);
void cu_event_destroy(cu_event e);
/* The event stands for everything queued on s before. */
int cu_event_record(cu_event e, cu_stream s);
/* Work queued on s from now on runs after what the event's last record stands for. */
int cu_stream_wait(cu_stream s, cu_event e);
int cu_event_sync(cu_event e);

/* Host ends of both must be memory of cu_host_alloc. */
int cu_copy_in(cu_stream s, void *dst, const void *src, size_t n);
int cu_copy_out(cu_stream s, void *dst, const void *src, size_t n);
/* Queued on a stream of the source's device. */
int cu_copy_peer(cu_stream s, int dst_device, void *dst, const void *src, size_t n);
/* Within the stream's device. */
int cu_copy(cu_stream s, void *dst, const void *src, size_t n);
int cu_zero(cu_stream s, void *dst, size_t n);

/* Between these two, what is queued on s, and on streams that wait for events of it, is noted and
 * not run; at the end all of them have to be waited for by s. Waiting for any of this in between is
 * an error. After a failure nothing was queued, and the streams are as before. */
int cu_capture_begin(cu_stream s);
int cu_capture_end(cu_stream s, cu_graph *out);
/* Queue all of it on s, with the addresses that were noted. */
int cu_graph_launch(cu_graph g, cu_stream s);
void cu_graph_destroy(cu_graph g);

/* What the last failure of this process was, in the runtime's words. */
const char *cu_text(void);
/* Note a failure found elsewhere (a library call, a launch). */
int cu_fail(int code, const char *text);

#ifdef __cplusplus
}
#endif
#endif
