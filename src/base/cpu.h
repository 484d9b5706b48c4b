/* What the processor can do, as one ordered level that chooses the kernels.
 * QIE_CPU=ref|avx2|avx512|avx512bf16|amx lowers the level (never raises it above what the machine
 * has). */
#ifndef QIE_BASE_CPU_H
#define QIE_BASE_CPU_H

typedef enum qie_cpu_level {
    QIE_CPU_REF = 0,    /* plain C */
    QIE_CPU_AVX2,       /* AVX2, FMA, F16C */
    QIE_CPU_AVX512,     /* + AVX-512 F, BW, DQ, VL */
    QIE_CPU_AVX512BF16, /* + AVX512_BF16 and VNNI */
    QIE_CPU_AMX,        /* + AMX tiles, bf16 and int8, permitted by the kernel */
    QIE_CPU_COUNT
} qie_cpu_level;

/* Level of this machine, lowered by QIE_CPU if set. An unknown QIE_CPU value is ignored with a
 * warning. */
qie_cpu_level qie_cpu_level_get(void);
/* Level of this machine, whatever QIE_CPU says. */
qie_cpu_level qie_cpu_level_hardware(void);
const char *qie_cpu_level_name(qie_cpu_level level);
/* Bytes of the cache of one core (level 2) and of the last level; estimates when not known. */
void qie_cpu_caches(long *l2_bytes, long *l3_bytes);

#endif
