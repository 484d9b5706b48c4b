#define _GNU_SOURCE
#include "cli/request.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/strbuf.h"
#include "cli/ui.h"

#define PROMPT_MAX_CHARS 32000u
#define PROMPT_FILE_MAX_BYTES (1u << 20)
#define PICTURE_MAX_BYTES (64u << 20) /* as qie_image_limits_default */

/* How messages call an option: the field in a batch, else the flag. */
static const char *called(const cli_values *v, cli_option_id id) {
    static char names[OPT_COUNT][64];
    const cli_option *o = &CLI_OPTIONS[id];
    char *name = names[id];
    if (v->parent && o->field)
        snprintf(name, sizeof names[id], "%.*s", (int)strcspn(o->field, "|"), o->field);
    else
        snprintf(name, sizeof names[id], "--%s", o->name);
    return name;
}

qie_status cli_read_prompt_file(cli_values *values, qie_error *err) {
    const char *path = cli_text(values, OPT_PROMPT_FILE, NULL);
    if (!path)
        return QIE_OK;
    QIE_FAIL_IF(values->own[OPT_PROMPT].source == FROM_FLAG, QIE_E_USAGE, err, "--prompt-file",
                "--prompt and --prompt-file exclude each other");
    unsigned char *bytes;
    size_t n;
    QIE_TRY(qie_file_read(strcmp(path, "-") ? path : "/dev/stdin", PROMPT_FILE_MAX_BYTES, &bytes,
                          &n, err));
    char *text = (char *)bytes;
    if (n >= 3 && !memcmp(text, "\xef\xbb\xbf", 3)) { /* byte order mark of Windows editors */
        text += 3;
        n -= 3;
    }
    if (n && text[n - 1] == '\n')
        text[--n] = 0;
    if (n && text[n - 1] == '\r')
        text[--n] = 0;
    qie_status st =
        strlen(text) == n
            ? cli_set(values, OPT_PROMPT, FROM_FLAG, "--prompt-file", text, err)
            : qie_fail(err, QIE_E_INVALID, "--prompt-file", "'%s' contains a NUL character", path);
    free(bytes);
    return st;
}

static qie_status check_text(const char *text, const char *where, const char *what,
                             qie_error *err) {
    size_t n = strlen(text);
    QIE_FAIL_IF(!qie_utf8_valid(text, n), QIE_E_INVALID, err, where,
                "%s: the %s is not valid UTF-8", where, what);
    size_t n_chars = qie_utf8_length(text, n);
    QIE_FAIL_IF(n_chars > PROMPT_MAX_CHARS, QIE_E_INVALID, err, where,
                "%s: the %s has %zu characters, the limit is %u", where, what, n_chars,
                PROMPT_MAX_CHARS);
    return QIE_OK;
}

static qie_status read_texts(const cli_values *v, cli_request *r, qie_error *err) {
    const char *prompt = cli_text(v, OPT_PROMPT, NULL), *where = called(v, OPT_PROMPT);
    QIE_FAIL_IF(!prompt, v->parent ? QIE_E_INVALID : QIE_E_USAGE, err, where,
                v->parent ? "'prompt' is missing" : "no instruction: give one with -p/--prompt");
    QIE_FAIL_IF(!*prompt, QIE_E_INVALID, err, where, "%s: the instruction is empty", where);
    QIE_TRY(check_text(prompt, where, "instruction", err));
    r->options.prompt = prompt;
    r->options.negative_prompt = cli_text(v, OPT_NEGATIVE, " ");
    return check_text(r->options.negative_prompt, called(v, OPT_NEGATIVE), "negative prompt", err);
}

static qie_status read_paths(const cli_values *v, cli_request *r, qie_error *err) {
    const cli_value *images = cli_get(v, OPT_IMAGE);
    const char *where = called(v, OPT_IMAGE);
    QIE_FAIL_IF(images->n == 0, v->parent ? QIE_E_INVALID : QIE_E_USAGE, err, where,
                v->parent ? "'image' is missing" : "no picture: give one with -i/--image");
    QIE_FAIL_IF(images->n > QIE_MAX_IMAGES, QIE_E_TOO_LARGE, err, where,
                "%s: %zu pictures, the limit is %d", where, images->n, QIE_MAX_IMAGES);
    for (size_t i = 0; i < images->n; i++)
        r->paths[i] = images->texts[i];
    r->n_paths = images->n;
    return QIE_OK;
}

static qie_status read_format(const char *path, const char *where, qie_image_format *format,
                              qie_error *err) {
    QIE_FAIL_IF(!*path, QIE_E_INVALID, err, where, "%s: the path is empty", where);
    *format = qie_image_format_from_path(path);
    QIE_FAIL_IF(*format == QIE_IMAGE_UNKNOWN, QIE_E_UNSUPPORTED, err, where,
                "%s: the name '%s' must end in .png, .jpg, .jpeg or .webp", where, path);
    return QIE_OK;
}

/* A format that is named decides for names without a known ending; with one it must agree. */
static qie_status read_output_format(const cli_values *v, cli_request *r, const char *where,
                                     qie_error *err) {
    const char *name = cli_text(v, OPT_OUTPUT_FORMAT, NULL);
    if (!name || !*r->output)
        return read_format(r->output, where, &r->format, err);
    qie_image_format by_name = qie_image_format_from_path(r->output);
    r->format = !strcmp(name, "png")    ? QIE_IMAGE_PNG
                : !strcmp(name, "jpeg") ? QIE_IMAGE_JPEG
                                        : QIE_IMAGE_WEBP;
    QIE_FAIL_IF(by_name != QIE_IMAGE_UNKNOWN && by_name != r->format, QIE_E_INVALID, err,
                called(v, OPT_OUTPUT_FORMAT), "%s: %s contradicts the name '%s'",
                called(v, OPT_OUTPUT_FORMAT), name, r->output);
    return QIE_OK;
}

static qie_status read_outputs(const cli_values *v, cli_request *r, qie_error *err) {
    const char *where = called(v, OPT_OUTPUT);
    /* QWEN_EDIT_OUTPUT is no default for the lines of a batch: each would overwrite the one before.
     */
    r->output = v->parent ? (v->own[OPT_OUTPUT].n ? v->own[OPT_OUTPUT].texts[0] : NULL)
                          : cli_text(v, OPT_OUTPUT, NULL);
    r->preview = cli_text(v, OPT_PREVIEW, NULL);
    r->quality = (int)cli_number(v, OPT_QUALITY, 0);
    r->metadata = !cli_on(v, OPT_NO_METADATA);
    QIE_FAIL_IF(!r->output && !cli_on(v, OPT_DRY_RUN), v->parent ? QIE_E_INVALID : QIE_E_USAGE, err,
                where,
                v->parent ? "'output_path' is missing" : "no output: name a file with -o/--output");
    if (r->output)
        QIE_TRY(read_output_format(v, r, where, err));
    if (r->preview) {
        where = called(v, OPT_PREVIEW);
        QIE_TRY(read_format(r->preview, where, &r->preview_format, err));
        QIE_FAIL_IF(r->output && !strcmp(r->output, r->preview), QIE_E_INVALID, err, where,
                    "%s: '%s' is the output itself", where, r->preview);
    }
    return QIE_OK;
}

/* Width and height win over a keep-size of weaker origin; two of the same origin contradict each
 * other. */
static qie_status read_sizes(const cli_values *v, qie_edit_options *o, qie_error *err) {
    const cli_value *side = cli_get(v, OPT_MAX_SIDE), *keep = cli_get(v, OPT_KEEP_SIZE);
    o->max_side = side->is_word ? -1 : (int)cli_number(v, OPT_MAX_SIDE, 0);
    o->width = (int)cli_number(v, OPT_WIDTH, 0);
    o->height = (int)cli_number(v, OPT_HEIGHT, 0);
    o->ref_area = (int64_t)cli_number(v, OPT_REF_AREA, 0);
    o->keep_size = keep->source == FROM_NOWHERE ? -1 : keep->on;
    if (!o->width && !o->height)
        return QIE_OK;
    cli_source w = cli_get(v, OPT_WIDTH)->source, h = cli_get(v, OPT_HEIGHT)->source;
    QIE_FAIL_IF(o->keep_size == 1 && keep->source >= (w > h ? w : h), QIE_E_INVALID, err,
                called(v, OPT_KEEP_SIZE), "%s contradicts width and height",
                called(v, OPT_KEEP_SIZE));
    o->keep_size = 0;
    return QIE_OK;
}

static void read_numbers(const cli_values *v, cli_request *r) {
    qie_edit_options *o = &r->options;
    r->seed_named = cli_is_set(v, OPT_SEED) && !cli_get(v, OPT_SEED)->is_word;
    r->force_seed = cli_on(v, OPT_FORCE_SEED);
    o->seed = (uint64_t)cli_number(v, OPT_SEED, 0);
    o->num_inference_steps = (int)cli_number(v, OPT_STEPS, 0);
    o->true_cfg_scale = cli_number(v, OPT_TRUE_CFG_SCALE, -1);
    o->guidance_scale = cli_number(v, OPT_GUIDANCE_SCALE, 1);
    o->num_images = (int)cli_number(v, OPT_NUM_IMAGES, 1);
    r->cache_named = cli_get(v, OPT_CACHE)->source >= FROM_FLAG;
    o->cache = qie_cache_from_name(cli_text(v, OPT_CACHE, "off"));
}

/* Those of the command line are the engine's; a line of a batch may name its own. A service is told
 * of what was named for this call; a config file speaks of files on this machine. */
static qie_status read_loras(const cli_values *v, cli_request *r, qie_error *err) {
    const char *schedule = cli_text(v, OPT_SCHEDULE, "auto");
    r->options.schedule = !strcmp(schedule, "model")       ? QIE_SCHEDULE_MODEL
                          : !strcmp(schedule, "lightning") ? QIE_SCHEDULE_LIGHTNING
                                                           : QIE_SCHEDULE_AUTO;
    QIE_TRY(cli_read_loras(v, false, &r->loras, err));
    if (cli_get(v, OPT_LORA)->source >= FROM_FLAG)
        r->n_named_loras = r->loras.n;
    if (v->parent && v->own[OPT_LORA].n) {
        r->options.loras = r->loras.uses;
        r->options.n_loras = r->loras.n;
    }
    return QIE_OK;
}

static qie_status read_developer(const cli_values *v, cli_request *r, qie_error *err) {
    const char *noise = cli_text(v, OPT_NOISE, "auto");
    r->options.positions = strcmp(cli_text(v, OPT_POSITIONS, "3d"), "3d") ? QIE_POSITIONS_SEQUENTIAL
                                                                          : QIE_POSITIONS_3D;
    r->options.noise = !strcmp(noise, "f32")    ? QIE_NOISE_F32
                       : !strcmp(noise, "bf16") ? QIE_NOISE_BF16
                                                : QIE_NOISE_AUTO;
    const cli_value *inject = cli_get(v, OPT_INJECT);
    const size_t max = sizeof r->injections / sizeof *r->injections;
    QIE_FAIL_IF(inject->n > max, QIE_E_INVALID, err, "--inject", "--inject: more than %zu", max);
    for (size_t i = 0; i < inject->n; i++) {
        const char *text = inject->texts[i], *equals = strchr(text, '=');
        QIE_FAIL_IF(!equals || equals == text || !equals[1] || equals - text > 60, QIE_E_INVALID,
                    err, "--inject", "--inject: '%s' is not of the form NAME=FILE", text);
        snprintf(r->injection_names[i], sizeof r->injection_names[i], "%.*s", (int)(equals - text),
                 text);
        r->injections[i] = (qie_injection){.name = r->injection_names[i], .path = equals + 1};
    }
    r->options.injections = r->injections;
    r->options.n_injections = inject->n;
    return QIE_OK;
}

qie_status cli_request_read(const cli_values *values, cli_request *request, qie_error *err) {
    memset(request, 0, sizeof *request);
    request->options = qie_edit_options_default();
    QIE_TRY(read_paths(values, request, err));
    QIE_TRY(read_texts(values, request, err));
    QIE_TRY(read_outputs(values, request, err));
    QIE_TRY(read_sizes(values, &request->options, err));
    read_numbers(values, request);
    QIE_TRY(read_loras(values, request, err));
    return read_developer(values, request, err);
}

char *cli_output_path(const char *output, int i, int n) {
    char *path = NULL;
    const char *slash = strrchr(output, '/'), *dot = strrchr(slash ? slash : output, '.');
    if (n <= 1)
        return strdup(output);
    if (!dot)
        dot = output + strlen(output);
    return asprintf(&path, "%.*s-%d%s", (int)(dot - output), output, i + 1, dot) < 0 ? NULL : path;
}

qie_status cli_request_check_outputs(const cli_request *request, qie_error *err) {
    for (int i = 0; request->output && i < request->options.num_images; i++) {
        char *path = cli_output_path(request->output, i, request->options.num_images);
        qie_status st = path ? qie_file_check_writable(path, err)
                             : qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        free(path);
        QIE_TRY(st);
    }
    return request->preview ? qie_file_check_writable(request->preview, err) : QIE_OK;
}

/* The seed in the parameters that we wrote into a picture; damaged metadata is no reason to refuse
 * it. */
static bool seed_of(const unsigned char *bytes, size_t n, uint64_t *seed) {
    char *text = NULL;
    qie_json *o = NULL;
    int64_t value = -1;
    if (qie_image_read_parameters(bytes, n, &text, NULL) == QIE_OK && text &&
        qie_json_parse(text, strlen(text), "metadata", &o, NULL) == QIE_OK &&
        qie_json_get_int(o, "seed", -1, 0, INT64_MAX, &value, NULL) != QIE_OK)
        value = -1;
    qie_json_free(o);
    free(text);
    *seed = value < 0 ? 0 : (uint64_t)value;
    return value >= 0;
}

qie_status cli_request_read_picture(const cli_request *request, size_t i, unsigned char **bytes,
                                    size_t *n, qie_error *err) {
    const char *path = request->paths[i];
    QIE_FAIL_IF(!*path, QIE_E_INVALID, err, "image", "the path of picture %zu is empty", i + 1);
    QIE_FAIL_IF(qie_dir_exists(path), QIE_E_INVALID, err, path,
                "'%s' is a folder, a picture is needed", path);
    return qie_file_read(path, PICTURE_MAX_BYTES, bytes, n, err);
}

qie_status cli_request_load(cli_request *request, qie_error *err) {
    for (size_t i = 0; i < request->n_paths; i++) {
        const char *path = request->paths[i];
        unsigned char *bytes = NULL;
        size_t n;
        QIE_TRY(cli_request_read_picture(request, i, &bytes, &n, err));
        qie_status st = qie_image_decode(bytes, n, NULL, &request->pictures[i], err);
        if (st == QIE_OK)
            request->has_seed[i] = seed_of(bytes, n, &request->made_with[i]);
        else
            qie_error_context(err, "reading picture '%s'", path);
        free(bytes);
        QIE_TRY(st);
        request->views[i] = request->pictures[i];
    }
    request->options.images = request->views;
    request->options.n_images = request->n_paths;
    return QIE_OK;
}

void cli_request_choose_seed(cli_request *request) {
    if (!request->seed_named) {
        request->options.seed = qie_seed_random();
        return;
    }
    uint64_t named = request->options.seed;
    bool used = false;
    for (size_t i = 0; i < request->n_paths; i++)
        used = used || (request->has_seed[i] && request->made_with[i] == named);
    if (used && !request->force_seed) {
        request->options.seed = qie_derived_seed(named);
        cli_warn("an input picture was made with seed %llu; edits chained with one seed degrade, "
                 "so seed %llu is used (--force-seed keeps yours)",
                 (unsigned long long)named, (unsigned long long)request->options.seed);
    }
}

void cli_request_release(cli_request *request) {
    for (size_t i = 0; i < QIE_MAX_IMAGES; i++) {
        qie_image_destroy(request->pictures[i]);
        request->pictures[i] = NULL;
    }
}
