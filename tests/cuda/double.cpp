/* The CUDA runtime on the CPU, as unkind as the real one is allowed to be: what is queued runs at
 * once, or not before somebody waits, or at random, as the seed says, held back by the order of its
 * stream and by events alone; the end of a copy is spoiled before it comes. Memory of a device
 * cannot be touched while another one works. A graph that is launched runs on streams of its own,
 * one for each that was captured: in any order that the captured events allow. */
#include "double.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <vector>

#include "compute/cuda/cu_causes.hpp"
#include "emulate.hpp"

namespace {

struct capture;

/* How much of each stream's work (and [0]: of the host's) comes before something, in any run: which
 * orders are made twice is told by these, not by what happened to run first. */
struct order_clock {
    int64_t upto[64];
    void join(const order_clock &o) {
        for (size_t i = 0; i < 64; i++)
            upto[i] = o.upto[i] > upto[i] ? o.upto[i] : upto[i];
    }
    bool covers(const order_clock &o) const {
        for (size_t i = 0; i < 64; i++)
            if (o.upto[i] > upto[i])
                return false;
        return true;
    }
};

} // namespace

struct cu_event_s {
    int device; /* physical */
    int64_t recorded, done;
    order_clock clock;   /* of its last record */
    int64_t record_call; /* its number; 0: never */
    capture *in;         /* recorded last while capturing, as its number `at`; NULL: not */
    bool captured;
    size_t at;
};

namespace {

struct work {
    std::function<void()> run; /* empty: an event's wait or record */
    cu_event wait, record;
    int64_t round;
    bool poison; /* not work of the program: spoils the end of the copy behind it */
};

struct range {
    const void *p;
    size_t n;
    int device;
};

/* What a captured stream was told, events by number. */
struct step {
    std::function<void()> run;
    int wait, record; /* -1: neither */
    bool poison;
};
struct chain {
    cu_stream stream; /* captured; later the graph's own */
    std::vector<step> steps;
};
struct capture {
    std::vector<chain> chains; /* the first one began it */
    std::vector<range> ranges; /* memory that has to live when it runs */
    int n_events;
    bool broken;
};

struct block {
    unsigned char *p;
    size_t n, mapped;
    int device;        /* -1: pinned host memory */
    int due;           /* copies from it that are still to come: nobody may write there */
    size_t begin, end; /* of the pages that they read */
};

cu_double_options options;
cu_double_stats stats;
bool configured, lost[CU_DOUBLE_DEVICES], failed_launch;
std::vector<block> blocks;
std::vector<cu_stream> streams;
std::vector<const void *> sites;
struct order_call {
    const void *site;
    bool implied;        /* of a wait */
    int64_t record_call; /* that a wait is for; 0: the call is a record */
};
std::vector<order_call> orders;
order_clock host_clock;
cu_stream favoured, starved; /* see cu_double_options.aim */
bool all_favoured;
uint64_t dice;
int n_streams;   /* made so far */
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

/* The pages of pinned memory that a copy is still to read cannot be written until it has: whether
 * or not other bytes are put there, or this model's picture shows them. */
block *pinned_of(const void *p) {
    const unsigned char *c = static_cast<const unsigned char *>(p);
    for (block &b : blocks)
        if (b.device < 0 && c >= b.p && c < b.p + b.n)
            return &b;
    return nullptr;
}
void hold_source(const void *p, size_t n) {
    block *b = pinned_of(p);
    size_t page = 4096, at = (size_t)(static_cast<const unsigned char *>(p) - b->p);
    size_t begin = at / page * page, end = (at + n + page - 1) / page * page;
    mprotect(b->p + begin, end - begin, PROT_READ);
    b->begin = b->due && b->begin < begin ? b->begin : begin;
    b->end = b->due && b->end > end ? b->end : end;
    b->due++;
}
void give_back_source(const void *p) {
    block *b = pinned_of(p);
    if (--b->due == 0)
        mprotect(b->p + b->begin, b->end - b->begin, PROT_READ | PROT_WRITE);
}

struct sigaction before_ours;
void on_fault(int number, siginfo_t *info, void *) {
    block *b = pinned_of(info->si_addr);
    if (b && b->due)
        broken("the source of a copy was written before it was copied");
    sigaction(number, &before_ours, nullptr); /* comes again */
}

} // namespace

/* A wait of a stream that nothing has been queued behind yet: what the stream would know without
 * it, and what it is for. Whether it is implied is told when it first matters. */
struct open_wait {
    size_t order;
    order_clock without, needed;
};

struct cu_stream_s {
    int device, number; /* physical; as the process counts */
    int serial;         /* in order of creation */
    std::deque<work> queue;
    capture *capturing;
    order_clock clock, outside; /* while capturing: within the capture; before it */
    std::vector<open_wait> waits;
};

struct cu_graph_s {
    capture what;
    cu_event begin;
    std::vector<cu_event> events, ends; /* captured; of each chain */
};

extern "C" cu_double_options cu_double_options_default(void) {
    cu_double_options o;
    memset(&o, 0, sizeof o);
    o.n_devices = 1;
    for (int i = 0; i < CU_DOUBLE_DEVICES; i++)
        o.memory[i] = (size_t)1 << 30;
    o.cc_major = 8;
    o.driver = 13000;
    o.seed = 1;
    return o;
}

extern "C" void cu_double_configure(const cu_double_options *o) {
    options = *o;
    memset(&stats, 0, sizeof stats);
    dice = o->seed * 2654435761u + 1;
    memset(lost, 0, sizeof lost);
    failed_launch = false;
    if (!configured) {
        struct sigaction ours = {};
        ours.sa_sigaction = on_fault;
        ours.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &ours, &before_ours);
    }
    configured = true;
    n_streams = 0;
    sites.clear();
    orders.clear();
    host_clock = order_clock();
    favoured = starved = nullptr;
    all_favoured = false;
    text[0] = 0;
}

extern "C" cu_double_order cu_double_order_get(int64_t n) {
    const order_call &c = orders[(size_t)n - 1];
    cu_double_order o = {0, c.implied};
    if (!c.record_call) { /* a record */
        o.implied = true;
        for (const order_call &w : orders)
            if (w.record_call == n && !w.implied)
                o.implied = false;
    }
    Dl_info in;
    if (dladdr(c.site, &in))
        o.site_at =
            (size_t)(static_cast<const char *>(c.site) - static_cast<const char *>(in.dli_fbase));
    return o;
}

extern "C" cu_double_stats cu_double_stats_get(void) {
    return stats;
}

__attribute__((destructor)) static void report() {
    const char *path = getenv("QIE_CUDA_DOUBLE_REPORT");
    FILE *f = path && configured ? fopen(path, "w") : nullptr;
    if (!f)
        return;
    fprintf(f, "orders=%lld sites=%lld works=%lld\n", (long long)stats.orders,
            (long long)stats.sites, (long long)stats.works);
    fclose(f);
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
        else if (!strcmp(key, "drop"))
            o.drop = (int64_t)v;
        else if (!strcmp(key, "drop_site"))
            o.drop_site = (int64_t)v;
        else if (!strcmp(key, "cc")) {
            o.cc_major = (int)(v / 10);
            o.cc_minor = (int)(v % 10);
        } else if (!strcmp(key, "driver"))
            o.driver = (int)v;
        else if (!strcmp(key, "error"))
            o.error = (int)v;
        else if (!strcmp(key, "lose_at"))
            o.lose_at = (int64_t)v;
        else if (!strcmp(key, "fail_alloc"))
            o.fail_alloc = (int64_t)v;
        else if (!strcmp(key, "fail_host"))
            o.fail_host = (int64_t)v;
        else if (!strcmp(key, "fail_call"))
            o.fail_call = (int64_t)v;
        else if (!strcmp(key, "fail_capture"))
            o.fail_capture = (int64_t)v;
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

int fails(int code, const char *ours) {
    switch (options.error) {
    case 0: return cu_fail(code, ours);
#define CAUSE(cuda, number, c, hint) \
    case number: return cu_explain(number, "cudaError" #cuda, "provoked", text, sizeof text);
        CU_CAUSES(CAUSE)
#undef CAUSE
    default: broken("there are no words for error %d", options.error);
    }
}

/* May a call of this physical device succeed? A failure of our own is the first card's. */
int dead(int device) {
    if (!configured)
        from_environment();
    if (lost[device])
        return fails(CU_LOST, "the device was lost");
    if (failed_launch || ++stats.calls == options.fail_call ||
        (options.fail_here && options.fail_here(stats.calls)))
        return fails(CU_FAILED, "an injected failure");
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

/* From outside, while a process runs: QIE_CUDA_DOUBLE_LOST=PATH, a file PATH.2 takes device 2. */
bool taken_away(int device) {
    static const char *const path = getenv("QIE_CUDA_DOUBLE_LOST");
    char name[512];
    if (!path)
        return false;
    snprintf(name, sizeof name, "%.480s.%d", path, device);
    return access(name, F_OK) == 0;
}

bool blocked(const work &w) {
    return w.wait && w.wait->done < w.round;
}

bool hurried(const cu_stream_s *s) {
    if (options.aim)
        return s == favoured || (all_favoured && s != starved);
    switch (options.seed % CU_DOUBLE_POLICIES) {
    case 1: return s->serial % 2 == 1;
    case 2: return s->serial % 2 == 0;
    case 3: return ((options.seed * 0x9e3779b97f4a7c15ull) >> (s->serial % 48 + 8)) & 1;
    default: return false;
    }
}

/* The first piece of work of a stream, if nothing holds it. */
bool run_head(cu_stream s) {
    if (s->queue.empty() || blocked(s->queue.front()))
        return false;
    work w = std::move(s->queue.front());
    s->queue.pop_front();
    if (w.record) {
        if (w.record->done < w.round)
            w.record->done = w.round;
    } else if (w.run) {
        if (!w.poison) {
            stats.works++;
            stats.works_of[s->device]++;
            if ((options.lose_at && stats.works >= options.lose_at) || taken_away(s->device) ||
                (options.lose_here && options.lose_here(stats.works)))
                lost[s->device] = true;
        }
        if (!lost[s->device])
            w.run();
    }
    return true;
}

/* Everything in front of the stream's next piece of real work: events cost nothing, and the end of
 * a copy that is about to come may be spoiled as soon as the stream is there. */
void advance(cu_stream s) {
    while (!s->queue.empty() && (s->queue.front().poison || !s->queue.front().run) && run_head(s)) {
    }
}

/* What runs although nobody waits for it. */
void pump() {
    bool more = true;
    while (more) {
        more = false;
        for (cu_stream s : streams) {
            advance(s);
            while (hurried(s) && run_head(s))
                more = true;
        }
    }
    if (options.aim)
        return;
    if (options.seed % CU_DOUBLE_POLICIES == 4)
        for (uint64_t n = next_random() % 4; n && !streams.empty(); n--)
            run_head(streams[next_random() % streams.size()]);
    if (options.seed % CU_DOUBLE_POLICIES == 5) {
        static cu_stream favourite;
        bool there = false;
        for (cu_stream s : streams)
            there = there || s == favourite;
        if (!streams.empty() && (!there || next_random() % 256 == 0))
            favourite = streams[next_random() % streams.size()];
        while (!streams.empty() && next_random() % 256 && run_head(favourite)) {
        }
    }
}

/* One piece of work of this stream, after what it has to wait for: only that. */
void force(cu_stream s, int depth) {
    if (depth > 256)
        broken("streams wait for each other");
    cu_event wait = s->queue.front().wait;
    int64_t round = s->queue.front().round;
    while (wait && wait->done < round) {
        cu_stream owner = nullptr;
        for (cu_stream x : streams)
            for (const work &r : x->queue)
                if (r.record == wait && r.round >= round)
                    owner = x;
        if (!owner)
            broken("a stream waits for an event that nobody will record");
        force(owner, depth + 1);
    }
    run_head(s);
    pump();
}

chain *chain_of(capture *c, cu_stream s) {
    for (chain &x : c->chains)
        if (x.stream == s)
            return &x;
    return nullptr;
}

/* Before anything comes behind the stream's waits. */
void settle(cu_stream s) {
    if (!s->capturing)
        s->clock.join(host_clock);
    for (open_wait &w : s->waits) {
        if (!s->capturing)
            w.without.join(host_clock);
        orders[w.order].implied = w.without.covers(w.needed);
    }
    s->waits.clear();
}

void queue(cu_stream s, std::function<void()> f, bool poison = false) {
    settle(s);
    s->clock.upto[s->serial % 63 + 1]++;
    if (s->capturing) {
        chain_of(s->capturing, s)->steps.push_back(step{std::move(f), -1, -1, poison});
        return;
    }
    s->queue.push_back(work{std::move(f), nullptr, nullptr, 0, poison});
    if (!poison)
        pump();
}

/* Memory that work on this stream will touch: live now, and when a graph of it is launched. */
void touches(cu_stream s, const void *p, size_t n, int device, const char *what) {
    need(p, n, device, what);
    if (s->capturing)
        s->capturing->ranges.push_back(range{p, n, device});
}

/* A copy in two pieces: its end is spoiled as early as may be (NaN in every floating type), and
 * filled as late as may be. Whoever reads it too early, or still needs what lay there, shows. */
void queue_copy(cu_stream s, int dst_device, void *dst, size_t n, std::function<void()> f) {
    queue(
        s,
        [=]() {
            block *b = dst_device < 0 ? pinned_of(dst) : nullptr;
            if (b && b->due)
                broken("a copy ends where another one has not read yet");
            touchable(dst_device < 0 ? -1 : dst_device);
            memset(dst, 0xff, n);
        },
        true);
    queue(s, std::move(f));
}

void drain() {
    for (cu_stream s : streams) {
        while (!s->queue.empty())
            force(s, 0);
        if (!s->capturing)
            host_clock.join(s->clock);
    }
    touchable(-1);
}

/* Is this call that makes an order to be forgotten? Places are told by the caller's address. */
bool forgotten(const void *caller) {
    size_t i = 0;
    while (i < sites.size() && sites[i] != caller)
        i++;
    if (i == sites.size()) {
        Dl_info in;
        sites.push_back(caller);
        if (i < CU_DOUBLE_SITES && dladdr(caller, &in))
            stats.site_at[i] = (size_t)(static_cast<const char *>(caller) -
                                        static_cast<const char *>(in.dli_fbase));
    }
    stats.sites = (int64_t)sites.size();
    orders.push_back(order_call{caller, false, 0});
    return ++stats.orders == options.drop || (int64_t)i + 1 == options.drop_site ||
           (options.leave_out && options.leave_out(stats.orders));
}

/* The call that was just counted waits for this record; does the waiting side know more anyway? */
void note_wait(int64_t record_call, bool implied) {
    orders.back().record_call = record_call;
    orders.back().implied = implied;
}

int allocate(int device, size_t n, void **out) {
    size_t page = 4096, mapped = (n + page) / page * page;
    void *p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        broken("no memory for %zu bytes", n);
    memset(p, 0xff, n); /* NaN in every floating type */
    blocks.push_back(block{static_cast<unsigned char *>(p), n, mapped, device, 0, 0, 0});
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

/* Shows with the next call, or where it was only to be noted, at the end of the capture. */
void refuse_launch(cu_stream s) {
    if (s->capturing)
        s->capturing->broken = true;
    else if (!lost[s->device])
        failed_launch = true;
}

} // namespace

void cu_emu_launch(cu_stream s, int64_t gx, int64_t gy, int threads, size_t shared,
                   std::function<void()> body) {
    if (dead(s->device)) {
        refuse_launch(s);
        return;
    }
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        cu_emu_run(gx, gy, threads, shared, body);
    });
}

void cu_double_queue(cu_stream s, std::function<void()> f, const cu_double_range *ranges,
                     int n_ranges) {
    if (dead(s->device)) {
        refuse_launch(s);
        return;
    }
    int device = s->device;
    for (int i = 0; i < n_ranges; i++)
        touches(s, ranges[i].data, ranges[i].n, device, "an operand");
    queue(s, [=]() {
        touchable(device);
        f();
    });
}

/* Devices that CUDA_VISIBLE_DEVICES leaves, in its order; a word that names none ends the list. */
static int visible(int out[CU_DOUBLE_DEVICES]) {
    if (!configured)
        from_environment();
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

/* The capture that is going on, if any. */
static capture *current_capture;

static bool alive(const capture *c) {
    return c && c == current_capture;
}

/* What a capture does not allow ends it. */
static int breaks(capture *c, const char *what) {
    if (alive(c))
        c->broken = true;
    snprintf(text, sizeof text, "%s", what);
    return CU_FAILED;
}

/* Is everything that was captured over when the stream that began it is? */
static bool joined(const capture &c) {
    std::vector<size_t> upto(c.chains.size(), 0);
    upto[0] = c.chains[0].steps.size();
    for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < c.chains.size(); i++)
            for (size_t k = 0; k < upto[i]; k++)
                for (size_t j = 0; c.chains[i].steps[k].wait >= 0 && j < c.chains.size(); j++)
                    for (size_t m = upto[j]; m < c.chains[j].steps.size(); m++)
                        if (c.chains[j].steps[m].record == c.chains[i].steps[k].wait) {
                            upto[j] = m + 1;
                            more = true;
                        }
    }
    for (size_t i = 0; i < c.chains.size(); i++)
        if (upto[i] < c.chains[i].steps.size())
            return false;
    return true;
}

extern "C" {

int cu_capture_begin(cu_stream s) {
    if (int rc = dead(s->device))
        return rc;
    if (current_capture)
        return cu_fail(CU_FAILED, "a capture within a capture");
    settle(s);
    current_capture = s->capturing = new capture{{chain{s, {}}}, {}, 0, false};
    s->outside = s->clock;
    s->clock = order_clock();
    return CU_OK;
}

int cu_capture_end(cu_stream s, cu_graph *out) {
    capture *c = s->capturing;
    *out = nullptr;
    if (!c || c->chains[0].stream != s)
        broken("the end of a capture that this stream did not begin");
    for (chain &x : c->chains) {
        settle(x.stream);
        x.stream->capturing = nullptr;
        x.stream->clock = x.stream->outside;
    }
    current_capture = nullptr;
    int rc = dead(s->device);
    stats.graphs++;
    if (rc == CU_OK && c->broken)
        rc = CU_FAILED;
    if (rc == CU_OK && !joined(*c))
        rc = cu_fail(CU_FAILED, "captured work is not joined");
    if (rc == CU_OK && stats.graphs == options.fail_capture)
        rc = cu_fail(CU_OOM, "out of memory");
    if (rc == CU_OK) {
        cu_graph g = new cu_graph_s{std::move(*c), nullptr, {}, {}};
        for (chain &x : g->what.chains) {
            cu_stream of = x.stream;
            x.stream = new cu_stream_s{of->device, of->number, of->serial, {}, nullptr, {}, {}, {}};
            streams.push_back(x.stream);
            g->ends.push_back(new cu_event_s{0, 0, 0, {}, 0, nullptr, false, 0});
        }
        g->begin = new cu_event_s{0, 0, 0, {}, 0, nullptr, false, 0};
        for (int i = 0; i < g->what.n_events; i++)
            g->events.push_back(new cu_event_s{0, 0, 0, {}, 0, nullptr, false, 0});
        *out = g;
    }
    delete c;
    return rc;
}

int cu_graph_launch(cu_graph g, cu_stream s) {
    if (int rc = dead(s->device))
        return rc;
    if (s->capturing)
        return breaks(s->capturing, "a graph is launched into a capture");
    for (const range &r : g->what.ranges)
        need(r.p, r.n, r.device, "an operand of a graph");
    stats.graph_launches++;
    settle(s);
    s->clock.upto[s->serial % 63 + 1]++;
    s->queue.push_back(work{nullptr, nullptr, g->begin, ++g->begin->recorded, false});
    int64_t round = g->begin->recorded; /* of everything in this launch */
    for (size_t i = 0; i < g->what.chains.size(); i++) {
        std::deque<work> &q = g->what.chains[i].stream->queue;
        q.push_back(work{nullptr, g->begin, nullptr, round, false});
        for (const step &x : g->what.chains[i].steps) {
            cu_event wait = x.wait >= 0 ? g->events[(size_t)x.wait] : nullptr,
                     record = x.record >= 0 ? g->events[(size_t)x.record] : nullptr;
            q.push_back(work{x.run, wait, record, round, x.poison});
        }
        q.push_back(work{nullptr, nullptr, g->ends[i], round, false});
        s->queue.push_back(work{nullptr, g->ends[i], nullptr, round, false});
    }
    pump();
    return CU_OK;
}

void cu_graph_destroy(cu_graph g) {
    if (!g)
        return;
    for (chain &x : g->what.chains)
        cu_stream_destroy(x.stream);
    for (cu_event e : g->events)
        delete e;
    for (cu_event e : g->ends)
        delete e;
    delete g->begin;
    delete g;
}

int cu_count(int *n) {
    int list[CU_DOUBLE_DEVICES];
    if (!configured)
        from_environment();
    if (int rc = cu_explain_driver(options.driver, text, sizeof text))
        return rc;
    *n = visible(list);
    return CU_OK;
}

int cu_info(int device, cu_device_info *out) {
    device = physical(device);
    if (int rc = dead(device))
        return rc;
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
    return dead(device);
}

int cu_malloc(int device, size_t n, void **out) {
    *out = nullptr;
    device = physical(device);
    if (int rc = dead(device))
        return rc;
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
    if (int rc = dead(0))
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
    if (int rc = dead(physical(device)))
        return rc;
    *out = new cu_stream_s{physical(device), device, n_streams++, {}, nullptr, {}, {}, {}};
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

void *cu_native_stream(cu_stream s) {
    return s;
}

int cu_stream_device(cu_stream s) {
    return s->number;
}

int cu_stream_sync(cu_stream s) {
    bool forget = forgotten(__builtin_return_address(0));
    settle(s);
    note_wait(-1, host_clock.covers(s->clock));
    if (forget)
        return dead(s->device);
    host_clock.join(s->clock);
    if (s->capturing)
        return breaks(s->capturing, "a stream is waited for while it is captured");
    while (!s->queue.empty())
        force(s, 0);
    touchable(-1);
    return dead(s->device);
}

int cu_event_create(int device, cu_event *out) {
    *out = nullptr;
    if (int rc = dead(physical(device)))
        return rc;
    *out = new cu_event_s{physical(device), 0, 0, {}, 0, nullptr, false, 0};
    return CU_OK;
}

void cu_event_destroy(cu_event e) {
    if (!e)
        return;
    drain();
    delete e;
}

int cu_event_record(cu_event e, cu_stream s) {
    if (int rc = dead(s->device))
        return rc;
    if (forgotten(__builtin_return_address(0))) {
        starved = s;
        all_favoured = true;
        return CU_OK;
    }
    settle(s);
    e->clock = s->clock;
    e->record_call = stats.orders;
    e->in = s->capturing;
    e->captured = s->capturing != nullptr;
    if (capture *c = s->capturing) {
        e->at = (size_t)c->n_events;
        chain_of(c, s)->steps.push_back(step{nullptr, -1, c->n_events++, false});
        return CU_OK;
    }
    s->queue.push_back(work{nullptr, nullptr, e, ++e->recorded, false});
    pump();
    return CU_OK;
}

int cu_stream_wait(cu_stream s, cu_event e) {
    if (int rc = dead(s->device))
        return rc;
    bool forget = forgotten(__builtin_return_address(0));
    if (e->captured && !s->capturing && alive(e->in)) { /* joins the capture */
        settle(s);
        s->outside = s->clock;
        s->clock = order_clock();
    } else if (!s->capturing)
        s->clock.join(host_clock);
    note_wait(e->record_call ? e->record_call : -1, s->clock.covers(e->clock));
    if (forget) {
        favoured = s;
        if (e->captured && !s->capturing && alive(e->in))
            s->clock = s->outside;
        return CU_OK;
    }
    for (open_wait &w : s->waits)
        w.without.join(e->clock);
    s->waits.push_back(open_wait{orders.size() - 1, s->clock, e->clock});
    s->clock.join(e->clock);
    if (e->captured || s->capturing) {
        if (!e->captured || !alive(e->in) || (s->capturing && s->capturing != e->in))
            return breaks(s->capturing, "a captured stream and one that is not wait for another");
        if (!s->capturing) {
            s->capturing = e->in;
            e->in->chains.push_back(chain{s, {}});
        }
        chain_of(e->in, s)->steps.push_back(step{nullptr, (int)e->at, -1, false});
        return CU_OK;
    }
    s->queue.push_back(work{nullptr, e, nullptr, e->recorded, false});
    pump();
    return CU_OK;
}

int cu_event_sync(cu_event e) {
    int64_t until = e->recorded;
    bool forget = forgotten(__builtin_return_address(0));
    note_wait(e->record_call ? e->record_call : -1, host_clock.covers(e->clock));
    if (forget)
        return dead(e->device);
    host_clock.join(e->clock);
    if (e->captured)
        return breaks(e->in, "an event of a capture is waited for");
    while (e->done < until) {
        cu_stream owner = nullptr;
        for (cu_stream x : streams)
            for (const work &w : x->queue)
                if (w.record == e)
                    owner = x;
        if (!owner)
            broken("an event is waited for that nobody will record");
        force(owner, 0);
    }
    touchable(-1);
    return dead(e->device);
}

int cu_copy_in(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead(s->device))
        return rc;
    touches(s, dst, n, s->device, "the end of a copy");
    touches(s, src, n, -1, "the source of a copy");
    stats.copies_in_bytes += (int64_t)n;
    int device = s->device;
    bool once = !s->capturing; /* of a graph's the bytes may change from launch to launch */
    if (once)
        hold_source(src, n);
    queue_copy(s, device, dst, n, [=]() {
        touchable(device);
        memcpy(dst, src, n);
        if (once)
            give_back_source(src);
    });
    return CU_OK;
}

int cu_copy_out(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead(s->device))
        return rc;
    touches(s, src, n, s->device, "the source of a copy");
    touches(s, dst, n, -1, "the end of a copy");
    int device = s->device;
    queue_copy(s, -1, dst, n, [=]() {
        touchable(device);
        memcpy(dst, src, n);
    });
    return CU_OK;
}

int cu_copy_peer(cu_stream s, int dst_device, void *dst, const void *src, size_t n) {
    if (int rc = dead(s->device))
        return rc;
    dst_device = physical(dst_device);
    touches(s, src, n, s->device, "the source of a copy");
    touches(s, dst, n, dst_device, "the end of a copy");
    stats.copies_peer_bytes += (int64_t)n;
    queue_copy(s, dst_device, dst, n, [=]() {
        touchable(-1);
        memcpy(dst, src, n);
    });
    return CU_OK;
}

int cu_copy(cu_stream s, void *dst, const void *src, size_t n) {
    if (int rc = dead(s->device))
        return rc;
    touches(s, src, n, s->device, "the source of a copy");
    touches(s, dst, n, s->device, "the end of a copy");
    int device = s->device;
    queue(s, [=]() {
        touchable(device);
        memmove(dst, src, n);
    });
    return CU_OK;
}

int cu_zero(cu_stream s, void *dst, size_t n) {
    if (int rc = dead(s->device))
        return rc;
    touches(s, dst, n, s->device, "the range of a fill");
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
