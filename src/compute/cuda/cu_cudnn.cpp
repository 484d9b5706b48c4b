/* The few calls of cuDNN's graph interface that attention and convolution take, declared here: a
 * graph of one operation (SDPA forward, in cuDNN since 9.13) or of a convolution with its sums, the
 * configuration that its heuristics rank first and that fits our workspace, and an execution plan
 * of it for each shape. Numbers are those of cudnn_graph.h, which promises not to change them
 * within version 9. */
#include "compute/cuda/cu_cudnn.hpp"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compute/cuda/cu_kernels.hpp"
#include "compute/cuda/cu_libs.hpp"

extern "C" void *cu_native_stream(cu_stream s);

namespace {

typedef void *descriptor;

enum { LEAST_VERSION = 91300, KEPT = 48, CONFIGS = 8 };

/* cudnnBackendDescriptorType_t */
enum {
    POINTWISE = 0,
    CONVOLUTION = 1,
    ENGINECFG = 3,
    ENGINEHEUR = 4,
    PLAN = 5,
    CONV_FORWARD = 10,
    POINTWISE_OP = 13,
    GRAPH = 15,
    VARIANT_PACK = 16,
    TENSOR = 17,
    SDPA = 41
};
/* cudnnBackendAttributeType_t */
enum {
    T_HANDLE = 0,
    T_DATA_TYPE = 1,
    T_BOOLEAN = 2,
    T_INT64 = 3,
    T_FLOAT = 4,
    T_POINTER = 6,
    T_CONV_MODE = 7,
    T_HEUR_MODE = 8,
    T_POINTWISE_MODE = 14,
    T_DESCRIPTOR = 15
};
/* cudnnBackendAttributeName_t */
enum {
    POINTWISE_MODE = 0,
    POINTWISE_PRECISION,
    CONV_PRECISION = 100,
    CONV_MODE,
    CONV_DILATIONS,
    CONV_STRIDES,
    CONV_PAD_AFTER,
    CONV_PAD_BEFORE,
    CONV_DIMS,
    HEUR_MODE = 200,
    HEUR_GRAPH,
    HEUR_RESULTS,
    PLAN_HANDLE = 400,
    PLAN_CONFIG,
    PLAN_WORKSPACE,
    CONV_ALPHA = 700,
    CONV_BETA,
    CONV_HOW,
    CONV_W,
    CONV_X,
    CONV_Y,
    POINTWISE_HOW = 750,
    POINTWISE_X,
    POINTWISE_B,
    POINTWISE_Y,
    GRAPH_HANDLE = 800,
    GRAPH_OPS,
    TENSOR_ALIGNMENT = 900,
    TENSOR_TYPE,
    TENSOR_DIMS,
    TENSOR_STRIDES,
    TENSOR_ID = 906,
    TENSOR_VIRTUAL,
    TENSOR_BY_VALUE,
    PACK_IDS = 1000,
    PACK_POINTERS,
    PACK_WORKSPACE = 1003,
    SDPA_Q = 2800,
    SDPA_K,
    SDPA_V,
    SDPA_O,
    SDPA_SCALE = 2805
};
enum { DATA_FLOAT = 0, DATA_BFLOAT16 = 9, MODE_A = 3, ADD = 0, CROSS_CORRELATION = 1 };
enum { ID_Q = 1, ID_K, ID_V, ID_O, ID_SCALE };
enum { ID_X = 1, ID_W, ID_Y, ID_BIAS, ID_RESIDUAL, ID_INNER };

struct shape {
    /* attention */
    int64_t nq, nk, ldq, ldk, ldv, ldd;
    int64_t heads, kv_heads, d;
    /* convolution */
    int64_t h, w, in, out_h, out_w, out, kernel, stride, bias, residual;
};

struct plan {
    shape key;
    descriptor plan; /* NULL: this shape cannot be done */
    bool used;
};

/* What it is used for: checked with the first use, each on its own. */
struct use {
    bool checked, works, told;
    char why[160];
};

} // namespace

struct cu_cudnn {
    void *lib, *handle;
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*set_stream)(void *handle, void *stream);
    int (*make)(int type, descriptor *out);
    int (*free)(descriptor d);
    int (*finalize)(descriptor d);
    int (*set)(descriptor d, int name, int type, int64_t n, const void *values);
    int (*get)(descriptor d, int name, int type, int64_t asked, int64_t *n, void *values);
    int (*execute)(void *handle, descriptor plan, descriptor pack);
    plan plans[KEPT];
    int next;
    use attention, convolution;
};

cu_cudnn *cu_cudnn_open(void) {
    const char *file = getenv("QIE_CUDA_CUDNN");
    if (file && !strcmp(file, "0"))
        return NULL;
    void *lib = dlopen(file && *file ? file : "libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return NULL;
    cu_cudnn *c = (cu_cudnn *)calloc(1, sizeof *c);
    size_t (*version)(void) = NULL;
    const struct {
        const char *name;
        void *at;
    } calls[] = {{"cudnnGetVersion", &version},
                 {"cudnnCreate", c ? &c->create : NULL},
                 {"cudnnDestroy", c ? &c->destroy : NULL},
                 {"cudnnSetStream", c ? &c->set_stream : NULL},
                 {"cudnnBackendCreateDescriptor", c ? &c->make : NULL},
                 {"cudnnBackendDestroyDescriptor", c ? &c->free : NULL},
                 {"cudnnBackendFinalize", c ? &c->finalize : NULL},
                 {"cudnnBackendSetAttribute", c ? &c->set : NULL},
                 {"cudnnBackendGetAttribute", c ? &c->get : NULL},
                 {"cudnnBackendExecute", c ? &c->execute : NULL}};
    bool ok = c != NULL;
    for (size_t i = 0; i < sizeof calls / sizeof *calls && ok; i++) {
        void *p = dlsym(lib, calls[i].name);
        ok = p != NULL;
        memcpy(calls[i].at, &p, sizeof p);
    }
    if (!ok || version() < LEAST_VERSION) {
        free(c);
        dlclose(lib);
        return NULL;
    }
    c->lib = lib;
    return c;
}

static void forget(cu_cudnn *c, plan *p) {
    if (p->plan)
        c->free(p->plan);
    *p = plan();
}

void cu_cudnn_close(cu_cudnn *c) {
    if (!c)
        return;
    for (plan &p : c->plans)
        forget(c, &p);
    if (c->handle)
        c->destroy(c->handle);
    dlclose(c->lib);
    free(c);
}

/* Descriptors of one plan on their way: the first failure ends it, and all are given back. */
namespace {
struct builder {
    cu_cudnn *c;
    descriptor made[16 + CONFIGS];
    int n;
    bool ok;
};
} // namespace

static descriptor make(builder *b, int type) {
    descriptor d = NULL;
    b->ok = b->ok && b->n < (int)(sizeof b->made / sizeof *b->made) && !b->c->make(type, &d);
    if (b->ok)
        b->made[b->n++] = d;
    return d;
}
static void put(builder *b, descriptor d, int name, int type, int64_t n, const void *values) {
    b->ok = b->ok && !b->c->set(d, name, type, n, values);
}
static void close(builder *b, descriptor d) {
    b->ok = b->ok && !b->c->finalize(d);
}

/* flag: TENSOR_BY_VALUE, TENSOR_VIRTUAL (a result that is not written down) or 0 */
static descriptor tensor(builder *b, int64_t id, int type, const int64_t dims[4],
                         const int64_t strides[4], int64_t align, int flag) {
    const bool yes = true;
    descriptor t = make(b, TENSOR);
    put(b, t, TENSOR_TYPE, T_DATA_TYPE, 1, &type);
    put(b, t, TENSOR_DIMS, T_INT64, 4, dims);
    put(b, t, TENSOR_STRIDES, T_INT64, 4, strides);
    put(b, t, TENSOR_ID, T_INT64, 1, &id);
    put(b, t, TENSOR_ALIGNMENT, T_INT64, 1, &align);
    if (flag)
        put(b, t, flag, T_BOOLEAN, 1, &yes);
    close(b, t);
    return t;
}

/* [1, heads, rows, d] in a matrix [rows, heads x d]. */
static descriptor matrix(builder *b, int64_t id, int64_t heads, int64_t rows, int64_t d,
                         int64_t ld) {
    const int64_t dims[4] = {1, heads, rows, d}, strides[4] = {rows * ld, d, ld, 1};
    return tensor(b, id, DATA_BFLOAT16, dims, strides, 16, 0);
}

/* One float, read from host memory when the plan is executed. */
static descriptor number(builder *b, int64_t id) {
    const int64_t ones[4] = {1, 1, 1, 1};
    return tensor(b, id, DATA_FLOAT, ones, ones, sizeof(float), TENSOR_BY_VALUE);
}

/* An operation of these tensors. */
struct operand {
    int name;
    descriptor tensor;
};
static descriptor operation(builder *b, int type, const operand *list, size_t n) {
    descriptor op = make(b, type);
    for (size_t i = 0; i < n; i++)
        put(b, op, list[i].name, T_DESCRIPTOR, 1, &list[i].tensor);
    return op;
}

static descriptor graph(builder *b, const descriptor *ops, int64_t n) {
    descriptor g = make(b, GRAPH);
    put(b, g, GRAPH_HANDLE, T_HANDLE, 1, &b->c->handle);
    put(b, g, GRAPH_OPS, T_DESCRIPTOR, n, ops);
    close(b, g);
    return g;
}

static descriptor attention(builder *b, const shape *s) {
    const operand operands[] = {{SDPA_Q, matrix(b, ID_Q, s->heads, s->nq, s->d, s->ldq)},
                                {SDPA_K, matrix(b, ID_K, s->kv_heads, s->nk, s->d, s->ldk)},
                                {SDPA_V, matrix(b, ID_V, s->kv_heads, s->nk, s->d, s->ldv)},
                                {SDPA_O, matrix(b, ID_O, s->heads, s->nq, s->d, s->ldd)},
                                {SDPA_SCALE, number(b, ID_SCALE)}};
    descriptor op = operation(b, SDPA, operands, 5);
    close(b, op);
    return graph(b, &op, 1);
}

/* [1, channels, h, w] of a channels-last map; a bias is one of a single pixel. */
static descriptor map(builder *b, int64_t id, int64_t h, int64_t w, int64_t channels, bool inner) {
    const int64_t dims[4] = {1, channels, h, w},
                  strides[4] = {h * w * channels, 1, w * channels, channels};
    return tensor(b, id, inner ? DATA_FLOAT : DATA_BFLOAT16, dims, strides, 16,
                  inner ? TENSOR_VIRTUAL : 0);
}

static descriptor sum(builder *b, descriptor x, descriptor y, descriptor to) {
    const int mode = ADD, type = DATA_FLOAT;
    descriptor how = make(b, POINTWISE);
    put(b, how, POINTWISE_MODE, T_POINTWISE_MODE, 1, &mode);
    put(b, how, POINTWISE_PRECISION, T_DATA_TYPE, 1, &type);
    close(b, how);
    const operand operands[] = {
        {POINTWISE_HOW, how}, {POINTWISE_X, x}, {POINTWISE_B, y}, {POINTWISE_Y, to}};
    descriptor op = operation(b, POINTWISE_OP, operands, 4);
    close(b, op);
    return op;
}

/* The residual before the bias: the order that cuDNN has finished kernels for. */
static descriptor convolution(builder *b, const shape *s) {
    const int type = DATA_FLOAT, mode = CROSS_CORRELATION;
    const float one = 1, zero = 0;
    const int64_t dims = 2, ones[2] = {1, 1}, strides[2] = {s->stride, s->stride};
    int64_t pad = s->stride == 1 ? s->kernel / 2 : 0, before[2] = {pad, pad};
    int64_t end = s->stride == 1 ? pad : 1, behind[2] = {end, end};
    const int64_t w_dims[4] = {s->out, s->in, s->kernel, s->kernel},
                  w_strides[4] = {s->kernel * s->kernel * s->in, 1, s->kernel * s->in, s->in};
    descriptor how = make(b, CONVOLUTION), ops[3];
    put(b, how, CONV_PRECISION, T_DATA_TYPE, 1, &type);
    put(b, how, CONV_MODE, T_CONV_MODE, 1, &mode);
    put(b, how, CONV_DIMS, T_INT64, 1, &dims);
    put(b, how, CONV_DILATIONS, T_INT64, 2, ones);
    put(b, how, CONV_STRIDES, T_INT64, 2, strides);
    put(b, how, CONV_PAD_BEFORE, T_INT64, 2, before);
    put(b, how, CONV_PAD_AFTER, T_INT64, 2, behind);
    close(b, how);
    int64_t n = 1 + s->residual + s->bias, at = 0;
    descriptor y[3];
    for (int64_t i = 0; i < n; i++)
        y[i] = map(b, i < n - 1 ? (int64_t)ID_INNER + i : (int64_t)ID_Y, s->out_h, s->out_w, s->out,
                   i < n - 1);
    const operand operands[] = {{CONV_HOW, how},
                                {CONV_X, map(b, ID_X, s->h, s->w, s->in, false)},
                                {CONV_W, tensor(b, ID_W, DATA_BFLOAT16, w_dims, w_strides, 16, 0)},
                                {CONV_Y, y[0]}};
    ops[0] = operation(b, CONV_FORWARD, operands, 4);
    put(b, ops[0], CONV_ALPHA, T_FLOAT, 1, &one);
    put(b, ops[0], CONV_BETA, T_FLOAT, 1, &zero);
    close(b, ops[0]);
    if (s->residual) {
        descriptor r = map(b, ID_RESIDUAL, s->out_h, s->out_w, s->out, false);
        ops[at + 1] = sum(b, y[at], r, y[at + 1]);
        at++;
    }
    if (s->bias)
        ops[at + 1] = sum(b, y[at], map(b, ID_BIAS, 1, 1, s->out, false), y[at + 1]);
    return graph(b, ops, n);
}

/* The first of the ranked configurations that becomes a plan within the workspace; NULL: none. */
static descriptor best_plan(builder *b, descriptor g) {
    cu_cudnn *c = b->c;
    descriptor heur = make(b, ENGINEHEUR), configs[CONFIGS];
    const int mode = MODE_A;
    put(b, heur, HEUR_GRAPH, T_DESCRIPTOR, 1, &g);
    put(b, heur, HEUR_MODE, T_HEUR_MODE, 1, &mode);
    close(b, heur);
    for (descriptor &x : configs)
        x = make(b, ENGINECFG);
    int64_t n = 0;
    b->ok = b->ok && !c->get(heur, HEUR_RESULTS, T_DESCRIPTOR, 0, &n, NULL);
    n = n < (int64_t)CONFIGS ? n : (int64_t)CONFIGS;
    b->ok = b->ok && !c->get(heur, HEUR_RESULTS, T_DESCRIPTOR, n, &n, configs);
    for (int64_t i = 0; i < n && i < CONFIGS && b->ok; i++) {
        descriptor p = NULL;
        int64_t bytes = 0, one = 0;
        if (c->make(PLAN, &p))
            return NULL;
        if (!c->set(p, PLAN_HANDLE, T_HANDLE, 1, &c->handle) &&
            !c->set(p, PLAN_CONFIG, T_DESCRIPTOR, 1, &configs[i]) && !c->finalize(p) &&
            !c->get(p, PLAN_WORKSPACE, T_INT64, 1, &one, &bytes) &&
            bytes <= (int64_t)QIE_CU_LIBS_WORKSPACE)
            return p;
        c->free(p);
    }
    return NULL;
}

static plan *plan_for(cu_cudnn *c, const shape *s) {
    for (plan &p : c->plans)
        if (p.used && !memcmp(&p.key, s, sizeof *s))
            return &p;
    plan *p = &c->plans[c->next];
    c->next = (c->next + 1) % KEPT;
    forget(c, p);
    builder b = {c, {NULL}, 0, true};
    descriptor g = s->in ? convolution(&b, s) : attention(&b, s);
    p->key = *s;
    p->used = true;
    p->plan = best_plan(&b, g);
    while (b.n)
        c->free(b.made[--b.n]);
    return p;
}

/* The plan of this shape on these tensors, queued. */
static bool run(cu_cudnn *c, cu_stream s, const shape *key, int64_t n, const int64_t *ids,
                void **pointers, void *workspace) {
    void *stream = cu_native_stream(s);
    if (!c->handle && c->create(&c->handle)) {
        c->handle = NULL;
        return false;
    }
    plan *p = plan_for(c, key);
    if (!p->plan || c->set_stream(c->handle, stream))
        return false;
    builder b = {c, {NULL}, 0, true};
    descriptor pack = make(&b, VARIANT_PACK);
    put(&b, pack, PACK_IDS, T_INT64, n, ids);
    put(&b, pack, PACK_POINTERS, T_POINTER, n, pointers);
    put(&b, pack, PACK_WORKSPACE, T_POINTER, 1, &workspace);
    close(&b, pack);
    b.ok = b.ok && !c->execute(c->handle, p->plan, pack);
    while (b.n)
        c->free(b.made[--b.n]);
    return b.ok;
}

static bool attend(cu_cudnn *c, cu_stream s, const qie_attention_args *a, void *workspace) {
    shape key;
    memset(&key, 0, sizeof key);
    key.nq = a->q.rows;
    key.nk = a->k.rows;
    key.ldq = a->q.ld;
    key.ldk = a->k.ld;
    key.ldv = a->v.ld;
    key.ldd = a->dst.ld;
    key.heads = a->n_heads;
    key.kv_heads = a->n_kv_heads;
    key.d = a->head_dim;
    float scale = a->scale;
    const int64_t ids[] = {ID_Q, ID_K, ID_V, ID_O, ID_SCALE};
    void *pointers[] = {a->q.data, a->k.data, a->v.data, a->dst.data, &scale};
    return run(c, s, &key, 5, ids, pointers, workspace);
}

static bool convolve(cu_cudnn *c, cu_stream s, const qie_conv2d_args *a, const void *w,
                     void *workspace) {
    shape key;
    memset(&key, 0, sizeof key);
    key.h = a->x.h;
    key.w = a->x.w;
    key.in = a->w.in;
    key.out_h = a->dst.h;
    key.out_w = a->dst.w;
    key.out = a->w.out;
    key.kernel = a->w.kh;
    key.stride = a->stride;
    key.bias = a->bias.data != NULL;
    key.residual = a->residual.data != NULL;
    int64_t ids[5] = {ID_X, ID_W, ID_Y}, n = 3;
    void *pointers[5] = {a->x.data, (void *)(uintptr_t)w, a->dst.data};
    if (a->bias.data) {
        ids[n] = ID_BIAS;
        pointers[n++] = (void *)(uintptr_t)a->bias.data;
    }
    if (a->residual.data) {
        ids[n] = ID_RESIDUAL;
        pointers[n++] = a->residual.data;
    }
    return run(c, s, &key, n, ids, pointers, workspace);
}

/* Checks: our kernel's result and the library's, both in bf16, differ by rounding alone, some 0.2 %
 * of their size; a mask, a layout or an edge that was misunderstood changes much of it. The
 * workspace holds the operands behind what the library itself may use. */
enum { SLOTS = 5, SLOT = 512 * 256 * 2 };
static unsigned char *slot(void *workspace, int i) {
    return (unsigned char *)workspace + QIE_CU_LIBS_WORKSPACE - (SLOTS - i) * SLOT;
}

/* n values of ours and theirs, in the last two slots. */
static bool equal(use *u, cu_stream s, void *workspace, size_t n, const char *what) {
    void *host;
    if (cu_host_alloc(2 * n * sizeof(uint16_t), &host) != CU_OK)
        return false;
    uint16_t *ours = (uint16_t *)host, *theirs = ours + n;
    double error = 0, size = 0;
    bool ok = cu_copy_out(s, ours, slot(workspace, 3), n * sizeof *ours) == CU_OK &&
              cu_copy_out(s, theirs, slot(workspace, 4), n * sizeof *ours) == CU_OK &&
              cu_stream_sync(s) == CU_OK;
    for (size_t i = 0; i < n && ok; i++) {
        double x = (double)qie_bf16_to_f32(ours[i]), y = (double)qie_bf16_to_f32(theirs[i]);
        error += (x - y) * (x - y);
        size += x * x;
    }
    cu_host_free(host);
    snprintf(u->why, sizeof u->why, "its %s is off by %.2g of the result", what,
             sqrt(error / size));
    return ok && error <= 1e-4 * size; /* 1 %; false for what is no number */
}

/* Odd numbers of rows, heads side by side. */
static bool attention_agrees(cu_cudnn *c, cu_stream s, void *workspace) {
    enum { NQ = 190, NK = 333, HEADS = 2, D = 128, WIDTH = HEADS * D };
    qie_attention_args a;
    memset(&a, 0, sizeof a);
    a.q = qie_mat_make(slot(workspace, 0), QIE_BF16, NQ, WIDTH);
    a.k = qie_mat_make(slot(workspace, 1), QIE_BF16, NK, WIDTH);
    a.v = qie_mat_make(slot(workspace, 2), QIE_BF16, NK, WIDTH);
    a.n_heads = a.n_kv_heads = HEADS;
    a.head_dim = D;
    a.scale = 1000; /* of numbers of 0.02: scores of a few units */
    for (int i = 0; i < 3; i++)
        cu_k_fill_random(s, slot(workspace, i), SLOT / 2, (uint32_t)i + 1);
    a.dst = qie_mat_make(slot(workspace, 3), QIE_BF16, NQ, WIDTH);
    cu_k_attention(s, &a, NULL);
    a.dst.data = slot(workspace, 4);
    snprintf(c->attention.why, sizeof c->attention.why, "it has no attention for this card");
    return attend(c, s, &a, workspace) &&
           equal(&c->attention, s, workspace, (size_t)NQ * WIDTH, "attention");
}

/* Odd sides: with a residual that is the result's own memory, and with the uneven edges of
 * stride 2.
 */
static bool convolution_agrees(cu_cudnn *c, cu_stream s, void *workspace) {
    enum { H = 19, W = 23, IN = 128, OUT = 96, K = 3 };
    bool ok = true;
    for (int stride = 1; stride <= 2 && ok; stride++) {
        qie_conv2d_args a;
        memset(&a, 0, sizeof a);
        a.x = {slot(workspace, 0), QIE_BF16, H, W, IN};
        a.w = {NULL, QIE_BF16, OUT, IN, 1, K, K};
        a.bias = {slot(workspace, 2), QIE_BF16, OUT};
        a.stride = stride;
        a.dst = {slot(workspace, 3), QIE_BF16, H / stride, W / stride, OUT};
        for (int i = 0; i < SLOTS; i++) /* the last two alike */
            cu_k_fill_random(s, slot(workspace, i), SLOT / 2, (uint32_t)(i < 4 ? i : 3) + 1);
        for (int theirs = 0; theirs < 2 && ok; theirs++) {
            a.dst.data = slot(workspace, 3 + theirs);
            if (stride == 1)
                a.residual = a.dst;
            snprintf(c->convolution.why, sizeof c->convolution.why,
                     "it has no convolution for this card");
            if (theirs)
                ok = convolve(c, s, &a, slot(workspace, 1), workspace);
            else
                cu_k_conv2d(s, &a, slot(workspace, 1));
        }
        ok = ok &&
             equal(&c->convolution, s, workspace, (size_t)a.dst.h * a.dst.w * OUT, "convolution");
    }
    return ok;
}

/* May this use go on? */
static bool allowed(cu_cudnn *c, use *u, cu_stream s, void *workspace,
                    bool (*agrees)(cu_cudnn *, cu_stream, void *)) {
    if (!u->checked) {
        u->checked = true;
        u->works = agrees(c, s, workspace);
    }
    return u->works;
}

bool cu_cudnn_sdpa(cu_cudnn *c, cu_stream s, const qie_attention_args *a, void *workspace) {
    const qie_mat *m[] = {&a->q, &a->k, &a->v, &a->dst};
    if (!c || !workspace || a->head_dim != 128 || a->causal || (a->segments && a->n_segments > 1))
        return false;
    for (const qie_mat *x : m)
        if (x->dtype != QIE_BF16 || x->ld % 8 || (uintptr_t)x->data % 16)
            return false;
    return allowed(c, &c->attention, s, workspace, attention_agrees) && attend(c, s, a, workspace);
}

bool cu_cudnn_conv(cu_cudnn *c, cu_stream s, const qie_conv2d_args *a, const void *w,
                   void *workspace) {
    const struct {
        const void *data;
        qie_dtype type;
    } all[] = {{a->x.data, a->x.dtype},
               {w, QIE_BF16},
               {a->dst.data, a->dst.dtype},
               {a->bias.data, a->bias.dtype},
               {a->residual.data, a->residual.dtype}};
    if (!c || !workspace || a->upsample || a->w.in % 8 || a->w.out % 8)
        return false;
    for (const auto &x : all)
        if (x.data && (x.type != QIE_BF16 || (uintptr_t)x.data % 16))
            return false;
    return allowed(c, &c->convolution, s, workspace, convolution_agrees) &&
           convolve(c, s, a, w, workspace);
}

const char *cu_cudnn_note(cu_cudnn *c) {
    if (!c)
        return NULL;
    use *uses[] = {&c->attention, &c->convolution};
    for (use *u : uses)
        if (u->checked && !u->works && !u->told) {
            u->told = true;
            return u->why;
        }
    return NULL;
}
