#define _GNU_SOURCE
#include "base/hash.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

struct qie_hash {
    EVP_MD_CTX *ctx;
};

qie_status qie_hash_create(qie_hash_kind kind, int64_t size, qie_hash **out, qie_error *err) {
    *out = NULL;
    qie_hash *h = calloc(1, sizeof *h);
    if (h)
        h->ctx = EVP_MD_CTX_new();
    const EVP_MD *md = kind == QIE_HASH_GIT_SHA1 ? EVP_sha1() : EVP_sha256();
    if (!h || !h->ctx || EVP_DigestInit_ex(h->ctx, md, NULL) != 1) {
        qie_hash_destroy(h);
        return qie_fail(err, QIE_E_NO_MEMORY, NULL, "cannot start a hash: out of memory");
    }
    if (kind == QIE_HASH_GIT_SHA1) {
        char head[48];
        int n = snprintf(head, sizeof head, "blob %lld", (long long)size);
        qie_hash_update(h, head, (size_t)n + 1);
    }
    *out = h;
    return QIE_OK;
}

void qie_hash_destroy(qie_hash *h) {
    if (h)
        EVP_MD_CTX_free(h->ctx);
    free(h);
}

void qie_hash_update(qie_hash *h, const void *data, size_t n) {
    EVP_DigestUpdate(h->ctx, data, n);
}

static void to_hex(const unsigned char *raw, size_t n, char *hex) {
    for (size_t i = 0; i < n; i++)
        snprintf(hex + 2 * i, 3, "%02x", raw[i]);
}

void qie_hash_final(qie_hash *h, char hex[QIE_HASH_HEX_MAX]) {
    unsigned char raw[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    hex[0] = 0;
    EVP_DigestFinal_ex(h->ctx, raw, &n);
    to_hex(raw, n <= 32 ? n : 32, hex);
}

qie_hash_kind qie_hash_kind_of(const char *hex) {
    size_t n = strspn(hex, "0123456789abcdef");
    if (hex[n])
        return QIE_HASH_NONE;
    return n == 64 ? QIE_HASH_SHA256 : n == 40 ? QIE_HASH_GIT_SHA1 : QIE_HASH_NONE;
}

void qie_sha1_hex(const void *data, size_t n, char hex[QIE_HASH_HEX_MAX]) {
    unsigned char raw[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    hex[0] = 0;
    if (EVP_Digest(data, n, raw, &len, EVP_sha1(), NULL) == 1)
        to_hex(raw, len, hex);
}
