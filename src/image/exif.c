#define _GNU_SOURCE
#include "image/exif.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "image/codec.h"
#include "image/sniff.h"

#define TAG_ORIENTATION 0x0112

typedef struct tiff {
    const uint8_t *p;
    size_t n;
    bool big; /* byte order */
} tiff;

/* Unsigned number of `size` bytes at `at`; false outside of the block. */
static bool number(const tiff *t, size_t at, size_t size, uint32_t *out) {
    if (at > t->n || size > t->n - at)
        return false;
    uint32_t v = 0;
    for (size_t i = 0; i < size; i++)
        v = v << 8 | t->p[at + (t->big ? i : size - 1 - i)];
    *out = v;
    return true;
}

/* Value of an IFD entry: one or more numbers, of which the first one counts. False when the value
 * lies outside of the block; types that cannot be compared with an orientation give 0. */
static bool entry_value(const tiff *t, size_t at, int *out) {
    static const uint8_t SIZES[] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4};
    uint32_t type, count, value = 0;
    if (!number(t, at + 2, 2, &type) || !number(t, at + 4, 4, &count) || count == 0 || type == 0 ||
        type >= sizeof SIZES)
        return false;
    size_t size = SIZES[type], where = at + 8;
    if (count > 4 / size) { /* too many to stand in the entry itself */
        uint32_t offset;
        if (!number(t, where, 4, &offset) || offset > t->n || count > (t->n - offset) / size)
            return false;
        where = offset;
    }
    bool whole = type == 3 || type == 4 || type == 6 || type == 8 || type == 9 || type == 13;
    if (whole && !number(t, where, size, &value))
        return false;
    *out = value <= 0xff ? (int)value : 0;
    return true;
}

int qie_exif_orientation(const uint8_t *block, size_t n) {
    for (int i = 0; i < 2 && n >= 6 && !memcmp(block, "Exif\0\0", 6); i++) {
        block += 6;
        n -= 6;
    }
    if (n < 8)
        return 0;
    /* 42 in the wrong byte order is written by some cameras, and read by Pillow. */
    bool forty_two = (block[2] == 42 && block[3] == 0) || (block[2] == 0 && block[3] == 42);
    bool big = block[0] == 'M' && block[1] == 'M', little = block[0] == 'I' && block[1] == 'I';
    if (!forty_two || (!big && !little))
        return 0;
    tiff t = {block, n, big};
    uint32_t ifd, count, tag;
    int found = 0;
    if (!number(&t, 4, 4, &ifd) || !number(&t, ifd, 2, &count))
        return 0;
    for (uint32_t i = 0; i < count; i++) {
        size_t at = (size_t)ifd + 2 + (size_t)i * 12;
        if (at > n || n - at < 12 || !number(&t, at, 2, &tag))
            break;
        if (tag == TAG_ORIENTATION && entry_value(&t, at, &found))
            break; /* the first readable one counts */
    }
    return found;
}

int qie_xmp_orientation(const uint8_t *xmp, size_t n) {
    static const char KEY[] = "tiff:Orientation";
    const size_t key = sizeof KEY - 1;
    const uint8_t *p = xmp, *end = xmp + n;
    while ((p = memmem(p, (size_t)(end - p), KEY, key))) {
        p += key;
        size_t left = (size_t)(end - p);
        size_t skip = left >= 1 && p[0] == '>' ? 1 : left >= 2 && !memcmp(p, "=\"", 2) ? 2 : 0;
        if (skip && left > skip && p[skip] >= '0' && p[skip] <= '9')
            return p[skip] - '0';
    }
    return 0;
}

static int png_profile_orientation(const uint8_t *bytes, size_t n) {
    char *text;
    size_t len;
    if (qie_png_text(bytes, n, "Raw profile type exif", &text, &len, NULL) != QIE_OK || !text)
        return 0;
    /* ImageMagick's form: an empty line, "exif", the length, then lines of hexadecimal digits. */
    const char *p = text, *end = text + len;
    for (int line = 0; line < 3 && p; line++)
        p = memchr(p, '\n', (size_t)(end - p))
                ? (const char *)memchr(p, '\n', (size_t)(end - p)) + 1
                : NULL;
    uint8_t *block = p ? malloc((size_t)(end - p) / 2 + 1) : NULL;
    size_t n_digits = 0;
    for (; block && p < end; p++) {
        int c = (unsigned char)*p;
        int v = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (v < 0)
            continue;
        uint8_t *to = block + n_digits / 2;
        *to = (uint8_t)(n_digits % 2 ? *to | v : v << 4);
        n_digits++;
    }
    int found = block ? qie_exif_orientation(block, n_digits / 2) : 0;
    free(block);
    free(text);
    return found;
}

static int png_orientation(const uint8_t *bytes, size_t n) {
    qie_image_part part, exif = {0};
    for (size_t pos = 0; qie_png_next(bytes, n, &pos, &part);)
        if (part.type == QIE_FOURCC('e', 'X', 'I', 'f'))
            exif = part;
    int found =
        exif.data ? qie_exif_orientation(exif.data, exif.n) : png_profile_orientation(bytes, n);
    if (found)
        return found;
    char *xmp;
    size_t len;
    if (qie_png_text(bytes, n, "XML:com.adobe.xmp", &xmp, &len, NULL) != QIE_OK || !xmp)
        return 0;
    found = qie_xmp_orientation((const uint8_t *)xmp, len);
    free(xmp);
    return found;
}

static bool begins(const qie_image_part *part, const char *with, size_t n) {
    return part->n >= n && !memcmp(part->data, with, n);
}

static int jpeg_orientation(const uint8_t *bytes, size_t n) {
    static const char XMP[] = "http://ns.adobe.com/xap/1.0/"; /* its NUL belongs to it */
    qie_image_part part, exif = {0}, xmp = {0};
    for (size_t pos = 0; qie_jpeg_next(bytes, n, &pos, &part);) {
        if (part.type != 0xe1)
            continue;
        if (begins(&part, "Exif\0\0", 6) && !exif.data)
            exif = part; /* further ones continue it; the first directory stands in the first one */
        else if (begins(&part, XMP, sizeof XMP))
            xmp = part;
    }
    int found = exif.data ? qie_exif_orientation(exif.data, exif.n) : 0;
    return found || !xmp.data ? found
                              : qie_xmp_orientation(xmp.data + sizeof XMP, xmp.n - sizeof XMP);
}

static int webp_orientation(const uint8_t *bytes, size_t n) {
    qie_image_part part, exif = {0}, xmp = {0};
    uint8_t flags = 0;
    for (size_t pos = 0; qie_webp_next(bytes, n, &pos, &part);) {
        if (part.type == QIE_FOURCC('V', 'P', '8', 'X') && part.n > 0)
            flags = part.data[0]; /* metadata counts only when announced here */
        else if (part.type == QIE_FOURCC('E', 'X', 'I', 'F') && flags & 0x08 && !exif.data)
            exif = part;
        else if (part.type == QIE_FOURCC('X', 'M', 'P', ' ') && flags & 0x04 && !xmp.data)
            xmp = part;
    }
    int found = exif.data ? qie_exif_orientation(exif.data, exif.n) : 0;
    return found || !xmp.data ? found : qie_xmp_orientation(xmp.data, xmp.n);
}

int qie_image_orientation(qie_image_format format, const uint8_t *bytes, size_t n) {
    switch (format) {
    case QIE_IMAGE_PNG: return png_orientation(bytes, n);
    case QIE_IMAGE_JPEG: return jpeg_orientation(bytes, n);
    case QIE_IMAGE_WEBP: return webp_orientation(bytes, n);
    case QIE_IMAGE_UNKNOWN: break;
    }
    return 0;
}
