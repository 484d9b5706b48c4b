/* What a worker takes from itself before it touches foreign bytes. */
#ifndef QIE_SERVICE_SANDBOX_H
#define QIE_SERVICE_SANDBOX_H

#include <stdbool.h>
#include <stdint.h>

/* For this thread and those that it starts: no file may be created, changed or executed from here
 * on (landlock). gpu: the devices of the NVIDIA driver stay open to it. Says in one word what was
 * reached: "landlock" or "none". */
const char *svc_sandbox_files(bool gpu);
/* For all threads: no sockets, no programs, no tracing, no writing opens (seccomp). gpu: the driver
 * opens its devices for writing at any time, so that only creating files is refused here. "seccomp"
 * or "none". */
const char *svc_sandbox_calls(bool gpu);
/* Writable memory of this process: what it has now, `bytes` more and a margin. */
void svc_sandbox_memory(int64_t bytes);

#endif
