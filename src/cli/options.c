/* Reading values: arguments, environment, config file, batch fields. The table is in
 * options_table.c. */
#define _GNU_SOURCE
#include "cli/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"

#define CONFIG_MAX_BYTES (1u << 20)

/* ---------------------------------------------------------------- values */

void cli_values_release(cli_values *v) {
    for (int i = 0; i < OPT_COUNT; i++) {
        for (size_t k = 0; k < v->own[i].n; k++)
            free(v->own[i].texts[k]);
        free(v->own[i].texts);
    }
    memset(v, 0, sizeof *v);
}

const cli_value *cli_get(const cli_values *v, cli_option_id id) {
    while (v->own[id].source == FROM_NOWHERE && v->parent)
        v = v->parent;
    return &v->own[id];
}

bool cli_is_set(const cli_values *v, cli_option_id id) {
    return cli_get(v, id)->source != FROM_NOWHERE;
}

const char *cli_text(const cli_values *v, cli_option_id id, const char *def) {
    const cli_value *x = cli_get(v, id);
    return x->n ? x->texts[x->n - 1] : def;
}

double cli_number(const cli_values *v, cli_option_id id, double def) {
    const cli_value *x = cli_get(v, id);
    return x->source == FROM_NOWHERE || x->is_word ? def : x->number;
}

bool cli_on(const cli_values *v, cli_option_id id) {
    return cli_get(v, id)->on;
}

/* True if `word` is one of "a|b|c". */
static bool in_words(const char *words, const char *word) {
    size_t n = strlen(word);
    for (const char *p = words; p && *p;) {
        size_t k = strcspn(p, "|");
        if (k == n && !strncmp(p, word, n))
            return true;
        p += k + (p[k] == '|');
    }
    return false;
}

/* "auto|cpu|cuda" as "auto, cpu or cuda" */
static void words_text(const char *words, char *out, size_t cap) {
    size_t len = 0;
    out[0] = 0;
    for (const char *p = words; *p && len + 1 < cap;) {
        size_t k = strcspn(p, "|");
        bool last = p[k] == 0;
        int w = snprintf(out + len, cap - len, "%s%.*s",
                         p == words ? ""
                         : last     ? " or "
                                    : ", ",
                         (int)k, p);
        len += w > 0 ? (size_t)w : 0;
        p += k + !last;
    }
}

static int bool_of(const char *text) {
    static const char *const yes[] = {"1", "true", "yes", "on"}, *const no[] = {"0", "false", "no",
                                                                                "off", ""};
    for (size_t i = 0; i < sizeof yes / sizeof *yes; i++)
        if (!strcasecmp(text, yes[i]))
            return 1;
    for (size_t i = 0; i < sizeof no / sizeof *no; i++)
        if (!strcasecmp(text, no[i]))
            return 0;
    return -1;
}

/* Fill x->number (or is_word) from text. */
static qie_status parse_number(const cli_option *o, const char *where, const char *text,
                               cli_value *x, qie_error *err) {
    x->is_word = o->words && in_words(o->words, text);
    if (x->is_word)
        return QIE_OK;
    char alternative[64] = "", *end;
    if (o->words)
        snprintf(alternative, sizeof alternative, " or \"%s\"", o->words);
    errno = 0;
    if (o->kind == CLI_INT) {
        long long k = strtoll(text, &end, 10);
        /* strtoll skips blanks, which a value never starts with on purpose. */
        QIE_FAIL_IF(end == text || *end || text[0] == ' ' || text[0] == '\t', QIE_E_INVALID, err,
                    where, "%s: '%s' is not an integer%s", where, text, alternative);
        QIE_FAIL_IF(errno == ERANGE || (double)k < o->min || (double)k > o->max, QIE_E_INVALID, err,
                    where, "%s: %s is not within %.0f..%.0f", where, text, o->min, o->max);
        x->number = (double)k;
    } else {
        x->number = strtod(text, &end);
        QIE_FAIL_IF(end == text || *end || text[0] == ' ' || text[0] == '\t' ||
                        !isfinite(x->number) || strpbrk(text, "xXpP"),
                    QIE_E_INVALID, err, where, "%s: '%s' is not a number%s", where, text,
                    alternative);
        QIE_FAIL_IF(x->number < o->min || x->number > o->max, QIE_E_INVALID, err, where,
                    "%s: %s is not within %g..%g", where, text, o->min, o->max);
    }
    return QIE_OK;
}

qie_status cli_set(cli_values *v, cli_option_id id, cli_source source, const char *where,
                   const char *text, qie_error *err) {
    const cli_option *o = &CLI_OPTIONS[id];
    cli_value *x = &v->own[id], fresh = {.source = source};
    if (x->source > source)
        return QIE_OK;
    if (o->kind == CLI_FLAG) {
        int b = bool_of(text);
        QIE_FAIL_IF(b < 0, QIE_E_INVALID, err, where, "%s: '%s' is neither true nor false", where,
                    text);
        fresh.on = b == 1;
    } else if (o->kind == CLI_CHOICE && !in_words(o->words, text)) {
        char words[128];
        words_text(o->words, words, sizeof words);
        return qie_fail(err, QIE_E_INVALID, where, "%s: '%s' is not %s", where, text, words);
    } else if (o->kind == CLI_INT || o->kind == CLI_REAL)
        QIE_TRY(parse_number(o, where, text, &fresh, err));
    bool append = (o->traits & CLI_REPEAT) && x->source == source;
    char *copy = strdup(text);
    char **texts = realloc(x->texts, (append ? x->n + 1 : x->n ? x->n : 1) * sizeof *texts);
    if (texts)
        x->texts = texts;
    if (!copy || !texts) {
        free(copy);
        return qie_fail(err, QIE_E_NO_MEMORY, where, "out of memory");
    }
    for (; !append && x->n > 0; x->n--)
        free(texts[x->n - 1]);
    texts[x->n] = copy;
    fresh.texts = texts;
    fresh.n = x->n + 1;
    *x = fresh;
    return QIE_OK;
}

/* ---------------------------------------------------------------- names */

static size_t distance(const char *a, const char *b) {
    size_t row[64], nb = strlen(b);
    if (nb >= sizeof row / sizeof *row || strlen(a) >= sizeof row / sizeof *row)
        return 99;
    for (size_t j = 0; j <= nb; j++)
        row[j] = j;
    for (size_t i = 1; a[i - 1]; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[nb];
}

const char *cli_nearest(const char *name, const char *(*next)(void *state), void *state) {
    const char *best = NULL, *candidate;
    size_t best_distance = 99, n = strlen(name);
    while ((candidate = next(state))) {
        size_t d = distance(name, candidate);
        /* Half a name ("--neg", "--true-cfg") is a more likely slip than a similar word. */
        if (n >= 3 && !strncmp(candidate, name, n))
            d = 1;
        if (d < best_distance) {
            best = candidate;
            best_distance = d;
        }
    }
    return best_distance <= (n <= 3 ? 1 : n <= 6 ? 2 : 3) ? best : NULL;
}

typedef struct name_walk {
    unsigned commands, traits;
    int i;
} name_walk;

static const char *next_option_name(void *state) {
    name_walk *w = state;
    while (w->i < OPT_COUNT) {
        const cli_option *o = &CLI_OPTIONS[w->i++];
        if ((o->commands & w->commands) && (o->traits & w->traits) == w->traits)
            return o->name;
    }
    return NULL;
}

/* " (did you mean '--steps'?)" or "". */
static const char *suggestion(const char *name, const char *dashes, unsigned commands,
                              unsigned traits, char *out, size_t cap) {
    name_walk w = {.commands = commands, .traits = traits};
    const char *near = cli_nearest(name, next_option_name, &w);
    out[0] = 0;
    if (near)
        snprintf(out, cap, " (did you mean '%s%s'?)", dashes, near);
    return out;
}

static int find_by_name(const char *name, size_t n, unsigned commands) {
    for (int i = 0; i < OPT_COUNT; i++)
        if ((CLI_OPTIONS[i].commands & commands) && strlen(CLI_OPTIONS[i].name) == n &&
            !strncmp(CLI_OPTIONS[i].name, name, n))
            return i;
    return -1;
}

const cli_command *cli_command_find(const char *name) {
    for (const cli_command *c = CLI_COMMANDS; c->name; c++)
        if (!strcmp(c->name, name))
            return c;
    return NULL;
}

/* ---------------------------------------------------------------- arguments */

typedef struct argument_reader {
    cli_values *values;
    const cli_command *command;
    int argc, at;
    char **argv;
} argument_reader;

/* The argument of an option: the word behind it. A known long flag in its place is a forgotten
 * argument. */
static qie_status take_argument(argument_reader *r, const char *where, const cli_option *o,
                                const char **text, qie_error *err) {
    const char *next = r->at < r->argc ? r->argv[r->at] : NULL;
    bool is_flag = next && !strncmp(next, "--", 2) && next[2] &&
                   find_by_name(next + 2, strcspn(next + 2, "="), r->command->bit) >= 0;
    QIE_FAIL_IF(!next || is_flag, QIE_E_USAGE, err, where, "%s needs an argument: %s %s", where,
                where, o->argument);
    *text = next;
    r->at++;
    return QIE_OK;
}

static qie_status read_long(argument_reader *r, const char *word, qie_error *err) {
    const char *name = word + 2, *equals = strchr(name, '='), *text = "true";
    size_t n = equals ? (size_t)(equals - name) : strlen(name);
    char where[64];
    snprintf(where, sizeof where, "--%.*s", (int)(n < 60 ? n : 60), name);
    int id = find_by_name(name, n, r->command->bit);
    if (id < 0 && !strncmp(name, "no-", 3)) {
        id = find_by_name(name + 3, n - 3, r->command->bit);
        if (id >= 0 && !(CLI_OPTIONS[id].traits & CLI_NEGATABLE))
            id = -1;
        text = "false";
    }
    if (id < 0) {
        char hint[96];
        return qie_fail(err, QIE_E_USAGE, where, "unknown flag '%s' of '%s'%s", where,
                        r->command->name,
                        suggestion(where + 2, "--", r->command->bit, 0, hint, sizeof hint));
    }
    const cli_option *o = &CLI_OPTIONS[id];
    if (o->kind == CLI_FLAG)
        QIE_FAIL_IF(equals, QIE_E_USAGE, err, where, "%s takes no argument", where);
    else if (equals)
        text = equals + 1;
    else
        QIE_TRY(take_argument(r, where, o, &text, err));
    return cli_set(r->values, (cli_option_id)id, FROM_FLAG, where, text, err);
}

/* "-s 8", "-s8", "-qv" */
static qie_status read_letters(argument_reader *r, const char *word, qie_error *err) {
    for (const char *p = word + 1; *p; p++) {
        int id = 0;
        while (id < OPT_COUNT &&
               !(CLI_OPTIONS[id].letter == *p && (CLI_OPTIONS[id].commands & r->command->bit)))
            id++;
        char where[64] = {'-', *p, 0};
        QIE_FAIL_IF(id == OPT_COUNT, QIE_E_USAGE, err, where, "unknown flag '%s' of '%s'", where,
                    r->command->name);
        const cli_option *o = &CLI_OPTIONS[id];
        snprintf(where, sizeof where, "-%c/--%s", *p, o->name);
        const char *text = "true";
        if (o->kind != CLI_FLAG) {
            if (p[1])
                text = p + 1;
            else
                QIE_TRY(take_argument(r, where, o, &text, err));
        }
        QIE_TRY(cli_set(r->values, (cli_option_id)id, FROM_FLAG, where, text, err));
        if (o->kind != CLI_FLAG)
            break;
    }
    return QIE_OK;
}

qie_status cli_parse_arguments(cli_values *v, const cli_command *command, int argc, char **argv,
                               qie_error *err) {
    argument_reader r = {.values = v, .command = command, .argc = argc, .argv = argv};
    bool only_args = false;
    v->args = argv; /* positional words are gathered at the front of argv itself */
    while (r.at < argc) {
        char *word = argv[r.at++];
        if (only_args || word[0] != '-' || !word[1])
            argv[v->n_args++] = word;
        else if (!strcmp(word, "--"))
            only_args = true;
        else
            QIE_TRY(word[1] == '-' ? read_long(&r, word, err) : read_letters(&r, word, err));
    }
    return QIE_OK;
}

/* ---------------------------------------------------------------- environment */

qie_status cli_parse_environment(cli_values *v, const cli_command *command, qie_error *err) {
    for (int id = 0; id < OPT_COUNT; id++) {
        const cli_option *o = &CLI_OPTIONS[id];
        if (!o->env || !(o->commands & command->bit))
            continue;
        for (const char *p = o->env; *p;) {
            size_t n = strcspn(p, ",");
            char name[64], text[4096];
            snprintf(name, sizeof name, "%.*s", (int)n, p);
            p += n + (p[n] == ',');
            const char *value = getenv(name);
            if (!value || !*value || v->own[id].source >= FROM_ENVIRONMENT)
                continue;
            if (o->env_value) {
                int b = bool_of(value);
                QIE_FAIL_IF(b < 0, QIE_E_INVALID, err, name, "%s: '%s' is neither 1 nor 0", name,
                            value);
                if (b)
                    QIE_TRY(
                        cli_set(v, (cli_option_id)id, FROM_ENVIRONMENT, name, o->env_value, err));
                continue;
            }
            if (strncmp(name, "QWEN_EDIT_", 10) != 0) {
                /* Variables of other programs: OMP_NUM_THREADS may be a list ("4,2"), and what we
                 * cannot read there is no reason to refuse an edit. */
                snprintf(text, sizeof text, "%.*s", (int)strcspn(value, ","), value);
                qie_error ignored;
                if (cli_set(v, (cli_option_id)id, FROM_ENVIRONMENT, name, text, &ignored) != QIE_OK)
                    qie_log(QIE_LOG_WARN, "cli", "%s; ignored", ignored.message);
                continue;
            }
            QIE_TRY(cli_set(v, (cli_option_id)id, FROM_ENVIRONMENT, name, value, err));
        }
    }
    return QIE_OK;
}

/* ---------------------------------------------------------------- config file */

static char *trim(char *s) {
    s += strspn(s, " \t\r");
    size_t n = strlen(s);
    while (n && strchr(" \t\r", s[n - 1]))
        s[--n] = 0;
    /* Quotes keep blanks: negative = " " */
    if (n >= 2 && s[0] == '"' && s[n - 1] == '"') {
        s[n - 1] = 0;
        s++;
    }
    return s;
}

static qie_status read_config_line(cli_values *v, const cli_command *command, const char *path,
                                   int line_no, char *line, qie_error *err) {
    char *start = line + strspn(line, " \t\r");
    if (!*start || *start == '#')
        return QIE_OK;
    char *equals = strchr(start, '=');
    QIE_FAIL_IF(!equals, QIE_E_SYNTAX, err, path, "%s:%d: expected \"name = value\"", path,
                line_no);
    *equals = 0;
    char *name = trim(start), *text = trim(equals + 1), hint[96], where[256];
    int id = find_by_name(name, strlen(name), CMD_ALL);
    if (id < 0 || !(CLI_OPTIONS[id].traits & CLI_IN_CONFIG))
        return qie_fail(err, QIE_E_INVALID, path, "%s:%d: unknown setting '%s'%s", path, line_no,
                        name, suggestion(name, "", CMD_ALL, CLI_IN_CONFIG, hint, sizeof hint));
    if (!(CLI_OPTIONS[id].commands & command->bit))
        return QIE_OK;
    snprintf(where, sizeof where, "%s:%d: %s", path, line_no, name);
    return cli_set(v, (cli_option_id)id, FROM_CONFIG, where, text, err);
}

/* Path of the config file, new string; NULL if none is to be read. */
static char *config_path(const cli_values *v, bool *named) {
    const char *given = cli_text(v, OPT_CONFIG, NULL), *base = getenv("XDG_CONFIG_HOME"),
               *home = getenv("HOME");
    char *path = NULL;
    *named = given != NULL;
    if (given)
        return strdup(given);
    if (base && *base == '/') {
        if (asprintf(&path, "%s/qwen-edit/config", base) < 0)
            path = NULL;
    } else if (home && *home) {
        if (asprintf(&path, "%s/.config/qwen-edit/config", home) < 0)
            path = NULL;
    }
    if (path && !qie_file_exists(path)) {
        free(path);
        path = NULL;
    }
    return path;
}

qie_status cli_parse_config(cli_values *v, const cli_command *command, qie_error *err) {
    bool named;
    char *path = config_path(v, &named);
    if (!path)
        return QIE_OK;
    unsigned char *text = NULL;
    size_t n;
    qie_status st = qie_file_read(path, CONFIG_MAX_BYTES, &text, &n, err);
    int line_no = 0;
    char *rest = (char *)text, *line;
    while (st == QIE_OK && (line = strsep(&rest, "\n")))
        st = read_config_line(v, command, path, ++line_no, line, err);
    free(text);
    free(path);
    return st;
}

/* ---------------------------------------------------------------- fields of a batch line */

typedef struct field_walk {
    cli_values *values;
    qie_error *err;
    qie_status st;
} field_walk;

static const char *next_field_name(void *state) {
    name_walk *w = state;
    while (w->i < OPT_COUNT) {
        const char *field = CLI_OPTIONS[w->i++].field;
        if (field)
            return field;
    }
    return NULL;
}

static qie_status set_text_field(field_walk *w, cli_option_id id, const char *key,
                                 const qie_json *value) {
    size_t n;
    const char *text = qie_json_string(value, &n);
    QIE_FAIL_IF(!text, QIE_E_INVALID, w->err, key, "'%s' must be a string", key);
    QIE_FAIL_IF(strlen(text) != n, QIE_E_INVALID, w->err, key, "'%s' contains a NUL character",
                key);
    return cli_set(w->values, id, FROM_REQUEST, key, text, w->err);
}

/* {"name": FILE, "weight": NUMBER}, as in the service. */
static qie_status set_lora_field(field_walk *w, const char *key, const qie_json *value) {
    const char *name;
    double weight;
    char text[4200];
    QIE_TRY(qie_json_get_string(value, "name", NULL, &name, w->err));
    QIE_TRY(qie_json_get_double(value, "weight", 1, &weight, w->err));
    QIE_FAIL_IF(!name || !*name || strlen(name) > 4095, QIE_E_INVALID, w->err, key,
                "'%s' must hold objects with a 'name' and a 'weight'", key);
    snprintf(text, sizeof text, "%s:%.9g", name, weight);
    return cli_set(w->values, OPT_LORA, FROM_REQUEST, key, text, w->err);
}

static qie_status set_field(field_walk *w, const char *key, const qie_json *value) {
    int id = 0;
    while (id < OPT_COUNT && !(CLI_OPTIONS[id].field && in_words(CLI_OPTIONS[id].field, key)))
        id++;
    if (id == OPT_COUNT) {
        name_walk names = {0};
        const char *near = cli_nearest(key, next_field_name, &names);
        return qie_fail(w->err, QIE_E_INVALID, key, "unknown field '%s'%s%.*s%s", key,
                        near ? " (did you mean '" : "", near ? (int)strcspn(near, "|") : 0,
                        near ? near : "", near ? "'?)" : "");
    }
    const cli_option *o = &CLI_OPTIONS[id];
    cli_option_id oid = (cli_option_id)id;
    if ((o->traits & CLI_REPEAT) && qie_json_is_array(value)) {
        QIE_FAIL_IF(qie_json_size(value) == 0, QIE_E_INVALID, w->err, key, "'%s' is an empty array",
                    key);
        for (size_t i = 0; i < qie_json_size(value); i++)
            QIE_TRY(oid == OPT_LORA && qie_json_is_object(qie_json_at(value, i))
                        ? set_lora_field(w, key, qie_json_at(value, i))
                        : set_text_field(w, oid, key, qie_json_at(value, i)));
        return QIE_OK;
    }
    char number[40];
    switch (o->kind) {
    case CLI_TEXT:
    case CLI_CHOICE: return set_text_field(w, oid, key, value);
    case CLI_FLAG:
        QIE_FAIL_IF(!qie_json_is_bool(value), QIE_E_INVALID, w->err, key,
                    "'%s' must be true or false", key);
        return cli_set(w->values, oid, FROM_REQUEST, key, qie_json_bool(value) ? "true" : "false",
                       w->err);
    case CLI_INT:
    case CLI_REAL: break;
    }
    if (o->words && qie_json_is_string(value) && in_words(o->words, qie_json_string(value, NULL)))
        return set_text_field(w, oid, key, value);
    QIE_FAIL_IF(!qie_json_is_number(value) || (o->kind == CLI_INT && !qie_json_is_integer(value)),
                QIE_E_INVALID, w->err, key, "'%s' must be %s", key,
                o->kind == CLI_INT ? "an integer" : "a number");
    if (qie_json_is_integer(value))
        snprintf(number, sizeof number, "%lld", (long long)qie_json_integer(value));
    else
        snprintf(number, sizeof number, "%.17g", qie_json_number(value));
    return cli_set(w->values, oid, FROM_REQUEST, key, number, w->err);
}

qie_status cli_parse_field(cli_values *v, const char *key, const qie_json *value, qie_error *err) {
    field_walk w = {.values = v, .err = err, .st = QIE_OK};
    return set_field(&w, key, value);
}

static bool visit_field(void *arg, const char *key, qie_json *value) {
    field_walk *w = arg;
    /* null is "not given", as in the service. */
    if (qie_json_is_object(value) || qie_json_is_array(value) || qie_json_is_string(value) ||
        qie_json_is_number(value) || qie_json_is_bool(value))
        w->st = set_field(w, key, value);
    return w->st == QIE_OK;
}

qie_status cli_parse_fields(cli_values *v, const qie_json *object, qie_error *err) {
    QIE_FAIL_IF(!qie_json_is_object(object), QIE_E_INVALID, err, "line",
                "a JSON object is expected");
    field_walk w = {.values = v, .err = err, .st = QIE_OK};
    qie_json_each(object, visit_field, &w);
    return w.st;
}
