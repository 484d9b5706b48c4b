#include "cli/output.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/error.h"
#include "base/fs.h"
#include "cli/interrupt.h"

qie_status cli_write_picture(const char *path, const qie_image *image, qie_image_format format,
                             int quality, const char *parameters, qie_error *err) {
    qie_image_encode_options o = qie_image_encode_options_default();
    o.format = format;
    o.parameters = parameters;
    if (quality)
        o.quality = quality;
    uint8_t *bytes = NULL;
    size_t n;
    QIE_TRY(qie_image_encode(image, &o, &bytes, &n, err));
    qie_status st = qie_file_write_atomic(path, bytes, n, err);
    free(bytes);
    return st;
}

void cli_outputs_release(cli_output *list, size_t n) {
    for (size_t i = 0; i < n; i++) {
        free(list[i].path);
        free(list[i].bytes);
    }
}

qie_status cli_outputs_write(const cli_output *list, size_t n, bool paths, qie_error *err) {
    for (size_t i = 0; i < n; i++) {
        QIE_FAIL_IF(cli_interrupted(), QIE_E_CANCELLED, err, NULL, "interrupted");
        qie_status st = qie_file_write_atomic(list[i].path, list[i].bytes, list[i].n, err);
        /* The handler takes the temporary file away under the write, which then fails to rename it.
         */
        if (st != QIE_OK && cli_interrupted())
            return qie_fail(err, QIE_E_CANCELLED, NULL, "interrupted");
        QIE_TRY(st);
        if (paths) {
            puts(list[i].path);
            fflush(stdout);
        }
    }
    return QIE_OK;
}

static qie_json *path_json(const char *path) {
    qie_json *s = qie_json_new_string(path);
    return s ? s : qie_json_new_null(); /* a file name that is not UTF-8 */
}

void cli_outputs_json(const cli_output *list, size_t n, qie_json *to) {
    qie_json_put(to, "output_path", path_json(list[n - 1].path));
    if (n < 2)
        return;
    qie_json *images = qie_json_new_array();
    for (size_t i = 0; i < n; i++)
        qie_json_push(images, path_json(list[i].path));
    qie_json_put(to, "images", images);
}
