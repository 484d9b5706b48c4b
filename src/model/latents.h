/* Between pictures, patches and latents: the small conversions around the networks. All F32.
 * Packed: [(h/2)(w/2), 4 z], channel c*4 + dy*2 + dx. Maps: [h, w, z], channels last. */
#ifndef QIE_MODEL_LATENTS_H
#define QIE_MODEL_LATENTS_H

#include "plan/config.h"
#include "qie/image.h"

/* Patches of a picture as the vision processor lays them out: [patches, 3 * temporal * patch *
 * patch], merge-block order; the picture's sides are multiples of patch x merge. */
void qie_patches_from_image(const qie_processor_config *p, const qie_vision_config *v,
                            const qie_image *image, float *patches);
/* [h, w, 3] in -1..1 */
void qie_pixels_from_image(const qie_image *image, float *pixels);
/* u8 = round(clamp(x / 2 + 1/2) * 255), ties to even; image has the pixels' size. */
void qie_pixels_to_image(const float *pixels, qie_image *image);

/* Normalise (z - mean) / std and pack a map [h, w, z]. */
void qie_latents_pack(const qie_vae_config *c, const float *map, int h, int w, bool normalise,
                      float *packed);
/* Unpack to a map [h, w, z] and undo the normalisation. */
void qie_latents_unpack(const qie_vae_config *c, const float *packed, int h, int w, float *map);
/* Pack noise drawn as [z, h, w]. */
void qie_noise_pack(int z, const float *noise, int h, int w, float *packed);
/* Average a map over k x k cells: [ceil(h/k), ceil(w/k), z]. */
void qie_map_shrink(const float *map, int h, int w, int z, int k, float *out);

#endif
