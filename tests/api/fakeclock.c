/* Preloaded: the wall clock is off by the seconds that the file FAKE_CLOCK holds; other clocks are
 * not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    const char *path = getenv("FAKE_CLOCK");
    FILE *f = path ? fopen(path, "re") : NULL;
    long s = 0;
    if (f && fscanf(f, "%ld", &s) != 1)
        s = 0;
    if (f)
        fclose(f);
    return s;
}

__attribute__((visibility("default"))) int clock_gettime(clockid_t id, struct timespec *t) {
    long rc = syscall(SYS_clock_gettime, id, t);
    if (rc == 0 && id == CLOCK_REALTIME)
        t->tv_sec += offset();
    return (int)rc;
}
