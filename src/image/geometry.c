#include "image/geometry.h"

#include <stdbool.h>
#include <string.h>

#include "base/error.h"
#include "image/image.h"

qie_status qie_image_crop(const qie_image *image, int x, int y, int w, int h, qie_image **out,
                          qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(x < 0 || y < 0 || w < 1 || h < 1 || w > image->width - x || h > image->height - y,
                QIE_E_INVALID, err, "image", "cannot crop %dx%d at (%d, %d) from %dx%d pixels", w,
                h, x, y, image->width, image->height);
    qie_image *dst;
    QIE_TRY(qie_image_create(w, h, &dst, err));
    for (int row = 0; row < h; row++)
        memcpy(dst->pixels + (size_t)row * qie_image_stride(dst),
               image->pixels + (size_t)(y + row) * qie_image_stride(image) + (size_t)x * 3,
               qie_image_stride(dst));
    *out = dst;
    return QIE_OK;
}

qie_status qie_image_pad_edge(const qie_image *image, int w, int h, qie_image **out,
                              qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(w < image->width || h < image->height, QIE_E_INVALID, err, "image",
                "cannot pad %dx%d pixels to the smaller %dx%d", image->width, image->height, w, h);
    qie_image *dst;
    QIE_TRY(qie_image_create(w, h, &dst, err));
    size_t stride = qie_image_stride(dst), used = qie_image_stride(image);
    for (int y = 0; y < image->height; y++) {
        uint8_t *row = dst->pixels + (size_t)y * stride;
        memcpy(row, image->pixels + (size_t)y * used, used);
        for (size_t i = used; i < stride; i++)
            row[i] = row[i - 3];
    }
    const uint8_t *last = dst->pixels + (size_t)(image->height - 1) * stride;
    for (int y = image->height; y < h; y++)
        memcpy(dst->pixels + (size_t)y * stride, last, stride);
    *out = dst;
    return QIE_OK;
}

/* Columns copied before going to the next row: a transposed read touches this many source rows at a
 * time, which keeps their cache lines for the rows that follow. */
#define BLOCK 64

qie_status qie_image_orient(qie_image **image, int orientation, qie_error *err) {
    if (orientation < 2 || orientation > 8)
        return QIE_OK;
    qie_image *src = *image, *dst;
    bool swaps = orientation >= 5;
    /* Where the target's first pixel comes from: 3, 4, 6, 7 start at the bottom; 2, 3, 7, 8 at the
     * right. */
    bool bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    bool right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    int w = swaps ? src->height : src->width, h = swaps ? src->width : src->height;
    QIE_TRY(qie_image_create(w, h, &dst, err));
    ptrdiff_t stride = (ptrdiff_t)qie_image_stride(src);
    ptrdiff_t along_x = right ? -3 : 3, along_y = bottom ? -stride : stride;
    const uint8_t *first = src->pixels + (bottom ? (ptrdiff_t)(src->height - 1) * stride : 0) +
                           (right ? stride - 3 : 0);
    ptrdiff_t step_x = swaps ? along_y : along_x, step_y = swaps ? along_x : along_y;
    for (int x0 = 0; x0 < w; x0 += BLOCK) {
        int n = w - x0 < BLOCK ? w - x0 : BLOCK;
        for (int y = 0; y < h; y++) {
            const uint8_t *from = first + y * step_y + x0 * step_x;
            uint8_t *to = dst->pixels + ((size_t)y * (size_t)w + (size_t)x0) * 3;
            for (int i = 0; i < n; i++, to += 3)
                memcpy(to, from + i * step_x, 3);
        }
    }
    qie_image_destroy(src);
    *image = dst;
    return QIE_OK;
}
