/* The dialect of cu_device.hpp on the hardware. */
#ifndef QIE_COMPUTE_CUDA_CU_NATIVE_CUH
#define QIE_COMPUTE_CUDA_CU_NATIVE_CUH

#include <cuda_runtime.h>

#define CU_INLINE __device__ __forceinline__
#define CU_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define CU_RESTRICT __restrict__

/* The stream's handle, its device made current; in cu_rt.cpp. */
extern "C" void *cu_native_stream(cu_stream s);
extern "C" int cu_launched(int code);

/* Queue kernel<<<grid, threads, shared bytes>>>(args). */
#define CU_LAUNCH(stream, kernel, gx, gy, threads, shared, ...)                                   \
    do {                                                                                          \
        cudaStream_t cu_s_ = (cudaStream_t)cu_native_stream(stream);                              \
        if ((shared) > (48u << 10))                                                               \
            cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                 (int)(shared));                                                  \
        kernel<<<dim3((unsigned)(gx), (unsigned)(gy)), (unsigned)(threads), (size_t)(shared),      \
                 cu_s_>>>(__VA_ARGS__);                                                           \
        cu_launched((int)cudaGetLastError());                                                     \
    } while (0)

CU_INLINE int cu_tid() {
    return (int)threadIdx.x;
}
CU_INLINE int cu_n_threads() {
    return (int)blockDim.x;
}
CU_INLINE int64_t cu_bx() {
    return (int64_t)blockIdx.x;
}
CU_INLINE int64_t cu_by() {
    return (int64_t)blockIdx.y;
}
CU_INLINE int64_t cu_gx() {
    return (int64_t)gridDim.x;
}
template <typename T> CU_INLINE T *cu_shared() {
    extern __shared__ __align__(16) unsigned char cu_shared_bytes[];
    return reinterpret_cast<T *>(cu_shared_bytes);
}
CU_INLINE void cu_sync() {
    __syncthreads();
}
CU_INLINE void cu_sync_warp() {
    __syncwarp();
}
CU_INLINE float cu_shfl_xor(float v, int m) {
    return __shfl_xor_sync(0xffffffffu, v, m);
}
CU_INLINE float cu_bits_f32(uint32_t u) {
    return __uint_as_float(u);
}
CU_INLINE uint32_t cu_f32_bits(float f) {
    return __float_as_uint(f);
}
CU_INLINE void cu_atomic_max(unsigned *p, unsigned v) {
    atomicMax(p, v);
}
CU_INLINE void cu_atomic_or(unsigned *p, unsigned v) {
    atomicOr(p, v);
}

/* c [16, 8] += a [16, 16] b [16, 8]: bf16 operands in the fragments of mma.m16n8k16. */
CU_INLINE void cu_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Four 8 x 8 matrices of 16-bit values from shared memory: lane l gives row l % 8 of matrix l / 8. */
CU_INLINE void cu_ldmatrix(uint32_t r[4], const void *row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
CU_INLINE void cu_ldmatrix_trans(uint32_t r[4], const void *row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
/* 16 bytes to shared memory behind the computation; zeros if not `valid`. */
CU_INLINE void cu_copy16(void *dst, const void *src, bool valid) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(dst);
    int n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(src), "r"(n));
}
CU_INLINE void cu_copy_commit() {
    asm volatile("cp.async.commit_group;\n");
}
template <int N> CU_INLINE void cu_copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

#endif
