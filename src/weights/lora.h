/* A LoRA file: pairs of thin matrices, grouped by the module that they belong to, as views into the
 * mapped file.
 *
 * Reads the namings of diffusers/PEFT (lora_A, lora_B), kohya (lora_unet_..., lora_down, lora_up,
 * alpha), ComfyUI (diffusion_model.) and plain module names, in safetensors with F32, F16 or BF16
 * matrices. Other kinds of adapters (DoRA, LoKr, LoHa, OFT, full differences) are refused by their
 * names. Nothing is merged and nothing copied: see docs/LORA.md. */
#ifndef QIE_WEIGHTS_LORA_H
#define QIE_WEIGHTS_LORA_H

#include "plan/preset.h"
#include "weights/weights.h"

typedef enum qie_lora_part {
    QIE_LORA_ANY = 0, /* the file does not say */
    QIE_LORA_TRANSFORMER,
    QIE_LORA_TEXT_ENCODER
} qie_lora_part;

typedef struct qie_lora_module {
    const char *key;  /* as in the file, without its last part; owned by the qie_lora */
    const char *name; /* behind the prefix of the naming */
    bool flat;        /* name has '_' where the module's own has '.' */
    qie_lora_part part;
    const qie_tensor *down, *up; /* [rank, k], [n, rank] */
    int64_t rank, n, k;
    double scale;      /* alpha / rank, or what the file's metadata says; 1 without either */
    qie_tensor scaled; /* down times what alpha / rank has besides a power of two: see lora.c */
} qie_lora_module;

typedef struct qie_lora {
    qie_weights *file;
    char *name; /* file name without folder and .safetensors */
    qie_lora_module *modules;
    size_t n_modules;
    int64_t min_rank, max_rank;
    qie_preset preset;
    const char *preset_from; /* "its metadata", "its name", "its shape": static; NULL: no preset */
} qie_lora;

/* Map and read a file. Errors name it and param is "lora": QIE_E_NOT_FOUND, QIE_E_CORRUPT (no sound
 * safetensors file), QIE_E_INVALID (not a LoRA, half a pair, shapes that do not fit together, an
 * adapter of another kind). *out is NULL on failure. */
qie_status qie_lora_open(const char *path, qie_lora **out, qie_error *err);
/* Only its preset, as qie_lora_open finds it; none if it cannot be opened. Of the matrices nothing
 * is read. */
qie_preset qie_lora_preset(const char *path);
/* The same as qie_lora_open from memory, borrowed; for tests. */
qie_status qie_lora_open_bytes(const void *data, size_t n, const char *label, qie_lora **out,
                               qie_error *err);
void qie_lora_close(qie_lora *l);
/* Bytes of memory of its own beside the mapping: copies of matrices, scaled as diffusers does. */
size_t qie_lora_own_bytes(const qie_lora *l);

/* A linear layer that a LoRA may touch. */
typedef struct qie_lora_target {
    const char *name; /* as in the released files: "transformer_blocks.0.attn.to_q" */
    qie_lora_part part;
    int64_t n, k;
} qie_lora_target;

/* Targets, made ready for look-ups; keeps the pointer. */
typedef struct qie_lora_table qie_lora_table;
qie_status qie_lora_table_create(const qie_lora_target *targets, size_t n, qie_lora_table **out,
                                 qie_error *err);
void qie_lora_table_destroy(qie_lora_table *t);

/* Module -> target; a fused to_qkv gives three. */
typedef struct qie_lora_match {
    size_t i_target;
    const qie_lora_module *module;
    int64_t up_row; /* first row of up that belongs to the target */
} qie_lora_match;

/* All modules of l. `zero_cond_t` of the model: a file whose metadata names a base of the other
 * kind is refused. Errors: QIE_E_INVALID with the names that the model does not have or whose
 * shapes differ (all of them in the log, as many as fit in the message). Free *out with free(). */
qie_status qie_lora_match_all(const qie_lora *l, const qie_lora_table *t, bool zero_cond_t,
                              qie_lora_match **out, size_t *n_out, qie_error *err);
/* Base that the file's name or metadata speak of: "2509", "2511", or NULL; *from_metadata tells
 * which. */
const char *qie_lora_base(const qie_lora *l, bool *from_metadata);

#endif
