/* Pillow's Image.resize on 8-bit RGB, bit for bit.
 *
 * Separable convolution with 22-bit fixed-point weights; the picture between the two passes is
 * rounded and clamped to 8 bits, so the order of the passes shows in the result. The filter widens
 * when shrinking. */
#ifndef QIE_IMAGE_RESAMPLE_H
#define QIE_IMAGE_RESAMPLE_H

#include "qie/image.h"

typedef enum qie_filter {
    QIE_FILTER_LANCZOS = 0, /* 3 lobes */
    QIE_FILTER_BICUBIC      /* a = -0.5 */
} qie_filter;

typedef enum qie_resample_order {
    QIE_RESAMPLE_PILLOW_13 =
        0, /* vertical first when that shrinks the work, as Pillow 13 decides */
    QIE_RESAMPLE_HORIZONTAL_FIRST /* Pillow up to 11.3 */
} qie_resample_order;

/* New picture of w x h pixels. A side that does not change is not filtered; equal size is a copy.
 * Thread:  split by rows over up to n_threads threads; the bytes do not depend on n_threads.
 * Memory:  the result, one 8-bit picture between the passes, and the weights of both axes.
 * Errors:  QIE_E_INVALID (a side < 1), QIE_E_NO_MEMORY. */
qie_status qie_resample(const qie_image *image, int w, int h, qie_filter filter,
                        qie_resample_order order, int n_threads, qie_image **out, qie_error *err);

#endif
