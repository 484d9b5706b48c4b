#define _GNU_SOURCE
#include "cli/place.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fs.h"
#include "base/log.h"
#include "cli/ui.h"

bool cli_speaks_chinese(void) {
    static const char *const names[] = {"LC_ALL", "LC_MESSAGES", "LANG"};
    for (size_t i = 0; i < 3; i++) {
        const char *value = getenv(names[i]);
        if (value && *value)
            return !strncmp(value, "zh", 2);
    }
    return false;
}

char *cli_find_plugin(void) {
    /* Where compute/plugin.c looks. */
    static const char *const places[] = {"", "../lib/qwen-edit/", "../"};
    char self[PATH_MAX];
    const char *named = getenv("QIE_CUDA_PLUGIN");
    if (named && *named)
        return strdup(named);
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        return NULL;
    self[n] = 0;
    *(strrchr(self, '/') + 1) = 0;
    for (size_t i = 0; i < 3; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s%sqie_cuda.so", self, places[i]) < 0)
            return NULL;
        if (qie_file_exists(path))
            return path;
        free(path);
    }
    return NULL;
}

qie_status cli_place(const cli_values *values, const char *model, const char *gpus, bool each,
                     qie_place *out, qie_error *err) {
    const char *device = cli_text(values, OPT_DEVICE, "auto"), *root = getenv("QIE_ROOT");
    char *plugin = cli_find_plugin();
    qie_place_options o = {
        .model_dir = !strcmp(model, "demo") ? NULL : model,
        .device = !strcmp(device, "cpu")    ? QIE_DEVICE_CPU
                  : !strcmp(device, "cuda") ? QIE_DEVICE_CUDA
                                            : QIE_DEVICE_AUTO,
        .gpus = gpus,
        .each = each,
        .headroom =
            (int64_t)(cli_number(values, OPT_HEADROOM, QIE_DEFAULT_HEADROOM_GIB) * 1073741824.0),
        .cuda_visible = getenv("CUDA_VISIBLE_DEVICES"),
        .plugin = plugin,
        .root = root ? root : "",
        .chinese = cli_speaks_chinese(),
    };
    if (o.device == QIE_DEVICE_AUTO && !gpus && cli_is_set(values, OPT_BACKEND))
        o.device = QIE_DEVICE_CPU;
    qie_status st = qie_place_choose(&o, out, err);
    free(plugin);
    if (st == QIE_OK && out->note[0]) {
        if (out->warned)
            cli_warn("%s", out->note);
        else
            cli_note("%s", out->note);
    }
    return st;
}

static void put_need(qie_json *o, const char *name, const qie_placement_verdict *v) {
    qie_json *row = qie_json_new_object();
    qie_json_put(row, "needs", qie_json_new_int(v->need));
    qie_json_put(row, "there", qie_json_new_int(v->have));
    qie_json_put(row, "fits", qie_json_new_bool(v->fits));
    qie_json_put(o, name, row);
}

qie_json *cli_place_describe(const char *model) {
    const char *root = getenv("QIE_ROOT"), *gib = getenv("QWEN_EDIT_GPU_HEADROOM_GIB");
    double headroom = gib && *gib ? strtod(gib, NULL) : QIE_DEFAULT_HEADROOM_GIB;
    qie_place_options o = {.model_dir = !strcmp(model, "demo") ? NULL : model,
                           .headroom = (int64_t)(headroom * 1073741824.0),
                           .cuda_visible = getenv("CUDA_VISIBLE_DEVICES"),
                           .root = root ? root : "",
                           .chinese = cli_speaks_chinese()};
    qie_placement p;
    char words[600];
    qie_place_describe(&o, &p, words, sizeof words);
    qie_json *out = qie_json_new_object();
    qie_json_put(out, "here", qie_json_new_string(words));
    put_need(out, "one_gpu", &p.resident);
    put_need(out, "several_gpus", &p.sharded);
    put_need(out, "one_gpu_streamed", &p.streamed);
    put_need(out, "cpu", &p.cpu);
    return out;
}
