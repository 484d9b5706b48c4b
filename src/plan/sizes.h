/* Size rules: which pixels and how many tokens an edit works on. Pure arithmetic, equal to
 * diffusers'. Table of examples: docs/MODEL.md, "sizes". */
#ifndef QIE_PLAN_SIZES_H
#define QIE_PLAN_SIZES_H

#include <stdbool.h>
#include <stdint.h>

#include "plan/config.h"
#include "qie/error.h"

#define QIE_MAX_PICTURES 16
#define QIE_CONDITION_AREA 147456 /* 384 x 384: CONDITION_IMAGE_SIZE of the pipeline */
#define QIE_DEFAULT_AREA 1048576  /* 1024 x 1024: VAE_IMAGE_SIZE of the pipeline */

typedef struct qie_size {
    int w, h;
} qie_size;

/* diffusers' calculate_dimensions: sides near sqrt(area) with this ratio (w/h), multiples of 32 (0
 * is possible). */
qie_size qie_dims(double area, double ratio);
/* The vision processor's second resize: multiples of `factor` within [min_pixels, max_pixels]. */
qie_size qie_smart_resize(qie_size s, int factor, int64_t min_pixels, int64_t max_pixels);
/* Area A' that --max-side asks for: the largest <= 1 MP, scaled down in steps of 1 %, whose dims()
 * at this ratio has no side above max_side. */
double qie_area_for_max_side(int max_side, double ratio);

/* What a caller asks for. */
typedef struct qie_size_request {
    int n_images;
    qie_size images[QIE_MAX_PICTURES];
    int width, height; /* 0: by rule */
    int max_side;      /* 0: none */
    int64_t ref_area;  /* 0: by rule */
    bool keep_size;
} qie_size_request;

/* How a reference reaches the VAE. */
typedef enum qie_fit {
    QIE_FIT_RESIZE = 0, /* Lanczos to vae */
    QIE_FIT_PAD         /* edge replicated to the right and bottom up to vae; no resampling */
} qie_fit;

typedef struct qie_size_plan {
    qie_size generated; /* picture that the transformer makes: multiples of 16 */
    qie_size output;    /* picture that is written */
    qie_fit output_fit; /* PAD: crop generated to output; RESIZE: equal, or Lanczos to output */
    struct {
        qie_size cond;    /* after the first resize */
        qie_size grid_px; /* after the second one: multiples of patch x merge */
        qie_size vae;
        qie_fit vae_fit;
        int n_patches; /* of the vision tower */
        int n_vision_tokens;
        int grid_h, grid_w; /* latent tokens: vae / (8 x 2) */
    } images[QIE_MAX_PICTURES];
    int n_images;
    int grid_h, grid_w;                                        /* of the generated picture */
    int64_t n_target, n_reference, n_patches, n_vision_tokens; /* sums */
    bool floored; /* width or height was no multiple of 16 */
    bool
        kept_by_resize; /* keep_size on a picture above the area: generated smaller, resized back */
} qie_size_plan;

/* Apply the rules. Errors: QIE_E_INVALID with param "width", "height", "max_side", "ref_area" or
 * "image". */
qie_status qie_size_plan_make(const qie_model_config *m, const qie_size_request *req,
                              qie_size_plan *out, qie_error *err);

/* Positions of the rope tables: text rows start at m = max over all grids of max(h/2, w/2); m +
 * n_text must not exceed 4096. Returns m. */
int qie_rope_text_start(const qie_size_plan *s);
/* Do n_rows rows of conditioning (n_prompt of them the user's own text) fit beside these pictures?
 * One rule and one wording for the engine and for whoever looks before it. Errors: QIE_E_INVALID
 * with `param`, both numbers in the message. */
qie_status qie_size_plan_check_text(const qie_size_plan *s, int64_t n_rows, int64_t n_prompt,
                                    const char *param, qie_error *err);
#define QIE_MAX_ROPE_POSITION 4096 /* length of the position tables in diffusers' QwenEmbedRope */

#endif
