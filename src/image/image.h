/* The picture object, shared by the files of this folder. Everybody else uses qie/image.h. */
#ifndef QIE_IMAGE_IMAGE_H
#define QIE_IMAGE_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "qie/image.h"

/* Zero bytes kept behind the last pixel, so that loops may load whole vectors at the end of the
 * last row. */
#define QIE_IMAGE_SLACK 16u

struct qie_image {
    int width, height;
    uint8_t *pixels; /* width * height * 3 bytes and the slack */
};

/* Bytes from one row to the next. */
static inline size_t qie_image_stride(const qie_image *image) {
    return (size_t)image->width * 3;
}

#endif
