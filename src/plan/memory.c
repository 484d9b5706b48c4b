#define _GNU_SOURCE
#include "plan/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "plan/tensors.h"

/* Sums are kept in double to notice overflow and in the arena's rounding to be exact. */
typedef struct sum {
    double bytes;
} sum;

static void add(sum *s, double elements, double item) {
    double n = elements * item;
    if (n < 1e15)
        n = (double)qie_arena_rounded((size_t)(n < 1 ? 1 : n));
    s->bytes += n;
}

static double larger(double a, double b) {
    return a > b ? a : b;
}

static double language_bytes(const qie_memory_request *r, double n, double act) {
    const qie_text_config *t = &r->model->text;
    double h = t->hidden_size, kv = (double)t->num_key_value_heads * t->head_dim;
    sum s = {0};
    add(&s, 3 * n, 4);
    add(&s, n * (t->head_dim / 2), 4);
    add(&s, n * (t->head_dim / 2), 4);
    add(&s, n * h, 4);
    add(&s, n * h, act);
    add(&s, n * h, act);
    add(&s, n * kv, act);
    add(&s, n * kv, act);
    add(&s, n * t->intermediate_size, act);
    return s.bytes;
}

static double vision_bytes(const qie_memory_request *r, double act) {
    const qie_vision_config *v = &r->model->vision;
    double p = (double)r->sizes->n_patches, t = (double)r->sizes->n_vision_tokens,
           h = v->hidden_size;
    double unit = (double)v->spatial_merge_size * v->spatial_merge_size;
    double patch = 3.0 * v->temporal_patch_size * v->patch_size * v->patch_size;
    double half = (double)(v->hidden_size / v->num_heads / 2);
    sum s = {0};
    add(&s, t, 4);
    add(&s, p * 2, 4);
    add(&s, t + 1, 8);
    add(&s, QIE_MAX_PICTURES + 1, 8);
    add(&s, p * half, 4);
    add(&s, p * half, 4);
    add(&s, p * patch, 4);
    add(&s, t * v->out_hidden_size, 4);
    add(&s, p * h, 4);
    add(&s, p * h, act);
    add(&s, p * 3 * h, act);
    add(&s, p * v->intermediate_size, act);
    add(&s, t * unit * h, act);
    return s.bytes;
}

double qie_memory_part_bytes(const qie_memory_request *r, int64_t from, int64_t n) {
    const qie_text_config *t = &r->model->text;
    double width = 2.0 * t->num_hidden_layers * t->num_key_value_heads * t->head_dim;
    int64_t asked = from + n - (r->n_drop > from ? r->n_drop : from);
    return (double)n * width * (double)qie_dtype_size(r->act) +
           (asked > 0 ? (double)asked * t->hidden_size * 4 : 0);
}

static double text_stage(const qie_memory_request *r, double act) {
    const qie_vision_config *v = &r->model->vision;
    double patch = 3.0 * v->temporal_patch_size * v->patch_size * v->patch_size;
    double n = larger((double)r->n_ids[0], r->n_passes > 1 ? (double)r->n_ids[1] : 0);
    sum s = {0};
    add(&s, (double)r->sizes->n_patches * patch, 4);                    /* pixel_values */
    add(&s, (double)r->sizes->n_vision_tokens * v->out_hidden_size, 4); /* features */
    add(&s, n * r->model->text.hidden_size, 4);                         /* hidden_last */
    int64_t from = 0;
    for (size_t i = 0; i < sizeof r->parts / sizeof *r->parts; i++) {
        add(&s, qie_memory_part_bytes(r, from, r->parts[i]), 1);
        from += r->parts[i];
    }
    return s.bytes + larger(vision_bytes(r, act), language_bytes(r, n, act));
}

double qie_vae_largest_map(const qie_vae_config *c, int ph, int pw) {
    double max = 0;
    for (int l = 0; l < c->n_levels; l++) {
        /* what a level holds: its own channels, and on the way up those of the level below, halved
         */
        int ch = qie_vae_channels(c, l),
            below = l + 1 < c->n_levels ? qie_vae_channels(c, l + 1) / 2 : 0;
        int above = l > 0 ? qie_vae_channels(c, l - 1) : c->base_dim;
        int most = ch > below ? ch : below;
        most = most > above ? most : above;
        max = larger(max, (double)(ph >> l) * (double)(pw >> l) * most);
    }
    return max;
}

static double vae_bytes(const qie_vae_config *c, int w, int h, bool encode, bool tiled,
                        double act) {
    int f = c->scale_factor;
    sum s = {0};
    double tile_rows = 0;
    bool window = tiled && (w > QIE_VAE_TILE_PX || h > QIE_VAE_TILE_PX);
    if (encode)
        add(&s, 2.0 * c->z_dim * (w / f) * (h / f), 4); /* moments */
    if (window) {
        int step = encode ? QIE_VAE_STRIDE_PX / f : QIE_VAE_STRIDE_PX,
            tile = encode ? QIE_VAE_TILE_PX / f : QIE_VAE_TILE_PX;
        int out_w = encode ? w / f : w, ch = encode ? 2 * c->z_dim : 3;
        int nx = (out_w + step - 1) / step;
        sum rows = {0};
        for (int i = 0; i < 2; i++) {
            add(&rows, (double)tile * tile * ch * nx, 4);
            add(&rows, nx, 4);
        }
        tile_rows = rows.bytes;
        w = w < QIE_VAE_TILE_PX ? w : QIE_VAE_TILE_PX;
        h = h < QIE_VAE_TILE_PX ? h : QIE_VAE_TILE_PX;
    }
    for (int i = 0; i < 3; i++)
        add(&s, qie_vae_largest_map(c, h, w), act);
    double low = (double)(w / f) * (h / f);
    if (encode) {
        add(&s, low * 2 * c->z_dim, 4);
        if (window)
            add(&s, 3.0 * w * h, 4);
    } else {
        add(&s, low * c->z_dim, 4);
        add(&s, low * c->z_dim, 4);
    }
    add(&s, low * 3 * qie_vae_channels(c, c->n_levels - 1), act); /* q, k, v of the mid block */
    return s.bytes + tile_rows;
}

static double encode_stage(const qie_memory_request *r, bool tiled, double act) {
    const qie_vae_config *c = &r->model->vae;
    double max = 0;
    for (int i = 0; i < r->sizes->n_images; i++) {
        qie_size s = r->sizes->images[i].vae;
        sum own = {0};
        add(&own, 3.0 * s.w * s.h, 4);
        add(&own, (double)(s.w / c->scale_factor) * (s.h / c->scale_factor) * c->z_dim, 4);
        max = larger(max, own.bytes + vae_bytes(c, s.w, s.h, true, tiled, act));
    }
    return max;
}

static double decode_bytes(const qie_memory_request *r, int w, int h, bool tiled, double act) {
    const qie_vae_config *c = &r->model->vae;
    sum own = {0};
    add(&own, (double)(w / c->scale_factor) * (h / c->scale_factor) * c->z_dim, 4);
    add(&own, 3.0 * w * h, 4);
    return own.bytes + vae_bytes(c, w, h, false, tiled, act);
}

static double denoise_stage(const qie_memory_request *r, double act) {
    const qie_transformer_config *c = &r->model->transformer;
    double dim = c->inner_dim, half = c->attention_head_dim / 2;
    double n_image = (double)(r->sizes->n_target + r->sizes->n_reference);
    double max_text = larger((double)r->n_text[0], r->n_passes > 1 ? (double)r->n_text[1] : 0);
    double n = max_text + n_image;
    double rows =
        (r->n_steps < QIE_PLAN_MODULATION_STEPS ? r->n_steps : QIE_PLAN_MODULATION_STEPS) + 1;
    sum s = {0};
    add(&s, QIE_PLAN_DENOISER_BYTES, 1);
    add(&s, r->n_steps, 4);
    add(&s, (double)r->sizes->n_reference * dim, 4);
    for (int p = 0; p < r->n_passes; p++) {
        add(&s, (double)r->n_text[p] * dim, 4);
        add(&s, ((double)r->n_text[p] + n_image) * half, 4);
        add(&s, ((double)r->n_text[p] + n_image) * half, 4);
    }
    add(&s, (double)c->num_layers * 2 * (rows + 2) * 6 * dim, 4);
    add(&s, rows * 2 * dim, 4);
    add(&s, rows * dim, 4);
    add(&s, n_image * dim, 4);
    add(&s, max_text * dim, 4);
    for (int i = 0; i < 4; i++)
        add(&s, n * dim, act);
    add(&s, larger(n_image, max_text) * 4 * dim, act);
    if (r->step_cache) {
        int64_t kept = r->sizes->n_target * c->inner_dim;
        add(&s, 2.0 * (double)((kept + QIE_PLAN_CACHE_CHUNK - 1) / QIE_PLAN_CACHE_CHUNK), 8);
        for (int i = 0; i < 1 + 2 * r->n_passes; i++)
            add(&s, (double)kept, 4);
    }
    sum temporary = {0}, other = {0};
    add(&temporary, max_text * c->joint_attention_dim, 4); /* normed conditioning */
    add(&other, rows * (256 + dim), 4);                    /* time embedding */
    return s.bytes + larger(temporary.bytes, other.bytes);
}

/* Multiply-adds count as two operations. */
static void count_flops(const qie_memory_request *r, qie_memory_plan *out) {
    const qie_transformer_config *c = &r->model->transformer;
    const qie_text_config *t = &r->model->text;
    const qie_vision_config *v = &r->model->vision;
    double d = c->inner_dim, n_image = (double)(r->sizes->n_target + r->sizes->n_reference);
    double h = t->hidden_size, kv = (double)t->num_key_value_heads * t->head_dim;
    out->flops_step = out->flops_text = 0;
    for (int p = 0; p < r->n_passes; p++) {
        double n = n_image + (double)r->n_text[p],
               m = (double)(r->n_ids[p] - (p ? r->parts[0] + r->parts[1] : 0));
        double asked = (double)r->n_text[p] < m ? (double)r->n_text[p] : m; /* of the last layer */
        out->flops_step += c->num_layers * (24 * d * d * n + 4 * d * n * n);
        /* as if each row met every pair: it meets those of its own stream, half of them */
        out->flops_step += r->lora_flops / 2 * n;
        double rows = (t->num_hidden_layers - 1) * m + asked;
        out->flops_text += 2 * rows * h * (2 * h + 3.0 * t->intermediate_size) + 2 * h * rows * m +
                           4 * t->num_hidden_layers * m * h * kv;
    }
    double np = (double)r->sizes->n_patches, vh = v->hidden_size;
    out->flops_text += v->depth * 2 * np * vh * (4 * vh + 3.0 * v->intermediate_size);
    const qie_vae_config *a = &r->model->vae;
    double side[2] = {0, 0};
    for (int l = 0; l < a->n_levels;
         l++) { /* per pixel of the full size: 3x3 convolutions of each level */
        double ch = qie_vae_channels(a, l), cell = 1.0 / (double)(1 << (2 * l));
        side[0] += 2 * 9 * ch * ch * 2 * a->num_res_blocks * cell;
        side[1] += 2 * 9 * ch * ch * 2 * (a->num_res_blocks + 1) * cell;
    }
    for (int i = 0; i < r->sizes->n_images; i++)
        out->flops_vae_encode += side[0] * r->sizes->images[i].vae.w * r->sizes->images[i].vae.h;
    out->flops_vae_decode = side[1] * r->sizes->generated.w * r->sizes->generated.h;
}

int64_t qie_memory_lora_rows(const qie_memory_request *r) {
    int64_t most = r->sizes->n_target + r->sizes->n_reference;
    const int64_t others[] = {r->sizes->n_patches,
                              r->sizes->n_vision_tokens,
                              r->n_ids[0],
                              r->n_passes > 1 ? r->n_ids[1] : 0,
                              r->n_text[0],
                              r->n_passes > 1 ? r->n_text[1] : 0,
                              QIE_PLAN_MODULATION_STEPS + 1};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        most = others[i] > most ? others[i] : most;
    return most;
}

bool qie_memory_plan_make(const qie_memory_request *r, qie_memory_plan *out) {
    memset(out, 0, sizeof *out);
    const qie_model_config *m = r->model;
    double act = (double)qie_dtype_size(r->act), ch = m->transformer.in_channels;
    sum keep = {0};
    for (int p = 0; p < r->n_passes; p++)
        add(&keep, (double)r->n_text[p] * m->text.hidden_size, 4);
    add(&keep, (double)r->sizes->n_reference * ch, 4);
    for (int i = 0; i < 2 + r->n_outputs; i++) /* conditional and unconditional velocity, latents */
        add(&keep, (double)r->sizes->n_target * ch, 4);
    add(&keep, 2.0 * r->n_steps + 1, 4);
    if (r->lora_rank)
        add(&keep, (double)qie_memory_lora_rows(r) * (double)r->lora_rank, 4);
    add(&keep, 1 << 16, 1);
    double text = text_stage(r, act), denoise = denoise_stage(r, act);
    int f = m->vae.scale_factor, pw = r->sizes->generated.w, ph = r->sizes->generated.h;
    if (r->preview_px) { /* decoded from latents averaged down, while the denoiser's buffers live */
        int k = 1;
        while ((pw > ph ? pw : ph) / k > r->preview_px && k < 64)
            k++;
        int w = (pw / f + k - 1) / k * f, h = (ph / f + k - 1) / k * f;
        sum own = {0};
        add(&own, (double)r->sizes->n_target * ch, 4); /* x0, packed and as a map */
        add(&own, (double)r->sizes->n_target * ch, 4);
        denoise += own.bytes + decode_bytes(r, w, h, false, act);
    }
    double enc = encode_stage(r, false, act), dec = decode_bytes(r, pw, ph, false, act);
    double total = keep.bytes + larger(larger(text, denoise), larger(enc, dec));
    if (r->limit_bytes && total > (double)r->limit_bytes) {
        out->vae_tiled = true;
        enc = encode_stage(r, true, act);
        dec = decode_bytes(r, pw, ph, true, act);
        total = keep.bytes + larger(larger(text, denoise), larger(enc, dec));
    }
    if (!(total < 0x1p46))
        return false;
    out->persistent = (int64_t)keep.bytes;
    out->text = (int64_t)text;
    out->vae_encode = (int64_t)enc;
    out->denoise = (int64_t)denoise;
    out->vae_decode = (int64_t)dec;
    out->total = (int64_t)total;
    count_flops(r, out);
    return true;
}

static int64_t read_number(const char *path) {
    FILE *f = fopen(path, "re");
    long long v = -1;
    if (f) {
        if (fscanf(f, "%lld", &v) != 1)
            v = -1;
        fclose(f);
    }
    return v;
}

static int64_t meminfo(const char *key) {
    FILE *f = fopen("/proc/meminfo", "re");
    char line[128];
    long long kb = 0;
    size_t n = strlen(key);
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, n) && line[n] == ':') {
            kb = atoll(line + n + 1);
            break;
        }
    if (f)
        fclose(f);
    return kb * 1024;
}

/* Limit and use of the container, cgroup v2 then v1; -1: none. */
static int64_t cgroup_limit(int64_t *used) {
    int64_t limit = read_number("/sys/fs/cgroup/memory.max");
    *used = read_number("/sys/fs/cgroup/memory.current");
    if (limit < 0) {
        limit = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
        *used = read_number("/sys/fs/cgroup/memory/memory.usage_in_bytes");
    }
    return limit > 0 && limit < (INT64_C(1) << 60) ? limit : -1;
}

int64_t qie_memory_available(void) {
    int64_t free = meminfo("MemAvailable"), used = 0, limit = cgroup_limit(&used);
    if (limit > 0 && used >= 0) {
        /* use counts the page cache, which gives way: take back what is cached files */
        int64_t cached = 0;
        FILE *f = fopen("/sys/fs/cgroup/memory.stat", "re");
        char line[128];
        while (f && fgets(line, sizeof line, f))
            if (!strncmp(line, "inactive_file ", 14) || !strncmp(line, "active_file ", 12))
                cached += atoll(strchr(line, ' ') + 1);
        if (f)
            fclose(f);
        int64_t left = limit - used + cached;
        if (left < free)
            free = left < 0 ? 0 : left;
    }
    return free;
}

int64_t qie_memory_total(void) {
    int64_t total = meminfo("MemTotal"), used, limit = cgroup_limit(&used);
    return limit > 0 && limit < total ? limit : total;
}
