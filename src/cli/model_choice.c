#define _GNU_SOURCE
#include "cli/model_choice.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "cli/ui.h"
#include "hub/cache.h"

/* "~/x" in a config file or variable, where no shell has expanded it. */
static char *expand_home(const char *name) {
    const char *home = getenv("HOME");
    char *path = NULL;
    if (strncmp(name, "~/", 2) != 0 || !home || !*home)
        return strdup(name);
    return asprintf(&path, "%s/%s", home, name + 2) < 0 ? NULL : path;
}

qie_status cli_resolve_model(const char *name, const char *where, char **model, qie_error *err) {
    *model = NULL;
    QIE_FAIL_IF(!*name, QIE_E_INVALID, err, where, "%s: the name of the model is empty", where);
    char *path = expand_home(name);
    QIE_FAIL_IF(!path, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    if (!strcmp(name, "demo") || qie_dir_exists(path)) {
        *model = path;
        return QIE_OK;
    }
    qie_status st;
    if (qie_file_exists(path))
        st = qie_fail(err, QIE_E_INVALID, where, "%s: '%s' is a file, a model folder is needed",
                      where, path);
    else if (!qie_hub_is_repo(name))
        st = qie_fail(err, QIE_E_NOT_FOUND, where, "%s: model folder '%s' does not exist", where,
                      path);
    else {
        qie_error cause;
        st = qie_hub_find_snapshot(name, NULL, model, &cause);
        if (st == QIE_OK)
            st = qie_hub_check_complete(*model, &cause);
        if (st != QIE_OK) {
            free(*model);
            *model = NULL;
            qie_fail(err, st, where,
                     "%s: there is no folder '%s', and no complete copy of that repository: %s",
                     where, name, cause.message);
        }
    }
    free(path);
    return st;
}

/* How messages call the place that named the model. */
static const char *named_by(cli_source source) {
    return source == FROM_FLAG          ? "--model"
           : source == FROM_ENVIRONMENT ? "QWEN_EDIT_2511_DIR"
                                        : "model in the config file";
}

qie_status cli_choose_model(const cli_values *values, char **model, bool *named, qie_error *err) {
    const char *name = cli_text(values, OPT_MODEL, NULL);
    *named = name != NULL;
    if (name)
        return cli_resolve_model(name, named_by(cli_get(values, OPT_MODEL)->source), model, err);
    qie_error cause;
    if (qie_hub_find_snapshot(QIE_HUB_DEFAULT_REPO, NULL, model, NULL) == QIE_OK) {
        if (qie_hub_check_complete(*model, &cause) == QIE_OK)
            return QIE_OK;
        cli_warn("the copy of %s in the cache is not complete: %s", QIE_HUB_DEFAULT_REPO,
                 cause.message);
        free(*model);
    }
    bool files = cli_is_set(values, OPT_TRANSFORMER) || cli_is_set(values, OPT_TEXT_ENCODER) ||
                 cli_is_set(values, OPT_VAE);
    *named = files;
    *model = strdup(files ? "" : "demo");
    QIE_FAIL_IF(!*model, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    return QIE_OK;
}

void cli_part_files(const cli_values *values, qie_engine_options *out) {
    out->transformer = cli_text(values, OPT_TRANSFORMER, NULL);
    out->text_encoder = cli_text(values, OPT_TEXT_ENCODER, NULL);
    out->mmproj = cli_text(values, OPT_MMPROJ, NULL);
    out->vae = cli_text(values, OPT_VAE, NULL);
    out->variant = cli_text(values, OPT_VARIANT, NULL);
}
