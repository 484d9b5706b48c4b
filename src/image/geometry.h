/* Moving pixels without changing them: orientation, crop, padding. Sources stay the caller's; *out
 * is new. */
#ifndef QIE_IMAGE_GEOMETRY_H
#define QIE_IMAGE_GEOMETRY_H

#include "qie/image.h"

/* The w x h pixels whose upper left one is (x, y). Errors: QIE_E_INVALID (not inside),
 * QIE_E_NO_MEMORY. */
qie_status qie_image_crop(const qie_image *image, int x, int y, int w, int h, qie_image **out,
                          qie_error *err);
/* w x h pixels: the picture at the upper left, its last column and row repeated to the right and
 * below. Errors: QIE_E_INVALID (smaller than the picture), QIE_E_NO_MEMORY. */
qie_status qie_image_pad_edge(const qie_image *image, int w, int h, qie_image **out,
                              qie_error *err);
/* Turn as EXIF orientation 2..8 asks, replacing *image; anything else leaves it as it is. *image is
 * unchanged on failure. Errors: QIE_E_NO_MEMORY. */
qie_status qie_image_orient(qie_image **image, int orientation, qie_error *err);

#endif
