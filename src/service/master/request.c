#define _GNU_SOURCE
#include "service/master/request.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/error.h"
#include "base/rng.h"
#include "base/strbuf.h"
#include "image/sniff.h"
#include "service/master/loras.h"
#include "service/master/parse.h"

#define MAX_TEXT_BYTES (4u * SVC_MAX_PROMPT_CHARS)
#define PREVIEW_PX 256
#define MAX_JSON_VALUES 1000

/* A field's value: JSON, or the text of a form's part. */
typedef struct value {
    const qie_json *json;
    const char *text;
    size_t n;
    bool is_file;
} value;

typedef struct parser {
    const svc_request_rules *rules;
    svc_request *r;
    qie_error *err;
    bool size_seen;
} parser;

static qie_status bad(parser *p, const char *name, const char *what) {
    return qie_fail(p->err, QIE_E_INVALID, name, "'%s' %s", name, what);
}

/* ---------------------------------------------------------------- values */

static qie_status get_text(parser *p, const char *name, const value *v, const char **text,
                           size_t *n) {
    if (!v->json) {
        *text = v->text;
        *n = v->n;
    } else if (!(*text = qie_json_string(v->json, n)))
        return bad(p, name, "must be a string");
    if (memchr(*text, 0, *n))
        return bad(p, name, "contains a NUL character");
    return qie_utf8_valid(*text, *n) ? QIE_OK : bad(p, name, "is not valid UTF-8");
}

static qie_status get_string(parser *p, const char *name, const value *v, size_t max_chars,
                             char **out) {
    const char *text;
    size_t n;
    QIE_TRY(get_text(p, name, v, &text, &n));
    size_t chars = qie_utf8_length(text, n);
    QIE_FAIL_IF(chars > max_chars, QIE_E_INVALID, p->err, name,
                "'%s' has %zu characters, the limit is %zu", name, chars, max_chars);
    free(*out);
    *out = strndup(text, n);
    QIE_FAIL_IF(!*out, QIE_E_NO_MEMORY, p->err, NULL, "out of memory");
    return QIE_OK;
}

static qie_status get_real(parser *p, const char *name, const value *v, double min, double max,
                           double *out) {
    char text[64], *end = text;
    if (v->json) {
        if (!qie_json_is_number(v->json))
            return bad(p, name, "must be a number");
        *out = qie_json_number(v->json);
    } else {
        snprintf(text, sizeof text, "%.*s", (int)(v->n < 60 ? v->n : 60), v->text);
        *out = strtod(text, &end);
        if (end == text || *end || v->n >= 60 || strpbrk(text, "xXpP \t"))
            return bad(p, name, "must be a number");
    }
    QIE_FAIL_IF(!(*out >= min && *out <= max), QIE_E_INVALID, p->err, name,
                "'%s' must be within %g..%g", name, min, max);
    return QIE_OK;
}

static qie_status get_int(parser *p, const char *name, const value *v, int64_t min, int64_t max,
                          int64_t *out) {
    if (v->json) {
        /* 5.0 is an integer to JSON Schema. */
        double d = qie_json_is_number(v->json) ? qie_json_number(v->json) : NAN;
        if (qie_json_is_integer(v->json))
            *out = qie_json_integer(v->json);
        else if (d >= -9e15 && d <= 9e15 && d - floor(d) <= 0)
            *out = (int64_t)d;
        else
            return bad(p, name, "must be an integer");
    } else {
        char text[32], *end;
        snprintf(text, sizeof text, "%.*s", (int)(v->n < 30 ? v->n : 30), v->text);
        errno = 0;
        *out = strtoll(text, &end, 10);
        if (errno || end == text || *end || v->n >= 30 || text[0] == ' ' || text[0] == '+')
            return bad(p, name, "must be an integer");
    }
    QIE_FAIL_IF(*out < min || *out > max, QIE_E_INVALID, p->err, name,
                "'%s' must be within %lld..%lld", name, (long long)min, (long long)max);
    return QIE_OK;
}

static qie_status get_bool(parser *p, const char *name, const value *v, bool *out) {
    if (v->json) {
        if (!qie_json_is_bool(v->json))
            return bad(p, name, "must be true or false");
        *out = qie_json_bool(v->json);
        return QIE_OK;
    }
    bool yes = (v->n == 4 && !strncasecmp(v->text, "true", 4)) || (v->n == 1 && *v->text == '1');
    bool no = (v->n == 5 && !strncasecmp(v->text, "false", 5)) || (v->n == 1 && *v->text == '0');
    *out = yes;
    return yes || no ? QIE_OK : bad(p, name, "must be true or false");
}

/* One of "a|b|c"; *out is its index. */
static qie_status get_word(parser *p, const char *name, const value *v, const char *words,
                           int *out) {
    const char *text;
    size_t n;
    QIE_TRY(get_text(p, name, v, &text, &n));
    int i = 0;
    for (const char *w = words;; w++, i++) {
        size_t len = strcspn(w, "|");
        if (len == n && !memcmp(w, text, n)) {
            *out = i;
            return QIE_OK;
        }
        w += len;
        if (!*w)
            break;
    }
    return qie_fail(p->err, QIE_E_INVALID, name, "'%s' must be one of %s", name, words);
}

/* Values in a text, guessed from above by its commas and brackets outside strings: a parsed value
 * takes some 30 times the room of its shortest text, so they are counted before anything is built.
 */
static size_t count_values(const char *text, size_t n) {
    size_t values = 0;
    bool inside = false;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (inside && c == '\\')
            i++;
        else if (c == '"')
            inside = !inside;
        else if (!inside && (c == ',' || c == '[' || c == '{'))
            values++;
    }
    return values;
}

/* ---------------------------------------------------------------- pictures */

static qie_status new_picture(parser *p, const char *name, svc_source **out) {
    *out = NULL;
    QIE_FAIL_IF(p->r->n_pictures >= p->rules->max_pictures, QIE_E_TOO_LARGE, p->err, name,
                "more than %zu pictures", p->rules->max_pictures);
    *out = &p->r->pictures[p->r->n_pictures++];
    return QIE_OK;
}

static qie_status add_base64(parser *p, const char *name, const char *text, size_t n) {
    svc_source *s = NULL;
    QIE_TRY(new_picture(p, name, &s));
    if (n > 5 && !strncasecmp(text, "data:", 5)) {
        const char *comma = memchr(text, ',', n < 200 ? n : 200);
        if (!comma || comma - text < 7 || strncasecmp(comma - 7, ";base64", 7))
            return bad(p, name, "is no base64 data URL");
        n -= (size_t)(comma + 1 - text);
        text = comma + 1;
    }
    if (!svc_base64_decode(text, n, &s->own, &s->n))
        return bad(p, name, "is not base64");
    s->bytes = s->own;
    return s->n ? QIE_OK : bad(p, name, "is empty");
}

static qie_status add_url(parser *p, const char *name, const char *text, size_t n) {
    svc_source *s = NULL;
    if (n > 5 && !strncasecmp(text, "data:", 5))
        return add_base64(p, name, text, n);
    QIE_FAIL_IF(!p->rules->allow_url, QIE_E_INVALID, p->err, name,
                "this service fetches no pictures: send them in the request");
    QIE_TRY(new_picture(p, name, &s));
    QIE_FAIL_IF(n > 2000 || (strncasecmp(text, "http://", 7) && strncasecmp(text, "https://", 8)),
                QIE_E_INVALID, p->err, name, "'%s' must be an http or https address", name);
    s->url = strndup(text, n);
    return s->url ? QIE_OK : qie_fail(p->err, QIE_E_NO_MEMORY, NULL, "out of memory");
}

typedef qie_status (*add_fn)(parser *, const char *, const char *, size_t);

/* A string, or an array of strings. */
static qie_status each_string(parser *p, const char *name, const value *v, add_fn add) {
    const char *text;
    size_t n;
    if (!v->json || !qie_json_is_array(v->json)) {
        QIE_TRY(get_text(p, name, v, &text, &n));
        return add(p, name, text, n);
    }
    for (size_t i = 0; i < qie_json_size(v->json); i++) {
        value item = {.json = qie_json_at(v->json, i)};
        QIE_TRY(get_text(p, name, &item, &text, &n));
        QIE_TRY(add(p, name, text, n));
    }
    return qie_json_size(v->json) ? QIE_OK : bad(p, name, "is empty");
}

typedef struct one_of {
    parser *p;
    const char *name;
    int n;
    qie_status st;
} one_of;

static bool picture_member(void *arg, const char *key, qie_json *json) {
    one_of *o = arg;
    value v = {.json = json};
    const char *text;
    size_t n;
    bool b64 = !strcmp(key, "base64"), url = !strcmp(key, "url") || !strcmp(key, "image_url");
    if (!b64 && !url)
        o->st =
            qie_fail(o->p->err, QIE_E_INVALID, o->name, "'%s' has no member '%.40s'", o->name, key);
    else if (o->n++)
        o->st = bad(o->p, o->name, "must name one source per picture");
    else if ((o->st = get_text(o->p, o->name, &v, &text, &n)) == QIE_OK)
        o->st = (b64 ? add_base64 : add_url)(o->p, o->name, text, n);
    return o->st == QIE_OK;
}

/* images: [{"base64": ...} | {"url": ...} | {"image_url": ...}] */
static qie_status add_objects(parser *p, const char *name, const value *v) {
    if (!v->json || !qie_json_is_array(v->json) || !qie_json_size(v->json))
        return bad(p, name, "must be an array of pictures");
    for (size_t i = 0; i < qie_json_size(v->json); i++) {
        one_of o = {.p = p, .name = name};
        const qie_json *item = qie_json_at(v->json, i);
        if (!qie_json_is_object(item) || !qie_json_size(item))
            return bad(p, name, "must hold objects with base64 or url");
        qie_json_each(item, picture_member, &o);
        QIE_TRY(o.st);
    }
    return QIE_OK;
}

static qie_status add_file(parser *p, const char *name, const value *v) {
    svc_source *s = NULL;
    if (v->json || !v->is_file)
        return bad(p, name, "must be a file part of a form");
    QIE_TRY(new_picture(p, name, &s));
    s->bytes = (const uint8_t *)v->text;
    s->n = v->n;
    return s->n ? QIE_OK : bad(p, name, "is empty");
}

/* ---------------------------------------------------------------- fields */

static qie_status set_size(parser *p, const value *v) {
    const char *text;
    size_t n;
    int w = 0, h = 0, used = 0;
    char copy[24];
    QIE_TRY(get_text(p, "size", v, &text, &n));
    snprintf(copy, sizeof copy, "%.*s", (int)(n < 20 ? n : 20), text);
    if (!strcmp(copy, "auto"))
        return QIE_OK;
    if (strspn(copy, "0123456789x") != strlen(copy) ||
        sscanf(copy, "%5dx%5d%n", &w, &h, &used) != 2 || used != (int)n || w < 64 || h < 64 ||
        w > 4096 || h > 4096)
        return bad(p, "size", "must be auto or WIDTHxHEIGHT with sides of 64..4096");
    p->r->params.width = w;
    p->r->params.height = h;
    return QIE_OK;
}

static qie_status set_path(parser *p, const value *v) {
    svc_request *r = p->r;
    QIE_TRY(get_string(p, "output_path", v, 200, &r->output_path));
    const char *s = r->output_path;
    bool ok = *s && *s != '/' && !strstr(s, "//") && s[strlen(s) - 1] != '/';
    for (const char *at = s; ok && *at;) {
        size_t n = strcspn(at, "/");
        ok = at[0] != '.' && !memchr(at, '\\', n);
        at += n + (at[n] == '/');
    }
    for (const char *at = s; ok && *at; at++)
        ok = (unsigned char)*at >= 32;
    if (!ok)
        return bad(p, "output_path", "must be a name below the output folder without hidden parts");
    QIE_FAIL_IF(!p->rules->has_output_dir, QIE_E_INVALID, p->err, "output_path",
                "this service was started without --output-dir");
    return QIE_OK;
}

static qie_status set_number(parser *p, const char *name, const value *v, bool *known) {
    svc_params *o = &p->r->params;
    const struct {
        const char *name;
        int64_t min, max;
        int32_t *at;
    } ints[] = {{"num_inference_steps", 1, 200, &o->num_inference_steps},
                {"max_side", 64, 4096, &o->max_side},
                {"ref_area", 1024, 1 << 24, &o->ref_area},
                {"width", 64, 4096, &o->width},
                {"height", 64, 4096, &o->height},
                {p->r->flavour == SVC_OPENAI ? "n" : "num_images", 1, 10, &o->num_images},
                {"output_compression", 0, 100, &o->compression}};
    int64_t i;
    const char *word = v->json ? qie_json_string(v->json, NULL) : v->text;
    *known = true;
    if (!strcmp(name, "max_side") && word && (v->json ? strlen(word) : v->n) == 4 &&
        !memcmp(word, "none", 4)) {
        o->max_side = -1;
        return QIE_OK;
    }
    for (size_t k = 0; k < sizeof ints / sizeof *ints; k++)
        if (!strcmp(name, ints[k].name)) {
            QIE_TRY(get_int(p, name, v, ints[k].min, ints[k].max, &i));
            *ints[k].at = (int32_t)i;
            return QIE_OK;
        }
    if (!strcmp(name, "true_cfg_scale"))
        return get_real(p, name, v, 0, 20, &o->true_cfg_scale);
    if (!strcmp(name, "guidance_scale"))
        return get_real(p, name, v, 0, 1000, &o->guidance_scale);
    *known = false;
    return QIE_OK;
}

static qie_status set_seed(parser *p, const value *v) {
    const char *text = v->json ? qie_json_string(v->json, NULL) : v->text;
    size_t n = v->json && text ? strlen(text) : v->n;
    int64_t i;
    if (text && n == 6 && !memcmp(text, "random", 6))
        return QIE_OK;
    QIE_TRY(get_int(p, "seed", v, 0, SVC_MAX_SEED, &i));
    p->r->params.seed = (uint64_t)i;
    p->r->seed_named = true;
    return QIE_OK;
}

static qie_status set_format(parser *p, const value *v) {
    static const int formats[] = {QIE_IMAGE_PNG, QIE_IMAGE_JPEG, QIE_IMAGE_WEBP};
    int i;
    QIE_TRY(get_word(p, "output_format", v, "png|jpeg|webp", &i));
    p->r->params.format = formats[i];
    return QIE_OK;
}

static qie_status set_lora(parser *p, const value *v) {
    const char *text;
    size_t n;
    if (v->json)
        return svc_loras_add_json(&p->r->params, v->json, p->err);
    QIE_TRY(get_text(p, "lora", v, &text, &n));
    qie_json *list = NULL;
    if (n && (*text == '[' || *text == '{')) { /* as in JSON; else NAME[:WEIGHT], part by part */
        QIE_FAIL_IF(count_values(text, n) > MAX_JSON_VALUES ||
                        qie_json_parse(text, n, "'lora'", &list, NULL) != QIE_OK,
                    QIE_E_INVALID, p->err, "lora", "'lora' is no valid JSON");
        qie_status st = svc_loras_add_json(&p->r->params, list, p->err);
        qie_json_free(list);
        return st;
    }
    if (n)
        return svc_loras_add_text(&p->r->params, text, n, p->err);
    if (p->r->params.n_loras < 0)
        p->r->params.n_loras = 0;
    return QIE_OK;
}

static qie_status set_switch(parser *p, const char *name, const value *v) {
    svc_params *o = &p->r->params;
    bool on;
    QIE_TRY(get_bool(p, name, v, &on));
    if (!strcmp(name, "keep_size"))
        o->keep_size = on;
    else if (!strcmp(name, "force_seed"))
        o->force_seed = on;
    else
        o->no_metadata = !on;
    return QIE_OK;
}

static qie_status set_common(parser *p, const char *name, const value *v, bool *known) {
    svc_request *r = p->r;
    QIE_TRY(set_number(p, name, v, known));
    if (*known)
        return QIE_OK;
    *known = true;
    if (!strcmp(name, "prompt"))
        return get_string(p, name, v, SVC_MAX_PROMPT_CHARS, &r->prompt);
    if (!strcmp(name, "negative_prompt"))
        return get_string(p, name, v, SVC_MAX_PROMPT_CHARS, &r->negative);
    if (!strcmp(name, "seed"))
        return set_seed(p, v);
    if (!strcmp(name, "output_format"))
        return set_format(p, v);
    if (!strcmp(name, "keep_size") || !strcmp(name, "force_seed") || !strcmp(name, "metadata"))
        return set_switch(p, name, v);
    if (!strcmp(name, "cache")) {
        int i;
        QIE_TRY(get_word(p, name, v, "off|balanced|fast", &i));
        r->params.cache = i;
        return QIE_OK;
    }
    if (!strcmp(name, "lora"))
        return set_lora(p, v);
    if (!strcmp(name, "image") && !v->json)
        return add_file(p, name, v);
    if (!strcmp(name, "image[]") && !v->json)
        return add_file(p, "image", v);
    if (!strcmp(name, "images") && v->json)
        return add_objects(p, name, v);
    *known = false;
    return QIE_OK;
}

static qie_status set_own(parser *p, const char *name, const value *v, bool *known) {
    svc_request *r = p->r;
    int64_t i;
    int word;
    bool on;
    *known = true;
    if (!strcmp(name, "image_base64"))
        return each_string(p, name, v, add_base64);
    if (!strcmp(name, "image_url"))
        return each_string(p, name, v, add_url);
    if (!strcmp(name, "idempotency_key")) {
        QIE_TRY(get_string(p, name, v, 200, &r->idempotency_key));
        return *r->idempotency_key ? QIE_OK : bad(p, name, "is empty");
    }
    if (!strcmp(name, "priority")) {
        QIE_TRY(get_int(p, name, v, 0, 9, &i));
        r->priority = (int)i;
        return QIE_OK;
    }
    if (!strcmp(name, "response")) {
        QIE_TRY(get_word(p, name, v, "base64|path", &word));
        r->as_path = word == 1;
        return QIE_OK;
    }
    if (!strcmp(name, "output_path"))
        return set_path(p, v);
    if (!strcmp(name, "dry_run"))
        return get_bool(p, name, v, &r->dry_run);
    if (!strcmp(name, "preview")) {
        QIE_TRY(get_bool(p, name, v, &on));
        r->params.preview_px = on ? PREVIEW_PX : 0;
        return QIE_OK;
    }
    *known = false;
    return QIE_OK;
}

static qie_status set_openai(parser *p, const char *name, const value *v, bool *known) {
    svc_request *r = p->r;
    int64_t i;
    int word;
    *known = true;
    if (!strcmp(name, "size"))
        return set_size(p, v);
    if (!strcmp(name, "response_format")) {
        QIE_TRY(get_word(p, name, v, "b64_json|url", &word));
        r->as_url = word == 1;
        return QIE_OK;
    }
    if (!strcmp(name, "stream"))
        return get_bool(p, name, v, &r->stream);
    if (!strcmp(name, "partial_images")) {
        QIE_TRY(get_int(p, name, v, 0, 3, &i));
        r->partial_images = (int)i;
        return QIE_OK;
    }
    if (!strcmp(name, "mask"))
        return bad(p, name, "is not supported: describe the place in the prompt");
    for (const char *const *a = (const char *const[]){"model", "user", "quality", "background",
                                                      "input_fidelity", "moderation", NULL};
         *a; a++)
        if (!strcmp(name, *a)) {
            const char *text;
            size_t n;
            return get_text(p, name, v, &text, &n);
        }
    *known = false;
    return QIE_OK;
}

/* What other programs call a field of ours; NULL: nothing is known by that name. */
static const char *meant(const parser *p, const char *name) {
    static const char *const OTHERS[][2] = {{"steps", "num_inference_steps"},
                                            {"num_steps", "num_inference_steps"},
                                            {"cfg_scale", "true_cfg_scale"},
                                            {"cfg", "true_cfg_scale"},
                                            {"negative", "negative_prompt"},
                                            {"n", "num_images"},
                                            {"num_images_per_prompt", "num_images"},
                                            {"loras", "lora"},
                                            {"format", "output_format"},
                                            {"init_image", "image_base64"},
                                            {"init_images", "image_base64"},
                                            {"image", "image_base64"}};
    const char *ours = NULL;
    for (size_t i = 0; i < sizeof OTHERS / sizeof *OTHERS && !ours; i++)
        if (!strcmp(name, OTHERS[i][0]))
            ours = OTHERS[i][1];
    if (ours && p->r->flavour == SVC_OPENAI)
        return !strcmp(ours, "image_base64") ? "images" : !strcmp(ours, "num_images") ? "n" : ours;
    return ours;
}

static qie_status set_field(parser *p, const char *name, const value *v) {
    bool known;
    if (v->is_file && strcmp(name, "image") && strcmp(name, "image[]") && strcmp(name, "mask"))
        return bad(p, name, "is no file");
    QIE_TRY(set_common(p, name, v, &known));
    if (!known)
        QIE_TRY((p->r->flavour == SVC_OPENAI ? set_openai : set_own)(p, name, v, &known));
    const char *near = known ? NULL : meant(p, name);
    QIE_FAIL_IF(!known, QIE_E_INVALID, p->err, name, "there is no field '%.60s'%s%s%s", name,
                near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
    return QIE_OK;
}

/* ---------------------------------------------------------------- whole requests */

typedef struct walk {
    parser *p;
    qie_status st;
} walk;

static bool is_null(const qie_json *v) {
    return !qie_json_is_object(v) && !qie_json_is_array(v) && !qie_json_is_string(v) &&
           !qie_json_is_number(v) && !qie_json_is_bool(v);
}

static bool json_member(void *arg, const char *key, qie_json *json) {
    walk *w = arg;
    value v = {.json = json};
    if (is_null(json)) /* counts as absent */
        return true;
    w->st = set_field(w->p, key, &v);
    return w->st == QIE_OK;
}

static qie_status parse_json(parser *p, const char *body, size_t n) {
    qie_json *root = NULL;
    walk w = {.p = p};
    QIE_FAIL_IF(count_values(body, n) > MAX_JSON_VALUES, QIE_E_SYNTAX, p->err, NULL,
                "the body holds more than %d values", MAX_JSON_VALUES);
    QIE_TRY(qie_json_parse(body, n, "the body", &root, p->err));
    if (!qie_json_is_object(root))
        w.st = qie_fail(p->err, QIE_E_SYNTAX, NULL, "the body is no JSON object");
    else
        qie_json_each(root, json_member, &w);
    qie_json_free(root);
    return w.st;
}

static qie_status parse_form(parser *p, const char *type, const char *body, size_t n) {
    svc_multipart m;
    svc_part_view part;
    bool more;
    QIE_TRY(svc_multipart_begin(&m, type, body, n, p->err));
    for (int i = 0;; i++) {
        QIE_TRY(svc_multipart_next(&m, &part, &more, p->err));
        if (!more)
            return QIE_OK;
        QIE_FAIL_IF(i >= 64, QIE_E_INVALID, p->err, NULL, "the form has too many parts");
        value v = {.text = part.data, .n = part.n, .is_file = part.is_file};
        QIE_FAIL_IF(!v.is_file && v.n > MAX_TEXT_BYTES && strcmp(part.name, "image_base64"),
                    QIE_E_INVALID, p->err, part.name, "'%s' is too long", part.name);
        QIE_TRY(set_field(p, part.name, &v));
    }
}

static qie_status check_whole(parser *p) {
    svc_request *r = p->r;
    if (!r->prompt)
        return bad(p, "prompt", "is missing");
    if (!*r->prompt)
        return bad(p, "prompt", "is empty: say what to change");
    if (!r->n_pictures)
        return bad(p, r->flavour == SVC_OPENAI ? "image" : "image_base64",
                   "is missing: give a picture");
    if (r->as_path && !r->output_path)
        return bad(p, "output_path", "is missing beside response=path");
    if (r->output_path && !r->as_path)
        return bad(p, "output_path", "needs response=path");
    if (r->as_path && r->params.num_images > 1)
        return bad(p, "num_images", "must be 1 with response=path");
    if (r->output_path && (int)qie_image_format_from_path(r->output_path) != r->params.format)
        return bad(p, "output_path", "must end as output_format says (.png, .jpg, .webp)");
    if (r->params.keep_size == 1 && (r->params.width || r->params.height))
        return bad(p, "keep_size", "contradicts width and height");
    QIE_TRY(svc_loras_check(p->rules->lora_dir, &r->params, p->err));
    if (!r->negative && !(r->negative = strdup(" ")))
        return qie_fail(p->err, QIE_E_NO_MEMORY, NULL, "out of memory");
    if (r->stream && r->params.num_images > 1)
        return bad(p, "n", "must be 1 with stream");
    if (r->partial_images && r->stream)
        r->params.preview_px = PREVIEW_PX;
    if (!r->seed_named)
        r->params.seed = qie_random_seed();
    return QIE_OK;
}

qie_status svc_request_parse(const svc_request_rules *rules, svc_flavour flavour,
                             const char *content_type, const char *body, size_t n, svc_request *out,
                             qie_error *err) {
    parser p = {.rules = rules, .r = out, .err = err};
    memset(out, 0, sizeof *out);
    out->flavour = flavour;
    out->params = svc_params_default();
    if (content_type && !strncasecmp(content_type, "multipart/form-data", 19))
        QIE_TRY(parse_form(&p, content_type, body, n));
    else if (content_type && !strncasecmp(content_type, "application/json", 16))
        QIE_TRY(parse_json(&p, body, n));
    else
        return qie_fail(err, QIE_E_UNSUPPORTED, "Content-Type",
                        "the body must be application/json or multipart/form-data");
    return check_whole(&p);
}

qie_status svc_request_check_pictures(const svc_request *r, int widths[], int heights[],
                                      qie_error *err) {
    for (size_t i = 0; i < r->n_pictures; i++) {
        qie_image_format format;
        qie_status st = qie_image_probe(r->pictures[i].bytes, r->pictures[i].n, NULL, &format,
                                        &widths[i], &heights[i], err);
        if (st != QIE_OK) {
            qie_error_context(err, "reading the header of picture %zu", i + 1);
            if (err)
                snprintf(err->param, sizeof err->param, "image");
            return st;
        }
    }
    return QIE_OK;
}

void svc_request_release(svc_request *r) {
    free(r->prompt);
    free(r->negative);
    free(r->idempotency_key);
    free(r->output_path);
    for (size_t i = 0; i < SVC_MAX_PICTURES; i++) {
        free(r->pictures[i].own);
        free(r->pictures[i].url);
    }
    memset(r, 0, sizeof *r);
}

void svc_request_fingerprint(const svc_request *r, char out[QIE_HASH_HEX_MAX]) {
    svc_params p = r->params;
    if (!r->seed_named)
        p.seed = 0;
    qie_json *o = svc_params_to_json(&p);
    qie_json_put(o, "prompt", qie_json_new_string(r->prompt));
    qie_json_put(o, "negative", qie_json_new_string(r->negative));
    qie_json_put(o, "path", qie_json_new_string(r->output_path ? r->output_path : ""));
    for (size_t i = 0; i < r->n_pictures; i++) {
        char key[32];
        snprintf(key, sizeof key, "p%zu", i);
        qie_json_put(o, key, qie_json_new_string(r->pictures[i].name));
    }
    char *text = qie_json_text(o, 0);
    qie_sha1_hex(text ? text : "", text ? strlen(text) : 0, out);
    free(text);
    qie_json_free(o);
}
