#define _GNU_SOURCE
#include "hub/doctor_checks.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/fs.h"
#include "base/parallel.h"
#include "hub/cache.h"
#include "plan/config.h"
#include "weights/weights.h"

#define GIB 1073741824.0
#define NETWORK_TIMEOUT_S 2
#define NETWORK_END_S 4.4 /* after the start */
#define RELEASED_BYTES ((int64_t)57700000000)

qie_doctor_check *qie_doctor_say(qie_doctor *d, const char *id, qie_doctor_level level,
                                 const char *fmt, ...) {
    static qie_doctor_check spill;
    qie_doctor_report *r = d->r;
    qie_doctor_check *c = r->n < QIE_DOCTOR_CHECKS_MAX ? &r->checks[r->n++] : &spill;
    va_list ap;
    memset(c, 0, sizeof *c);
    snprintf(c->id, sizeof c->id, "%s", id);
    c->level = level;
    va_start(ap, fmt);
    vsnprintf(c->text, sizeof c->text, fmt, ap);
    va_end(ap);
    r->n_failed += level == QIE_DOCTOR_FAIL;
    r->n_warned += level == QIE_DOCTOR_WARN;
    return c;
}

void qie_doctor_mend(qie_doctor_check *c, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->remedy, sizeof c->remedy, fmt, ap);
    va_end(ap);
}

static double gib(int64_t bytes) {
    return (double)bytes / GIB;
}

/* ------------------------------------------------------------------ processor and memory */

static void check_machine(qie_doctor *d) {
    const qie_machine *m = &d->machine;
    bool zh = d->zh;
    qie_cpu_level level = qie_cpu_level_hardware();
    int cores = qie_cpu_count();
    qie_doctor_check *c =
        qie_doctor_say(d, "cpu", level >= QIE_CPU_AVX2 ? QIE_DOCTOR_OK : QIE_DOCTOR_WARN,
                       zh ? "处理器 %s：%d 个核心，可用 %d 个，指令集 %s"
                          : "%s: %d cores, %d usable, instructions %s",
                       m->cpu[0] ? m->cpu : "CPU", m->cores, cores, qie_cpu_level_name(level));
    if (level < QIE_CPU_AVX2)
        qie_doctor_mend(c,
                        zh ? "没有 AVX2，速度会很慢：换用 2013 年以后的 x86 处理器"
                           : "without AVX2 it is very slow: use an x86 processor made after 2013");
    else if (level < QIE_CPU_AVX512BF16)
        qie_doctor_mend(c, zh ? "没有 bf16 指令：默认用 f32 计算"
                              : "no bf16 instructions: f32 is the default arithmetic");
    int64_t left = qie_machine_free(m);
    char limit[160] = "";
    if (m->limit >= 0)
        snprintf(limit, sizeof limit,
                 zh ? "，容器上限 %.1f GiB（cgroup v%d）"
                    : ", the container's limit is %.1f GiB (cgroup v%d)",
                 gib(m->limit), m->cgroup_version);
    c = qie_doctor_say(d, "memory", left < d->model.work_cpu ? QIE_DOCTOR_WARN : QIE_DOCTOR_OK,
                       zh ? "内存共 %.1f GiB，可用 %.1f GiB%s；透明大页：%s"
                          : "memory: %.1f GiB in all, %.1f GiB free%s; transparent huge pages: %s",
                       gib(m->total), gib(left), limit,
                       m->transparent_huge[0] ? m->transparent_huge : "?");
    if (left < d->model.work_cpu)
        qie_doctor_mend(
            c,
            zh ? "CPU 上编辑一张百万像素图片需要 %.1f GiB：关闭其他程序，或用 --max-side 512"
               : "an edit of one megapixel on the CPU takes %.1f GiB: end other programs, or use "
                 "--max-side 512",
            gib(d->model.work_cpu));
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "cpu", qie_json_new_string(m->cpu));
    qie_json_put(o, "cores", qie_json_new_int(m->cores));
    qie_json_put(o, "cores_usable", qie_json_new_int(cores));
    qie_json_put(o, "level", qie_json_new_string(qie_cpu_level_name(level)));
    qie_json_put(o, "bytes_total", qie_json_new_int(m->total));
    qie_json_put(o, "bytes_free", qie_json_new_int(left));
    qie_json_put(o, "limit_bytes",
                 m->limit >= 0 ? qie_json_new_int(m->limit) : qie_json_new_null());
    qie_json_put(o, "limit_used_bytes",
                 m->limit_used >= 0 ? qie_json_new_int(m->limit_used) : qie_json_new_null());
    qie_json_put(o, "cgroup_version", qie_json_new_int(m->cgroup_version));
    qie_json_put(o, "cpu_quota",
                 m->cpu_quota > 0 ? qie_json_new_double(m->cpu_quota) : qie_json_new_null());
    qie_json_put(o, "swap_free_bytes", qie_json_new_int(m->swap_free));
    qie_json_put(o, "huge_pages", qie_json_new_int(m->huge_total));
    qie_json_put(o, "transparent_huge_pages", qie_json_new_string(m->transparent_huge));
    qie_json_put(o, "kernel", qie_json_new_string(m->kernel));
    qie_json_put(d->r->details, "machine", o);
}

/* ------------------------------------------------------------------ model and disk */

typedef struct folder_sum {
    int64_t bytes, cached_weight, largest_bytes;
    double cached; /* sum of share x bytes */
    char largest[4096];
} folder_sum;

static void add_folder(const char *dir, const char *ending, folder_sum *s) {
    DIR *dp = opendir(dir);
    struct dirent *e;
    size_t k = strlen(ending);
    while (dp && (e = readdir(dp))) {
        size_t n = strlen(e->d_name);
        char *path =
            n > k && !strcmp(e->d_name + n - k, ending) ? qie_path_join(dir, e->d_name) : NULL;
        struct stat st;
        if (path && stat(path, &st) == 0 && S_ISREG(st.st_mode)) {
            s->bytes += (int64_t)st.st_size;
            double share = qie_file_cached_share(path, 64);
            if (share >= 0) {
                s->cached += share * (double)st.st_size;
                s->cached_weight += (int64_t)st.st_size;
            }
            if ((int64_t)st.st_size > s->largest_bytes) {
                s->largest_bytes = (int64_t)st.st_size;
                snprintf(s->largest, sizeof s->largest, "%s", path);
            }
        }
        free(path);
    }
    if (dp)
        closedir(dp);
}

static int64_t weights_in(const char *dir, const char *component, folder_sum *all) {
    char *sub = qie_path_join(dir, component);
    int64_t before = all->bytes;
    if (sub)
        add_folder(sub, ".safetensors", all);
    if (sub && all->bytes == before) /* as the engine: a GGUF file where there is nothing else */
        add_folder(sub, ".gguf", all);
    free(sub);
    return all->bytes - before;
}

/* Configs that cannot be read (an incomplete folder, another model): as the released one, in
 * proportion to the weights. */
static void scale_released(qie_placement_model *m, int64_t transformer, int64_t text_encoder,
                           int64_t vae) {
    qie_placement_model *released = calloc(1, sizeof *released);
    if (!released)
        return;
    qie_placement_released(released);
    double scale = (double)transformer / (double)released->transformer;
    qie_placement_scaled(transformer, text_encoder, vae, m);
    if (scale < 0.05) { /* not the released architecture */
        m->work = (int64_t)((double)m->work * scale) + ((int64_t)64 << 20);
        m->work_cpu = (int64_t)((double)m->work_cpu * scale) + ((int64_t)128 << 20);
    }
    free(released);
}

/* What the files' headers say of each tensor; parts that cannot be opened say nothing. */
static int64_t tensor_bytes(void *arg, int part, const qie_tensor_spec *spec) {
    qie_weights **parts = arg;
    const qie_tensor *t = parts[part] ? qie_weights_find(parts[part], spec->name) : NULL;
    return t ? (int64_t)t->n_bytes + (t->scale ? (int64_t)sizeof(float) * t->n_scale : 0) : -1;
}

void qie_doctor_model(const char *dir, qie_placement_model *out) {
    static const char *const folders[3] = {"transformer", "text_encoder", "vae"};
    folder_sum s = {0};
    qie_files *files = NULL;
    qie_weights *parts[3] = {NULL, NULL, NULL};
    int64_t sizes[3] = {0, 0, 0};
    qie_model_config *c = calloc(1, sizeof *c);
    qie_placement_released(out);
    for (int i = 0; i < 3 && dir; i++)
        sizes[i] = weights_in(dir, folders[i], &s);
    bool there = c && sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0;
    if (there && qie_files_open_dir(dir, &files, NULL) == QIE_OK &&
        qie_model_config_read(files, c, NULL) == QIE_OK) {
        for (int i = 0; i < 3; i++)
            if (qie_weights_open(files, folders[i], &parts[i], NULL) != QIE_OK)
                parts[i] = NULL;
        qie_placement_of(c, sizes, tensor_bytes, parts,
                         qie_cpu_level_hardware() >= QIE_CPU_AVX512BF16 ? QIE_BF16 : QIE_F32, out);
    } else if (there)
        scale_released(out, sizes[0], sizes[1], sizes[2]);
    for (int i = 0; i < 3; i++)
        qie_weights_close(parts[i]);
    qie_files_close(files);
    free(c);
}

static bool first_names(void *arg, const char *path) {
    char *names = arg;
    size_t n = strlen(names);
    if (n < 120)
        snprintf(names + n, 200 - n, "%s%.80s", n ? ", " : "", path);
    return true;
}

static void check_disk_for_pull(qie_doctor *d) {
    struct statvfs v;
    char *dir = d->o->cache ? strdup(d->o->cache) : NULL;
    bool zh = d->zh;
    while (dir && statvfs(dir, &v)) {
        char *slash = strrchr(dir, '/');
        if (!slash || slash == dir) {
            free(dir);
            dir = strdup("/");
            if (!dir || statvfs(dir, &v))
                break;
            break;
        }
        *slash = 0;
    }
    if (!dir)
        return;
    int64_t left = (int64_t)v.f_bavail * (int64_t)v.f_frsize;
    qie_doctor_check *c =
        qie_doctor_say(d, "disk", left < RELEASED_BYTES ? QIE_DOCTOR_FAIL : QIE_DOCTOR_OK,
                       zh ? "下载模型需要 %.1f GB，%s 所在磁盘空闲 %.1f GB"
                          : "the model takes %.1f GB; the disk of %s has %.1f GB free",
                       (double)RELEASED_BYTES / 1e9, d->o->cache, (double)left / 1e9);
    if (left < RELEASED_BYTES)
        qie_doctor_mend(c,
                        zh ? "腾出 %.1f GB，或把 HF_HOME 指向另一块磁盘上的目录"
                           : "make %.1f GB free there, or set HF_HOME to a folder on another disk",
                        (double)(RELEASED_BYTES - left) / 1e9);
    free(dir);
}

static void check_model(qie_doctor *d) {
    const qie_doctor_options *o = d->o;
    bool zh = d->zh;
    qie_json *j = qie_json_new_object();
    folder_sum s = {0};
    char names[200] = "";
    qie_doctor_check *c;
    if (o->model_error) {
        c = qie_doctor_say(d, "model", QIE_DOCTOR_FAIL,
                           zh ? "指定的模型不可用：%s"
                              : "the model that is named cannot be used: %s",
                           o->model_error);
        qie_doctor_mend(c, zh ? "改正名称，或下载：qwen-edit pull"
                              : "correct the name, or fetch the model: qwen-edit pull");
    } else if (!o->model_dir) {
        c = qie_doctor_say(
            d, "model", QIE_DOCTOR_WARN,
            zh ? "本机没有 " QIE_HUB_DEFAULT_REPO "：使用内置演示模型（不能编辑照片）"
               : QIE_HUB_DEFAULT_REPO " is not on this machine: the built-in demo is used, "
                                      "which is no photograph editor");
        qie_doctor_mend(c, "qwen-edit pull");
        check_disk_for_pull(d);
    } else {
        size_t missing = qie_model_missing(o->model_dir, first_names, names);
        weights_in(o->model_dir, "transformer", &s);
        weights_in(o->model_dir, "text_encoder", &s);
        weights_in(o->model_dir, "vae", &s);
        d->model_complete = missing == 0;
        if (missing) {
            char repo[128], word[PATH_MAX + 300];
            bool cached = qie_cache_repo_of(o->model_dir, repo, sizeof repo);
            qie_shell_word(o->model_dir, word, sizeof word);
            c = qie_doctor_say(d, "model", QIE_DOCTOR_FAIL,
                               zh ? "模型 %s 不完整，缺 %zu 个文件%.0s（%s）"
                                  : "the model in %s is not complete: %zu file%s missing (%s)",
                               o->model_dir, missing, missing == 1 ? "" : "s", names);
            if (cached)
                qie_doctor_mend(c, "qwen-edit pull %s", repo);
            else
                qie_doctor_mend(c, "qwen-edit pull --local-dir %s", word);
        } else {
            double share = s.cached_weight > 0 ? s.cached / (double)s.cached_weight : -1;
            double speed = s.largest[0] ? qie_file_disk_speed(s.largest, 0.3) : -1;
            char disk[160] = "";
            if (speed > 0)
                snprintf(disk, sizeof disk,
                         zh ? "，磁盘读取 %.0f MB/s（首次加载约 %.0f 秒）"
                            : ", disk reads %.0f MB/s (the first load takes about %.0f s)",
                         speed / 1e6, (double)s.bytes / speed * (share > 0 ? 1 - share : 1));
            c = qie_doctor_say(
                d, "model", QIE_DOCTOR_OK,
                zh ? "模型完整：%s，权重 %.2f GB，其中 %.0f%% 在页缓存中%s"
                   : "the model is complete: %s, %.2f GB of weights, %.0f %% of them in the "
                     "page cache%s",
                o->model_dir, (double)s.bytes / 1e9, share >= 0 ? share * 100 : 0, disk);
            if (speed > 0 && speed < 2e8 && s.bytes > (int64_t)10 << 30)
                qie_doctor_mend(c, zh ? "把模型移到更快的磁盘" : "move the model to a faster disk");
            qie_json_put(j, "cached_share",
                         share >= 0 ? qie_json_new_double(share) : qie_json_new_null());
            qie_json_put(j, "disk_bytes_per_s",
                         speed > 0 ? qie_json_new_double(speed) : qie_json_new_null());
        }
    }
    qie_json_put(j, "name", qie_json_new_string(o->model ? o->model : "demo"));
    qie_json_put(j, "dir", o->model_dir ? qie_json_new_string(o->model_dir) : qie_json_new_null());
    qie_json_put(j, "complete", qie_json_new_bool(d->model_complete));
    qie_json_put(j, "weights_bytes", qie_json_new_int(s.bytes));
    qie_json_put(d->r->details, "model", j);
}

/* ------------------------------------------------------------------ network, port */

/* Why, and what to do about it. `through`: ", through the proxy P", or nothing. */
static void say_unreachable(qie_doctor *d, const char *url, const char *through, qie_http_end end,
                            const char *why) {
    static const char *const chinese[] = {[QIE_HTTP_NO_CONNECT] = "连接失败",
                                          [QIE_HTTP_TLS] = "安全连接（TLS）失败",
                                          [QIE_HTTP_PROXY_AUTH] = "代理要求密码",
                                          [QIE_HTTP_CUT] = "连接中断",
                                          [QIE_HTTP_STALLED] = "超时没有回答",
                                          [QIE_HTTP_BAD_ANSWER] = "回答无效",
                                          [QIE_HTTP_STOPPED] = "中断"};
    bool zh = d->zh, matters = !d->model_complete && !d->o->is_demo;
    /* The transfer's words begin with the host, which stands in front already. */
    const char *cause = strstr(why, "://") ? strstr(why, ": ") : NULL;
    cause = cause ? cause + 2 : why;
    char words[400];
    if (zh && cause[0])
        snprintf(words, sizeof words, "%s（%s）", chinese[end], cause);
    else
        snprintf(words, sizeof words, "%s",
                 zh         ? chinese[end]
                 : cause[0] ? cause
                            : "no answer in time");
    qie_doctor_check *c = qie_doctor_say(
        d, "network", matters && d->o->hub->n_endpoints == 1 ? QIE_DOCTOR_FAIL : QIE_DOCTOR_WARN,
        zh ? "无法连接 %s%s：%s" : "%s cannot be reached%s: %s", url, through, words);
    if (d->model_complete)
        qie_doctor_mend(c, zh ? "模型已完整，不需要网络；设 HF_HUB_OFFLINE=1 可避免任何连接"
                              : "the model is complete, so no network is needed; HF_HUB_OFFLINE=1 "
                                "avoids every connection");
    else if (end == QIE_HTTP_TLS)
        qie_doctor_mend(c, zh ? "若公司代理用自己的证书签发连接：export SSL_CERT_FILE=证书文件.pem"
                              : "if a proxy of your company signs the connections: export "
                                "SSL_CERT_FILE=FILE-WITH-ITS-CERTIFICATE.pem");
    else if (end == QIE_HTTP_PROXY_AUTH)
        qie_doctor_mend(c,
                        zh ? "在代理地址中写入密码：export HTTPS_PROXY=http://用户:密码@主机:端口"
                           : "name the password in the proxy's address: export "
                             "HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT");
    else
        qie_doctor_mend(c, zh ? "设置镜像：export HF_ENDPOINT=https://hf-mirror.com（或 "
                                "https://www.modelscope.cn），或设置 HTTPS_PROXY"
                              : "name a mirror: export HF_ENDPOINT=https://hf-mirror.com (or "
                                "https://www.modelscope.cn), or set HTTPS_PROXY");
}

static void check_network(qie_doctor *d) {
    const qie_hub_settings *s = d->o->hub;
    bool zh = d->zh;
    qie_json *list = qie_json_new_array();
    if (s->offline) {
        qie_doctor_say(d, "network", QIE_DOCTOR_INFO,
                       zh ? "%s=1：不建立任何连接" : "%s=1: no connection is made",
                       s->offline_origin);
        qie_json_put(d->r->details, "network", list);
        return;
    }
    qie_http_options ho = qie_http_options_default();
    ho.connect_timeout_s = NETWORK_TIMEOUT_S;
    ho.stall_timeout_s = NETWORK_TIMEOUT_S;
    ho.ca_bundle = s->ca_bundle;
    ho.user_agent = "qwen-edit/" QIE_VERSION;
    qie_http *h = NULL;
    /* At most two seconds, and what a driver without an answer has left of the five. */
    double until = qie_now_s() + NETWORK_TIMEOUT_S;
    if (until > d->started + NETWORK_END_S)
        until = d->started + NETWORK_END_S;
    size_t n = qie_http_create(&ho, &h, NULL) == QIE_OK ? s->n_endpoints : 0;
    for (size_t i = 0; i < n; i++) {
        const qie_endpoint *e = &s->endpoints[i];
        int left_s = (int)(until - qie_now_s() + 0.5);
        if (left_s <= 0) {
            qie_doctor_say(d, "network", QIE_DOCTOR_INFO,
                           zh ? "%s 未检查：时间不够" : "%s was not asked: no time left", e->url);
            break;
        }
        qie_http_request q = {
            .head = true, .url = e->url, .from = -1, .to = -1, .timeout_s = left_s};
        qie_http_reply r;
        char why[256] = "", proxy[300], through[360] = "";
        double t0 = qie_now_s();
        qie_http_end end = qie_http_fetch(h, &q, 65536, NULL, NULL, &r, why, NULL, NULL);
        double ms = (qie_now_s() - t0) * 1000;
        bool ok = end == QIE_HTTP_OK || end == QIE_HTTP_REDIRECT;
        if (ok && (r.status >= 500 || r.status == 407)) { /* a gateway's or proxy's own words */
            ok = false;
            end = QIE_HTTP_BAD_ANSWER;
            snprintf(why, sizeof why, "HTTP %d", r.status);
        }
        qie_http_proxy_for(e->url, proxy, sizeof proxy);
        if (proxy[0])
            snprintf(through, sizeof through, zh ? "，经代理 %s" : ", through the proxy %s", proxy);
        if (ok)
            qie_doctor_say(d, "network", QIE_DOCTOR_OK,
                           zh ? "%s 可达（%.0f 毫秒%s）" : "%s answers (%.0f ms%s)", e->url, ms,
                           through);
        else
            say_unreachable(d, e->url, through, end, why);
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "endpoint", qie_json_new_string(e->url));
        qie_json_put(o, "reachable", qie_json_new_bool(ok));
        qie_json_put(o, "ms", qie_json_new_double(ms));
        qie_json_put(o, "proxy", proxy[0] ? qie_json_new_string(proxy) : qie_json_new_null());
        qie_json_put(o, "error", ok ? qie_json_new_null() : qie_json_new_string(why));
        qie_json_push(list, o);
    }
    qie_http_destroy(h);
    qie_json_put(d->r->details, "network", list);
}

static void check_port(qie_doctor *d) {
    bool zh = d->zh;
    if (!d->o->port)
        return;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)d->o->port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    bool is_free = bind(fd, (struct sockaddr *)&a, sizeof a) == 0;
    int e = errno;
    close(fd);
    if (is_free)
        qie_doctor_say(d, "port", QIE_DOCTOR_OK, zh ? "端口 %d 空闲" : "port %d is free",
                       d->o->port);
    else {
        qie_doctor_check *c = qie_doctor_say(
            d, "port", QIE_DOCTOR_WARN, zh ? "端口 %d 不可用：%s" : "port %d cannot be used: %s",
            d->o->port, strerror(e));
        qie_doctor_mend(
            c,
            zh ? "查看占用者：ss -ltnp | grep %d；或用 qwen-edit serve --port 选择另一个端口"
               : "see who has it: ss -ltnp | grep %d, or choose another with qwen-edit serve "
                 "--port",
            d->o->port);
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "port", qie_json_new_int(d->o->port));
    qie_json_put(o, "free", qie_json_new_bool(is_free));
    qie_json_put(d->r->details, "service", o);
}

/* ------------------------------------------------------------------ the whole */

/* The first thing to do: what failed first, else what is missing for the real model, else the edit
 * itself. */
static void choose_next(qie_doctor *d) {
    qie_doctor_report *r = d->r;
    bool zh = d->zh;
    for (size_t i = 0; i < r->n; i++)
        if (r->checks[i].level == QIE_DOCTOR_FAIL && r->checks[i].remedy[0]) {
            const char *cpu = zh ? "；在此之前可在 CPU 上运行：" QIE_CPU_COMMAND
                                 : "; until then run on the CPU: " QIE_CPU_COMMAND;
            snprintf(r->next, sizeof r->next, "%s%s", r->checks[i].remedy,
                     !strcmp(r->checks[i].id, "driver") ? cpu : "");
            return;
        }
    if (!d->o->model_dir)
        snprintf(r->next, sizeof r->next,
                 zh ? "下载模型：qwen-edit pull" : "fetch the model: qwen-edit pull");
    else
        snprintf(r->next, sizeof r->next,
                 zh ? "可以开始：qwen-edit edit -i 照片.png -p \"指令\" -o 结果.png"
                    : "ready: qwen-edit edit -i photo.png -p \"instruction\" -o out.png");
}

void qie_doctor_run(const qie_doctor_options *options, qie_doctor_report *out) {
    memset(out, 0, sizeof *out);
    qie_doctor *d = calloc(1, sizeof *d);
    out->details = qie_json_new_object();
    if (!d) {
        out->n_failed = 1;
        return;
    }
    d->started = qie_now_s();
    d->o = options;
    d->r = out;
    d->zh = options->chinese;
    qie_gpus_probe(QIE_NVML_TIMEOUT_MS, &d->gpus);
    qie_machine_read(options->root, &d->machine);
    qie_doctor_model(options->model_dir, &d->model);
    qie_doctor_check_gpus(d);
    qie_doctor_check_placement(d);
    check_machine(d);
    check_model(d);
    check_network(d);
    check_port(d);
    choose_next(d);
    out->seconds = qie_now_s() - d->started;
    free(d);
}

void qie_doctor_release(qie_doctor_report *r) {
    qie_json_free(r->details);
    r->details = NULL;
}
