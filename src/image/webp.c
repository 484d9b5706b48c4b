/* WebP through libwebp: still pictures and the first frame of animations, lossy and lossless; the
 * chunk with our parameters through its muxer. A file whose parts are not all there is refused by
 * the demuxer. */
#define _GNU_SOURCE
#include <stdbool.h>
#include <string.h>
#include <webp/decode.h>
#include <webp/demux.h>
#include <webp/encode.h>
#include <webp/mux.h>

#include "base/error.h"
#include "image/codec.h"
#include "image/image.h"
#include "image/parameters.h"

static qie_status fail_decode(VP8StatusCode code, qie_error *err) {
    QIE_FAIL_IF(code == VP8_STATUS_OUT_OF_MEMORY, QIE_E_NO_MEMORY, err, "image",
                "out of memory while reading a WebP picture");
    QIE_FAIL_IF(code == VP8_STATUS_NOT_ENOUGH_DATA || code == VP8_STATUS_SUSPENDED, QIE_E_INVALID,
                err, "image", "the picture is cut off: this WebP file lacks part of its pixels");
    return qie_fail(err, QIE_E_INVALID, "image",
                    "the picture is damaged: WebP: the pixel data cannot be decoded");
}

/* Decode one frame straight into its place. What an animation's first frame leaves uncovered stays
 * black, as a transparent canvas without its alpha. */
static qie_status decode_frame(const WebPIterator *frame, qie_image *image, qie_error *err) {
    QIE_FAIL_IF(frame->x_offset < 0 || frame->y_offset < 0 || frame->width < 1 ||
                    frame->height < 1 || frame->width > image->width - frame->x_offset ||
                    frame->height > image->height - frame->y_offset,
                QIE_E_INVALID, err, "image",
                "the picture is damaged: WebP: a frame lies outside of the picture");
    WebPDecoderConfig config;
    QIE_FAIL_IF(!WebPInitDecoderConfig(&config), QIE_E_INTERNAL, err, "image",
                "libwebp has another version than at build time");
    VP8StatusCode code =
        WebPGetFeatures(frame->fragment.bytes, frame->fragment.size, &config.input);
    if (code != VP8_STATUS_OK)
        return fail_decode(code, err);
    QIE_FAIL_IF(config.input.width != frame->width || config.input.height != frame->height,
                QIE_E_INVALID, err, "image",
                "the picture is damaged: WebP: two headers of different size");
    size_t stride = qie_image_stride(image);
    size_t at = (size_t)frame->y_offset * stride + (size_t)frame->x_offset * 3;
    config.output.colorspace = MODE_RGB;
    config.output.is_external_memory = 1;
    config.output.u.RGBA.rgba = image->pixels + at;
    config.output.u.RGBA.stride = (int)stride;
    config.output.u.RGBA.size = (size_t)image->height * stride - at;
    code = WebPDecode(frame->fragment.bytes, frame->fragment.size, &config);
    WebPFreeDecBuffer(&config.output);
    return code == VP8_STATUS_OK ? QIE_OK : fail_decode(code, err);
}

qie_status qie_webp_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                           qie_error *err) {
    *out = NULL;
    WebPData data = {bytes, n};
    WebPDemuxer *demux = WebPDemux(&data);
    QIE_FAIL_IF(!demux, QIE_E_INVALID, err, "image",
                "the picture is damaged: WebP: the parts of the file do not fit together");
    WebPIterator frame;
    memset(&frame, 0, sizeof frame);
    qie_image *image = NULL;
    qie_status st = QIE_OK;
    if ((int)WebPDemuxGetI(demux, WEBP_FF_CANVAS_WIDTH) != w ||
        (int)WebPDemuxGetI(demux, WEBP_FF_CANVAS_HEIGHT) != h ||
        !WebPDemuxGetFrame(demux, 1, &frame))
        st = qie_fail(err, QIE_E_INVALID, "image",
                      "the picture is damaged: WebP: it holds no frame of the announced size");
    if (st == QIE_OK)
        st = qie_image_create(w, h, &image, err);
    if (st == QIE_OK)
        st = decode_frame(&frame, image, err);
    WebPDemuxReleaseIterator(&frame);
    WebPDemuxDelete(demux);
    if (st != QIE_OK) {
        qie_image_destroy(image);
        return st;
    }
    *out = image;
    return QIE_OK;
}

static int on_write(const uint8_t *bytes, size_t n, const WebPPicture *picture) {
    qie_strbuf *out = picture->custom_ptr;
    qie_strbuf_append(out, bytes, n);
    return !out->failed;
}

static qie_status compress(const qie_image *image, int quality, qie_strbuf *out, qie_error *err) {
    WebPConfig config;
    WebPPicture picture;
    bool ok = WebPConfigInit(&config) && WebPPictureInit(&picture);
    QIE_FAIL_IF(!ok, QIE_E_INTERNAL, err, "image",
                "libwebp has another version than at build time");
    config.quality = (float)quality;
    if (quality == 100) {
        config.lossless = 1;
        config.quality = 75; /* of the search, here: higher costs much time for few bytes */
    }
    picture.use_argb = config.lossless;
    picture.width = image->width;
    picture.height = image->height;
    picture.writer = on_write;
    picture.custom_ptr = out;
    ok = WebPPictureImportRGB(&picture, image->pixels, (int)qie_image_stride(image)) &&
         WebPEncode(&config, &picture);
    WebPEncodingError code = picture.error_code;
    WebPPictureFree(&picture);
    if (ok)
        return QIE_OK;
    /* An import that fails without a code could not get its temporary rows. */
    QIE_FAIL_IF(out->failed || code == VP8_ENC_OK || code == VP8_ENC_ERROR_OUT_OF_MEMORY ||
                    code == VP8_ENC_ERROR_BITSTREAM_OUT_OF_MEMORY,
                QIE_E_NO_MEMORY, err, "image", "out of memory while writing a WebP picture");
    QIE_FAIL_IF(code == VP8_ENC_ERROR_PARTITION0_OVERFLOW ||
                    code == VP8_ENC_ERROR_PARTITION_OVERFLOW || code == VP8_ENC_ERROR_FILE_TOO_BIG,
                QIE_E_TOO_LARGE, err, "output_format",
                "%dx%d pixels are too much for a WebP picture; choose png", image->width,
                image->height);
    return qie_fail(err, QIE_E_INTERNAL, "image", "cannot write WebP: error %d of libwebp",
                    (int)code);
}

/* Put pixels and XMP packet into one file. */
static bool assemble(const qie_strbuf *pixels, const qie_strbuf *xmp, qie_strbuf *out) {
    WebPMux *mux = WebPMuxNew();
    WebPData picture = {(const uint8_t *)pixels->data, pixels->len};
    WebPData packet = {(const uint8_t *)xmp->data, xmp->len}, file = {NULL, 0};
    bool ok = mux && WebPMuxSetImage(mux, &picture, 0) == WEBP_MUX_OK &&
              WebPMuxSetChunk(mux, "XMP ", &packet, 0) == WEBP_MUX_OK &&
              WebPMuxAssemble(mux, &file) == WEBP_MUX_OK;
    if (ok)
        qie_strbuf_append(out, file.bytes, file.size);
    WebPDataClear(&file);
    WebPMuxDelete(mux);
    return ok && !out->failed;
}

qie_status qie_webp_encode(const qie_image *image, int quality, const char *parameters,
                           qie_strbuf *out, qie_error *err) {
    if (!parameters)
        return compress(image, quality, out, err);
    qie_strbuf pixels, xmp;
    qie_strbuf_init(&pixels, out->max);
    qie_strbuf_init(&xmp, (size_t)QIE_PARAMETERS_MAX * 6);
    qie_parameters_xmp(parameters, &xmp);
    qie_status st = compress(image, quality, &pixels, err);
    if (st == QIE_OK && (xmp.failed || !assemble(&pixels, &xmp, out)))
        st = qie_fail(err, QIE_E_NO_MEMORY, "image", "out of memory while writing a WebP picture");
    qie_strbuf_release(&xmp);
    qie_strbuf_release(&pixels);
    return st;
}
