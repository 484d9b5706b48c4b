/* Attention and convolution by cuDNN where it is installed: libcudnn.so.9 of 9.13 or newer, loaded
 * at run time, so nothing of it is needed to build. Each is used after it has agreed with our own
 * kernel on this card. */
#ifndef QIE_COMPUTE_CUDA_CU_CUDNN_HPP
#define QIE_COMPUTE_CUDA_CU_CUDNN_HPP

#include <stdbool.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_rt.h"

typedef struct cu_cudnn cu_cudnn;

/* For one card. NULL: not installed, too old, or QIE_CUDA_CUDNN=0; QIE_CUDA_CUDNN=FILE names
 * another library. */
cu_cudnn *cu_cudnn_open(void);
void cu_cudnn_close(cu_cudnn *c);
/* Queues the attention. False: not of this kind, or the library cannot; nothing was queued.
 * workspace: QIE_CU_LIBS_WORKSPACE bytes. */
bool cu_cudnn_sdpa(cu_cudnn *c, cu_stream s, const qie_attention_args *a, void *workspace);
/* The same for a convolution in bf16 without upsampling; w as cu_k_conv2d takes it. */
bool cu_cudnn_conv(cu_cudnn *c, cu_stream s, const qie_conv2d_args *a, const void *w,
                   void *workspace);
/* What people should know, each reason once: why it is not used although it is there. NULL:
 * nothing. */
const char *cu_cudnn_note(cu_cudnn *c);

#endif
