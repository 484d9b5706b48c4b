/* Running the program itself in a test: arguments, changed variables, limits; exit code and both
 * outputs back. */
#ifndef RUN_H
#define RUN_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define RUN_MAX_ARGS 40
#define RUN_MAX_TEXT (1u << 18)

typedef struct run_options {
    const char *variables[8]; /* "NAME=value", or "NAME" to remove it; NULL-terminated */
    const char *input;        /* standard input; NULL: empty */
    uid_t uid;                /* 0: as we are */
    rlim_t max_file_bytes;    /* 0: no limit; a write beyond it fails */
    int signal_number; /* 0: none, else sent once `signal_after` stands in the error output */
    const char *signal_after;
} run_options;

typedef struct run_result {
    int code; /* exit code, or 1000 + signal */
    char out[RUN_MAX_TEXT], err[RUN_MAX_TEXT];
} run_result;

static inline void run_child(const char *program, const char *const *args, const run_options *o,
                             const int fds[3]) {
    char *argv[RUN_MAX_ARGS + 2] = {(char *)(uintptr_t)program};
    for (int i = 0; args[i] && i < RUN_MAX_ARGS; i++)
        argv[i + 1] = (char *)(uintptr_t)args[i];
    for (int i = 0; i < 3; i++)
        dup2(fds[i], i);
    for (int i = 0; i < 8 && o->variables[i]; i++) {
        char name[512];
        snprintf(name, sizeof name, "%s", o->variables[i]);
        char *equals = strchr(name, '=');
        if (equals) {
            *equals = 0;
            setenv(name, equals + 1, 1);
        } else
            unsetenv(name);
    }
    if (o->max_file_bytes) {
        struct rlimit limit = {o->max_file_bytes, o->max_file_bytes};
        setrlimit(RLIMIT_FSIZE, &limit);
        signal(SIGXFSZ, SIG_IGN);
    }
    /* Opened while we may: the folder that it lies in need not be open to somebody else. */
    int fd = open(program, O_RDONLY | O_CLOEXEC);
    if (o->uid && (setgid(o->uid) || setuid(o->uid)))
        _exit(121);
    extern char **environ;
    fexecve(fd, argv, environ);
    _exit(122);
}

/* Read both pipes to their ends; sends the signal of the options when its text has come. */
static inline void run_collect(pid_t pid, int out, int err, const run_options *o, run_result *r) {
    size_t n_out = 0, n_err = 0;
    int signal_number = o->signal_number;
    fcntl(out, F_SETFL, O_NONBLOCK);
    fcntl(err, F_SETFL, O_NONBLOCK);
    for (int open_out = 1, open_err = 1; open_out || open_err;) {
        char drop[4096];
        ssize_t k = -1, m = -1;
        if (open_out) {
            int full = n_out + 1 >= RUN_MAX_TEXT;
            k = read(out, full ? drop : r->out + n_out,
                     full ? sizeof drop : RUN_MAX_TEXT - 1 - n_out);
            n_out += k > 0 && !full ? (size_t)k : 0;
            open_out = k > 0 || (k < 0 && errno == EAGAIN);
        }
        if (open_err) {
            int full = n_err + 1 >= RUN_MAX_TEXT;
            m = read(err, full ? drop : r->err + n_err,
                     full ? sizeof drop : RUN_MAX_TEXT - 1 - n_err);
            n_err += m > 0 && !full ? (size_t)m : 0;
            open_err = m > 0 || (m < 0 && errno == EAGAIN);
        }
        r->out[n_out] = r->err[n_err] = 0;
        if (signal_number && strstr(r->err, o->signal_after)) {
            kill(pid, signal_number);
            signal_number = 0;
        }
        if (k <= 0 && m <= 0)
            usleep(1000);
    }
}

/* Run `program` with args (NULL-terminated). Returns the exit code, also in r->code. */
static inline int run_program(const char *program, const char *const *args,
                              const run_options *options, run_result *r) {
    static const run_options none;
    const run_options *o = options ? options : &none;
    int out[2], err[2];
    FILE *input = tmpfile();
    memset(r, 0, sizeof *r);
    r->code = -1;
    if (!input || pipe(out) || pipe(err))
        return r->code;
    if (o->input)
        fwrite(o->input, 1, strlen(o->input), input);
    rewind(input);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        close(out[0]);
        close(err[0]);
        run_child(program, args, o, (int[]){fileno(input), out[1], err[1]});
    }
    close(out[1]);
    close(err[1]);
    run_collect(pid, out[0], err[0], o, r);
    int status = 0;
    waitpid(pid, &status, 0);
    r->code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    close(out[0]);
    close(err[0]);
    fclose(input);
    return r->code;
}

#endif
