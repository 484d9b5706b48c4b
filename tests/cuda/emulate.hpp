/* The dialect of compute/cuda/cu_device.hpppp on the CPU: every thread of a block is a fiber,
 * barriers and shuffles switch between them. One block after the other, on the calling thread. A
 * barrier that not all threads reach ends the program with a message: on the hardware it would
 * hang. */
#ifndef TESTS_CUDA_EMULATE_H
#define TESTS_CUDA_EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "compute/cuda/cu_rt.h"

#define CU_INLINE inline
#define CU_KERNEL(threads) static void
#define CU_RESTRICT

typedef struct cu_emu_thread {
    int tid, n;
    int64_t bx, by, gx;
    unsigned char *shared;
} cu_emu_thread;
extern cu_emu_thread *cu_emu_me;

/* Runs now. */
void cu_emu_run(int64_t gx, int64_t gy, int threads, size_t shared,
                const std::function<void()> &body);
/* Queues it on the stream of the double. */
void cu_emu_launch(cu_stream s, int64_t gx, int64_t gy, int threads, size_t shared,
                   std::function<void()> body);
void cu_emu_barrier(void);      /* of the block */
void cu_emu_warp_barrier(void); /* of the 32 threads around */
/* Memory that the 32 lanes exchange values through; alternates between two halves. */
unsigned char *cu_emu_exchange(void);
void cu_emu_exchange_done(void);

#define CU_LAUNCH(stream, kernel, gx, gy, threads, shared, ...)                           \
    cu_emu_launch(stream, (int64_t)(gx), (int64_t)(gy), (int)(threads), (size_t)(shared), \
                  [=]() { kernel(__VA_ARGS__); })

inline int cu_tid() {
    return cu_emu_me->tid;
}
inline int cu_n_threads() {
    return cu_emu_me->n;
}
inline int64_t cu_bx() {
    return cu_emu_me->bx;
}
inline int64_t cu_by() {
    return cu_emu_me->by;
}
inline int64_t cu_gx() {
    return cu_emu_me->gx;
}
template <typename T> inline T *cu_shared() {
    return reinterpret_cast<T *>(cu_emu_me->shared);
}
inline void cu_sync() {
    cu_emu_barrier();
}
inline void cu_sync_warp() {
    cu_emu_warp_barrier();
}
inline float cu_bits_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint32_t cu_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
inline float cu_shfl_xor(float v, int m) {
    int lane = cu_tid() & 31;
    float *x = reinterpret_cast<float *>(cu_emu_exchange());
    x[lane] = v;
    cu_emu_warp_barrier();
    float r = x[lane ^ m];
    cu_emu_exchange_done();
    return r;
}
inline void cu_atomic_max(unsigned *p, unsigned v) {
    *p = *p > v ? *p : v;
}
inline void cu_atomic_or(unsigned *p, unsigned v) {
    *p |= v;
}

/* Fragments of mma.m16n8k16: PTX ISA, "Matrix Fragments for mma.m16n8k16". */
inline void cu_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    int lane = cu_tid() & 31, g = lane >> 2, t = lane & 3;
    uint32_t *x = reinterpret_cast<uint32_t *>(cu_emu_exchange());
    memcpy(x + lane * 6, a, 16);
    memcpy(x + lane * 6 + 4, b, 8);
    cu_emu_warp_barrier();
    for (int i = 0; i < 4; i++) {
        int row = g + (i >> 1) * 8, col = 2 * t + (i & 1);
        float sum = c[i];
        for (int k = 0; k < 16; k++) {
            /* element (row, k) of A: lane row%8 * 4 + (k%8)/2, register (row/8) + 2 (k/8) */
            uint32_t ra = x[((row & 7) * 4 + (k & 7) / 2) * 6 + (row >> 3) + 2 * (k >> 3)];
            uint32_t rb = x[(col * 4 + (k & 7) / 2) * 6 + 4 + (k >> 3)];
            sum += cu_bits_f32(k & 1 ? ra & 0xffff0000u : ra << 16) *
                   cu_bits_f32(k & 1 ? rb & 0xffff0000u : rb << 16);
        }
        c[i] = sum;
    }
    cu_emu_exchange_done();
}
inline void cu_emu_ldmatrix(uint32_t r[4], const void *row, bool trans) {
    int lane = cu_tid() & 31;
    const uint16_t **x = reinterpret_cast<const uint16_t **>(cu_emu_exchange());
    x[lane] = static_cast<const uint16_t *>(row);
    cu_emu_warp_barrier();
    for (int i = 0; i < 4; i++) {
        int a = lane / 4, b = 2 * (lane % 4);
        uint32_t lo = trans ? x[i * 8 + b][a] : x[i * 8 + a][b];
        uint32_t hi = trans ? x[i * 8 + b + 1][a] : x[i * 8 + a][b + 1];
        r[i] = lo | hi << 16;
    }
    cu_emu_warp_barrier(); /* rows may be written again only when all lanes have read */
    cu_emu_exchange_done();
}
inline void cu_ldmatrix(uint32_t r[4], const void *row) {
    cu_emu_ldmatrix(r, row, false);
}
inline void cu_ldmatrix_trans(uint32_t r[4], const void *row) {
    cu_emu_ldmatrix(r, row, true);
}
inline void cu_copy16(void *dst, const void *src, bool valid) {
    if (valid)
        memcpy(dst, src, 16);
    else
        memset(dst, 0, 16);
}
inline void cu_copy_commit() {
}
template <int N> inline void cu_copy_wait() {
}

#endif
