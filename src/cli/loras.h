/* The values of --lora, and of the field lora of a batch line: FILE or FILE:WEIGHT. */
#ifndef QIE_CLI_LORAS_H
#define QIE_CLI_LORAS_H

#include "cli/options.h"
#include "qie/edit.h"

typedef struct cli_loras {
    qie_lora_use uses[QIE_MAX_LORAS]; /* paths are ours */
    char paths[QIE_MAX_LORAS][4096];
    size_t n;
} cli_loras;

/* `own`: only those of these values, not of their parent. Errors: QIE_E_INVALID. */
qie_status cli_read_loras(const cli_values *v, bool own, cli_loras *out, qie_error *err);
/* qie_engine_open with the LoRAs of these values. */
qie_status cli_open_with_loras(const cli_values *v, const qie_engine_options *options,
                               qie_engine **engine, qie_error *err);
/* [{"name", "weight"}] of a plan, as the service answers. */
qie_json *cli_loras_json(const qie_edit_plan *p);

#endif
