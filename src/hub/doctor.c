#define _GNU_SOURCE
#include "hub/doctor.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
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
#include "base/fs.h"
#include "base/machine.h"
#include "base/parallel.h"
#include "hub/cache.h"

#define GIB 1073741824.0
#define NVML_TIMEOUT_MS 2500
#define NETWORK_TIMEOUT_S 2
#define RELEASED_BYTES ((int64_t)57700000000)

typedef struct doctor {
    const qie_doctor_options *o;
    qie_doctor_report *r;
    bool zh;
    qie_gpus gpus;
    int visible[QIE_GPUS_MAX], n_visible;
    qie_machine machine;
    qie_placement_model model;
    bool model_complete;
    /* the process whose end would help most, for the next step */
    char culprit[300], stop_it[200];
    int64_t culprit_bytes;
} doctor;

static qie_doctor_check *say(doctor *d, const char *id, qie_doctor_level level, const char *fmt,
                             ...) __attribute__((format(printf, 4, 5)));
static qie_doctor_check *say(doctor *d, const char *id, qie_doctor_level level, const char *fmt,
                             ...) {
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

static void mend(qie_doctor_check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void mend(qie_doctor_check *c, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->remedy, sizeof c->remedy, fmt, ap);
    va_end(ap);
}

static double gib(int64_t bytes) {
    return (double)bytes / GIB;
}

/* ------------------------------------------------------------------ GPUs */

static void check_driver(doctor *d) {
    const qie_gpus *g = &d->gpus;
    bool zh = d->zh;
    qie_doctor_check *c;
    switch (g->state) {
    case QIE_GPUS_OK:
        if (g->n == 0) {
            say(d, "driver", QIE_DOCTOR_INFO,
                zh ? "NVIDIA 驱动 %s 已安装，但没有 GPU（容器需要 --gpus all）"
                   : "the NVIDIA driver %s is there but shows no GPU (a container needs --gpus "
                     "all)",
                g->driver);
            return;
        }
        say(d, "driver", QIE_DOCTOR_OK,
            zh ? "NVIDIA 驱动 %s，CUDA %d.%d，%d 张 GPU"
               : "NVIDIA driver %s, CUDA %d.%d, %d GPU(s)",
            g->driver[0] ? g->driver : "?", g->cuda_version / 1000, g->cuda_version % 1000 / 10,
            g->n);
        return;
    case QIE_GPUS_NO_DRIVER:
        say(d, "driver", QIE_DOCTOR_INFO,
            zh ? "没有 NVIDIA 驱动（或容器未带驱动启动）：使用 CPU"
               : "no NVIDIA driver (or a container started without one): the CPU is used");
        return;
    case QIE_GPUS_NOT_LOADED:
        c = say(d, "driver", QIE_DOCTOR_FAIL,
                zh ? "驱动的库已安装，但内核模块没有加载：%s"
                   : "the driver's library is installed but its kernel module is not loaded: %s",
                g->detail);
        mend(c, zh ? "执行 sudo modprobe nvidia；若失败，针对当前内核重装驱动并重启"
                   : "type sudo modprobe nvidia; if that fails, install the driver again for this "
                     "kernel and reboot");
        return;
    case QIE_GPUS_MISMATCH:
        c = say(d, "driver", QIE_DOCTOR_FAIL,
                zh ? "驱动的库与正在运行的内核模块版本不同（升级后未重启）：%s"
                   : "the driver's library and the running kernel module are of different versions "
                     "(it was updated "
                     "and not restarted): %s",
                g->detail);
        mend(c, zh ? "重启机器；在此之前任何程序都无法使用 GPU，可先用 --device cpu"
                   : "reboot the machine; until then no program can use the GPUs, and --device cpu "
                     "works");
        return;
    case QIE_GPUS_NO_PERMISSION:
        c = say(d, "driver", QIE_DOCTOR_FAIL,
                zh ? "没有权限使用 GPU 设备：%s" : "no permission to use the GPU devices: %s",
                g->detail);
        mend(c, zh ? "检查 ls -l /dev/nvidia*；请管理员把你的用户加入该组，或在容器中使用 --gpus"
                   : "look at ls -l /dev/nvidia*; ask the administrator to put your user into that "
                     "group, or start "
                     "the container with --gpus");
        return;
    case QIE_GPUS_LOST:
        c = say(d, "driver", QIE_DOCTOR_FAIL,
                zh ? "有 GPU 已掉线：%s" : "a GPU has fallen off the bus: %s", g->detail);
        mend(c, zh ? "重启机器；若再次发生，请检查电源和散热"
                   : "reboot the machine; if it happens again, check power and cooling");
        return;
    case QIE_GPUS_HUNG:
        c = say(d, "driver", QIE_DOCTOR_FAIL,
                zh ? "驱动在 2.5 秒内没有回答" : "the driver did not answer within 2.5 s");
        mend(c, zh ? "查看 dmesg | grep -i xid；通常需要重启"
                   : "look at dmesg | grep -i xid; usually a reboot is needed");
        return;
    case QIE_GPUS_ERROR: break;
    }
    c = say(d, "driver", QIE_DOCTOR_FAIL, zh ? "驱动报错：%s" : "the driver reports an error: %s",
            g->detail);
    mend(c, zh ? "执行 nvidia-smi 查看详情" : "type nvidia-smi to see more");
}

/* One process on one card. */
static void check_process(doctor *d, const qie_gpu *g, const qie_gpu_process *p, qie_json *list) {
    qie_process_info i;
    bool zh = d->zh;
    char who[400], where[160] = "", held[48];
    qie_process_read(d->o->root, p->pid, &i);
    if (p->used_bytes >= 0)
        snprintf(held, sizeof held, "%.1f GiB", gib(p->used_bytes));
    else
        snprintf(held, sizeof held, "%s", zh ? "未知大小的显存" : "an unknown part");
    if (!i.found)
        snprintf(who, sizeof who,
                 zh ? "一个此处看不见的进程（pid %u，属于宿主机或其他容器）"
                    : "a process that is not visible from here (pid %u, of the host or another "
                      "container)",
                 p->pid);
    else {
        if (i.container[0])
            snprintf(where, sizeof where, zh ? "，容器 %.12s…" : ", container %.12s...",
                     i.container);
        if (i.owner[0]) {
            size_t n = strlen(where);
            snprintf(where + n, sizeof where - n, zh ? "，用户 %.40s" : ", user %.40s", i.owner);
        }
        if (i.kind[0])
            snprintf(who, sizeof who, zh ? "%s 进程（pid %u%s）" : "a %s worker (pid %u%s)", i.kind,
                     p->pid, where);
        else
            snprintf(who, sizeof who, zh ? "进程 %s（pid %u%s）" : "%s (pid %u%s)", i.name, p->pid,
                     where);
    }
    qie_doctor_check *c =
        say(d, "process", p->graphics ? QIE_DOCTOR_INFO : QIE_DOCTOR_WARN,
            zh ? "%s 占用 GPU %d 的 %s%s%.200s" : "%1$s holds %3$s of GPU %2$d%4$s%5$.200s", who,
            g->index, held, i.command[0] ? (zh ? "：" : ": ") : "", i.command);
    char stop[200] = "";
    if (!i.found)
        snprintf(stop, sizeof stop,
                 zh ? "在宿主机上执行 nvidia-smi 查看它是谁"
                    : "type nvidia-smi on the host to see whose it is");
    else if (i.container[0])
        snprintf(stop, sizeof stop, "docker stop %.12s", i.container);
    else
        snprintf(stop, sizeof stop, "kill %u", p->pid);
    if (!p->graphics) {
        if (!i.found)
            mend(c, "%s", stop);
        else
            mend(c, zh ? "若不再需要：%s" : "if it is not needed any more: %s", stop);
    }
    int64_t weight = p->used_bytes >= 0 ? p->used_bytes : 1;
    if (!p->graphics && weight > d->culprit_bytes) {
        d->culprit_bytes = weight;
        snprintf(d->culprit, sizeof d->culprit, zh ? "%.200s 占用的 GPU %d" : "%.200s on GPU %d",
                 who, g->index);
        snprintf(d->stop_it, sizeof d->stop_it, "%s", stop);
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "pid", qie_json_new_int(p->pid));
    qie_json_put(o, "bytes",
                 p->used_bytes >= 0 ? qie_json_new_int(p->used_bytes) : qie_json_new_null());
    qie_json_put(o, "name", i.found ? qie_json_new_string(i.name) : qie_json_new_null());
    qie_json_put(o, "kind", qie_json_new_string(i.kind));
    qie_json_put(o, "owner", qie_json_new_string(i.owner));
    qie_json_put(o, "command", qie_json_new_string(i.command));
    qie_json_put(o, "container", qie_json_new_string(i.container));
    qie_json_put(o, "graphics", qie_json_new_bool(p->graphics));
    qie_json_push(list, o);
}

static void check_mig(doctor *d, const qie_gpu *g) {
    bool zh = d->zh;
    if (!g->mig)
        return;
    char sizes[200] = "";
    for (int i = 0; i < g->n_mig; i++) {
        size_t n = strlen(sizes);
        snprintf(sizes + n, sizeof sizes - n, "%s%.1f/%.1f GiB", i ? ", " : "",
                 gib(g->migs[i].free), gib(g->migs[i].total));
    }
    qie_doctor_check *c =
        say(d, "mig", QIE_DOCTOR_WARN,
            zh ? "GPU %d 处于 MIG 模式，只能使用它的实例（空闲/总量：%s）"
               : "GPU %d is in MIG mode: only its instances can be used (free/total: %s)",
            g->index, g->n_mig ? sizes : (zh ? "无" : "none made"));
    if (g->n_mig)
        mend(c,
             zh ? "用 CUDA_VISIBLE_DEVICES=%s 选择一个实例"
                : "choose an instance with CUDA_VISIBLE_DEVICES=%s",
             g->migs[0].uuid);
    else
        mend(c, zh ? "请管理员创建实例（nvidia-smi mig -cgi …）或关闭 MIG 模式"
                   : "ask the administrator to make instances (nvidia-smi mig -cgi ...) or to end "
                     "MIG mode");
}

static bool is_visible(const doctor *d, int i) {
    for (int k = 0; k < d->n_visible; k++)
        if (d->visible[k] == i)
            return true;
    return false;
}

static void check_gpu(doctor *d, int i, qie_json *list) {
    const qie_gpu *g = &d->gpus.gpus[i];
    bool zh = d->zh, visible = is_visible(d, i);
    qie_json *o = qie_json_new_object(), *processes = qie_json_new_array();
    const char *hidden = visible ? ""
                         : zh    ? "（CUDA_VISIBLE_DEVICES 中没有）"
                                 : " (not in CUDA_VISIBLE_DEVICES)";
    if (g->total >= 0)
        say(d, "gpu", QIE_DOCTOR_OK,
            zh ? "GPU %d：%s，共 %.1f GiB，空闲 %.1f GiB，已用 %.1f GiB%s"
               : "GPU %d: %s, %.1f GiB in all, %.1f GiB free, %.1f GiB in use%s",
            g->index, g->name, gib(g->total), gib(g->free), gib(g->used), hidden);
    else {
        qie_doctor_check *c = say(d, "gpu", QIE_DOCTOR_WARN,
                                  zh ? "GPU %d：%s，驱动不告知其显存（%s）%s"
                                     : "GPU %d: %s, the driver does not tell its memory (%s)%s",
                                  g->index, g->name, g->error, hidden);
        mend(c, zh ? "检查 ls -l /dev/nvidia* 的权限"
                   : "look at the permissions in ls -l /dev/nvidia*");
    }
    int64_t told = 0;
    for (int k = 0; k < g->n_processes; k++) {
        check_process(d, g, &g->processes[k], processes);
        told += g->processes[k].used_bytes > 0 ? g->processes[k].used_bytes : 0;
    }
    /* What a context of the driver itself takes is below one GiB. */
    int64_t untold = g->used - told;
    if (g->total >= 0 && untold > (int64_t)1 << 30) {
        qie_doctor_check *c =
            say(d, "process", QIE_DOCTOR_WARN,
                zh ? "GPU %d 上有 %.1f GiB "
                     "被驱动没有列出的进程占用（其他容器、其他用户，或异常退出的残留）"
                   : "%2$.1f GiB of GPU %1$d are held by processes that the driver does not name "
                     "here (another "
                     "container or user, or left behind by a crash)",
                g->index, gib(untold));
        mend(c,
             zh ? "在宿主机上执行：nvidia-smi；sudo fuser -v /dev/nvidia%d"
                : "on the host type: nvidia-smi; sudo fuser -v /dev/nvidia%d",
             g->index);
        if (untold > d->culprit_bytes && !g->n_processes) {
            d->culprit_bytes = untold;
            snprintf(d->culprit, sizeof d->culprit,
                     zh ? "占用 GPU %d 的未知进程" : "what holds GPU %d", g->index);
            snprintf(d->stop_it, sizeof d->stop_it, "sudo fuser -v /dev/nvidia%d", g->index);
        }
    }
    check_mig(d, g);
    qie_json_put(o, "index", qie_json_new_int(g->index));
    qie_json_put(o, "name", qie_json_new_string(g->name));
    qie_json_put(o, "uuid", qie_json_new_string(g->uuid));
    qie_json_put(o, "bus", qie_json_new_string(g->bus));
    qie_json_put(o, "visible", qie_json_new_bool(visible));
    qie_json_put(o, "bytes_total",
                 g->total >= 0 ? qie_json_new_int(g->total) : qie_json_new_null());
    qie_json_put(o, "bytes_free", g->free >= 0 ? qie_json_new_int(g->free) : qie_json_new_null());
    qie_json_put(o, "bytes_used", g->used >= 0 ? qie_json_new_int(g->used) : qie_json_new_null());
    qie_json_put(o, "compute_capability", qie_json_new_double(g->cc_major + g->cc_minor / 10.0));
    qie_json_put(o, "mig", qie_json_new_bool(g->mig));
    qie_json_put(o, "processes", processes);
    qie_json_push(list, o);
}

int qie_doctor_gpus(const qie_gpus *gpus, const char *cuda_visible,
                    qie_placement_gpu out[QIE_GPUS_MAX]) {
    int order[QIE_GPUS_MAX], n = qie_gpus_visible(gpus, cuda_visible, order, NULL), k = 0;
    for (int i = 0; i < n; i++) {
        const qie_gpu *g = &gpus->gpus[order[i]];
        int64_t total = g->total, free_bytes = g->free;
        if (g->mig) { /* the largest instance is all that one process can have */
            total = free_bytes = -1;
            for (int m = 0; m < g->n_mig; m++)
                if (g->migs[m].free > free_bytes) {
                    free_bytes = g->migs[m].free;
                    total = g->migs[m].total;
                }
        }
        if (total >= 0 && free_bytes >= 0)
            out[k++] = (qie_placement_gpu){g->index, total, free_bytes};
    }
    return k;
}

static void check_gpus(doctor *d) {
    const char *value = d->o->cuda_visible;
    bool zh = d->zh;
    int refused;
    qie_json *list = qie_json_new_array();
    check_driver(d);
    d->n_visible = qie_gpus_visible(&d->gpus, value, d->visible, &refused);
    for (int i = 0; i < d->gpus.n; i++)
        check_gpu(d, i, list);
    if (d->gpus.n && value && refused >= 0) {
        qie_doctor_check *c =
            say(d, "visible", QIE_DOCTOR_WARN,
                zh ? "CUDA_VISIBLE_DEVICES=%.80s 中从“%.40s”起不对应任何 GPU，其后都被忽略"
                   : "CUDA_VISIBLE_DEVICES=%.80s names no GPU from '%.40s' on: the rest is ignored",
                value, value + refused);
        mend(c,
             zh ? "使用 0 到 %d 的编号或 GPU-… UUID" : "use numbers from 0 to %d, or GPU-... UUIDs",
             d->gpus.n - 1);
    } else if (d->gpus.n && value && d->n_visible == 0) {
        qie_doctor_check *c = say(d, "visible", QIE_DOCTOR_WARN,
                                  zh ? "CUDA_VISIBLE_DEVICES 为空：隐藏了所有 GPU"
                                     : "CUDA_VISIBLE_DEVICES is empty: it hides all GPUs");
        mend(c, "unset CUDA_VISIBLE_DEVICES");
    }
    const char *order = getenv("CUDA_DEVICE_ORDER");
    bool mixed = false;
    for (int i = 1; i < d->gpus.n; i++)
        mixed = mixed || strcmp(d->gpus.gpus[i].name, d->gpus.gpus[0].name);
    if (mixed && value && (!order || strcmp(order, "PCI_BUS_ID"))) {
        qie_doctor_check *c =
            say(d, "visible", QIE_DOCTOR_WARN,
                zh ? "GPU 型号不同，CUDA 按速度编号，与此处（nvidia-smi）的编号可能不一致"
                   : "the GPUs are of different kinds: CUDA numbers them by speed, which need not "
                     "be the order here "
                     "(and in nvidia-smi)");
        mend(c, "export CUDA_DEVICE_ORDER=PCI_BUS_ID");
    }
    qie_json *o = qie_json_new_object();
    static const char *const states[] = {
        "ok", "no_driver", "not_loaded", "mismatch", "no_permission", "lost", "hung", "error"};
    qie_json_put(o, "state", qie_json_new_string(states[d->gpus.state]));
    qie_json_put(o, "driver", qie_json_new_string(d->gpus.driver));
    qie_json_put(o, "cuda_version", qie_json_new_int(d->gpus.cuda_version));
    qie_json_put(o, "cards", list);
    qie_json_put(d->r->details, "gpus", o);
}

/* ------------------------------------------------------------------ placement */

static qie_json *verdict_json(const qie_placement_verdict *v) {
    qie_json *o = qie_json_new_object(), *gpus = qie_json_new_array();
    qie_json_put(o, "fits", qie_json_new_bool(v->fits));
    qie_json_put(o, "bytes_needed", qie_json_new_int(v->need));
    qie_json_put(o, "bytes_available", qie_json_new_int(v->have));
    for (int i = 0; i < v->n_gpus; i++)
        qie_json_push(gpus, qie_json_new_int(v->gpus[i]));
    qie_json_put(o, "gpus", gpus);
    return o;
}

static void check_placement(doctor *d) {
    qie_placement_gpu cards[QIE_GPUS_MAX];
    qie_placement *p = &d->r->placement;
    bool zh = d->zh;
    char words[500];
    int n = d->o->force_cpu ? 0 : qie_doctor_gpus(&d->gpus, d->o->cuda_visible, cards);
    qie_placement_make(&d->model, cards, n, d->o->headroom, qie_machine_free(&d->machine), p);
    qie_placement_words(p, zh, words, sizeof words);
    qie_doctor_check *c = say(
        d, "placement", p->best == QIE_PLACE_NONE ? QIE_DOCTOR_FAIL : QIE_DOCTOR_OK, "%s", words);
    if (p->best == QIE_PLACE_NONE && n > 0) {
        char first[500] = "";
        if (d->culprit[0])
            snprintf(first, sizeof first, zh ? "停止%s（%s），或" : "stop %s (%s), or ", d->culprit,
                     d->stop_it);
        else if (!p->could_streamed)
            snprintf(first, sizeof first,
                     zh ? "这些卡即使全空也不够大：换更大的卡，或"
                        : "these cards are too small even when empty: use larger ones, or ");
        mend(c,
             zh ? "%s用 --headroom-gib 减小预留（现为 %.1f），或在 CPU 上运行：qwen-edit edit … "
                  "--device cpu --max-side 512 -s 10"
                : "%slower the head-room with --headroom-gib (now %.1f), or run on the CPU: "
                  "qwen-edit edit ... --device "
                  "cpu --max-side 512 -s 10",
             first, gib(d->o->headroom));
    } else if (p->best == QIE_PLACE_NONE)
        mend(c, zh ? "关闭其他程序，或提高容器的内存上限，或减小图片：--max-side 512"
                   : "end other programs, raise the container's memory limit, or make smaller "
                     "pictures: --max-side 512");
    if (n > 0)
        say(d, "placement", QIE_DOCTOR_INFO,
            zh ? "整卡驻留：需 %.1f GiB，有 %.1f；多卡分布：需 %.1f，有 %.1f；分层流式：需 "
                 "%.1f，有 %.1f；CPU：需 %.1f，有 %.1f"
               : "whole on one card: %.1f GiB needed, %.1f there; over several: %.1f needed, %.1f "
                 "there; streamed: "
                 "%.1f needed, %.1f there; CPU: %.1f needed, %.1f there",
            gib(p->resident.need), gib(p->resident.have), gib(p->sharded.need),
            gib(p->sharded.have), gib(p->streamed.need), gib(p->streamed.have), gib(p->cpu.need),
            gib(p->cpu.have));
    if (n > 0 && p->best != QIE_PLACE_NONE && !d->o->plugin) {
        c = say(
            d, "plugin", QIE_DOCTOR_WARN,
            zh ? "本程序没有 GPU 插件（qie_cuda.so）：编辑将在 CPU 上进行"
               : "this copy of the program has no GPU plugin (qie_cuda.so): edits run on the CPU");
        mend(c, zh ? "在装有 CUDA 工具包的机器上重新构建"
                   : "build it on a machine with the CUDA toolkit");
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "best", qie_json_new_string(qie_placement_name(p->best)));
    qie_json_put(o, "headroom_bytes", qie_json_new_int(p->headroom));
    qie_json_put(o, "weights_bytes", qie_json_new_int(p->weights));
    qie_json_put(o, "resident", verdict_json(&p->resident));
    qie_json_put(o, "sharded", verdict_json(&p->sharded));
    qie_json_put(o, "streamed", verdict_json(&p->streamed));
    qie_json_put(o, "cpu", verdict_json(&p->cpu));
    qie_json_put(o, "cpu_reads_from_disk", qie_json_new_bool(p->cpu_from_disk));
    qie_json_put(d->r->details, "placement", o);
}

/* ------------------------------------------------------------------ processor and memory */

static void check_machine(doctor *d) {
    const qie_machine *m = &d->machine;
    bool zh = d->zh;
    qie_cpu_level level = qie_cpu_level_hardware();
    int cores = qie_cpu_count();
    qie_doctor_check *c =
        say(d, "cpu", level >= QIE_CPU_AVX2 ? QIE_DOCTOR_OK : QIE_DOCTOR_WARN,
            zh ? "处理器 %s：%d 个核心，可用 %d 个，指令集 %s"
               : "%s: %d cores, %d usable, instructions %s",
            m->cpu[0] ? m->cpu : "CPU", m->cores, cores, qie_cpu_level_name(level));
    if (level < QIE_CPU_AVX2)
        mend(c, zh ? "没有 AVX2，速度会很慢：换用 2013 年以后的 x86 处理器"
                   : "without AVX2 it is very slow: use an x86 processor made after 2013");
    else if (level < QIE_CPU_AVX512BF16)
        mend(c, zh ? "没有 bf16 指令：默认用 f32 计算"
                   : "no bf16 instructions: f32 is the default arithmetic");
    int64_t left = qie_machine_free(m);
    char limit[160] = "";
    if (m->limit >= 0)
        snprintf(limit, sizeof limit,
                 zh ? "，容器上限 %.1f GiB（cgroup v%d）"
                    : ", the container's limit is %.1f GiB (cgroup v%d)",
                 gib(m->limit), m->cgroup_version);
    c = say(d, "memory", left < d->model.work_cpu ? QIE_DOCTOR_WARN : QIE_DOCTOR_OK,
            zh ? "内存共 %.1f GiB，可用 %.1f GiB%s；透明大页：%s"
               : "memory: %.1f GiB in all, %.1f GiB free%s; transparent huge pages: %s",
            gib(m->total), gib(left), limit, m->transparent_huge[0] ? m->transparent_huge : "?");
    if (left < d->model.work_cpu)
        mend(c,
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

static void add_folder(const char *dir, folder_sum *s) {
    DIR *dp = opendir(dir);
    struct dirent *e;
    while (dp && (e = readdir(dp))) {
        size_t n = strlen(e->d_name);
        char *path = n > 12 && !strcmp(e->d_name + n - 12, ".safetensors")
                         ? qie_path_join(dir, e->d_name)
                         : NULL;
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
        add_folder(sub, all);
    free(sub);
    return all->bytes - before;
}

qie_placement_model qie_doctor_model(const char *dir) {
    qie_placement_model m = qie_placement_released();
    folder_sum s = {0};
    if (!dir)
        return m;
    int64_t t = weights_in(dir, "transformer", &s), e = weights_in(dir, "text_encoder", &s),
            v = weights_in(dir, "vae", &s);
    if (t > 0 && e > 0 && v > 0) {
        /* Smaller copies (quantised, distilled, demo) scale with their weights; the released ratio
         * of the rest. */
        double scale = (double)t / (double)m.transformer;
        m.block = (int64_t)((double)m.block * scale);
        if (scale < 0.05) { /* not the released architecture */
            m.work = (int64_t)((double)m.work * scale) + ((int64_t)64 << 20);
            m.work_cpu = (int64_t)((double)m.work_cpu * scale) + ((int64_t)128 << 20);
        }
        m.transformer = t;
        m.text_encoder = e;
        m.vae = v;
    }
    return m;
}

static bool first_names(void *arg, const char *path) {
    char *names = arg;
    size_t n = strlen(names);
    if (n < 120)
        snprintf(names + n, 200 - n, "%s%.80s", n ? ", " : "", path);
    return true;
}

static void check_disk_for_pull(doctor *d) {
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
    qie_doctor_check *c = say(d, "disk", left < RELEASED_BYTES ? QIE_DOCTOR_FAIL : QIE_DOCTOR_OK,
                              zh ? "下载模型需要 %.1f GB，%s 所在磁盘空闲 %.1f GB"
                                 : "the model takes %.1f GB; the disk of %s has %.1f GB free",
                              (double)RELEASED_BYTES / 1e9, d->o->cache, (double)left / 1e9);
    if (left < RELEASED_BYTES)
        mend(c,
             zh ? "腾出 %.1f GB，或把 HF_HOME 指向另一块磁盘上的目录"
                : "make %.1f GB free there, or set HF_HOME to a folder on another disk",
             (double)(RELEASED_BYTES - left) / 1e9);
    free(dir);
}

static void check_model(doctor *d) {
    const qie_doctor_options *o = d->o;
    bool zh = d->zh;
    qie_json *j = qie_json_new_object();
    folder_sum s = {0};
    char names[200] = "";
    qie_doctor_check *c;
    if (o->model_error) {
        c = say(d, "model", QIE_DOCTOR_FAIL,
                zh ? "指定的模型不可用：%s" : "the model that is named cannot be used: %s",
                o->model_error);
        mend(c, zh ? "改正名称，或下载：qwen-edit pull"
                   : "correct the name, or fetch the model: qwen-edit pull");
    } else if (!o->model_dir) {
        c = say(d, "model", QIE_DOCTOR_WARN,
                zh ? "本机没有 " QIE_HUB_DEFAULT_REPO "：使用内置演示模型（不能编辑照片）"
                   : QIE_HUB_DEFAULT_REPO " is not on this machine: the built-in demo is used, "
                                          "which is no photograph editor");
        mend(c, "qwen-edit pull");
        check_disk_for_pull(d);
    } else {
        size_t missing = qie_model_missing(o->model_dir, first_names, names);
        weights_in(o->model_dir, "transformer", &s);
        weights_in(o->model_dir, "text_encoder", &s);
        weights_in(o->model_dir, "vae", &s);
        d->model_complete = missing == 0;
        if (missing) {
            char repo[128];
            bool cached = qie_cache_repo_of(o->model_dir, repo, sizeof repo);
            c = say(d, "model", QIE_DOCTOR_FAIL,
                    zh ? "模型 %s 不完整，缺 %zu 个文件（%s）"
                       : "the model in %s is not complete: %zu file(s) missing (%s)",
                    o->model_dir, missing, names);
            if (cached)
                mend(c, "qwen-edit pull %s", repo);
            else
                mend(c, "qwen-edit pull --local-dir '%s'", o->model_dir);
        } else {
            double share = s.cached_weight > 0 ? s.cached / (double)s.cached_weight : -1;
            double speed = s.largest[0] ? qie_file_disk_speed(s.largest, 0.3) : -1;
            char disk[160] = "";
            if (speed > 0)
                snprintf(disk, sizeof disk,
                         zh ? "，磁盘读取 %.0f MB/s（首次加载约 %.0f 秒）"
                            : ", disk reads %.0f MB/s (the first load takes about %.0f s)",
                         speed / 1e6, (double)s.bytes / speed * (share > 0 ? 1 - share : 1));
            c = say(d, "model", QIE_DOCTOR_OK,
                    zh ? "模型完整：%s，权重 %.2f GB，其中 %.0f%% 在页缓存中%s"
                       : "the model is complete: %s, %.2f GB of weights, %.0f %% of them in the "
                         "page cache%s",
                    o->model_dir, (double)s.bytes / 1e9, share >= 0 ? share * 100 : 0, disk);
            if (speed > 0 && speed < 2e8 && s.bytes > (int64_t)10 << 30)
                mend(c, zh ? "把模型移到更快的磁盘" : "move the model to a faster disk");
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

static void check_network(doctor *d) {
    const qie_hub_settings *s = d->o->hub;
    bool zh = d->zh;
    qie_json *list = qie_json_new_array();
    if (s->offline) {
        say(d, "network", QIE_DOCTOR_INFO,
            zh ? "%s=1：不建立任何连接" : "%s=1: no connection is made", s->offline_origin);
        qie_json_put(d->r->details, "network", list);
        return;
    }
    qie_http_options ho = qie_http_options_default();
    ho.connect_timeout_s = NETWORK_TIMEOUT_S;
    ho.stall_timeout_s = NETWORK_TIMEOUT_S;
    ho.ca_bundle = s->ca_bundle;
    ho.user_agent = "qwen-edit/" QIE_VERSION;
    qie_http *h = NULL;
    double until = qie_now_s() + NETWORK_TIMEOUT_S;
    for (size_t i = 0; i < s->n_endpoints && qie_http_create(&ho, &h, NULL) == QIE_OK; i++) {
        const qie_endpoint *e = &s->endpoints[i];
        qie_http_request q = {
            .head = true, .url = e->url, .from = -1, .to = -1, .timeout_s = NETWORK_TIMEOUT_S};
        qie_http_reply r;
        char why[256] = "", proxy[300], through[360] = "";
        double t0 = qie_now_s();
        qie_http_end end = t0 < until
                               ? qie_http_fetch(h, &q, 65536, NULL, NULL, &r, why, NULL, NULL)
                               : QIE_HTTP_STALLED;
        double ms = (qie_now_s() - t0) * 1000;
        bool ok = end == QIE_HTTP_OK || end == QIE_HTTP_REDIRECT;
        qie_http_proxy_for(e->url, proxy, sizeof proxy);
        if (proxy[0])
            snprintf(through, sizeof through, zh ? "，经代理 %s" : ", through the proxy %s", proxy);
        if (ok)
            say(d, "network", QIE_DOCTOR_OK,
                zh ? "%s 可达（%.0f 毫秒%s）" : "%s answers (%.0f ms%s)", e->url, ms, through);
        else {
            /* The transfer's words begin with the host, which stands in front already. */
            const char *cause = strstr(why, "://") ? strstr(why, ": ") : NULL;
            cause = cause ? cause + 2 : why;
            bool matters = !d->model_complete && !d->o->is_demo;
            qie_doctor_check *c = say(
                d, "network", matters && s->n_endpoints == 1 ? QIE_DOCTOR_FAIL : QIE_DOCTOR_WARN,
                zh ? "无法连接 %s%s：%s" : "%s cannot be reached%s: %s", e->url, through,
                cause[0] ? cause : (zh ? "超时" : "no answer in time"));
            if (d->model_complete)
                mend(c, zh ? "模型已完整，不需要网络；设 HF_HUB_OFFLINE=1 可避免任何连接"
                           : "the model is complete, so no network is needed; HF_HUB_OFFLINE=1 "
                             "avoids every connection");
            else
                mend(c, zh ? "设置镜像：export HF_ENDPOINT=https://hf-mirror.com（或 "
                             "https://www.modelscope.cn），或设置 HTTPS_PROXY"
                           : "name a mirror: export HF_ENDPOINT=https://hf-mirror.com (or "
                             "https://www.modelscope.cn), or set HTTPS_PROXY");
        }
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "endpoint", qie_json_new_string(e->url));
        qie_json_put(o, "reachable", qie_json_new_bool(ok));
        qie_json_put(o, "ms", qie_json_new_double(ms));
        qie_json_put(o, "proxy", proxy[0] ? qie_json_new_string(proxy) : qie_json_new_null());
        qie_json_put(o, "error", ok ? qie_json_new_null() : qie_json_new_string(why));
        qie_json_push(list, o);
        qie_http_destroy(h);
        h = NULL;
    }
    qie_json_put(d->r->details, "network", list);
}

static void check_port(doctor *d) {
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
        say(d, "port", QIE_DOCTOR_OK, zh ? "端口 %d 空闲" : "port %d is free", d->o->port);
    else {
        qie_doctor_check *c =
            say(d, "port", QIE_DOCTOR_WARN,
                zh ? "端口 %d 不可用：%s" : "port %d cannot be used: %s", d->o->port, strerror(e));
        mend(c,
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
static void choose_next(doctor *d) {
    qie_doctor_report *r = d->r;
    bool zh = d->zh;
    for (size_t i = 0; i < r->n; i++)
        if (r->checks[i].level == QIE_DOCTOR_FAIL && r->checks[i].remedy[0]) {
            snprintf(r->next, sizeof r->next, "%s", r->checks[i].remedy);
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
    doctor *d = calloc(1, sizeof *d);
    double t0 = qie_now_s();
    out->details = qie_json_new_object();
    if (!d) {
        out->n_failed = 1;
        return;
    }
    d->o = options;
    d->r = out;
    d->zh = options->chinese;
    qie_gpus_probe(NVML_TIMEOUT_MS, &d->gpus);
    qie_machine_read(options->root, &d->machine);
    d->model = qie_doctor_model(options->model_dir);
    check_gpus(d);
    check_placement(d);
    check_machine(d);
    check_model(d);
    check_network(d);
    check_port(d);
    choose_next(d);
    out->seconds = qie_now_s() - t0;
    free(d);
}

void qie_doctor_release(qie_doctor_report *r) {
    qie_json_free(r->details);
    r->details = NULL;
}
