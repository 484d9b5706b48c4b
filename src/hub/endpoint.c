#define _GNU_SOURCE
#include "hub/endpoint.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/log.h"
#include "hub/cache.h"

/* ------------------------------------------------------------------ settings */

static const char *env_set(const char *name) {
    const char *v = getenv(name);
    return v && *v ? v : NULL;
}

static bool is_true(const char *v) {
    return v && (!strcasecmp(v, "1") || !strcasecmp(v, "on") || !strcasecmp(v, "yes") ||
                 !strcasecmp(v, "true"));
}

static qie_status add_endpoints(const char *list, const char *where, qie_hub_settings *s,
                                qie_error *err) {
    while (*list) {
        size_t n = strcspn(list, ",; \t");
        if (n) {
            QIE_FAIL_IF(s->n_endpoints == QIE_HUB_ENDPOINTS_MAX, QIE_E_INVALID, err, where,
                        "%s names more than %d addresses", where, QIE_HUB_ENDPOINTS_MAX);
            qie_endpoint *e = &s->endpoints[s->n_endpoints];
            const char *from = list;
            size_t len = n;
            e->kind = QIE_HUB_HF;
            if (len > 11 && !strncmp(from, "modelscope:", 11)) {
                e->kind = QIE_HUB_MODELSCOPE;
                from += 11;
                len -= 11;
            }
            while (len && from[len - 1] == '/')
                len--;
            bool scheme = !strncasecmp(from, "http://", 7) || !strncasecmp(from, "https://", 8);
            char shown[201];
            snprintf(shown, sizeof shown, "%.*s", (int)(n > 200 ? 200 : n), list);
            QIE_FAIL_IF(!scheme && strstr(shown, "://"), QIE_E_INVALID, err, where,
                        "%s: '%s' is neither an http nor an https address", where, shown);
            int w =
                snprintf(e->url, sizeof e->url, "%s%.*s", scheme ? "" : "https://", (int)len, from);
            char origin[300];
            qie_http_origin(e->url, origin, sizeof origin);
            QIE_FAIL_IF(w < 0 || (size_t)w >= sizeof e->url || origin[0] == '(' ||
                            strpbrk(e->url, "?#") != NULL,
                        QIE_E_INVALID, err, where,
                        "%s: '%.*s' is no address of a hub; write it as https://huggingface.co",
                        where, (int)(n > 200 ? 200 : n), list);
            if (strcasestr(origin, "modelscope"))
                e->kind = QIE_HUB_MODELSCOPE;
            s->n_endpoints++;
        }
        list += n + (list[n] != 0);
    }
    return QIE_OK;
}

static void read_token_file(const char *path, const char *origin, qie_hub_settings *s) {
    unsigned char *text;
    size_t n;
    if (qie_file_read(path, sizeof s->token - 1, &text, &n, NULL) != QIE_OK)
        return;
    size_t len = strcspn((char *)text, " \t\r\n");
    if (len) {
        snprintf(s->token, sizeof s->token, "%.*s", (int)len, (char *)text);
        snprintf(s->token_origin, sizeof s->token_origin, "%s", origin);
    }
    explicit_bzero(text, n);
    free(text);
}

static qie_status read_token(qie_hub_settings *s, qie_error *err) {
    static const char *const names[] = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"};
    for (size_t i = 0; i < 2; i++) {
        const char *v = env_set(names[i]);
        if (!v)
            continue;
        v += strspn(v, " \t\r\n");
        size_t n = strcspn(v, " \t\r\n");
        QIE_FAIL_IF(n >= sizeof s->token, QIE_E_INVALID, err, names[i],
                    "%s is longer than %zu characters", names[i], sizeof s->token - 1);
        if (!n)
            continue;
        snprintf(s->token, sizeof s->token, "%.*s", (int)n, v);
        snprintf(s->token_origin, sizeof s->token_origin, "%s", names[i]);
        break;
    }
    if (!s->token[0] && !is_true(getenv("HF_HUB_DISABLE_IMPLICIT_TOKEN"))) {
        if (env_set("HF_TOKEN_PATH"))
            read_token_file(getenv("HF_TOKEN_PATH"), "HF_TOKEN_PATH", s);
        else {
            char *home = qie_cache_home(), *path = home ? qie_path_join(home, "token") : NULL;
            if (path)
                read_token_file(path, "token file", s);
            free(path);
            free(home);
        }
    }
    /* A token goes into a header line: nothing in it may end the line. */
    for (const char *p = s->token; *p; p++)
        if ((unsigned char)*p <= 0x20 || (unsigned char)*p >= 0x7f) {
            qie_status st =
                qie_fail(err, QIE_E_INVALID, s->token_origin,
                         "the token from %s holds characters that no token has", s->token_origin);
            s->token[0] = 0;
            return st;
        }
    return QIE_OK;
}

qie_status qie_hub_settings_read(char *const *endpoints, size_t n, qie_hub_settings *out,
                                 qie_error *err) {
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < n; i++)
        QIE_TRY(add_endpoints(endpoints[i], "--endpoint", out, err));
    snprintf(out->endpoint_origin, sizeof out->endpoint_origin, "%s", "--endpoint");
    if (!out->n_endpoints && env_set("HF_ENDPOINT")) {
        QIE_TRY(add_endpoints(getenv("HF_ENDPOINT"), "HF_ENDPOINT", out, err));
        snprintf(out->endpoint_origin, sizeof out->endpoint_origin, "%s", "HF_ENDPOINT");
    }
    if (!out->n_endpoints) {
        QIE_TRY(add_endpoints(QIE_HUB_DEFAULT_ENDPOINT, "default", out, err));
        snprintf(out->endpoint_origin, sizeof out->endpoint_origin, "%s", "default");
    }
    if (is_true(getenv("HF_HUB_OFFLINE")))
        out->offline_origin = "HF_HUB_OFFLINE";
    else if (!env_set("HF_HUB_OFFLINE") && is_true(getenv("TRANSFORMERS_OFFLINE")))
        out->offline_origin = "TRANSFORMERS_OFFLINE";
    out->offline = out->offline_origin != NULL;
    out->stall_timeout_s = 30;
    const char *t = env_set("HF_HUB_DOWNLOAD_TIMEOUT");
    if (t) {
        char *end;
        long v = strtol(t, &end, 10);
        QIE_FAIL_IF(
            *end || v < 1 || v > 3600, QIE_E_INVALID, err, "HF_HUB_DOWNLOAD_TIMEOUT",
            "HF_HUB_DOWNLOAD_TIMEOUT is '%.40s', a number of seconds from 1 to 3600 is needed", t);
        out->stall_timeout_s = (int)v;
    }
    static const char *const bundles[] = {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"};
    for (size_t i = 0; i < 3 && !out->ca_bundle; i++)
        if ((out->ca_bundle = env_set(bundles[i])))
            out->ca_origin = bundles[i];
    return read_token(out, err);
}

/* ------------------------------------------------------------------ addresses */

const char *qie_hub_revision_for(qie_hub_kind kind, const char *revision) {
    if (kind == QIE_HUB_MODELSCOPE)
        return !revision || !strcmp(revision, "main") ? "master" : revision;
    return revision ? revision : "main";
}

void qie_hub_file_url(const qie_endpoint *e, const char *repo, const char *revision,
                      const char *path, char *out, size_t cap) {
    if (e->kind == QIE_HUB_MODELSCOPE)
        snprintf(out, cap, "%s/api/v1/models/%s/repo?Revision=", e->url, repo);
    else
        snprintf(out, cap, "%s/%s/resolve/", e->url, repo);
    qie_url_escape(out, cap, revision, false);
    size_t n = strlen(out);
    snprintf(out + n, cap - n, "%s", e->kind == QIE_HUB_MODELSCOPE ? "&FilePath=" : "/");
    qie_url_escape(out, cap, path, e->kind == QIE_HUB_HF);
}

/* ------------------------------------------------------------------ patience */

double qie_hub_backoff(int k, int retry_after_s) {
    static unsigned long long state; /* only spreads clients: no need to be more than that */
    if (!state)
        state =
            (unsigned long long)time(NULL) * 2654435761u ^ (unsigned long long)(uintptr_t)&state;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    double chance = (double)(state >> 40) / (double)(1u << 24);
    double s = 0.25 * pow(2.0, k < 10 ? k : 10);
    s = (s < 8 ? s : 8) * (0.875 + 0.25 * chance);
    return retry_after_s > s ? (double)retry_after_s : s;
}

bool qie_hub_may_retry(int status) {
    return status == 408 || status == 425 || status == 429 || status >= 500;
}

static qie_status wait_s(const qie_hub_client *c, double seconds, qie_error *err) {
    double until = qie_now_s() + seconds;
    for (;;) {
        QIE_FAIL_IF(c->stop && c->stop(c->stop_arg), QIE_E_CANCELLED, err, NULL,
                    "interrupted; what is there is kept: type the same command again to go on");
        double left = until - qie_now_s();
        if (left <= 0)
            return QIE_OK;
        struct timespec ts = {0, left < 0.1 ? (long)(left * 1e9) : 100000000L};
        nanosleep(&ts, NULL);
    }
}

/* ------------------------------------------------------------------ words */

static qie_status ask_for_password(const char *proxy, qie_error *err) {
    return qie_fail(err, QIE_E_NETWORK, "HTTPS_PROXY",
                    "the proxy %s wants a user name and a password, or other ones (407): write "
                    "them into the variable that names it, http://USER:PASSWORD@HOST:PORT",
                    proxy);
}

qie_status qie_hub_unreachable(const qie_hub_settings *s, const qie_endpoint *e, qie_http_end end,
                               const char *why, qie_error *err) {
    char proxy[300];
    qie_http_proxy_for(e->url, proxy, sizeof proxy);
    if (end == QIE_HTTP_TLS)
        return qie_fail(err, QIE_E_NETWORK, "HF_ENDPOINT",
                        "no secure connection to %s: %s; if a proxy of your company signs the "
                        "connections, name a file with its certificate in SSL_CERT_FILE%s%s%s",
                        e->url, why, s->ca_origin ? " (now the certificates of " : "",
                        s->ca_origin ? s->ca_origin : "", s->ca_origin ? " are used)" : "");
    if (end == QIE_HTTP_PROXY_AUTH)
        return ask_for_password(proxy, err);
    if (end == QIE_HTTP_NO_CONNECT)
        return qie_fail(
            err, QIE_E_NETWORK, "HF_ENDPOINT",
            "cannot connect to %s%s%s: %s; check the network, set HTTPS_PROXY if one needs a "
            "proxy here, or name a mirror: --endpoint https://hf-mirror.com or --endpoint "
            "https://www.modelscope.cn (or HF_ENDPOINT=...)",
            e->url, proxy[0] ? " through the proxy " : "", proxy, why);
    return qie_fail(err, QIE_E_NETWORK, "HF_ENDPOINT",
                    "%s does not answer properly (%s); try again later or name another hub with "
                    "--endpoint or HF_ENDPOINT",
                    e->url, why);
}

qie_status qie_hub_refusal(const qie_hub_settings *s, const qie_endpoint *e, const char *repo,
                           const char *revision, const char *what, const qie_http_reply *reply,
                           qie_error *err) {
    bool gated = !strcasecmp(reply->error_code, "GatedRepo");
    if (gated || reply->status == 403)
        return qie_fail(
            err, QIE_E_DENIED, "HF_TOKEN",
            "%s does not give %s of %s out (%d): accept the model's conditions at %s/%s and "
            "set HF_TOKEN to a token of that account%s",
            e->url, what, repo, reply->status, e->url, repo,
            s->token[0] ? " (the present one was refused)" : "");
    /* Hugging Face answers 401 for a repository that does not exist, so that private names cannot
     * be probed. */
    if (reply->status == 401)
        return qie_fail(
            err, QIE_E_DENIED, "HF_TOKEN",
            "%s answers 401 for %s: the repository does not exist there or is private; check "
            "the name, or set HF_TOKEN%s",
            e->url, repo, s->token[0] ? " to another token (the present one was refused)" : "");
    if (reply->status == 407) {
        char proxy[300];
        qie_http_proxy_for(e->url, proxy, sizeof proxy);
        return ask_for_password(proxy, err);
    }
    if (reply->status == 404 || reply->status == 410) {
        if (!strcasecmp(reply->error_code, "RevisionNotFound"))
            return qie_fail(err, QIE_E_NOT_FOUND, "revision", "%s has no revision '%s' at %s", repo,
                            revision ? revision : "main", e->url);
        return qie_fail(err, QIE_E_NOT_FOUND, "repository",
                        "%s has not %s of %s (%d): check the name of the repository and --revision",
                        e->url, what, repo, reply->status);
    }
    if (reply->status == 429)
        return qie_fail(
            err, QIE_E_NETWORK, "HF_TOKEN",
            "%s asks for fewer requests (429): wait some minutes, set HF_TOKEN if you have "
            "an account, or name a mirror with --endpoint",
            e->url);
    return qie_fail(
        err, QIE_E_NETWORK, "HF_ENDPOINT",
        "%s answers %d for %s of %s: try again later, or name another hub with --endpoint or "
        "HF_ENDPOINT",
        e->url, reply->status, what, repo);
}

/* ------------------------------------------------------------------ questions */

/* A list that was cut on the way, by a proxy say, and still ended as a whole answer. */
static bool is_broken_json(const char *text, size_t n) {
    qie_json *root = NULL;
    bool broken = qie_json_parse(text, n, "answer", &root, NULL) != QIE_OK;
    qie_json_free(root);
    return broken;
}

/* Ask until there is an answer that will not change: any status that is not to be retried. `text`,
 * where it is wanted, is JSON; one that stays broken is the caller's to complain of. */
static qie_status ask(const qie_hub_client *c, const qie_endpoint *e, const qie_http_request *base,
                      char **text, size_t *n, qie_http_reply *reply, qie_error *err) {
    char why[256];
    for (int k = 0;; k++) {
        qie_http_request r = *base;
        r.token = c->settings->token[0] && e->kind == QIE_HUB_HF ? c->settings->token : NULL;
        r.token_origin = e->url;
        qie_http_end end = qie_http_fetch(c->http, &r, QIE_HUB_JSON_MAX, text, n, reply, why,
                                          c->stop, c->stop_arg);
        QIE_FAIL_IF(end == QIE_HTTP_STOPPED, QIE_E_CANCELLED, err, NULL, "interrupted");
        bool broken = end == QIE_HTTP_OK && text && base->from < 0 && reply->status == 200 &&
                      k < 4 && k + 1 < c->max_tries && is_broken_json(*text, *n);
        if (end == QIE_HTTP_OK && !qie_hub_may_retry(reply->status) && !broken)
            return QIE_OK;
        if (text) {
            free(*text);
            *text = NULL;
        }
        /* A name that does not resolve, a refused port or a bad certificate will not heal in a
         * minute. */
        bool hopeless = end == QIE_HTTP_TLS || end == QIE_HTTP_PROXY_AUTH ||
                        (end == QIE_HTTP_NO_CONNECT && k >= 2) || end == QIE_HTTP_REDIRECT;
        if (hopeless || k + 1 >= c->max_tries) {
            if (end == QIE_HTTP_OK)
                return QIE_OK;
            return qie_hub_unreachable(c->settings, e, end, why, err);
        }
        double s = qie_hub_backoff(k, end == QIE_HTTP_OK ? reply->retry_after_s : -1);
        if (broken)
            qie_log(QIE_LOG_INFO, "hub", "%s sends a list that is no JSON; again in %.1f s", e->url,
                    s);
        else if (end == QIE_HTTP_OK)
            qie_log(QIE_LOG_INFO, "hub", "%s answers %d; again in %.1f s", e->url, reply->status,
                    s);
        else
            qie_log(QIE_LOG_INFO, "hub", "%s; again in %.1f s", why, s);
        QIE_TRY(wait_s(c, s, err));
    }
}

/* Size and hash of one file from the headers of its address. */
static qie_status ask_file(const qie_hub_client *c, const qie_endpoint *e, const char *repo,
                           const char *revision, qie_hub_file *f, char commit[41], qie_error *err) {
    char url[QIE_HTTP_URL_MAX];
    qie_http_reply r;
    qie_hub_file_url(e, repo, revision, f->path, url, sizeof url);
    qie_http_request q = {.head = true, .url = url, .from = -1, .to = -1, .stop_at_redirect = true};
    QIE_TRY(ask(c, e, &q, NULL, NULL, &r, err));
    if (r.status / 100 != 2 && r.status / 100 != 3)
        return qie_hub_refusal(c->settings, e, repo, revision, f->path, &r, err);
    if (qie_hub_is_commit(r.commit) && !commit[0])
        snprintf(commit, 41, "%.40s", r.commit);
    int64_t size = r.linked_size >= 0 ? r.linked_size : r.status / 100 == 2 ? r.content_length : -1;
    if (size < 0) { /* a length that HEAD does not tell stands behind the range of one byte */
        qie_http_request one = {.url = url, .from = 0, .to = 0};
        char *text = NULL;
        size_t n = 0;
        qie_http_reply r1;
        QIE_TRY(ask(c, e, &one, &text, &n, &r1, err));
        free(text);
        size = r1.range_total;
    }
    QIE_FAIL_IF(size < 0, QIE_E_NETWORK, err, NULL, "%s does not tell the size of '%s'", e->url,
                f->path);
    QIE_FAIL_IF(f->size >= 0 && f->size != size, QIE_E_CORRUPT, err, NULL,
                "%s tells two sizes of '%s': %lld and %lld", e->url, f->path, (long long)f->size,
                (long long)size);
    qie_hub_listing one = {0};
    qie_status st = qie_hub_listing_add(&one, f->path, strlen(f->path), size, r.hub_etag, NULL,
                                        qie_hash_kind_of(r.hub_etag) == QIE_HASH_SHA256, err);
    if (st == QIE_OK) {
        char *path = f->path;
        free(one.files[0].path);
        *f = one.files[0];
        f->path = path;
        if (!f->etag[0]) /* nothing to name the blob by: its place does */
            qie_sha1_hex(f->path, strlen(f->path), f->etag);
        free(one.files);
    } else
        qie_hub_listing_release(&one);
    return st;
}

static qie_status list_modelscope(const qie_hub_client *c, const qie_endpoint *e, const char *repo,
                                  const char *revision, qie_hub_listing *out, qie_error *err) {
    char url[QIE_HTTP_URL_MAX];
    snprintf(url, sizeof url, "%s/api/v1/models/%s/repo/files?Recursive=true&Revision=", e->url,
             repo);
    qie_url_escape(url, sizeof url, revision, false);
    qie_http_request q = {.url = url, .from = -1, .to = -1};
    qie_http_reply r;
    char *text = NULL;
    size_t n = 0;
    QIE_TRY(ask(c, e, &q, &text, &n, &r, err));
    qie_status st = r.status == 200 ? qie_hub_parse_modelscope(text, n, out, err)
                                    : qie_hub_refusal(c->settings, e, repo, revision,
                                                      "the list of files", &r, err);
    free(text);
    return st;
}

static qie_status list_tree(const qie_hub_client *c, const qie_endpoint *e, const char *repo,
                            qie_hub_listing *out, bool *absent, qie_error *err) {
    char url[QIE_HTTP_URL_MAX];
    snprintf(url, sizeof url, "%s/api/models/%s/tree/%s?recursive=true&expand=false", e->url, repo,
             out->commit);
    *absent = false;
    for (int page = 0; url[0]; page++) {
        qie_http_request q = {.url = url, .from = -1, .to = -1};
        qie_http_reply r;
        char *text = NULL;
        size_t n = 0;
        QIE_FAIL_IF(page > 1000, QIE_E_NETWORK, err, NULL, "%s: the list of files does not end",
                    e->url);
        QIE_TRY(ask(c, e, &q, &text, &n, &r, err));
        if (r.status != 200) {
            free(text);
            *absent = page == 0 && (r.status == 404 || r.status == 405 || r.status == 501);
            if (*absent)
                return QIE_OK;
            return qie_hub_refusal(c->settings, e, repo, out->commit, "the list of files", &r, err);
        }
        qie_status st = qie_hub_parse_tree(text, n, out, err);
        free(text);
        QIE_TRY(st);
        url[0] = 0;
        if (r.next[0]) {
            /* A mirror may pass on the address of the hub behind it: only the path counts, and it
             * is asked where the first page was, so that no other host can add files to the list.
             */
            const char *path = strstr(r.next, "://");
            path = path ? strchr(path + 3, '/') : r.next;
            char want[300];
            snprintf(want, sizeof want, "/api/models/%s/tree/", repo);
            QIE_FAIL_IF(!path || strncasecmp(path, want, strlen(want)), QIE_E_NETWORK, err, NULL,
                        "%s continues its list of files at another place: refused", e->url);
            snprintf(url, sizeof url, "%s%.3000s", e->url, path);
        }
    }
    return QIE_OK;
}

qie_status qie_hub_list(const qie_hub_client *c, const qie_endpoint *e, const char *repo,
                        const char *revision, qie_hub_listing *out, qie_error *err) {
    memset(out, 0, sizeof *out);
    revision = qie_hub_revision_for(e->kind, revision);
    qie_status st;
    if (e->kind == QIE_HUB_MODELSCOPE)
        st = list_modelscope(c, e, repo, revision, out, err);
    else {
        char url[QIE_HTTP_URL_MAX];
        qie_http_reply r;
        char *text = NULL;
        size_t n = 0;
        bool absent = false;
        snprintf(url, sizeof url, "%s/api/models/%s/revision/", e->url, repo);
        qie_url_escape(url, sizeof url, revision, false);
        qie_http_request q = {.url = url, .from = -1, .to = -1};
        st = ask(c, e, &q, &text, &n, &r, err);
        if (st == QIE_OK && r.status != 200)
            st = qie_hub_refusal(c->settings, e, repo, revision, "the list of files", &r, err);
        if (st == QIE_OK)
            st = qie_hub_parse_revision(text, n, false, out, err);
        if (st == QIE_OK)
            st = list_tree(c, e, repo, out, &absent, err);
        if (st == QIE_OK &&
            absent) /* a mirror without that route: names from here, the rest by HEAD */
            st = qie_hub_parse_revision(text, n, true, out, err);
        free(text);
    }
    char head_commit[41] = "";
    for (size_t i = 0; st == QIE_OK && i < out->n; i++)
        if (out->files[i].size < 0 || !out->files[i].etag[0])
            st = ask_file(c, e, repo, e->kind == QIE_HUB_HF ? out->commit : revision,
                          &out->files[i], head_commit, err);
    if (st == QIE_OK)
        st = qie_hub_listing_finish(out, err);
    if (st == QIE_OK && !out->n)
        st = qie_fail(err, QIE_E_NOT_FOUND, "repository", "%s holds no files at %s", repo, e->url);
    if (st != QIE_OK)
        qie_hub_listing_release(out);
    return st;
}
