/* Results as files: encoded pictures and their paths, written one after the other. */
#ifndef QIE_CLI_OUTPUT_H
#define QIE_CLI_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "qie/image.h"

typedef struct cli_output {
    char *path; /* both owned */
    uint8_t *bytes;
    size_t n;
} cli_output;

void cli_outputs_release(cli_output *list, size_t n);
/* Write each as a whole; its path goes to stdout when `paths` is set. Errors: QIE_E_IO,
 * QIE_E_CANCELLED. */
qie_status cli_outputs_write(const cli_output *list, size_t n, bool paths, qie_error *err);
/* "output_path", and "images" when there are several. */
void cli_outputs_json(const cli_output *list, size_t n, qie_json *to);

/* Encode and write one picture. quality 0: the encoder's default; parameters may be NULL. */
qie_status cli_write_picture(const char *path, const qie_image *image, qie_image_format format,
                             int quality, const char *parameters, qie_error *err);

#endif
