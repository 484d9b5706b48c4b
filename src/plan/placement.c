#define _GNU_SOURCE
#include "plan/placement.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan/extents.h"
#include "plan/memory.h"
#include "plan/sizes.h"

#define GIB 1073741824.0

/* ------------------------------------------------------------------ groups of weights */

/* Where each kind of group begins in the engine's order (model/model.c, qie_model_groups). */
typedef struct layout {
    int depth, layers, blocks;
} layout;
enum { TRANSFORMER = 0, TEXT_ENCODER, VAE };

static int64_t aligned(int64_t n) {
    return (n + QIE_GPU_ALIGN - 1) / QIE_GPU_ALIGN * QIE_GPU_ALIGN;
}

/* The number behind a prefix, or -1. */
static int number_behind(const char *name, const char *prefix) {
    size_t n = strlen(prefix);
    return strncmp(name, prefix, n) ? -1 : (int)strtol(name + n, NULL, 10);
}

/* Position of a tensor's group; -1: in none (rows of the embedding are gathered by the host). */
static int group_of(const layout *l, int part, const char *name) {
    int text = 1 + l->depth + l->layers, blocks = text + 2 + l->blocks, i;
    if (part == VAE)
        return blocks + l->blocks;
    if (part == TEXT_ENCODER) {
        if (strstr(name, "embed_tokens"))
            return -1;
        if ((i = number_behind(name, "visual.blocks.")) >= 0)
            return 1 + i;
        if ((i = number_behind(name, "model.layers.")) >= 0)
            return 1 + l->depth + i;
        return strncmp(name, "visual.", 7) ? text : 0;
    }
    if ((i = number_behind(name, "transformer_blocks.")) < 0)
        return text + 1;
    return strstr(name, "img_mod.") || strstr(name, "txt_mod.") ? text + 2 + i : blocks + i;
}

static void lay_out(const layout *l, qie_placement_model *m) {
    int text = 1 + l->depth + l->layers, blocks = text + 2 + l->blocks,
        all = blocks + l->blocks + 1;
    m->n_groups = (size_t)all;
    for (int i = 0; i < all; i++) {
        qie_assign_group *g = &m->groups[i];
        *g = (qie_assign_group){.kind = i <= text                ? QIE_ASSIGN_TEXT
                                        : i == text + 1          ? QIE_ASSIGN_FIXED
                                        : i < blocks             ? QIE_ASSIGN_MODULATION
                                        : i < blocks + l->blocks ? QIE_ASSIGN_BLOCK
                                                                 : QIE_ASSIGN_VAE};
        g->index = g->kind == QIE_ASSIGN_BLOCK                         ? i - blocks
                   : g->kind == QIE_ASSIGN_MODULATION                  ? i - text - 2
                   : g->kind != QIE_ASSIGN_TEXT || i == 0 || i == text ? 0
                   : i <= l->depth                                     ? i - 1
                                                                       : i - 1 - l->depth;
    }
}

typedef struct filling {
    qie_placement_model *m;
    layout l;
    int part;
    double elements[3]; /* of each part, when it is only counted */
    double bytes_each;  /* of an element of this part, where nothing better is known */
    bool counting;
    qie_tensor_bytes_fn bytes;
    void *arg;
} filling;

static bool add_tensor(void *arg, const qie_tensor_spec *spec) {
    filling *f = arg;
    double n = 1;
    for (int i = 0; i < spec->n_dims; i++)
        n *= (double)spec->shape[i];
    if (f->counting) {
        f->elements[f->part] += n;
        return true;
    }
    int at = spec->unused ? -1 : group_of(&f->l, f->part, spec->name);
    if (at < 0 || (size_t)at >= f->m->n_groups)
        return true;
    int64_t bytes = f->bytes ? f->bytes(f->arg, f->part, spec) : -1;
    f->m->groups[at].bytes += aligned(bytes >= 0 ? bytes : (int64_t)(n * f->bytes_each));
    return true;
}

static void each_tensor(const qie_model_config *c, filling *f) {
    int64_t sizes[] = {f->m->transformer, f->m->text_encoder, f->m->vae};
    for (f->part = 0; f->part < 3; f->part++) {
        f->bytes_each =
            f->elements[f->part] > 0 ? (double)sizes[f->part] / f->elements[f->part] : 0;
        if (f->part == TRANSFORMER)
            qie_tensors_transformer(&c->transformer, add_tensor, f);
        else if (f->part == TEXT_ENCODER)
            qie_tensors_text_encoder(&c->text, &c->vision, add_tensor, f);
        else
            qie_tensors_vae(&c->vae, add_tensor, f);
    }
}

/* ------------------------------------------------------------------ models */

/* 64 rows of template and 64 of instruction beside the picture's: a long sentence. */
static int64_t planned_work(const qie_model_config *c, qie_dtype act) {
    qie_size_request r = {.n_images = 1,
                          .images = {{1024, 1024}},
                          .max_side = c->defaults.max_side,
                          .ref_area = c->defaults.ref_area};
    qie_size_plan sizes;
    qie_memory_plan plan;
    if (qie_size_plan_make(c, &r, &sizes, NULL) != QIE_OK)
        return -1;
    int64_t n_ids = sizes.n_vision_tokens + 128;
    qie_memory_request q = {.model = c,
                            .sizes = &sizes,
                            .act = act,
                            .n_passes = 2,
                            .n_ids = {n_ids, n_ids - 63},
                            .n_text = {n_ids - 64, n_ids - 127},
                            .parts = {64, sizes.n_vision_tokens},
                            .n_drop = 64,
                            .n_steps = c->defaults.num_inference_steps,
                            .n_outputs = 1};
    return qie_memory_plan_make(&q, &plan) ? plan.total : -1;
}

/* Work of the released model where nothing can be planned: 8192 picture rows and 300 of text x 3072
 * channels x 2 bytes x 16 buffers of the widest point, and three 96 x 1024 x 1024 planes of the
 * VAE's last level; the workspace of its extents. */
static void released_work(qie_placement_model *m) {
    m->work = (int64_t)8492 * 3072 * 2 * 16 + (int64_t)3 * 96 * 1024 * 1024 * 2 +
              qie_gpu_space_make(18944, 18944, 3456, 384).total;
    m->work_cpu = (int64_t)8492 * 3072 * 4 * 16 + (int64_t)3 * 96 * 1024 * 1024 * 4;
}

/* 60 blocks of 340 million parameters, of which 113 million are modulation; 28 language layers and
 * 32 of the vision tower (docs/MODEL.md). */
void qie_placement_scaled(int64_t transformer, int64_t text_encoder, int64_t vae,
                          qie_placement_model *m) {
    layout l = {32, 28, 60};
    memset(m, 0, sizeof *m);
    m->transformer = transformer;
    m->text_encoder = text_encoder;
    m->vae = vae;
    lay_out(&l, m);
    for (size_t i = 0; i < m->n_groups; i++) {
        qie_assign_group *g = &m->groups[i];
        double whole = (double)(g->kind == QIE_ASSIGN_VAE    ? vae
                                : g->kind == QIE_ASSIGN_TEXT ? text_encoder
                                                             : transformer),
               share = g->kind == QIE_ASSIGN_BLOCK        ? 226.6e6 / 20.43e9
                       : g->kind == QIE_ASSIGN_MODULATION ? 113.3e6 / 20.43e9
                       : g->kind == QIE_ASSIGN_FIXED      ? 36e6 / 20.43e9
                       : g->kind == QIE_ASSIGN_VAE        ? 1
                       : i >= 1 && i <= 32                ? 19.7e6 / 8.29e9
                       : i > 32 && i <= 60                ? 233.1e6 / 8.29e9
                                                          : 20e6 / 8.29e9;
        g->bytes = aligned((int64_t)(whole * share));
    }
    released_work(m);
}

void qie_placement_released(qie_placement_model *out) {
    /* sizes of the files in bf16 */
    qie_placement_scaled(40860000000, 16580000000, 254000000, out);
}

void qie_placement_of(const qie_model_config *c, const int64_t parts[3], qie_tensor_bytes_fn bytes,
                      void *arg, qie_dtype act_cpu, qie_placement_model *m) {
    layout l = {c->vision.depth, c->text.num_hidden_layers, c->transformer.num_layers};
    if (l.depth + l.layers + 2 * l.blocks + 4 > QIE_PLACEMENT_GROUPS_MAX) {
        qie_placement_scaled(parts[0], parts[1], parts[2], m);
        return;
    }
    memset(m, 0, sizeof *m);
    m->transformer = parts[TRANSFORMER];
    m->text_encoder = parts[TEXT_ENCODER];
    m->vae = parts[VAE];
    lay_out(&l, m);
    filling f = {.m = m, .l = l, .counting = true, .bytes = bytes, .arg = arg};
    each_tensor(c, &f);
    f.counting = false;
    each_tensor(c, &f);
    released_work(m);
    int64_t work = planned_work(c, QIE_BF16), work_cpu = planned_work(c, act_cpu);
    qie_extents e = qie_extents_of(c);
    if (work > 0)
        m->work = aligned(work + QIE_ARENA_SLACK) +
                  qie_gpu_space_make(e.max_k, e.max_n, e.max_conv_k, e.max_conv_n).total;
    if (work_cpu > 0)
        m->work_cpu = work_cpu;
}

/* ------------------------------------------------------------------ verdicts */

static int64_t offer(const qie_placement_gpu *g, int64_t headroom) {
    int64_t v = g->free - headroom;
    return g->free < 0 || v < 0 ? 0 : v;
}

static void single(const qie_placement *p, int64_t need, int64_t have, qie_placement_verdict *v) {
    v->need = need;
    v->have = have;
    v->fits = p->best_gpu >= 0 && have >= need;
    v->n_gpus = v->fits ? 1 : 0;
    v->gpus[0] = p->best_gpu;
}

/* The question as the engine puts it: the cards that tell their memory, what they offer beside the
 * runtime, the one that offers most first. Returns how many. */
static int ask(const qie_placement_model *m, const qie_placement_gpu *gpus, int n, int64_t headroom,
               qie_assign_request *r, int *numbers) {
    memset(r, 0, sizeof *r);
    r->work = m->work;
    r->n_passes = 2;
    for (int i = 0; i < n && r->n_cards < QIE_ASSIGN_CARDS_MAX; i++) {
        if (gpus[i].total < 0 || gpus[i].free < 0)
            continue;
        int64_t o = gpus[i].free - headroom - QIE_GPU_RUNTIME;
        int at = r->n_cards++;
        for (; at > 0 && r->offer[at - 1] < o; at--) {
            r->offer[at] = r->offer[at - 1];
            numbers[at] = numbers[at - 1];
        }
        r->offer[at] = o;
        numbers[at] = gpus[i].index;
    }
    return r->n_cards;
}

/* What one way takes: of the plan's cards all together. */
static void from_plan(const qie_placement *p, const qie_assign_request *r,
                      qie_placement_verdict *v) {
    memset(v, 0, sizeof *v);
    for (int c = 0; c < r->n_cards; c++) {
        if (!p->plan.need[c])
            continue;
        v->need += p->plan.need[c] + QIE_GPU_RUNTIME;
        v->have += r->offer[c] + QIE_GPU_RUNTIME;
        v->gpus[v->n_gpus++] = p->plan_gpus[c];
    }
    v->fits = true;
}

/* Would several cards hold all of it together? The fewest, from the one that offers most. */
static void sum_shards(const qie_placement_model *m, const qie_assign_request *r,
                       const int *numbers, int64_t always, int64_t rest, qie_placement_verdict *v) {
    int64_t fixed = m->work + always, left = rest;
    memset(v, 0, sizeof *v);
    v->need = rest;
    for (int c = 0; c < r->n_cards && (left > 0 || v->n_gpus < 2); c++) {
        if (r->offer[c] <= fixed)
            break;
        v->gpus[v->n_gpus++] = numbers[c];
        v->have += r->offer[c] + QIE_GPU_RUNTIME;
        v->need += fixed + QIE_GPU_RUNTIME;
        left -= r->offer[c] - fixed;
    }
    v->fits = left <= 0 && v->n_gpus > 1;
}

void qie_placement_make(const qie_placement_model *m, const qie_placement_gpu *gpus, int n,
                        int64_t headroom, int64_t host_free, qie_placement *out) {
    memset(out, 0, sizeof *out);
    if (n > QIE_PLACEMENT_GPUS_MAX)
        n = QIE_PLACEMENT_GPUS_MAX;
    out->headroom = headroom;
    out->weights = m->transformer + m->text_encoder + m->vae;
    out->n_gpus = n;
    out->best_gpu = -1;
    int64_t most = -1, always = 0, rest = 0, largest = 0;
    for (size_t i = 0; i < m->n_groups; i++) {
        const qie_assign_group *g = &m->groups[i];
        if (g->kind == QIE_ASSIGN_FIXED || g->kind == QIE_ASSIGN_VAE)
            always += g->bytes;
        else {
            rest += g->bytes;
            largest = g->bytes > largest ? g->bytes : largest;
        }
    }
    int64_t resident = always + rest + m->work + QIE_GPU_RUNTIME,
            streamed = always + 2 * largest + m->work + QIE_GPU_RUNTIME;
    for (int i = 0; i < n; i++) {
        if (gpus[i].total >= 0 && gpus[i].free >= 0 && offer(&gpus[i], headroom) > most) {
            most = offer(&gpus[i], headroom);
            out->best_gpu = gpus[i].index;
            out->best_gpu_total = gpus[i].total;
            out->best_gpu_free = gpus[i].free;
        }
        out->could_resident = out->could_resident || gpus[i].total - headroom >= resident;
        out->could_streamed = out->could_streamed || gpus[i].total - headroom >= streamed;
    }
    if (most < 0)
        most = 0;
    single(out, resident, most, &out->resident);
    single(out, streamed, most, &out->streamed);
    qie_assign_request r;
    qie_assign_group groups[QIE_PLACEMENT_GROUPS_MAX];
    memcpy(groups, m->groups, sizeof groups);
    out->n_plan_gpus = ask(m, gpus, n, headroom, &r, out->plan_gpus);
    sum_shards(m, &r, out->plan_gpus, always, rest, &out->sharded);
    bool placed = out->n_plan_gpus > 0 && qie_assign_any(&r, groups, m->n_groups, &out->plan);
    if (placed)
        from_plan(out, &r, &out->used);
    if (placed && out->plan.form == QIE_FORM_SHARDED)
        out->sharded = out->used;
    out->cpu.need = m->work_cpu;
    out->cpu.have = host_free;
    out->cpu.fits = host_free >= m->work_cpu;
    out->cpu_from_disk = host_free < m->work_cpu + out->weights;
    out->best = placed ? (out->plan.form == QIE_FORM_RESIDENT   ? QIE_PLACE_RESIDENT
                          : out->plan.form == QIE_FORM_SHARDED  ? QIE_PLACE_SHARDED
                          : out->plan.form == QIE_FORM_PARALLEL ? QIE_PLACE_PARALLEL
                                                                : QIE_PLACE_STREAMED)
                : n == 0 && out->cpu.fits ? QIE_PLACE_CPU
                                          : QIE_PLACE_NONE;
}

const char *qie_placement_name(qie_placement_kind kind) {
    static const char *const names[] = {"resident", "sharded", "streamed",
                                        "parallel", "cpu",     "none"};
    return (unsigned)kind < 6 ? names[kind] : "none";
}

static void list_gpus(const qie_placement_verdict *v, char *out, size_t cap) {
    size_t n = 0;
    out[0] = 0;
    for (int i = 0; i < v->n_gpus && n + 8 < cap; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s%d", i ? "," : "", v->gpus[i]);
}

void qie_placement_words(const qie_placement *p, bool zh, char *out, size_t cap) {
    char cards[128];
    double need = (double)p->resident.need / GIB, least = (double)p->streamed.need / GIB,
           head = (double)p->headroom / GIB, most = (double)p->resident.have / GIB;
    switch (p->best) {
    case QIE_PLACE_RESIDENT:
        snprintf(out, cap,
                 zh ? "整个模型可放进 GPU %d：需要 %.1f GiB，扣除预留 %.1f GiB 后可用 %.1f GiB"
                    : "the whole model fits on GPU %d: it needs %.1f GiB, and after %.1f GiB of "
                      "head-room %.1f "
                      "GiB are there",
                 p->resident.gpus[0], need, head, most);
        return;
    case QIE_PLACE_PARALLEL:
        list_gpus(&p->used, cards, sizeof cards);
        snprintf(
            out, cap,
            zh ? "GPU %s 上两路引导各放一份完整模型：共需 %.1f GiB，扣除每卡预留 %.1f GiB 后共有 "
                 "%.1f GiB"
               : "GPUs %s hold a whole model for each guidance pass: they need %.1f GiB, and "
                 "after %.1f GiB of head-room each %.1f GiB are there",
            cards, (double)p->used.need / GIB, head, (double)p->used.have / GIB);
        return;
    case QIE_PLACE_SHARDED:
        list_gpus(&p->sharded, cards, sizeof cards);
        snprintf(out, cap,
                 zh ? "模型可分布在 GPU %s 上：共需 %.1f GiB，扣除每卡预留 %.1f GiB 后共有 %.1f GiB"
                    : "the model fits on GPUs %s together: they need %.1f GiB, and after %.1f GiB "
                      "of head-room "
                      "each %.1f GiB are there",
                 cards, (double)p->sharded.need / GIB, head, (double)p->sharded.have / GIB);
        if (p->plan.streams) {
            size_t n = strlen(out);
            snprintf(out + n, cap - n,
                     zh ? "；其中 %.1f GiB 权重分层流式传入"
                        : "; %.1f GiB of the weights pass through them, layer by layer",
                     (double)p->plan.streamed_bytes / GIB);
        }
        return;
    case QIE_PLACE_STREAMED:
        snprintf(out, cap,
                 zh ? "可在 GPU %d 上分层流式运行（较慢）：需要 %.1f GiB，可用 %.1f "
                      "GiB；全部驻留需要 %.1f GiB"
                    : "GPU %d can run it streamed, layer by layer (slower): %.1f GiB needed, %.1f "
                      "GiB there; to "
                      "hold it whole takes %.1f GiB",
                 p->streamed.gpus[0], least, most, need);
        return;
    case QIE_PLACE_CPU:
        snprintf(out, cap,
                 zh ? "没有可用的 GPU，将在 CPU 上运行：工作内存 %.1f GiB，可用 %.1f GiB%s"
                    : "no GPU is usable, so it runs on the CPU: %.1f GiB of working memory needed, "
                      "%.1f GiB free%s",
                 (double)p->cpu.need / GIB, (double)p->cpu.have / GIB,
                 !p->cpu_from_disk ? ""
                 : zh ? "；内存放不下全部权重，每一步都要从磁盘重读"
                      : "; the weights do not fit beside it and are read from disk at every step");
        return;
    case QIE_PLACE_NONE: break;
    }
    if (p->n_gpus == 0)
        snprintf(out, cap,
                 zh ? "没有可用的 GPU，内存也不够：需要 %.1f GiB，可用 %.1f GiB"
                    : "no GPU is usable, and the memory does not suffice: %.1f GiB needed, %.1f "
                      "GiB free",
                 (double)p->cpu.need / GIB, (double)p->cpu.have / GIB);
    else
        snprintf(out, cap,
                 zh ? "没有一张 GPU 放得下：全部驻留需要 %.1f GiB，分层流式至少 %.1f GiB；扣除预留 "
                      "%.1f GiB 后最多只有 "
                      "%.1f GiB"
                    : "no GPU has room for the model: %.1f GiB to hold it, %.1f GiB to stream it; "
                      "after %.1f GiB of head-room at most %.1f GiB are free",
                 need, least, head, most);
}
