/* Built on doctor's own checks, so that the words cannot differ. */
#define _GNU_SOURCE
#include "hub/place.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "hub/doctor_checks.h"

/* The demo is small beside what a CUDA context takes anyway. */
static void demo_model(qie_placement_model *m) {
    qie_placement_scaled(16 << 20, 4 << 20, 4 << 20, m);
    m->work = m->work_cpu = 256 << 20;
}

typedef struct asked {
    const qie_place_options *o;
    qie_doctor_options doctor_options;
    qie_doctor_report report;
    qie_doctor d;
    qie_doctor_card cards[QIE_GPUS_MAX];
    int n_cards;
    /* of the list of --gpus: cards with the same number are one worker's */
    int together[QIE_GPUS_MAX];
    int n_listed;
} asked;

static const qie_doctor_check *find_check(const asked *a, const char *id, qie_doctor_level least) {
    for (size_t i = 0; i < a->report.n; i++)
        if (!strcmp(a->report.checks[i].id, id) && a->report.checks[i].level >= least)
            return &a->report.checks[i];
    return NULL;
}

/* A GPU is demanded by name: anything but one is an error. */
static bool demanded(const qie_place_options *o) {
    return o->device == QIE_DEVICE_CUDA || o->gpus;
}

static const char *demand(const qie_place_options *o) {
    return o->gpus ? "--gpus" : "--device";
}

/* The check's words as an error; with_cpu: its remedy does not name the CPU yet. */
static qie_status refuse(const asked *a, qie_status status, const qie_doctor_check *c,
                         bool with_cpu, qie_error *err) {
    bool zh = a->o->chinese;
    const char *text = c ? c->text : zh ? "没有可用的 GPU" : "no GPU is usable";
    return qie_fail(err, status, demand(a->o), "%s%s%s%s", text,
                    c && c->remedy[0] ? (zh ? "；" : "; ") : "", c ? c->remedy : "",
                    !with_cpu ? ""
                    : zh      ? "；或在 CPU 上运行：" QIE_CPU_COMMAND
                              : "; or run on the CPU: " QIE_CPU_COMMAND);
}

/* ------------------------------------------------------------------ which cards */

static bool same(const qie_gpu_choice *a, const qie_gpu_choice *b) {
    return a->i_gpu == b->i_gpu && (a->i_mig == b->i_mig || b->i_mig < 0);
}

/* Cards joined by '+' are one worker's: "0+1,2+3". The list with commas only is left in `out`. */
static qie_status read_groups(asked *a, char *out, size_t cap, qie_error *err) {
    int group = 0;
    size_t n = strlen(a->o->gpus) + 1;
    QIE_FAIL_IF(n > cap, QIE_E_INVALID, err, "--gpus", "--gpus is too long");
    memcpy(out, a->o->gpus, n);
    QIE_FAIL_IF(!a->o->each && strchr(out, '+'), QIE_E_INVALID, err, "--gpus",
                "--gpus: '+' makes workers of a service; one edit takes a list with commas");
    a->together[a->n_listed++] = group;
    for (char *p = out; *p; p++) {
        QIE_FAIL_IF(a->n_listed == QIE_GPUS_MAX, QIE_E_INVALID, err, "--gpus",
                    "--gpus names too many");
        if (*p != ',' && *p != '+')
            continue;
        group += *p == ',';
        *p = ',';
        a->together[a->n_listed++] = group;
    }
    return QIE_OK;
}

/* The list of --gpus takes the place of all that are visible, and must lie within them. */
static qie_status restrict_to_list(asked *a, qie_error *err) {
    char list[2048];
    QIE_TRY(read_groups(a, list, sizeof list, err));
    qie_gpu_choice wanted[QIE_GPUS_MAX];
    int refused, n = qie_gpus_visible(&a->d.gpus, list, wanted, &refused);
    QIE_FAIL_IF(refused >= 0, QIE_E_INVALID, err, "--gpus",
                "--gpus: '%.*s' names no GPU of this machine, which has %d: qwen-edit doctor "
                "lists them",
                (int)strcspn(list + refused, ","), list + refused, a->d.gpus.n);
    QIE_FAIL_IF(!n, QIE_E_INVALID, err, "--gpus", "--gpus names none");
    for (int i = 0; i < n; i++) {
        bool visible = false;
        for (int k = 0; k < a->d.n_visible; k++)
            visible = visible || same(&wanted[i], &a->d.visible[k]);
        QIE_FAIL_IF(!visible, QIE_E_INVALID, err, "--gpus",
                    "--gpus: GPU %d is hidden by CUDA_VISIBLE_DEVICES=%.80s",
                    a->d.gpus.gpus[wanted[i].i_gpu].index, a->o->cuda_visible);
    }
    memcpy(a->d.visible, wanted, sizeof wanted);
    a->d.n_visible = n;
    return QIE_OK;
}

static void add_slot(const asked *a, qie_place *out, qie_placement_kind kind, const int *gpus,
                     int n_gpus) {
    qie_place_slot *s = &out->slots[out->n_slots++];
    size_t n = 0;
    s->kind = kind;
    for (int i = 0; i < n_gpus; i++)
        for (int k = 0; k < a->n_cards; k++)
            if (a->cards[k].memory.index == gpus[i]) {
                if (!n)
                    memcpy(s->name, a->cards[k].name, sizeof s->name);
                s->gpus[s->n_gpus++] = gpus[i];
                n += (size_t)snprintf(s->visible + n, sizeof s->visible - n, "%s%s", n ? "," : "",
                                      a->cards[k].uuid);
                break;
            }
}

/* The cards of a plan; where they share the model, the others too: an edit that takes more than the
 * one that is planned with may need the next of them. */
static void add_planned(const asked *a, qie_place *out, const qie_placement *p) {
    if (p->best == QIE_PLACE_SHARDED)
        add_slot(a, out, p->best, p->plan_gpus, p->n_plan_gpus);
    else
        add_slot(a, out, p->best, p->used.gpus, p->used.n_gpus);
}

/* A service: a worker on every card, or on every group of cards, that can hold the model or stream
 * it; where none is named and there is no such card, all of them make one worker. A group that was
 * named gets all of its cards. Cards without room are named. */
static void add_workers(const asked *a, qie_place *out) {
    bool zh = a->o->chinese;
    size_t n = strlen(out->note);
    for (int i = 0, next; i < a->n_cards; i = next) {
        qie_placement_gpu of[QIE_GPUS_MAX];
        int numbers[QIE_GPUS_MAX];
        char names[128] = "";
        qie_placement p;
        for (next = i; next < a->n_cards; next++) {
            if (next > i && (next >= a->n_listed || a->together[next] != a->together[i]))
                break;
            size_t used = strlen(names);
            of[next - i] = a->cards[next].memory;
            numbers[next - i] = of[next - i].index;
            snprintf(names + used, sizeof names - used, "%s%d", used ? "+" : "",
                     a->cards[next].memory.index);
        }
        qie_placement_make(&a->d.model, of, next - i, a->o->headroom, 0, &p);
        if (p.best != QIE_PLACE_NONE)
            add_slot(a, out, p.best, numbers, next - i);
        else if (n + 1 < sizeof out->note)
            n += (size_t)snprintf(
                out->note + n, sizeof out->note - n,
                zh ? "；不使用 GPU %s：扣除预留后 %.1f GiB，至少需要 %.1f GiB"
                   : "; GPU %s is left out: %.1f GiB beside the head-room, %.1f GiB needed",
                names, (double)p.streamed.have / 1073741824.0,
                (double)p.streamed.need / 1073741824.0);
    }
    if (!out->n_slots)
        add_planned(a, out, &a->report.placement);
}

/* ------------------------------------------------------------------ the answer */

/* No card can be used, whatever its memory. */
static qie_status without_cards(asked *a, qie_place *out, qie_error *err) {
    const qie_doctor_check *driver = find_check(a, "driver", QIE_DOCTOR_INFO);
    if (driver && driver->level == QIE_DOCTOR_FAIL)
        return refuse(a, QIE_E_UNAVAILABLE, driver, true, err);
    if (a->d.gpus.n == 0) /* no driver, or no card: the CPU is what there is */
        return demanded(a->o) ? refuse(a, QIE_E_UNAVAILABLE, driver, true, err) : QIE_OK;
    const qie_doctor_check *hidden = find_check(a, "visible", QIE_DOCTOR_WARN);
    if (a->d.n_visible == 0) { /* hidden on purpose */
        if (demanded(a->o))
            return refuse(a, QIE_E_UNAVAILABLE, hidden, true, err);
        out->warned = true;
        snprintf(out->note, sizeof out->note, "%s", hidden ? hidden->text : "");
        return QIE_OK;
    }
    const qie_doctor_check *c = find_check(a, "mig", QIE_DOCTOR_WARN);
    return refuse(a, QIE_E_UNAVAILABLE, c ? c : find_check(a, "gpu", QIE_DOCTOR_WARN), true, err);
}

static qie_status with_cards(asked *a, qie_place *out, qie_error *err) {
    qie_doctor_check_placement(&a->d);
    const qie_placement *p = &a->report.placement;
    const qie_doctor_check *words = find_check(a, "placement", QIE_DOCTOR_OK);
    const qie_doctor_check *plugin = find_check(a, "plugin", QIE_DOCTOR_WARN);
    if (p->best == QIE_PLACE_NONE)
        return refuse(a, p->could_streamed ? QIE_E_NO_MEMORY : QIE_E_TOO_LARGE, words, false, err);
    if (plugin && demanded(a->o))
        return refuse(a, QIE_E_UNAVAILABLE, plugin, true, err);
    if (plugin) {
        out->warned = true;
        snprintf(out->note, sizeof out->note, "%s%s%s", words->text, a->o->chinese ? "；" : "; ",
                 plugin->text);
        return QIE_OK;
    }
    snprintf(out->note, sizeof out->note, "%s", words->text);
    if (a->o->each)
        add_workers(a, out);
    else
        add_planned(a, out, p);
    return QIE_OK;
}

static void look(asked *a) {
    const qie_place_options *o = a->o;
    qie_doctor *d = &a->d;
    a->doctor_options = (qie_doctor_options){.root = o->root,
                                             .model_dir = o->model_dir,
                                             .headroom = o->headroom,
                                             .cuda_visible = o->cuda_visible,
                                             .plugin = o->plugin,
                                             .chinese = o->chinese};
    d->o = &a->doctor_options;
    d->r = &a->report;
    d->zh = o->chinese;
    qie_gpus_probe(QIE_NVML_TIMEOUT_MS, &d->gpus);
    qie_machine_read(o->root, &d->machine);
    if (o->model_dir)
        qie_doctor_model(o->model_dir, &d->model);
    else
        demo_model(&d->model);
    qie_doctor_check_gpus(d);
}

static qie_status choose(asked *a, qie_place *out, qie_error *err) {
    qie_doctor *d = &a->d;
    look(a);
    if (a->o->gpus && d->gpus.n)
        QIE_TRY(restrict_to_list(a, err));
    a->n_cards = qie_doctor_cards(&d->gpus, d->visible, d->n_visible, a->cards);
    QIE_FAIL_IF(a->o->gpus && strchr(a->o->gpus, '+') && a->n_cards != a->n_listed,
                QIE_E_UNAVAILABLE, err, "--gpus",
                "--gpus: the driver does not tell the memory of a card in '%.80s'", a->o->gpus);
    return a->n_cards ? with_cards(a, out, err) : without_cards(a, out, err);
}

qie_status qie_place_choose(const qie_place_options *options, qie_place *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    if (options->device == QIE_DEVICE_CPU || (!options->model_dir && !demanded(options)))
        return QIE_OK;
    asked *a = calloc(1, sizeof *a);
    QIE_FAIL_IF(!a, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    a->o = options;
    a->report.details = qie_json_new_object();
    qie_status st = choose(a, out, err);
    qie_json_free(a->report.details);
    free(a);
    return st;
}

void qie_place_describe(const qie_place_options *options, qie_placement *out, char *words,
                        size_t cap) {
    asked *a = calloc(1, sizeof *a);
    memset(out, 0, sizeof *out);
    words[0] = 0;
    if (!a)
        return;
    a->o = options;
    a->report.details = qie_json_new_object();
    look(a);
    qie_doctor_check_placement(&a->d);
    *out = a->report.placement;
    qie_placement_words(out, options->chinese, words, cap);
    qie_json_free(a->report.details);
    free(a);
}
