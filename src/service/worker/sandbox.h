/* What a worker takes from itself before it touches foreign bytes. */
#ifndef QIE_SERVICE_SANDBOX_H
#define QIE_SERVICE_SANDBOX_H

#include <stdint.h>

/* Before any thread starts: no file may be created, changed or executed from here on (landlock).
 * Says in one word what was reached: "landlock" or "none". */
const char *svc_sandbox_files(void);
/* For all threads: no sockets, no programs, no tracing, no writing opens (seccomp). "seccomp" or
 * "none". */
const char *svc_sandbox_calls(void);
/* Writable memory of this process: what it has now, `bytes` more and a margin. */
void svc_sandbox_memory(int64_t bytes);

#endif
