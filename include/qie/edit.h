/* Editing pictures by instruction: open a model once, run edits on it.
 *
 * Thread: one call per engine at a time, except qie_engine_cancel, which any thread and a signal
 * handler may call. Strings are UTF-8. Pointers in option structs are borrowed for the call. */
#ifndef QIE_EDIT_H
#define QIE_EDIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qie/error.h"
#include "qie/image.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* "0.1.0" */
const char *qie_version(void);

typedef struct qie_engine qie_engine;

typedef enum qie_precision {
    QIE_PRECISION_AUTO = 0, /* bf16 where the CPU multiplies it natively, else f32 */
    QIE_PRECISION_F32,
    QIE_PRECISION_BF16,
    /* The transformer's large products in 8-bit integers (about twice as fast, see docs/SPEED.md
     * for what it costs); what is sensitive and everything else as with AUTO */
    QIE_PRECISION_INT8
} qie_precision;

/* "auto", "f32", "bf16", "int8"; AUTO for another word. */
qie_precision qie_precision_from_name(const char *name);

#define QIE_MAX_LORAS 8
#define QIE_LORA_NAME 128 /* bytes of a LoRA's name kept, with the NUL */

/* A LoRA to apply: thin matrices added at run time to the layers that the file names. */
typedef struct qie_lora_use {
    const char *path; /* safetensors: diffusers/PEFT, kohya, ComfyUI or plain naming */
    double weight;    /* -100..100; 1: as trained */
    const char *name; /* how results call it; NULL: the file's name without folder and ending */
} qie_lora_use;

typedef struct qie_engine_options {
    const char *model; /* folder in the diffusers layout, or "demo" (embedded) */
    /* Files instead of the folder's weights: safetensors or GGUF, in the naming of diffusers,
     * ComfyUI or llama.cpp. NULL: the folder's. With all three given, `model` may be NULL. */
    const char *transformer, *text_encoder, *mmproj, *vae;
    const char *variant; /* "edit-2511", ...: which model a file is that does not say it; NULL */
    qie_precision precision; /* default AUTO */
    int n_threads;           /* 0: half of the cores */
    const char *backend; /* NULL or "cpu": best kernels of this machine; "ref": plain C; "onednn" */
    int64_t memory_limit_bytes; /* ceiling of the working memory; 0: what the machine has free */
    const char *device;         /* NULL or "cpu"; "cuda": GPUs, through the back end qie_cuda.so */
    const char
        *gpus; /* physical indices or UUIDs with commas between; NULL: all that are visible */
    int64_t gpu_headroom_bytes;     /* left free on every GPU; default 6 GiB */
    int64_t gpu_limit_bytes;        /* most that is taken of a GPU; 0: what is free */
    const char *gpu_offload_folder; /* weights that neither GPUs nor host memory hold are packed
                                       into a file there; NULL: read from the model's files */
    bool collect_importance;   /* note how large the inputs of every layer are; on a CPU only */
    const qie_lora_use *loras; /* in force for edits that name none; n_loras <= QIE_MAX_LORAS */
    size_t n_loras;
} qie_engine_options;
qie_engine_options qie_engine_options_default(void);

/* Map the model's files, check configs and tensors, load the tokenizer. Weights are read on first
 * use. Errors: QIE_E_NOT_FOUND (folder, file), QIE_E_CORRUPT (config, header, tensor: the file is
 * named), QIE_E_UNSUPPORTED (another model). *out is NULL on failure. */
qie_status qie_engine_open(const qie_engine_options *options, qie_engine **out, qie_error *err);
void qie_engine_close(qie_engine *engine);
/* What was noted over all edits so far, with collect_importance: a safetensors file that `quantize`
 * reads. Errors: QIE_E_CONFLICT (not collecting, or no edit ran), QIE_E_IO. */
qie_status qie_engine_save_importance(const qie_engine *engine, const char *path, qie_error *err);

/* What is known of an open model. Strings live as long as the engine. */
typedef struct qie_engine_info {
    const char *model;      /* as given */
    const char *model_name; /* last part of the path, or "demo" */
    bool is_demo;
    const char *about_en, *about_zh; /* from qwen_edit.json; NULL if it says nothing */
    const char *precision;           /* "f32", "bf16" or "int8" */
    const char *activations;         /* "f32" or "bf16": what is kept between products */
    const char *backend;
    const char *placement; /* on GPUs, once an edit was prepared; "" else */
    const char *cpu_level; /* "avx2", "avx512bf16", ... */
    int n_threads;
    int64_t n_parameters, weights_bytes;
    bool zero_cond_t;
    /* defaults in force for this model (qwen_edit.json, else the released ones) */
    int num_inference_steps;
    double true_cfg_scale;
    bool keep_size;
    int max_side;     /* 0: none */
    int64_t ref_area; /* 0: none */
    bool lightning;   /* the LoRAs given at start or the checkpoint are distilled ones */
} qie_engine_info;
void qie_engine_get_info(const qie_engine *engine, qie_engine_info *info);

typedef enum qie_positions { QIE_POSITIONS_3D = 0, QIE_POSITIONS_SEQUENTIAL } qie_positions;
typedef enum qie_schedule {
    QIE_SCHEDULE_AUTO = 0, /* Lightning's if the LoRAs or the checkpoint are, else the model's */
    QIE_SCHEDULE_MODEL,    /* scheduler/scheduler_config.json */
    QIE_SCHEDULE_LIGHTNING /* base_shift = max_shift = ln 3, no terminal shift */
} qie_schedule;
typedef enum qie_noise_mode {
    QIE_NOISE_AUTO = 0, /* f32 when the precision is f32, else bf16 */
    QIE_NOISE_F32,
    QIE_NOISE_BF16 /* f32 draws rounded to bf16, as torch >= 2.10 in a bf16 pipeline */
} qie_noise_mode;

/* Leave out most of a step where its result would hardly change: faster, at some cost of likeness
 * to the full computation (docs/SPEED.md says how much). Nothing is left out with 8 steps or fewer.
 */
typedef enum qie_cache { QIE_CACHE_OFF = 0, QIE_CACHE_BALANCED, QIE_CACHE_FAST } qie_cache;
#define QIE_CACHE_COUNT 3
#define QIE_CACHE_MIN_STEPS 9 /* with fewer, each counts */
/* "off", "balanced", "fast"; "" for another number. */
const char *qie_cache_name(qie_cache cache);
/* OFF for another word. */
qie_cache qie_cache_from_name(const char *name);

/* What is told while an edit runs. */
typedef struct qie_progress {
    const char *stage;     /* "load", "encode_text", "encode_image", "denoise", "decode" */
    int step, total;       /* denoise: finished steps 0..total; other stages: their own units */
    int i_image, n_images; /* with num_images > 1: which one, from 0 */
    double elapsed_s;
    double seconds_left; /* of the whole edit; < 0 while unknown */
    const qie_image
        *preview; /* small picture from the latents when asked for, else NULL; borrowed */
} qie_progress;
typedef void (*qie_progress_fn)(void *arg, const qie_progress *progress);

/* A tensor given from a safetensors file in place of the computed one (for comparing
 * implementations). */
typedef struct qie_injection {
    const char
        *name; /* "noise", "latents", "prompt_embeds", "neg.prompt_embeds", "image_latents" */
    const char *path; /* safetensors file that holds a tensor of that name */
} qie_injection;

typedef struct qie_edit_options {
    const qie_image *const *images; /* 1..16; the last one decides the output's ratio */
    size_t n_images;
    const char *prompt;          /* 1..32,000 characters */
    const char *negative_prompt; /* default " "; NULL or true_cfg_scale <= 1: no CFG */
    uint64_t seed;               /* 0..2^53-1 */
    int num_inference_steps;     /* 1..200; 0: the model's default */
    double true_cfg_scale;       /* 0..20; < 0: the model's default */
    double guidance_scale;       /* accepted and without effect on this model; default 1.0 */
    int max_side;      /* 64..4096; 0: the model's default; -1: none even if the model has one */
    int width, height; /* 0: by the size rule; else >= 16, floored to multiples of 16 */
    int64_t ref_area;  /* pixels of each VAE reference; 0: by the size rule */
    int keep_size;     /* 1: output has the last picture's size; 0: not; -1: the model's default */
    int num_images;    /* 1..10; default 1 */
    const qie_lora_use *loras; /* NULL: those of the engine; not NULL: exactly n_loras of these */
    size_t n_loras;
    qie_schedule schedule;
    qie_cache cache;        /* default OFF */
    double cache_threshold; /* >= 0: instead of the mode's own; default -1. For measuring. */
    qie_positions positions;
    qie_noise_mode noise;
    int preview_max_px; /* > 0: previews of at most this side with each step's progress */
    const qie_injection *injections;
    size_t n_injections;
    qie_progress_fn progress; /* NULL: silent */
    void *progress_arg;
} qie_edit_options;
qie_edit_options qie_edit_options_default(void);

#define QIE_MAX_WARNINGS 8
#define QIE_MAX_IMAGES 16

/* The arithmetic of one edit: nothing is computed but numbers. */
typedef struct qie_edit_plan {
    int width, height;               /* of the generated picture */
    int output_width, output_height; /* of the file: differs with keep-size */
    int n_images;
    struct {
        int width, height;           /* given */
        int cond_width, cond_height; /* for the vision tower, ~384^2 */
        int vae_width, vae_height;   /* reference */
        int n_vision_tokens;         /* in the language model */
        int n_latent_tokens;         /* in the transformer */
    } images[QIE_MAX_IMAGES];
    int n_prompt_tokens, n_negative_tokens; /* rows of conditioning incl. pictures and template */
    int n_target_tokens, n_reference_tokens;
    int num_inference_steps;
    double true_cfg_scale;
    bool cfg;
    bool lightning;  /* its schedule is used */
    qie_cache cache; /* in force: OFF where there are too few steps for it */
    size_t n_loras;  /* in force */
    struct {
        char name[QIE_LORA_NAME];
        double weight;
        int n_modules; /* layers touched */
        int max_rank;
    } loras[QIE_MAX_LORAS];
    bool vae_tiled;
    int64_t working_bytes;   /* anonymous memory at the peak */
    int64_t weights_bytes;   /* mapped files, shared with the page cache */
    int64_t available_bytes; /* free memory that the plan may use */
    double flops;            /* of the whole edit */
    double seconds_estimate; /* from a one-block probe; < 0: not probed */
    char placement[512];     /* on GPUs: where this edit would run, or ran; "" on the CPU */
    int n_warnings;
    char warnings[QIE_MAX_WARNINGS][256];
} qie_edit_plan;

/* Sizes, tokens and memory of an edit. probe: run one transformer block of its size to estimate the
 * time (not on a GPU, which would have to be filled with the weights first). Refuses exactly what
 * qie_engine_edit would refuse before computing. Errors: QIE_E_INVALID (param names the field),
 * QIE_E_TOO_LARGE, QIE_E_NO_MEMORY. */
qie_status qie_engine_plan(qie_engine *engine, const qie_edit_options *options, bool probe,
                           qie_edit_plan *plan, qie_error *err);

typedef struct qie_edit_result {
    qie_image **images; /* n_images pictures; owned by the result */
    size_t n_images;
    uint64_t seed;
    qie_edit_plan plan;
    double encode_s, denoise_s, decode_s, total_s;
    bool retried_f32;          /* non-finite values in the fast precision: computed again in f32 */
    int n_forwards, n_skipped; /* passes through the transformer; of them cut short by the cache */
} qie_edit_result;

/* Run one edit. On success *out is filled (release with qie_edit_result_release); on failure it is
 * empty. Errors: as qie_engine_plan, QIE_E_CANCELLED, QIE_E_CORRUPT, QIE_E_INTERNAL (non-finite
 * values). */
qie_status qie_engine_edit(qie_engine *engine, const qie_edit_options *options,
                           qie_edit_result *out, qie_error *err);
void qie_edit_result_release(qie_edit_result *result);

/* Has the device failed for good (a GPU that was lost, an illegal access)? Then every later edit
 * ends with the same error, and only a new process may do better. Always QIE_OK on the CPU. Errors:
 * QIE_E_UNAVAILABLE, QIE_E_NO_MEMORY, with the runtime's words. */
qie_status qie_engine_check(const qie_engine *engine, qie_error *err);

/* Stop the running edit at the next block; async-signal-safe. Stays set until
 * qie_engine_reset_cancel. */
void qie_engine_cancel(qie_engine *engine);
void qie_engine_reset_cancel(qie_engine *engine);

/* A seed from the system, in 0..2^31-1. */
uint64_t qie_seed_random(void);

/* Parameters of an edit as JSON text for the picture's metadata (new string, free with free()).
 * Holds prompt, negative prompt, seed, sizes, steps, scales, model, precision, program version;
 * never paths or keys. */
char *qie_edit_parameters_json(const qie_engine *engine, const qie_edit_options *options,
                               const qie_edit_result *result, size_t i_image);

/* A model folder or weight file in numbers, as JSON text (new string, free with free()):
 * components, parameter counts, dtypes, sizes; for a file its tensors. Errors as qie_engine_open.
 */
qie_status qie_model_describe(const char *path, char **json_out, qie_error *err);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
