#include "cli/loras.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

/* A weight behind the last colon, if what stands there is a number; a file name may hold colons. */
static double split_weight(char *text) {
    char *colon = strrchr(text, ':'), *end;
    if (!colon || !colon[1] || colon == text)
        return 1;
    double w = strtod(colon + 1, &end);
    if (*end || !isfinite(w))
        return 1;
    *colon = 0;
    return w;
}

qie_status cli_read_loras(const cli_values *v, bool own, cli_loras *out, qie_error *err) {
    const cli_value *value = own ? &v->own[OPT_LORA] : cli_get(v, OPT_LORA);
    const char *where = v->parent ? "lora" : "--lora";
    memset(out, 0, sizeof *out);
    QIE_FAIL_IF(value->n > QIE_MAX_LORAS, QIE_E_INVALID, err, where, "%s: %zu LoRAs, at most %d",
                where, value->n, QIE_MAX_LORAS);
    for (size_t i = 0; i < value->n; i++) {
        QIE_FAIL_IF(!*value->texts[i] || strlen(value->texts[i]) >= sizeof out->paths[i],
                    QIE_E_INVALID, err, where, "%s: '%.100s' is no path", where, value->texts[i]);
        snprintf(out->paths[i], sizeof out->paths[i], "%s", value->texts[i]);
        double weight = split_weight(out->paths[i]);
        out->uses[i] = (qie_lora_use){.path = out->paths[i], .weight = weight};
    }
    out->n = value->n;
    return QIE_OK;
}

qie_status cli_open_with_loras(const cli_values *v, const qie_engine_options *options,
                               qie_engine **engine, qie_error *err) {
    qie_engine_options o = *options;
    cli_loras *loras = malloc(sizeof *loras);
    *engine = NULL;
    QIE_FAIL_IF(!loras, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_status st = cli_read_loras(v, false, loras, err);
    o.loras = loras->uses;
    o.n_loras = loras->n;
    if (st == QIE_OK)
        st = qie_engine_open(&o, engine, err);
    free(loras);
    return st;
}

qie_json *cli_loras_json(const qie_edit_plan *p) {
    qie_json *list = qie_json_new_array();
    for (size_t i = 0; i < p->n_loras; i++) {
        qie_json *one = qie_json_new_object(), *name = qie_json_new_string(p->loras[i].name);
        qie_json_put(one, "name", name ? name : qie_json_new_null());
        qie_json_put(one, "weight", qie_json_new_double(p->loras[i].weight));
        qie_json_push(list, one);
    }
    return list;
}
