/* Where a model can run: the arithmetic that `doctor` shows and that `edit` and `serve` refuse by,
 * in the same words.
 *
 * A card offers what is free on it less the head-room. Needs, in bytes (numbers of the constants:
 * placement.c): resident  all weights + work + runtime, on one card streamed  three blocks in
 * flight + VAE + work + runtime on one card; weights in host memory sharded   every card work +
 * runtime, and together room for all weights in whole blocks cpu       work in host memory; with
 * room for the weights too they are read once, else again at every step */
#ifndef QIE_PLAN_PLACEMENT_H
#define QIE_PLAN_PLACEMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "plan/config.h"

#define QIE_PLACEMENT_GPUS_MAX 32
#define QIE_DEFAULT_HEADROOM_GIB 6.0

typedef struct qie_placement_model {
    int64_t transformer, text_encoder, vae; /* bytes of weights */
    int64_t block;                          /* of the largest transformer block or language layer */
    int64_t work;     /* of one edit on a GPU: 1 megapixel, one reference, bf16 */
    int64_t work_cpu; /* the same in host memory, in the precision of this CPU */
} qie_placement_model;

/* The released model in bf16. */
qie_placement_model qie_placement_released(void);
/* The model that these configs describe, with so many bytes of weights on disk: blocks as they are,
 * and the work that the engine itself plans for one megapixel, one reference and guidance.
 * act_cpu: dtype of activations on this CPU. Numbers that cannot be planned stay the released
 * ones. */
qie_placement_model qie_placement_of(const qie_model_config *c, int64_t transformer,
                                     int64_t text_encoder, int64_t vae, qie_dtype act_cpu);

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
    QIE_PLACE_CPU,
    QIE_PLACE_NONE
} qie_placement_kind;

typedef struct qie_placement {
    int64_t headroom, weights;
    qie_placement_verdict resident, sharded, streamed, cpu;
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
/* "resident", "sharded", "streamed", "cpu", "none" */
const char *qie_placement_name(qie_placement_kind kind);

#endif
