#define _GNU_SOURCE
#include "base/machine.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/clock.h"

static FILE *open_below(const char *root, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
static FILE *open_below(const char *root, const char *fmt, ...) {
    char below[1024], path[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(below, sizeof below, fmt, ap);
    va_end(ap);
    snprintf(path, sizeof path, "%.1000s%s", root, below);
    return fopen(path, "re");
}

/* First line without its end; false if there is none. */
static bool first_line(FILE *f, char *out, size_t cap) {
    out[0] = 0;
    if (!f)
        return false;
    bool ok = fgets(out, (int)cap, f) != NULL;
    fclose(f);
    out[strcspn(out, "\n")] = 0;
    return ok;
}

/* A number of bytes; -1 for "max", an absurd one (cgroup v1's "no limit") or nothing. */
static int64_t bytes_in(FILE *f) {
    char line[64];
    if (!first_line(f, line, sizeof line) || !isdigit((unsigned char)line[0]))
        return -1;
    unsigned long long v = strtoull(line, NULL, 10);
    return v >= 1ull << 60 ? -1 : (int64_t)v;
}

/* ------------------------------------------------------------------ processes */

static void read_owner(const char *root, unsigned uid, char *out, size_t cap) {
    char line[512];
    FILE *f = open_below(root, "/etc/passwd"); /* not getpwuid: a directory service may hang */
    snprintf(out, cap, "%u", uid);
    while (f && fgets(line, sizeof line, f)) {
        char *save = NULL, *name = strtok_r(line, ":", &save), *pw = strtok_r(NULL, ":", &save),
             *id = strtok_r(NULL, ":", &save);
        if (name && pw && id && strtoul(id, NULL, 10) == uid) {
            snprintf(out, cap, "%.60s", name);
            break;
        }
    }
    if (f)
        fclose(f);
}

/* A container's id is a run of 64 hex digits in the path of its control group: docker, containerd,
 * podman, CRI-O and Kubernetes all put it there. */
static bool container_in(const char *line, char *out, size_t cap) {
    for (const char *p = line; *p;) {
        size_t n = strspn(p, "0123456789abcdef");
        if (n == 64) {
            snprintf(out, cap, "%.64s", p);
            return true;
        }
        p += n ? n : 1;
    }
    return false;
}

static const char *kind_of(const char *name, const char *command) {
    static const struct {
        const char *word, *kind;
    } known[] = {{"qwen-edit", "qwen-edit"}, {"vllm", "vLLM"},
                 {"sglang", "SGLang"},       {"text-generation-launcher", "TGI"},
                 {"ollama", "Ollama"},       {"llama-server", "llama.cpp"},
                 {"comfyui", "ComfyUI"},     {"tritonserver", "Triton"},
                 {"jupyter", "Jupyter"},     {"ipykernel", "Jupyter"},
                 {"deepspeed", "DeepSpeed"}, {"torchrun", "PyTorch training"},
                 {"xorg", "the desktop"},    {"gnome-shell", "the desktop"}};
    /* Ours by the name of the process only: a folder of that name may hold anybody's script. */
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcasestr(name, known[i].word) || (i > 0 && strcasestr(command, known[i].word)))
            return known[i].kind;
    return "";
}

static bool is_secret_flag(const char *word) {
    static const char *const names[] = {"key", "token", "password", "passwd", "secret"};
    for (size_t i = 0; word[0] == '-' && i < sizeof names / sizeof *names; i++)
        if (strcasestr(word, names[i]))
            return true;
    return false;
}

/* The words of /proc/PID/cmdline (each ended by NUL, n bytes in all) as one line, for people to
 * read and to pass on: what follows a flag like --api-key is left out. */
static void join_command(const char *words, size_t n, char *out, size_t cap) {
    size_t k = 0;
    bool secret = false;
    for (size_t i = 0; i < n && k + 1 < cap;) {
        const char *word = words + i;
        size_t len = strnlen(word, n - i), shown = len;
        const char *equals = memchr(word, '=', len);
        bool flag = is_secret_flag(word);
        if (flag && equals)
            shown = (size_t)(equals - word) + 1;
        bool hidden = (flag && equals) || (secret && word[0] != '-');
        if (secret && word[0] != '-')
            shown = 0;
        secret = flag && !equals;
        k += (size_t)snprintf(out + k, cap - k, "%s%.*s%s", i ? " " : "", (int)shown, word,
                              hidden ? "***" : "");
        i += len + 1;
    }
    if (k >= cap)
        k = cap - 1;
    for (size_t i = 0; i < k; i++)
        if ((unsigned char)out[i] < 0x20 || out[i] == 0x7f)
            out[i] = ' ';
}

void qie_process_read(const char *root, unsigned pid, qie_process_info *out) {
    memset(out, 0, sizeof *out);
    char line[1024];
    if (!first_line(open_below(root, "/proc/%u/comm", pid), out->name, sizeof out->name))
        return;
    out->found = true;
    FILE *f = open_below(root, "/proc/%u/cmdline", pid);
    char words[1024] = "";
    size_t n = f ? fread(words, 1, sizeof words - 1, f) : 0;
    if (f)
        fclose(f);
    while (n && !words[n - 1])
        n--;
    words[n] = 0;
    join_command(words, n, out->command, sizeof out->command);
    f = open_below(root, "/proc/%u/status", pid);
    while (f && fgets(line, sizeof line, f)) {
        unsigned uid;
        if (sscanf(line, "Uid: %u", &uid) == 1)
            read_owner(root, uid, out->owner, sizeof out->owner);
    }
    if (f)
        fclose(f);
    f = open_below(root, "/proc/%u/cgroup", pid);
    while (f && fgets(line, sizeof line, f))
        if (container_in(line, out->container, sizeof out->container))
            break;
    if (f)
        fclose(f);
    snprintf(out->kind, sizeof out->kind, "%s", kind_of(out->name, out->command));
}

/* ------------------------------------------------------------------ the machine */

static void read_meminfo(const char *root, qie_machine *m) {
    char line[256];
    FILE *f = open_below(root, "/proc/meminfo");
    while (f && fgets(line, sizeof line, f)) {
        long long v;
        if (sscanf(line, "MemTotal: %lld", &v) == 1)
            m->total = v * 1024;
        else if (sscanf(line, "MemAvailable: %lld", &v) == 1)
            m->available = v * 1024;
        else if (sscanf(line, "SwapTotal: %lld", &v) == 1)
            m->swap_total = v * 1024;
        else if (sscanf(line, "SwapFree: %lld", &v) == 1)
            m->swap_free = v * 1024;
        else if (sscanf(line, "HugePages_Total: %lld", &v) == 1)
            m->huge_total = v;
        else if (sscanf(line, "HugePages_Free: %lld", &v) == 1)
            m->huge_free = v;
        else if (sscanf(line, "Hugepagesize: %lld", &v) == 1)
            m->huge_page_bytes = v * 1024;
    }
    if (f)
        fclose(f);
}

static void read_cpu(const char *root, qie_machine *m) {
    char line[512];
    FILE *f = open_below(root, "/proc/cpuinfo");
    while (f && fgets(line, sizeof line, f)) {
        if (!strncmp(line, "processor", 9))
            m->cores++;
        else if (!strncmp(line, "model name", 10) && !m->cpu[0] && strchr(line, ':')) {
            snprintf(m->cpu, sizeof m->cpu, "%.120s", strchr(line, ':') + 2);
            m->cpu[strcspn(m->cpu, "\n")] = 0;
        }
    }
    if (f)
        fclose(f);
}

/* Take the tighter of the limits met on the way up from the process's own group. */
static void take_limit(qie_machine *m, int64_t limit, int64_t used) {
    if (limit >= 0 && limit < m->total && (m->limit < 0 || limit < m->limit)) {
        m->limit = limit;
        m->limit_used = used;
    }
}

static int64_t stat_value(const char *root, const char *path, const char *key) {
    char line[128];
    int64_t v = 0;
    FILE *f = open_below(root, "%s", path);
    size_t n = strlen(key);
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, n) && line[n] == ' ')
            v = strtoll(line + n, NULL, 10);
    if (f)
        fclose(f);
    return v;
}

static void read_v2(const char *root, const char *own, qie_machine *m) {
    char group[768], line[64], stat_path[900];
    snprintf(group, sizeof group, "%.700s", own);
    for (;;) {
        const char *g = strcmp(group, "/") ? group : "";
        int64_t limit = bytes_in(open_below(root, "/sys/fs/cgroup%s/memory.max", g)),
                before = m->limit;
        take_limit(m, limit, bytes_in(open_below(root, "/sys/fs/cgroup%s/memory.current", g)));
        if (m->limit != before) {
            snprintf(stat_path, sizeof stat_path, "/sys/fs/cgroup%s/memory.stat", g);
            m->limit_cache = stat_value(root, stat_path, "inactive_file") +
                             stat_value(root, stat_path, "active_file");
        }
        double quota, period;
        if (first_line(open_below(root, "/sys/fs/cgroup%s/cpu.max", g), line, sizeof line) &&
            sscanf(line, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0 &&
            (m->cpu_quota == 0 || quota / period < m->cpu_quota))
            m->cpu_quota = quota / period;
        char *slash = strrchr(group, '/');
        if (!slash || !strcmp(group, "/") || !group[0])
            break;
        slash[slash == group] = 0;
    }
}

static void read_v1(const char *root, const char *memory_group, const char *cpu_group,
                    qie_machine *m) {
    /* Inside a container the group's own path is usually mounted as the root of the hierarchy. */
    const char *groups[] = {memory_group, ""};
    for (int i = 0; i < 2; i++) {
        const char *g = strcmp(groups[i], "/") ? groups[i] : "";
        int64_t before = m->limit;
        take_limit(m,
                   bytes_in(open_below(root, "/sys/fs/cgroup/memory%s/memory.limit_in_bytes", g)),
                   bytes_in(open_below(root, "/sys/fs/cgroup/memory%s/memory.usage_in_bytes", g)));
        if (m->limit != before) {
            char path[900];
            snprintf(path, sizeof path, "/sys/fs/cgroup/memory%.700s/memory.stat", g);
            m->limit_cache = stat_value(root, path, "total_inactive_file") +
                             stat_value(root, path, "total_active_file");
        }
        const char *c = i ? "" : strcmp(cpu_group, "/") ? cpu_group : "";
        int64_t quota = bytes_in(open_below(root, "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", c)),
                period = bytes_in(open_below(root, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", c));
        if (quota > 0 && period > 0 && m->cpu_quota == 0)
            m->cpu_quota = (double)quota / (double)period;
    }
}

static void read_cgroup(const char *root, qie_machine *m) {
    char line[1024], v2[768] = "", memory[768] = "", cpu[768] = "";
    FILE *f = open_below(root, "/proc/self/cgroup");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = 0;
        if (!names[1])
            snprintf(v2, sizeof v2, "%.760s", path);
        else if (strstr(names, "memory"))
            snprintf(memory, sizeof memory, "%.760s", path);
        else if (strstr(names, "cpu") && !strstr(names, "cpuset"))
            snprintf(cpu, sizeof cpu, "%.760s", path);
    }
    if (f)
        fclose(f);
    m->limit = m->limit_used = -1;
    if (memory[0]) {
        m->cgroup_version = 1;
        read_v1(root, memory, cpu, m);
    } else if (v2[0]) {
        m->cgroup_version = 2;
        read_v2(root, v2, m);
    }
}

void qie_machine_read(const char *root, qie_machine *m) {
    memset(m, 0, sizeof *m);
    read_cpu(root, m);
    read_meminfo(root, m);
    read_cgroup(root, m);
    char line[128];
    if (first_line(open_below(root, "/sys/kernel/mm/transparent_hugepage/enabled"), line,
                   sizeof line)) {
        char *a = strchr(line, '['), *b = a ? strchr(a, ']') : NULL;
        if (b) {
            *b = 0;
            snprintf(m->transparent_huge, sizeof m->transparent_huge, "%.15s", a + 1);
        }
    }
    struct utsname u;
    if (uname(&u) == 0)
        snprintf(m->kernel, sizeof m->kernel, "%.32s %.44s", u.sysname, u.release);
}

int64_t qie_machine_free(const qie_machine *m) {
    int64_t f = m->available;
    if (m->limit >= 0 && m->limit_used >= 0) {
        int64_t left = m->limit - m->limit_used + m->limit_cache;
        if (left < f)
            f = left < 0 ? 0 : left;
    }
    return f;
}

/* ------------------------------------------------------------------ files */

double qie_file_cached_share(const char *path, int n_samples) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat s;
    double share = -1;
    if (fd < 0)
        return -1;
    if (fstat(fd, &s) == 0 && S_ISREG(s.st_mode) && s.st_size > 0) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (size_t)s.st_size;
        size_t pages = (size + page - 1) / page,
               n = pages < (size_t)n_samples ? pages : (size_t)n_samples;
        unsigned char *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        size_t in = 0, asked = 0;
        for (size_t i = 0; p != MAP_FAILED && i < n; i++) {
            unsigned char v;
            size_t at = n > 1 ? i * (pages - 1) / (n - 1) : 0;
            if (mincore(p + at * page, 1, &v) == 0) {
                asked++;
                in += v & 1u;
            }
        }
        if (p != MAP_FAILED)
            munmap(p, size);
        if (asked)
            share = (double)in / (double)asked;
    }
    close(fd);
    return share;
}

double qie_file_disk_speed(const char *path, double seconds) {
    size_t piece = (size_t)4 << 20;
    struct stat s;
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    void *buf = NULL;
    double speed = -1;
    if (fd < 0)
        return -1;
    if (fstat(fd, &s) == 0 && s.st_size >= (off_t)piece && posix_memalign(&buf, 4096, piece) == 0) {
        double t0 = qie_now_s(), t = t0;
        int64_t sum = 0, places = (int64_t)s.st_size / (int64_t)piece;
        /* Spread over the file: neighbours would come from the device's own read-ahead. */
        for (int64_t i = 0; t - t0 < seconds && i < 64; i++) {
            ssize_t n = pread(fd, buf, piece, (i * 7919 % places) * (int64_t)piece);
            if (n <= 0)
                break;
            sum += n;
            t = qie_now_s();
        }
        if (sum > 0 && t > t0)
            speed = (double)sum / (t - t0);
    }
    free(buf);
    close(fd);
    return speed;
}
