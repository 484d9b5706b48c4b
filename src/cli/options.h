/* Everything that a user can set, in one table, and where a value came from.
 *
 * The table makes the parser, the environment and config-file readers, the fields of a --batch
 * line, `--help`, the man page and the completions; tools/check_docs.py holds docs/CLI.md against
 * it. Precedence: field of a batch line > flag > environment > config file; what nobody set is the
 * model's or the program's default. */
#ifndef QIE_CLI_OPTIONS_H
#define QIE_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/json.h"
#include "qie/error.h"

typedef enum cli_option_id {
    OPT_IMAGE = 0,
    OPT_PROMPT,
    OPT_PROMPT_FILE,
    OPT_OUTPUT,
    OPT_BATCH,
    OPT_SERVER,
    OPT_NEGATIVE,
    OPT_SEED,
    OPT_FORCE_SEED,
    OPT_STEPS,
    OPT_TRUE_CFG_SCALE,
    OPT_GUIDANCE_SCALE,
    OPT_NUM_IMAGES,
    OPT_MAX_SIDE,
    OPT_WIDTH,
    OPT_HEIGHT,
    OPT_REF_AREA,
    OPT_KEEP_SIZE,
    OPT_OUTPUT_FORMAT,
    OPT_QUALITY,
    OPT_PREVIEW,
    OPT_DRY_RUN,
    OPT_NO_METADATA,
    OPT_MODEL,
    OPT_TRANSFORMER,
    OPT_TEXT_ENCODER,
    OPT_MMPROJ,
    OPT_VAE,
    OPT_VARIANT,
    OPT_DEVICE,
    OPT_PRECISION,
    OPT_THREADS,
    OPT_NICE,
    OPT_MEMORY_LIMIT,
    OPT_LORA,
    OPT_LORA_DIR,
    OPT_SCHEDULE,
    OPT_CACHE,
    OPT_LOCAL_DIR,
    OPT_REVISION,
    OPT_INCLUDE,
    OPT_EXCLUDE,
    OPT_ENDPOINT,
    OPT_CACHE_DIR,
    OPT_JOBS,
    OPT_RETRIES,
    OPT_RECHECK,
    OPT_NO_HASH,
    OPT_DETACHED,
    OPT_YES,
    OPT_HEADROOM,
    OPT_HOST,
    OPT_PORT,
    OPT_API_PORT,
    OPT_GPUS,
    OPT_WORKERS,
    OPT_STATE_DIR,
    OPT_OUTPUT_DIR,
    OPT_API_KEY,
    OPT_API_KEY_FILE,
    OPT_CORS_ORIGIN,
    OPT_TRUSTED_PROXY,
    OPT_QUEUE_SIZE,
    OPT_MAX_IMAGES,
    OPT_MAX_CONNECTIONS,
    OPT_MAX_BODY_MEMORY,
    OPT_SYNC_TIMEOUT,
    OPT_KEEP,
    OPT_KEEP_WEIGHTS, /* the flag --keep of quantize: another one than that of serve */
    OPT_TO,
    OPT_IMPORTANCE,
    OPT_COLLECT_IMPORTANCE,
    OPT_HANG_LIMIT,
    OPT_NO_IMAGE_URL,
    OPT_ALLOW_URL_CIDR,
    OPT_REJECT_WHILE_LOADING,
    OPT_LOG_FORMAT,
    OPT_WORKER_PROGRAM,
    OPT_REPEATS,
    OPT_REFERENCES,
    OPT_ONLY,
    OPT_COLD,
    OPT_NO_OPS,
    OPT_NO_ROOF,
    OPT_QUIET,
    OPT_VERBOSE,
    OPT_JSON,
    OPT_CONFIG,
    OPT_HELP,
    OPT_VERSION,
    OPT_MAN,
    OPT_COMPLETIONS,
    OPT_BACKEND,
    OPT_POSITIONS,
    OPT_NOISE,
    OPT_INJECT,
    OPT_COUNT
} cli_option_id;

typedef enum cli_kind {
    CLI_FLAG, /* no argument; true or false in a file */
    CLI_TEXT,
    CLI_INT,
    CLI_REAL,
    CLI_CHOICE
} cli_kind;

typedef enum cli_group {
    GROUP_EDIT = 0,
    GROUP_HUB,
    GROUP_SERVICE,
    GROUP_BENCH,
    GROUP_QUANTIZE,
    GROUP_SIZE,
    GROUP_OUTPUT,
    GROUP_MACHINE,
    GROUP_GENERAL,
    GROUP_DEVELOPER,
    GROUP_COUNT
} cli_group;

#define CMD_EDIT (1u << 0)
#define CMD_INFO (1u << 1)
#define CMD_HELP (1u << 2)
#define CMD_PULL (1u << 3)
#define CMD_VERIFY (1u << 4)
#define CMD_DOCTOR (1u << 5)
#define CMD_LIST (1u << 6)
#define CMD_RM (1u << 7)
#define CMD_PRUNE (1u << 8)
#define CMD_BENCH (1u << 9)
#define CMD_QUANTIZE (1u << 11)
#define CMD_SERVE (1u << 16)
#define CMD_WORKER (1u << 17)
#define CMD_SERVICE (CMD_SERVE | CMD_WORKER)
#define CMD_CACHE (CMD_LIST | CMD_RM | CMD_PRUNE)
#define CMD_EVENTS                                  \
    (CMD_EDIT | CMD_PULL | CMD_VERIFY | CMD_BENCH | \
     CMD_QUANTIZE) /* long work: progress, several threads */
#define CMD_ALL                                                                          \
    (CMD_SERVICE | CMD_EDIT | CMD_INFO | CMD_HELP | CMD_PULL | CMD_VERIFY | CMD_DOCTOR | \
     CMD_CACHE | CMD_BENCH | CMD_QUANTIZE)

#define CLI_REPEAT (1u << 0)    /* may be given more than once; all values count */
#define CLI_IN_CONFIG (1u << 1) /* may stand in the config file, under its name */
#define CLI_NEGATABLE (1u << 2) /* --no-NAME exists */
#define CLI_IS_FILE (1u << 3)   /* completed with file names */

typedef struct cli_option {
    const char *name;     /* long name without dashes; also the key in the config file */
    char letter;          /* short name or 0 */
    const char *argument; /* how help calls the argument; NULL for CLI_FLAG */
    cli_kind kind;
    double min, max;   /* CLI_INT, CLI_REAL */
    const char *words; /* "a|b": the choices, or words allowed besides a number */
    const char *env;   /* "FIRST,SECOND": variables that set it; NULL */
    const char
        *env_value;    /* not NULL: a true variable sets this value (QWEN_EDIT_FORCE_CPU -> cpu) */
    const char *field; /* "name|alias": field of a batch line as in POST /edit; NULL */
    const char *def;   /* the default in words; NULL: none */
    const char *help;
    cli_group group;
    unsigned commands; /* CMD_* that take it */
    unsigned traits;   /* CLI_REPEAT ... */
} cli_option;

extern const cli_option CLI_OPTIONS[OPT_COUNT];
extern const char *const CLI_GROUP_TITLES[GROUP_COUNT];

/* Variables that are read elsewhere than through an option; ended by a NULL name. */
typedef struct cli_variable {
    const char *name, *help;
} cli_variable;
extern const cli_variable CLI_VARIABLES[];

struct cli_values;
typedef struct cli_command {
    const char *name;
    unsigned bit; /* CMD_* */
    const char *synopsis, *summary, *description;
    /* A failure with an empty `err` has been reported already. */
    qie_status (*run)(struct cli_values *values, qie_error *err);
} cli_command;
extern const cli_command CLI_COMMANDS[]; /* ended by a NULL name */
const cli_command *cli_command_find(const char *name);

typedef enum cli_source {
    FROM_NOWHERE = 0,
    FROM_CONFIG,
    FROM_ENVIRONMENT,
    FROM_FLAG,
    FROM_REQUEST
} cli_source;

typedef struct cli_value {
    cli_source source;
    char **texts; /* owned */
    size_t n;
    bool on;       /* CLI_FLAG */
    bool is_word;  /* a word of `words` stood where a number may stand */
    double number; /* CLI_INT, CLI_REAL */
} cli_value;

/* A set of values; what it lacks is looked up in `parent` (a batch line over the command line). */
typedef struct cli_values {
    const struct cli_values *parent;
    cli_value own[OPT_COUNT];
    char **args; /* positional; borrowed from argv */
    size_t n_args;
} cli_values;

void cli_values_release(cli_values *v);

/* The value in force; its source is FROM_NOWHERE if nobody set it. Never NULL. */
const cli_value *cli_get(const cli_values *v, cli_option_id id);
bool cli_is_set(const cli_values *v, cli_option_id id);
/* Last text given, or def. */
const char *cli_text(const cli_values *v, cli_option_id id, const char *def);
double cli_number(const cli_values *v, cli_option_id id, double def);
bool cli_on(const cli_values *v, cli_option_id id);

/* Check and keep one value. `where` is how messages call it ("--steps", "QWEN_EDIT_INPUT"). A value
 * of a weaker source than the one present is ignored. Errors: QIE_E_INVALID, with `where` as param.
 */
qie_status cli_set(cli_values *v, cli_option_id id, cli_source source, const char *where,
                   const char *text, qie_error *err);

/* argv[0] is the first argument after the command. Errors: QIE_E_USAGE, QIE_E_INVALID. */
qie_status cli_parse_arguments(cli_values *v, const cli_command *command, int argc, char **argv,
                               qie_error *err);
qie_status cli_parse_environment(cli_values *v, const cli_command *command, qie_error *err);
/* --config FILE, else $XDG_CONFIG_HOME/qwen-edit/config if it is there. */
qie_status cli_parse_config(cli_values *v, const cli_command *command, qie_error *err);
/* One field of a request, by the name that the table gives it. Errors name the field. */
qie_status cli_parse_field(cli_values *v, const char *key, const qie_json *value, qie_error *err);
/* All members of an object, which must be such fields; null counts as absent. */
qie_status cli_parse_fields(cli_values *v, const qie_json *object, qie_error *err);

/* Nearest of the names that `next` yields one by one (NULL at the end), or NULL if none is near. */
const char *cli_nearest(const char *name, const char *(*next)(void *state), void *state);

/* Texts made from the table. command NULL: of the whole program. */
void cli_print_help(FILE *to, const cli_command *command);
void cli_print_man(FILE *to);
/* shell: "bash" or "zsh"; false for another one. */
bool cli_print_completions(FILE *to, const char *shell);

#endif
