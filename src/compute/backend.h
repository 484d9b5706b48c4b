/* The operations that the model is written against, as a table of functions.
 *
 * A back end fills the table (plain C first, then the best variant that the machine offers for each
 * entry). Operations run eagerly, in order, and allocate nothing: scratch is reserved when the back
 * end is created.
 *
 * Matrices are row-major with a leading dimension in elements. Activations are F32 or BF16 ("act
 * dtype" of the run); whatever the storage, sums are f32. Residual streams, modulation and the
 * sampler are F32 always. Results do not depend on the number of threads: work is split by output,
 * each output summed in one order. Sizes are the caller's guarantee (asserted in debug builds); no
 * operation can fail on the CPU.
 *
 * A device (a GPU, or several) has memory of its own: there `mem` is set, operations are queued and
 * return before they are done, and a failure is kept until qie_mem_ops.check asks. Data of
 * operations lies in the range that mem->reserve gave; weights, biases, ids and segments are host
 * pointers in every back end, which finds their copies itself. The model reaches all this through
 * model/run.h. */
#ifndef QIE_COMPUTE_BACKEND_H
#define QIE_COMPUTE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/blocks.h"
#include "base/cpu.h"
#include "base/dtype.h"
#include "qie/error.h"

/* Activation matrix [rows, cols]. */
typedef struct qie_mat {
    void *data;
    qie_dtype dtype; /* F32 or BF16 */
    int64_t rows, cols, ld;
} qie_mat;

/* Linear weight [n, k] as in the checkpoint (y = x W^T), a view into a mapped file: any alignment.
 */
typedef struct qie_wmat {
    const void *data;
    qie_dtype dtype; /* F32, BF16, F16, F8_*, I8 or blocks along k */
    int64_t n, k;
    /* Value = stored value x scale, of the row (n_scale == n) or of all (1); NULL: 1. F8_* and I8
     * only. */
    const float *scale;
    int64_t n_scale;
} qie_wmat;

/* Product of two thin matrices added to a linear layer: a LoRA. */
typedef struct qie_lowrank {
    qie_wmat down; /* [rank, k] */
    qie_wmat up;   /* [n, rank] */
    float scale;   /* weight x alpha / rank */
} qie_lowrank;

/* Parameter vector; data NULL: absent. */
typedef struct qie_vec {
    const void *data;
    qie_dtype dtype; /* F32, BF16 or F16 */
    int64_t n;
} qie_vec;

/* Feature map [h, w, c], channels last, dense. */
typedef struct qie_fmap {
    void *data;
    qie_dtype dtype; /* F32 or BF16 */
    int h, w, c;
} qie_fmap;

/* Convolution weight [out, in, kt, kh, kw]; of a causal 3-D one only the last slice along kt is
 * used, which is all that a single frame ever meets (docs/MODEL.md, VAE). 2-D weights have kt = 1.
 */
typedef struct qie_conv_weight {
    const void *data;
    qie_dtype dtype;
    int out, in, kt, kh, kw;
} qie_conv_weight;

typedef enum qie_act {
    QIE_ACT_NONE = 0,
    QIE_ACT_SILU,
    QIE_ACT_GELU_TANH,
    QIE_ACT_GELU_ERF
} qie_act;

typedef enum qie_store {
    QIE_STORE_SET = 0,  /* dst  = y */
    QIE_STORE_MUL,      /* dst *= y */
    QIE_STORE_ADD,      /* dst += y */
    QIE_STORE_GATED_ADD /* dst += gate[column] * y, gate[0] for rows < split, gate[1] from there on
                         */
} qie_store;

enum {
    QIE_INT8_MIN_ROWS = 9,
    QIE_INT8_BLOCK = 1024, /* elements along k that share a scale, see qie_linear_args */
};

typedef struct qie_linear_args {
    qie_mat x;    /* [m, k] */
    qie_wmat w;   /* [n, k] */
    qie_vec bias; /* [n] or absent */
    /* Added to x W^T before act: the sum over these of scale * (x down^T) up^T. */
    const qie_lowrank *lowrank;
    size_t n_lowrank;
    float *lowrank_room; /* m x the sum of their ranks, the caller's: for x down^T */
    qie_act act;         /* applied to x W^T + bias, before store */
    qie_store store;
    const float *gate[2]; /* [n] each; GATED_ADD only */
    int64_t split;
    qie_mat dst; /* [m, n]; must not overlap x */
    /* Multiply in 8-bit integers: x and weights of other types are scaled to -127 .. 127 per row
     * and block of k on the way, I8 weights are taken with their scale. Ignored by a back end
     * without it and below QIE_INT8_MIN_ROWS rows. */
    bool int8;
    /* Without int8: few rows are summed like many, so that a row's bits do not depend on how many
     * there are. */
    bool as_many;
    /* The same for weights that are integers with a scale for QIE_INT8_GROUP of
     * them (qie_blocks_are_int8): they are taken as they are, x is scaled for each group. Goes
     * before int8; ignored for other weights and by a back end without it. */
    bool int8_blocks;
    bool fp8; /* with int8: in 8-bit floats where the weights are that and the device has them; else
                 such weights are multiplied in the activations' type */
} qie_linear_args;

/* How many elements of x share a scale in this product; 0: it is none of integers. */
static inline int qie_linear_int8_group(const qie_linear_args *a) {
    if (a->x.rows < QIE_INT8_MIN_ROWS)
        return 0;
    if (a->int8_blocks && qie_blocks_are_int8(a->w.dtype))
        return QIE_INT8_GROUP;
    return a->int8 ? QIE_INT8_BLOCK : 0;
}

typedef struct qie_layer_norm_args {
    qie_mat x; /* F32 [rows, cols] */
    const float
        *scale[2]; /* y = LN(x) * (1 + scale) + shift; [0] for rows < split, [1] from there on */
    const float *shift[2]; /* all four NULL: plain LN, no parameters */
    int64_t split;
    float eps;
    qie_mat dst;
} qie_layer_norm_args;

typedef struct qie_qk_norm_rope_args {
    qie_mat x; /* [rows, n_heads * head_dim], in place */
    int n_heads, head_dim;
    qie_vec norm; /* [head_dim] RMS weight per head; absent: no norm */
    float eps;
    const float *cos, *sin; /* [rows, head_dim / 2]; NULL: no rotation */
    bool interleaved;       /* pairs (2j, 2j+1), else (j, j + head_dim/2) */
} qie_qk_norm_rope_args;

typedef struct qie_attention_args {
    qie_mat q; /* [nq, n_heads * head_dim] */
    qie_mat
        k; /* [nk, n_kv_heads * head_dim]; query head h uses kv head h / (n_heads / n_kv_heads) */
    qie_mat v;
    int n_heads, n_kv_heads, head_dim;
    float scale;
    bool causal; /* query i sees keys 0 .. i + (nk - nq) */
    /* Row boundaries of independent segments, n_segments + 1 entries; NULL: one. Needs nq == nk,
     * not causal. */
    const int64_t *segments;
    size_t n_segments;
    qie_mat dst; /* [nq, n_heads * head_dim] */
} qie_attention_args;

typedef struct qie_conv2d_args {
    qie_fmap x;        /* [h, w, in] */
    qie_conv_weight w; /* kh == kw, 1 or 3 */
    qie_vec bias;      /* [out] */
    int stride;    /* 1: zero padding k/2 all around; 2: one zero row and column at the bottom and
                      right */
    bool upsample; /* each input pixel doubled in both directions first (stride 1 only) */
    qie_fmap residual; /* added to the result, size of dst; data NULL: none; may be dst itself */
    qie_fmap dst;      /* [ho, wo, out]; must not overlap x */
} qie_conv2d_args;

typedef struct qie_compute qie_compute;

typedef struct qie_ops {
    void (*linear)(qie_compute *c, const qie_linear_args *a);
    /* dst = x * rsqrt(mean(x^2) + eps) * w, per row; dst may be x */
    void (*rms_norm)(qie_compute *c, qie_mat x, qie_vec w, float eps, qie_mat dst);
    void (*layer_norm)(qie_compute *c, const qie_layer_norm_args *a);
    /* linear with GATED_ADD, then layer_norm of its dst (n->x), as one pass over both; n->dst
     * overlaps no operand of the linear layer. NULL: the caller calls one after the other. */
    void (*linear_norm)(qie_compute *c, const qie_linear_args *a, const qie_layer_norm_args *n);
    void (*qk_norm_rope)(qie_compute *c, const qie_qk_norm_rope_args *a);
    void (*attention)(qie_compute *c, const qie_attention_args *a);
    void (*conv2d)(qie_compute *c, const qie_conv2d_args *a);
    /* VAE norm: x / max(||x||2, 1e-12) * sqrt(c) * gamma per pixel, then SiLU if asked; dst may be
     * x */
    void (*channel_norm)(qie_compute *c, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst);
    /* Rows ids[i] of table as dst rows */
    void (*embed)(qie_compute *c, qie_wmat table, const int32_t *ids, qie_mat dst);
    /* Same shape, another dtype or leading dimension */
    void (*convert)(qie_compute *c, qie_mat src, qie_mat dst);
    /* v = m * ||cond||/||m||, m = uncond + scale * (cond - uncond), norms per row; all F32 [rows,
     * cols] */
    void (*cfg_combine)(qie_compute *c, const float *cond, const float *uncond, float scale,
                        int64_t rows, int64_t cols, float *v);
    /* y += a * x, one product and one sum each: the sampler's step */
    void (*axpy)(qie_compute *c, float a, const float *x, float *y, int64_t n);
    /* True if no value is infinite or NaN; waits for the operations before it. */
    bool (*all_finite)(qie_compute *c, const float *v, int64_t n);
    void (*copy)(qie_compute *c, void *dst, const void *src, size_t n_bytes);
} qie_ops;

/* Weights that are needed together: a block, a layer, the VAE. The unit that a device holds, or
 * copies in while the one before computes. */
typedef struct qie_weight_span {
    const void *data; /* in host memory; mostly in a mapped file */
    size_t n_bytes;
} qie_weight_span;
typedef enum qie_group_kind {
    QIE_GROUP_TEXT = 0,   /* vision tower and language model: once per prompt */
    QIE_GROUP_MODULATION, /* of a transformer block: once per edit */
    QIE_GROUP_BLOCK,      /* the rest of it: at every step and pass */
    QIE_GROUP_FIXED,      /* small layers around the blocks, wanted on every device */
    QIE_GROUP_VAE
} qie_group_kind;
typedef struct qie_weight_group {
    qie_group_kind kind;
    int index; /* of the block or layer */
    int id;    /* position in the list given to mem->load */
    size_t n_spans, n_bytes;
    qie_weight_span *spans;
} qie_weight_group;

/* Data on a device. */
typedef struct qie_range {
    void *data;
    size_t n_bytes;
} qie_range;

/* Memory of a device, and on which of several devices the operations run. One address means the
 * same data on all of them: each has the whole range, filled with what it needs. */
typedef struct qie_mem_ops {
    /* Memory for activations, at least n_bytes; valid until the next call. Errors: NO_MEMORY. */
    qie_status (*reserve)(qie_compute *c, size_t n_bytes, void **base, qie_error *err);
    /* Weights of all groups, in order of use: resident or streamed, as the plan says. Host memory
     * must stay as it is until the compute is destroyed. Errors: NO_MEMORY, UNAVAILABLE. */
    qie_status (*load)(qie_compute *c, qie_weight_group *const *groups, size_t n, qie_error *err);
    /* Host data beside the groups that every edit from now on reads again and again (LoRAs): kept
     * on the devices until the next call. *moved: there was no room for it, everything was given up
     * and reserve has to be called again. Failures: see check. */
    void (*adapt)(qie_compute *c, const qie_weight_span *spans, size_t n, bool *moved);
    /* src may be reused at once; reaches all devices */
    void (*upload)(qie_compute *c, void *dst, const void *src, size_t n_bytes);
    /* Waits for all operations before it; dst is undefined after a failure (see check). */
    void (*download)(qie_compute *c, void *dst, const void *src, size_t n_bytes);
    void (*zero)(qie_compute *c, void *dst, size_t n_bytes);
    /* ops.convert on all devices, each with its own data */
    void (*convert)(qie_compute *c, qie_mat src, qie_mat dst);
    /* What the current device computed here is read on the others from now on. */
    void (*share)(qie_compute *c, const void *data, size_t n_bytes);
    /* Following operations use this group. live: what earlier ones computed and later ones read,
     * besides what was shared. next: the group that probably follows, or NULL. */
    void (*begin_group)(qie_compute *c, const qie_weight_group *group, const qie_range *live,
                        size_t n_live, const qie_weight_group *next);
    /* Operations of this group run where the current ones do: what those leave need not be live. */
    bool (*stays)(qie_compute *c, const qie_weight_group *group);
    /* Between these two lies one guidance pass, possibly on devices of its own, while another pass
     * runs elsewhere. in: what it reads; out: what it leaves on the first device. */
    void (*begin_pass)(qie_compute *c, int i_pass, qie_range in);
    void (*end_pass)(qie_compute *c, int i_pass, qie_range out);
    /* Operations that come again and again with the same arguments, which begin with this group
     * (as begin_group): key 0 or 1 says which. True: all of them were queued from a recording, and
     * are not to be called. False: call them, then repeat_end; they may only be noted until then,
     * so nothing between the two may wait for a device. */
    bool (*repeat_begin)(qie_compute *c, int key, const qie_weight_group *first,
                         const qie_range *live, size_t n_live);
    /* False: they were not queued after all, begin again. keep false: not all of them were called.
     */
    bool (*repeat_end)(qie_compute *c, bool keep);
    /* The arguments will be others. */
    void (*repeat_forget)(qie_compute *c);
    /* The first failure since the compute was created, if any; never forgotten when a device is
     * lost. Does not wait. */
    qie_status (*check)(qie_compute *c, qie_error *err);
    /* Most that reserve could give, with as much streamed as can be. At least 1. */
    int64_t (*room)(qie_compute *c);
    /* How it is placed, for people; lives as long as the compute. */
    const char *(*describe)(qie_compute *c);
    /* How it would be with so many bytes reserved, from what is free now; nothing is done. Errors:
     * NO_MEMORY. */
    qie_status (*plan)(qie_compute *c, size_t n_bytes, char *out, size_t cap, qie_error *err);
} qie_mem_ops;

/* Largest extents that a run will ask for: scratch is reserved from them, once. */
typedef struct qie_compute_limits {
    int64_t max_k;      /* inner dimension of any linear */
    int64_t max_n;      /* outer dimension of any linear */
    int64_t max_conv_k; /* in * kh * kw of any convolution */
    int64_t max_conv_n; /* out of any convolution */
    int max_head_dim;
    int64_t max_int8_k; /* inner dimension of any linear in integers; 0: none will be */
} qie_compute_limits;

struct qie_compute {
    qie_ops ops;
    const qie_mem_ops *mem; /* NULL: operations work on host memory, at once */
    const char *name;       /* "cpu", "ref", "onednn" */
    qie_cpu_level level;
    int n_threads;
    bool bf16_native; /* bf16 products in hardware */
    /* With linear's as_many, no row's bits depend on the rows that are computed beside it. */
    bool rows_alone;
    bool int8_blocks;       /* products of weights in blocks of integers are faster than in bf16 */
    unsigned char *scratch; /* 64-byte aligned; divided by the operations as they like */
    size_t scratch_bytes;
    struct qie_op_record *record; /* NULL but while calls are noted, see op_record.h */
    struct qie_op_inputs *inputs; /* NULL but while inputs are summed, see op_inputs.h */
    void *state;                  /* of the back end (primitive caches); freed by release_state */
    void (*release_state)(void *state);
};

/* Back end by name: NULL or "cpu" = best variants at qie_cpu_level_get(), "ref" = plain C, "onednn"
 * = oneDNN for linear and conv2d, plain C otherwise. Errors: QIE_E_INVALID (name), QIE_E_NO_MEMORY.
 */
qie_status qie_compute_create(const char *name, int n_threads, const qie_compute_limits *limits,
                              qie_compute **out, qie_error *err);
void qie_compute_destroy(qie_compute *c);
/* Bytes of scratch that qie_compute_create will reserve: for planning. */
size_t qie_compute_scratch_bytes(const char *name, int n_threads, const qie_compute_limits *limits);

/* Views. */
static inline qie_mat qie_mat_make(void *data, qie_dtype dtype, int64_t rows, int64_t cols) {
    qie_mat m = {data, dtype, rows, cols, cols};
    return m;
}
/* Rows [from, from + n) of m. */
static inline qie_mat qie_mat_rows(qie_mat m, int64_t from, int64_t n) {
    m.data = (unsigned char *)m.data + (size_t)(from * m.ld) * qie_dtype_size(m.dtype);
    m.rows = n;
    return m;
}
static inline qie_mat qie_fmap_as_mat(qie_fmap f) {
    return qie_mat_make(f.data, f.dtype, (int64_t)f.h * f.w, f.c);
}

#endif
