/* One edit as the user asked for it: values checked as far as possible without a model, input
 * pictures read. */
#ifndef QIE_CLI_REQUEST_H
#define QIE_CLI_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cli/loras.h"
#include "cli/options.h"
#include "qie/edit.h"
#include "qie/image.h"

typedef struct cli_request {
    const char *paths[QIE_MAX_IMAGES]; /* borrowed from the values, like every text here */
    size_t n_paths;
    const char *output;  /* NULL with --dry-run and no -o */
    const char *preview; /* NULL: none */
    qie_image_format format, preview_format;
    int quality; /* 0: default of the encoder */
    bool metadata, seed_named, force_seed;
    bool cache_named;         /* for this call: a service is told */
    qie_edit_options options; /* numbers and texts; images set by cli_request_load */
    cli_loras loras;          /* of a batch line that names its own, else of the command line */
    size_t n_named_loras;     /* of these, those for a service: all or none */
    qie_injection injections[8];
    char injection_names[8][64];
    /* filled by cli_request_load */
    qie_image *pictures[QIE_MAX_IMAGES];
    const qie_image *views[QIE_MAX_IMAGES];
    uint64_t made_with[QIE_MAX_IMAGES]; /* seed in a picture's metadata */
    bool has_seed[QIE_MAX_IMAGES];
} cli_request;

/* Where --prompt-file is given: read it and make its text the prompt. */
qie_status cli_read_prompt_file(cli_values *values, qie_error *err);

/* Values to request, without touching a file. Errors: QIE_E_USAGE, QIE_E_INVALID,
 * QIE_E_UNSUPPORTED; param names the flag or, in a batch, the field. */
qie_status cli_request_read(const cli_values *values, cli_request *request, qie_error *err);
/* Every file to be written can be. Errors: QIE_E_IO. */
qie_status cli_request_check_outputs(const cli_request *request, qie_error *err);
/* The bytes of picture i as they stand in its file (free with free()). Errors: QIE_E_NOT_FOUND,
 * QIE_E_IO, QIE_E_INVALID (folder), QIE_E_TOO_LARGE. */
qie_status cli_request_read_picture(const cli_request *request, size_t i, unsigned char **bytes,
                                    size_t *n, qie_error *err);
/* Read and decode the pictures. Errors: QIE_E_NOT_FOUND, QIE_E_INVALID, QIE_E_UNSUPPORTED,
 * QIE_E_TOO_LARGE. */
qie_status cli_request_load(cli_request *request, qie_error *err);
/* The seed: random, or the one named; when an input was made with that one, another, with a
 * warning. */
void cli_request_choose_seed(cli_request *request);
/* Free the pictures. The request may be loaded again. */
void cli_request_release(cli_request *request);

/* Path of result i of n, new string: as given for n == 1, else "dir/name-<i+1>.ext". */
char *cli_output_path(const char *output, int i, int n);

#endif
