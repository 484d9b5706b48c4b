/* Texts of requests: base64 and multipart/form-data, strict and without copies where possible. */
#ifndef QIE_SERVICE_PARSE_H
#define QIE_SERVICE_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"

/* Standard alphabet, padding required or left out, line ends ignored. New buffer in *out (free()).
 */
bool svc_base64_decode(const char *text, size_t n, uint8_t **out, size_t *n_out);
/* Bytes that n bytes take, without a NUL. */
size_t svc_base64_length(size_t n);
/* Writes svc_base64_length(n) characters. */
void svc_base64_encode(const uint8_t *bytes, size_t n, char *out);

/* One part of a form. Views into the body; name and filename are copied. */
typedef struct svc_part_view {
    char name[64];
    bool is_file;
    const char *data;
    size_t n;
} svc_part_view;

typedef struct svc_multipart {
    const char *at, *end;
    char boundary[80]; /* with the leading dashes */
    size_t n_boundary;
} svc_multipart;

/* Content type and body. Errors: QIE_E_SYNTAX. */
qie_status svc_multipart_begin(svc_multipart *m, const char *content_type, const char *body,
                               size_t n, qie_error *err);
/* *more false behind the last part. Errors: QIE_E_SYNTAX. */
qie_status svc_multipart_next(svc_multipart *m, svc_part_view *part, bool *more, qie_error *err);

#endif
