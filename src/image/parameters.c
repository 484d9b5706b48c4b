#define _GNU_SOURCE
#include "image/parameters.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "image/codec.h"
#include "image/sniff.h"

/* A proper XMP packet, so that other programs keep it; the value is ours alone. */
static const char XMP_BEGIN[] =
    "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF "
    "xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\"><rdf:Description rdf:about=\"\" "
    "xmlns:qwen-edit=\"urn:qwen-edit:1\"><qwen-edit:parameters>";
static const char XMP_END[] = "</qwen-edit:parameters></rdf:Description></rdf:RDF></x:xmpmeta>";
static const char VALUE_BEGIN[] = "<qwen-edit:parameters>", VALUE_END[] = "</qwen-edit:parameters>";

static const struct {
    char c;
    const char *entity;
} ENTITIES[] = {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'\r', "&#13;"}};
#define N_ENTITIES (sizeof ENTITIES / sizeof ENTITIES[0])

void qie_parameters_xmp(const char *parameters, qie_strbuf *out) {
    qie_strbuf_puts(out, XMP_BEGIN);
    for (const char *p = parameters; *p; p++) {
        size_t i = 0;
        while (i < N_ENTITIES && ENTITIES[i].c != *p)
            i++;
        if (i < N_ENTITIES)
            qie_strbuf_puts(out, ENTITIES[i].entity);
        else
            qie_strbuf_append(out, p, 1);
    }
    qie_strbuf_puts(out, XMP_END);
}

static void unescape(const char *p, size_t n, qie_strbuf *out) {
    for (size_t i = 0; i < n;) {
        size_t e = 0;
        while (e < N_ENTITIES && (n - i < strlen(ENTITIES[e].entity) ||
                                  memcmp(p + i, ENTITIES[e].entity, strlen(ENTITIES[e].entity))))
            e++;
        qie_strbuf_append(out, e < N_ENTITIES ? &ENTITIES[e].c : p + i, 1);
        i += e < N_ENTITIES ? strlen(ENTITIES[e].entity) : 1;
    }
}

/* Each reader appends what it finds and tells whether there was anything. */
static bool read_webp(const uint8_t *bytes, size_t n, qie_strbuf *out) {
    qie_image_part part;
    for (size_t pos = 0; qie_webp_next(bytes, n, &pos, &part);) {
        if (part.type != QIE_FOURCC('X', 'M', 'P', ' '))
            continue;
        const char *begin = memmem(part.data, part.n, VALUE_BEGIN, sizeof VALUE_BEGIN - 1);
        if (!begin)
            continue;
        begin += sizeof VALUE_BEGIN - 1;
        size_t left = part.n - (size_t)(begin - (const char *)part.data);
        const char *end = memmem(begin, left, VALUE_END, sizeof VALUE_END - 1);
        if (!end)
            continue;
        unescape(begin, (size_t)(end - begin), out);
        return true;
    }
    return false;
}

static bool read_jpeg(const uint8_t *bytes, size_t n, qie_strbuf *out) {
    const size_t prefix = sizeof QIE_PARAMETERS_COM - 1;
    qie_image_part part;
    bool found = false;
    for (size_t pos = 0; qie_jpeg_next(bytes, n, &pos, &part);) {
        if (part.type != 0xfe || part.n < prefix || memcmp(part.data, QIE_PARAMETERS_COM, prefix))
            continue;
        qie_strbuf_append(out, part.data + prefix, part.n - prefix);
        found = true;
    }
    return found;
}

static qie_status read_png(const uint8_t *bytes, size_t n, qie_strbuf *out, bool *found,
                           qie_error *err) {
    char *text;
    size_t len;
    QIE_TRY(qie_png_text(bytes, n, "qwen-edit", &text, &len, err));
    *found = text != NULL;
    if (text)
        qie_strbuf_append(out, text, len);
    free(text);
    return QIE_OK;
}

qie_status qie_image_read_parameters(const void *bytes, size_t n, char **out, qie_error *err) {
    *out = NULL;
    qie_strbuf text;
    qie_strbuf_init(&text, (size_t)1 << 40); /* the file bounds it: failing then means memory */
    bool found = false;
    qie_status st = QIE_OK;
    switch (qie_image_sniff(bytes, n)) {
    case QIE_IMAGE_PNG: st = read_png(bytes, n, &text, &found, err); break;
    case QIE_IMAGE_JPEG: found = read_jpeg(bytes, n, &text); break;
    case QIE_IMAGE_WEBP: found = read_webp(bytes, n, &text); break;
    case QIE_IMAGE_UNKNOWN:
        st = qie_fail(err, QIE_E_UNSUPPORTED, "image", "this is not a PNG, JPEG or WebP picture");
        break;
    }
    if (st == QIE_OK && found) {
        qie_strbuf_append(&text, "", 0); /* an empty text is a text too */
        size_t len = text.len;
        if (!text.failed && (len > QIE_PARAMETERS_MAX || !qie_utf8_valid(text.data, len) ||
                             strlen(text.data) != len))
            st =
                qie_fail(err, QIE_E_INVALID, "image",
                         "the parameters stored in the picture are damaged or longer than %u bytes",
                         QIE_PARAMETERS_MAX);
        else if (!(*out = qie_strbuf_take(&text)))
            st = qie_fail(err, QIE_E_NO_MEMORY, "image",
                          "out of memory while reading the parameters of a picture");
    }
    qie_strbuf_release(&text);
    return st;
}
