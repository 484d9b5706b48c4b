/* What a picture file says about itself, read without any codec: format, size, and the parts it is
 * made of.
 *
 * Nothing is decoded or allocated here and every read is bounds-checked, so a process that must
 * never decode (the master of the service) may use this on hostile bytes. */
#ifndef QIE_IMAGE_SNIFF_H
#define QIE_IMAGE_SNIFF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/image.h"

/* One part of a file: a PNG chunk, a JPEG segment or a WebP chunk. */
typedef struct qie_image_part {
    uint32_t type;       /* four letters, first one highest (PNG, WebP); the marker byte (JPEG) */
    const uint8_t *data; /* inside the file */
    size_t n;
    const uint8_t *whole; /* PNG: with length, type and checksum, n + 12 bytes */
} qie_image_part;

#define QIE_FOURCC(a, b, c, d) \
    ((uint32_t)(a) << 24 | (uint32_t)(b) << 16 | (uint32_t)(c) << 8 | (uint32_t)(d))

/* Walk the parts of a file of the named format. *pos is 0 for the first call and private
 * afterwards. False at the end, or where the file is cut off or damaged. JPEG ends with the first
 * SOS segment, PNG with IEND. */
bool qie_png_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part);
bool qie_jpeg_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part);
bool qie_webp_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part);

#endif
