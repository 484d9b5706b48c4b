/* compute/cuda/cu_rt.h on the real CUDA runtime. */
#include "compute/cuda/cu_rt.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compute/cuda/cu_causes.hpp"

struct cu_stream_s {
    int device;
    cudaStream_t s;
};
struct cu_event_s {
    int device;
    cudaEvent_t e;
};

static char text[256];

const char *cu_text(void) {
    return text;
}

int cu_fail(int code, const char *what) {
    snprintf(text, sizeof text, "%s", what);
    return code;
}

#define SAME(cuda, number, ours, what) static_assert(cudaError##cuda == (number), "cu_causes.hpp");
CU_CAUSES(SAME)
#undef SAME

static int answer(cudaError_t e) {
    if (e == cudaSuccess)
        return CU_OK;
    int code = cu_explain(e, cudaGetErrorName(e), cudaGetErrorString(e), text, sizeof text);
    cudaGetLastError(); /* errors that are not sticky end here */
    return code;
}

static int on(int device) {
    return answer(cudaSetDevice(device));
}

extern "C" void *cu_native_stream(cu_stream s) {
    cudaSetDevice(s->device);
    return s->s;
}

extern "C" int cu_launched(int e);

/* Launches report through the next call that asks, of the same device: the message names it. */
static int pending, pending_device;
int cu_launched(int e) {
    if (e != cudaSuccess && !pending && cudaGetDevice(&pending_device) == cudaSuccess)
        pending = answer((cudaError_t)e);
    return pending;
}
static int launched_or(int device, int rc) {
    return rc == CU_OK && device == pending_device ? pending : rc;
}

int cu_count(int *n) {
    int driver = 0;
    *n = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess)
        driver = 0;
    if (int rc = cu_explain_driver(driver, text, sizeof text))
        return rc;
    return answer(cudaGetDeviceCount(n));
}

int cu_info(int device, cu_device_info *out) {
    cudaDeviceProp p;
    memset(out, 0, sizeof *out);
    int rc = answer(cudaGetDeviceProperties(&p, device));
    if (rc != CU_OK)
        return rc;
    const unsigned char *u = (const unsigned char *)p.uuid.bytes;
    snprintf(out->uuid, sizeof out->uuid,
             "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
             u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14],
             u[15]);
    snprintf(out->name, sizeof out->name, "%.95s", p.name);
    out->total = p.totalGlobalMem;
    out->cc_major = p.major;
    out->cc_minor = p.minor;
    out->n_sm = p.multiProcessorCount;
    return CU_OK;
}

int cu_memory(int device, size_t *free, size_t *total) {
    int rc = on(device);
    return rc == CU_OK ? answer(cudaMemGetInfo(free, total)) : rc;
}

int cu_malloc(int device, size_t n, void **out) {
    *out = NULL;
    int rc = on(device);
    return rc == CU_OK ? answer(cudaMalloc(out, n ? n : 1)) : rc;
}

int cu_free(int device, void *p) {
    if (!p)
        return CU_OK;
    int rc = on(device);
    return rc == CU_OK ? answer(cudaFree(p)) : rc;
}

int cu_host_alloc(size_t n, void **out) {
    *out = NULL;
    return answer(cudaHostAlloc(out, n, cudaHostAllocPortable));
}

int cu_host_free(void *p) {
    return p ? answer(cudaFreeHost(p)) : CU_OK;
}

int cu_stream_create(int device, cu_stream *out) {
    *out = NULL;
    int rc = on(device);
    if (rc != CU_OK)
        return rc;
    cu_stream s = (cu_stream)calloc(1, sizeof *s);
    if (!s)
        return cu_fail(CU_OOM, "out of host memory");
    s->device = device;
    rc = answer(cudaStreamCreateWithFlags(&s->s, cudaStreamNonBlocking));
    if (rc != CU_OK)
        free(s);
    else
        *out = s;
    return rc;
}

void cu_stream_destroy(cu_stream s) {
    if (!s)
        return;
    if (on(s->device) == CU_OK)
        cudaStreamDestroy(s->s);
    free(s);
}

int cu_stream_device(cu_stream s) {
    return s->device;
}

int cu_stream_sync(cu_stream s) {
    int rc = on(s->device);
    return launched_or(s->device, rc == CU_OK ? answer(cudaStreamSynchronize(s->s)) : rc);
}

int cu_event_create(int device, cu_event *out) {
    *out = NULL;
    int rc = on(device);
    if (rc != CU_OK)
        return rc;
    cu_event e = (cu_event)calloc(1, sizeof *e);
    if (!e)
        return cu_fail(CU_OOM, "out of host memory");
    e->device = device;
    rc = answer(cudaEventCreateWithFlags(&e->e, cudaEventDisableTiming));
    if (rc != CU_OK)
        free(e);
    else
        *out = e;
    return rc;
}

void cu_event_destroy(cu_event e) {
    if (!e)
        return;
    if (on(e->device) == CU_OK)
        cudaEventDestroy(e->e);
    free(e);
}

int cu_event_record(cu_event e, cu_stream s) {
    int rc = on(s->device);
    return launched_or(s->device, rc == CU_OK ? answer(cudaEventRecord(e->e, s->s)) : rc);
}

int cu_stream_wait(cu_stream s, cu_event e) {
    int rc = on(s->device);
    return rc == CU_OK ? answer(cudaStreamWaitEvent(s->s, e->e, 0)) : rc;
}

int cu_event_sync(cu_event e) {
    return launched_or(e->device, answer(cudaEventSynchronize(e->e)));
}

int cu_copy_in(cu_stream s, void *dst, const void *src, size_t n) {
    int rc = on(s->device);
    return rc == CU_OK ? answer(cudaMemcpyAsync(dst, src, n, cudaMemcpyHostToDevice, s->s)) : rc;
}

int cu_copy_out(cu_stream s, void *dst, const void *src, size_t n) {
    int rc = on(s->device);
    return rc == CU_OK ? answer(cudaMemcpyAsync(dst, src, n, cudaMemcpyDeviceToHost, s->s)) : rc;
}

/* Straight from card to card where the bus allows it, asked once for each pair; else the runtime
 * takes the way through the host, in the same call. */
static void enable_peer(int from, int to) {
    enum { MOST = 16 };
    static bool tried[MOST][MOST];
    int can = 0;
    if (from < 0 || to < 0 || from >= MOST || to >= MOST || from == to || tried[from][to])
        return;
    tried[from][to] = true;
    if (cudaDeviceCanAccessPeer(&can, from, to) == cudaSuccess && can)
        cudaDeviceEnablePeerAccess(to, 0); /* of the current device, which is `from` */
    cudaGetLastError();
}

int cu_copy_peer(cu_stream s, int dst_device, void *dst, const void *src, size_t n) {
    int rc = on(s->device);
    if (rc == CU_OK)
        enable_peer(s->device, dst_device);
    return rc == CU_OK ? answer(cudaMemcpyPeerAsync(dst, dst_device, src, s->device, n, s->s)) : rc;
}

int cu_copy(cu_stream s, void *dst, const void *src, size_t n) {
    int rc = on(s->device);
    return rc == CU_OK ? answer(cudaMemcpyAsync(dst, src, n, cudaMemcpyDeviceToDevice, s->s)) : rc;
}

int cu_zero(cu_stream s, void *dst, size_t n) {
    int rc = on(s->device);
    return rc == CU_OK ? answer(cudaMemsetAsync(dst, 0, n, s->s)) : rc;
}

struct cu_graph_s {
    int device;
    cudaGraphExec_t g;
};

/* Relaxed: libraries may load kernels and take memory in the meantime. */
int cu_capture_begin(cu_stream s) {
    int rc = on(s->device);
    rc = launched_or(s->device, rc);
    return rc == CU_OK ? answer(cudaStreamBeginCapture(s->s, cudaStreamCaptureModeRelaxed)) : rc;
}

int cu_capture_end(cu_stream s, cu_graph *out) {
    cudaGraph_t graph = NULL;
    *out = NULL;
    int rc = on(s->device);
    if (rc == CU_OK)
        rc = launched_or(s->device, answer(cudaStreamEndCapture(s->s, &graph)));
    pending = CU_OK; /* launches that were only to be noted */
    cu_graph g = rc == CU_OK ? (cu_graph)calloc(1, sizeof *g) : NULL;
    if (rc == CU_OK && !g)
        rc = cu_fail(CU_OOM, "out of host memory");
    if (rc == CU_OK) {
        g->device = s->device;
        rc = answer(cudaGraphInstantiate(&g->g, graph, 0));
    }
    if (graph)
        cudaGraphDestroy(graph);
    if (rc != CU_OK) {
        free(g);
        g = NULL;
    }
    *out = g;
    return rc;
}

int cu_graph_launch(cu_graph g, cu_stream s) {
    int rc = on(s->device);
    return launched_or(s->device, rc == CU_OK ? answer(cudaGraphLaunch(g->g, s->s)) : rc);
}

/* One that is running is given back when it has ended. */
void cu_graph_destroy(cu_graph g) {
    if (!g)
        return;
    if (on(g->device) == CU_OK)
        cudaGraphExecDestroy(g->g);
    free(g);
}
