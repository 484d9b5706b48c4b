#define _GNU_SOURCE
#include "service/common/job.h"

#include <string.h>

#include "base/error.h"

svc_params svc_params_default(void) {
    svc_params p;
    memset(&p, 0, sizeof p);
    p.num_images = 1;
    p.format = QIE_IMAGE_PNG;
    p.compression = -1;
    p.keep_size = -1;
    p.true_cfg_scale = -1;
    p.guidance_scale = 1;
    return p;
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
    return o;
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
                   {"no_metadata", offsetof(svc_params, no_metadata)}};
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
    QIE_TRY(qie_json_get_double(o, "cfg", -1, &p->true_cfg_scale, err));
    return qie_json_get_double(o, "guidance", 1, &p->guidance_scale, err);
}

const char *svc_format_mime(int format) {
    return format == QIE_IMAGE_PNG    ? "image/png"
           : format == QIE_IMAGE_JPEG ? "image/jpeg"
           : format == QIE_IMAGE_WEBP ? "image/webp"
                                      : "application/octet-stream";
}
