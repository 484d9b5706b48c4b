/* What a test tells the library that stands in for libcudnn.so.9; found by dlsym under the name
 * `fake_cudnn`. */
#ifndef TESTS_CUDA_FAKE_CUDNN_H
#define TESTS_CUDA_FAKE_CUDNN_H

#include <functional>

typedef enum fake_cudnn_fault {
    FAKE_CUDNN_NONE = 0,
    FAKE_CUDNN_OLD,      /* a version without the operation */
    FAKE_CUDNN_NO_CARD,  /* no handle */
    FAKE_CUDNN_NO_PLAN,  /* no configuration becomes a plan */
    FAKE_CUDNN_NO_SCALE, /* computes as if the scale of attention were 1 */
    FAKE_CUDNN_PADDING,  /* convolves as if what is padded behind were padded before */
    FAKE_CUDNN_NAN,
    FAKE_CUDNN_NO_RUN /* plans do not run */
} fake_cudnn_fault;

typedef struct fake_cudnn_control {
    fake_cudnn_fault fault;
    std::function<void(void *stream, std::function<void()>)> queue;
    /* File of cuDNN itself, or NULL: every descriptor is made there as well, for an H100, and what
     * it refuses is refused. */
    const char *real;
    bool idle; /* plans run without computing */
    int live;  /* descriptors and handles */
    int plans; /* made */
    int runs;
} fake_cudnn_control;

#endif
