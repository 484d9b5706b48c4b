/* The eight tile registers of AMX, each 16 rows of 64 bytes, as far as the kernels use them.
 *
 * All tiles are configured to their full size once a task (qie_tiles_begin), so that no kernel
 * depends on a shape that another one set; shorter operands are padded by the caller. Tile numbers
 * are literals. The instructions are written out because GCC 12's intrinsics for loads do not tell
 * the compiler that memory is read, so that stores could move behind them.
 *
 * With QIE_EMULATE_TILES the same names are plain C: tests run the kernels on any machine. */
#ifndef QIE_COMPUTE_CPU_X86_AMX_H
#define QIE_COMPUTE_CPU_X86_AMX_H

#include <stdint.h>
#include <string.h>

enum { QIE_TILE_ROWS = 16, QIE_TILE_BYTES = 64 };

/* Operand of LDTILECFG (Intel SDM volume 1, 18.2.1, palette 1). */
typedef struct qie_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} qie_tile_config;

#if defined(QIE_EMULATE_TILES)

#include "base/dtype.h"

typedef uint32_t qie_tile[QIE_TILE_ROWS][QIE_TILE_BYTES / 4];
extern _Thread_local qie_tile qie_emulated_tiles[8];
extern _Thread_local int qie_emulated_tiles_ready;

static inline void qie_tiles_begin(void) {
    memset(qie_emulated_tiles, 0, sizeof qie_emulated_tiles);
    qie_emulated_tiles_ready = 1;
}
static inline void qie_tiles_end(void) {
    qie_emulated_tiles_ready = 0;
}
/* A tile used outside begin and end is an illegal instruction on the processor. */
static inline qie_tile *qie_emulated_tile(int i) {
    if (!qie_emulated_tiles_ready)
        __builtin_trap();
    return &qie_emulated_tiles[i];
}
static inline void qie_emulated_load(qie_tile *t, const void *p, int64_t stride) {
    for (int r = 0; r < QIE_TILE_ROWS; r++)
        memcpy((*t)[r], (const unsigned char *)p + r * stride, QIE_TILE_BYTES);
}
static inline void qie_emulated_store(qie_tile *t, void *p, int64_t stride) {
    for (int r = 0; r < QIE_TILE_ROWS; r++)
        memcpy((unsigned char *)p + r * stride, (*t)[r], QIE_TILE_BYTES);
}
static inline void qie_emulated_dp_bf16(qie_tile *c, qie_tile *a, qie_tile *b) {
    for (int r = 0; r < QIE_TILE_ROWS; r++)
        for (int k = 0; k < QIE_TILE_BYTES / 4; k++) {
            uint32_t x = (*a)[r][k];
            float x0 = qie_bf16_to_f32((qie_bf16)x), x1 = qie_bf16_to_f32((qie_bf16)(x >> 16));
            for (int j = 0; j < QIE_TILE_BYTES / 4; j++) {
                uint32_t y = (*b)[k][j];
                float sum;
                memcpy(&sum, &(*c)[r][j], 4);
                sum += x0 * qie_bf16_to_f32((qie_bf16)y);
                sum += x1 * qie_bf16_to_f32((qie_bf16)(y >> 16));
                memcpy(&(*c)[r][j], &sum, 4);
            }
        }
}
static inline void qie_emulated_dp_i8(qie_tile *c, qie_tile *a, qie_tile *b) {
    for (int r = 0; r < QIE_TILE_ROWS; r++)
        for (int k = 0; k < QIE_TILE_BYTES / 4; k++) {
            int8_t x[4];
            memcpy(x, &(*a)[r][k], 4);
            for (int j = 0; j < QIE_TILE_BYTES / 4; j++) {
                int8_t y[4];
                memcpy(y, &(*b)[k][j], 4);
                int32_t sum = (int32_t)(*c)[r][j];
                for (int e = 0; e < 4; e++)
                    sum += x[e] * y[e];
                (*c)[r][j] = (uint32_t)sum;
            }
        }
}
#define TILE_ZERO(t) memset(qie_emulated_tile(t), 0, sizeof(qie_tile))
#define TILE_LOAD(t, p, stride) qie_emulated_load(qie_emulated_tile(t), p, stride)
#define TILE_STORE(t, p, stride) qie_emulated_store(qie_emulated_tile(t), p, stride)
#define TILE_DP_BF16(c, a, b) \
    qie_emulated_dp_bf16(qie_emulated_tile(c), qie_emulated_tile(a), qie_emulated_tile(b))
#define TILE_DP_I8(c, a, b) \
    qie_emulated_dp_i8(qie_emulated_tile(c), qie_emulated_tile(a), qie_emulated_tile(b))

#else

static inline void qie_tiles_begin(void) {
    qie_tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes_per_row[i] = QIE_TILE_BYTES;
        c.rows[i] = QIE_TILE_ROWS;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
}
/* Also spares the kernel from saving 8 KiB whenever the thread is put aside. */
static inline void qie_tiles_end(void) {
    __asm__ volatile("tilerelease" : : : "memory");
}
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define TILE_LOAD(t, p, stride)                                       \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t                  \
                     :                                                \
                     : "r"((const void *)(p)), "r"((int64_t)(stride)) \
                     : "memory")
#define TILE_STORE(t, p, stride)                                \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)"        \
                     :                                          \
                     : "r"((void *)(p)), "r"((int64_t)(stride)) \
                     : "memory")
/* AT&T order: the sums are the last operand. */
#define TILE_DP_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_DP_I8(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

#endif

#endif
