/* The part of cuDNN's graph interface that compute/cuda/cu_cudnn.cpp calls, strict about types,
 * numbers and order, computing attention by its definition. Numbers are cudnn_graph.h's, written down a second time on
 * purpose: one that is wrong in cu_cudnn.cpp is noticed. */
#include "fake_cudnn.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <vector>

extern "C" __attribute__((visibility("default"))) fake_cudnn_control fake_cudnn;
fake_cudnn_control fake_cudnn;

namespace {

enum { OK = 0, BAD = 2000, NOT_SUPPORTED = 3000, FAILED = 5000 };
enum {
    ENGINECFG = 3,
    ENGINEHEUR = 4,
    PLAN = 5,
    GRAPH = 15,
    VARIANT_PACK = 16,
    TENSOR = 17,
    SDPA = 41
};

struct value {
    int type;
    int64_t n;
    std::vector<unsigned char> bytes;
};
struct object {
    int kind;
    bool final;
    std::map<int, value> values;
    int64_t workspace;
    object *graph;
};

size_t size_of(int type) {
    switch (type) {
    case 1:
    case 8: return sizeof(int);
    case 2: return sizeof(bool);
    case 3: return sizeof(int64_t);
    default: return sizeof(void *);
    }
}

/* Attributes that a descriptor must have: number, type, elements (0: any). */
struct rule {
    int kind, name, type, n;
};
const rule RULES[] = {
    {TENSOR, 901, 1, 1},       {TENSOR, 902, 3, 4},        {TENSOR, 903, 3, 4},
    {TENSOR, 906, 3, 1},       {TENSOR, 900, 3, 1},        {SDPA, 2800, 15, 1},
    {SDPA, 2801, 15, 1},       {SDPA, 2802, 15, 1},        {SDPA, 2803, 15, 1},
    {SDPA, 2805, 15, 1},       {GRAPH, 800, 0, 1},         {GRAPH, 801, 15, 1},
    {ENGINEHEUR, 201, 15, 1},  {ENGINEHEUR, 200, 8, 1},    {PLAN, 400, 0, 1},
    {PLAN, 401, 15, 1},        {VARIANT_PACK, 1000, 3, 0}, {VARIANT_PACK, 1001, 6, 0},
    {VARIANT_PACK, 1003, 6, 1}};

template <typename T> const T *values(object *o, int name) {
    return reinterpret_cast<const T *>(o->values[name].bytes.data());
}
object *child(object *o, int name) {
    return *values<object *>(o, name);
}

float load(const void *p, int64_t i) {
    uint32_t u = (uint32_t) static_cast<const uint16_t *>(p)[i] << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
void store(void *p, int64_t i, float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    static_cast<uint16_t *>(p)[i] = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

struct tensor {
    void *data;
    int64_t dims[4], strides[4];
};

void attend(const tensor &q, const tensor &k, const tensor &v, const tensor &o, float scale) {
    int64_t group = q.dims[1] / k.dims[1], d = q.dims[3], nk = k.dims[2];
    std::vector<double> w((size_t)nk);
    for (int64_t h = 0; h < q.dims[1]; h++)
        for (int64_t r = 0; r < q.dims[2]; r++) {
            double most = -INFINITY, total = 0;
            for (int64_t i = 0; i < nk; i++) {
                double dot = 0;
                for (int64_t c = 0; c < d; c++)
                    dot += (double)load(q.data, h * q.strides[1] + r * q.strides[2] + c) *
                           (double)load(k.data, h / group * k.strides[1] + i * k.strides[2] + c);
                w[(size_t)i] = dot * (double)scale;
                most = w[(size_t)i] > most ? w[(size_t)i] : most;
            }
            for (double &x : w)
                total += x = exp(x - most);
            for (int64_t c = 0; c < d; c++) {
                double sum = 0;
                for (int64_t i = 0; i < nk; i++)
                    sum += w[(size_t)i] *
                           (double)load(v.data, h / group * v.strides[1] + i * v.strides[2] + c);
                float y = fake_cudnn.fault == FAKE_CUDNN_NAN ? NAN : (float)(sum / total);
                store(o.data, h * o.strides[1] + r * o.strides[2] + c, y);
            }
        }
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

API size_t cudnnGetVersion() {
    return fake_cudnn.fault == FAKE_CUDNN_OLD ? 91200 : 91300;
}
API int cudnnCreate(void **out) {
    if (fake_cudnn.fault == FAKE_CUDNN_NO_CARD)
        return 1001;
    *out = new void *(nullptr); /* the stream */
    fake_cudnn.live++;
    return OK;
}
API int cudnnDestroy(void *handle) {
    delete static_cast<void **>(handle);
    fake_cudnn.live--;
    return OK;
}
API int cudnnSetStream(void *handle, void *stream) {
    *static_cast<void **>(handle) = stream;
    return OK;
}
API int cudnnBackendCreateDescriptor(int kind, void **out) {
    *out = new object{kind, false, {}, 0, nullptr};
    fake_cudnn.live++;
    return OK;
}
API int cudnnBackendDestroyDescriptor(void *d) {
    delete static_cast<object *>(d);
    fake_cudnn.live--;
    return OK;
}

API int cudnnBackendSetAttribute(void *d, int name, int type, int64_t n, const void *p) {
    object *o = static_cast<object *>(d);
    if (o->final || !p)
        return BAD;
    const unsigned char *b = static_cast<const unsigned char *>(p);
    if (type == 15) /* only what is finished may be built upon */
        for (int64_t i = 0; i < n; i++)
            if (!static_cast<object *const *>(p)[i]->final)
                return BAD;
    o->values[name] = value{type, n, std::vector<unsigned char>(b, b + (size_t)n * size_of(type))};
    return OK;
}

API int cudnnBackendFinalize(void *d) {
    object *o = static_cast<object *>(d);
    if (o->final)
        return BAD;
    for (const rule &r : RULES)
        if (r.kind == o->kind) {
            auto v = o->values.find(r.name);
            if (v == o->values.end() || v->second.type != r.type || (r.n && v->second.n != r.n))
                return BAD;
        }
    if (o->kind == PLAN) {
        object *config = child(o, 401);
        if (fake_cudnn.fault == FAKE_CUDNN_NO_PLAN)
            return NOT_SUPPORTED;
        /* what outlives the graph that it was made from */
        object *op = child(child(child(config, -1), 201), 801);
        o->graph = new object(*op);
        for (int name : {2800, 2801, 2802, 2803, 2805}) {
            object *copy = new object(*child(op, name));
            memcpy(o->graph->values[name].bytes.data(), &copy, sizeof copy);
        }
        o->workspace = config->workspace;
        fake_cudnn.plans++;
    }
    o->final = true;
    return OK;
}

API int cudnnBackendGetAttribute(void *d, int name, int type, int64_t asked, int64_t *n, void *p) {
    object *o = static_cast<object *>(d);
    if (!o->final)
        return BAD;
    if (o->kind == ENGINEHEUR && name == 202 && type == 15) {
        if (!p) {
            *n = 2;
            return OK;
        }
        object **list = static_cast<object **>(p);
        for (int64_t i = 0; i < asked && i < 2; i++) { /* the first one asks for too much */
            if (list[i]->kind != ENGINECFG || list[i]->final)
                return BAD;
            list[i]->workspace = i ? 1 << 20 : (int64_t)1 << 40;
            unsigned char *b = reinterpret_cast<unsigned char *>(&o);
            list[i]->values[-1] = value{15, 1, std::vector<unsigned char>(b, b + sizeof o)};
            list[i]->final = true;
        }
        *n = asked < 2 ? asked : 2;
        return OK;
    }
    if (o->kind == PLAN && name == 402 && type == 3 && asked == 1) {
        *n = 1;
        *static_cast<int64_t *>(p) = o->workspace;
        return OK;
    }
    return BAD;
}

API int cudnnBackendExecute(void *handle, void *plan_, void *pack_) {
    object *plan = static_cast<object *>(plan_), *pack = static_cast<object *>(pack_);
    if (!plan->final || !pack->final || fake_cudnn.fault == FAKE_CUDNN_NO_RUN)
        return FAILED;
    tensor t[4];
    float scale = 1;
    int found = 0;
    for (int i = 0; i < 5; i++) {
        object *x = child(plan->graph, i < 4 ? 2800 + i : 2805);
        for (int64_t k = 0; k < pack->values[1000].n; k++) {
            if (values<int64_t>(pack, 1000)[k] != *values<int64_t>(x, 906))
                continue;
            void *at = values<void *>(pack, 1001)[k];
            found++;
            if (i == 4) {
                if (!*values<bool>(x, 908) || *values<int>(x, 901) != 0)
                    return BAD;
                scale = *static_cast<float *>(at);
                continue;
            }
            if (*values<int>(x, 901) != 9 || (uintptr_t)at % (uintptr_t)*values<int64_t>(x, 900))
                return BAD;
            t[i].data = at;
            memcpy(t[i].dims, values<int64_t>(x, 902), sizeof t[i].dims);
            memcpy(t[i].strides, values<int64_t>(x, 903), sizeof t[i].strides);
        }
    }
    if (found != 5 || !*values<void *>(pack, 1003))
        return BAD;
    if (fake_cudnn.fault == FAKE_CUDNN_NO_SCALE)
        scale = 1;
    fake_cudnn.runs++;
    tensor q = t[0], k = t[1], v = t[2], o = t[3];
    fake_cudnn.queue(*static_cast<void **>(handle), [=]() { attend(q, k, v, o, scale); });
    return OK;
}
