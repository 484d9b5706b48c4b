/* What the CUDA runtime's errors mean for an operator. Shared by cu_rt.cpp, which holds the numbers
 * against the runtime's own, and by its double, so that the words are tested without a card. */
#ifndef QIE_COMPUTE_CUDA_CU_CAUSES_HPP
#define QIE_COMPUTE_CUDA_CU_CAUSES_HPP

#include <stdio.h>

#include "compute/cuda/cu_rt.h"

/* CUDA 12.8 is the oldest toolkit that builds this; its libraries need driver 570. */
#define CU_LEAST_DRIVER 12080

/* X(cudaError..., number, our code, hint): with what the kernel log shows for it. */
#define CU_CAUSES(X)                                                                             \
    X(MemoryAllocation, 2, CU_OOM, "")                                                           \
    X(StubLibrary, 34, CU_DRIVER, ": libcuda.so.1 is a stub")                                    \
    X(InsufficientDriver, 35, CU_DRIVER, ": install driver 570 or newer")                        \
    X(DevicesUnavailable, 46, CU_LOST, ": in use exclusively by another process, or lost")       \
    X(NoDevice, 100, CU_DRIVER, "")                                                              \
    X(NoKernelImageForDevice, 209, CU_ARCH,                                                      \
      ": this GPU is of a generation that the kernels are not built for (QIE_CUDA_ARCHS)")       \
    X(ECCUncorrectable, 214, CU_LOST, " (ECC error, Xid 48): the card needs a reset")            \
    X(InvalidPtx, 218, CU_ARCH, ": the kernels cannot be compiled for this GPU")                 \
    X(UnsupportedPtxVersion, 222, CU_DRIVER, ": the driver is too old for this build")           \
    X(Contained, 226, CU_LOST, " (contained ECC error, Xid 94)")                                 \
    X(IllegalAddress, 700, CU_FAILED, " (Xid 31): a fault of this program or of the card")       \
    X(LaunchTimeout, 702, CU_FAILED, ": the card also drives a screen")                          \
    X(HardwareStackError, 714, CU_LOST, " (Xid 13)")                                             \
    X(LaunchFailure, 719, CU_FAILED, " (Xid 13): see dmesg")                                     \
    X(SystemNotReady, 802, CU_LOST, ": is nvidia-fabricmanager running?")                        \
    X(SystemDriverMismatch, 803, CU_DRIVER, ": driver library and kernel module differ, reboot") \
    X(CompatNotSupportedOnDevice, 804, CU_DRIVER, "")                                            \
    X(MpsServerNotReady, 807, CU_LOST, ": the MPS server is restarting")

/* Our code of a runtime's error, and the line for people. */
static inline int cu_explain(int error, const char *name, const char *words, char *out,
                             size_t cap) {
    int code = CU_FAILED;
    const char *hint = "";
    switch (error) {
#define CU_CAUSE(cuda, number, ours, what) \
    case number:                           \
        code = ours;                       \
        hint = what;                       \
        break;
        CU_CAUSES(CU_CAUSE)
#undef CU_CAUSE
    default: break;
    }
    snprintf(out, cap, "%s: %s%s", name, words, hint);
    return code;
}

/* Is this driver (0: there is none) good enough? Its version as CUDA counts. */
static inline int cu_explain_driver(int driver, char *out, size_t cap) {
    if (!driver)
        snprintf(out, cap, "no NVIDIA driver is loaded");
    else if (driver < CU_LEAST_DRIVER)
        snprintf(
            out, cap, "the driver speaks CUDA %d.%d, %d.%d is needed: install driver 570 or newer",
            driver / 1000, driver % 1000 / 10, CU_LEAST_DRIVER / 1000, CU_LEAST_DRIVER % 1000 / 10);
    else
        return CU_OK;
    return CU_DRIVER;
}

#endif
