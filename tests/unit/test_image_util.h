/* What the picture tests share: fixtures, checksums, and small writers of broken files. */
#ifndef TEST_IMAGE_UTIL_H
#define TEST_IMAGE_UTIL_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fs.h"
#include "qie/image.h"

#define IMAGES QIE_SOURCE_DIR "/tests/golden/images/"

static inline uint64_t fnv1a(const void *bytes, size_t n) {
    const uint8_t *p = bytes;
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 1099511628211u;
    return h;
}

static inline uint64_t image_hash(const qie_image *image) {
    return fnv1a(qie_image_pixels_const(image),
                 (size_t)qie_image_width(image) * (size_t)qie_image_height(image) * 3);
}

/* A fixture's bytes in a block of exactly their size, so that reading past the end is seen by ASan.
 */
static inline uint8_t *fixture(const char *name, size_t *n) {
    char path[512];
    snprintf(path, sizeof path, IMAGES "%s", name);
    unsigned char *bytes;
    if (qie_file_read(path, 1u << 24, &bytes, n, NULL) != QIE_OK) {
        printf("  cannot read %s\n", path);
        exit(1);
    }
    uint8_t *exact = malloc(*n);
    memcpy(exact, bytes, *n);
    free(bytes);
    return exact;
}

/* Picture of the linear congruential generator that make_images.py uses. */
static inline qie_image *lcg_image(int w, int h, uint32_t seed) {
    qie_image *image;
    if (qie_image_create(w, h, &image, NULL) != QIE_OK)
        exit(1);
    uint8_t *p = qie_image_pixels(image);
    for (size_t i = 0, n = (size_t)w * (size_t)h * 3; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        p[i] = (uint8_t)(seed >> 24);
    }
    return image;
}

/* Smooth picture, which lossy formats keep well. */
static inline qie_image *smooth_image(int w, int h) {
    qie_image *image;
    if (qie_image_create(w, h, &image, NULL) != QIE_OK)
        exit(1);
    uint8_t *p = qie_image_pixels(image);
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++, p += 3) {
            p[0] = (uint8_t)(x * 255 / w);
            p[1] = (uint8_t)(y * 255 / h);
            p[2] = (uint8_t)(128 + (x - y) * 60 / (w + h));
        }
    return image;
}

static inline void put_be32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static inline uint32_t png_crc(const uint8_t *p, size_t n) {
    uint32_t c = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++)
            c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
    }
    return ~c;
}

/* Make a PNG's header announce another size, with a right checksum. */
static inline void png_lie(uint8_t *png, uint32_t w, uint32_t h) {
    put_be32(png + 16, w);
    put_be32(png + 20, h);
    put_be32(png + 29, png_crc(png + 12, 17));
}

#endif
