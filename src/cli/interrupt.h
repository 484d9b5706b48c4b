/* Ctrl-C and SIGTERM: the first stops the running edit at its next block, the second leaves at
 * once. */
#ifndef QIE_CLI_INTERRUPT_H
#define QIE_CLI_INTERRUPT_H

#include <stdbool.h>

#include "qie/edit.h"

void cli_interrupt_install(void);
/* The engine that the first signal cancels; NULL (at start): the first signal ends the process. */
void cli_interrupt_set_engine(qie_engine *engine);
/* For work that looks at cli_interrupted by itself: the first signal only sets it. */
void cli_interrupt_set_polled(bool polled);
bool cli_interrupted(void);

#endif
