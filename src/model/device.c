#define _GNU_SOURCE
#include "model/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/log.h"
#include "base/nvml.h"
#include "base/parallel.h"
#include "compute/plugin.h"
#include "plan/memory.h"
#include "plan/placement.h"

/* What of free host memory is left alone when streamed weights are pinned in it. */
#define HOST_RESERVE ((int64_t)4 << 30)

static void say(void *arg, const char *text) {
    qie_device_said *said = arg;
    qie_log(QIE_LOG_WARN, "device", "%s", text);
    if (said->n < (int)(sizeof said->text / sizeof *said->text))
        snprintf(said->text[said->n++], sizeof *said->text, "%s", text);
}

/* Position among the plugin's devices of what a word of --gpus names: a physical index (the
 * driver's order, which need not be CUDA's) or the beginning of a UUID. */
static int find_device(const char *word, const qie_device_info *d, int n, const qie_gpus *gpus) {
    char *end;
    long index = strtol(word, &end, 10);
    const char *uuid = word;
    if (*word && !*end) {
        uuid = NULL;
        for (int i = 0; i < gpus->n; i++)
            if (gpus->gpus[i].index == index)
                uuid = gpus->gpus[i].uuid;
        if (!uuid && gpus->state != QIE_GPUS_OK) /* nobody to ask: CUDA's own count */
            return index >= 0 && index < n ? (int)index : -1;
    }
    for (int i = 0; uuid && *uuid && i < n; i++)
        if (!strncmp(d[i].uuid, uuid, strlen(uuid)))
            return i;
    return -1;
}

/* What the driver says of a device: its index and its free memory. */
static void note_device(const qie_device_info *d, int at, const qie_gpus *gpus,
                        qie_device_options *o) {
    int i_out = o->n_devices++;
    o->devices[i_out] = at;
    o->numbers[i_out] = at;
    o->listed[i_out] = 0;
    for (int i = 0; i < gpus->n; i++) {
        const qie_gpu *g = &gpus->gpus[i];
        if (strcmp(g->uuid, d[at].uuid))
            continue;
        o->numbers[i_out] = g->index;
        o->listed[i_out] = g->free > 0 ? (int64_t)g->free : 0;
    }
}

static qie_status choose(const char *list, const qie_device_info *d, int n, const qie_gpus *gpus,
                         qie_device_options *o, qie_error *err) {
    char copy[1024], *save = NULL;
    if (!list || !*list || !strcmp(list, "auto")) {
        for (int i = 0; i < n && i < QIE_ASSIGN_CARDS_MAX; i++)
            note_device(d, i, gpus, o);
        return QIE_OK;
    }
    snprintf(copy, sizeof copy, "%s", list);
    for (char *w = strtok_r(copy, ", ", &save); w; w = strtok_r(NULL, ", ", &save)) {
        int at = find_device(w, d, n, gpus);
        QIE_FAIL_IF(at < 0, QIE_E_INVALID, err, "gpus",
                    "'%s' names no GPU that this process can see", w);
        QIE_FAIL_IF(o->n_devices == QIE_ASSIGN_CARDS_MAX, QIE_E_INVALID, err, "gpus",
                    "more than %d GPUs are named", QIE_ASSIGN_CARDS_MAX);
        for (int i = 0; i < o->n_devices; i++)
            QIE_FAIL_IF(o->devices[i] == at, QIE_E_INVALID, err, "gpus", "GPU '%s' is named twice",
                        w);
        note_device(d, at, gpus, o);
    }
    QIE_FAIL_IF(!o->n_devices, QIE_E_INVALID, err, "gpus", "no GPU is named");
    return QIE_OK;
}

static qie_status open_on(const qie_plugin *plugin, const qie_gpus *gpus,
                          const qie_engine_options *o, qie_model *m, qie_device_said *said,
                          qie_compute **out, qie_error *err) {
    qie_device_info found[32];
    int n = 0;
    QIE_TRY(plugin->devices(found, 32, &n, err));
    int64_t host = qie_memory_available() - HOST_RESERVE;
    qie_device_options d = {.headroom = o->gpu_headroom_bytes,
                            .limit = o->gpu_limit_bytes,
                            .host_bytes = host > 0 ? host : 0,
                            .offload_folder = o->gpu_offload_folder,
                            .n_passes = 2,
                            .n_threads = o->n_threads > 0 ? o->n_threads : qie_cpu_count(),
                            .say = say,
                            .say_arg = said};
    QIE_TRY(choose(o->gpus, found, n, gpus, &d, err));
    qie_compute_limits limits = qie_model_limits(&m->config);
    QIE_TRY(plugin->create(&d, &limits, out, err));
    qie_weight_group **groups = NULL;
    size_t n_groups = 0;
    qie_status st = qie_model_groups(m, &groups, &n_groups, err);
    if (st == QIE_OK)
        st = (*out)->mem->load(*out, groups, n_groups, err);
    free(groups);
    if (st != QIE_OK) {
        qie_compute_destroy(*out);
        *out = NULL;
    }
    return st;
}

qie_status qie_device_open(const qie_engine_options *o, qie_model *m, qie_device_said *said,
                           qie_compute **out, qie_error *err) {
    const qie_plugin *plugin;
    *out = NULL;
    QIE_TRY(qie_plugin_open(NULL, &plugin, err));
    qie_gpus *gpus = calloc(1, sizeof *gpus);
    QIE_FAIL_IF(!gpus, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    qie_gpus_probe(5000, gpus); /* before this process takes memory of a card itself */
    qie_status st = open_on(plugin, gpus, o, m, said, out, err);
    free(gpus);
    return st;
}
