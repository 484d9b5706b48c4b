/* Working memory and arithmetic of one edit, from its sizes alone: what the engine will allocate,
 * to the byte that its arena rounds to. Weights are not in it: they are mapped files. */
#ifndef QIE_PLAN_MEMORY_H
#define QIE_PLAN_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"
#include "plan/sizes.h"

typedef struct qie_memory_request {
    const qie_model_config *model;
    const qie_size_plan *sizes;
    qie_dtype act;     /* dtype of activations */
    int n_passes;      /* 1, or 2 with CFG */
    int64_t n_ids[2];  /* tokens of the language model for each pass */
    int64_t n_text[2]; /* rows of conditioning: n_ids less the template's prefix */
    int64_t parts[2];  /* of the tokens, those before the first picture and from there to the end
                          of the last: the same in both passes, computed once */
    int64_t n_drop;    /* tokens at the start that are not asked for */
    int n_steps;
    bool step_cache;     /* residuals of the target rows are kept, see model/step_cache.h */
    int n_outputs;       /* pictures made from one set of inputs */
    int64_t lora_rank;   /* largest sum of ranks of LoRAs at one layer; 0: none */
    double lora_flops;   /* of one row through all of them */
    int preview_px;      /* longest side of previews, 0: none */
    int64_t limit_bytes; /* tile the VAE when a whole picture would exceed this; 0: never */
} qie_memory_request;

typedef struct qie_memory_plan {
    int64_t persistent;                            /* kept over all stages */
    int64_t text, vae_encode, denoise, vae_decode; /* peaks of the stages, without `persistent` */
    int64_t total;                                 /* persistent + the largest stage */
    bool vae_tiled;
    double flops_text, flops_vae_encode, flops_step, flops_vae_decode; /* flops_step: all passes */
} qie_memory_plan;

/* Keys and values of tokens [from, from + n) in all layers, and the rows of them that are asked
 * for.
 */
double qie_memory_part_bytes(const qie_memory_request *r, int64_t from, int64_t n);
/* Rows that any linear layer of this edit has at most: LoRAs need lora_rank floats for each. */
int64_t qie_memory_lora_rows(const qie_memory_request *r);
/* False if any number overflows 63 bits or the plan exceeds 2^46 bytes. */
bool qie_memory_plan_make(const qie_memory_request *r, qie_memory_plan *out);

/* Memory that this process may still take without swapping: MemAvailable, cut by the container's
 * limit. */
int64_t qie_memory_available(void);
/* Memory of the machine or container in all. */
int64_t qie_memory_total(void);

/* Elements of the largest map of the VAE's encoder or decoder for a picture of ph x pw pixels. */
double qie_vae_largest_map(const qie_vae_config *c, int ph, int pw);
/* Tiles of diffusers' enable_tiling: side and step in pixels. */
#define QIE_VAE_TILE_PX 256
#define QIE_VAE_STRIDE_PX 192

/* Steps whose modulation the transformer keeps at once (also used by model/transformer.c). */
#define QIE_PLAN_MODULATION_STEPS 48
/* Values that the step cache sums in one piece. */
#define QIE_PLAN_CACHE_CHUNK 65536
/* Room for the transformer's own bookkeeping of one edit. */
#define QIE_PLAN_DENOISER_BYTES 768

#endif
