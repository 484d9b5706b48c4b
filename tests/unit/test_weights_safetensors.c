/* One safetensors file: what a good one gives, and every lie a header can tell. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "qtest.h"
#include "weights/weights.h"

/* Header and n bytes of data (0, 1, 2, ...) as a file in an allocation of exactly its size. */
static unsigned char *make_file(const char *header, size_t n_data, size_t *n) {
    size_t h = strlen(header);
    unsigned char *f = malloc(8 + h + n_data);
    for (size_t i = 0; i < 8; i++)
        f[i] = (unsigned char)((uint64_t)h >> (8 * i));
    memcpy(f + 8, header, h);
    for (size_t i = 0; i < n_data; i++)
        f[8 + h + i] = (unsigned char)i;
    *n = 8 + h + n_data;
    return f;
}

static const char GOOD[] =
    "{\"__metadata__\":{\"format\":\"pt\",\"note\":\"\\u00e9\"},"
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[16,28]},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
    "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[28,36]},"
    "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[28,28]},"
    "\"odd\":{\"dtype\":\"F8_E8M0\",\"shape\":[4],\"data_offsets\":[36,40]}}   ";

QTEST(test_safetensors_good_file_gives_its_tensors) {
    qie_error e = {0};
    qie_weights *w;
    const qie_tensor *t;
    size_t n;
    unsigned char *f = make_file(GOOD, 40, &n);
    ASSERT_OK(qie_weights_open_bytes(f, n, "good.safetensors", &w, &e));
    ASSERT_INT(qie_weights_count(w), 5);
    ASSERT_STR(qie_weights_at(w, 0)->name, "b");
    ASSERT(!qie_weights_at(w, 5));
    ASSERT(!qie_weights_find(w, "c"));
    ASSERT(!qie_weights_find(w, "__metadata__"));
    t = qie_weights_find(w, "b");
    ASSERT(t && t == qie_weights_at(w, 0));
    ASSERT_INT(t->dtype, QIE_BF16);
    ASSERT_INT(t->n_dims, 2);
    ASSERT_INT(t->shape[1], 3);
    ASSERT_INT(t->n_bytes, 12);
    ASSERT_INT(t->n_elements, 6);
    ASSERT_INT(*(const unsigned char *)t->data, 16);
    ASSERT_INT(qie_weights_find(w, "scalar")->n_elements, 1);
    ASSERT_INT(qie_weights_find(w, "empty")->n_bytes, 0);
    ASSERT_INT(qie_weights_find(w, "odd")->dtype, QIE_DTYPE_COUNT);
    ASSERT_INT(qie_weights_bytes(w), 40);
    ASSERT_INT(qie_weights_elements(w), 11); /* what an unknown type claims is not counted */
    ASSERT_STR(qie_weights_metadata(w, "format"), "pt");
    ASSERT_STR(qie_weights_metadata(w, "note"), "\xc3\xa9");
    ASSERT(!qie_weights_metadata(w, "x"));
    ASSERT_STR(qie_weights_file_of(w, t), "good.safetensors");
    for (size_t i = 0; i < qie_weights_count(w); i++)
        qie_weights_prefetch(qie_weights_at(w, i)->data, qie_weights_at(w, i)->n_bytes);
    qie_weights_close(w);
    free(f);
}

/* Hints about memory change no byte, of a mapping of a file or of memory that is none. */
QTEST(test_safetensors_hints_leave_the_bytes) {
    enum { BYTES = 1 << 18 };
    char path[] = "/tmp/qie-hints-XXXXXX";
    int fd = mkstemp(path);
    ASSERT(fd >= 0);
    unsigned char *plain = malloc(BYTES);
    for (size_t i = 0; i < BYTES; i++)
        plain[i] = (unsigned char)(i * 7 >> 3);
    ASSERT_INT(write(fd, plain, BYTES), BYTES);
    unsigned char *mapped = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 0);
    ASSERT(mapped != MAP_FAILED);
    static const size_t parts[][2] = {
        {0, BYTES}, {100, 9000}, {4096, 4096}, {BYTES - 5, 5}, {7, 0}};
    unsigned char *sum = malloc(BYTES);
    memcpy(sum, plain, BYTES);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (int k = 0; k < 2; k++) {
            unsigned char *p = k ? plain : mapped;
            qie_weights_prefetch(p + parts[i][0], parts[i][1]);
            qie_weights_let_go(p + parts[i][0], parts[i][1]);
            ASSERT(!memcmp(p, sum, BYTES));
        }
    munmap(mapped, BYTES);
    close(fd);
    unlink(path);
    free(plain);
    free(sum);
}

QTEST(test_safetensors_need_checks_shape_and_type) {
    qie_error e = {0};
    qie_weights *w;
    const qie_tensor *t;
    size_t n;
    static const int64_t OK[] = {2, 3}, SWAPPED[] = {3, 2}, FOUR[] = {4};
    unsigned char *f = make_file(GOOD, 40, &n);
    ASSERT_OK(qie_weights_open_bytes(f, n, "good.safetensors", &w, &e));
    ASSERT_OK(qie_weights_need(w, "b", 2, OK, &t, &e));
    ASSERT(t == qie_weights_find(w, "b"));
    ASSERT_INT(qie_weights_need(w, "b", 2, SWAPPED, &t, &e), QIE_E_CORRUPT);
    ASSERT(!t);
    ASSERT_STR(e.message, "tensor 'b' in 'good.safetensors' has shape [2, 3], expected [3, 2]");
    ASSERT_INT(qie_weights_need(w, "b", 1, OK, &t, &e), QIE_E_CORRUPT);
    ASSERT_INT(qie_weights_need(w, "scalar", 0, OK, &t, &e), QIE_E_CORRUPT);
    ASSERT_CONTAINS(e.message, "has dtype I64, expected F32, BF16 or F16");
    ASSERT_INT(qie_weights_need(w, "odd", 1, FOUR, &t, &e), QIE_E_CORRUPT);
    ASSERT_CONTAINS(e.message, "has dtype F8_E8M0");
    ASSERT_INT(qie_weights_need(w, "c", 1, FOUR, &t, &e), QIE_E_CORRUPT);
    ASSERT_STR(e.message, "'good.safetensors' has no tensor 'c'");
    qie_weights_close(w);
    free(f);
}

/* One tensor "t" of 16 bytes unless the row says otherwise. */
QTEST(test_safetensors_lies_are_refused_by_name) {
    static const struct {
        const char *header, *message;
    } CASES[] = {
        {"[]", "not a JSON object"},
        {" {}", "not a JSON object"},
        {"{\"", "not valid JSON"},
        {"{}}", "not valid JSON"},
        {"{}", "tensors take 0 bytes, but 16 follow"},
        {"{\"t\":1}", "has no dtype"},
        {"{\"t\":{\"shape\":[4],\"data_offsets\":[0,16]}}", "has no dtype"},
        {"{\"t\":{\"dtype\":7,\"shape\":[4],\"data_offsets\":[0,16]}}", "has no dtype"},
        {"{\"t\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}", "has no shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}", "has no shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4]}}", "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16]}}", "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,8,16]}}", "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,\"16\"]}}",
         "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16.0]}}", "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}", "no data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}",
         "ends before it begins"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,17]}}",
         "behind the end of the file"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,32]}}",
         "behind the end of the file"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,9223372036854775807]}}",
         "behind the end of the file"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,9223372036854775808]}}",
         "not valid JSON"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,16]}}",
         "does not fit its bytes"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,16]}}",
         "does not fit its bytes"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2,-2],\"data_offsets\":[0,16]}}",
         "whole number of 0 or more"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4.5],\"data_offsets\":[0,16]}}",
         "whole number of 0 or more"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}",
         "more than 8 dimensions"},
        /* 2^31 * 2^31 * 4 elements is 0 in 64 bits; 2^62 elements of 4 bytes are 0 bytes. */
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2147483648,2147483648,4],\"data_offsets\":[0,16]}}",
         "size overflows"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,16]}}",
         "does not fit its bytes"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"u\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[4,16]}}",
         "tensor 'u' overlaps another tensor"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
         "\"u\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "overlaps another tensor"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"u\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "tensor 'u' leaves a gap"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]}}",
         "tensors take 12 bytes, but 16 follow"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "duplicate"},
        {"{\"__metadata__\":[],\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "__metadata__ is not an object"},
        {"{\"__metadata__\":{\"a\":1},\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,"
         "16]}}",
         "metadata 'a' is not a string"},
        {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", "not valid JSON"},
        {"{\"t\\u0000\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        qie_error e = {0};
        qie_weights *w;
        size_t n;
        unsigned char *f = make_file(CASES[i].header, 16, &n);
        qie_status st = qie_weights_open_bytes(f, n, "lie.safetensors", &w, &e);
        if (st != QIE_E_CORRUPT || w || !strstr(e.message, CASES[i].message) ||
            !strstr(e.message, "'lie.safetensors'"))
            QTEST_FAIL("case %zu: %s \"%s\", expected \"%s\"", i, qie_status_name(st), e.message,
                       CASES[i].message);
        free(f);
    }
}

QTEST(test_safetensors_header_length_is_checked) {
    static const uint64_t LENGTHS[] = {0,         1,         UINT64_MAX, (uint64_t)1 << 63,
                                       100000001, 100000000, 1000,       UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof LENGTHS / sizeof *LENGTHS; i++) {
        qie_error e = {0};
        qie_weights *w;
        size_t n;
        unsigned char *f = make_file("{}", 0, &n);
        for (size_t k = 0; k < 8; k++)
            f[k] = (unsigned char)(LENGTHS[i] >> (8 * k));
        ASSERT_INT(qie_weights_open_bytes(f, n, "x", &w, &e), QIE_E_CORRUPT);
        free(f);
    }
}

QTEST(test_safetensors_deep_nesting_is_refused) {
    qie_error e = {0};
    qie_weights *w;
    size_t n;
    char *header = malloc(100001);
    memset(header, '[', 100000);
    memcpy(header, "{\"t\":", 5);
    header[100000] = 0;
    unsigned char *f = make_file(header, 16, &n);
    ASSERT_INT(qie_weights_open_bytes(f, n, "deep", &w, &e), QIE_E_CORRUPT);
    free(f);
    free(header);
}

/* Cut everywhere, and one byte more: never accepted, never read beyond. */
QTEST(test_safetensors_truncated_anywhere_is_corrupt) {
    size_t n;
    unsigned char *f = make_file(GOOD, 40, &n);
    for (size_t cut = 0; cut <= n + 1; cut++) {
        qie_error e = {0};
        qie_weights *w;
        unsigned char *part = malloc(cut ? cut : 1);
        memcpy(part, f, cut < n ? cut : n);
        if (cut > n)
            part[n] = 0;
        qie_status st = qie_weights_open_bytes(part, cut, "cut", &w, &e);
        if (st != (cut == n ? QIE_OK : QIE_E_CORRUPT))
            QTEST_FAIL("%zu of %zu bytes: %s", cut, n, qie_status_name(st));
        qie_weights_close(w);
        free(part);
    }
    free(f);
}

/* Each bit of length and header flipped: a clear error, or tensors that lie inside the file. */
QTEST(test_safetensors_flipped_bits_are_harmless) {
    size_t n, n_ok = 0;
    unsigned char *f = make_file(GOOD, 40, &n);
    for (size_t bit = 0; bit < 8 * (n - 40); bit++) {
        qie_error e = {0};
        qie_weights *w;
        f[bit / 8] ^= (unsigned char)(1u << bit % 8);
        qie_status st = qie_weights_open_bytes(f, n, "flip", &w, &e);
        ASSERT(st == QIE_OK || (st == QIE_E_CORRUPT && strstr(e.message, "'flip'")));
        for (size_t i = 0; w && i < qie_weights_count(w); i++) {
            const qie_tensor *t = qie_weights_at(w, i);
            const unsigned char *p = t->data;
            ASSERT(p >= f && p + t->n_bytes <= f + n);
            n_ok++;
        }
        qie_weights_close(w);
        f[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    free(f);
    ASSERT(n_ok > 0);
}

QTEST(test_safetensors_file_by_path_is_mapped) {
    qie_error e = {0};
    qie_weights *w;
    char path[] = "/tmp/qie-weights-XXXXXX";
    size_t n;
    unsigned char *f = make_file(GOOD, 40, &n);
    int fd = mkstemp(path);
    ASSERT(fd >= 0 && write(fd, f, n) == (ssize_t)n);
    close(fd);
    free(f);
    ASSERT_OK(qie_weights_open_file(path, &w, &e));
    ASSERT_STR(qie_weights_file_of(w, qie_weights_find(w, "a")), path);
    ASSERT_INT(((const unsigned char *)qie_weights_find(w, "a")->data)[15], 15);
    qie_weights_prefetch(qie_weights_find(w, "a")->data, 16);
    qie_weights_close(w);
    ASSERT(!truncate(path, 0));
    ASSERT_INT(qie_weights_open_file(path, &w, &e), QIE_E_CORRUPT);
    ASSERT_CONTAINS(e.message, path);
    unlink(path);
    ASSERT_INT(qie_weights_open_file(path, &w, &e), QIE_E_NOT_FOUND);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
