#include "plan/sizes.h"

#include <math.h>
#include <string.h>

#include "base/error.h"

/* Python's round(): to nearest, ties to even; rint in the default rounding mode. */
static int round32(double v) {
    double r = 32.0 * rint(v / 32.0);
    return r > 1e8 ? 100000000 : (int)r;
}

qie_size qie_dims(double area, double ratio) {
    double w = sqrt(area * ratio), h = w / ratio; /* h from the unrounded w, as the reference */
    qie_size s = {round32(w), round32(h)};
    return s;
}

qie_size qie_smart_resize(qie_size s, int factor, int64_t min_pixels, int64_t max_pixels) {
    double h = s.h, w = s.w, f = factor;
    double hb = f * rint(h / f), wb = f * rint(w / f);
    if (hb * wb > (double)max_pixels) {
        double beta = sqrt(h * w / (double)max_pixels);
        hb = fmax(f, floor(h / beta / f) * f);
        wb = fmax(f, floor(w / beta / f) * f);
    } else if (hb * wb < (double)min_pixels) {
        double beta = sqrt((double)min_pixels / (h * w));
        hb = ceil(h * beta / f) * f;
        wb = ceil(w * beta / f) * f;
    }
    qie_size out = {(int)wb, (int)hb};
    return out;
}

double qie_area_for_max_side(int max_side, double ratio) {
    double area = QIE_DEFAULT_AREA;
    qie_size s = qie_dims(area, ratio);
    int m = s.w > s.h ? s.w : s.h;
    if (m <= max_side)
        return area;
    area *= ((double)max_side / m) * ((double)max_side / m);
    for (s = qie_dims(area, ratio); (s.w > max_side || s.h > max_side) && area > 1;
         s = qie_dims(area, ratio))
        area *= 0.99;
    return area;
}

static int pad32(int v) {
    return (v + 31) / 32 * 32;
}

static qie_status check_size(qie_size s, const char *param, const char *what, qie_error *err) {
    QIE_FAIL_IF(s.w < 16 || s.h < 16, QIE_E_INVALID, err, param,
                "the picture is too long and thin: %s would be %dx%d pixels", what, s.w, s.h);
    return QIE_OK;
}

static qie_status place_image(const qie_model_config *m, const qie_size_request *req, int i,
                              double area, qie_size_plan *out, qie_error *err) {
    qie_size in = req->images[i];
    double ratio = (double)in.w / in.h;
    QIE_FAIL_IF(ratio > 200 || ratio < 1.0 / 200, QIE_E_INVALID, err, "image",
                "picture %d is %dx%d: sides may differ by 200 times at most", i + 1, in.w, in.h);
    int merge = m->vision.spatial_merge_size, patch = m->vision.patch_size;
    qie_size cond = qie_dims(QIE_CONDITION_AREA, ratio);
    QIE_TRY(check_size(cond, "image", "its condition picture", err));
    qie_size px =
        qie_smart_resize(cond, patch * merge, m->processor.min_pixels, m->processor.max_pixels);
    QIE_TRY(check_size(px, "image", "its condition picture", err));
    out->images[i].cond = cond;
    out->images[i].grid_px = px;
    out->images[i].n_patches = px.w / patch * (px.h / patch);
    out->images[i].n_vision_tokens = out->images[i].n_patches / (merge * merge);

    qie_size padded = {pad32(in.w), pad32(in.h)};
    if (req->keep_size && !req->ref_area && (double)padded.w * padded.h <= area) {
        out->images[i].vae = padded;
        out->images[i].vae_fit = QIE_FIT_PAD;
    } else {
        out->images[i].vae = qie_dims(req->ref_area ? (double)req->ref_area : area, ratio);
        out->images[i].vae_fit = QIE_FIT_RESIZE;
    }
    QIE_TRY(check_size(out->images[i].vae, "image", "its reference", err));
    int unit = m->vae.scale_factor * m->transformer.patch_size;
    QIE_FAIL_IF(out->images[i].vae.w % unit || out->images[i].vae.h % unit, QIE_E_UNSUPPORTED, err,
                "image",
                "this model's latent unit of %d pixels does not divide sizes in steps of 32", unit);
    out->images[i].grid_w = out->images[i].vae.w / unit;
    out->images[i].grid_h = out->images[i].vae.h / unit;
    return QIE_OK;
}

qie_status qie_size_plan_make(const qie_model_config *m, const qie_size_request *req,
                              qie_size_plan *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    QIE_FAIL_IF(req->n_images < 1 || req->n_images > QIE_MAX_PICTURES, QIE_E_INVALID, err, "image",
                "%d pictures given, 1 to %d are possible", req->n_images, QIE_MAX_PICTURES);
    for (int i = 0; i < req->n_images; i++)
        QIE_FAIL_IF(req->images[i].w < 1 || req->images[i].h < 1, QIE_E_INVALID, err, "image",
                    "picture %d is empty", i + 1);
    QIE_FAIL_IF(req->max_side && (req->max_side < 64 || req->max_side > 4096), QIE_E_INVALID, err,
                "max_side", "max_side is %d, not within 64..4096", req->max_side);
    QIE_FAIL_IF(req->ref_area && (req->ref_area < 1024 || req->ref_area > (1 << 24)), QIE_E_INVALID,
                err, "ref_area", "ref_area is %lld pixels, not within 1024..16777216",
                (long long)req->ref_area);
    QIE_FAIL_IF(req->width && (req->width < 16 || req->width > 16384), QIE_E_INVALID, err, "width",
                "width is %d, not within 16..16384", req->width);
    QIE_FAIL_IF(req->height && (req->height < 16 || req->height > 16384), QIE_E_INVALID, err,
                "height", "height is %d, not within 16..16384", req->height);
    qie_size last = req->images[req->n_images - 1];
    double ratio = (double)last.w / last.h;
    double area = req->max_side ? qie_area_for_max_side(req->max_side, ratio) : QIE_DEFAULT_AREA;
    bool keep = req->keep_size && !req->width && !req->height;
    qie_size_request r = *req;
    r.keep_size = keep;
    out->n_images = req->n_images;
    for (int i = 0; i < req->n_images; i++)
        QIE_TRY(place_image(m, &r, i, area, out, err));

    int unit = m->vae.scale_factor * m->transformer.patch_size;
    qie_size padded = {pad32(last.w), pad32(last.h)};
    if (keep && (double)padded.w * padded.h <= area &&
        (!req->max_side || (last.w <= req->max_side && last.h <= req->max_side))) {
        out->generated = padded;
        out->output = last;
        out->output_fit = QIE_FIT_PAD;
    } else {
        qie_size s = qie_dims(area, ratio);
        if (req->width)
            s.w = req->width;
        if (req->height)
            s.h = req->height;
        out->generated.w = s.w / unit * unit;
        out->generated.h = s.h / unit * unit;
        out->floored = (req->width && req->width % unit) || (req->height && req->height % unit);
        out->output = keep ? last : out->generated;
        out->kept_by_resize = keep;
        out->output_fit = QIE_FIT_RESIZE;
    }
    QIE_TRY(check_size(out->generated, "image", "the result", err));
    out->grid_w = out->generated.w / unit;
    out->grid_h = out->generated.h / unit;
    out->n_target = (int64_t)out->grid_w * out->grid_h;
    for (int i = 0; i < req->n_images; i++) {
        out->n_reference += (int64_t)out->images[i].grid_w * out->images[i].grid_h;
        out->n_patches += out->images[i].n_patches;
        out->n_vision_tokens += out->images[i].n_vision_tokens;
    }
    return QIE_OK;
}

static int half_extent(int h, int w) {
    int a = h / 2, b = w / 2;
    return a > b ? a : b;
}

int qie_rope_text_start(const qie_size_plan *s) {
    int m = half_extent(s->grid_h, s->grid_w);
    for (int i = 0; i < s->n_images; i++) {
        int e = half_extent(s->images[i].grid_h, s->images[i].grid_w);
        m = e > m ? e : m;
    }
    return m;
}

qie_status qie_size_plan_check_text(const qie_size_plan *s, int64_t n_rows, int64_t n_prompt,
                                    const char *param, qie_error *err) {
    int start = qie_rope_text_start(s);
    QIE_FAIL_IF(start + n_rows > QIE_MAX_ROPE_POSITION, QIE_E_INVALID, err, param,
                "the %s and pictures take %lld tokens (%lld of them text), %d fit beside pictures "
                "of this size: shorten the %s or give fewer pictures",
                param, (long long)n_rows, (long long)n_prompt, QIE_MAX_ROPE_POSITION - start,
                param);
    return QIE_OK;
}
