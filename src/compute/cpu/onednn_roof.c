#include "compute/cpu/onednn_roof.h"

#include <omp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <oneapi/dnnl/dnnl.h>

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct roof {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_desc_t pd;
    dnnl_primitive_t primitive;
    dnnl_memory_t memory[3]; /* source, weights, destination */
    void *data[3];
} roof;

static bool make_memory(roof *r, int i, dnnl_query_t what) {
    const dnnl_memory_desc_t *md = dnnl_primitive_desc_query_md(r->pd, what, 0);
    size_t bytes = dnnl_memory_desc_get_size(md);
    r->data[i] = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!r->data[i])
        return false;
    /* 0x3c: small normal numbers in both types. */
    memset(r->data[i], 0x3c, bytes);
    return dnnl_memory_create(&r->memory[i], md, r->engine, r->data[i]) == dnnl_success;
}

static int run(roof *r, const_dnnl_op_desc_t op, int n_threads, int repeats,
               double (*clock_s)(void), double *fastest, double *median) {
    int status = -1, before = omp_get_max_threads();
    double *times = malloc((size_t)repeats * sizeof *times);
    omp_set_num_threads(n_threads);
    if (times && dnnl_primitive_desc_create(&r->pd, op, NULL, r->engine, NULL) == dnnl_success &&
        dnnl_primitive_create(&r->primitive, r->pd) == dnnl_success &&
        make_memory(r, 0, dnnl_query_src_md) && make_memory(r, 1, dnnl_query_weights_md) &&
        make_memory(r, 2, dnnl_query_dst_md)) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, r->memory[0]},
                                  {DNNL_ARG_WEIGHTS, r->memory[1]},
                                  {DNNL_ARG_DST, r->memory[2]}};
        status = 0;
        for (int i = -1; i < repeats; i++) { /* the first one warms up */
            double start = clock_s();
            if (dnnl_primitive_execute(r->primitive, r->stream, 3, args) != dnnl_success ||
                dnnl_stream_wait(r->stream) != dnnl_success)
                status = -1;
            if (i >= 0)
                times[i] = clock_s() - start;
        }
        qsort(times, (size_t)repeats, sizeof *times, compare);
        *fastest = times[0];
        *median = times[repeats / 2];
    }
    omp_set_num_threads(before);
    for (int i = 0; i < 3; i++) {
        if (r->memory[i])
            dnnl_memory_destroy(r->memory[i]);
        free(r->data[i]);
    }
    if (r->primitive)
        dnnl_primitive_destroy(r->primitive);
    if (r->pd)
        dnnl_primitive_desc_destroy(r->pd);
    if (r->stream)
        dnnl_stream_destroy(r->stream);
    if (r->engine)
        dnnl_engine_destroy(r->engine);
    free(times);
    return status;
}

static bool start(roof *r) {
    memset(r, 0, sizeof *r);
    return dnnl_engine_create(&r->engine, dnnl_cpu, 0) == dnnl_success &&
           dnnl_stream_create(&r->stream, r->engine, dnnl_stream_default_flags) == dnnl_success;
}

int qie_onednn_time_matmul(qie_dtype dtype, int64_t m, int64_t n, int64_t k, int n_threads,
                           int repeats, double (*clock_s)(void), double *fastest, double *median) {
    dnnl_data_type_t t = dtype == QIE_BF16 ? dnnl_bf16 : dnnl_f32;
    dnnl_dims_t src_dims = {m, k}, weight_dims = {k, n}, dst_dims = {m, n};
    dnnl_memory_desc_t src, weights, dst;
    dnnl_matmul_desc_t op;
    roof r;
    dnnl_memory_desc_init_by_tag(&src, 2, src_dims, t, dnnl_ab);
    dnnl_memory_desc_init_by_tag(&weights, 2, weight_dims, t, dnnl_format_tag_any);
    dnnl_memory_desc_init_by_tag(&dst, 2, dst_dims, t, dnnl_ab);
    if (!start(&r) || dnnl_matmul_desc_init(&op, &src, &weights, NULL, &dst) != dnnl_success)
        return -1;
    return run(&r, &op, n_threads, repeats, clock_s, fastest, median);
}

int qie_onednn_time_conv(qie_dtype dtype, int h, int w, int in, int out, int kernel, int stride,
                         int n_threads, int repeats, double (*clock_s)(void), double *fastest,
                         double *median) {
    dnnl_data_type_t t = dtype == QIE_BF16 ? dnnl_bf16 : dnnl_f32;
    int pad = stride == 1 ? kernel / 2 : 0, ho = h / stride, wo = w / stride;
    dnnl_dims_t src_dims = {1, in, h, w}, weight_dims = {out, in, kernel, kernel},
                dst_dims = {1, out, ho, wo};
    dnnl_dims_t strides = {stride, stride}, before = {pad, pad};
    dnnl_dims_t after = {(ho - 1) * stride + kernel - h - pad,
                         (wo - 1) * stride + kernel - w - pad};
    dnnl_memory_desc_t src, weights, dst;
    dnnl_convolution_desc_t op;
    roof r;
    dnnl_memory_desc_init_by_tag(&src, 4, src_dims, t, dnnl_nhwc);
    dnnl_memory_desc_init_by_tag(&weights, 4, weight_dims, t, dnnl_format_tag_any);
    dnnl_memory_desc_init_by_tag(&dst, 4, dst_dims, t, dnnl_nhwc);
    if (!start(&r) || dnnl_convolution_forward_desc_init(
                          &op, dnnl_forward_inference, dnnl_convolution_direct, &src, &weights,
                          NULL, &dst, strides, before, after) != dnnl_success)
        return -1;
    return run(&r, &op, n_threads, repeats, clock_s, fastest, median);
}
