/* The few calls of cuDNN's graph interface that one attention takes, declared here: a graph of one
 * operation (SDPA forward, in cuDNN since 9.13), the configuration that its heuristics rank first
 * and that fits our workspace, and an execution plan of it for each shape. Numbers are those of
 * cudnn_graph.h, which promises not to change them within version 9. */
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

enum { LEAST_VERSION = 91300, KEPT = 16, CONFIGS = 8 };

/* cudnnBackendDescriptorType_t */
enum {
    ENGINECFG = 3,
    ENGINEHEUR = 4,
    PLAN = 5,
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
    T_POINTER = 6,
    T_HEUR_MODE = 8,
    T_DESCRIPTOR = 15
};
/* cudnnBackendAttributeName_t */
enum {
    HEUR_MODE = 200,
    HEUR_GRAPH,
    HEUR_RESULTS,
    PLAN_HANDLE = 400,
    PLAN_CONFIG,
    PLAN_WORKSPACE,
    GRAPH_HANDLE = 800,
    GRAPH_OPS,
    TENSOR_ALIGNMENT = 900,
    TENSOR_TYPE,
    TENSOR_DIMS,
    TENSOR_STRIDES,
    TENSOR_ID = 906,
    TENSOR_BY_VALUE = 908,
    PACK_IDS = 1000,
    PACK_POINTERS,
    PACK_WORKSPACE = 1003,
    SDPA_Q = 2800,
    SDPA_K,
    SDPA_V,
    SDPA_O,
    SDPA_SCALE = 2805
};
enum { DATA_FLOAT = 0, DATA_BFLOAT16 = 9, MODE_A = 3 };
enum { ID_Q = 1, ID_K, ID_V, ID_O, ID_SCALE };

struct shape {
    int64_t nq, nk, ldq, ldk, ldv, ldd;
    int64_t heads, kv_heads, d;
};

struct plan {
    shape key;
    descriptor plan; /* NULL: this shape cannot be done */
    bool used;
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
    bool checked, works, told;
    char why[160];
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

static descriptor tensor(builder *b, int64_t id, int type, const int64_t dims[4],
                         const int64_t strides[4], int64_t align, bool by_value) {
    descriptor t = make(b, TENSOR);
    put(b, t, TENSOR_TYPE, T_DATA_TYPE, 1, &type);
    put(b, t, TENSOR_DIMS, T_INT64, 4, dims);
    put(b, t, TENSOR_STRIDES, T_INT64, 4, strides);
    put(b, t, TENSOR_ID, T_INT64, 1, &id);
    put(b, t, TENSOR_ALIGNMENT, T_INT64, 1, &align);
    if (by_value)
        put(b, t, TENSOR_BY_VALUE, T_BOOLEAN, 1, &by_value);
    close(b, t);
    return t;
}

/* [1, heads, rows, d] in a matrix [rows, heads x d]. */
static descriptor matrix(builder *b, int64_t id, int64_t heads, int64_t rows, int64_t d,
                         int64_t ld) {
    const int64_t dims[4] = {1, heads, rows, d}, strides[4] = {rows * ld, d, ld, 1};
    return tensor(b, id, DATA_BFLOAT16, dims, strides, 16, false);
}

/* One float, read from host memory when the plan is executed. */
static descriptor number(builder *b, int64_t id) {
    const int64_t ones[4] = {1, 1, 1, 1};
    return tensor(b, id, DATA_FLOAT, ones, ones, sizeof(float), true);
}

static descriptor graph(builder *b, const shape *s) {
    const struct {
        int name;
        descriptor tensor;
    } operands[] = {{SDPA_Q, matrix(b, ID_Q, s->heads, s->nq, s->d, s->ldq)},
                    {SDPA_K, matrix(b, ID_K, s->kv_heads, s->nk, s->d, s->ldk)},
                    {SDPA_V, matrix(b, ID_V, s->kv_heads, s->nk, s->d, s->ldv)},
                    {SDPA_O, matrix(b, ID_O, s->heads, s->nq, s->d, s->ldd)},
                    {SDPA_SCALE, number(b, ID_SCALE)}};
    descriptor op = make(b, SDPA);
    for (const auto &o : operands)
        put(b, op, o.name, T_DESCRIPTOR, 1, &o.tensor);
    close(b, op);
    descriptor g = make(b, GRAPH);
    put(b, g, GRAPH_HANDLE, T_HANDLE, 1, &b->c->handle);
    put(b, g, GRAPH_OPS, T_DESCRIPTOR, 1, &op);
    close(b, g);
    return g;
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
    descriptor g = graph(&b, s);
    p->key = *s;
    p->used = true;
    p->plan = best_plan(&b, g);
    while (b.n)
        c->free(b.made[--b.n]);
    return p;
}

static bool run(cu_cudnn *c, cu_stream s, const qie_attention_args *a, void *workspace) {
    shape key;
    memset(&key, 0, sizeof key);
    key = {a->q.rows, a->k.rows,  a->q.ld,       a->k.ld,    a->v.ld,
           a->dst.ld, a->n_heads, a->n_kv_heads, a->head_dim};
    void *stream = cu_native_stream(s);
    if (!c->handle && c->create(&c->handle)) {
        c->handle = NULL;
        return false;
    }
    plan *p = plan_for(c, &key);
    if (!p->plan || c->set_stream(c->handle, stream))
        return false;
    float scale = a->scale;
    const int64_t ids[] = {ID_Q, ID_K, ID_V, ID_O, ID_SCALE};
    void *pointers[] = {a->q.data, a->k.data, a->v.data, a->dst.data, &scale};
    builder b = {c, {NULL}, 0, true};
    descriptor pack = make(&b, VARIANT_PACK);
    put(&b, pack, PACK_IDS, T_INT64, 5, ids);
    put(&b, pack, PACK_POINTERS, T_POINTER, 5, pointers);
    put(&b, pack, PACK_WORKSPACE, T_POINTER, 1, &workspace);
    close(&b, pack);
    b.ok = b.ok && !c->execute(c->handle, p->plan, pack);
    while (b.n)
        c->free(b.made[--b.n]);
    return b.ok;
}

/* Odd numbers of rows, heads side by side: our kernel's result and the library's, both in bf16,
 * differ by rounding alone, some 0.2 % of their size; a mask or a layout that was misunderstood
 * changes all of it. The workspace holds the operands behind what the library itself may use. */
static bool agrees(cu_cudnn *c, cu_stream s, void *workspace) {
    enum { NQ = 190, NK = 333, HEADS = 2, D = 128, WIDTH = HEADS * D, SLOT = 512 * WIDTH * 2 };
    unsigned char *at = (unsigned char *)workspace + QIE_CU_LIBS_WORKSPACE - 5 * SLOT;
    const size_t n = (size_t)NQ * WIDTH;
    void *host;
    qie_attention_args a;
    memset(&a, 0, sizeof a);
    a.q = qie_mat_make(at, QIE_BF16, NQ, WIDTH);
    a.k = qie_mat_make(at + SLOT, QIE_BF16, NK, WIDTH);
    a.v = qie_mat_make(at + 2 * SLOT, QIE_BF16, NK, WIDTH);
    a.n_heads = a.n_kv_heads = HEADS;
    a.head_dim = D;
    a.scale = 1000; /* of numbers of 0.02: scores of a few units */
    for (int i = 0; i < 3; i++)
        cu_k_fill_random(s, at + i * SLOT, SLOT / 2, (uint32_t)i + 1);
    a.dst = qie_mat_make(at + 3 * SLOT, QIE_BF16, NQ, WIDTH);
    cu_k_attention(s, &a, NULL);
    a.dst.data = at + 4 * SLOT;
    snprintf(c->why, sizeof c->why, "it has no attention for this card");
    if (!run(c, s, &a, workspace) || cu_host_alloc(2 * n * sizeof(uint16_t), &host) != CU_OK)
        return false;
    uint16_t *ours = (uint16_t *)host, *theirs = ours + n;
    double error = 0, size = 0;
    bool ok = cu_copy_out(s, ours, at + 3 * SLOT, n * sizeof *ours) == CU_OK &&
              cu_copy_out(s, theirs, at + 4 * SLOT, n * sizeof *ours) == CU_OK &&
              cu_stream_sync(s) == CU_OK;
    for (size_t i = 0; i < n && ok; i++) {
        double x = (double)qie_bf16_to_f32(ours[i]), y = (double)qie_bf16_to_f32(theirs[i]);
        error += (x - y) * (x - y);
        size += x * x;
    }
    cu_host_free(host);
    snprintf(c->why, sizeof c->why, "its attention is off by %.2g of the result",
             sqrt(error / size));
    return ok && error <= 1e-4 * size; /* 1 %; false for what is no number */
}

bool cu_cudnn_sdpa(cu_cudnn *c, cu_stream s, const qie_attention_args *a, void *workspace) {
    const qie_mat *m[] = {&a->q, &a->k, &a->v, &a->dst};
    if (!c || !workspace || a->head_dim != 128 || a->causal || (a->segments && a->n_segments > 1))
        return false;
    for (const qie_mat *x : m)
        if (x->dtype != QIE_BF16 || x->ld % 8 || (uintptr_t)x->data % 16)
            return false;
    if (!c->checked) {
        c->checked = true;
        c->works = agrees(c, s, workspace);
    }
    return c->works && run(c, s, a, workspace);
}

const char *cu_cudnn_note(cu_cudnn *c) {
    if (!c || !c->checked || c->works || c->told)
        return NULL;
    c->told = true;
    return c->why;
}
