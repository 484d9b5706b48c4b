#include "text/nfc.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/checked.h"
#include "base/error.h"

/* The library that tokenizers 0.23 normalises with has Unicode 9 tables. Marks encoded later are
 * class 0 there: they neither move nor let others move past them; U+11938 is neither taken apart
 * nor made from U+11935 U+11930. Found by comparing all code points with utf8proc 2.8 (Unicode 15).
 * U+11A7 is here for another reason: utf8proc 2.8 takes it for an empty final consonant and drops
 * it behind a Hangul syllable. tests/unit/test_text_nfc.c holds samples. */
static const struct {
    utf8proc_int32_t first, last;
} BLOCKS[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
    {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x11a7, 0x11a7},
    {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},
    {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99},
    {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42},
    {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
    {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
};

static bool is_block(utf8proc_int32_t c) {
    if (c < BLOCKS[0].first)
        return false;
    for (size_t i = 0; i < sizeof BLOCKS / sizeof *BLOCKS; i++)
        if (c <= BLOCKS[i].last)
            return c >= BLOCKS[i].first;
    return false;
}

static int combining_class(utf8proc_int32_t c) {
    int k = c < 0x300 ? 0 : utf8proc_get_property(c)->combining_class;
    return k && is_block(c) ? 0 : k;
}

/* Every code point below U+0300 is its own form C and composes with nothing before it. */
static bool surely_normal(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] >= 0xcc)
            return false;
    return true;
}

/* Stable order by class of a run of marks. A sort by counting: utf8proc_decompose() inserts, which
 * takes minutes for a run of 100,000. */
static void sort_run(utf8proc_int32_t *run, utf8proc_int32_t *tmp, size_t n) {
    size_t at[256] = {0}, sum = 0;
    for (size_t i = 0; i < n; i++)
        at[combining_class(run[i]) & 255]++;
    for (size_t k = 0; k < 256; k++) {
        size_t c = at[k];
        at[k] = sum;
        sum += c;
    }
    for (size_t i = 0; i < n; i++)
        tmp[at[combining_class(run[i]) & 255]++] = run[i];
    memcpy(run, tmp, n * sizeof *run);
}

static void reorder(utf8proc_int32_t *c, utf8proc_int32_t *tmp, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t end = i;
        bool sorted = true;
        for (int last = 0, k; end < n && (k = combining_class(c[end])) > 0; end++, last = k)
            sorted &= k >= last;
        if (!sorted)
            sort_run(c + i, tmp, end - i);
        i = end + 1;
    }
}

/* Compose between the code points of BLOCKS, which let nothing through. Returns the new length. */
static size_t compose(utf8proc_int32_t *c, size_t n) {
    size_t out = 0;
    for (size_t i = 0; i < n;) {
        size_t end = i + 1;
        while (end < n && !is_block(c[end]))
            end++;
        utf8proc_ssize_t k = utf8proc_normalize_utf32(c + i, (utf8proc_ssize_t)(end - i),
                                                      UTF8PROC_COMPOSE | UTF8PROC_STABLE);
        size_t kept = k < 0 ? end - i : (size_t)k;
        memmove(c + out, c + i, kept * sizeof *c);
        out += kept;
        i = end;
    }
    return out;
}

/* Longest canonical decomposition of one code point: 4. */
#define MAX_DECOMPOSED 4

static size_t decompose(const char *text, size_t n, utf8proc_int32_t *out) {
    size_t len = 0;
    for (size_t i = 0; i < n;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t k =
            utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(n - i), &c);
        if (k <= 0) { /* not reached: the text is valid */
            i++;
            continue;
        }
        i += (size_t)k;
        if (c == 0x11938) {
            out[len++] = c;
            continue;
        }
        int boundclass = 0;
        utf8proc_ssize_t m = utf8proc_decompose_char(
            c, out + len, MAX_DECOMPOSED, UTF8PROC_COMPOSE | UTF8PROC_STABLE, &boundclass);
        if (m < 0 || m > MAX_DECOMPOSED) {
            out[len] = c;
            m = 1;
        }
        len += (size_t)m;
    }
    return len;
}

qie_status qie_nfc(const char *text, size_t n, const char **out, size_t *n_out, char **owned,
                   qie_error *err) {
    *out = text;
    *n_out = n;
    *owned = NULL;
    if (surely_normal(text, n))
        return QIE_OK;
    /* The worst growth is two bytes into three code points (U+0390), thus 2 of them per byte is
     * enough. */
    size_t bytes;
    utf8proc_int32_t *c = NULL, *tmp = NULL;
    char *s = NULL;
    if (qie_mul_size(n, 2 * sizeof *c, &bytes) &&
        qie_add_size(bytes, MAX_DECOMPOSED * sizeof *c, &bytes)) {
        c = malloc(bytes);
        tmp = malloc(bytes);
    }
    size_t len = 0;
    if (c && tmp) {
        len = decompose(text, n, c);
        reorder(c, tmp, len);
        len = compose(c, len);
        s = malloc(4 * len + 1);
    }
    if (s) {
        size_t k = 0;
        for (size_t i = 0; i < len; i++)
            k += (size_t)utf8proc_encode_char(c[i], (utf8proc_uint8_t *)s + k);
        *out = *owned = s;
        *n_out = k;
    }
    free(c);
    free(tmp);
    return s ? QIE_OK : qie_fail(err, QIE_E_NO_MEMORY, NULL, "no memory to normalise the text");
}
