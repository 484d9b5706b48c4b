/* Which way up a picture is: the orientation that EXIF or XMP data asks for, as Pillow's
 * exif_transpose. */
#ifndef QIE_IMAGE_EXIF_H
#define QIE_IMAGE_EXIF_H

#include <stddef.h>
#include <stdint.h>

#include "qie/image.h"

/* Orientation 1..8 of an EXIF block (TIFF header, optionally after "Exif\0\0"); other numbers as
 * they stand; 0 when the block has none or is damaged. */
int qie_exif_orientation(const uint8_t *block, size_t n);
/* The digit of tiff:Orientation in an XMP packet; 0 when there is none. */
int qie_xmp_orientation(const uint8_t *xmp, size_t n);
/* Orientation of a whole file: EXIF (JPEG APP1, PNG eXIf or "Raw profile type exif", WebP EXIF),
 * else XMP. 0 when nothing is said. Damaged metadata never makes a picture unreadable. */
int qie_image_orientation(qie_image_format format, const uint8_t *bytes, size_t n);

#endif
