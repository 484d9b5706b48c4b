#if defined(__x86_64__)
#include <math.h>

#include "compute/cpu/x86/vec_avx2.inc"

#include "compute/cpu/x86/rows.inc"

const qie_kernels qie_kernels_avx2 = {
    .name = "avx2",
    .f32 = &qie_f32_gemm_avx2,
    .epilogue = f32_epilogue_avx2,
    .finish_attention = f32_finish_attention_avx2,
    .convert = f32_convert_avx2,
    .load_weights = qie_load_weights_avx2,
    .rms_norm = f32_rms_norm_avx2,
    .layer_norm = f32_layer_norm_avx2,
    .qk_norm_rope = f32_qk_norm_rope_avx2,
    .channel_norm = f32_channel_norm_avx2,
    .cfg_combine = f32_cfg_combine_avx2,
};
#else
typedef int qie_empty_translation_unit;
#endif
