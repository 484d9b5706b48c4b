/* qwen-edit: finds the command, reads its values, runs it and turns its status into the exit code.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/ui.h"
#include "qie/edit.h"

static const char *next_command(void *state) {
    const cli_command **at = state;
    return (*at)->name ? (*at)++->name : NULL;
}

/* libgomp reads its settings before main runs, so the only way to give it ours is to start again.
 * Idle threads that spin would take whole cores from other programs; OMP_WAIT_POLICY in the
 * environment also ends the loop. Not for pull: its threads sleep of themselves, and to load the
 * program's libraries again takes as long as it takes to fetch ten MB. */
static void restart_with_passive_threads(char **argv) {
    char self[PATH_MAX];
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT"))
        return;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || setenv("OMP_WAIT_POLICY", "passive", 1))
        return;
    self[n] = 0;
    execv(self, argv); /* on failure go on as we are */
}

static qie_status run_command(const cli_command *command, cli_values *v, int argc, char **argv,
                              qie_error *err) {
    /* Even a wrong flag is told to a machine as it asked. */
    bool json = false;
    for (int i = 0; i < argc; i++)
        json = json || ((command->bit & CMD_EVENTS) && !strcmp(argv[i], "--json"));
    cli_ui_start(json, false);
    QIE_TRY(cli_parse_arguments(v, command, argc, argv, err));
    if (cli_on(v, OPT_HELP)) {
        cli_print_help(stdout, command);
        return QIE_OK;
    }
    if (cli_on(v, OPT_VERSION)) {
        printf("qwen-edit %s\n", qie_version());
        return QIE_OK;
    }
    QIE_TRY(cli_parse_environment(v, command, err));
    QIE_TRY(cli_parse_config(v, command, err));
    cli_ui_start(json, cli_on(v, OPT_QUIET));
    return command->run(v, err);
}

/* With --json a failure is an object on standard output too, so that its last line always tells the
 * outcome. */
static void print_error_json(const qie_error *error) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "error", cli_error_json(error));
    char *text = qie_json_text(o, 0);
    if (text)
        puts(text);
    free(text);
    qie_json_free(o);
}

static int unknown_word(const char *word) {
    const cli_command *at = CLI_COMMANDS;
    const char *near = word[0] == '-' ? NULL : cli_nearest(word, next_command, &at);
    qie_error e;
    qie_fail(&e, QIE_E_USAGE, "command", "unknown %s '%s'%s%s%s; see qwen-edit --help",
             word[0] == '-' ? "flag" : "command", word, near ? " (did you mean '" : "",
             near ? near : "", near ? "'?)" : "");
    cli_report(&e);
    return qie_status_exit_code(e.status);
}

/* Output that did not arrive (disk full, closed pipe) must not look like success. */
static int close_stdout(int code) {
    if ((fflush(stdout) || ferror(stdout)) && code == 0) {
        fprintf(stderr, "qwen-edit: error: cannot write to standard output: %s\n", strerror(errno));
        return qie_status_exit_code(QIE_E_IO);
    }
    return code;
}

int main(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : NULL;
    if (!word) {
        cli_print_help(stderr, NULL);
        return qie_status_exit_code(QIE_E_USAGE);
    }
    if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
        cli_print_help(stdout, NULL);
        return close_stdout(0);
    }
    if (!strcmp(word, "--version")) {
        printf("qwen-edit %s\n", qie_version());
        return close_stdout(0);
    }
    const cli_command *command = cli_command_find(word);
    if (!command)
        return unknown_word(word);
    if (command->bit & ((CMD_EVENTS & ~CMD_PULL) | CMD_WORKER))
        restart_with_passive_threads(argv);
    cli_values values = {0};
    qie_error error = {0};
    qie_status st = run_command(command, &values, argc - 2, argv + 2, &error);
    if (st != QIE_OK && error.status != QIE_OK) { /* else it was reported */
        cli_report(&error);
        if (cli_ui_is_json())
            print_error_json(&error);
    }
    cli_values_release(&values);
    return close_stdout(qie_status_exit_code(st));
}
