/* Chooses, for each operation, the best variant of this machine. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "compute/backend.h"
#include "compute/cpu/ref.h"

size_t qie_compute_scratch_bytes(const char *name, int n_threads, const qie_compute_limits *limits) {
    (void)name;
    (void)n_threads;
    (void)limits;
    return 0;
}

qie_status qie_compute_create(const char *name, int n_threads, const qie_compute_limits *limits,
                              qie_compute **out, qie_error *err) {
    *out = NULL;
    (void)limits;
    if (!name)
        name = "cpu";
    QIE_FAIL_IF(strcmp(name, "cpu") && strcmp(name, "ref"), QIE_E_INVALID, err, "backend",
                "back end '%s' is not one of cpu, ref", name);
    qie_compute *c = calloc(1, sizeof *c);
    QIE_FAIL_IF(!c, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    c->name = !strcmp(name, "ref") ? "ref" : "cpu";
    c->level = !strcmp(name, "ref") ? QIE_CPU_REF : qie_cpu_level_get();
    c->n_threads = n_threads < 1 ? 1 : n_threads;
    qie_ref_fill(&c->ops);
    *out = c;
    return QIE_OK;
}

void qie_compute_destroy(qie_compute *c) {
    if (!c)
        return;
    if (c->release_state)
        c->release_state(c->state);
    free(c->scratch);
    free(c);
}
