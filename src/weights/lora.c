#define _GNU_SOURCE
#include "weights/lora.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/strbuf.h"

/* Names in a message; the log has them all. */
#define NAMES_IN_MESSAGE 8

/* ---------------------------------------------------------------- names of a file's tensors */

typedef enum kind { OTHER = 0, DOWN, UP, ALPHA } kind;

static bool ends_with(const char *s, size_t n, const char *end, size_t *rest) {
    size_t k = strlen(end);
    if (n <= k || memcmp(s + n - k, end, k) != 0)
        return false;
    *rest = n - k;
    return true;
}

/* Which matrix a tensor is, and how long the name of its module. PEFT may put the adapter's name
 * between lora_A and weight. */
static kind kind_of(const char *name, size_t *module) {
    static const struct {
        const char *end;
        kind kind;
    } ENDS[] = {{".lora_A.weight", DOWN},
                {".lora_B.weight", UP},
                {".lora_down.weight", DOWN},
                {".lora_up.weight", UP},
                {".lora.down.weight", DOWN},
                {".lora.up.weight", UP},
                {".lora_A", DOWN},
                {".lora_B", UP},
                {".alpha", ALPHA}};
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof ENDS / sizeof *ENDS; i++)
        if (ends_with(name, n, ENDS[i].end, module))
            return ENDS[i].kind;
    static const char *const INSIDE[] = {".lora_A.", ".lora_B."};
    for (int i = 0; i < 2; i++) {
        const char *at = strstr(name, INSIDE[i]), *adapter = at ? at + 8 : NULL;
        if (!at || at == name)
            continue;
        const char *dot = strchr(adapter, '.');
        if (dot && dot > adapter && !strcmp(dot, ".weight")) {
            *module = (size_t)(at - name);
            return i ? UP : DOWN;
        }
    }
    return OTHER;
}

/* Adapters that are no sum of thin products: recognised by a piece of a name. */
static const char *other_adapter(const char *name) {
    static const struct {
        const char *piece, *what;
    } KINDS[] = {{"dora_scale", "DoRA"},
                 {"lora_magnitude_vector", "DoRA"},
                 {"lokr_w", "LoKr"},
                 {"hada_w", "LoHa"},
                 {"oft_", "OFT"},
                 {"lora_mid", "LoCon with a Tucker core"},
                 {"glora_", "GLoRA"},
                 {"lora_embedding_", "LoRA on embeddings"},
                 {".lora_B.bias", "LoRA with biases"},
                 {".diff_b", "full difference"},
                 {".set_weight", "full replacement"},
                 {".w_norm", "norm adapter"}};
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (strstr(name, KINDS[i].piece))
            return KINDS[i].what;
    size_t rest;
    return ends_with(name, strlen(name), ".diff", &rest) ? "full difference" : NULL;
}

/* Prefix of the naming off, part found. */
static void split_prefix(qie_lora_module *m) {
    static const struct {
        const char *prefix;
        qie_lora_part part;
        bool flat, go_on; /* another prefix may follow */
    } PREFIXES[] = {{"base_model.model.", QIE_LORA_ANY, false, true},
                    {"model.diffusion_model.", QIE_LORA_TRANSFORMER, false, false},
                    {"diffusion_model.", QIE_LORA_TRANSFORMER, false, false},
                    {"transformer.", QIE_LORA_TRANSFORMER, false, false},
                    {"unet.", QIE_LORA_TRANSFORMER, false, false},
                    {"lora_unet_", QIE_LORA_TRANSFORMER, true, false},
                    {"lora_transformer_", QIE_LORA_TRANSFORMER, true, false},
                    {"lycoris_", QIE_LORA_TRANSFORMER, true, false},
                    {"text_encoders.qwen25_7b.transformer.", QIE_LORA_TEXT_ENCODER, false, false},
                    {"text_encoder.", QIE_LORA_TEXT_ENCODER, false, false},
                    {"lora_te1_", QIE_LORA_TEXT_ENCODER, true, false},
                    {"lora_te_", QIE_LORA_TEXT_ENCODER, true, false}};
    m->name = m->key;
    m->part = QIE_LORA_ANY;
    m->flat = false;
    for (size_t i = 0; i < sizeof PREFIXES / sizeof *PREFIXES; i++) {
        size_t n = strlen(PREFIXES[i].prefix);
        if (strncmp(m->name, PREFIXES[i].prefix, n) != 0 || !m->name[n])
            continue;
        m->name += n;
        m->part = PREFIXES[i].part;
        m->flat = PREFIXES[i].flat;
        if (!PREFIXES[i].go_on)
            return;
    }
}

/* ---------------------------------------------------------------- grouping */

typedef struct entry {
    const qie_tensor *t;
    size_t n_module; /* length of the module's name */
    kind kind;
} entry;

static int by_module(const void *a, const void *b) {
    const entry *x = a, *y = b;
    size_t n = x->n_module < y->n_module ? x->n_module : y->n_module;
    int c = memcmp(x->t->name, y->t->name, n);
    if (c)
        return c;
    return x->n_module != y->n_module ? (x->n_module > y->n_module) - (x->n_module < y->n_module)
                                      : (int)x->kind - (int)y->kind;
}

static qie_status bad_file(const qie_lora *l, qie_error *err, const char *what) {
    return qie_fail(err, QIE_E_INVALID, "lora", "LoRA '%s': %s", l->name, what);
}

/* A list of names that grows, for a refusal: some in the message, all in the log. */
typedef struct names {
    qie_strbuf text;
    size_t n;
} names;

static void names_init(names *s) {
    qie_strbuf_init(&s->text, 600);
    s->n = 0;
}
static void names_add(names *s, const char *lora, const char *name, const char *why) {
    qie_log(QIE_LOG_INFO, "lora", "'%s': '%s' %s", lora, name, why);
    if (s->n < NAMES_IN_MESSAGE)
        qie_strbuf_printf(&s->text, "%s'%.100s'%s%s", s->n ? ", " : "", name, *why ? " " : "", why);
    s->n++;
}
static qie_status names_fail(names *s, const qie_lora *l, const char *what, qie_error *err) {
    qie_status st =
        s->n > NAMES_IN_MESSAGE
            ? qie_fail(err, QIE_E_INVALID, "lora", "LoRA '%s': %s: %s and %zu more", l->name, what,
                       s->text.data ? s->text.data : "", s->n - NAMES_IN_MESSAGE)
            : qie_fail(err, QIE_E_INVALID, "lora", "LoRA '%s': %s: %s", l->name, what,
                       s->text.data ? s->text.data : "");
    qie_strbuf_release(&s->text);
    return st;
}

/* Matrix with trailing dimensions of 1 (1x1 convolutions), in a type that the kernels take. */
static bool is_matrix(const qie_tensor *t) {
    if (t->n_dims < 2 || (t->dtype != QIE_F32 && t->dtype != QIE_F16 && t->dtype != QIE_BF16))
        return false;
    for (int i = 2; i < t->n_dims; i++)
        if (t->shape[i] != 1)
            return false;
    return t->shape[0] >= 1 && t->shape[1] >= 1;
}

static bool read_alpha(const qie_tensor *t, double *alpha) {
    float f;
    if (t->n_elements != 1)
        return false;
    if (t->dtype == QIE_I64) {
        int64_t v;
        memcpy(&v, t->data, sizeof v);
        *alpha = (double)v;
    } else if (t->dtype == QIE_I32) {
        int32_t v;
        memcpy(&v, t->data, sizeof v);
        *alpha = v;
    } else if (t->dtype == QIE_F64)
        memcpy(alpha, t->data, sizeof *alpha);
    else if ((t->dtype == QIE_F32 || t->dtype == QIE_F16 || t->dtype == QIE_BF16) &&
             qie_to_f32(&f, t->data, t->dtype, 1) == 0)
        *alpha = (double)f;
    else
        return false;
    return isfinite(*alpha);
}

/* diffusers multiplies the matrices by alpha / rank in the type of the file when it reads them:
 * down takes it as a factor of 0.5 or more, up the power of two that is left. In 16 bits that
 * rounds, unless alpha / rank is a power of two; to make the same picture the same values are
 * taken. */
static qie_status scale_as_diffusers(qie_lora_module *m, qie_error *err) {
    int exponent;
    double on_down = m->scale, on_up = 1;
    const qie_tensor *t = m->down;
    if (t->dtype == QIE_F32 || fabs(frexp(m->scale, &exponent)) == 0.5 || m->scale == 0)
        return QIE_OK;
    while (on_down * 2 < on_up) {
        on_down *= 2;
        on_up /= 2;
    }
    uint16_t *data = malloc(t->n_bytes);
    QIE_FAIL_IF(!data, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    m->scaled = *t;
    m->scaled.data = data;
    for (int64_t i = 0; i < t->n_elements; i++) {
        float v;
        qie_to_f32(&v, (const unsigned char *)t->data + 2 * i, t->dtype, 1);
        v *= (float)on_down;
        data[i] = t->dtype == QIE_BF16 ? qie_f32_to_bf16(v) : qie_f32_to_f16(v);
    }
    m->down = &m->scaled;
    m->scale = on_up;
    return QIE_OK;
}

/* The entries of one module. */
static qie_status add_module(qie_lora *l, const entry *e, size_t n, qie_error *err) {
    qie_lora_module *m = &l->modules[l->n_modules];
    const qie_tensor *alpha = NULL;
    memset(m, 0, sizeof *m);
    m->key = strndup(e->t->name, e->n_module);
    QIE_FAIL_IF(!m->key, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    l->n_modules++;
    for (size_t i = 0; i < n; i++) {
        const qie_tensor **slot = e[i].kind == DOWN ? &m->down : e[i].kind == UP ? &m->up : &alpha;
        QIE_FAIL_IF(*slot, QIE_E_INVALID, err, "lora",
                    "LoRA '%s': '%s' and '%s' say the same thing", l->name, (*slot)->name,
                    e[i].t->name);
        *slot = e[i].t;
    }
    split_prefix(m);
    QIE_FAIL_IF(!m->down || !m->up, QIE_E_INVALID, err, "lora",
                "LoRA '%s': module '%s' has no %s matrix", l->name, m->key,
                m->down ? "second (lora_B, lora_up)" : "first (lora_A, lora_down)");
    QIE_FAIL_IF(!is_matrix(m->down) || !is_matrix(m->up) || m->down->shape[0] != m->up->shape[1],
                QIE_E_INVALID, err, "lora",
                "LoRA '%s': the matrices of '%s' do not fit together: they must be [rank, in] and "
                "[out, rank] of type F32, F16 or BF16",
                l->name, m->key);
    m->rank = m->down->shape[0];
    m->k = m->down->shape[1];
    m->n = m->up->shape[0];
    m->scale = 1;
    if (alpha) {
        double v;
        QIE_FAIL_IF(!read_alpha(alpha, &v), QIE_E_INVALID, err, "lora",
                    "LoRA '%s': '%s' is not one finite number", l->name, alpha->name);
        m->scale = v / (double)m->rank;
    }
    if (l->n_modules == 1 || m->rank < l->min_rank)
        l->min_rank = m->rank;
    if (m->rank > l->max_rank)
        l->max_rank = m->rank;
    return QIE_OK;
}

static qie_status group(qie_lora *l, qie_error *err) {
    size_t n = qie_weights_count(l->file), n_entries = 0;
    entry *list = calloc(n + 1, sizeof *list);
    l->modules = calloc(n + 1, sizeof *l->modules);
    if (!list || !l->modules) {
        free(list);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    names unknown;
    qie_status st = QIE_OK;
    names_init(&unknown);
    for (size_t i = 0; i < n && st == QIE_OK; i++) {
        const qie_tensor *t = qie_weights_at(l->file, i);
        const char *other = other_adapter(t->name);
        size_t module = 0;
        kind k = kind_of(t->name, &module);
        if (other)
            st = qie_fail(err, QIE_E_INVALID, "lora",
                          "LoRA '%s' is a %s adapter ('%s'): only plain LoRAs are supported",
                          l->name, other, t->name);
        else if (k == OTHER)
            names_add(&unknown, l->name, t->name, "");
        else
            list[n_entries++] = (entry){t, module, k};
    }
    if (st == QIE_OK && !n_entries)
        st = bad_file(l, err,
                      "holds no LoRA matrices (lora_A and lora_B, or lora_down and lora_up)");
    else if (st == QIE_OK && unknown.n)
        st = names_fail(&unknown, l, "names that belong to no LoRA", err);
    qie_strbuf_release(&unknown.text);
    qsort(list, n_entries, sizeof *list, by_module);
    for (size_t from = 0, to; from < n_entries && st == QIE_OK; from = to) {
        for (to = from + 1; to < n_entries && list[to].n_module == list[from].n_module &&
                            !memcmp(list[to].t->name, list[from].t->name, list[from].n_module);)
            to++;
        st = add_module(l, list + from, to - from, err);
    }
    free(list);
    return st;
}

/* ---------------------------------------------------------------- metadata */

/* Does PEFT's pattern name this module? Keys are a module's whole name or its end; "^" asks for the
 * whole. */
static bool pattern_is(const char *pattern, const char *name) {
    if (*pattern == '^')
        return !strcmp(pattern + 1, name);
    size_t n = strlen(name), k = strlen(pattern);
    return k <= n && !strcmp(name + n - k, pattern) && (k == n || name[n - k - 1] == '.');
}

typedef struct pattern_search {
    const char *name;
    double value;
    bool found;
} pattern_search;

static bool look_at_pattern(void *arg, const char *key, qie_json *value) {
    pattern_search *s = arg;
    if (!qie_json_is_number(value) || !pattern_is(key, s->name))
        return true;
    s->value = qie_json_number(value);
    s->found = true;
    return false;
}

static const qie_json *of_part(const qie_json *o, const char *part, const char *key) {
    char name[96];
    snprintf(name, sizeof name, "%s.%s", part, key);
    return qie_json_member(o, name);
}

/* diffusers stores the PEFT configuration as JSON text under this key: alpha is in it and not in
 * the tensors. */
static qie_status apply_adapter_metadata(qie_lora *l, qie_error *err) {
    const char *text = qie_weights_metadata(l->file, "lora_adapter_metadata");
    qie_json *o = NULL;
    if (!text)
        return QIE_OK;
    QIE_FAIL_IF(qie_json_parse(text, strlen(text), "metadata", &o, NULL) != QIE_OK ||
                    !qie_json_is_object(o),
                QIE_E_INVALID, err, "lora",
                "LoRA '%s': its lora_adapter_metadata is no JSON object", l->name);
    qie_status st = QIE_OK;
    for (size_t i = 0; i < l->n_modules && st == QIE_OK; i++) {
        qie_lora_module *m = &l->modules[i];
        const char *part = m->part == QIE_LORA_TEXT_ENCODER ? "text_encoder" : "transformer";
        const qie_json *alpha = of_part(o, part, "lora_alpha");
        if (qie_json_bool(of_part(o, part, "use_dora")))
            st =
                qie_fail(err, QIE_E_INVALID, "lora",
                         "LoRA '%s' is a DoRA adapter (use_dora in its metadata): only plain LoRAs "
                         "are supported",
                         l->name);
        if (!qie_json_is_number(alpha))
            continue;
        pattern_search s = {.name = m->name, .value = qie_json_number(alpha)};
        const qie_json *patterns = of_part(o, part, "alpha_pattern");
        if (qie_json_is_object(patterns))
            qie_json_each(patterns, look_at_pattern, &s);
        double rank = (double)m->rank;
        m->scale *= s.value / (qie_json_bool(of_part(o, part, "use_rslora")) ? sqrt(rank) : rank);
        if (st == QIE_OK && !isfinite(m->scale))
            st = bad_file(l, err, "its metadata gives an alpha that is no number");
    }
    qie_json_free(o);
    return st;
}

/* Lightning by shape: the released ones have plain module names, rank 64, alpha 8, and pairs for
 * the eight attention and four feed-forward layers of every block and nothing else
 * (lightx2v/Qwen-Image-Edit-2511-Lightning). */
static bool has_lightning_shape(const qie_lora *l) {
    int64_t blocks = 0;
    for (size_t i = 0; i < l->n_modules; i++) {
        const qie_lora_module *m = &l->modules[i];
        int at = 0, block = -1;
        if (m->rank != 64 || fabs(m->scale - 0.125) > 1e-9 || m->part != QIE_LORA_ANY ||
            sscanf(m->name, "transformer_blocks.%d.%n", &block, &at) != 1 || !at || block < 0 ||
            (strncmp(m->name + at, "attn.", 5) != 0 && !strstr(m->name + at, "_mlp.net.")))
            return false;
        blocks = block + 1 > blocks ? block + 1 : blocks;
    }
    return blocks > 0 && l->n_modules == 12 * (size_t)blocks;
}

/* Texts of the metadata that describe the LoRA; training logs may mention anything. */
static bool describes(const char *key) {
    static const char *const KEYS[] = {"name",
                                       "title",
                                       "description",
                                       "type",
                                       "preset",
                                       "model",
                                       "steps",
                                       "modelspec.title",
                                       "modelspec.description",
                                       "ss_output_name",
                                       "num_inference_steps",
                                       "format",
                                       "modelspec.architecture",
                                       "distillation"};
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++)
        if (!strcmp(key, KEYS[i]))
            return true;
    return false;
}

static void find_preset(qie_lora *l) {
    const char *key, *value;
    qie_preset by_name = qie_preset_from_name(l->name);
    for (size_t i = 0; qie_weights_metadata_at(l->file, i, &key, &value); i++) {
        qie_preset p = qie_preset_from_name(value);
        if (!describes(key) || !p.lightning)
            continue;
        l->preset.lightning = true;
        l->preset_from = "its metadata";
        if (!l->preset.num_inference_steps)
            l->preset.num_inference_steps = p.num_inference_steps;
    }
    const char *steps = qie_weights_metadata(l->file, "num_inference_steps");
    if (!steps)
        steps = qie_weights_metadata(l->file, "steps");
    long n = steps ? strtol(steps, NULL, 10) : 0;
    if (l->preset.lightning && n >= 1 && n <= 64)
        l->preset.num_inference_steps = (int)n;
    if (!l->preset.lightning && by_name.lightning)
        l->preset_from = "its name";
    else if (!l->preset.lightning && has_lightning_shape(l))
        l->preset_from = "its shape";
    l->preset.lightning = l->preset_from != NULL;
    if (l->preset.lightning && !l->preset.num_inference_steps)
        l->preset.num_inference_steps = qie_preset_steps(l->name);
}

/* "2511" as a number of its own. */
static const char *year_in(const char *text) {
    static const char *const BASES[] = {"2509", "2511"};
    for (int i = 0; i < 2; i++)
        for (const char *p = text; (p = strstr(p, BASES[i])) != NULL; p += 4)
            if ((p == text || p[-1] < '0' || p[-1] > '9') && (p[4] < '0' || p[4] > '9'))
                return BASES[i];
    return NULL;
}

const char *qie_lora_base(const qie_lora *l, bool *from_metadata) {
    static const char *const KEYS[] = {"base_model", "ss_base_model_version", "ss_sd_model_name",
                                       "modelspec.architecture", "modelspec.implementation"};
    *from_metadata = true;
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        const char *value = qie_weights_metadata(l->file, KEYS[i]);
        const char *base = value ? year_in(value) : NULL;
        if (base)
            return base;
    }
    *from_metadata = false;
    return year_in(l->name);
}

/* ---------------------------------------------------------------- opening */

static char *name_of(const char *path) {
    const char *slash = strrchr(path, '/'), *from = slash ? slash + 1 : path;
    size_t n = strlen(from), rest;
    return strndup(from, ends_with(from, n, ".safetensors", &rest) ? rest : n);
}

static qie_status read_all(qie_weights *file, const char *path, bool to_use, qie_lora **out,
                           qie_error *err) {
    qie_status st;
    qie_lora *l = calloc(1, sizeof *l);
    if (l) {
        l->file = file;
        l->name = name_of(path);
    } else
        qie_weights_close(file);
    if (!l || !l->name) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    QIE_TRY_GOTO(group(l, err));
    for (size_t i = 0; to_use && i < l->n_modules; i++)
        QIE_TRY_GOTO(scale_as_diffusers(&l->modules[i], err));
    QIE_TRY_GOTO(apply_adapter_metadata(l, err));
    find_preset(l);
    *out = l;
    return QIE_OK;
fail:
    qie_lora_close(l);
    return st;
}

static qie_status blame_lora(qie_status st, qie_error *err) {
    if (st != QIE_OK && err)
        snprintf(err->param, sizeof err->param, "lora");
    return st;
}

qie_status qie_lora_open(const char *path, qie_lora **out, qie_error *err) {
    qie_weights *file;
    *out = NULL;
    QIE_TRY(blame_lora(qie_weights_open_file(path, &file, err), err));
    return read_all(file, path, true, out, err);
}

qie_status qie_lora_open_bytes(const void *data, size_t n, const char *label, qie_lora **out,
                               qie_error *err) {
    qie_weights *file;
    *out = NULL;
    QIE_TRY(blame_lora(qie_weights_open_bytes(data, n, label, &file, err), err));
    return read_all(file, label, true, out, err);
}

qie_preset qie_lora_preset(const char *path) {
    qie_weights *file;
    qie_lora *l = NULL;
    qie_preset p = {0};
    if (qie_weights_open_file(path, &file, NULL) == QIE_OK)
        read_all(file, path, false, &l, NULL);
    if (l)
        p = l->preset;
    qie_lora_close(l);
    return p;
}

void qie_lora_close(qie_lora *l) {
    if (!l)
        return;
    for (size_t i = 0; i < l->n_modules; i++) {
        free((void *)(uintptr_t)l->modules[i].key);
        free((void *)(uintptr_t)l->modules[i].scaled.data);
    }
    free(l->modules);
    free(l->name);
    qie_weights_close(l->file);
    free(l);
}

size_t qie_lora_own_bytes(const qie_lora *l) {
    size_t n = 0;
    for (size_t i = 0; i < l->n_modules; i++)
        if (l->modules[i].scaled.data)
            n += l->modules[i].scaled.n_bytes;
    return n;
}

/* ---------------------------------------------------------------- matching */

typedef struct row {
    char *name; /* as it is, or flattened */
    qie_lora_part part;
    size_t i_target;
} row;

struct qie_lora_table {
    const qie_lora_target *targets;
    size_t n;
    row *dotted, *flat; /* [n], sorted */
};

static int by_name(const void *a, const void *b) {
    const row *x = a, *y = b;
    return x->part != y->part ? (int)x->part - (int)y->part : strcmp(x->name, y->name);
}

qie_status qie_lora_table_create(const qie_lora_target *targets, size_t n, qie_lora_table **out,
                                 qie_error *err) {
    *out = NULL;
    qie_lora_table *t = calloc(1, sizeof *t);
    bool ok = t != NULL;
    if (ok) {
        t->targets = targets;
        t->n = n;
        t->dotted = calloc(n + 1, sizeof *t->dotted);
        t->flat = calloc(n + 1, sizeof *t->flat);
        ok = t->dotted && t->flat;
    }
    for (size_t i = 0; i < n && ok; i++) {
        t->dotted[i] = (row){strdup(targets[i].name), targets[i].part, i};
        t->flat[i] = (row){strdup(targets[i].name), targets[i].part, i};
        ok = t->dotted[i].name && t->flat[i].name;
        for (char *p = t->flat[i].name; p && *p; p++)
            if (*p == '.')
                *p = '_';
    }
    if (!ok) {
        qie_lora_table_destroy(t);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    }
    qsort(t->dotted, n, sizeof *t->dotted, by_name);
    qsort(t->flat, n, sizeof *t->flat, by_name);
    *out = t;
    return QIE_OK;
}

void qie_lora_table_destroy(qie_lora_table *t) {
    if (!t)
        return;
    for (size_t i = 0; i < t->n; i++) {
        if (t->dotted)
            free(t->dotted[i].name);
        if (t->flat)
            free(t->flat[i].name);
    }
    free(t->dotted);
    free(t->flat);
    free(t);
}

static bool find_in(const qie_lora_table *t, bool flat, qie_lora_part part, const char *name,
                    size_t *i_target) {
    row key = {(char *)(uintptr_t)name, part, 0};
    const row *found = bsearch(&key, flat ? t->flat : t->dotted, t->n, sizeof key, by_name);
    if (found)
        *i_target = found->i_target;
    return found != NULL;
}

/* The text encoder's modules under their names in the released files, in other versions of
 * transformers, and below the language model alone. */
static bool find_text(const qie_lora_table *t, bool flat, const char *name, size_t *i_target) {
    static const char *const DOTTED[][2] = {{"", ""},
                                            {"model.language_model.", "model."},
                                            {"language_model.model.", "model."},
                                            {"language_model.", "model."},
                                            {"model.visual.", "visual."},
                                            {"layers.", "model.layers."}};
    static const char *const FLAT[][2] = {{"", ""},
                                          {"model_language_model_", "model_"},
                                          {"language_model_model_", "model_"},
                                          {"language_model_", "model_"},
                                          {"model_visual_", "visual_"},
                                          {"layers_", "model_layers_"}};
    char full[320];
    for (size_t i = 0; i < sizeof DOTTED / sizeof *DOTTED; i++) {
        const char *const *p = flat ? FLAT[i] : DOTTED[i];
        size_t k = strlen(p[0]);
        if (strncmp(name, p[0], k) != 0)
            continue;
        int n = snprintf(full, sizeof full, "%s%s", p[1], name + k);
        if (n > 0 && (size_t)n < sizeof full &&
            find_in(t, flat, QIE_LORA_TEXT_ENCODER, full, i_target))
            return true;
    }
    return false;
}

static bool find_target(const qie_lora_table *t, const qie_lora_module *m, const char *name,
                        size_t *i_target) {
    if (m->part != QIE_LORA_TEXT_ENCODER &&
        find_in(t, m->flat, QIE_LORA_TRANSFORMER, name, i_target))
        return true;
    return m->part != QIE_LORA_TRANSFORMER && find_text(t, m->flat, name, i_target);
}

/* Names of the three layers that a fused module stands for; false if it is none. */
static bool split_fused(const qie_lora_module *m, char parts[3][320]) {
    static const struct {
        const char *fused, *parts[3];
    } FUSED[] = {{"to_qkv", {"to_q", "to_k", "to_v"}},
                 {"to_added_qkv", {"add_q_proj", "add_k_proj", "add_v_proj"}},
                 {"add_qkv_proj", {"add_q_proj", "add_k_proj", "add_v_proj"}},
                 {"qkv", {"q", "k", "v"}}}; /* of the vision tower */
    size_t n = strlen(m->name), rest;
    for (size_t i = 0; i < sizeof FUSED / sizeof *FUSED; i++) {
        if (!ends_with(m->name, n, FUSED[i].fused, &rest) || rest > 200 || m->n % 3 ||
            m->name[rest - 1] != (m->flat ? '_' : '.'))
            continue;
        for (int p = 0; p < 3; p++)
            snprintf(parts[p], 320, "%.*s%s", (int)rest, m->name, FUSED[i].parts[p]);
        return true;
    }
    return false;
}

typedef struct matching {
    const qie_lora *l;
    const qie_lora_table *t;
    qie_lora_match *list;
    size_t n;
    bool *taken; /* per target */
    names unknown, misfits;
} matching;

static void match_one(matching *g, const qie_lora_module *m, const char *name, int64_t up_row,
                      int64_t n) {
    size_t i;
    char why[160];
    if (!find_target(g->t, m, name, &i)) {
        if (!up_row)
            names_add(&g->unknown, g->l->name, m->key, "");
        return;
    }
    const qie_lora_target *target = &g->t->targets[i];
    if (target->n != n || target->k != m->k) {
        snprintf(why, sizeof why, "is for a layer of %lld to %lld, the model's has %lld to %lld",
                 (long long)m->k, (long long)n, (long long)target->k, (long long)target->n);
        names_add(&g->misfits, g->l->name, m->key, why);
    } else if (g->taken[i])
        names_add(&g->misfits, g->l->name, m->key, "comes twice under different names");
    else {
        g->taken[i] = true;
        g->list[g->n++] = (qie_lora_match){i, m, up_row};
    }
}

qie_status qie_lora_match_all(const qie_lora *l, const qie_lora_table *t, bool zero_cond_t,
                              qie_lora_match **out, size_t *n_out, qie_error *err) {
    *out = NULL;
    *n_out = 0;
    bool from_metadata;
    const char *base = qie_lora_base(l, &from_metadata);
    QIE_FAIL_IF(
        base && from_metadata && !strcmp(base, "2511") != zero_cond_t, QIE_E_INVALID, err, "lora",
        "LoRA '%s' was made for Qwen-Image-Edit-%s by its metadata, which %s zero_cond_t; "
        "this model %s",
        l->name, base, zero_cond_t ? "has no" : "has", zero_cond_t ? "has it" : "has it not");
    matching g = {.l = l, .t = t};
    g.list = calloc(3 * l->n_modules + 1, sizeof *g.list);
    g.taken = calloc(t->n + 1, sizeof *g.taken);
    names_init(&g.unknown);
    names_init(&g.misfits);
    qie_status st = QIE_OK;
    if (!g.list || !g.taken)
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    for (size_t i = 0; i < l->n_modules && st == QIE_OK; i++) {
        const qie_lora_module *m = &l->modules[i];
        char fused[3][320];
        if (!split_fused(m, fused))
            match_one(&g, m, m->name, 0, m->n);
        else
            for (int p = 0; p < 3; p++)
                match_one(&g, m, fused[p], p * (m->n / 3), m->n / 3);
    }
    if (st == QIE_OK && g.unknown.n)
        st = names_fail(&g.unknown, l, "made for another model: this one has no", err);
    if (st == QIE_OK && g.misfits.n)
        st = names_fail(&g.misfits, l, "made for another model", err);
    qie_strbuf_release(&g.unknown.text);
    qie_strbuf_release(&g.misfits.text);
    free(g.taken);
    if (st != QIE_OK) {
        free(g.list);
        return st;
    }
    *out = g.list;
    *n_out = g.n;
    return QIE_OK;
}
