/* Pictures: 8-bit RGB in memory, PNG, JPEG and WebP outside. */
#ifndef QIE_IMAGE_H
#define QIE_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct qie_image qie_image;

typedef enum qie_image_format {
    QIE_IMAGE_UNKNOWN = 0,
    QIE_IMAGE_PNG,
    QIE_IMAGE_JPEG,
    QIE_IMAGE_WEBP
} qie_image_format;

/* What a picture may be before it is decoded; checked from the header, before memory is taken. */
typedef struct qie_image_limits {
    int min_side_px;    /* default 16 */
    int max_side_px;    /* default 30000 */
    int64_t max_pixels; /* default 50,000,000 */
    size_t max_bytes;   /* of the encoded file; default 64 MiB */
} qie_image_limits;
qie_image_limits qie_image_limits_default(void);

/* How to write a picture. */
typedef struct qie_image_encode_options {
    qie_image_format format; /* default PNG */
    int quality;             /* 1..100 for JPEG and WebP (100: WebP lossless); default 95 */
    int compression;         /* 0..9 for PNG; default 6 */
    const char *parameters;  /* UTF-8 text (JSON) stored with the picture, NULL for none. PNG: an
                                iTXt chunk  "qwen-edit"; JPEG: a COM segment; WebP: an XMP chunk */
} qie_image_encode_options;
qie_image_encode_options qie_image_encode_options_default(void);

/* New black picture of width x height. Errors: QIE_E_INVALID (a side < 1), QIE_E_NO_MEMORY. */
qie_status qie_image_create(int width, int height, qie_image **out, qie_error *err);
void qie_image_destroy(qie_image *image);
int qie_image_width(const qie_image *image);
int qie_image_height(const qie_image *image);
/* Bytes [height][width][3], R G B, owned by the picture; rows follow each other without padding. */
uint8_t *qie_image_pixels(qie_image *image);
const uint8_t *qie_image_pixels_const(const qie_image *image);

/* Format by the first bytes, never by a name. */
qie_image_format qie_image_sniff(const void *bytes, size_t n);
/* "png", "jpeg", "webp"; "unknown". */
const char *qie_image_format_name(qie_image_format format);
/* By the extension of a path, case-insensitive: .png .jpg .jpeg .webp; UNKNOWN for anything else.
 */
qie_image_format qie_image_format_from_path(const char *path);

/* Width and height from the header alone, EXIF orientation not applied. Same errors as decode. */
qie_status qie_image_probe(const void *bytes, size_t n, const qie_image_limits *limits,
                           qie_image_format *format, int *width, int *height, qie_error *err);

/* Decode PNG (grey, palette, 8/16 bit, alpha, interlaced), JPEG (grey, YCbCr, CMYK/YCCK) or WebP to
 * RGB as Pillow's open + EXIF orientation transpose + convert("RGB") does: alpha is dropped, never
 * composited; 16-bit samples give their high byte; ICC profiles and gamma are ignored; of an
 * animation the first frame. limits may be NULL (defaults). A damaged or truncated picture is
 * refused, never half decoded. Errors: QIE_E_UNSUPPORTED (format), QIE_E_TOO_LARGE, QIE_E_INVALID
 * (damaged, too small), QIE_E_NO_MEMORY. */
qie_status qie_image_decode(const void *bytes, size_t n, const qie_image_limits *limits,
                            qie_image **out, qie_error *err);
/* Read and decode a file; messages name the path. Errors as decode, and QIE_E_NOT_FOUND, QIE_E_IO.
 */
qie_status qie_image_load(const char *path, const qie_image_limits *limits, qie_image **out,
                          qie_error *err);

/* Encode into a new buffer (free with free()). WebP refuses sides above 16383, JPEG above 65500. */
qie_status qie_image_encode(const qie_image *image, const qie_image_encode_options *options,
                            uint8_t **out, size_t *n, qie_error *err);

/* The `parameters` text of a picture that we wrote; *out is a new string (free with free()), NULL
 * with QIE_OK when the picture carries none. */
qie_status qie_image_read_parameters(const void *bytes, size_t n, char **out, qie_error *err);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
