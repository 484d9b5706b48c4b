/* The option table and its readers: arguments, environment, config file, fields of a batch line. */
#define _GNU_SOURCE
#include <unistd.h>

#include "base/fs.h"
#include "base/log.h"
#include "cli/options.h"
#include "qtest.h"

#define MAX_WORDS 24

/* Parse a line of words as arguments of `edit`. */
static qie_status parse(cli_values *v, qie_error *e, const char *const *words) {
    static char *argv[MAX_WORDS];
    int n = 0;
    memset(v, 0, sizeof *v);
    for (; words[n]; n++)
        argv[n] = (char *)(uintptr_t)words[n];
    return cli_parse_arguments(v, cli_command_find("edit"), n, argv, e);
}
#define PARSE(v, e, ...) parse(v, e, (const char *const[]){__VA_ARGS__, NULL})

QTEST(test_options_table_is_consistent) {
    for (int i = 0; i < OPT_COUNT; i++) {
        const cli_option *o = &CLI_OPTIONS[i];
        ASSERT(o->name && o->help && o->commands);
        ASSERT((o->argument == NULL) == (o->kind == CLI_FLAG));
        ASSERT(o->kind != CLI_CHOICE || o->words);
        ASSERT((o->kind != CLI_INT && o->kind != CLI_REAL) || o->max > o->min);
        for (int j = 0; j < i; j++) {
            const cli_option *p = &CLI_OPTIONS[j];
            /* One name may mean two things of two commands; the config file knows one of them. */
            ASSERT(strcmp(o->name, p->name) != 0 ||
                   (!(o->commands & p->commands) && !(o->traits & CLI_IN_CONFIG)));
            ASSERT(!o->letter || o->letter != CLI_OPTIONS[j].letter);
        }
    }
}

QTEST(test_arguments_all_forms_are_read) {
    cli_values v;
    qie_error e;
    ASSERT_OK(PARSE(&v, &e, "-i", "a.png", "--image=b.png", "-s8", "--true-cfg-scale", "2.5", "-qv",
                    "word", "--", "-x"));
    ASSERT_INT(cli_get(&v, OPT_IMAGE)->n, 2);
    ASSERT_STR(cli_get(&v, OPT_IMAGE)->texts[0], "a.png");
    ASSERT_STR(cli_get(&v, OPT_IMAGE)->texts[1], "b.png");
    ASSERT_INT(cli_number(&v, OPT_STEPS, 0), 8);
    ASSERT(cli_number(&v, OPT_TRUE_CFG_SCALE, 0) >= 2.5 &&
           cli_number(&v, OPT_TRUE_CFG_SCALE, 0) <= 2.5);
    ASSERT(cli_on(&v, OPT_QUIET) && cli_on(&v, OPT_VERBOSE));
    ASSERT_INT(v.n_args, 2);
    ASSERT_STR(v.args[1], "-x");
    cli_values_release(&v);
}

QTEST(test_arguments_last_of_a_single_value_wins) {
    cli_values v;
    qie_error e;
    ASSERT_OK(PARSE(&v, &e, "-s", "8", "-s", "9", "--no-keep-size", "-S", "7", "-S", "random"));
    ASSERT_INT(cli_number(&v, OPT_STEPS, 0), 9);
    ASSERT(cli_is_set(&v, OPT_KEEP_SIZE) && !cli_on(&v, OPT_KEEP_SIZE));
    ASSERT(cli_get(&v, OPT_SEED)->is_word);
    cli_values_release(&v);
}

QTEST(test_arguments_wrong_are_refused_by_name) {
    static const struct {
        const char *words[3];
        qie_status status;
        const char *message;
    } cases[] = {
        {{"--stpes", "3"}, QIE_E_USAGE, "did you mean '--steps'"},
        {{"--neg", "x"}, QIE_E_USAGE, "did you mean '--negative'"},
        {{"--mask", "x"}, QIE_E_USAGE, "unknown flag '--mask'"},
        {{"-Z"}, QIE_E_USAGE, "unknown flag '-Z'"},
        {{"-s"}, QIE_E_USAGE, "-s/--steps needs an argument"},
        {{"-p", "--output"}, QIE_E_USAGE, "-p/--prompt needs an argument"},
        {{"--json=1"}, QIE_E_USAGE, "--json takes no argument"},
        {{"--no-json"}, QIE_E_USAGE, "unknown flag '--no-json'"},
        {{"-s", "0"}, QIE_E_INVALID, "-s/--steps: 0 is not within 1..200"},
        {{"-s", "99999999999999999999"}, QIE_E_INVALID, "is not within 1..200"},
        {{"-s", "8x"}, QIE_E_INVALID, "'8x' is not an integer"},
        {{"-s", ""}, QIE_E_INVALID, "'' is not an integer"},
        {{"-s", " 8"}, QIE_E_INVALID, "' 8' is not an integer"},
        {{"-S", "-1"}, QIE_E_INVALID, "-S/--seed: -1 is not within 0..9007199254740991"},
        {{"-S", "soon"}, QIE_E_INVALID, "or \"random\""},
        {{"--true-cfg-scale", "nan"}, QIE_E_INVALID, "is not a number"},
        {{"--true-cfg-scale", "0x4"}, QIE_E_INVALID, "is not a number"},
        {{"--true-cfg-scale", "20.5"}, QIE_E_INVALID, "is not within 0..20"},
        {{"--max-side", "63"}, QIE_E_INVALID, "is not within 64..4096"},
        {{"--device", "gpu"}, QIE_E_INVALID, "'gpu' is not auto, cpu or cuda"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cli_values v;
        qie_error e = {0};
        qie_status st = parse(&v, &e, cases[i].words);
        ASSERT_INT(st, cases[i].status);
        ASSERT_CONTAINS(e.message, cases[i].message);
        cli_values_release(&v);
    }
}

QTEST(test_environment_weaker_than_flag_stronger_than_config) {
    cli_values v;
    qie_error e;
    char path[] = "/tmp/qie-config-XXXXXX";
    int fd = mkstemp(path);
    ASSERT(fd >= 0);
    close(fd);
    const char *text =
        "# settings\n\n threads = 3 \nprecision=f32\r\nnegative = \" \"\nmodel = /from/config\n"
        "keep-size = no\n";
    ASSERT_OK(qie_file_write_atomic(path, text, strlen(text), &e));
    setenv("QWEN_EDIT_MAX_CPU_THREADS", "5", 1);
    setenv("OMP_NUM_THREADS", "7,2", 1);
    setenv("QWEN_EDIT_2511_DIR", "/from/environment", 1);
    setenv("QWEN_EDIT_FORCE_CPU", "1", 1);
    ASSERT_OK(PARSE(&v, &e, "--config", path, "--model", "/from/flag"));
    ASSERT_OK(cli_parse_environment(&v, cli_command_find("edit"), &e));
    ASSERT_OK(cli_parse_config(&v, cli_command_find("edit"), &e));
    ASSERT_STR(cli_text(&v, OPT_MODEL, NULL), "/from/flag");
    ASSERT_INT(cli_number(&v, OPT_THREADS, 0), 5);
    ASSERT_STR(cli_text(&v, OPT_PRECISION, NULL), "f32");
    ASSERT_STR(cli_text(&v, OPT_NEGATIVE, NULL), " ");
    ASSERT_STR(cli_text(&v, OPT_DEVICE, NULL), "cpu");
    ASSERT(cli_is_set(&v, OPT_KEEP_SIZE) && !cli_on(&v, OPT_KEEP_SIZE));
    cli_values_release(&v);
    unsetenv("QWEN_EDIT_MAX_CPU_THREADS");
    ASSERT_OK(PARSE(&v, &e, "--config", path));
    ASSERT_OK(cli_parse_environment(&v, cli_command_find("edit"), &e));
    ASSERT_INT(cli_number(&v, OPT_THREADS, 0), 7); /* the first of OMP_NUM_THREADS' list */
    cli_values_release(&v);
    unsetenv("OMP_NUM_THREADS");
    unsetenv("QWEN_EDIT_2511_DIR");
    unsetenv("QWEN_EDIT_FORCE_CPU");
    unlink(path);
}

QTEST(test_environment_of_other_programs_is_no_reason_to_fail) {
    cli_values v;
    qie_error e;
    qie_log_set_sink(NULL, NULL);
    setenv("OMP_NUM_THREADS", "many", 1);
    setenv("QIE_LOG", "error", 1);
    ASSERT_OK(PARSE(&v, &e, "-q"));
    ASSERT_OK(cli_parse_environment(&v, cli_command_find("edit"), &e));
    ASSERT(!cli_is_set(&v, OPT_THREADS));
    setenv("QWEN_EDIT_MAX_CPU_THREADS", "many", 1);
    ASSERT_INT(cli_parse_environment(&v, cli_command_find("edit"), &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, "QWEN_EDIT_MAX_CPU_THREADS: 'many' is not an integer");
    cli_values_release(&v);
    unsetenv("OMP_NUM_THREADS");
    unsetenv("QWEN_EDIT_MAX_CPU_THREADS");
    unsetenv("QIE_LOG");
}

static qie_status config_of(const char *text, qie_error *e) {
    char path[] = "/tmp/qie-config-XXXXXX";
    int fd = mkstemp(path);
    if (fd >= 0)
        close(fd);
    cli_values v;
    qie_status st = qie_file_write_atomic(path, text, strlen(text), e);
    if (st == QIE_OK)
        st = PARSE(&v, e, "--config", path);
    if (st == QIE_OK)
        st = cli_parse_config(&v, cli_command_find("edit"), e);
    cli_values_release(&v);
    unlink(path);
    return st;
}

QTEST(test_config_wrong_lines_are_refused_with_their_number) {
    qie_error e = {0};
    ASSERT_OK(config_of("", &e));
    ASSERT_INT(config_of("steps = 4\nfoo = 1\n", &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, ":2: unknown setting 'foo'");
    ASSERT_INT(config_of("step = 4\n", &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, "did you mean 'steps'");
    ASSERT_INT(config_of("steps 4\n", &e), QIE_E_SYNTAX);
    ASSERT_INT(config_of("steps = four\n", &e), QIE_E_INVALID);
    ASSERT_CONTAINS(e.message, ":1: steps: 'four' is not an integer");
    ASSERT_INT(config_of("image = a.png\n", &e),
               QIE_E_INVALID); /* belongs to one edit, not to all */
}

static qie_status fields_of(cli_values *v, const char *json, qie_error *e) {
    qie_json *o = NULL;
    qie_status st = qie_json_parse(json, strlen(json), "test", &o, e);
    if (st == QIE_OK)
        st = cli_parse_fields(v, o, e);
    qie_json_free(o);
    return st;
}

QTEST(test_fields_override_the_command_line) {
    cli_values base, v = {.parent = &base};
    qie_error e;
    ASSERT_OK(PARSE(&base, &e, "-s", "8", "-i", "base.png", "--max-side", "128"));
    ASSERT_OK(
        fields_of(&v,
                  "{\"num_inference_steps\":3,\"images\":[\"a\",\"b\"],\"seed\":9007199254740991,"
                  "\"true_cfg_scale\":1,\"keep_size\":true,\"max_side\":\"none\",\"prompt\":null}",
                  &e));
    ASSERT_INT(cli_number(&v, OPT_STEPS, 0), 3);
    ASSERT_INT(cli_get(&v, OPT_IMAGE)->n, 2);
    ASSERT_INT(cli_number(&v, OPT_SEED, 0), 9007199254740991);
    ASSERT(cli_get(&v, OPT_MAX_SIDE)->is_word);
    ASSERT(cli_on(&v, OPT_KEEP_SIZE));
    ASSERT(!cli_is_set(&v, OPT_PROMPT));
    cli_values_release(&v);
    v.parent = &base;
    ASSERT_OK(fields_of(&v, "{}", &e));
    ASSERT_INT(cli_number(&v, OPT_STEPS, 0), 8);
    ASSERT_STR(cli_text(&v, OPT_IMAGE, NULL), "base.png");
    cli_values_release(&v);
    cli_values_release(&base);
}

QTEST(test_fields_wrong_are_refused_by_name) {
    static const char *const cases[][2] = {
        {"{\"sed\":1}", "unknown field 'sed' (did you mean 'seed'?)"},
        {"{\"image_url\":\"http://x\"}", "unknown field 'image_url'"},
        {"{\"seed\":\"1\"}", "'seed' must be an integer"},
        {"{\"seed\":1.5}", "'seed' must be an integer"},
        {"{\"seed\":-1}", "seed: -1 is not within"},
        {"{\"seed\":9007199254740992}", "seed: 9007199254740992 is not within"},
        {"{\"prompt\":4}", "'prompt' must be a string"},
        {"{\"prompt\":\"a\\u0000b\"}", "NUL"},
        {"{\"images\":[]}", "'images' is an empty array"},
        {"{\"images\":[1]}", "'images' must be a string"},
        {"{\"keep_size\":1}", "'keep_size' must be true or false"},
        {"[]", "a JSON object is expected"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cli_values base = {0}, v = {.parent = &base};
        qie_error e = {0};
        ASSERT(fields_of(&v, cases[i][0], &e) != QIE_OK);
        ASSERT_CONTAINS(e.message, cases[i][1]);
        cli_values_release(&v);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
