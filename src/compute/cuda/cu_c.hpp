/* The C headers of the layers below, for the C++ files of this folder. */
#ifndef QIE_COMPUTE_CUDA_CU_C_HPP
#define QIE_COMPUTE_CUDA_CU_C_HPP

extern "C" {
#include "base/dtype.h"
#include "base/error.h"
#include "compute/backend.h"
#include "compute/plugin.h"
#include "plan/assign.h"
}

#endif
