/* The three codecs behind one shape. Each lives in the one file that includes its library.
 *
 * Decoders are given bytes whose header qie_image_probe has accepted, with the size it found; they
 * refuse when the library sees another size, so the limits hold whatever the library would have
 * read. Orientation is not applied here. Encoders append a complete file to `out` (a buffer that
 * the caller releases). */
#ifndef QIE_IMAGE_CODEC_H
#define QIE_IMAGE_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "base/strbuf.h"
#include "qie/image.h"

qie_status qie_png_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                          qie_error *err);
qie_status qie_jpeg_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                           qie_error *err);
qie_status qie_webp_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                           qie_error *err);

qie_status qie_png_encode(const qie_image *image, int compression, const char *parameters,
                          qie_strbuf *out, qie_error *err);
qie_status qie_jpeg_encode(const qie_image *image, int quality, const char *parameters,
                           qie_strbuf *out, qie_error *err);
qie_status qie_webp_encode(const qie_image *image, int quality, const char *parameters,
                           qie_strbuf *out, qie_error *err);

/* Text of the last tEXt, zTXt or iTXt chunk with this keyword, decompressed (at most 4 MiB): a new
 * string of *n bytes (free()). NULL with QIE_OK when there is none. Errors: QIE_E_INVALID
 * (damaged), QIE_E_NO_MEMORY. */
qie_status qie_png_text(const uint8_t *bytes, size_t n, const char *keyword, char **out,
                        size_t *out_n, qie_error *err);

#endif
