/* Texts made from the option table: --help, the manual page, completions. */
#define _GNU_SOURCE
#include <string.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "qie/edit.h"

#define TEXT_COLUMN 30
#define LINE_WIDTH 96

/* Write `text` broken at blanks; the cursor stands at `column`, further lines start at `indent`. */
static void print_wrapped(FILE *to, const char *text, int column, int indent) {
    bool first = true;
    for (const char *p = text; *p; p += strspn(p, " ")) {
        int n = (int)strcspn(p, " ");
        if (!first && column + 1 + n > LINE_WIDTH) {
            fprintf(to, "\n%*s", indent, "");
            column = indent;
            first = true;
        }
        fprintf(to, "%s%.*s", first ? "" : " ", n, p);
        column += n + !first;
        first = false;
        p += n;
    }
    fputc('\n', to);
}

/* "-s, --steps N" */
static int print_flag(FILE *to, const cli_option *o) {
    char letter[8] = "    ";
    if (o->letter)
        snprintf(letter, sizeof letter, "-%c, ", o->letter);
    return fprintf(to, "  %s--%s%s%s%s", letter, o->traits & CLI_NEGATABLE ? "[no-]" : "", o->name,
                   o->argument ? " " : "", o->argument ? o->argument : "");
}

/* Help, default and variables of an option as one sentence. */
static void option_text(const cli_option *o, char *out, size_t cap) {
    snprintf(out, cap, "%s%s%s%s%s%s%s%s", o->help,
             o->traits & CLI_REPEAT && !strstr(o->help, "repeatable") &&
                     !strstr(o->help, "each with")
                 ? "; repeatable"
                 : "",
             o->def ? " (default: " : "", o->def ? o->def : "", o->def ? ")" : "",
             o->env ? " [" : "", o->env ? o->env : "", o->env ? "]" : "");
}

static void print_options(FILE *to, const cli_command *command) {
    for (int g = 0; g < GROUP_COUNT; g++) {
        bool titled = false;
        for (int i = 0; i < OPT_COUNT; i++) {
            const cli_option *o = &CLI_OPTIONS[i];
            if ((int)o->group != g || !(o->commands & command->bit))
                continue;
            if (!titled)
                fprintf(to, "\n%s:\n", CLI_GROUP_TITLES[g]);
            titled = true;
            char text[512];
            option_text(o, text, sizeof text);
            int column = print_flag(to, o);
            if (column + 1 > TEXT_COLUMN) {
                fputc('\n', to);
                column = 0;
            }
            fprintf(to, "%*s", TEXT_COLUMN - column, "");
            print_wrapped(to, text, TEXT_COLUMN, TEXT_COLUMN);
        }
    }
}

static void print_variables(FILE *to) {
    fprintf(to, "\nEnvironment (besides those in brackets above):\n");
    for (const cli_variable *v = CLI_VARIABLES; v->name; v++) {
        int column = fprintf(to, "  %s", v->name);
        fprintf(to, "%*s", column < TEXT_COLUMN ? TEXT_COLUMN - column : 1, "");
        print_wrapped(to, v->help, TEXT_COLUMN, TEXT_COLUMN);
    }
}

void cli_print_help(FILE *to, const cli_command *command) {
    if (command) {
        fprintf(to, "usage: qwen-edit %s\n\n", command->synopsis);
        print_wrapped(to, command->description, 0, 0);
        print_options(to, command);
        if (command->bit == CMD_EDIT)
            print_variables(to);
        return;
    }
    fprintf(to,
            "qwen-edit %s: edit pictures by instruction with Qwen-Image-Edit\n\n"
            "usage: qwen-edit COMMAND [OPTION ...]\n\n",
            qie_version());
    for (const cli_command *c = CLI_COMMANDS; c->name; c++)
        fprintf(to, "  %-9s %s\n", c->name, c->summary);
    fprintf(to, "\n  qwen-edit edit -i photo.png -p \"turn the mug purple\" -o out.png\n"
                "  qwen-edit COMMAND --help    the options of a command\n"
                "  qwen-edit --version\n");
}

/* ---------------------------------------------------------------- manual page */

/* Text for troff: a backslash or a leading dot or quote would be read as a command. */
static void print_troff(FILE *to, const char *text) {
    if (*text == '.' || *text == '\'')
        fputs("\\&", to);
    for (; *text; text++) {
        if (*text == '\\')
            fputs("\\e", to);
        else if (*text == '-')
            fputs("\\-", to);
        else
            fputc(*text, to);
    }
}

static void print_man_option(FILE *to, const cli_option *o) {
    char text[512];
    fputs(".TP\n.B ", to);
    if (o->letter)
        fprintf(to, "\\-%c, ", o->letter);
    fputs(o->traits & CLI_NEGATABLE ? "\\-\\-[no\\-]" : "\\-\\-", to);
    print_troff(to, o->name);
    if (o->argument)
        fprintf(to, " \\fI%s\\fR", o->argument);
    fputc('\n', to);
    option_text(o, text, sizeof text);
    print_troff(to, text);
    fputc('\n', to);
}

static void print_man_codes(FILE *to) {
    fputs(".SH EXIT STATUS\n", to);
    for (int s = 0; s < QIE_E_COUNT; s++) {
        fprintf(to, ".TP\n.B %d\n", qie_status_exit_code((qie_status)s));
        print_troff(to, qie_status_name((qie_status)s));
        fputs(": ", to);
        print_troff(to, qie_status_text((qie_status)s));
        fputc('\n', to);
    }
}

void cli_print_man(FILE *to) {
    fprintf(to, ".TH QWEN-EDIT 1 \"\" \"qwen-edit %s\" \"User Commands\"\n", qie_version());
    fputs(".SH NAME\nqwen\\-edit \\- edit pictures by instruction with Qwen\\-Image\\-Edit\n.SH "
          "SYNOPSIS\n",
          to);
    for (const cli_command *c = CLI_COMMANDS; c->name; c++) {
        fputs(".B qwen\\-edit\n", to);
        print_troff(to, c->synopsis);
        fputs("\n.br\n", to);
    }
    for (const cli_command *c = CLI_COMMANDS; c->name; c++) {
        fprintf(to, ".SH THE COMMAND %s\n", c->name);
        print_troff(to, c->description);
        fputc('\n', to);
        for (int g = 0; g < GROUP_COUNT; g++)
            for (int i = 0, titled = 0; i < OPT_COUNT; i++)
                if ((int)CLI_OPTIONS[i].group == g && (CLI_OPTIONS[i].commands & c->bit)) {
                    if (!titled++)
                        fprintf(to, ".SS %s\n", CLI_GROUP_TITLES[g]);
                    print_man_option(to, &CLI_OPTIONS[i]);
                }
    }
    fputs(".SH ENVIRONMENT\n", to);
    for (const cli_variable *v = CLI_VARIABLES; v->name; v++) {
        fprintf(to, ".TP\n.B %s\n", v->name);
        print_troff(to, v->help);
        fputc('\n', to);
    }
    print_man_codes(to);
}

/* ---------------------------------------------------------------- completions */

static void print_flag_names(FILE *to, unsigned commands) {
    for (int i = 0; i < OPT_COUNT; i++) {
        const cli_option *o = &CLI_OPTIONS[i];
        if (!(o->commands & commands))
            continue;
        fprintf(to, " --%s", o->name);
        if (o->traits & CLI_NEGATABLE)
            fprintf(to, " --no-%s", o->name);
    }
}

static void print_words(FILE *to, const char *words) {
    for (const char *p = words; *p; p++)
        fputc(*p == '|' ? ' ' : *p, to);
}

static void print_bash(FILE *to) {
    fputs("# bash completion of qwen-edit; made by: qwen-edit help --completions bash\n"
          "_qwen_edit() {\n"
          "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        words=\"",
          to);
    for (const cli_command *c = CLI_COMMANDS; c->name; c++)
        fprintf(to, "%s ", c->name);
    fputs("--help --version\"\n    else\n        case $prev in\n", to);
    for (int i = 0; i < OPT_COUNT; i++) {
        const cli_option *o = &CLI_OPTIONS[i];
        if (!o->argument)
            continue;
        fprintf(to, "        --%s", o->name);
        if (o->letter)
            fprintf(to, "|-%c", o->letter);
        if (o->traits & CLI_IS_FILE)
            fputs(") COMPREPLY=($(compgen -f -- \"$cur\")); return ;;\n", to);
        else {
            fputs(") words=\"", to);
            if (o->words)
                print_words(to, o->words);
            fputs("\"; COMPREPLY=($(compgen -W \"$words\" -- \"$cur\")); return ;;\n", to);
        }
    }
    fputs("        esac\n        case ${COMP_WORDS[1]} in\n", to);
    for (const cli_command *c = CLI_COMMANDS; c->name; c++) {
        fprintf(to, "        %s) words=\"", c->name);
        if (c->bit == CMD_HELP)
            for (const cli_command *k = CLI_COMMANDS; k->name; k++)
                fprintf(to, "%s ", k->name);
        print_flag_names(to, c->bit);
        fputs("\" ;;\n", to);
    }
    fputs("        esac\n"
          "    fi\n"
          "    case $cur in\n"
          "    -*) COMPREPLY=($(compgen -W \"$words\" -- \"$cur\")) ;;\n"
          "    *)\n"
          "        if [ \"$COMP_CWORD\" -eq 1 ] || [ \"${COMP_WORDS[1]}\" = help ]; then\n"
          "            COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
          "        else\n"
          "            COMPREPLY=($(compgen -f -- \"$cur\"))\n"
          "        fi ;;\n"
          "    esac\n"
          "}\n"
          "complete -o filenames -F _qwen_edit qwen-edit\n",
          to);
}

/* Text inside '...[...]' of _arguments: brackets and colons end it, a quote ends the word. */
static void print_zsh_text(FILE *to, const char *text) {
    for (; *text; text++) {
        if (*text == '\'')
            fputs("'\\''", to);
        else {
            if (strchr("[]:\\", *text))
                fputc('\\', to);
            fputc(*text, to);
        }
    }
}

static void print_zsh_option(FILE *to, const cli_option *o, const char *flag) {
    fprintf(to, "            '%s%s[", o->traits & CLI_REPEAT ? "*" : "", flag);
    print_zsh_text(to, o->help);
    fputc(']', to);
    if (o->argument) {
        fputc(':', to);
        print_zsh_text(to, o->argument);
        fputc(':', to);
        if (o->traits & CLI_IS_FILE)
            fputs("_files", to);
        else if (o->words) {
            fputc('(', to);
            print_words(to, o->words);
            fputc(')', to);
        }
    }
    fputs("' \\\n", to);
}

static void print_zsh(FILE *to) {
    fputs("#compdef qwen-edit\n# zsh completion of qwen-edit; made by: qwen-edit help "
          "--completions zsh\n"
          "_qwen_edit() {\n    if (( CURRENT == 2 )); then\n        _values command",
          to);
    for (const cli_command *c = CLI_COMMANDS; c->name; c++) {
        fprintf(to, " '%s[", c->name);
        print_zsh_text(to, c->summary);
        fputs("]'", to);
    }
    fputs("\n        return\n    fi\n    case $words[2] in\n", to);
    for (const cli_command *c = CLI_COMMANDS; c->name; c++) {
        fprintf(to, "    %s)\n        _arguments \\\n", c->name);
        for (int i = 0; i < OPT_COUNT; i++) {
            const cli_option *o = &CLI_OPTIONS[i];
            if (!(o->commands & c->bit))
                continue;
            char flag[64];
            snprintf(flag, sizeof flag, "--%s", o->name);
            print_zsh_option(to, o, flag);
            if (o->letter) {
                snprintf(flag, sizeof flag, "-%c", o->letter);
                print_zsh_option(to, o, flag);
            }
            if (o->traits & CLI_NEGATABLE) {
                snprintf(flag, sizeof flag, "--no-%s", o->name);
                print_zsh_option(to, o, flag);
            }
        }
        fputs("            '*:file:_files'\n        ;;\n", to);
    }
    fputs("    esac\n}\n_qwen_edit \"$@\"\n", to);
}

bool cli_print_completions(FILE *to, const char *shell) {
    if (!strcmp(shell, "bash"))
        print_bash(to);
    else if (!strcmp(shell, "zsh"))
        print_zsh(to);
    else
        return false;
    return true;
}

qie_status cli_run_help(cli_values *values, qie_error *err) {
    if (cli_on(values, OPT_MAN))
        cli_print_man(stdout);
    else if (cli_is_set(values, OPT_COMPLETIONS))
        cli_print_completions(stdout, cli_text(values, OPT_COMPLETIONS, ""));
    else if (values->n_args == 0)
        cli_print_help(stdout, NULL);
    else {
        const cli_command *c = cli_command_find(values->args[0]);
        QIE_FAIL_IF(!c, QIE_E_USAGE, err, "command", "unknown command '%s'", values->args[0]);
        cli_print_help(stdout, c);
    }
    return QIE_OK;
}
