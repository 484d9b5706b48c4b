/* The LoRAs of an open model: files mapped once and kept, switched by changing pointers.
 *
 * A selection is in force until the next one. Files are kept under their path, size and time of
 * change, the last QIE_ADAPTERS_KEPT of them and no more than hold QIE_ADAPTERS_OWN_BYTES of memory
 * of their own: selecting a kept one touches no file but for a stat. */
#ifndef QIE_MODEL_ADAPTERS_H
#define QIE_MODEL_ADAPTERS_H

#include "model/run.h"
#include "plan/preset.h"
#include "qie/edit.h"
#include "weights/lora.h"

#define QIE_ADAPTERS_KEPT 8
/* Those of a selection stay whatever they hold. Mappings do not count: they are page cache. */
#define QIE_ADAPTERS_OWN_BYTES ((size_t)1 << 30)

typedef struct qie_adapters qie_adapters;

/* Told of every linear layer that a LoRA may touch. */
typedef void (*qie_linear_fn)(void *arg, const char *name, qie_linear *l);

/* What is in force, for the plan and for people. */
typedef struct qie_adapters_active {
    size_t n;
    struct {
        char name[QIE_LORA_NAME];
        double weight;
        uint64_t id; /* of the opened file, unique in these adapters */
        int n_modules;
        int64_t max_rank;
    } loras[QIE_MAX_LORAS];
    int64_t rank; /* largest sum of ranks at one layer */
    double flops; /* of one row through every pair of the transformer */
    qie_preset preset;
    char preset_from[QIE_LORA_NAME + 64]; /* "LoRA 'X' by its name": "" without preset */
} qie_adapters_active;

/* Ask for all layers: `each` is called with a callback; pointers must stay valid. */
qie_status qie_adapters_create(void (*each)(void *model, qie_linear_fn fn, void *arg), void *model,
                               bool zero_cond_t, qie_adapters **out, qie_error *err);
void qie_adapters_destroy(qie_adapters *a);
/* Put these in force, in this order; n == 0: none. On failure nothing is in force. Errors: as
 * qie_lora_open and qie_lora_match_all; QIE_E_INVALID (too many, weight not within -100..100). */
qie_status qie_adapters_select(qie_adapters *a, const qie_lora_use *uses, size_t n, qie_error *err);
const qie_adapters_active *qie_adapters_get(const qie_adapters *a);
/* The matrices of all pairs in force, in host memory, some perhaps twice: at most cap of them into
 * out. Returns how many there are. */
size_t qie_adapters_spans(const qie_adapters *a, qie_weight_span *out, size_t cap);

#endif
