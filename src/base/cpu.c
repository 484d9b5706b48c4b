#define _GNU_SOURCE
#include "base/cpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const NAMES[QIE_CPU_COUNT] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};

const char *qie_cpu_level_name(qie_cpu_level level) {
    return (unsigned)level < QIE_CPU_COUNT ? NAMES[level] : "?";
}

#if defined(__x86_64__)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

/* Linux gives a process the 8 KiB tile state only when it asks. */
static int amx_permitted(void) {
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

qie_cpu_level qie_cpu_level_hardware(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return QIE_CPU_REF;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return QIE_CPU_AVX2;
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx512vnni") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) ||
        !(a & (1u << 5)))
        return QIE_CPU_AVX512;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24)) ||
        !(d & (1u << 25)) || !amx_permitted())
        return QIE_CPU_AVX512BF16;
    return QIE_CPU_AMX;
}
#else
qie_cpu_level qie_cpu_level_hardware(void) {
    return QIE_CPU_REF;
}
#endif

qie_cpu_level qie_cpu_level_get(void) {
    qie_cpu_level hw = qie_cpu_level_hardware();
    const char *want = getenv("QIE_CPU");
    if (!want || !*want)
        return hw;
    for (int i = 0; i < QIE_CPU_COUNT; i++)
        if (!strcmp(want, NAMES[i]))
            return (qie_cpu_level)i < hw ? (qie_cpu_level)i : hw;
    qie_log(QIE_LOG_WARN, "cpu", "QIE_CPU=%s is not one of ref, avx2, avx512, avx512bf16, amx",
            want);
    return hw;
}

void qie_cpu_caches(long *l2_bytes, long *l3_bytes) {
    long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE), l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    *l2_bytes = l2 > 0 ? l2 : 1L << 20;
    *l3_bytes = l3 > 0 ? l3 : 16L << 20;
}
