#include "model/latents.h"

#include <math.h>
#include <stddef.h>

void qie_patches_from_image(const qie_processor_config *p, const qie_vision_config *v,
                            const qie_image *image, float *patches) {
    int ps = v->patch_size, merge = v->spatial_merge_size;
    int gh = qie_image_height(image) / ps / merge, gw = qie_image_width(image) / ps / merge;
    const uint8_t *px = qie_image_pixels_const(image);
    int64_t width = qie_image_width(image);
    float table[3][256];
    for (int c = 0; c < 3; c++)
        for (int u = 0; u < 256;
             u++) /* f32(u * rescale) in double, then f32 arithmetic, as the processor */
            table[c][u] =
                ((float)(u * p->rescale_factor) - (float)p->image_mean[c]) / (float)p->image_std[c];
    float *to = patches;
    for (int by = 0; by < gh; by++)
        for (int bx = 0; bx < gw; bx++)
            for (int m = 0; m < merge * merge; m++) {
                int y0 = (by * merge + m / merge) * ps, x0 = (bx * merge + m % merge) * ps;
                for (int c = 0; c < 3; c++)
                    for (int t = 0; t < v->temporal_patch_size; t++)
                        for (int y = 0; y < ps; y++)
                            for (int x = 0; x < ps; x++)
                                *to++ = table[c][px[((y0 + y) * width + x0 + x) * 3 + c]];
            }
}

void qie_pixels_from_image(const qie_image *image, float *pixels) {
    const uint8_t *px = qie_image_pixels_const(image);
    size_t n = (size_t)qie_image_width(image) * (size_t)qie_image_height(image) * 3;
    for (size_t i = 0; i < n; i++)
        pixels[i] = 2.0f * ((float)px[i] / 255.0f) - 1.0f;
}

void qie_pixels_to_image(const float *pixels, qie_image *image) {
    uint8_t *px = qie_image_pixels(image);
    size_t n = (size_t)qie_image_width(image) * (size_t)qie_image_height(image) * 3;
    for (size_t i = 0; i < n; i++) {
        float y = 0.5f * pixels[i] + 0.5f;
        y = y < 0 ? 0 : y > 1 ? 1 : y;
        px[i] = (uint8_t)rintf(y * 255.0f);
    }
}

void qie_latents_pack(const qie_vae_config *c, const float *map, int h, int w, bool normalise,
                      float *packed) {
    int z = c->z_dim;
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            for (int i = 0; i < z; i++) {
                float v = map[((int64_t)y * w + x) * z + i];
                if (normalise)
                    v = (v - (float)c->latents_mean[i]) / (float)c->latents_std[i];
                packed[((int64_t)(y / 2) * (w / 2) + x / 2) * 4 * z + i * 4 + y % 2 * 2 + x % 2] =
                    v;
            }
}

void qie_latents_unpack(const qie_vae_config *c, const float *packed, int h, int w, float *map) {
    int z = c->z_dim;
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            for (int i = 0; i < z; i++) {
                float v = packed[((int64_t)(y / 2) * (w / 2) + x / 2) * 4 * z + i * 4 + y % 2 * 2 +
                                 x % 2];
                /* division by the reciprocal, as the pipeline does */
                map[((int64_t)y * w + x) * z + i] =
                    v / (1.0f / (float)c->latents_std[i]) + (float)c->latents_mean[i];
            }
}

void qie_noise_pack(int z, const float *noise, int h, int w, float *packed) {
    for (int i = 0; i < z; i++)
        for (int y = 0; y < h; y++)
            for (int x = 0; x < w; x++)
                packed[((int64_t)(y / 2) * (w / 2) + x / 2) * 4 * z + i * 4 + y % 2 * 2 + x % 2] =
                    noise[((int64_t)i * h + y) * w + x];
}

void qie_map_shrink(const float *map, int h, int w, int z, int k, float *out) {
    int oh = (h + k - 1) / k, ow = (w + k - 1) / k;
    for (int y = 0; y < oh; y++)
        for (int x = 0; x < ow; x++)
            for (int i = 0; i < z; i++) {
                float sum = 0;
                int n = 0;
                for (int dy = 0; dy < k && y * k + dy < h; dy++)
                    for (int dx = 0; dx < k && x * k + dx < w; dx++, n++)
                        sum += map[((int64_t)(y * k + dy) * w + x * k + dx) * z + i];
                out[((int64_t)y * ow + x) * z + i] = sum / (float)n;
            }
}
