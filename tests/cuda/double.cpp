/* The CUDA runtime on the CPU, as unkind as the real one is allowed to be: nothing that is queued
 * runs before somebody waits, and then the streams take turns at random, held back by events
 * alone. Memory of a device cannot be touched while another one works. */
#include "double.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <deque>
#include <vector>

#include "emulate.hpp"

struct cu_event_s {
    int64_t recorded, done;
};

namespace {

struct work {
    std::function<void()> run; /* empty: an event's wait or record */
    cu_event wait, record;
    int64_t round;
};

struct block {
    unsigned char *p;
    size_t n, mapped;
    int device; /* -1: pinned host memory */
};

cu_double_options options;
cu_double_stats stats;
bool configured, lost;
std::vector<block> blocks;
std::vector<cu_stream> streams;
uint64_t dice;
int active = -1; /* device whose memory can be touched; -1: all */
char text[256];

[[noreturn]] void broken(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "double: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    abort();
}

uint64_t next_random() {
    dice = dice * 6364136223846793005ull + 1442695040888963407ull;
    return dice >> 33;
}

} // namespace

struct cu_stream_s {
    int device, number; /* physical; as the process counts */
    std::deque<work> queue;
};

extern "C" cu_double_options cu_double_options_default(void) {
    cu_double_options o;
    memset(&o, 0, sizeof o);
    o.n_devices = 1;
    for (int i = 0; i < CU_DOUBLE_DEVICES; i++)
        o.memory[i] = (size_t)1 << 30;
    o.cc_major = 8;
    o.seed = 1;
    return o;
}

extern "C" void cu_double_configure(const cu_double_options *o) {
    options = *o;
    memset(&stats, 0, sizeof stats);
    dice = o->seed * 2654435761u + 1;
    lost = false;
    configured = true;
    text[0] = 0;
}

extern "C" cu_double_stats cu_double_stats_get(void) {
    return stats;
}

namespace {

void from_environment() {
    cu_double_options o = cu_double_options_default();
    const char *e = getenv("QIE_CUDA_DOUBLE");
    while (e && *e) {
        char key[32];
        size_t k = strcspn(e, "=");
        snprintf(key, sizeof key, "%.*s", (int)(k < 31 ? k : 31), e);
        e += k + (e[k] == '=');
        char *end;
        unsigned long long v = strtoull(e, &end, 10);
        if (!strcmp(key, "devices"))
            o.n_devices = (int)v;
        else if (!strcmp(key, "seed"))
            o.seed = v;
        else if (!strcmp(key, "cc")) {
            o.cc_major = (int)(v / 10);
            o.cc_minor = (int)(v % 10);
        } else if (!strcmp(key, "lose_at"))
            o.lose_at = (int64_t)v;
        else if (!strcmp(key, "memory"))
            for (int i = 0; i < CU_DOUBLE_DEVICES; i++) {
                o.memory[i] = (size_t)v << 20;
                if (*end == ':')
                    v = strtoull(end + 1, &end, 10);
            }
        else
            broken("QIE_CUDA_DOUBLE does not know '%s'", key);
        e = *end == ',' ? end + 1 : end;
    }
    cu_double_configure(&o);
}

void uuid_of(int device, char out[48]) {
    snprintf(out, 48, "GPU-%08x-0000-0000-0000-000000000000", (unsigned)device);
}

int dead() {
    if (!configured)
        from_environment();
    if (lost) {
        snprintf(text, sizeof text, "the device was lost");
        return CU_LOST;
    }
    return CU_OK;
}

void touchable(int device) {
    if (device == active)
        return;
    active = device;
    for (const block &b : blocks)
        if (b.device >= 0)
            mprotect(b.p, b.mapped,
                     device < 0 || device == b.device ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void need(const void *p, size_t n, int device, const char *what) {
    const unsigned char *c = static_cast<const unsigned char *>(p);
    for (const block &b : blocks)
        if (b.device == device && c >= b.p && c + n <= b.p + b.n)
            return;
    broken("%s of %zu bytes at %p is not inside live memory of %s %d", what, n, p,
           device < 0 ? "the host" : "device", device);
}

bool blocked(const work &w) {
    return w.wait && w.wait->done < w.round;
}

/* One piece of work of a stream that may go on. False: none may. */
bool run_one() {
    cu_stream able[64];
    size_t n = 0;
    for (cu_stream s : streams)
        if (!s->queue.empty() && !blocked(s->queue.front()) && n < 64)
            able[n++] = s;
    if (!n)
        return false;
    /* A stream that may go on goes on for long, while others starve: taking turns piece by piece
     * would hide a missing wait, since a single copy is soon done. */
    static cu_stream favourite;
    bool can = false;
    for (size_t i = 0; i < n; i++)
        can = can || able[i] == favourite;
    if (!can || next_random() % 256 == 0)
        favourite = able[next_random() % n];
    cu_stream s = favourite;
    work w = std::move(s->queue.front());
    s->queue.pop_front();
    if (w.record) {
        if (w.record->done < w.round)
            w.record->done = w.round;
    } else if (w.run) {
        stats.works++;
        stats.works_of[s->device]++;
        if (options.lose_at && stats.works >= options.lose_at)
            lost = true;
        if (!lost)
            w.run();
    }
    return true;
}

void queue(cu_stream s, std::function<void()> f) {
    s->queue.push_back(work{std::move(f), nullptr, nullptr, 0});
}

void drain() {
    while (run_one()) {
    }
    touchable(-1);
}

int allocate(int device, size_t n, void **out) {
    size_t page = 4096, mapped = (n + page) / page * page;
    void *p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        broken("no memory for %zu bytes", n);
    memset(p, 0xff, n); /* NaN in every floating type */
    blocks.push_back(block{static_cast<unsigned char *>(p), n, mapped, device});
    *out = p;
    return CU_OK;
}

size_t release(int device, void *p) {
    for (size_t i = 0; i < blocks.size(); i++)
        if (blocks[i].p == p && blocks[i].device == device) {
            size_t n = blocks[i].n;
            munmap(p, blocks[i].mapped);
            blocks.erase(blocks.begin() + (ptrdiff_t)i);
            return n;
        }
    broken("free of %p, which is no allocation", p);
}

} // namespace

void cu_emu_launch(cu_stream s, int64_t gx, int64_t gy, int threads, size_t shared,
                   std::function<void()> body) {
    if (dead())
        return;
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        cu_emu_run(gx, gy, threads, shared, body);
    });
}

void cu_double_queue(cu_stream s, std::function<void()> f, const cu_double_range *ranges,
                     int n_ranges) {
    if (dead())
        return;
    int device = s->device;
    for (int i = 0; i < n_ranges; i++)
        need(ranges[i].data, ranges[i].n, device, "an operand");
    queue(s, [=]() {
        touchable(device);
        f();
    });
}

/* Devices that CUDA_VISIBLE_DEVICES leaves, in its order; a word that names none ends the list. */
static int visible(int out[CU_DOUBLE_DEVICES]) {
    const char *e = getenv("CUDA_VISIBLE_DEVICES");
    int n = 0;
    if (!e) {
        for (; n < options.n_devices; n++)
            out[n] = n;
        return n;
    }
    while (*e && n < CU_DOUBLE_DEVICES) {
        size_t k = strcspn(e, ",");
        int found = -1;
        for (int d = 0; d < options.n_devices; d++) {
            char uuid[48], index[16];
            uuid_of(d, uuid);
            snprintf(index, sizeof index, "%d", d);
            if ((k == strlen(index) && !strncmp(e, index, k)) || (k > 4 && !strncmp(e, uuid, k)))
                found = d;
        }
        if (found < 0)
            return n;
        out[n++] = found;
        e += k + (e[k] == ',');
    }
    return n;
}

/* Tests speak of physical devices, the process counts those that it sees. */
static int physical(int device) {
    int list[CU_DOUBLE_DEVICES], n = visible(list);
    if (device < 0 || device >= n)
        broken("there is no device %d", device);
    return list[device];
}

extern "C" {

int cu_count(int *n) {
    int list[CU_DOUBLE_DEVICES];
    if (!configured)
        from_environment();
    *n = visible(list);
    return CU_OK;
}

int cu_info(int device, cu_device_info *out) {
    if (int rc = dead())
        return rc;
    device = physical(device);
    memset(out, 0, sizeof *out);
    uuid_of(device, out->uuid);
    snprintf(out->name, sizeof out->name, "Double %d", device);
    out->total = options.memory[device];
    out->cc_major = options.cc_major;
    out->cc_minor = options.cc_minor;
    out->n_sm = 2;
    return CU_OK;
}

int cu_memory(int device, size_t *free, size_t *total) {
    device = physical(device);
    *total = options.memory[device];
    *free = options.memory[device] - stats.live[device];
    return dead();
}

int cu_malloc(int device, size_t n, void **out) {
    *out = nullptr;
    if (int rc = dead())
        return rc;
    device = physical(device);
    touchable(-1);
    stats.allocs++;
    if (stats.allocs == options.fail_alloc || n > options.memory[device] - stats.live[device]) {
        snprintf(text, sizeof text, "out of memory");
        return CU_OOM;
    }
    stats.live[device] += n;
    if (stats.live[device] > stats.peak[device])
        stats.peak[device] = stats.live[device];
    return allocate(device, n, out);
}

int cu_free(int device, void *p) {
    if (!p)
        return CU_OK;
    drain();
    device = physical(device);
    stats.live[device] -= release(device, p);
    return CU_OK;
}

int cu_host_alloc(size_t n, void **out) {
    *out = nullptr;
    if (int rc = dead())
        return rc;
    stats.host_allocs++;
    if (stats.host_allocs == options.fail_host) {
        snprintf(text, sizeof text, "out of memory");
        return CU_OOM;
    }
    stats.host_live += n;
    return allocate(-1, n, out);
}

int cu_host_free(void *p) {
    if (!p)
        return CU_OK;
    drain();
    stats.host_live -= release(-1, p);
    return CU_OK;
}

int cu_stream_create(int device, cu_stream *out) {
    *out = nullptr;
    if (int rc = dead())
        return rc;
    *out = new cu_stream_s{physical(device), device, {}};
    streams.push_back(*out);
    return CU_OK;
}

void cu_stream_destroy(cu_stream s) {
    if (!s)
        return;
    drain();
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s)
            streams.erase(streams.begin() + (ptrdiff_t)i);
    delete s;
}

int cu_stream_device(cu_stream s) {
    return s->number;
}

int cu_stream_sync(cu_stream s) {
    while (!s->queue.empty())
        if (!run_one())
            broken("a stream waits for an event that nobody will record");
    touchable(-1);
    return dead();
}

int cu_event_create(int device, cu_event *out) {
    (void)device;
    *out = nullptr;
    if (int rc = dead())
        return rc;
    *out = new cu_event_s{0, 0};
    return CU_OK;
}

void cu_event_destroy(cu_event e) {
    if (!e)
        return;
    drain();
    delete e;
}

int cu_event_record(cu_event e, cu_stream s) {
    if (int rc = dead())
        return rc;
    s->queue.push_back(work{nullptr, nullptr, e, ++e->recorded});
    return CU_OK;
}

int cu_stream_wait(cu_stream s, cu_event e) {
    if (int rc = dead())
        return rc;
    if (++stats.waits == options.drop_wait)
        return CU_OK;
    s->queue.push_back(work{nullptr, e, nullptr, e->recorded});
    return CU_OK;
}

int cu_event_sync(cu_event e) {
    int64_t until = e->recorded;
    while (e->done < until)
        if (!run_one())
            broken("an event is waited for that nobody will record");
    touchable(-1);
    return dead();
}

int cu_copy_in(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead())
        return rc;
    need(dst, n, s->device, "the end of a copy");
    need(src, n, -1, "the source of a copy");
    stats.copies_in_bytes += (int64_t)n;
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        memcpy(dst, src, n);
    });
    return CU_OK;
}

int cu_copy_out(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead())
        return rc;
    need(src, n, s->device, "the source of a copy");
    need(dst, n, -1, "the end of a copy");
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        memcpy(dst, src, n);
    });
    return CU_OK;
}

int cu_copy_peer(cu_stream s, int dst_device, void *dst, const void *src, size_t n) {
    if (int rc = dead())
        return rc;
    dst_device = physical(dst_device);
    need(src, n, s->device, "the source of a copy");
    need(dst, n, dst_device, "the end of a copy");
    stats.copies_peer_bytes += (int64_t)n;
    queue(s, [=]() {
        touchable(-1);
        memcpy(dst, src, n);
    });
    return CU_OK;
}

int cu_copy(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead())
        return rc;
    need(src, n, s->device, "the source of a copy");
    need(dst, n, s->device, "the end of a copy");
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        memmove(dst, src, n);
    });
    return CU_OK;
}

int cu_zero(cu_stream s, void *dst, size_t n) {
    if (int rc = dead())
        return rc;
    need(dst, n, s->device, "the range of a fill");
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        memset(dst, 0, n);
    });
    return CU_OK;
}

const char *cu_text(void) {
    return text;
}

int cu_fail(int code, const char *what) {
    snprintf(text, sizeof text, "%s", what);
    return code;
}

} // extern "C"
