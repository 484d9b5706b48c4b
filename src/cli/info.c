/* The command info: what an edited picture, a model folder or a weight file contains. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "cli/commands.h"
#include "cli/model_choice.h"
#include "cli/place.h"
#include "hub/cache.h"
#include "qie/edit.h"
#include "qie/image.h"

#define PICTURE_MAX_BYTES (256u << 20)
#define INDENT 2

/* ---------------------------------------------------------------- JSON as text for people */

static void print_value(const qie_json *value, int indent);

static bool is_scalar(const qie_json *v) {
    return !qie_json_is_object(v) && !qie_json_is_array(v);
}

static void print_scalar(const qie_json *v) {
    if (qie_json_is_string(v)) {
        fputs(qie_json_string(v, NULL), stdout);
        return;
    }
    char *text = qie_json_text(v, 0);
    fputs(text ? text : "?", stdout);
    free(text);
}

/* Arrays of plain values on one line ("3 x 64 x 64" is for shapes, which are such arrays). */
static bool is_flat(const qie_json *v) {
    if (!qie_json_is_array(v))
        return is_scalar(v);
    for (size_t i = 0; i < qie_json_size(v); i++)
        if (!is_scalar(qie_json_at(v, i)))
            return false;
    return true;
}

static void print_flat(const qie_json *v) {
    if (is_scalar(v)) {
        print_scalar(v);
        return;
    }
    for (size_t i = 0; i < qie_json_size(v); i++) {
        if (i)
            fputs(", ", stdout);
        print_scalar(qie_json_at(v, i));
    }
}

/* A table row: an object whose members are all flat, as the tensors of a file are. */
static bool is_row(const qie_json *v);

static bool flat_member(void *arg, const char *key, qie_json *value) {
    (void)arg;
    (void)key;
    return is_flat(value);
}

static bool is_row(const qie_json *v) {
    return qie_json_is_object(v) && qie_json_each(v, flat_member, NULL);
}

static bool print_cell(void *arg, const char *key, qie_json *value) {
    bool *first = arg;
    if (!*first)
        fputs("  ", stdout);
    if (strcmp(key, "name") != 0 && strcmp(key, "dtype") != 0)
        printf("%s ", key);
    print_flat(value);
    *first = false;
    return true;
}

static bool print_member(void *arg, const char *key, qie_json *value) {
    int indent = *(int *)arg;
    printf("%*s%s:", indent, "", key);
    if (is_flat(value)) {
        putchar(' ');
        print_flat(value);
        bool bytes = !strcmp(key, "bytes") || !strcmp(key, "needs") || !strcmp(key, "there");
        double n = qie_json_number(value);
        if (bytes && n >= 1 << 30)
            printf(" (%.1f GiB)", n / (1 << 30));
        else if (bytes && n >= 1 << 20)
            printf(" (%.1f MiB)", n / (1 << 20));
        putchar('\n');
    } else {
        putchar('\n');
        print_value(value, indent + INDENT);
    }
    return true;
}

static void print_value(const qie_json *value, int indent) {
    if (qie_json_is_object(value)) {
        qie_json_each(value, print_member, &indent);
        return;
    }
    for (size_t i = 0; i < qie_json_size(value); i++) {
        const qie_json *item = qie_json_at(value, i);
        if (is_row(item)) {
            bool first = true;
            printf("%*s", indent, "");
            qie_json_each(item, print_cell, &first);
            putchar('\n');
        } else {
            printf("%*s-\n", indent, "");
            print_value(item, indent + INDENT);
        }
    }
}

static void print_result(qie_json *o, bool json) {
    if (json) {
        char *text = qie_json_text(o, 0);
        puts(text ? text : "{}");
        free(text);
    } else if (is_scalar(o)) {
        print_scalar(o);
        putchar('\n');
    } else
        print_value(o, 0);
}

/* ---------------------------------------------------------------- kinds of things */

static qie_status describe_picture(const char *path, const unsigned char *bytes, size_t n,
                                   qie_json *o, qie_error *err) {
    qie_image_format format;
    int width, height;
    /* Telling what a picture is needs no limit on its size: nothing is decoded. */
    qie_image_limits limits = {
        .min_side_px = 1, .max_side_px = 1 << 30, .max_pixels = INT64_MAX, .max_bytes = n};
    QIE_TRY(qie_image_probe(bytes, n, &limits, &format, &width, &height, err));
    char *text = NULL;
    QIE_TRY(qie_image_read_parameters(bytes, n, &text, err));
    qie_json *parameters = NULL;
    if (text && qie_json_parse(text, strlen(text), "the parameters", &parameters, NULL) != QIE_OK)
        parameters = qie_json_new_string(text);
    free(text);
    qie_json *name = qie_json_new_string(path);
    qie_json_put(o, "file", name ? name : qie_json_new_null());
    qie_json_put(o, "format", qie_json_new_string(qie_image_format_name(format)));
    qie_json_put(o, "width", qie_json_new_int(width));
    qie_json_put(o, "height", qie_json_new_int(height));
    qie_json_put(o, "parameters", parameters ? parameters : qie_json_new_null());
    return QIE_OK;
}

static qie_status info_picture(const char *path, bool json, qie_error *err) {
    unsigned char *bytes = NULL;
    size_t n;
    QIE_TRY(qie_file_read(path, PICTURE_MAX_BYTES, &bytes, &n, err));
    qie_json *o = qie_json_new_object();
    qie_status st = describe_picture(path, bytes, n, o, err);
    if (st == QIE_OK) {
        print_result(o, json);
        if (!json && !qie_json_member(o, "parameters"))
            puts("(not written by qwen-edit, or without its parameters)");
    } else
        qie_error_context(err, "reading '%s'", path);
    qie_json_free(o);
    free(bytes);
    return st;
}

/* is_model: a whole model, which also fits somewhere or not. */
static qie_status info_model(const char *path, bool is_model, bool json, qie_error *err) {
    char *text = NULL;
    qie_json *o = NULL;
    QIE_TRY(qie_model_describe(path, &text, err));
    qie_status st = qie_json_parse(text, strlen(text), "the description", &o, err);
    if (st == QIE_OK && is_model)
        qie_json_put(o, "fits", cli_place_describe(path));
    if (st == QIE_OK)
        print_result(o, json);
    qie_json_free(o);
    free(text);
    return st;
}

/* True if the first bytes are those of a picture. */
static bool is_picture(const char *path) {
    unsigned char head[32];
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    size_t n = fread(head, 1, sizeof head, f);
    fclose(f);
    return qie_image_sniff(head, n) != QIE_IMAGE_UNKNOWN;
}

qie_status cli_run_info(cli_values *values, qie_error *err) {
    bool json = cli_on(values, OPT_JSON);
    QIE_FAIL_IF(values->n_args != 1, QIE_E_USAGE, err, NULL,
                "info needs one file or folder: qwen-edit info FILE|FOLDER");
    const char *path = values->args[0];
    if (qie_file_exists(path) && is_picture(path))
        return info_picture(path, json, err);
    if (qie_file_exists(path))
        return info_model(path, false, json, err);
    QIE_FAIL_IF(strcmp(path, "demo") != 0 && !qie_dir_exists(path) && !qie_hub_is_repo(path),
                QIE_E_NOT_FOUND, err, NULL, "'%s' does not exist", path);
    char *model = NULL;
    QIE_TRY(cli_resolve_model(path, "info", &model, err));
    qie_status st = info_model(model, true, json, err);
    free(model);
    return st;
}
