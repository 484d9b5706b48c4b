/* hub/partial, hub/listing names, hub/http lines and addresses, plan/placement. */
#define _GNU_SOURCE
#include "hub/partial.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hub/endpoint.h"
#include "hub/http.h"
#include "hub/listing.h"
#include "plan/placement.h"
#include "qtest.h"

static char dir[64];

static const char *in_dir(const char *name) {
    static char path[4][200];
    static int i;
    i = (i + 1) % 4;
    if (!dir[0]) {
        snprintf(dir, sizeof dir, "/tmp/qie-partial-XXXXXX");
        if (!mkdtemp(dir))
            abort();
    }
    snprintf(path[i], sizeof path[i], "%s/%s", dir, name);
    return path[i];
}

QTEST(test_partial_write_close_open_goes_on) {
    qie_error e = {0};
    qie_partial p;
    const int64_t seg = QIE_PARTIAL_SEGMENT, size = 2 * seg + 1000;
    char *data = malloc((size_t)size), *back = malloc((size_t)size);
    for (int64_t i = 0; i < size; i++)
        data[i] = (char)(i * 7 + i / 251);
    ASSERT_OK(qie_partial_open(&p, in_dir("a"), NULL, size, "etag", &e));
    ASSERT_INT(qie_partial_prefix(&p), 0);
    ASSERT_OK(qie_partial_write(&p, 0, data, 5000, &e));
    ASSERT_OK(qie_partial_write(&p, seg, data + seg, 300, &e)); /* a second connection */
    ASSERT_INT(qie_partial_prefix(&p), 5000);
    ASSERT_INT(qie_partial_total(&p), 5300);
    ASSERT_INT(qie_partial_write(&p, 6000, data, 1, &e), QIE_E_INTERNAL); /* a gap */
    ASSERT_INT(qie_partial_write(&p, size, data, 1, &e), QIE_E_INTERNAL); /* beyond the end */
    qie_partial_close(&p);

    ASSERT_OK(qie_partial_open(&p, in_dir("a"), NULL, size, "etag", &e));
    ASSERT_INT(qie_partial_total(&p), 5300);
    /* Over a border of segments, and over bytes that are there. */
    ASSERT_OK(qie_partial_write(&p, 0, data, (size_t)seg + 100, &e));
    ASSERT_INT(qie_partial_prefix(&p), seg + 300);
    ASSERT_OK(qie_partial_write(&p, seg + 300, data + seg + 300, (size_t)(size - seg - 300), &e));
    ASSERT_INT(qie_partial_prefix(&p), size);
    ASSERT_OK(qie_partial_finish(&p, in_dir("final"), 0640, &e));
    int fd = open(in_dir("final"), O_RDONLY);
    struct stat st;
    ASSERT(fd >= 0 && fstat(fd, &st) == 0);
    ASSERT_INT(st.st_size, size);
    ASSERT_INT(st.st_mode & 0777, 0640);
    ASSERT(read(fd, back, (size_t)size) == size && !memcmp(data, back, (size_t)size));
    ASSERT(access(in_dir("a"), F_OK) != 0);
    close(fd);
    free(data);
    free(back);
}

QTEST(test_partial_bytes_present_are_never_changed) {
    qie_error e = {0};
    qie_partial p;
    char a[100], b[100], got[100];
    memset(a, 'a', sizeof a);
    memset(b, 'b', sizeof b);
    ASSERT_OK(qie_partial_open(&p, in_dir("keep"), NULL, 100, "x", &e));
    ASSERT_OK(qie_partial_write(&p, 0, a, 60, &e));
    ASSERT_OK(qie_partial_write(&p, 0, b, 100, &e));
    ASSERT(pread(p.fd, got, 100, 0) == 100 && !memcmp(got, a, 60) && !memcmp(got + 60, b, 40));
    qie_partial_close(&p);
}

QTEST(test_partial_of_another_content_is_started_again) {
    qie_error e = {0};
    qie_partial p;
    ASSERT_OK(qie_partial_open(&p, in_dir("b"), NULL, 100, "x", &e));
    ASSERT_OK(qie_partial_write(&p, 0, "0123456789", 10, &e));
    qie_partial_close(&p);
    ASSERT_OK(qie_partial_open(&p, in_dir("b"), NULL, 100, "y", &e));
    ASSERT_INT(qie_partial_total(&p), 0);
    qie_partial_close(&p);
    ASSERT_OK(qie_partial_open(&p, in_dir("b"), NULL, 200, "y", &e));
    ASSERT_INT(qie_partial_total(&p), 0);
    qie_partial_close(&p);
}

QTEST(test_partial_damaged_note_is_no_note) {
    qie_error e = {0};
    for (int at = 0; at < 300; at += 3) {
        qie_partial p;
        ASSERT_OK(qie_partial_open(&p, in_dir("c"), NULL, 5000, "x", &e));
        ASSERT_OK(qie_partial_reset(&p, "x", &e));
        ASSERT_OK(qie_partial_write(&p, 0, "0123456789", 10, &e));
        unsigned char bad = 0xff;
        ASSERT(pwrite(p.fd, &bad, 1, 8192 + at) == 1);
        qie_partial_close(&p);
        ASSERT_OK(qie_partial_open(&p, in_dir("c"), NULL, 5000, "x", &e));
        ASSERT(qie_partial_total(&p) >= 0 && qie_partial_total(&p) <= 5000);
        qie_partial_close(&p);
    }
}

QTEST(test_partial_cut_off_before_the_rename_counts_as_complete) {
    qie_error e = {0};
    qie_partial p;
    FILE *f = fopen(in_dir("d"), "wb");
    fputs("0123456789", f);
    fclose(f);
    ASSERT_OK(qie_partial_open(&p, in_dir("d"), NULL, 10, "x", &e));
    ASSERT_INT(qie_partial_prefix(&p), 10); /* the hash decides */
    qie_partial_close(&p);
}

QTEST(test_partial_takes_an_older_beginning_over) {
    qie_error e = {0};
    qie_partial p;
    FILE *f = fopen(in_dir("old"), "wb");
    fputs("01234", f);
    fclose(f);
    ASSERT_OK(qie_partial_open(&p, in_dir("new"), in_dir("old"), 10, "x", &e));
    ASSERT_INT(qie_partial_prefix(&p), 5);
    ASSERT(access(in_dir("old"), F_OK) != 0);
    qie_partial_close(&p);
}

QTEST(test_partial_empty_file) {
    qie_error e = {0};
    qie_partial p;
    ASSERT_OK(qie_partial_open(&p, in_dir("empty"), NULL, 0, "x", &e));
    ASSERT_INT(qie_partial_prefix(&p), 0);
    ASSERT_OK(qie_partial_finish(&p, in_dir("empty2"), 0644, &e));
    struct stat st;
    ASSERT(stat(in_dir("empty2"), &st) == 0 && st.st_size == 0);
}

QTEST(test_listing_paths) {
    static const char *const good[] = {"a",       "a/b.c",          "a b/ü",
                                       "..a/b..", ".gitattributes", "a-._~!"};
    static const char *const bad[] = {"",
                                      "/a",
                                      "a/",
                                      "a//b",
                                      ".",
                                      "..",
                                      "a/..",
                                      "../a",
                                      "a/./b",
                                      "a\\b",
                                      "C:a",
                                      "a\x01"
                                      "b",
                                      "\xff",
                                      ".cache",
                                      ".cache/x"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (!qie_hub_path_is_safe(good[i], strlen(good[i])))
            QTEST_FAIL("'%s' is refused", good[i]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (qie_hub_path_is_safe(bad[i], strlen(bad[i])))
            QTEST_FAIL("'%s' is taken", bad[i]);
    ASSERT(!qie_hub_path_is_safe("a\0b", 3));
    ASSERT(qie_hub_repo_is_valid("Qwen/Qwen-Image-Edit-2511"));
    ASSERT(qie_hub_repo_is_valid("gpt2"));
    static const char *const no_repo[] = {"",     "/a",   "a/",   "a/b/c", "a--b",
                                          "a..b", "../a", "a/.b", "-a",    "a b"};
    for (size_t i = 0; i < sizeof no_repo / sizeof *no_repo; i++)
        if (qie_hub_repo_is_valid(no_repo[i]))
            QTEST_FAIL("'%s' is taken for a repository", no_repo[i]);
}

QTEST(test_http_header_lines) {
    qie_http_reply r;
    qie_http_reply_clear(&r);
#define LINE(s) ASSERT(qie_http_reply_line(&r, s, sizeof s - 1, true))
    LINE("HTTP/1.1 206 Partial Content\r\n");
    LINE("Content-Range: bytes 10-19/100\r\n");
    LINE("Content-Length: 10\r\n");
    LINE("ETag: W/\"abc\"\r\n");
    LINE("Link: </a?p=1>; rel=\"prev\", </b?p=2>; rel=\"next\"\r\n");
    LINE("Retry-After: 99999\r\n");
    ASSERT_INT(r.status, 206);
    ASSERT_INT(r.range_from, 10);
    ASSERT_INT(r.range_to, 19);
    ASSERT_INT(r.range_total, 100);
    ASSERT_STR(r.etag, "abc");
    ASSERT(r.etag_weak);
    ASSERT_STR(r.next, "/b?p=2");
    ASSERT_INT(r.retry_after_s, 600);
    LINE("HTTP/1.1 200 OK\r\n"); /* a new answer forgets the last one's lines */
    ASSERT_INT(r.range_from, -1);
    LINE("Content-Length: 99999999999999999999\r\n");
    ASSERT_INT(r.content_length, -1);
    LINE("Content-Length: -5\r\n");
    ASSERT_INT(r.content_length, -1);
    LINE("Content-Range: bytes 20-10/100\r\n");
    ASSERT_INT(r.range_from, -1);
    LINE("Content-Range: bytes */100\r\n");
    ASSERT_INT(r.range_total, 100);
    LINE("X-Linked-Size: 7\r\n");
    ASSERT_INT(r.linked_size, 7);
#undef LINE
    qie_http_reply_clear(&r);
    ASSERT(qie_http_reply_line(&r, "X-Linked-Size: 7", 16,
                               false)); /* from another host: not believed */
    ASSERT_INT(r.linked_size, -1);
    char big[5000];
    memset(big, 'x', sizeof big);
    bool ok = true;
    for (int i = 0; i < 20 && ok; i++)
        ok = qie_http_reply_line(&r, big, sizeof big, true);
    ASSERT(!ok);
}

QTEST(test_http_origins_and_escapes) {
    ASSERT(qie_http_same_origin("https://a.b/x", "https://A.B:443/y"));
    ASSERT(!qie_http_same_origin("https://a.b/", "http://a.b/"));
    ASSERT(!qie_http_same_origin("https://a.b/", "https://a.b:444/"));
    ASSERT(!qie_http_same_origin("https://a.b/", "https://a.b.evil/"));
    ASSERT(!qie_http_same_origin("https://a.b/", "https://a.b@evil/"));
    ASSERT(!qie_http_same_origin("file:///etc/passwd", "file:///etc/passwd"));
    char out[200] = "";
    qie_url_escape(out, sizeof out, "a b/ü?", true);
    ASSERT_STR(out, "a%20b/%C3%BC%3F");
    qie_http_origin("https://user:secret@h.example:8443/x?y", out, sizeof out);
    ASSERT_STR(out, "https://h.example:8443");
}

QTEST(test_endpoint_settings) {
    qie_error e = {0};
    qie_hub_settings s;
    char *two[] = {(char *)"https://a.example/,modelscope:http://b.example:81",
                   (char *)"www.modelscope.cn"};
    ASSERT_OK(qie_hub_settings_read(two, 2, &s, &e));
    ASSERT_INT(s.n_endpoints, 3);
    ASSERT_STR(s.endpoints[0].url, "https://a.example");
    ASSERT_INT(s.endpoints[1].kind, QIE_HUB_MODELSCOPE);
    ASSERT_STR(s.endpoints[2].url, "https://www.modelscope.cn");
    ASSERT_INT(s.endpoints[2].kind, QIE_HUB_MODELSCOPE);
    char *bad[] = {(char *)"ftp://x"};
    ASSERT_INT(qie_hub_settings_read(bad, 1, &s, &e), QIE_E_INVALID);
    setenv("HF_TOKEN", "a\nX-Evil: 1", 1);
    ASSERT_OK(qie_hub_settings_read(two, 1, &s, &e)); /* cut at the line end */
    ASSERT_STR(s.token, "a");
    unsetenv("HF_TOKEN");
    char url[300];
    qie_hub_file_url(&s.endpoints[0], "o/n", "main", "a b/c", url, sizeof url);
    ASSERT_STR(url, "https://a.example/o/n/resolve/main/a%20b/c");
    qie_hub_file_url(&s.endpoints[1], "o/n", "master", "a/c", url, sizeof url);
    ASSERT_STR(url, "http://b.example:81/api/v1/models/o/n/repo?Revision=master&FilePath=a%2Fc");
}

static const int64_t G = (int64_t)1 << 30;

QTEST(test_placement_kinds) {
    qie_placement_model m;
    qie_placement p;
    char words[500];
    qie_placement_released(&m);
    double all = 0; /* the groups are all of the weights but the embedding */
    for (size_t i = 0; i < m.n_groups; i++)
        all += (double)m.groups[i].bytes;
    ASSERT_LE(fabs(all / (40.86e9 + 16.58e9 - 1.09e9 * 2 + 0.254e9) - 1), 0.02);
    qie_placement_gpu both[] = {{4, 80 * G, 79 * G}, {5, 80 * G, 78 * G}};
    qie_placement_make(&m, both, 2, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_PARALLEL);
    ASSERT_INT(p.used.n_gpus, 2);
    qie_placement_gpu big[] = {{4, 80 * G, 79 * G}, {5, 80 * G, 20 * G}};
    qie_placement_make(&m, big, 2, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_RESIDENT);
    ASSERT_INT(p.resident.gpus[0], 4);
    qie_placement_gpu two[] = {{0, 48 * G, 47 * G}, {1, 48 * G, 47 * G}, {2, 48 * G, 3 * G}};
    qie_placement_make(&m, two, 3, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_SHARDED);
    ASSERT_INT(p.sharded.n_gpus, 2);
    ASSERT_LE(p.sharded.need, p.sharded.have);
    qie_placement_gpu one[] = {{3, 24 * G, 23 * G}};
    qie_placement_make(&m, one, 1, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_STREAMED);
    qie_placement_gpu full[] = {{3, 24 * G, 7 * G}};
    qie_placement_make(&m, full, 1, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_NONE); /* never silently the CPU where there are cards */
    qie_placement_words(&p, false, words, sizeof words);
    ASSERT_CONTAINS(words, "no GPU has room");
    qie_placement_words(&p, true, words, sizeof words);
    ASSERT_CONTAINS(words, "没有一张 GPU");
    qie_placement_make(&m, NULL, 0, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_CPU);
    ASSERT(!p.cpu_from_disk);
    qie_placement_make(&m, NULL, 0, 6 * G, 1 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_NONE);
    qie_placement_gpu unknown[] = {{0, -1, -1}};
    qie_placement_make(&m, unknown, 1, 6 * G, 100 * G, &p);
    ASSERT_INT(p.best, QIE_PLACE_NONE);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
