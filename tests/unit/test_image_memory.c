/* Every allocation of decoding, encoding and resizing fails once: the outcome is NO_MEMORY (or a
 * picture, where a library does without), nothing leaks and nothing is half made. */
#define _GNU_SOURCE
#include <stddef.h>

#include "image/resample.h"
#include "qtest.h"
#include "test_image_util.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
#define CAN_FAIL 0 /* the sanitizer owns malloc */
#else
#define CAN_FAIL 1
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void __libc_free(void *p);
#endif

static long fail_at, n_calls, n_live; /* fail_at 0: never; counted while `counting` */
static bool counting;

#if CAN_FAIL
#pragma GCC visibility push(default) /* the codec libraries shall call these */
void *malloc(size_t n);
void *calloc(size_t n, size_t size);
void *realloc(void *old, size_t n);
void free(void *p);
#pragma GCC visibility pop

static bool refuse(void) {
    return counting && ++n_calls == fail_at;
}
void *malloc(size_t n) {
    void *p = refuse() ? NULL : __libc_malloc(n);
    n_live += counting && p;
    return p;
}
void *calloc(size_t n, size_t size) {
    void *p = refuse() ? NULL : __libc_calloc(n, size);
    n_live += counting && p;
    return p;
}
void *realloc(void *old, size_t n) {
    if (refuse())
        return NULL;
    n_live += counting && !old;
    return __libc_realloc(old, n);
}
void free(void *p) {
    n_live -= counting && p;
    __libc_free(p);
}
#endif

typedef struct job {
    const uint8_t *bytes;
    size_t n;
    qie_image *image;
    qie_image_format format;
} job;
typedef qie_status (*job_fn)(const job *j, qie_error *e);

static qie_status run_decode(const job *j, qie_error *e) {
    qie_image *out;
    qie_status st = qie_image_decode(j->bytes, j->n, NULL, &out, e);
    qie_image_destroy(out);
    return st;
}
static qie_status run_read(const job *j, qie_error *e) {
    char *text;
    qie_status st = qie_image_read_parameters(j->bytes, j->n, &text, e);
    free(text);
    return st;
}
static qie_status run_encode(const job *j, qie_error *e) {
    qie_image_encode_options o = qie_image_encode_options_default();
    o.format = j->format;
    o.parameters = "{}";
    uint8_t *out;
    size_t n;
    qie_status st = qie_image_encode(j->image, &o, &out, &n, e);
    free(out);
    return st;
}
static qie_status run_resample(const job *j, qie_error *e) {
    qie_image *out;
    qie_status st = qie_resample(j->image, 20, 50, QIE_FILTER_LANCZOS, 0, 1, &out, e);
    qie_image_destroy(out);
    return st;
}

/* All N of one job; false at the first bad outcome. */
static bool every_allocation(const char *what, job_fn fn, const job *j) {
    qie_error warm = {0};
    fn(j, &warm); /* what a library allocates once for good */
    for (fail_at = 1;; fail_at++) {
        qie_error e = {0};
        n_calls = n_live = 0;
        counting = true;
        qie_status st = fn(j, &e);
        counting = false;
        bool reached = n_calls >= fail_at;
        bool expected = st == QIE_OK || (reached && st == QIE_E_NO_MEMORY) ||
                        /* libwebp's demuxer does not tell why it failed */
                        (reached && st == QIE_E_INVALID && strstr(what, ".webp"));
        if (n_live != 0 || !expected) {
            printf("  %s, allocation %ld: %s, %ld blocks left: %s\n", what, fail_at,
                   qie_status_name(st), n_live, e.message);
            return false;
        }
        if (!reached)
            break;
    }
    return fail_at > 2;
}

QTEST(test_memory_decode_survives_every_failing_allocation) {
    if (!CAN_FAIL)
        QTEST_SKIP("a sanitizer owns malloc");
    /* Neither lossless WebP nor alpha: Debian's libwebp 1.2.4 itself reads tables that it could not
     * allocate. */
    static const char *const NAMES[] = {"damage.png", "c3d4i1.png", "raw8.png",    "exif6.jpg",
                                        "444p1.jpg",  "cmyk.jpg",   "damage.webp", "lossy.webp"};
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        job j = {0};
        uint8_t *bytes = fixture(NAMES[i], &j.n);
        j.bytes = bytes;
        ASSERT(every_allocation(NAMES[i], run_decode, &j));
        free(bytes);
    }
}

QTEST(test_memory_read_parameters_survives_every_failing_allocation) {
    if (!CAN_FAIL)
        QTEST_SKIP("a sanitizer owns malloc");
    job j = {0};
    uint8_t *bytes = fixture("parameters_compressed.png", &j.n);
    j.bytes = bytes;
    ASSERT(every_allocation("read", run_read, &j));
    free(bytes);
}

QTEST(test_memory_encode_and_resample_survive_every_failing_allocation) {
    if (!CAN_FAIL)
        QTEST_SKIP("a sanitizer owns malloc");
    job j = {0};
    j.image = lcg_image(33, 40, 1);
    for (j.format = QIE_IMAGE_PNG; j.format <= QIE_IMAGE_WEBP; j.format++)
        ASSERT(every_allocation(qie_image_format_name(j.format), run_encode, &j));
    ASSERT(every_allocation("resample", run_resample, &j));
    qie_image_destroy(j.image);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
