#define _GNU_SOURCE
#include "image/image.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/fs.h"
#include "base/strbuf.h"
#include "image/codec.h"
#include "image/exif.h"
#include "image/geometry.h"
#include "image/parameters.h"

qie_status qie_image_create(int width, int height, qie_image **out, qie_error *err) {
    *out = NULL;
    QIE_FAIL_IF(width < 1 || height < 1, QIE_E_INVALID, err, "image",
                "a picture of %dx%d pixels is not possible", width, height);
    size_t n;
    bool fits = qie_mul_size((size_t)width, (size_t)height, &n) && qie_mul_size(n, 3, &n) &&
                qie_add_size(n, QIE_IMAGE_SLACK, &n) && n <= PTRDIFF_MAX;
    qie_image *image = fits ? calloc(1, sizeof *image) : NULL;
    uint8_t *pixels = image ? calloc(1, n) : NULL;
    if (!pixels) {
        free(image);
        return qie_fail(err, QIE_E_NO_MEMORY, "image",
                        "out of memory for a picture of %dx%d pixels", width, height);
    }
    image->width = width;
    image->height = height;
    image->pixels = pixels;
    *out = image;
    return QIE_OK;
}

void qie_image_destroy(qie_image *image) {
    if (image) {
        free(image->pixels);
        free(image);
    }
}

int qie_image_width(const qie_image *image) {
    return image->width;
}
int qie_image_height(const qie_image *image) {
    return image->height;
}
uint8_t *qie_image_pixels(qie_image *image) {
    return image->pixels;
}
const uint8_t *qie_image_pixels_const(const qie_image *image) {
    return image->pixels;
}

qie_status qie_image_decode(const void *bytes, size_t n, const qie_image_limits *limits,
                            qie_image **out, qie_error *err) {
    *out = NULL;
    qie_image_format format;
    int w, h;
    QIE_TRY(qie_image_probe(bytes, n, limits, &format, &w, &h, err));
    qie_image *image = NULL;
    switch (format) {
    case QIE_IMAGE_PNG: QIE_TRY(qie_png_decode(bytes, n, w, h, &image, err)); break;
    case QIE_IMAGE_JPEG: QIE_TRY(qie_jpeg_decode(bytes, n, w, h, &image, err)); break;
    case QIE_IMAGE_WEBP: QIE_TRY(qie_webp_decode(bytes, n, w, h, &image, err)); break;
    case QIE_IMAGE_UNKNOWN: break; /* probe refuses it */
    }
    qie_status st = qie_image_orient(&image, qie_image_orientation(format, bytes, n), err);
    if (st != QIE_OK) {
        qie_image_destroy(image);
        return st;
    }
    *out = image;
    return QIE_OK;
}

qie_status qie_image_load(const char *path, const qie_image_limits *limits, qie_image **out,
                          qie_error *err) {
    *out = NULL;
    qie_image_limits def = qie_image_limits_default();
    unsigned char *bytes;
    size_t n;
    QIE_TRY(qie_file_read(path, (limits ? limits : &def)->max_bytes, &bytes, &n, err));
    qie_status st = qie_image_decode(bytes, n, limits, out, err);
    free(bytes);
    if (st != QIE_OK)
        qie_error_context(err, "reading '%s'", path);
    return st;
}

qie_image_encode_options qie_image_encode_options_default(void) {
    qie_image_encode_options o = {QIE_IMAGE_PNG, 95, 6, NULL};
    return o;
}

static qie_status check_options(const qie_image *image, const qie_image_encode_options *o,
                                qie_error *err) {
    int side = image->width > image->height ? image->width : image->height;
    int max = o->format == QIE_IMAGE_WEBP ? 16383 : o->format == QIE_IMAGE_JPEG ? 65500 : INT32_MAX;
    QIE_FAIL_IF(side > max, QIE_E_TOO_LARGE, err, "output_format",
                "%s pictures can have at most %d pixels a side, this one has %dx%d; choose png",
                qie_image_format_name(o->format), max, image->width, image->height);
    QIE_FAIL_IF(o->format == QIE_IMAGE_UNKNOWN, QIE_E_UNSUPPORTED, err, "output_format",
                "pictures are written as png, jpeg or webp");
    QIE_FAIL_IF(o->format != QIE_IMAGE_PNG && (o->quality < 1 || o->quality > 100), QIE_E_INVALID,
                err, "quality", "quality is %d, must be 1 to 100", o->quality);
    QIE_FAIL_IF(o->format == QIE_IMAGE_PNG && (o->compression < 0 || o->compression > 9),
                QIE_E_INVALID, err, "compression", "compression is %d, must be 0 to 9",
                o->compression);
    if (!o->parameters)
        return QIE_OK;
    size_t n = strlen(o->parameters);
    QIE_FAIL_IF(n > QIE_PARAMETERS_MAX, QIE_E_TOO_LARGE, err, "parameters",
                "the text to store with the picture has %zu bytes; at most %u are possible", n,
                QIE_PARAMETERS_MAX);
    QIE_FAIL_IF(!qie_utf8_valid(o->parameters, n), QIE_E_INVALID, err, "parameters",
                "the text to store with the picture is not valid UTF-8");
    return QIE_OK;
}

qie_status qie_image_encode(const qie_image *image, const qie_image_encode_options *options,
                            uint8_t **out, size_t *n, qie_error *err) {
    *out = NULL;
    *n = 0;
    qie_image_encode_options def = qie_image_encode_options_default();
    const qie_image_encode_options *o = options ? options : &def;
    QIE_TRY(check_options(image, o, err));
    const char *text = o->parameters;
    qie_strbuf buf;
    qie_strbuf_init(&buf, (size_t)1 << 40); /* a guard against runaway growth, not a real limit */
    qie_status st = QIE_OK;
    switch (o->format) {
    case QIE_IMAGE_PNG: st = qie_png_encode(image, o->compression, text, &buf, err); break;
    case QIE_IMAGE_JPEG: st = qie_jpeg_encode(image, o->quality, text, &buf, err); break;
    case QIE_IMAGE_WEBP: st = qie_webp_encode(image, o->quality, text, &buf, err); break;
    case QIE_IMAGE_UNKNOWN: break; /* refused above */
    }
    size_t len = buf.len;
    if (st == QIE_OK) {
        *out = (uint8_t *)qie_strbuf_take(&buf);
        if (!*out)
            st = qie_fail(err, QIE_E_NO_MEMORY, "image", "out of memory while writing a picture");
        else
            *n = len;
    }
    qie_strbuf_release(&buf);
    return st;
}
