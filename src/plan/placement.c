#define _GNU_SOURCE
#include "plan/placement.h"

#include <stdio.h>
#include <string.h>

#include "plan/memory.h"
#include "plan/sizes.h"
#include "plan/tensors.h"

#define GIB 1073741824.0
/* A CUDA context with the workspaces of cuBLASLt and cuDNN on one card: 0.4 to 0.7 GiB on cards of
 * the last three generations; taken at the upper end. */
#define GPU_RUNTIME ((int64_t)768 << 20)
/* Blocks in flight when streaming: one computing, one arriving, one being given back. */
#define BLOCKS_IN_FLIGHT 3

qie_placement_model qie_placement_released(void) {
    /* Sizes of the files in bf16 (docs/MODEL.md); 60 blocks of 340 million parameters. Work: 8192
     * picture rows and 300 of text x 3072 channels x 2 bytes x 16 buffers of the widest point, and
     * three 96 x 1024 x 1024 planes of the VAE's last level. */
    return (qie_placement_model){
        .transformer = 40860000000,
        .text_encoder = 16580000000,
        .vae = 254000000,
        .block = 680000000,
        .work = (int64_t)8492 * 3072 * 2 * 16 + (int64_t)3 * 96 * 1024 * 1024 * 2,
        .work_cpu = (int64_t)8492 * 3072 * 4 * 16 + (int64_t)3 * 96 * 1024 * 1024 * 4};
}

/* Elements of all tensors of a component, and of its repeated layers by number. */
typedef struct layer_sum {
    const char *prefix; /* of the repeated layers: "transformer_blocks." */
    int64_t all, first;
} layer_sum;

static bool add_tensor(void *arg, const qie_tensor_spec *spec) {
    layer_sum *s = arg;
    size_t n = strlen(s->prefix);
    int64_t count = 1;
    for (int i = 0; i < spec->n_dims; i++)
        count *= spec->shape[i];
    s->all += count;
    if (!strncmp(spec->name, s->prefix, n) && !strncmp(spec->name + n, "0.", 2))
        s->first += count;
    return true;
}

/* Bytes of the first layer, when the whole component has so many. */
static int64_t layer_bytes(const layer_sum *s, int64_t bytes) {
    return s->all > 0 ? (int64_t)((double)s->first / (double)s->all * (double)bytes) : 0;
}

/* 64 rows of template and 64 of instruction beside the picture's: a long sentence. */
static int64_t planned_work(const qie_model_config *c, qie_dtype act) {
    qie_size_request r = {.n_images = 1, .images = {{1024, 1024}}};
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
                            .n_prefix = n_ids - 64,
                            .n_steps = c->defaults.num_inference_steps,
                            .n_outputs = 1};
    return qie_memory_plan_make(&q, &plan) ? plan.total : -1;
}

qie_placement_model qie_placement_of(const qie_model_config *c, int64_t transformer,
                                     int64_t text_encoder, int64_t vae, qie_dtype act_cpu) {
    qie_placement_model m = qie_placement_released();
    layer_sum t = {.prefix = "transformer_blocks."}, e = {.prefix = "model.layers."};
    int64_t work = planned_work(c, QIE_BF16), work_cpu = planned_work(c, act_cpu);
    qie_tensors_transformer(&c->transformer, add_tensor, &t);
    qie_tensors_text_encoder(&c->text, &c->vision, add_tensor, &e);
    int64_t block = layer_bytes(&t, transformer), layer = layer_bytes(&e, text_encoder);
    m.transformer = transformer;
    m.text_encoder = text_encoder;
    m.vae = vae;
    m.block = block > layer ? block : layer;
    if (work > 0)
        m.work = work;
    if (work_cpu > 0)
        m.work_cpu = work_cpu;
    return m;
}

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

/* The fewest cards, taken from the one that offers most downwards, that hold all weights in whole
 * blocks. */
static void shard(const qie_placement_model *m, const qie_placement_gpu *gpus, int n,
                  qie_placement *p) {
    bool used[QIE_PLACEMENT_GPUS_MAX] = {false};
    int64_t fixed = m->work + GPU_RUNTIME, left = p->weights, block = m->block > 0 ? m->block : 1;
    qie_placement_verdict *v = &p->sharded;
    v->need = p->weights;
    while (left > 0 && v->n_gpus < n) {
        int best = -1;
        for (int i = 0; i < n; i++)
            if (!used[i] &&
                (best < 0 || offer(&gpus[i], p->headroom) > offer(&gpus[best], p->headroom)))
                best = i;
        int64_t room = offer(&gpus[best], p->headroom) - fixed;
        if (room < block)
            break;
        room -= room % block;
        used[best] = true;
        v->gpus[v->n_gpus++] = gpus[best].index;
        v->have += room;
        v->need += fixed;
        left -= room;
    }
    v->have += (int64_t)v->n_gpus * fixed;
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
    int64_t most = -1, resident = out->weights + m->work + GPU_RUNTIME,
            streamed = BLOCKS_IN_FLIGHT * m->block + m->vae + m->work + GPU_RUNTIME;
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
    shard(m, gpus, n, out);
    out->cpu.need = m->work_cpu;
    out->cpu.have = host_free;
    out->cpu.fits = host_free >= m->work_cpu;
    out->cpu_from_disk = host_free < m->work_cpu + out->weights;
    out->best = out->resident.fits        ? QIE_PLACE_RESIDENT
                : out->sharded.fits       ? QIE_PLACE_SHARDED
                : out->streamed.fits      ? QIE_PLACE_STREAMED
                : n == 0 && out->cpu.fits ? QIE_PLACE_CPU
                                          : QIE_PLACE_NONE;
}

const char *qie_placement_name(qie_placement_kind kind) {
    static const char *const names[] = {"resident", "sharded", "streamed", "cpu", "none"};
    return (unsigned)kind < 5 ? names[kind] : "none";
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
    case QIE_PLACE_SHARDED:
        list_gpus(&p->sharded, cards, sizeof cards);
        snprintf(out, cap,
                 zh ? "模型可分布在 GPU %s 上：共需 %.1f GiB，扣除每卡预留 %.1f GiB 后共有 %.1f GiB"
                    : "the model fits on GPUs %s together: they need %.1f GiB, and after %.1f GiB "
                      "of head-room "
                      "each %.1f GiB are there",
                 cards, (double)p->sharded.need / GIB, head, (double)p->sharded.have / GIB);
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
