/* The part of cuDNN's graph interface that compute/cuda/cu_cudnn.cpp calls, strict about types,
 * numbers and order, computing attention and convolution by their definition. Numbers are
 * cudnn_graph.h's, written down a second time on purpose: one that is wrong in cu_cudnn.cpp is
 * noticed. */
#include "fake_cudnn.h"

#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <memory>
#include <vector>

extern "C" __attribute__((visibility("default"))) fake_cudnn_control fake_cudnn;
fake_cudnn_control fake_cudnn;

namespace {

enum { OK = 0, BAD = 2000, NOT_SUPPORTED = 3000, FAILED = 5000 };
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
    void *twin; /* in cuDNN itself */
    std::vector<std::unique_ptr<object>>
        kept; /* of a plan: what outlives the graph it is made from */
};

/* cuDNN itself, without a card: where a handle would tell it of one, it gets an H100's properties
 * as it writes them down (cudaDeviceProp's and the driver's numbers under cuDNN's names). */
struct {
    void *lib, *card;
    int (*make)(int, void **);
    int (*free)(void *);
    int (*finalize)(void *);
    int (*set)(void *, int, int, int64_t, const void *);
    int (*get)(void *, int, int, int64_t, int64_t *, void *);
} real;
const char H100[] =
    R"({"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,
"multiProcessorCount":132,"warpSize":32,"maxSharedMemoryPerBlock":49152,
"maxSharedMemoryPerBlockOptin":232448,"reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,
"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"pciDeviceId":590348510,
"isTccDriver":0,"supportCoopLaunch":1,"totalGlobalMem":85029158912,"smClockRateKHz":1980000,
"memClockRateKHz":2619000,"l2CacheSize":52428800,"cudaDeviceId":0,"deviceVer":900,"driverVer":13000,
"deviceName":"NVIDIA H100 80GB HBM3"})";

bool real_open() {
    const struct {
        const char *name;
        void *at;
    } calls[] = {{"cudnnBackendCreateDescriptor", &real.make},
                 {"cudnnBackendDestroyDescriptor", &real.free},
                 {"cudnnBackendFinalize", &real.finalize},
                 {"cudnnBackendSetAttribute", &real.set},
                 {"cudnnBackendGetAttribute", &real.get}};
    real.lib = dlopen(fake_cudnn.real, RTLD_NOW | RTLD_LOCAL);
    for (const auto &c : calls) {
        void *p = real.lib ? dlsym(real.lib, c.name) : nullptr;
        if (!p)
            return false;
        memcpy(c.at, &p, sizeof p);
    }
    return !real.make(38, &real.card) && !real.set(real.card, 2702, 24, sizeof H100, H100) &&
           !real.finalize(real.card);
}

int real_set(const object *o, int name, int type, int64_t n, const void *p) {
    std::vector<void *> twins;
    if (!o->twin || name == 800)
        return OK;
    if (name == 400)
        return real.set(o->twin, 407, 15, 1, &real.card);
    for (int64_t i = 0; type == 15 && i < n; i++)
        twins.push_back(static_cast<object *const *>(p)[i]->twin);
    return real.set(o->twin, name, type, n, type == 15 ? twins.data() : p);
}

int real_finalize(const object *o) {
    int64_t n = 0, bytes = 0;
    if (!o->twin)
        return OK;
    if (o->kind == ENGINEHEUR && real.set(o->twin, 204, 15, 1, &real.card))
        return BAD;
    if (real.finalize(o->twin))
        return NOT_SUPPORTED;
    if (o->kind == PLAN && (real.get(o->twin, 402, 3, 1, &n, &bytes) || bytes > (int64_t)32 << 20))
        return NOT_SUPPORTED;
    return OK;
}

size_t size_of(int type) {
    switch (type) {
    case 1:
    case 8: return sizeof(int);
    case 2: return sizeof(bool);
    case 3: return sizeof(int64_t);
    case 4: return sizeof(float);
    case 7:
    case 14: return sizeof(int);
    default: return sizeof(void *);
    }
}

/* Attributes that a descriptor must have: number, type, elements (0: any). */
struct rule {
    int kind, name, type, n;
};
const rule RULES[] = {
    {TENSOR, 901, 1, 1},        {TENSOR, 902, 3, 4},        {TENSOR, 903, 3, 4},
    {TENSOR, 906, 3, 1},        {TENSOR, 900, 3, 1},        {SDPA, 2800, 15, 1},
    {SDPA, 2801, 15, 1},        {SDPA, 2802, 15, 1},        {SDPA, 2803, 15, 1},
    {CONVOLUTION, 100, 1, 1},   {CONVOLUTION, 101, 7, 1},   {CONVOLUTION, 102, 3, 2},
    {CONVOLUTION, 103, 3, 2},   {CONVOLUTION, 104, 3, 2},   {CONVOLUTION, 105, 3, 2},
    {CONVOLUTION, 106, 3, 1},   {CONV_FORWARD, 700, 4, 1},  {CONV_FORWARD, 701, 4, 1},
    {CONV_FORWARD, 702, 15, 1}, {CONV_FORWARD, 703, 15, 1}, {CONV_FORWARD, 704, 15, 1},
    {CONV_FORWARD, 705, 15, 1}, {POINTWISE, 0, 14, 1},      {POINTWISE, 1, 1, 1},
    {POINTWISE_OP, 750, 15, 1}, {POINTWISE_OP, 751, 15, 1}, {POINTWISE_OP, 752, 15, 1},
    {POINTWISE_OP, 753, 15, 1}, {SDPA, 2805, 15, 1},        {GRAPH, 800, 0, 1},
    {GRAPH, 801, 15, 0},        {ENGINEHEUR, 201, 15, 1},   {ENGINEHEUR, 200, 8, 1},
    {PLAN, 400, 0, 1},          {PLAN, 401, 15, 1},         {VARIANT_PACK, 1000, 3, 0},
    {VARIANT_PACK, 1001, 6, 0}, {VARIANT_PACK, 1003, 6, 1}};

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

/* One of the operations of a convolution's graph; x, w or b, y. */
struct step {
    bool add;
    tensor x, b, y;
    int64_t before[2], stride[2];
};

/* The result of all of them at once, because what lies between is not written down. */
void convolve(const std::vector<step> &steps) {
    const step &c = steps[0];
    const tensor &last = steps.back().y;
    for (int64_t o = 0; o < last.dims[1]; o++)
        for (int64_t y = 0; y < last.dims[2]; y++)
            for (int64_t x = 0; x < last.dims[3]; x++) {
                double v = 0;
                for (int64_t ky = 0; ky < c.b.dims[2]; ky++)
                    for (int64_t kx = 0; kx < c.b.dims[3]; kx++) {
                        int64_t sy = y * c.stride[0] + ky - c.before[0],
                                sx = x * c.stride[1] + kx - c.before[1];
                        if (sy < 0 || sx < 0 || sy >= c.x.dims[2] || sx >= c.x.dims[3])
                            continue;
                        for (int64_t i = 0; i < c.x.dims[1]; i++)
                            v += (double)load(c.x.data, i * c.x.strides[1] + sy * c.x.strides[2] +
                                                            sx * c.x.strides[3]) *
                                 (double)load(c.b.data, o * c.b.strides[0] + i * c.b.strides[1] +
                                                            ky * c.b.strides[2] +
                                                            kx * c.b.strides[3]);
                    }
                for (size_t i = 1; i < steps.size(); i++) {
                    const tensor &b = steps[i].b; /* a side of 1 stands for all */
                    v += (double)load(b.data, o * b.strides[1] +
                                                  (b.dims[2] > 1 ? y : 0) * b.strides[2] +
                                                  (b.dims[3] > 1 ? x : 0) * b.strides[3]);
                }
                store(last.data, o * last.strides[1] + y * last.strides[2] + x * last.strides[3],
                      fake_cudnn.fault == FAKE_CUDNN_NAN ? NAN : (float)v);
            }
}

/* A copy of what a descriptor is made of, all the way down. */
object *clone(object *from, std::vector<std::unique_ptr<object>> *kept) {
    kept->emplace_back(new object{from->kind, from->final, from->values, 0, nullptr, {}});
    object *to = kept->back().get();
    for (auto &v : to->values)
        for (int64_t i = 0; v.second.type == 15 && i < v.second.n; i++) {
            object **child = reinterpret_cast<object **>(v.second.bytes.data()) + i;
            *child = clone(*child, kept);
        }
    return to;
}

/* The memory that a pack gives for a tensor; false: none, of another type, or not aligned. Virtual
 * ones have none. */
bool place(object *pack, object *x, int type, tensor *t, int *found) {
    memcpy(t->dims, values<int64_t>(x, 902), sizeof t->dims);
    memcpy(t->strides, values<int64_t>(x, 903), sizeof t->strides);
    t->data = nullptr;
    if (x->values.count(907) && *values<bool>(x, 907))
        return *values<int>(x, 901) == 0;
    for (int64_t k = 0; k < pack->values[1000].n; k++)
        if (values<int64_t>(pack, 1000)[k] == *values<int64_t>(x, 906)) {
            t->data = values<void *>(pack, 1001)[k];
            (*found)++;
        }
    return t->data && *values<int>(x, 901) == type &&
           (uintptr_t)t->data % (uintptr_t)*values<int64_t>(x, 900) == 0;
}

int run_attention(void *stream, object *op, object *pack) {
    tensor t[4];
    int found = 0;
    for (int i = 0; i < 4; i++)
        if (!place(pack, child(op, 2800 + i), 9, &t[i], &found))
            return BAD;
    tensor number;
    object *x = child(op, 2805);
    if (!place(pack, x, 0, &number, &found) || !*values<bool>(x, 908) ||
        found != pack->values[1000].n)
        return BAD;
    float scale = fake_cudnn.fault == FAKE_CUDNN_NO_SCALE ? 1 : *static_cast<float *>(number.data);
    tensor q = t[0], k = t[1], v = t[2], o = t[3];
    fake_cudnn.queue(stream, [=]() { attend(q, k, v, o, scale); });
    return OK;
}

/* A convolution and sums, each of the result before it; sums of the same type as cuDNN's finished
 * kernels have them: a whole map before a bias. */
int run_convolution(void *stream, object *const *ops, int64_t n, object *pack) {
    std::vector<step> steps;
    int found = 0;
    bool bias = false;
    for (int64_t k = 0; k < n; k++) {
        object *op = ops[k], *how = child(op, k ? 750 : 702);
        step s = step();
        if (op->kind != (k ? POINTWISE_OP : CONV_FORWARD) ||
            !place(pack, child(op, k ? 752 : 703), 9, &s.b, &found) ||
            !place(pack, child(op, k ? 753 : 705), 9, &s.y, &found) || !s.y.data != (k + 1 < n))
            return BAD;
        if (k) {
            bool small = s.b.dims[2] == 1 && s.b.dims[3] == 1 && s.y.dims[2] * s.y.dims[3] > 1;
            if (*values<int>(how, 0) != 0 || *values<int>(how, 1) != 0 || (bias && !small) ||
                *values<int64_t>(child(op, 751), 906) !=
                    *values<int64_t>(child(ops[k - 1], k > 1 ? 753 : 705), 906))
                return BAD;
            bias = small;
            steps.push_back(s);
            continue;
        }
        const int64_t *before = values<int64_t>(how, 105), *behind = values<int64_t>(how, 104),
                      *stride = values<int64_t>(how, 103);
        if (!place(pack, child(op, 704), 9, &s.x, &found) || *values<float>(op, 700) != 1 ||
            *values<float>(op, 701) != 0 || *values<int>(how, 100) != 0 ||
            *values<int>(how, 101) != 1 || *values<int64_t>(how, 106) != 2)
            return BAD;
        for (int i = 0; i < 2; i++) {
            s.before[i] = fake_cudnn.fault == FAKE_CUDNN_PADDING ? behind[i] : before[i];
            s.stride[i] = stride[i];
            if (values<int64_t>(how, 102)[i] != 1 ||
                s.y.dims[2 + i] !=
                    (s.x.dims[2 + i] + before[i] + behind[i] - s.b.dims[2 + i]) / stride[i] + 1)
                return BAD;
        }
        if (s.b.dims[0] != s.y.dims[1] || s.b.dims[1] != s.x.dims[1])
            return BAD;
        steps.push_back(s);
    }
    if (found != pack->values[1000].n)
        return BAD;
    if (!fake_cudnn.idle)
        fake_cudnn.queue(stream, [=]() { convolve(steps); });
    return OK;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

API size_t cudnnGetVersion() {
    if (fake_cudnn.real && !real.lib && !real_open())
        return 0;
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
    object *o = new object{kind, false, {}, 0, nullptr, {}};
    if (fake_cudnn.real && kind != VARIANT_PACK && real.make(kind, &o->twin)) {
        delete o;
        return FAILED;
    }
    *out = o;
    fake_cudnn.live++;
    return OK;
}
API int cudnnBackendDestroyDescriptor(void *d) {
    object *o = static_cast<object *>(d);
    if (o->twin)
        real.free(o->twin);
    delete o;
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
    if (real_set(o, name, type, n, p))
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
    if (int rc = real_finalize(o))
        return rc;
    if (o->kind == PLAN) {
        object *config = child(o, 401);
        if (fake_cudnn.fault == FAKE_CUDNN_NO_PLAN)
            return NOT_SUPPORTED;
        object *graph = child(child(config, -1), 201);
        for (int64_t k = 0; k < graph->values[801].n; k++)
            for (int name : {702, 750}) /* an operation of another kind than its description */
                if (values<object *>(graph, 801)[k]->values.count(name) &&
                    child(values<object *>(graph, 801)[k], name)->kind !=
                        (name == 702 ? CONVOLUTION : POINTWISE))
                    return BAD;
        o->values[-1] = graph->values[801];
        for (int64_t k = 0; k < graph->values[801].n; k++) {
            object *op = clone(values<object *>(graph, 801)[k], &o->kept);
            memcpy(o->values[-1].bytes.data() + (size_t)k * sizeof op, &op, sizeof op);
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
        void *twins[2] = {asked > 0 ? list[0]->twin : nullptr, asked > 1 ? list[1]->twin : nullptr};
        if (o->twin && (asked < 2 || real.get(o->twin, 202, 15, 2, n, twins) || *n < 2))
            return BAD;
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
    if (!plan->final || !pack->final || fake_cudnn.fault == FAKE_CUDNN_NO_RUN ||
        !*values<void *>(pack, 1003))
        return FAILED;
    object *const *ops = values<object *>(plan, -1);
    void *stream = *static_cast<void **>(handle);
    int rc = ops[0]->kind == SDPA ? run_attention(stream, ops[0], pack)
                                  : run_convolution(stream, ops, plan->values[-1].n, pack);
    fake_cudnn.runs += rc == OK;
    return rc;
}
