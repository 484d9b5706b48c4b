#define _GNU_SOURCE
#include "service/common/job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/strbuf.h"

svc_params svc_params_default(void) {
    svc_params p;
    memset(&p, 0, sizeof p);
    p.num_images = 1;
    p.format = QIE_IMAGE_PNG;
    p.compression = -1;
    p.keep_size = -1;
    p.true_cfg_scale = -1;
    p.guidance_scale = 1;
    p.cache = p.n_loras = -1;
    return p;
}

bool svc_lora_name_is_valid(const char *name) {
    size_t n = strlen(name);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 32 || name[i] == 127 || name[i] == '/' || name[i] == '\\')
            return false;
    return n > 0 && n < SVC_LORA_NAME && name[0] != '.' && qie_utf8_valid(name, n);
}

char *svc_lora_path(const char *dir, const char *name) {
    size_t n = strlen(dir) + strlen(name) + sizeof "/" SVC_LORA_ENDING;
    char *path = svc_lora_name_is_valid(name) ? malloc(n) : NULL;
    if (path)
        snprintf(path, n, "%s/%s" SVC_LORA_ENDING, dir, name);
    return path;
}

static qie_json *loras_json(const svc_params *p) {
    qie_json *list = qie_json_new_array();
    for (int i = 0; i < p->n_loras; i++) {
        qie_json *one = qie_json_new_object();
        qie_json_put(one, "name", qie_json_new_string(p->loras[i].name));
        qie_json_put(one, "weight", qie_json_new_double(p->loras[i].weight));
        qie_json_push(list, one);
    }
    return list;
}

qie_json *svc_params_to_json(const svc_params *p) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "seed", qie_json_new_int((int64_t)p->seed));
    qie_json_put(o, "steps", qie_json_new_int(p->num_inference_steps));
    qie_json_put(o, "max_side", qie_json_new_int(p->max_side));
    qie_json_put(o, "width", qie_json_new_int(p->width));
    qie_json_put(o, "height", qie_json_new_int(p->height));
    qie_json_put(o, "n", qie_json_new_int(p->num_images));
    qie_json_put(o, "format", qie_json_new_int(p->format));
    qie_json_put(o, "compression", qie_json_new_int(p->compression));
    qie_json_put(o, "preview_px", qie_json_new_int(p->preview_px));
    qie_json_put(o, "ref_area", qie_json_new_int(p->ref_area));
    qie_json_put(o, "keep_size", qie_json_new_int(p->keep_size));
    qie_json_put(o, "force_seed", qie_json_new_int(p->force_seed));
    qie_json_put(o, "no_metadata", qie_json_new_int(p->no_metadata));
    qie_json_put(o, "cfg", qie_json_new_double(p->true_cfg_scale));
    qie_json_put(o, "guidance", qie_json_new_double(p->guidance_scale));
    if (p->cache >= 0)
        qie_json_put(o, "cache", qie_json_new_int(p->cache));
    if (p->n_loras >= 0) /* only when asked for: fingerprints of older rows stay what they were */
        qie_json_put(o, "loras", loras_json(p));
    return o;
}

static qie_status loras_from_json(const qie_json *list, svc_params *p, qie_error *err) {
    if (!list)
        return QIE_OK;
    QIE_FAIL_IF(!qie_json_is_array(list) || qie_json_size(list) > SVC_MAX_LORAS, QIE_E_CORRUPT, err,
                "loras", "'loras' is no list of at most %d", SVC_MAX_LORAS);
    p->n_loras = (int32_t)qie_json_size(list);
    for (size_t i = 0; i < qie_json_size(list); i++) {
        const qie_json *one = qie_json_at(list, i);
        const char *name = qie_json_string(qie_json_member(one, "name"), NULL);
        double weight = qie_json_number(qie_json_member(one, "weight"));
        QIE_FAIL_IF(!name || !svc_lora_name_is_valid(name) || !isfinite(weight), QIE_E_CORRUPT, err,
                    "loras", "'loras' names no file");
        snprintf(p->loras[i].name, sizeof p->loras[i].name, "%s", name);
        p->loras[i].weight = weight;
    }
    return QIE_OK;
}

qie_status svc_params_from_json(const qie_json *o, svc_params *p, qie_error *err) {
    static const struct {
        const char *key;
        size_t at;
    } ints[] = {{"steps", offsetof(svc_params, num_inference_steps)},
                {"max_side", offsetof(svc_params, max_side)},
                {"width", offsetof(svc_params, width)},
                {"height", offsetof(svc_params, height)},
                {"n", offsetof(svc_params, num_images)},
                {"format", offsetof(svc_params, format)},
                {"compression", offsetof(svc_params, compression)},
                {"preview_px", offsetof(svc_params, preview_px)}},
      /* not in the rows of older versions */
        newer[] = {{"ref_area", offsetof(svc_params, ref_area)},
                   {"keep_size", offsetof(svc_params, keep_size)},
                   {"force_seed", offsetof(svc_params, force_seed)},
                   {"no_metadata", offsetof(svc_params, no_metadata)},
                   {"cache", offsetof(svc_params, cache)}};
    int64_t v;
    *p = svc_params_default();
    QIE_TRY(qie_json_need_int(o, "seed", 0, SVC_MAX_SEED, &v, err));
    p->seed = (uint64_t)v;
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        QIE_TRY(qie_json_need_int(o, ints[i].key, -1, 1 << 20, &v, err));
        *(int32_t *)(void *)((char *)p + ints[i].at) = (int32_t)v;
    }
    for (size_t i = 0; i < sizeof newer / sizeof *newer; i++) {
        int32_t *at = (int32_t *)(void *)((char *)p + newer[i].at);
        QIE_TRY(qie_json_get_int(o, newer[i].key, *at, -1, 1 << 24, &v, err));
        *at = (int32_t)v;
    }
    QIE_TRY(loras_from_json(qie_json_member(o, "loras"), p, err));
    QIE_TRY(qie_json_get_double(o, "cfg", -1, &p->true_cfg_scale, err));
    return qie_json_get_double(o, "guidance", 1, &p->guidance_scale, err);
}

const char *svc_format_mime(int format) {
    return format == QIE_IMAGE_PNG    ? "image/png"
           : format == QIE_IMAGE_JPEG ? "image/jpeg"
           : format == QIE_IMAGE_WEBP ? "image/webp"
                                      : "application/octet-stream";
}
