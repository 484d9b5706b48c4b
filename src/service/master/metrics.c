#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>

#include "base/strbuf.h"
#include "service/master/master.h"

/* From a demo step to a released model on a CPU. */
static const double BOUNDS[SVC_BUCKETS] = {0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800};

void svc_histogram_add(svc_histogram *h, double seconds) {
    int i = 0;
    if (!isfinite(seconds)) /* said by a worker */
        return;
    while (i < SVC_BUCKETS && seconds > BOUNDS[i])
        i++;
    h->counts[i]++;
    h->sum += seconds;
}

static void put_head(qie_strbuf *b, const char *name, const char *type, const char *help) {
    qie_strbuf_printf(b, "# HELP qwen_edit_%s %s\n# TYPE qwen_edit_%s %s\n", name, help, name,
                      type);
}

/* label: "stage=\"denoise\"", or "" */
static void put_histogram(qie_strbuf *b, const char *name, const char *label,
                          const svc_histogram *h) {
    const char *comma = *label ? "," : "", *open = *label ? "{" : "", *close = *label ? "}" : "";
    long long n = 0;
    for (int i = 0; i < SVC_BUCKETS; i++) {
        n += h->counts[i];
        qie_strbuf_printf(b, "qwen_edit_%s_bucket{%s%sle=\"%g\"} %lld\n", name, label, comma,
                          BOUNDS[i], n);
    }
    n += h->counts[SVC_BUCKETS];
    qie_strbuf_printf(b, "qwen_edit_%s_bucket{%s%sle=\"+Inf\"} %lld\n", name, label, comma, n);
    qie_strbuf_printf(b, "qwen_edit_%s_sum%s%s%s %.6f\nqwen_edit_%s_count%s%s%s %lld\n", name, open,
                      label, close, h->sum, name, open, label, close, n);
}

static void put_requests(const svc_master *m, qie_strbuf *b) {
    put_head(b, "requests_total", "counter", "answers by route and status");
    for (int i = 0; i < m->n_counts; i++)
        qie_strbuf_printf(b, "qwen_edit_requests_total{route=\"%s\",code=\"%d\"} %lld\n",
                          m->counts[i].route, m->counts[i].code, (long long)m->counts[i].n);
}

static void put_jobs(const svc_master *m, qie_strbuf *b) {
    static const char *const stages[] = {"encode", "denoise", "decode", "total"};
    char label[32];
    put_head(b, "jobs_total", "counter", "jobs that have ended since the start, by their end");
    for (int i = SVC_COMPLETED; i <= SVC_CANCELLED; i++)
        qie_strbuf_printf(b, "qwen_edit_jobs_total{status=\"%s\"} %lld\n",
                          svc_status_name((svc_status)i), (long long)m->n_ended[i]);
    put_head(b, "queue_depth", "gauge", "jobs that wait");
    qie_strbuf_printf(b, "qwen_edit_queue_depth %d\n", m->n_queued);
    put_head(b, "queue_wait_seconds", "histogram", "from acceptance to start");
    put_histogram(b, "queue_wait_seconds", "", &m->wait_s);
    put_head(b, "job_duration_seconds", "histogram", "time on the worker, by stage");
    for (int i = 0; i < 4; i++) {
        snprintf(label, sizeof label, "stage=\"%s\"", stages[i]);
        put_histogram(b, "job_duration_seconds", label, &m->stage_s[i]);
    }
    put_head(b, "denoise_step_seconds", "histogram", "mean time of a step, an observation a job");
    put_histogram(b, "denoise_step_seconds", "", &m->step_s);
}

static void put_workers(const svc_master *m, qie_strbuf *b) {
    static const char *const reasons[] = {"died", "hung", "garbage", "refused"};
    put_head(b, "worker_up", "gauge", "1 when the worker takes jobs; gpu_id -1 is the CPU");
    for (int i = 0; i < m->n_workers; i++) {
        const svc_worker *w = &m->workers[i];
        qie_strbuf_printf(b, "qwen_edit_worker_up{gpu_id=\"%d\",worker=\"%d\"} %d\n", w->gpu_id, i,
                          w->state == SVC_W_READY || w->state == SVC_W_BUSY);
    }
    put_head(b, "worker_restarts_total", "counter", "workers lost, by the reason");
    for (int i = 0; i < m->n_workers; i++)
        for (int k = 0; k < 4; k++)
            qie_strbuf_printf(
                b,
                "qwen_edit_worker_restarts_total{gpu_id=\"%d\",worker=\"%d\",reason=\"%s\"} %lld\n",
                m->workers[i].gpu_id, i, reasons[k], (long long)m->death_reasons[i][k]);
    put_head(b, "gpu_memory_bytes", "gauge",
             "memory of a worker's device: used by the worker, free on the device (gpu_id -1: the "
             "machine)");
    for (int i = 0; i < m->n_workers; i++) {
        const svc_worker *w = &m->workers[i];
        const char *const kinds[] = {"used", "free"};
        const int64_t values[] = {w->memory_used, w->memory_free};
        for (int k = 0; k < 2; k++)
            qie_strbuf_printf(
                b, "qwen_edit_gpu_memory_bytes{gpu_id=\"%d\",worker=\"%d\",kind=\"%s\"} %lld\n",
                w->gpu_id, i, kinds[k], (long long)values[k]);
    }
}

void svc_metrics(svc_master *m, svc_call *call) {
    qie_strbuf b;
    qie_strbuf_init(&b, 1 << 20);
    put_requests(m, &b);
    put_jobs(m, &b);
    put_workers(m, &b);
    put_head(&b, "connections", "gauge", "open connections");
    qie_strbuf_printf(&b, "qwen_edit_connections %d\n", svc_http_connections(m->http));
    put_head(&b, "build_info", "gauge", "1");
    qie_strbuf_printf(&b, "qwen_edit_build_info{version=\"%s\"} 1\n", m->o.version);
    svc_call_reply(call, 200, "text/plain; version=0.0.4; charset=utf-8", b.data ? b.data : "",
                   b.len, false);
    qie_strbuf_release(&b);
}
