/* The text that we store with a picture: its frame in each format. Reading is
 * qie_image_read_parameters. */
#ifndef QIE_IMAGE_PARAMETERS_H
#define QIE_IMAGE_PARAMETERS_H

#include <stddef.h>

#include "base/strbuf.h"

/* Longest text in bytes. */
#define QIE_PARAMETERS_MAX (1u << 20)

/* JPEG: each COM segment begins with this; a text too long for one segment goes on in the next
 * ones. */
#define QIE_PARAMETERS_COM "qwen-edit "

/* The XMP packet that holds `parameters`. */
void qie_parameters_xmp(const char *parameters, qie_strbuf *out);

#endif
