#if defined(__x86_64__)
/* As rows_avx512.c, with the rounding instruction of AVX512_BF16. */
#include <math.h>

#include "compute/cpu/x86/vec_avx512.inc"

#include "compute/cpu/x86/rows.inc"

const qie_kernels qie_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .f32 = &qie_f32_gemm_avx512,
    .epilogue = f32_epilogue_avx512bf16,
    .finish_attention = f32_finish_attention_avx512bf16,
    .convert = f32_convert_avx512bf16,
    .load_weights = qie_load_weights_avx2,
    .rms_norm = f32_rms_norm_avx512bf16,
    .layer_norm = f32_layer_norm_avx512bf16,
    .qk_norm_rope = f32_qk_norm_rope_avx512bf16,
    .channel_norm = f32_channel_norm_avx512bf16,
    .cfg_combine = f32_cfg_combine_avx512bf16,
};
#else
typedef int qie_empty_translation_unit;
#endif
