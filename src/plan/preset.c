#include "plan/preset.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char *find(const char *text, const char *word) {
    size_t n = strlen(word);
    for (; *text; text++)
        if (!strncasecmp(text, word, n))
            return text;
    return NULL;
}

static bool is_digit(char c) {
    return isdigit((unsigned char)c);
}

int qie_preset_steps(const char *text) {
    const char *start = text;
    for (const char *p = text; (p = find(p, "step")) != NULL; p++) {
        const char *end = p;
        while (end > start && (end[-1] == '-' || end[-1] == '_' || end[-1] == ' '))
            end--;
        const char *from = end;
        while (from > start && is_digit(from[-1]))
            from--;
        long n = from < end && end - from <= 2 ? strtol(from, NULL, 10) : 0;
        if (n >= 1 && n <= 64)
            return (int)n;
    }
    return 0;
}

qie_preset qie_preset_from_name(const char *name) {
    qie_preset p = {.lightning = find(name, "lightning") != NULL};
    if (p.lightning)
        p.num_inference_steps = qie_preset_steps(name);
    return p;
}

bool qie_scheduler_is_lightning(const qie_scheduler_config *c) {
    double ln3 = log(3.0);
    return c->use_dynamic_shifting && c->exponential && c->shift_terminal == 0 &&
           fabs(c->base_shift - ln3) < 1e-6 && fabs(c->max_shift - ln3) < 1e-6;
}

void qie_scheduler_set_lightning(qie_scheduler_config *c) {
    c->use_dynamic_shifting = true;
    c->exponential = true;
    c->base_shift = c->max_shift = log(3.0);
    c->shift_terminal = 0;
    c->shift = 1;
    c->base_image_seq_len = 256;
    c->max_image_seq_len = 8192;
}
