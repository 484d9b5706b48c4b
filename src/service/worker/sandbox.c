/* Refusal by error and not by death: a library that probes for a socket (locale, name service) goes
 * on. */
#define _GNU_SOURCE
#include "service/worker/sandbox.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/landlock.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef QIE_HAVE_SECCOMP
#include <seccomp.h>
#endif

#define MARGIN_BYTES                                                            \
    (768ll << 20) /* decoded pictures (two of 50 MP), codecs, stacks of threads \
                   */

/* /dev/nvidia0, nvidiactl, nvidia-uvm, nvidia-caps ..., and dxg of Windows' subsystem. */
static void allow_devices(int rules) {
    DIR *dev = opendir("/dev");
    for (struct dirent *e; dev && (e = readdir(dev));) {
        if (strncmp(e->d_name, "nvidia", 6) && strcmp(e->d_name, "dxg"))
            continue;
        struct landlock_path_beneath_attr a;
        memset(&a, 0, sizeof a);
        a.allowed_access = LANDLOCK_ACCESS_FS_WRITE_FILE;
        a.parent_fd = openat(dirfd(dev), e->d_name, O_PATH | O_CLOEXEC);
        if (a.parent_fd < 0)
            continue;
        syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &a, 0);
        close(a.parent_fd);
    }
    if (dev)
        closedir(dev);
}

const char *svc_sandbox_files(bool gpu) {
    struct landlock_ruleset_attr rules;
    memset(&rules, 0, sizeof rules);
    rules.handled_access_fs =
        LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REMOVE_DIR |
        LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_MAKE_CHAR |
        LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_MAKE_SOCK |
        LANDLOCK_ACCESS_FS_MAKE_FIFO | LANDLOCK_ACCESS_FS_MAKE_BLOCK | LANDLOCK_ACCESS_FS_MAKE_SYM;
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    int fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0);
    if (fd < 0)
        return "none";
    if (gpu)
        allow_devices(fd);
    long rc = syscall(SYS_landlock_restrict_self, fd, 0);
    close(fd);
    return rc ? "none" : "landlock";
}

#ifdef QIE_HAVE_SECCOMP
static bool deny_calls(scmp_filter_ctx c, bool gpu) {
    static const int calls[] = {SCMP_SYS(socket),
                                SCMP_SYS(connect),
                                SCMP_SYS(bind),
                                SCMP_SYS(listen),
                                SCMP_SYS(accept),
                                SCMP_SYS(accept4),
                                SCMP_SYS(execve),
                                SCMP_SYS(execveat),
                                SCMP_SYS(ptrace),
                                SCMP_SYS(process_vm_writev),
                                SCMP_SYS(process_vm_readv),
                                SCMP_SYS(io_uring_setup),
                                SCMP_SYS(bpf),
                                SCMP_SYS(perf_event_open),
                                SCMP_SYS(mount),
                                SCMP_SYS(umount2),
                                SCMP_SYS(unshare),
                                SCMP_SYS(setns),
                                SCMP_SYS(unlink),
                                SCMP_SYS(unlinkat),
                                SCMP_SYS(rename),
                                SCMP_SYS(renameat),
                                SCMP_SYS(renameat2),
                                SCMP_SYS(mkdir),
                                SCMP_SYS(mkdirat),
                                SCMP_SYS(link),
                                SCMP_SYS(linkat),
                                SCMP_SYS(symlink),
                                SCMP_SYS(symlinkat),
                                SCMP_SYS(chmod),
                                SCMP_SYS(fchmodat),
                                SCMP_SYS(creat),
                                SCMP_SYS(truncate),
                                SCMP_SYS(fork),
                                SCMP_SYS(vfork)};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (seccomp_rule_add(c, SCMP_ACT_ERRNO(EPERM), calls[i], 0))
            return false;
    static const unsigned flags[] = {O_CREAT, O_WRONLY, O_RDWR};
    for (size_t i = 0; i < (gpu ? 1 : 3); i++) {
        if (seccomp_rule_add(c, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(openat), 1,
                             SCMP_A2(SCMP_CMP_MASKED_EQ, flags[i], flags[i])) ||
            seccomp_rule_add(c, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(open), 1,
                             SCMP_A1(SCMP_CMP_MASKED_EQ, flags[i], flags[i])))
            return false;
    }
    return seccomp_rule_add(c, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(openat2), 0) == 0;
}
#endif

const char *svc_sandbox_calls(bool gpu) {
#ifdef QIE_HAVE_SECCOMP
    scmp_filter_ctx c = seccomp_init(SCMP_ACT_ALLOW);
    if (!c)
        return "none";
    bool ok =
        !seccomp_attr_set(c, SCMP_FLTATR_CTL_TSYNC, 1) && deny_calls(c, gpu) && !seccomp_load(c);
    seccomp_release(c);
    return ok ? "seccomp" : "none";
#else
    (void)gpu;
    return "none";
#endif
}

/* Field VmData of /proc/self/status: what RLIMIT_DATA is held against. */
static int64_t data_bytes(void) {
    char line[256];
    long long kb = 0;
    FILE *f = fopen("/proc/self/status", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmData: %lld kB", &kb) == 1)
            break;
    if (f)
        fclose(f);
    return kb * 1024;
}

void svc_sandbox_memory(int64_t bytes) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    struct rlimit now;
    if (getrlimit(RLIMIT_DATA, &now))
        return;
    int64_t limit = data_bytes() + bytes + MARGIN_BYTES;
    now.rlim_cur = now.rlim_max == RLIM_INFINITY || (rlim_t)limit < now.rlim_max ? (rlim_t)limit
                                                                                 : now.rlim_max;
    setrlimit(RLIMIT_DATA, &now);
#else
    (void)bytes;
    (void)data_bytes;
#endif
}
