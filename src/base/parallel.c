#define _GNU_SOURCE
#include "base/parallel.h"

#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/trace.h"

#ifdef _OPENMP
#include <omp.h>
#endif

void qie_parallel_for(int n_threads, size_t n, qie_parallel_fn fn, void *arg) {
#ifdef _OPENMP
    if (n_threads > 1 && n > 1 && !omp_in_parallel()) {
        int team = (size_t)n_threads < n ? n_threads : (int)n;
        const bool tracing = qie_trace_on();
#pragma omp parallel num_threads(team)
        {
            const double from = tracing ? qie_now_s() : 0;
#pragma omp for schedule(dynamic, 1) nowait
            for (size_t i = 0; i < n; i++)
                fn(arg, i, omp_get_thread_num());
            if (tracing)
                qie_trace_span("thread", from, "work");
        }
        return;
    }
#endif
    (void)n_threads;
    for (size_t i = 0; i < n; i++)
        fn(arg, i, 0);
}

/* Cores granted by the cgroup's quota (v2, then v1); 0 if there is none. */
static int quota_cpus(void) {
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    double quota = 0, period = 0;
    if (f) {
        if (fscanf(f, "%lf %lf", &quota, &period) != 2)
            quota = 0;
        fclose(f);
    } else if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "re"))) {
        if (fscanf(f, "%lf", &quota) != 1)
            quota = 0;
        fclose(f);
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "re"))) {
            if (fscanf(f, "%lf", &period) != 1)
                period = 0;
            fclose(f);
        }
    }
    if (quota <= 0 || period <= 0)
        return 0;
    double n = quota / period;
    return n < 1 ? 1 : (int)n;
}

int qie_cpu_count(void) {
    cpu_set_t set;
    int n = 0;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        n = CPU_COUNT(&set);
    if (n < 1)
        n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    int q = quota_cpus();
    if (q && q < n)
        n = q;
    return n < 1 ? 1 : n;
}
