/* Small test harness: functions registered by QTEST, assertions that print both values, skip with a
 * reason. One program per tested unit; main is qtest_main(). The last line is "N passed, N failed,
 * N skipped". */
#ifndef QTEST_H
#define QTEST_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct qtest_case {
    const char *name;
    void (*fn)(void);
    struct qtest_case *next;
} qtest_case;

static qtest_case *qtest_first, **qtest_last = &qtest_first;
static bool qtest_failed, qtest_skipped;

/* Define and register a test: QTEST(test_unit_situation_result) { ... } */
#define QTEST(fn_name)                                                  \
    static void fn_name(void);                                          \
    static qtest_case fn_name##_case = {#fn_name, fn_name, NULL};       \
    __attribute__((constructor)) static void fn_name##_register(void) { \
        *qtest_last = &fn_name##_case;                                  \
        qtest_last = &fn_name##_case.next;                              \
    }                                                                   \
    static void fn_name(void)

#define QTEST_FAIL(...)                          \
    do {                                         \
        qtest_failed = true;                     \
        printf("  %s:%d: ", __FILE__, __LINE__); \
        printf(__VA_ARGS__);                     \
        printf("\n");                            \
        return;                                  \
    } while (0)
#define QTEST_SKIP(...)       \
    do {                      \
        qtest_skipped = true; \
        printf("  skip: ");   \
        printf(__VA_ARGS__);  \
        printf("\n");         \
        return;               \
    } while (0)
#define ASSERT(cond)                                   \
    do {                                               \
        if (!(cond))                                   \
            QTEST_FAIL("assertion failed: %s", #cond); \
    } while (0)
#define ASSERT_INT(actual, expected)                                      \
    do {                                                                  \
        long long qa_ = (long long)(actual), qe_ = (long long)(expected); \
        if (qa_ != qe_)                                                   \
            QTEST_FAIL("%s is %lld, expected %lld", #actual, qa_, qe_);   \
    } while (0)
#define ASSERT_STR(actual, expected)                                                   \
    do {                                                                               \
        const char *qa_ = (actual), *qe_ = (expected);                                 \
        if (!qa_ || !qe_ || strcmp(qa_, qe_))                                          \
            QTEST_FAIL("%s is \"%s\", expected \"%s\"", #actual, qa_ ? qa_ : "(null)", \
                       qe_ ? qe_ : "(null)");                                          \
    } while (0)
#define ASSERT_CONTAINS(text, part)                                                  \
    do {                                                                             \
        const char *qa_ = (text), *qe_ = (part);                                     \
        if (!qa_ || !strstr(qa_, qe_))                                               \
            QTEST_FAIL("\"%s\" does not contain \"%s\"", qa_ ? qa_ : "(null)", qe_); \
    } while (0)
#define ASSERT_LE(actual, bound)                                     \
    do {                                                             \
        double qa_ = (double)(actual), qe_ = (double)(bound);        \
        if (!(qa_ <= qe_))                                           \
            QTEST_FAIL("%s is %.6g, bound %.6g", #actual, qa_, qe_); \
    } while (0)
/* A call that returns qie_status and fills `e` (a local qie_error). */
#define ASSERT_OK(call)                                                       \
    do {                                                                      \
        qie_status qs_ = (call);                                              \
        if (qs_ != QIE_OK)                                                    \
            QTEST_FAIL("%s: %s: %s", #call, qie_status_name(qs_), e.message); \
    } while (0)

static inline double qtest_nmse(const float *a, const float *ref, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)ref[i];
        num += d * d;
        den += (double)ref[i] * (double)ref[i];
    }
    return den > 0 ? num / den : num;
}

/* argv[1]: run only tests whose name contains it. */
static inline int qtest_main(int argc, char **argv) {
    int passed = 0, failed = 0, skipped = 0;
    for (qtest_case *c = qtest_first; c; c = c->next) {
        if (argc > 1 && !strstr(c->name, argv[1]))
            continue;
        qtest_failed = qtest_skipped = false;
        printf("%s\n", c->name);
        fflush(stdout);
        c->fn();
        if (qtest_failed) {
            failed++;
            printf("  FAILED\n");
        } else if (qtest_skipped)
            skipped++;
        else
            passed++;
        fflush(stdout);
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed || passed + skipped == 0 ? 1 : passed == 0 ? 77 : 0;
}

#endif
