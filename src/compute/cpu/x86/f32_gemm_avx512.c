#if defined(__x86_64__)
/* 32 registers: 14 x 2 sums, two vectors of B, one of A. */
#include "compute/cpu/x86/vec_avx512.inc"

#define MR 14
#include "compute/cpu/x86/f32_gemm.inc"
#include "compute/cpu/x86/winograd.inc"

const qie_gemm qie_f32_gemm_avx512 = {
    .mr = MR,
    .vw = VW,
    .unit = 1,
    .dtype = QIE_F32,
    .tile = TILE_TABLE,
    .pack_b = f32_pack_b_avx512,
    .copy_a = f32_copy_a_avx512,
    .gather_a = f32_gather_a_avx512,
    .pack_v = f32_pack_v_avx512,
    .winograd_in = f32_winograd_in_avx512,
    .winograd_out = f32_winograd_out_avx512,
    .winograd_weights = f32_winograd_weights_avx512,
    .dots = f32_dots_avx512,
    .softmax = f32_softmax_avx512,
};
#else
typedef int qie_empty_translation_unit;
#endif
