#define _GNU_SOURCE
#include "cli/interrupt.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "base/fs.h"

static qie_engine *volatile the_engine; /* read by the handler */
static volatile sig_atomic_t n_signals, is_polled;

static void on_signal(int signal_number) {
    int saved = errno;
    qie_engine *engine = the_engine;
    (void)signal_number;
    qie_file_remove_partial();
    if (n_signals++ == 0 && (engine || is_polled)) {
        static const char text[] = "\nqwen-edit: stopping; once more to leave at once\n";
        if (engine)
            qie_engine_cancel(engine);
        if (isatty(STDERR_FILENO)) {
            ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);
            (void)ignored;
        }
        errno = saved;
        return;
    }
    _exit(qie_status_exit_code(QIE_E_CANCELLED));
}

void cli_interrupt_install(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags =
        0; /* no SA_RESTART: a batch that waits for its next line on a pipe must wake up */
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        /* nohup ignores SIGHUP for a reason. */
        if (signals[i] == SIGHUP && sigaction(SIGHUP, NULL, &old) == 0 && old.sa_handler == SIG_IGN)
            continue;
        sigaction(signals[i], &action, NULL);
    }
}

void cli_interrupt_set_engine(qie_engine *engine) {
    the_engine = engine;
}

void cli_interrupt_set_polled(bool polled) {
    is_polled = polled;
}

bool cli_interrupted(void) {
    return n_signals > 0;
}
