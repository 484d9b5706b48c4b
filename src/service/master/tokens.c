#define _GNU_SOURCE
#include "service/master/tokens.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/files.h"
#include "service/master/log.h"
#include "text/prompt.h"

#define MAX_FILES_BYTES (64ull << 20) /* the released model's are 5 MB */

struct svc_tokens {
    int fd;
    uint64_t bytes[SVC_TOKENIZER_FILES];
    pthread_mutex_t lock; /* of the opening; the tokenizer itself never changes */
    bool tried;
    qie_tokenizer *tokenizer;
};

svc_tokens *svc_tokens_create(const svc_model_info *info, int fd) {
    uint64_t all = 0;
    for (int i = 0; i < SVC_TOKENIZER_FILES; i++) {
        if (info->tokenizer_bytes[i] > MAX_FILES_BYTES)
            return NULL;
        all += info->tokenizer_bytes[i];
    }
    svc_tokens *t = all > 0 && all <= MAX_FILES_BYTES ? calloc(1, sizeof *t) : NULL;
    if (!t)
        return NULL;
    memcpy(t->bytes, info->tokenizer_bytes, sizeof t->bytes);
    t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (t->fd < 0) {
        free(t);
        return NULL;
    }
    pthread_mutex_init(&t->lock, NULL);
    return t;
}

void svc_tokens_destroy(svc_tokens *t) {
    if (!t)
        return;
    qie_tokenizer_close(t->tokenizer);
    pthread_mutex_destroy(&t->lock);
    if (t->fd >= 0)
        close(t->fd);
    free(t);
}

static qie_status put_file(svc_tokens *t, int i, int64_t at, qie_files *files, qie_error *err) {
    char name[64];
    uint8_t *data = malloc((size_t)t->bytes[i]);
    QIE_FAIL_IF(!data, QIE_E_NO_MEMORY, err, NULL, "out of memory");
    snprintf(name, sizeof name, "tokenizer/%s", svc_tokenizer_files[i]);
    qie_status st = svc_read_at(t->fd, data, (size_t)t->bytes[i], at)
                        ? qie_files_put(files, name, data, (size_t)t->bytes[i], err)
                        : qie_fail(err, QIE_E_CORRUPT, NULL, "the worker sent less than it said");
    free(data);
    return st;
}

static qie_status read_tokenizer(svc_tokens *t, qie_error *err) {
    qie_files *files = NULL;
    int64_t at = sizeof(svc_model_info);
    QIE_TRY(qie_files_open_empty("the worker's tokenizer", &files, err));
    qie_status st = QIE_OK;
    for (int i = 0; i < SVC_TOKENIZER_FILES && st == QIE_OK; i++) {
        if (t->bytes[i])
            st = put_file(t, i, at, files, err);
        at += (int64_t)t->bytes[i];
    }
    if (st == QIE_OK)
        st = qie_tokenizer_open(files, "tokenizer", &t->tokenizer, err);
    qie_files_close(files);
    return st;
}

/* Read at the first need; one attempt. */
static const qie_tokenizer *tokenizer_of(svc_tokens *t) {
    qie_error e;
    pthread_mutex_lock(&t->lock);
    if (!t->tried) {
        t->tried = true;
        if (read_tokenizer(t, &e) != QIE_OK)
            svc_log(QIE_LOG_WARN, "tokens", NULL, "prompts are counted by the worker only: %s",
                    e.message);
        close(t->fd);
        t->fd = -1;
    }
    pthread_mutex_unlock(&t->lock);
    return t->tokenizer;
}

static qie_status check_one(svc_tokens *t, const char *text, const qie_size_plan *sizes,
                            const char *param, qie_error *err) {
    int counts[QIE_MAX_PICTURES];
    size_t n = strlen(text), n_images = (size_t)sizes->n_images;
    for (size_t i = 0; i < n_images; i++)
        counts[i] = sizes->images[i].n_vision_tokens;
    QIE_TRY(qie_prompt_check(text, n, err));
    int64_t most = qie_prompt_most_rows(n, counts, n_images);
    if (!t || qie_size_plan_check_text(sizes, most, 0, param, NULL) == QIE_OK)
        return QIE_OK;
    const qie_tokenizer *tokenizer = tokenizer_of(t);
    if (!tokenizer)
        return QIE_OK;
    qie_prompt p;
    QIE_TRY(qie_prompt_build(tokenizer, text, n, counts, n_images, &p, err));
    qie_status st = qie_size_plan_check_text(sizes, (int64_t)(p.n_ids - p.n_drop),
                                             (int64_t)p.n_prompt, param, err);
    qie_prompt_release(&p);
    return st;
}

qie_status svc_tokens_check(svc_tokens *t, const char *prompt, const char *negative,
                            const qie_size_plan *sizes, qie_error *err) {
    QIE_TRY(check_one(t, prompt, sizes, "prompt", err));
    qie_status st = negative ? check_one(t, negative, sizes, "negative_prompt", err) : QIE_OK;
    if (st == QIE_E_INVALID && err)
        snprintf(err->param, sizeof err->param, "negative_prompt");
    return st;
}
