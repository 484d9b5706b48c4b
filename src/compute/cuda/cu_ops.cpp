/* The operations on the cards: products through the libraries, the rest in our own kernels. */
#include <stdio.h>
#include <string.h>

#include "compute/cuda/cu_kernels.hpp"
#include "compute/cuda/cu_state.hpp"

static qie_mat here(const cu_backend *b, qie_mat m) {
    m.data = cu_here(b, b->current, m.data);
    return m;
}
static qie_fmap here_map(const cu_backend *b, qie_fmap f) {
    f.data = cu_here(b, b->current, f.data);
    return f;
}
static const float *here_f32(const cu_backend *b, const float *p) {
    return (const float *)cu_here(b, b->current, p);
}
static qie_vec vec_here(cu_backend *b, qie_vec v) {
    v.data = v.data ? cu_weight_at(b, v.data, (size_t)v.n * qie_dtype_size(v.dtype)) : NULL;
    return v;
}
static size_t wmat_bytes(const qie_wmat *w) {
    return (size_t)w->n * qie_dtype_row_bytes(w->dtype, w->k);
}

/* A weight as this card can read it: its place in a group, or copied to `spill`. */
static bool wmat_here(cu_backend *b, qie_wmat *w, unsigned char *spill, size_t spill_bytes) {
    if (w->scale)
        w->scale = (const float *)cu_weight_at(b, w->scale, sizeof(float) * (size_t)w->n_scale);
    const void *host = w->data;
    size_t n = wmat_bytes(w);
    w->data = cu_held(b, host, n);
    if (w->data || b->failed)
        return w->data != NULL;
    if (n > spill_bytes) {
        cu_good(b, b->current, cu_fail(CU_FAILED, "a weight outside the model is too large"));
        return false;
    }
    cu_send(b, b->current, b->cards[b->current].compute, spill, host, n);
    w->data = spill;
    return !b->failed;
}

static bool gemm(cu_backend *b, const qie_cu_gemm_args *a) {
    cu_card *d = &b->cards[b->current];
    if (qie_cu_gemm(d->libs, d->compute, a))
        return true;
    char text[128];
    snprintf(text, sizeof text, "no matrix product of %lld x %lld x %lld (%s)", (long long)a->m,
             (long long)a->n, (long long)a->k, qie_dtype_name(a->type));
    return cu_good(b, b->current, cu_fail(CU_FAILED, text));
}

/* Rows [n0, n0 + n) of a weight as an operand of type `type`: in place, or converted to `panel`. */
static const void *operand(cu_backend *b, const qie_wmat *w, int64_t n0, int64_t n, qie_dtype type,
                           void *panel) {
    const unsigned char *p = (const unsigned char *)w->data;
    if (w->dtype == type && !w->scale) {
        p += (size_t)(n0 * w->k) * qie_dtype_size(type);
        if ((uintptr_t)p % 16 == 0)
            return p;
    }
    cu_k_dequantize(b->cards[b->current].compute, *w, n0, n, panel, type);
    return panel;
}

/* One piece of a linear layer: rows of x against rows [n0, n0 + n) of the weight. */
typedef struct piece {
    cu_backend *b;
    cu_card *d;
    const qie_linear_args *a;        /* with the addresses of this card */
    const qie_layer_norm_args *norm; /* of dst afterwards, or NULL */
    qie_dtype type;
    bool plain; /* the product is the result: written where it goes */
    int64_t r0, m, n0, n;
    const void *w;
} piece;

static void *offset(const void *p, int64_t elements, qie_dtype type) {
    return (unsigned char *)(uintptr_t)p + elements * (int64_t)qie_dtype_size(type);
}

/* y += scale (x down^T) up^T */
static bool add_lowrank(const piece *p, const qie_lowrank *l, void *y, int64_t ldy) {
    cu_backend *b = p->b;
    size_t size = qie_dtype_size(p->type), third = b->low_bytes / 4 / CU_ALIGN * CU_ALIGN;
    unsigned char *raw = p->d->low, *op = raw + third, *t = op + third;
    int64_t rank = l->down.n;
    qie_wmat down = l->down, up = l->up;
    if ((size_t)(rank * down.k) * size > third || (size_t)(p->n * rank) * size > third ||
        (size_t)(p->m * rank) * size > 2 * third)
        return cu_good(b, b->current, cu_fail(CU_FAILED, "the rank of a LoRA is too large"));
    if (!wmat_here(b, &down, raw, third))
        return false;
    const void *w = operand(b, &down, 0, rank, p->type, op);
    qie_cu_gemm_args g = {p->m,       rank,
                          down.k,     offset(p->a->x.data, p->r0 * p->a->x.ld, p->type),
                          w,          t,
                          p->a->x.ld, down.k,
                          rank,       p->type,
                          p->type,    1,
                          0,          QIE_CU_EPI_NONE,
                          NULL,       p->d->libs_space,
                          NULL,       NULL};
    if (!gemm(b, &g) || !wmat_here(b, &up, raw, third))
        return false;
    g.n = p->n;
    g.k = rank;
    g.x = t;
    g.ldx = rank;
    g.w = operand(b, &up, p->n0, p->n, p->type, op);
    g.ldw = rank;
    g.y = y;
    g.ldy = ldy;
    g.alpha = l->scale;
    g.beta = 1;
    return gemm(b, &g);
}

/* Where a piece goes, and its part of the bias. */
static void *place_of(const piece *p) {
    return offset(p->a->dst.data, p->r0 * p->a->dst.ld + p->n0, p->a->dst.dtype);
}
static const void *bias_of(const piece *p) {
    return p->a->bias.data ? offset(p->a->bias.data, p->n0, p->a->bias.dtype) : NULL;
}

/* Bias, activation, gate and sum on a product, to where it goes. */
static void store_piece(const piece *p, const void *y, qie_dtype y_type, const float *row_scale,
                        const float *col_scale, int64_t n_col_scale) {
    const qie_linear_args *a = p->a;
    qie_mat dst = a->dst;
    dst.data = place_of(p);
    dst.rows = p->m;
    dst.cols = p->n;
    cu_epilogue_args e;
    memset(&e, 0, sizeof e);
    e.y = y;
    e.y_type = y_type;
    e.m = p->m;
    e.n = p->n;
    e.bias = a->bias;
    e.bias.data = bias_of(p);
    e.act = a->act;
    e.store = a->store;
    for (int i = 0; i < 2; i++)
        e.gate[i] = a->gate[i] ? a->gate[i] + p->n0 : NULL;
    e.split = a->split - p->r0;
    e.dst = dst;
    e.row_scale = row_scale;
    e.col_scale = col_scale;
    e.n_col_scale = n_col_scale;
    if (!p->norm || p->n < a->w.n) {
        cu_k_epilogue(p->d->compute, &e);
        return;
    }
    qie_layer_norm_args rows = *p->norm;
    rows.x = dst;
    rows.dst = qie_mat_rows(rows.dst, p->r0, p->m);
    rows.split -= p->r0;
    cu_k_layer_norm(p->d->compute, &rows, &e);
}

/* What the library does to a plain piece. */
static qie_cu_epilogue epilogue_of(const piece *p) {
    bool bias = p->a->bias.data != NULL;
    if (p->a->act == QIE_ACT_GELU_TANH)
        return bias ? QIE_CU_EPI_BIAS_GELU_TANH : QIE_CU_EPI_GELU_TANH;
    return bias ? QIE_CU_EPI_BIAS : QIE_CU_EPI_NONE;
}

static bool run_piece(const piece *p) {
    const qie_linear_args *a = p->a;
    cu_backend *b = p->b;
    void *y = p->plain ? place_of(p) : p->d->product;
    int64_t ldy = p->plain ? a->dst.ld : p->n;
    qie_cu_gemm_args g = {p->m,
                          p->n,
                          a->w.k,
                          offset(a->x.data, p->r0 * a->x.ld, p->type),
                          p->w,
                          y,
                          a->x.ld,
                          a->w.k,
                          ldy,
                          p->type,
                          p->type,
                          1,
                          0,
                          p->plain ? epilogue_of(p) : QIE_CU_EPI_NONE,
                          p->plain ? bias_of(p) : NULL,
                          p->d->libs_space,
                          NULL,
                          NULL};
    if (!gemm(b, &g))
        return false;
    for (size_t i = 0; i < a->n_lowrank; i++)
        if (!add_lowrank(p, &a->lowrank[i], y, ldy))
            return false;
    if (p->plain)
        return true;
    store_piece(p, y, p->type, NULL, NULL, 0);
    return true;
}

/* An operation in 8 bits: where its pieces lie. */
typedef struct bytes_job {
    qie_dtype type;  /* F8_E4M3 or I8 */
    bool fp8, whole; /* whole: the weight becomes bytes here */
    bool direct;     /* the library scales, adds the bias and stores */
    unsigned char *wq, *xq;
    float *row_scale, *col_scale;
} bytes_job;

/* Rows [r0, r0 + m) of x as bytes, unless they were just made (b->bytes was kept by `linear`). */
static void x_to_bytes(piece *p, const bytes_job *j) {
    cu_backend *b = p->b;
    const qie_mat *x = &p->a->x;
    cu_bytes now = {x->data, x->rows, x->cols, x->ld, j->type, b->current}, *had = &b->bytes;
    bool all = p->m == x->rows;
    if (all && had->x == now.x && had->m == now.m && had->k == now.k && had->ld == now.ld &&
        had->type == now.type && had->card == now.card)
        return;
    cu_k_quantize_rows(p->d->compute, qie_mat_rows(*x, p->r0, p->m), j->xq, j->type, j->row_scale);
    now.x = all ? now.x : NULL;
    *had = now;
}

/* Rows [n0, n0 + n) of the weight as bytes, and their scales. */
static const unsigned char *w_as_bytes(const piece *p, const bytes_job *j, const float **scale,
                                       int64_t *n_scale) {
    const qie_wmat *w = &p->a->w;
    cu_stream s = p->d->compute;
    if (j->whole) {
        cu_k_dequantize(s, *w, p->n0, p->n, p->d->panel, QIE_BF16);
        cu_k_quantize_rows(s, qie_mat_make(p->d->panel, QIE_BF16, p->n, w->k), j->wq, j->type,
                           j->col_scale);
        *scale = j->col_scale;
        *n_scale = p->n;
        return j->wq;
    }
    *n_scale = w->n_scale;
    *scale = w->scale ? w->scale + (w->n_scale > 1 ? p->n0 : 0) : NULL;
    if (j->direct && *scale && w->n_scale == 1) { /* there each column has its own */
        cu_k_convert(s, {(void *)(uintptr_t)*scale, QIE_F32, p->n, 1, 0},
                     qie_mat_make(j->col_scale, QIE_F32, p->n, 1));
        *scale = j->col_scale;
    }
    return (const unsigned char *)w->data + p->n0 * w->k;
}

/* One piece. False: the library cannot do it. */
static bool bytes_piece(piece *p, bytes_job *j, const unsigned char *w, const float *scale,
                        int64_t n_scale) {
    int64_t k = p->a->w.k;
    qie_cu_gemm_args g;
    memset(&g, 0, sizeof g);
    g.m = p->m;
    g.n = g.ldy = p->n;
    g.k = g.ldx = g.ldw = k;
    g.x = j->xq;
    g.w = w;
    g.y = p->d->product;
    g.type = j->type;
    g.y_type = j->fp8 ? QIE_BF16 : QIE_I32;
    g.alpha = 1;
    g.workspace = p->d->libs_space;
    if (j->direct) {
        qie_cu_gemm_args whole = g;
        whole.y = place_of(p);
        whole.ldy = p->a->dst.ld;
        whole.epilogue = epilogue_of(p);
        whole.bias = bias_of(p);
        whole.x_scale = j->row_scale;
        whole.w_scale = scale;
        if (qie_cu_gemm(p->d->libs, p->d->compute, &whole))
            return true;
        j->direct = false;
    }
    if (!qie_cu_gemm(p->d->libs, p->d->compute, &g))
        return false;
    store_piece(p, g.y, g.y_type, j->row_scale, scale, n_scale);
    return true;
}

/* Products in 8 bits, where the caller allows them: weights in fp8 as fp8, all others as integers,
 * with a scale for each row of x and of the weights. False: nothing was queued that matters, and
 * the layer takes the usual way. */
static bool in_8_bits(piece *p) {
    const qie_linear_args *a = p->a;
    cu_backend *b = p->b;
    cu_card *d = p->d;
    int64_t k = a->w.k, m = a->x.rows;
    bytes_job j;
    memset(&j, 0, sizeof j);
    j.fp8 = a->w.dtype == QIE_F8_E4M3 && d->info.cc_major * 10 + d->info.cc_minor >= 89;
    /* multiples of 16: what the libraries ask of 8-bit operands */
    if (!a->int8 || a->n_lowrank || p->type != QIE_BF16 || m < QIE_INT8_MIN_ROWS || k % 16 ||
        a->w.n % 16 || (j.fp8 && !a->fp8))
        return false;
    /* panel: converted weights, then the same in bytes; low: x in bytes, then scales */
    size_t half = b->panel_bytes / 2 / CU_ALIGN * CU_ALIGN, scales = (size_t)64 << 10;
    j.whole = !j.fp8 && (a->w.dtype != QIE_I8 || (uintptr_t)a->w.data % 16);
    j.direct = j.fp8 && p->plain && a->w.scale && (uintptr_t)a->dst.data % 16 == 0;
    int64_t np = j.whole ? (int64_t)(half / 2) / k / 16 * 16 : a->w.n;
    np = np < a->w.n ? np : a->w.n;
    if (np > (int64_t)(scales / 8))
        np = (int64_t)(scales / 8) / 16 * 16;
    if (np < 16 || b->low_bytes < 2 * scales || (j.fp8 && (uintptr_t)a->w.data % 16) ||
        (!j.fp8 && !j.whole && !a->w.scale))
        return false;
    int64_t rows = (int64_t)(b->low_bytes - scales) / k;
    if (rows > (int64_t)(scales / 8))
        rows = (int64_t)(scales / 8);
    if (rows > (int64_t)(b->product_bytes / 4) / np)
        rows = (int64_t)(b->product_bytes / 4) / np;
    if (rows < 1)
        return false;
    j.wq = d->panel + half;
    j.xq = d->low;
    j.row_scale = (float *)(d->low + (b->low_bytes - scales) / CU_ALIGN * CU_ALIGN);
    j.col_scale = j.row_scale + scales / 8;
    j.type = j.fp8 ? QIE_F8_E4M3 : QIE_I8;
    for (p->n0 = 0; p->n0 < a->w.n && !b->failed; p->n0 += np) {
        p->n = a->w.n - p->n0 < np ? a->w.n - p->n0 : np;
        const float *scale;
        int64_t n_scale;
        const unsigned char *w = w_as_bytes(p, &j, &scale, &n_scale);
        for (p->r0 = 0; p->r0 < m; p->r0 += rows) {
            p->m = m - p->r0 < rows ? m - p->r0 : rows;
            x_to_bytes(p, &j);
            if (bytes_piece(p, &j, w, scale, n_scale))
                continue;
            if (!p->n0 && !p->r0)
                return false;
            cu_good(b, b->current, cu_fail(CU_FAILED, "no matrix product in 8 bits"));
            return true;
        }
    }
    return true;
}

static qie_layer_norm_args norm_here(const cu_backend *b, const qie_layer_norm_args *args) {
    qie_layer_norm_args a = *args;
    a.x = here(b, a.x);
    a.dst = here(b, a.dst);
    for (int i = 0; i < 2; i++) {
        a.scale[i] = here_f32(b, a.scale[i]);
        a.shift[i] = here_f32(b, a.shift[i]);
    }
    return a;
}

static void op_layer_norm(qie_compute *c, const qie_layer_norm_args *args) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    cu_profile_note(b, "layer_norm %lld x %lld", (long long)args->x.rows, (long long)args->x.cols);
    qie_layer_norm_args a = norm_here(b, args);
    cu_k_layer_norm(d->compute, &a, NULL);
}

/* norm: of dst afterwards, or NULL. False: it is still to be done, because a row was not computed
 * in one piece. */
static bool linear(qie_compute *c, const qie_linear_args *args, const qie_layer_norm_args *norm) {
    cu_backend *b = cu_of(c);
    cu_bytes bytes = b->bytes;
    cu_card *d = cu_ready(b);
    if (!d || args->x.rows < 1)
        return true;
    cu_profile_note(b, "linear %lld x %lld x %lld, %s weights, %s%s%s%s", (long long)args->x.rows,
                    (long long)args->w.n, (long long)args->w.k, qie_dtype_name(args->w.dtype),
                    qie_dtype_name(args->x.dtype),
                    args->store == QIE_STORE_GATED_ADD ? ", gate and sum" : "",
                    norm ? ", norm" : "", args->act == QIE_ACT_GELU_TANH ? ", GELU" : "");
    qie_linear_args a = *args;
    a.x = here(b, a.x);
    a.dst = here(b, a.dst);
    for (int i = 0; i < 2; i++)
        a.gate[i] = here_f32(b, a.gate[i]);
    a.bias = vec_here(b, a.bias);
    if (!wmat_here(b, &a.w, d->low, b->low_bytes) || b->failed)
        return true;
    piece p;
    memset(&p, 0, sizeof p);
    p.b = b;
    p.d = d;
    p.a = &a;
    qie_layer_norm_args n;
    if (norm) {
        n = norm_here(b, norm);
        p.norm = &n;
    }
    p.type = a.x.dtype == QIE_BF16 ? QIE_BF16 : QIE_F32;
    p.plain = a.store == QIE_STORE_SET && a.dst.dtype == p.type && !a.n_lowrank &&
              (a.act == QIE_ACT_NONE || a.act == QIE_ACT_GELU_TANH) &&
              (!a.bias.data || a.bias.dtype == p.type);
    if (a.w.data != d->low) /* what was last made bytes is still there */
        b->bytes = bytes;
    if (in_8_bits(&p))
        return p.n == a.w.n;
    b->bytes.x = NULL;
    size_t size = qie_dtype_size(p.type);
    int64_t panel = a.w.n;
    if (a.w.dtype != p.type || a.w.scale || (uintptr_t)a.w.data % 16) {
        panel = (int64_t)(b->panel_bytes / size) / a.w.k / 16 * 16;
        panel = panel < a.w.n ? panel : a.w.n;
    }
    int64_t most = (int64_t)(b->product_bytes / size);
    if (!p.plain && panel > most)
        panel = most / 16 * 16;
    for (p.n0 = 0; p.n0 < a.w.n; p.n0 += panel) {
        p.n = a.w.n - p.n0 < panel ? a.w.n - p.n0 : panel;
        p.w = operand(b, &a.w, p.n0, p.n, p.type, d->panel);
        int64_t rows = p.plain ? a.x.rows : most / p.n;
        for (p.r0 = 0; p.r0 < a.x.rows; p.r0 += rows) {
            p.m = a.x.rows - p.r0 < rows ? a.x.rows - p.r0 : rows;
            if (!run_piece(&p))
                return true;
        }
    }
    return p.n == a.w.n;
}

static void op_linear(qie_compute *c, const qie_linear_args *a) {
    linear(c, a, NULL);
}

static void op_linear_norm(qie_compute *c, const qie_linear_args *a, const qie_layer_norm_args *n) {
    if (!linear(c, a, n))
        op_layer_norm(c, n);
}

static void op_rms_norm(qie_compute *c, qie_mat x, qie_vec w, float eps, qie_mat dst) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    cu_profile_note(b, "rms_norm %lld x %lld", (long long)x.rows, (long long)x.cols);
    w = vec_here(b, w);
    if (!b->failed)
        cu_k_rms_norm(d->compute, here(b, x), w, eps, here(b, dst));
}

static void op_qk_norm_rope(qie_compute *c, const qie_qk_norm_rope_args *args) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    cu_profile_note(b, "qk_norm_rope %lld x %lld", (long long)args->x.rows,
                    (long long)args->x.cols);
    qie_qk_norm_rope_args a = *args;
    a.x = here(b, a.x);
    a.norm = vec_here(b, a.norm);
    a.cos = here_f32(b, a.cos);
    a.sin = here_f32(b, a.sin);
    if (!b->failed)
        cu_k_qk_norm_rope(d->compute, &a);
}

/* Why a library that is here did not do it. */
static void tell(const cu_backend *b, const cu_card *d) {
    const char *why = qie_cu_libs_note(d->libs);
    char text[256];
    snprintf(text, sizeof text, "cuDNN is here but our own kernel takes its place: %s",
             why ? why : "");
    if (why && b->options.say)
        b->options.say(b->options.say_arg, text);
}

static void op_attention(qie_compute *c, const qie_attention_args *args) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d || args->q.rows < 1)
        return;
    cu_profile_note(b, "attention %lld x %lld, %d heads of %d", (long long)args->q.rows,
                    (long long)args->k.rows, args->n_heads, args->head_dim);
    qie_attention_args a = *args;
    a.q = here(b, a.q);
    a.k = here(b, a.k);
    a.v = here(b, a.v);
    a.dst = here(b, a.dst);
    const int64_t *bounds = NULL;
    if (a.segments && a.n_segments > 1) {
        bounds = (const int64_t *)cu_small(b, a.segments, sizeof(int64_t) * (a.n_segments + 1));
        if (!bounds)
            return;
    }
    if (qie_cu_sdpa(d->libs, d->compute, &a, bounds, d->libs_space))
        return;
    cu_k_attention(d->compute, &a, bounds);
    tell(b, d);
}

static void op_conv2d(qie_compute *c, const qie_conv2d_args *args) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    cu_profile_note(b, "conv2d %d x %d, %d to %d, kernel %d", args->dst.h, args->dst.w, args->w.in,
                    args->w.out, args->w.kh);
    qie_conv2d_args a = *args;
    a.x = here_map(b, a.x);
    a.dst = here_map(b, a.dst);
    a.residual = here_map(b, a.residual);
    a.bias = vec_here(b, a.bias);
    size_t n = (size_t)a.w.out * (size_t)a.w.in * (size_t)(a.w.kt * a.w.kh * a.w.kw);
    a.w.data = cu_weight_at(b, a.w.data, n * qie_dtype_size(a.w.dtype));
    if (b->failed || !a.w.data)
        return;
    cu_k_conv_weights(d->compute, a.w, d->panel, a.x.dtype);
    if (qie_cu_conv(d->libs, d->compute, &a, d->panel, d->libs_space))
        return;
    cu_k_conv2d(d->compute, &a, d->panel);
    tell(b, d);
}

static void op_channel_norm(qie_compute *c, qie_fmap x, qie_vec gamma, bool silu, qie_fmap dst) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    cu_profile_note(b, "channel_norm %d x %d x %d", x.h, x.w, x.c);
    gamma = vec_here(b, gamma);
    if (!b->failed)
        cu_k_channel_norm(d->compute, here_map(b, x), gamma, silu, here_map(b, dst));
}

/* The table is the largest tensor of all and a few hundred of its rows are read: they are gathered
 * by the host. */
static void op_embed(qie_compute *c, qie_wmat table, const int32_t *ids, qie_mat dst) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (!d)
        return;
    dst = here(b, dst);
    size_t row = qie_dtype_row_bytes(table.dtype, table.k);
    int64_t some = (int64_t)(b->low_bytes / row);
    some = some < (int64_t)(b->panel_bytes / 4) / table.k ? some
                                                          : (int64_t)(b->panel_bytes / 4) / table.k;
    for (int64_t r0 = 0; r0 < dst.rows && !b->failed; r0 += some) {
        int64_t n = dst.rows - r0 < some ? dst.rows - r0 : some;
        cu_send_rows(b, d->low, table.data, row, ids + r0, n);
        qie_wmat part = table;
        part.data = d->low;
        part.n = n;
        part.scale = NULL; /* of single rows: no file has it */
        part.n_scale = 0;
        cu_k_dequantize(d->compute, part, 0, n, d->panel, QIE_F32);
        cu_k_convert(d->compute, qie_mat_make(d->panel, QIE_F32, n, table.k),
                     qie_mat_rows(dst, r0, n));
    }
}

static void op_convert(qie_compute *c, qie_mat src, qie_mat dst) {
    cu_backend *b = cu_of(c);
    if (cu_card *d = cu_ready(b))
        cu_k_convert(d->compute, here(b, src), here(b, dst));
}

static void op_cfg_combine(qie_compute *c, const float *cond, const float *uncond, float scale,
                           int64_t rows, int64_t cols, float *v) {
    cu_backend *b = cu_of(c);
    if (cu_card *d = cu_ready(b))
        cu_k_cfg_combine(d->compute, here_f32(b, cond), here_f32(b, uncond), scale, rows, cols,
                         (float *)cu_here(b, b->current, v));
}

static void op_axpy(qie_compute *c, float a, const float *x, float *y, int64_t n) {
    cu_backend *b = cu_of(c);
    if (cu_card *d = cu_ready(b))
        cu_k_axpy(d->compute, a, here_f32(b, x), (float *)cu_here(b, b->current, y), n);
}

static bool op_all_finite(qie_compute *c, const float *v, int64_t n) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    unsigned flag = 0;
    unsigned *at = d ? (unsigned *)cu_small(b, &flag, sizeof flag) : NULL;
    if (!at)
        return true; /* the failure itself is told by check */
    cu_k_find_bad(d->compute, here_f32(b, v), n, at);
    cu_receive(b, &flag, at, sizeof flag);
    return !flag;
}

static void op_copy(qie_compute *c, void *dst, const void *src, size_t n) {
    cu_backend *b = cu_of(c);
    cu_card *d = cu_ready(b);
    if (d && n)
        cu_good(b, b->current,
                cu_copy(d->compute, cu_here(b, b->current, dst), cu_here(b, b->current, src), n));
}

void cu_ops_fill(qie_ops *ops) {
    ops->linear = op_linear;
    ops->linear_norm = op_linear_norm;
    ops->rms_norm = op_rms_norm;
    ops->layer_norm = op_layer_norm;
    ops->qk_norm_rope = op_qk_norm_rope;
    ops->attention = op_attention;
    ops->conv2d = op_conv2d;
    ops->channel_norm = op_channel_norm;
    ops->embed = op_embed;
    ops->convert = op_convert;
    ops->cfg_combine = op_cfg_combine;
    ops->axpy = op_axpy;
    ops->all_finite = op_all_finite;
    ops->copy = op_copy;
}
