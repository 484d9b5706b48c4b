/* Where a model can run: what `doctor` shows and what `edit` and `serve` refuse by, in the same
 * words. The cards' part is plan/assign.h, which the GPU back end obeys: same groups of weights,
 * same work, same offers, so that what is told beforehand is what is done.
 *
 * A card offers what is free on it less the head-room. Needs, in bytes: resident  all weights +
 * work
 * + runtime, on one card; streamed  a ring for the largest layer + what is always held + work +
 * runtime, on one card, weights in host memory; sharded, parallel  as assigned; cpu  work in host
 * memory; with room for the weights too they are read once, else again at every step */
#ifndef QIE_PLAN_PLACEMENT_H
#define QIE_PLAN_PLACEMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "plan/assign.h"
#include "plan/config.h"
#include "plan/tensors.h"

#define QIE_PLACEMENT_GPUS_MAX 32
#define QIE_DEFAULT_HEADROOM_GIB 6.0
#define QIE_PLACEMENT_GROUPS_MAX 512

typedef struct qie_placement_model {
    int64_t transformer, text_encoder, vae; /* bytes of weights */
    int64_t work; /* on every GPU: one edit of 1 megapixel or of the model's own default size, one
                     reference, bf16, and workspace */
    int64_t work_cpu; /* the same edit in host memory, in the precision of this CPU */
    size_t n_groups;  /* as the engine divides the weights, in its order */
    qie_assign_group groups[QIE_PLACEMENT_GROUPS_MAX];
} qie_placement_model;

/* The released model in bf16. */
void qie_placement_released(qie_placement_model *out);
/* A model of which only the sizes of its parts are known: the released one in proportion. */
void qie_placement_scaled(int64_t transformer, int64_t text_encoder, int64_t vae,
                          qie_placement_model *out);
/* Bytes of a tensor of a part (0 transformer, 1 text encoder, 2 VAE) with what belongs to it; -1:
 * not known. */
typedef int64_t (*qie_tensor_bytes_fn)(void *arg, int part, const qie_tensor_spec *spec);
/* The model that these configs describe. parts: bytes of weights on disk. bytes (may be NULL): what
 * the files say of each tensor; where that is not known, its share of its part. act_cpu: dtype of
 * activations on this CPU. Numbers that cannot be planned are the released ones. */
void qie_placement_of(const qie_model_config *c, const int64_t parts[3], qie_tensor_bytes_fn bytes,
                      void *arg, qie_dtype act_cpu, qie_placement_model *out);

typedef struct qie_placement_gpu {
    int index; /* physical */
    int64_t total, free;
} qie_placement_gpu;

typedef struct qie_placement_verdict {
    bool fits;
    int64_t need, have;               /* on the best card, or on all together for sharded */
    int n_gpus;                       /* that would be used */
    int gpus[QIE_PLACEMENT_GPUS_MAX]; /* physical indices */
} qie_placement_verdict;

typedef enum qie_placement_kind {
    QIE_PLACE_RESIDENT = 0,
    QIE_PLACE_SHARDED,
    QIE_PLACE_STREAMED,
    QIE_PLACE_PARALLEL, /* a whole model for each of the two guidance passes */
    QIE_PLACE_CPU,
    QIE_PLACE_NONE
} qie_placement_kind;

typedef struct qie_placement {
    int64_t headroom, weights;
    /* used: what would be done on GPUs, its n_gpus 0 when nothing can be; the others: what each way
     * would take. */
    qie_placement_verdict used, resident, sharded, streamed, cpu;
    qie_assign_result plan;
    int plan_gpus[QIE_ASSIGN_CARDS_MAX]; /* physical indices of its cards, used or not */
    int n_plan_gpus;
    bool cpu_from_disk; /* cpu fits, but the weights are read from disk again and again */
    bool could_resident, could_streamed; /* would fit on an empty card */
    qie_placement_kind best;
    int n_gpus;
    int best_gpu; /* physical index of the card with the most to offer; -1 */
    int64_t best_gpu_total, best_gpu_free;
} qie_placement;

/* host_free: memory that may be taken. Negative free or total of a card counts as nothing. */
void qie_placement_make(const qie_placement_model *m, const qie_placement_gpu *gpus, int n,
                        int64_t headroom, int64_t host_free, qie_placement *out);

/* One sentence: where it runs, or why on no GPU and what to do; chinese: in Chinese. */
void qie_placement_words(const qie_placement *p, bool chinese, char *out, size_t cap);
/* "resident", "sharded", "streamed", "parallel", "cpu", "none" */
const char *qie_placement_name(qie_placement_kind kind);

#endif
