/* doctor's checks of the GPUs and of where the model fits. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hub/doctor_checks.h"

#define GIB 1073741824.0

static double gib(int64_t bytes) {
    return (double)bytes / GIB;
}

static qie_json *bytes_json(int64_t n) {
    return n >= 0 ? qie_json_new_int(n) : qie_json_new_null();
}

/* ------------------------------------------------------------------ GPUs */

/* ": what the driver says", in the user's language where the code is a usual one; the number is
 * what one searches for. */
static void driver_words(bool zh, int code, const char *english, char *out, size_t cap) {
    static const struct {
        int code;
        const char *chinese;
    } known[] = {{QIE_NVML_CRASHED, "其库崩溃了"},
                 {QIE_NVML_TOO_OLD, "libnvidia-ml 太旧（缺少 2018 年以来各版驱动都有的函数）"},
                 {3, "不支持"},
                 {4, "权限不足"},
                 {6, "找不到设备"},
                 {8, "供电不足"},
                 {10, "超时"},
                 {12, "找不到库文件"},
                 {13, "找不到函数"},
                 {16, "GPU 需要重置"},
                 {17, "被操作系统或控制组阻止"},
                 {20, "主机内存不足"},
                 {999, "未知错误"}};
    const char *text = english;
    for (size_t i = 0; zh && i < sizeof known / sizeof *known; i++)
        if (known[i].code == code)
            text = known[i].chinese;
    int n = snprintf(out, cap, "%s%s", !text[0] ? "" : zh ? "：" : ": ", text);
    if (code > 0 && n >= 0 && (size_t)n < cap)
        snprintf(out + n, cap - (size_t)n, zh ? "（NVML 错误 %d）" : " (NVML error %d)", code);
}

static void check_driver(qie_doctor *d) {
    /* English and Chinese: what is wrong, and what to do. */
    static const struct {
        const char *text[2], *mend[2];
    } failures[] = {
        [QIE_GPUS_NOT_LOADED] = {{"the driver's library is installed but its kernel module is not "
                                  "loaded",
                                  "驱动的库已安装，但内核模块没有加载"},
                                 {"type sudo modprobe nvidia; if that fails, install the driver "
                                  "again for this kernel and reboot",
                                  "执行 sudo modprobe nvidia；若失败，针对当前内核重装驱动并重启"}},
        [QIE_GPUS_MISMATCH] = {{"the driver's library and the running kernel module are of "
                                "different versions (it was updated and not restarted)",
                                "驱动的库与正在运行的内核模块版本不同（升级后未重启）"},
                               {"reboot the machine: before that no program can use the GPUs",
                                "重启机器，重启之前任何程序都无法使用 GPU"}},
        [QIE_GPUS_NO_PERMISSION] = {{"no permission to use the GPU devices",
                                     "没有权限使用 GPU 设备"},
                                    {"look at ls -l /dev/nvidia*; ask the administrator to put "
                                     "your user into that group, or start the container with "
                                     "--gpus all",
                                     "检查 ls -l /dev/nvidia*；请管理员把你的用户加入该组，或在"
                                     "启动容器时加 --gpus all"}},
        [QIE_GPUS_LOST] = {{"a GPU has fallen off the bus", "有 GPU 已掉线"},
                           {"reboot the machine; if it happens again, check power and cooling",
                            "重启机器；若再次发生，请检查电源和散热"}},
        [QIE_GPUS_HUNG] = {{"the driver did not answer within 2.5 s", "驱动在 2.5 秒内没有回答"},
                           {"look at sudo dmesg | grep -i xid; usually a reboot is needed",
                            "查看 sudo dmesg | grep -i xid；通常需要重启"}},
        [QIE_GPUS_ERROR] = {{"the driver does not work", "驱动无法工作"},
                            {"type nvidia-smi: when that fails too, install the driver again "
                             "and reboot",
                             "执行 nvidia-smi：若它也报错，重装驱动并重启"}},
    };
    const qie_gpus *g = &d->gpus;
    bool zh = d->zh;
    if (g->state == QIE_GPUS_NO_DRIVER)
        qie_doctor_say(d, "driver", QIE_DOCTOR_INFO,
                       zh ? "没有 NVIDIA 驱动（或容器未带驱动启动）"
                          : "no NVIDIA driver (or a container started without one)");
    else if (g->state == QIE_GPUS_OK && g->n == 0)
        qie_doctor_say(
            d, "driver", QIE_DOCTOR_INFO,
            zh ? "NVIDIA 驱动 %s 已安装，但没有 GPU（容器需要 --gpus all）"
               : "the NVIDIA driver %s is there but shows no GPU (a container needs --gpus all)",
            g->driver);
    else if (g->state == QIE_GPUS_OK)
        qie_doctor_say(d, "driver", QIE_DOCTOR_OK,
                       zh ? "NVIDIA 驱动 %s，CUDA %d.%d，%d 张 GPU%.0s"
                          : "NVIDIA driver %s, CUDA %d.%d, %d GPU%s",
                       g->driver[0] ? g->driver : "?", g->cuda_version / 1000,
                       g->cuda_version % 1000 / 10, g->n, g->n == 1 ? "" : "s");
    else {
        char words[300];
        /* In Chinese the text in front says it already, except of an error without a name. */
        driver_words(zh, g->code, zh && g->state != QIE_GPUS_ERROR ? "" : g->detail, words,
                     sizeof words);
        qie_doctor_check *c = qie_doctor_say(d, "driver", QIE_DOCTOR_FAIL, "%s%s",
                                             failures[g->state].text[zh], words);
        qie_doctor_mend(c, "%s", failures[g->state].mend[zh]);
    }
}

/* One process on one card. */
static void check_process(qie_doctor *d, const qie_gpu *g, bool visible, const qie_gpu_process *p,
                          qie_json *list) {
    qie_process_info i;
    bool zh = d->zh;
    char who[400], where[160] = "", held[48];
    qie_process_read(d->o->root, p->pid, &i);
    if (p->used_bytes >= 0)
        snprintf(held, sizeof held, zh ? " %.1f GiB 显存" : "%.1f GiB", gib(p->used_bytes));
    else
        snprintf(held, sizeof held, "%s", zh ? "一部分显存（大小未知）" : "an unknown part");
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
    qie_doctor_check *c = qie_doctor_say(
        d, "process", p->graphics ? QIE_DOCTOR_INFO : QIE_DOCTOR_WARN,
        zh ? "%s占用 GPU %d 的%s%s%.200s" : "%1$s holds %3$s of GPU %2$d%4$s%5$.200s", who,
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
            qie_doctor_mend(c, "%s", stop);
        else
            qie_doctor_mend(c, zh ? "若不再需要：%s" : "if it is not needed any more: %s", stop);
    }
    int64_t weight = p->used_bytes >= 0 ? p->used_bytes : 1;
    if (visible && !p->graphics && weight > d->culprit_bytes) {
        d->culprit_bytes = weight;
        snprintf(d->culprit, sizeof d->culprit,
                 zh ? "占用 GPU %2$d 的%3$s%1$.200s" : "%1$.200s on GPU %2$d%3$.0s", who, g->index,
                 who[0] & 0x80 ? "" : " "); /* a blank only before Latin letters */
        snprintf(d->stop_it, sizeof d->stop_it, "%s", stop);
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "pid", qie_json_new_int(p->pid));
    qie_json_put(o, "bytes", bytes_json(p->used_bytes));
    qie_json_put(o, "name", i.found ? qie_json_new_string(i.name) : qie_json_new_null());
    qie_json_put(o, "kind", qie_json_new_string(i.kind));
    qie_json_put(o, "owner", qie_json_new_string(i.owner));
    qie_json_put(o, "command", qie_json_new_string(i.command));
    qie_json_put(o, "container", qie_json_new_string(i.container));
    qie_json_put(o, "graphics", qie_json_new_bool(p->graphics));
    qie_json_push(list, o);
}

static void check_mig(qie_doctor *d, const qie_gpu *g, qie_json *list) {
    bool zh = d->zh;
    if (!g->mig)
        return;
    char sizes[200] = "";
    for (int i = 0; i < g->n_mig; i++) {
        size_t n = strlen(sizes);
        snprintf(sizes + n, sizeof sizes - n, "%s%.1f/%.1f GiB", i ? ", " : "",
                 gib(g->migs[i].free), gib(g->migs[i].total));
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "uuid", qie_json_new_string(g->migs[i].uuid));
        qie_json_put(o, "bytes_total", bytes_json(g->migs[i].total));
        qie_json_put(o, "bytes_free", bytes_json(g->migs[i].free));
        qie_json_push(list, o);
    }
    qie_doctor_check *c = qie_doctor_say(
        d, "mig", QIE_DOCTOR_WARN,
        zh ? "GPU %d 处于 MIG 模式，只能使用它的实例（空闲/总量：%s）"
           : "GPU %d is in MIG mode: only its instances can be used (free/total: %s)",
        g->index, g->n_mig ? sizes : (zh ? "无" : "none made"));
    if (g->n_mig)
        qie_doctor_mend(c,
                        zh ? "用 CUDA_VISIBLE_DEVICES=%s 选择一个实例"
                           : "choose an instance with CUDA_VISIBLE_DEVICES=%s",
                        g->migs[0].uuid);
    else
        qie_doctor_mend(
            c, zh ? "请管理员创建实例（nvidia-smi mig -cgi …）或关闭 MIG 模式"
                  : "ask the administrator to make instances (nvidia-smi mig -cgi ...) or to end "
                    "MIG mode");
}

static bool is_visible(const qie_doctor *d, int i) {
    for (int k = 0; k < d->n_visible; k++)
        if (d->visible[k].i_gpu == i)
            return true;
    return false;
}

static void check_gpu(qie_doctor *d, int i, qie_json *list) {
    const qie_gpu *g = &d->gpus.gpus[i];
    bool zh = d->zh, visible = is_visible(d, i);
    qie_json *o = qie_json_new_object(), *processes = qie_json_new_array();
    qie_json *instances = qie_json_new_array();
    const char *hidden = visible ? ""
                         : zh    ? "（CUDA_VISIBLE_DEVICES 中没有）"
                                 : " (not in CUDA_VISIBLE_DEVICES)";
    if (g->total >= 0)
        qie_doctor_say(d, "gpu", QIE_DOCTOR_OK,
                       zh ? "GPU %d：%s，共 %.1f GiB，空闲 %.1f GiB，已用 %.1f GiB%s"
                          : "GPU %d: %s, %.1f GiB in all, %.1f GiB free, %.1f GiB in use%s",
                       g->index, g->name, gib(g->total), gib(g->free), gib(g->used), hidden);
    else {
        char words[200];
        driver_words(zh, g->code, g->error, words, sizeof words);
        qie_doctor_check *c =
            qie_doctor_say(d, "gpu", QIE_DOCTOR_WARN,
                           zh ? "GPU %d：%s，驱动不告知其显存%s%s"
                              : "GPU %d: %s, the driver does not tell its memory%s%s",
                           g->index, g->name, words, hidden);
        qie_doctor_mend(c, zh ? "检查 ls -l /dev/nvidia* 的权限"
                              : "look at the permissions in ls -l /dev/nvidia*");
    }
    int64_t told = 0;
    bool all_told = true; /* else what is missing may be theirs */
    for (int k = 0; k < g->n_processes; k++) {
        check_process(d, g, visible, &g->processes[k], processes);
        told += g->processes[k].used_bytes > 0 ? g->processes[k].used_bytes : 0;
        all_told = all_told && g->processes[k].used_bytes >= 0;
    }
    /* What a context of the driver itself takes is below one GiB. */
    int64_t untold = g->used - told;
    if (g->total >= 0 && all_told && untold > (int64_t)1 << 30) {
        qie_doctor_check *c = qie_doctor_say(
            d, "process", QIE_DOCTOR_WARN,
            zh ? "GPU %d 上有 %.1f GiB "
                 "被驱动没有列出的进程占用（其他容器、其他用户，或异常退出的残留）"
               : "%2$.1f GiB of GPU %1$d are held by processes that the driver does not name "
                 "here (another "
                 "container or user, or left behind by a crash)",
            g->index, gib(untold));
        qie_doctor_mend(c,
                        zh ? "在宿主机上执行：nvidia-smi；sudo fuser -v /dev/nvidia%d"
                           : "on the host type: nvidia-smi; sudo fuser -v /dev/nvidia%d",
                        g->index);
        if (visible && untold > d->culprit_bytes && !g->n_processes) {
            d->culprit_bytes = untold;
            snprintf(d->culprit, sizeof d->culprit,
                     zh ? "占用 GPU %d 的未知进程" : "what holds GPU %d", g->index);
            snprintf(d->stop_it, sizeof d->stop_it, "sudo fuser -v /dev/nvidia%d", g->index);
        }
    }
    check_mig(d, g, instances);
    qie_json_put(o, "index", qie_json_new_int(g->index));
    qie_json_put(o, "name", qie_json_new_string(g->name));
    qie_json_put(o, "uuid", qie_json_new_string(g->uuid));
    qie_json_put(o, "bus", qie_json_new_string(g->bus));
    qie_json_put(o, "visible", qie_json_new_bool(visible));
    qie_json_put(o, "bytes_total", bytes_json(g->total));
    qie_json_put(o, "bytes_free", bytes_json(g->free));
    qie_json_put(o, "bytes_used", bytes_json(g->used));
    qie_json_put(o, "compute_capability", qie_json_new_double(g->cc_major + g->cc_minor / 10.0));
    qie_json_put(o, "mig", qie_json_new_bool(g->mig));
    qie_json_put(o, "instances", instances);
    qie_json_put(o, "processes", processes);
    qie_json_push(list, o);
}

/* A card in MIG mode offers one instance to a process: the one that is named, else its first,
 * which is what CUDA takes. */
static const qie_mig *instance_of(const qie_gpu *g, const qie_gpu_choice *c) {
    return !g->mig ? NULL : c->i_mig >= 0 ? &g->migs[c->i_mig] : g->n_mig ? &g->migs[0] : NULL;
}

int qie_doctor_cards(const qie_gpus *gpus, const qie_gpu_choice *choices, int n,
                     qie_doctor_card out[QIE_GPUS_MAX]) {
    int k = 0;
    for (int i = 0; i < n; i++) {
        const qie_gpu *g = &gpus->gpus[choices[i].i_gpu];
        const qie_mig *m = instance_of(g, &choices[i]);
        int64_t total = m ? m->total : g->mig ? -1 : g->total;
        int64_t free_bytes = m ? m->free : g->mig ? -1 : g->free;
        if (total < 0 || free_bytes < 0)
            continue;
        out[k].memory = (qie_placement_gpu){g->index, total, free_bytes};
        memcpy(out[k].name, g->name, sizeof out->name);
        snprintf(out[k++].uuid, sizeof out->uuid, "%s", m ? m->uuid : g->uuid);
    }
    return k;
}

void qie_doctor_check_gpus(qie_doctor *d) {
    const char *value = d->o->cuda_visible;
    bool zh = d->zh;
    int refused;
    qie_json *list = qie_json_new_array();
    check_driver(d);
    d->n_visible = qie_gpus_visible(&d->gpus, value, d->visible, &refused);
    for (int i = 0; i < d->gpus.n; i++)
        check_gpu(d, i, list);
    if (d->gpus.n && value && d->n_visible == 0) {
        qie_doctor_check *c = qie_doctor_say(d, "visible", QIE_DOCTOR_WARN,
                                             zh ? "CUDA_VISIBLE_DEVICES=%.80s 隐藏了所有 GPU"
                                                : "CUDA_VISIBLE_DEVICES=%.80s hides all GPUs",
                                             *value ? value : "''");
        qie_doctor_mend(c, "unset CUDA_VISIBLE_DEVICES");
    } else if (d->gpus.n && value && refused >= 0) {
        qie_doctor_check *c = qie_doctor_say(
            d, "visible", QIE_DOCTOR_WARN,
            zh ? "CUDA_VISIBLE_DEVICES=%.80s 中从“%.40s”起不对应任何 GPU，其后都被忽略"
               : "CUDA_VISIBLE_DEVICES=%.80s names no GPU from '%.40s' on: the rest is ignored",
            value, value + refused);
        qie_doctor_mend(c,
                        zh ? "使用 0 到 %d 的编号或 GPU-… UUID"
                           : "use numbers from 0 to %d, or GPU-... UUIDs",
                        d->gpus.n - 1);
    }
    const char *order = getenv("CUDA_DEVICE_ORDER");
    bool mixed = false;
    for (int i = 1; i < d->gpus.n; i++)
        mixed = mixed || strcmp(d->gpus.gpus[i].name, d->gpus.gpus[0].name);
    if (mixed && value && (!order || strcmp(order, "PCI_BUS_ID"))) {
        qie_doctor_check *c = qie_doctor_say(
            d, "visible", QIE_DOCTOR_WARN,
            zh ? "GPU 型号不同，CUDA 按速度编号，与此处（nvidia-smi）的编号可能不一致"
               : "the GPUs are of different kinds: CUDA numbers them by speed, which need not "
                 "be the order here "
                 "(and in nvidia-smi)");
        qie_doctor_mend(c, "export CUDA_DEVICE_ORDER=PCI_BUS_ID");
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

/* What makes room, in the order of what it costs the user; the CPU is always possible. */
static void mend_no_room(const qie_doctor *d, const qie_placement *p, qie_doctor_check *c) {
    bool zh = d->zh;
    char first[560] = "", head[160] = "";
    /* Down to a tenth of a GiB, and only if that is enough. */
    double most = (double)((p->best_gpu_free - p->streamed.need) / ((int64_t)1 << 20)) / 1024;
    most = (double)(int)(most * 10) / 10;
    if (p->best_gpu_free > p->streamed.need && most < gib(d->o->headroom))
        snprintf(head, sizeof head,
                 zh ? "减小预留：--headroom-gib %.1f（现为 %.1f），或"
                    : "lower the head-room: --headroom-gib %.1f (now %.1f), or ",
                 most, gib(d->o->headroom));
    if (!p->could_streamed && !head[0])
        snprintf(first, sizeof first,
                 zh ? "这些卡即使全空也不够大：换更大的卡，或"
                    : "these cards are too small even when empty: use larger ones, or ");
    else if (d->culprit[0])
        snprintf(first, sizeof first, zh ? "停止%s（%s），或" : "stop %s (%s), or ", d->culprit,
                 d->stop_it);
    qie_doctor_mend(
        c, zh ? "%s%s在 CPU 上运行：" QIE_CPU_COMMAND : "%s%srun on the CPU: " QIE_CPU_COMMAND,
        first, head);
}

void qie_doctor_check_placement(qie_doctor *d) {
    qie_doctor_card cards[QIE_GPUS_MAX];
    qie_placement_gpu memory[QIE_GPUS_MAX];
    qie_placement *p = &d->r->placement;
    bool zh = d->zh;
    char words[500];
    int n = d->o->force_cpu ? 0 : qie_doctor_cards(&d->gpus, d->visible, d->n_visible, cards);
    for (int i = 0; i < n; i++)
        memory[i] = cards[i].memory;
    qie_placement_make(&d->model, memory, n, d->o->headroom, qie_machine_free(&d->machine), p);
    qie_placement_words(p, zh, words, sizeof words);
    qie_doctor_check *c = qie_doctor_say(
        d, "placement", p->best == QIE_PLACE_NONE ? QIE_DOCTOR_FAIL : QIE_DOCTOR_OK, "%s", words);
    if (p->best == QIE_PLACE_NONE && n > 0) {
        mend_no_room(d, p, c);
    } else if (p->best == QIE_PLACE_NONE)
        qie_doctor_mend(
            c, zh ? "关闭其他程序，或提高容器的内存上限，或减小图片：--max-side 512"
                  : "end other programs, raise the container's memory limit, or make smaller "
                    "pictures: --max-side 512");
    if (n > 0)
        qie_doctor_say(
            d, "placement", QIE_DOCTOR_INFO,
            zh ? "整卡驻留：需 %.1f GiB，有 %.1f；多卡分布：需 %.1f，有 %.1f；分层流式：需 "
                 "%.1f，有 %.1f；CPU：需 %.1f，有 %.1f"
               : "whole on one card: %.1f GiB needed, %.1f there; over several: %.1f needed, %.1f "
                 "there; streamed: "
                 "%.1f needed, %.1f there; CPU: %.1f needed, %.1f there",
            gib(p->resident.need), gib(p->resident.have), gib(p->sharded.need),
            gib(p->sharded.have), gib(p->streamed.need), gib(p->streamed.have), gib(p->cpu.need),
            gib(p->cpu.have));
    if (p->used.n_gpus) {
        const char *names[QIE_ASSIGN_CARDS_MAX] = {0};
        for (int k = 0; k < QIE_ASSIGN_CARDS_MAX; k++)
            for (int i = 0; i < n; i++)
                if (cards[i].memory.index == p->plan_gpus[k])
                    names[k] = cards[i].name;
        /* the line that the engine prints of itself, in its words */
        qie_assign_words(&p->plan, p->plan_gpus, names, words, sizeof words);
        qie_doctor_say(d, "placement", QIE_DOCTOR_INFO, "%s", words);
    }
    if (n > 0 && p->best != QIE_PLACE_NONE && !d->o->plugin) {
        c = qie_doctor_say(
            d, "plugin", QIE_DOCTOR_WARN,
            zh ? "本程序没有 GPU 插件（qie_cuda.so）：编辑将在 CPU 上进行"
               : "this copy of the program has no GPU plugin (qie_cuda.so): edits run on the CPU");
        qie_doctor_mend(c, zh ? "在装有 CUDA 工具包的机器上重新构建"
                              : "build it on a machine with the CUDA toolkit");
    }
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "best", qie_json_new_string(qie_placement_name(p->best)));
    qie_json_put(o, "headroom_bytes", qie_json_new_int(p->headroom));
    qie_json_put(o, "weights_bytes", qie_json_new_int(p->weights));
    qie_json_put(o, "used", verdict_json(&p->used));
    if (p->used.n_gpus)
        qie_json_put(o, "assigned", qie_json_new_string(words));
    qie_json_put(o, "resident", verdict_json(&p->resident));
    qie_json_put(o, "sharded", verdict_json(&p->sharded));
    qie_json_put(o, "streamed", verdict_json(&p->streamed));
    qie_json_put(o, "cpu", verdict_json(&p->cpu));
    qie_json_put(o, "cpu_reads_from_disk", qie_json_new_bool(p->cpu_from_disk));
    qie_json_put(d->r->details, "placement", o);
}
