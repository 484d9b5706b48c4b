/* Pictures named by address. The name is resolved here, every address is judged, and the transfer
 * is told to connect to the one judged: a second look-up with another answer has no chance. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "hub/http.h"
#include "service/master/master.h"

#define MAX_BYTES (20u << 20)
#define WITHIN_S 20
#define MAX_REDIRECTS 3

/* The 16 bytes of an address; IPv4 inside IPv6 (mapped, NAT64, 6to4) as its IPv4. Returns 4 or 16.
 */
static int bytes_of(const struct sockaddr_storage *a, uint8_t out[16]) {
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    static const uint8_t nat64[12] = {0, 0x64, 0xff, 0x9b};
    if (a->ss_family == AF_INET) {
        memcpy(out, &((const struct sockaddr_in *)(const void *)a)->sin_addr, 4);
        return 4;
    }
    memcpy(out, &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr, 16);
    if (!memcmp(out, mapped, 12) || !memcmp(out, nat64, 12)) {
        memmove(out, out + 12, 4);
        return 4;
    }
    if (out[0] == 0x20 && out[1] == 0x02) {
        memmove(out, out + 2, 4);
        return 4;
    }
    return 16;
}

bool svc_cidr_has(const char *cidr, const void *address) {
    uint8_t want[16], have[16];
    char text[64];
    snprintf(text, sizeof text, "%s", cidr);
    char *slash = strchr(text, '/');
    if (slash)
        *slash = 0;
    int n = inet_pton(AF_INET, text, want) == 1 ? 4 : inet_pton(AF_INET6, text, want) == 1 ? 16 : 0;
    long bits = slash ? strtol(slash + 1, NULL, 10) : 8 * n;
    if (!n || bytes_of(address, have) != n || bits < 0 || bits > 8 * n)
        return false;
    for (int i = 0; i < bits; i++)
        if (((want[i / 8] ^ have[i / 8]) >> (7 - i % 8)) & 1)
            return false;
    return true;
}

/* Special-purpose blocks of the IANA registries. */
static bool is_public(const struct sockaddr_storage *a) {
    static const char *const blocks[] = {
        "0.0.0.0/8",     "10.0.0.0/8",      "100.64.0.0/10",  "127.0.0.0/8",    "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24",    "192.0.2.0/24",   "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",    "::/8",
        "100::/64",      "2001::/23",       "2001:db8::/32",  "fc00::/7",       "fe80::/10",
        "fec0::/10",     "ff00::/8",        "64:ff9b:1::/48"};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (svc_cidr_has(blocks[i], a))
            return false;
    return true;
}

static bool is_allowed(const svc_fetch_rules *rules, const struct sockaddr_storage *a) {
    for (const char *const *c = rules->cidrs; *c; c++)
        if (svc_cidr_has(*c, a))
            return true;
    return is_public(a);
}

/* Every address of the name must be allowed; the first is used. */
static qie_status judge(const svc_fetch_rules *rules, const char *url, char address[64],
                        qie_error *err) {
    char origin[1024];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    qie_http_origin(url, origin, sizeof origin);
    char *host = strstr(origin, "://");
    QIE_FAIL_IF(!host, QIE_E_INVALID, err, "image_url", "'image_url' is no http or https address");
    host += 3;
    char *colon = strrchr(host, ':');
    if (host[0] == '[') {
        host++;
        host[strcspn(host, "]")] = 0;
    } else if (colon)
        *colon = 0;
    QIE_FAIL_IF(getaddrinfo(host, NULL, &hints, &list), QIE_E_INVALID, err, "image_url",
                "the host of 'image_url' cannot be resolved");
    bool ok = list != NULL;
    for (struct addrinfo *a = list; a; a = a->ai_next) {
        struct sockaddr_storage s;
        memset(&s, 0, sizeof s);
        memcpy(&s, a->ai_addr, a->ai_addrlen);
        ok = ok && is_allowed(rules, &s);
    }
    if (ok) {
        char text[48] = "";
        getnameinfo(list->ai_addr, list->ai_addrlen, text, sizeof text, NULL, 0, NI_NUMERICHOST);
        snprintf(address, 64, list->ai_family == AF_INET6 ? "[%s]" : "%s", text);
    }
    freeaddrinfo(list);
    QIE_FAIL_IF(!ok, QIE_E_INVALID, err, "image_url",
                "'image_url' leads to an address that this service does not fetch from");
    return QIE_OK;
}

static qie_status fetch_with(qie_http *h, const svc_fetch_rules *rules, const char *first,
                             uint8_t **out, size_t *n, qie_error *err) {
    char url[QIE_HTTP_URL_MAX], next[QIE_HTTP_URL_MAX], address[64], why[256];
    double end = qie_now_s() + WITHIN_S;
    snprintf(url, sizeof url, "%s", first);
    for (int i = 0; i <= MAX_REDIRECTS; i++) {
        char *body = NULL;
        size_t size = 0;
        qie_http_reply reply;
        QIE_TRY(judge(rules, url, address, err));
        int left = (int)(end - qie_now_s());
        /* No origin is this one, so a redirect is always the answer itself. */
        qie_http_request r = {.url = url,
                              .from = -1,
                              .to = -1,
                              .stop_at_redirect = true,
                              .token_origin = "http://none.invalid",
                              .timeout_s = left > 0 ? left : 1,
                              .address = address};
        qie_http_end e = qie_http_fetch(h, &r, MAX_BYTES, &body, &size, &reply, why, NULL, NULL);
        if (e == QIE_HTTP_OK && reply.status / 100 == 3 && reply.location[0] &&
            qie_http_resolve(url, reply.location, next, sizeof next)) {
            free(body);
            snprintf(url, sizeof url, "%s", next);
            continue;
        }
        if (e == QIE_HTTP_OK && reply.status == 200 && size > 0) {
            *out = (uint8_t *)body;
            *n = size;
            return QIE_OK;
        }
        free(body);
        if (e == QIE_HTTP_OK)
            return qie_fail(err, QIE_E_INVALID, "image_url", "'image_url' answered %d%s",
                            reply.status, size ? "" : " without content");
        return qie_fail(err, QIE_E_INVALID, "image_url", "'image_url' cannot be fetched: %s", why);
    }
    return qie_fail(err, QIE_E_INVALID, "image_url", "'image_url' redirects more than %d times",
                    MAX_REDIRECTS);
}

qie_status svc_fetch(const svc_fetch_rules *rules, const char *url, uint8_t **out, size_t *n,
                     qie_error *err) {
    qie_http *h = NULL;
    qie_http_options o = qie_http_options_default();
    o.connect_timeout_s = 10;
    o.stall_timeout_s = 10;
    *out = NULL;
    QIE_TRY(qie_http_create(&o, &h, err));
    qie_status st = fetch_with(h, rules, url, out, n, err);
    qie_http_destroy(h);
    return st;
}
