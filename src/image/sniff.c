#define _GNU_SOURCE
#include "image/sniff.h"

#include <string.h>
#include <strings.h>

#include "base/error.h"

static uint32_t be32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}
static uint32_t le32(const uint8_t *p) {
    return (uint32_t)p[3] << 24 | (uint32_t)p[2] << 16 | (uint32_t)p[1] << 8 | p[0];
}
static int be16(const uint8_t *p) {
    return p[0] << 8 | p[1];
}
static int le16(const uint8_t *p) {
    return p[1] << 8 | p[0];
}

static const uint8_t PNG_MAGIC[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};

qie_image_limits qie_image_limits_default(void) {
    qie_image_limits l = {16, 30000, 50000000, (size_t)64 << 20};
    return l;
}

qie_image_format qie_image_sniff(const void *bytes, size_t n) {
    const uint8_t *p = bytes;
    if (n >= 8 && !memcmp(p, PNG_MAGIC, 8))
        return QIE_IMAGE_PNG;
    if (n >= 3 && p[0] == 0xff && p[1] == 0xd8 && p[2] == 0xff)
        return QIE_IMAGE_JPEG;
    if (n >= 12 && !memcmp(p, "RIFF", 4) && !memcmp(p + 8, "WEBP", 4))
        return QIE_IMAGE_WEBP;
    return QIE_IMAGE_UNKNOWN;
}

const char *qie_image_format_name(qie_image_format format) {
    switch (format) {
    case QIE_IMAGE_PNG: return "png";
    case QIE_IMAGE_JPEG: return "jpeg";
    case QIE_IMAGE_WEBP: return "webp";
    case QIE_IMAGE_UNKNOWN: break;
    }
    return "unknown";
}

qie_image_format qie_image_format_from_path(const char *path) {
    static const struct {
        const char *ext;
        qie_image_format format;
    } TABLE[] = {{".png", QIE_IMAGE_PNG},
                 {".jpg", QIE_IMAGE_JPEG},
                 {".jpeg", QIE_IMAGE_JPEG},
                 {".webp", QIE_IMAGE_WEBP}};
    const char *slash = strrchr(path, '/');
    const char *dot = strrchr(slash ? slash + 1 : path, '.');
    for (size_t i = 0; dot && i < sizeof TABLE / sizeof TABLE[0]; i++)
        if (!strcasecmp(dot, TABLE[i].ext))
            return TABLE[i].format;
    return QIE_IMAGE_UNKNOWN;
}

bool qie_png_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part) {
    if (*pos == 0)
        *pos = sizeof PNG_MAGIC;
    if (*pos > n || n - *pos < 12)
        return false;
    size_t length = be32(bytes + *pos);
    if (length > n - *pos - 12)
        return false;
    part->whole = bytes + *pos;
    part->type = be32(part->whole + 4);
    part->data = part->whole + 8;
    part->n = length;
    *pos = part->type == QIE_FOURCC('I', 'E', 'N', 'D') ? n : *pos + length + 12;
    return true;
}

bool qie_jpeg_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part) {
    size_t i = *pos ? *pos : 2;
    for (;;) {
        /* As libjpeg: junk before a marker is skipped, 0xff may repeat, ff 00 is no marker. */
        while (i < n && bytes[i] != 0xff)
            i++;
        while (i < n && bytes[i] == 0xff)
            i++;
        if (i >= n)
            return false;
        uint8_t marker = bytes[i++];
        if (marker == 0 || marker == 0x01 || (marker >= 0xd0 && marker <= 0xd7))
            continue; /* no parameters follow */
        if (marker == 0xd8 || marker == 0xd9 || n - i < 2)
            return false;
        size_t length = (size_t)be16(bytes + i);
        if (length < 2 || length > n - i)
            return false;
        part->type = marker;
        part->data = bytes + i + 2;
        part->n = length - 2;
        part->whole = NULL;
        *pos = marker == 0xda ? n : i + length;
        return true;
    }
}

bool qie_webp_next(const uint8_t *bytes, size_t n, size_t *pos, qie_image_part *part) {
    if (*pos == 0)
        *pos = 12;
    size_t end =
        n < 12 ? 0 : (size_t)le32(bytes + 4) + 8; /* what follows is not part of the picture */
    if (end > n)
        end = n;
    if (*pos > end || end - *pos < 8)
        return false;
    size_t length = le32(bytes + *pos + 4);
    if (length > end - *pos - 8)
        return false;
    part->type = be32(bytes + *pos);
    part->data = bytes + *pos + 8;
    part->n = length;
    part->whole = NULL;
    *pos += 8 + length + (length & 1);
    return true;
}

static qie_status fail_cut(const char *name, size_t n, qie_error *err) {
    return qie_fail(err, QIE_E_INVALID, "image",
                    "the picture is cut off: this %s file ends after %zu bytes, inside its header",
                    name, n);
}

static qie_status png_size(const uint8_t *p, size_t n, int64_t *w, int64_t *h, qie_error *err) {
    if (n < 33)
        return fail_cut("PNG", n, err);
    QIE_FAIL_IF(be32(p + 8) != 13 || memcmp(p + 12, "IHDR", 4), QIE_E_INVALID, err, "image",
                "the picture is damaged: this PNG file does not begin with a header");
    int depth = p[24], colour = p[25];
    bool known = colour == 0 ? depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16
                 : colour == 3
                     ? depth == 1 || depth == 2 || depth == 4 || depth == 8
                     : (colour == 2 || colour == 4 || colour == 6) && (depth == 8 || depth == 16);
    QIE_FAIL_IF(!known || p[26] || p[27] || p[28] > 1, QIE_E_INVALID, err, "image",
                "the picture is damaged: the PNG header names no known kind of pixels "
                "(bit depth %d, colour type %d)",
                depth, colour);
    *w = be32(p + 16);
    *h = be32(p + 20);
    return QIE_OK;
}

static qie_status jpeg_size(const uint8_t *p, size_t n, int64_t *w, int64_t *h, qie_error *err) {
    qie_image_part s;
    for (size_t pos = 0; qie_jpeg_next(p, n, &pos, &s);) {
        uint32_t m = s.type;
        QIE_FAIL_IF(m == 0xda, QIE_E_INVALID, err, "image",
                    "the picture is damaged: this JPEG file has no frame header before its data");
        if (m < 0xc0 || m > 0xcf || m == 0xc4 || m == 0xc8 || m == 0xcc)
            continue;
        QIE_FAIL_IF(s.n < 6, QIE_E_INVALID, err, "image",
                    "the picture is damaged: the JPEG frame header is too short");
        bool usual = m == 0xc0 || m == 0xc1 || m == 0xc2 || m == 0xc9 || m == 0xca;
        QIE_FAIL_IF(!usual, QIE_E_UNSUPPORTED, err, "image",
                    "this kind of JPEG (lossless or hierarchical) is not supported; "
                    "save it as an ordinary JPEG, PNG or WebP");
        QIE_FAIL_IF(s.data[0] != 8, QIE_E_UNSUPPORTED, err, "image",
                    "JPEG pictures with %d-bit samples are not supported; save it with 8 bits",
                    s.data[0]);
        QIE_FAIL_IF(s.data[5] != 1 && s.data[5] != 3 && s.data[5] != 4, QIE_E_UNSUPPORTED, err,
                    "image", "JPEG pictures with %d colour channels are not supported", s.data[5]);
        *h = be16(s.data + 1);
        *w = be16(s.data + 3);
        return QIE_OK;
    }
    return fail_cut("JPEG", n, err);
}

static qie_status webp_size(const uint8_t *p, size_t n, int64_t *w, int64_t *h, qie_error *err) {
    if (n < 30)
        return fail_cut("WebP", n, err);
    uint64_t said = (uint64_t)le32(p + 4) + 8;
    QIE_FAIL_IF(said > n, QIE_E_INVALID, err, "image",
                "the picture is cut off: this WebP file should have %llu bytes but has %zu",
                (unsigned long long)said, n);
    const uint8_t *d = p + 20;
    switch (be32(p + 12)) {
    case QIE_FOURCC('V', 'P', '8', ' '):
        if (d[0] & 1 || d[3] != 0x9d || d[4] != 0x01 || d[5] != 0x2a)
            break;
        *w = le16(d + 6) & 0x3fff;
        *h = le16(d + 8) & 0x3fff;
        return QIE_OK;
    case QIE_FOURCC('V', 'P', '8', 'L'):
        if (d[0] != 0x2f)
            break;
        *w = 1 + (int64_t)(le32(d + 1) & 0x3fff);
        *h = 1 + (int64_t)(le32(d + 1) >> 14 & 0x3fff);
        return QIE_OK;
    case QIE_FOURCC('V', 'P', '8', 'X'):
        *w = 1 + (int64_t)(le32(d + 4) & 0xffffff);
        *h = 1 + (int64_t)(le32(d + 6) >> 8);
        return QIE_OK;
    default: break;
    }
    return qie_fail(err, QIE_E_INVALID, "image",
                    "the picture is damaged: this WebP file does not begin with a picture header");
}

static qie_status check_size(int64_t w, int64_t h, const qie_image_limits *l, qie_error *err) {
    long long lw = w, lh = h;
    QIE_FAIL_IF(w < l->min_side_px || h < l->min_side_px, QIE_E_INVALID, err, "image",
                "the picture has %lldx%lld pixels; each side needs at least %d", lw, lh,
                l->min_side_px);
    QIE_FAIL_IF(w > l->max_side_px || h > l->max_side_px, QIE_E_TOO_LARGE, err, "image",
                "the picture has %lldx%lld pixels; a side may have at most %d", lw, lh,
                l->max_side_px);
    QIE_FAIL_IF(w * h > l->max_pixels, QIE_E_TOO_LARGE, err, "image",
                "the picture has %lldx%lld = %lld pixels; at most %lld are allowed", lw, lh,
                lw * lh, (long long)l->max_pixels);
    return QIE_OK;
}

/* What people try most often: name it, since "unknown format" sends them looking for damage. */
static const char *other_format(const uint8_t *p, size_t n) {
    static const struct {
        size_t at, n;
        const char *magic, *name;
    } TABLE[] = {{0, 4, "GIF8", "GIF"},
                 {0, 2, "BM", "BMP"},
                 {0, 4, "II*\0", "TIFF"},
                 {0, 4, "MM\0*", "TIFF"},
                 {4, 8, "ftypavif", "AVIF"},
                 {4, 8, "ftypheic", "HEIC"},
                 {4, 8, "ftypheix", "HEIC"},
                 {4, 8, "ftypmif1", "HEIF"},
                 {0, 5, "%PDF-", "PDF"},
                 {0, 4, "8BPS", "Photoshop"},
                 {0, 2, "\xff\x0a", "JPEG XL"},
                 {4, 8, "JXL \r\n\x87\n", "JPEG XL"},
                 {4, 8, "jP  \r\n\x87\n", "JPEG 2000"},
                 {0, 4, "<svg", "SVG"},
                 {0, 5, "<?xml", "XML or SVG"},
                 {0, 9, "<!DOCTYPE", "HTML"}};
    for (size_t i = 0; i < sizeof TABLE / sizeof TABLE[0]; i++)
        if (n >= TABLE[i].at + TABLE[i].n && !memcmp(p + TABLE[i].at, TABLE[i].magic, TABLE[i].n))
            return TABLE[i].name;
    return NULL;
}

static qie_status fail_format(const uint8_t *p, size_t n, qie_error *err) {
    QIE_FAIL_IF(n == 0, QIE_E_INVALID, err, "image", "the picture is empty (0 bytes)");
    /* The beginning of one of ours, cut short. */
    bool begun = (n < 8 && !memcmp(p, PNG_MAGIC, n)) || (n < 3 && !memcmp(p, "\xff\xd8", n)) ||
                 (n < 12 && !memcmp(p, "RIFF", n < 4 ? n : 4));
    QIE_FAIL_IF(begun, QIE_E_INVALID, err, "image", "the picture is cut off after %zu bytes", n);
    const char *name = other_format(p, n);
    QIE_FAIL_IF(name, QIE_E_UNSUPPORTED, err, "image",
                "this is a %s file; pictures must be PNG, JPEG or WebP", name);
    return qie_fail(err, QIE_E_UNSUPPORTED, "image",
                    "this is not a PNG, JPEG or WebP picture (its first bytes are unknown)");
}

qie_status qie_image_probe(const void *bytes, size_t n, const qie_image_limits *limits,
                           qie_image_format *format, int *width, int *height, qie_error *err) {
    qie_image_limits def = qie_image_limits_default();
    if (!limits)
        limits = &def;
    int64_t w = 0, h = 0;
    qie_image_format f = qie_image_sniff(bytes, n);
    QIE_FAIL_IF(n > limits->max_bytes, QIE_E_TOO_LARGE, err, "image",
                "the picture's file has %zu bytes; at most %zu are allowed", n, limits->max_bytes);
    switch (f) {
    case QIE_IMAGE_PNG: QIE_TRY(png_size(bytes, n, &w, &h, err)); break;
    case QIE_IMAGE_JPEG: QIE_TRY(jpeg_size(bytes, n, &w, &h, err)); break;
    case QIE_IMAGE_WEBP: QIE_TRY(webp_size(bytes, n, &w, &h, err)); break;
    case QIE_IMAGE_UNKNOWN: return fail_format(bytes, n, err);
    }
    QIE_TRY(check_size(w, h, limits, err));
    if (format)
        *format = f;
    if (width)
        *width = (int)w;
    if (height)
        *height = (int)h;
    return QIE_OK;
}
