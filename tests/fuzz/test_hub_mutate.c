/* Header lines and JSON of a server, mutated at random: whatever comes, the answer is a status, and
 * a listing that is accepted keeps its promises (run under ASan and UBSan). QIE_FUZZ_ROUNDS:
 * default 20000. */
#define _GNU_SOURCE
#include <unistd.h>

#include "base/fs.h"
#include "hub/http.h"
#include "hub/listing.h"
#include "qtest.h"

static uint64_t state = 88172645463325252ull;
static uint64_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int rounds(void) {
    const char *r = getenv("QIE_FUZZ_ROUNDS");
    return r ? atoi(r) : 20000;
}

/* Flip, insert, delete, repeat; sometimes a word that parsers trip over. */
static size_t mutate(char *buf, size_t n, size_t cap) {
    static const char *const words[] = {"\"",        "{",       "[",
                                        "null",      "-1",      "1e999",
                                        "../",       "\\u0000", "9223372036854775808",
                                        "\"path\":", "\xff",    "\r\n",
                                        ":",         "<",       ">",
                                        "bytes 0-",  "W/\""};
    int k = 1 + (int)(next_random() % 4);
    for (int i = 0; i < k && n > 1; i++) {
        size_t at = next_random() % n, len = 1 + next_random() % 8;
        switch (next_random() % 5) {
        case 0: buf[at] = (char)next_random(); break;
        case 1:
            if (at + len < n) {
                memmove(buf + at, buf + at + len, n - at - len);
                n -= len;
            }
            break;
        case 2:
            if (n + len < cap && at + len < n) {
                memmove(buf + at + len, buf + at, n - at);
                n += len;
            }
            break;
        case 3: n = at ? at : 1; break;
        default: {
            const char *w = words[next_random() % (sizeof words / sizeof *words)];
            size_t wn = strlen(w);
            if (n + wn < cap) {
                memmove(buf + at + wn, buf + at, n - at);
                memcpy(buf + at, w, wn);
                n += wn;
            }
        }
        }
    }
    return n;
}

static bool keeps_promises(const qie_hub_listing *l) {
    for (size_t i = 0; i < l->n; i++) {
        const qie_hub_file *f = &l->files[i];
        if (!qie_hub_path_is_safe(f->path, strlen(f->path)) || strchr(f->etag, '/') ||
            f->etag[0] == '.' || f->size < -1)
            return false;
    }
    return true;
}

static const char TREE[] =
    "[{\"type\":\"directory\",\"oid\":\"00\",\"size\":0,\"path\":\"vae\"},"
    "{\"type\":\"file\",\"oid\":\"e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\",\"size\":12,\"path\":"
    "\"vae/config.json\"},"
    "{\"type\":\"file\",\"oid\":\"0123456789abcdef0123456789abcdef01234567\",\"size\":99,\"lfs\":{"
    "\"oid\":"
    "\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"size\":99,"
    "\"pointerSize\":134},\"path\":"
    "\"vae/model.safetensors\"}]";
static const char INFO[] =
    "{\"sha\":\"0123456789abcdef0123456789abcdef01234567\",\"siblings\":[{\"rfilename\":\"a/b\"},"
    "{\"rfilename\":\"c\",\"size\":5,\"blobId\":\"e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\"}]}";
static const char SCOPE[] = "{\"Code\":200,\"Success\":true,\"Data\":{\"Files\":[{\"Path\":\"a/"
                            "b\",\"Size\":7,\"Type\":\"blob\",\"Sha256\":"
                            "\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"},"
                            "{\"Path\":\"a\",\"Type\":\"tree\"}]}}";

QTEST(test_json_of_a_server_mutated) {
    static const char *const seeds[] = {TREE, INFO, SCOPE};
    int accepted = 0;
    for (int i = 0; i < rounds(); i++) {
        const char *seed = seeds[i % 3];
        char *buf = malloc(4096);
        size_t n = strlen(seed);
        memcpy(buf, seed, n);
        n = mutate(buf, n, 4096);
        char *exact = malloc(n); /* so that one byte too far is seen */
        memcpy(exact, buf, n);
        free(buf);
        qie_hub_listing l = {0};
        qie_error e = {0};
        qie_status st = i % 3 == 0   ? qie_hub_parse_tree(exact, n, &l, &e)
                        : i % 3 == 1 ? qie_hub_parse_revision(exact, n, true, &l, &e)
                                     : qie_hub_parse_modelscope(exact, n, &l, &e);
        if (i % 3 == 0)
            snprintf(l.commit, sizeof l.commit, "%s", "0123456789abcdef0123456789abcdef01234567");
        if (st == QIE_OK)
            st = qie_hub_listing_finish(&l, &e);
        bool ok = keeps_promises(&l) && (st == QIE_OK || e.message[0]);
        accepted += st == QIE_OK;
        qie_hub_listing_release(&l);
        if (!ok) {
            printf("  input: %.*s\n", (int)n, exact);
            free(exact);
            QTEST_FAIL("round %d: %s", i, e.message);
        }
        free(exact);
    }
    printf("  %d of %d accepted\n", accepted, rounds());
}

QTEST(test_trees_file_mutated) {
    char dir[] = "/tmp/qie-tree-XXXXXX", path[200];
    qie_error e = {0};
    qie_hub_listing l = {0};
    ASSERT(mkdtemp(dir));
    ASSERT_OK(qie_hub_parse_tree(TREE, strlen(TREE), &l, &e));
    snprintf(l.commit, sizeof l.commit, "%s", "0123456789abcdef0123456789abcdef01234567");
    ASSERT_OK(qie_hub_listing_finish(&l, &e));
    ASSERT_OK(qie_hub_tree_write(dir, &l, &e));
    snprintf(path, sizeof path, "%s/trees/%s.json", dir, l.commit);
    qie_hub_listing back;
    ASSERT_OK(qie_hub_tree_read(dir, l.commit, &back, &e));
    ASSERT_INT(back.n, l.n);
    ASSERT_STR(back.files[1].etag, l.files[1].etag);
    ASSERT_INT(back.files[1].hash, QIE_HASH_SHA256);
    qie_hub_listing_release(&back);
    unsigned char *text;
    size_t n;
    ASSERT_OK(qie_file_read(path, 1 << 20, &text, &n, &e));
    for (int i = 0; i < rounds() / 20; i++) {
        char buf[4096];
        memcpy(buf, text, n);
        size_t m = mutate(buf, n, sizeof buf);
        FILE *f = fopen(path, "wb");
        fwrite(buf, 1, m, f);
        fclose(f);
        if (qie_hub_tree_read(dir, l.commit, &back, NULL) == QIE_OK) {
            ASSERT(keeps_promises(&back));
            qie_hub_listing_release(&back);
        }
    }
    free(text);
    qie_hub_listing_release(&l);
    unlink(path);
}

QTEST(test_header_lines_mutated) {
    static const char *const seeds[] = {
        "HTTP/1.1 206 Partial Content\r\n",
        "Content-Range: bytes 0-99/100\r\n",
        "Content-Length: 100\r\n",
        "ETag: W/\"0123456789abcdef\"\r\n",
        "X-Linked-Etag: \"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"\r\n",
        "Link: <https://h/api?cursor=1>; rel=\"next\"\r\n",
        "Location: https://cdn.example/x?sig=1\r\n",
        "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n",
        "Content-Encoding: gzip\r\n"};
    qie_http_reply r;
    qie_http_reply_clear(&r);
    for (int i = 0; i < rounds(); i++) {
        char buf[512];
        const char *seed = seeds[(size_t)i % (sizeof seeds / sizeof *seeds)];
        size_t n = strlen(seed);
        memcpy(buf, seed, n);
        n = mutate(buf, n, sizeof buf);
        char *exact = malloc(n);
        memcpy(exact, buf, n);
        if (!qie_http_reply_line(&r, exact, n, i & 1))
            qie_http_reply_clear(&r);
        free(exact);
        ASSERT(strlen(r.etag) < sizeof r.etag && strlen(r.next) < sizeof r.next);
        ASSERT(r.content_length >= -1 && r.range_from >= -1 && r.retry_after_s <= 600);
        char out[300];
        qie_http_origin(r.location, out, sizeof out);
        qie_http_same_origin(r.next, r.location);
    }
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
