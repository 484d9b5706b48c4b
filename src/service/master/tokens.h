/* Does a prompt fit the model? Counted in the master with the tokenizer that the worker read, so
 * that a prompt that is too long is refused when it comes and not when its turn has come.
 *
 * The files are kept as the worker sent them (a memory file) and read when the first prompt comes
 * that could be too long: by its bytes alone most are known to fit. */
#ifndef QIE_SERVICE_TOKENS_H
#define QIE_SERVICE_TOKENS_H

#include "plan/sizes.h"
#include "qie/error.h"
#include "service/common/message.h"

typedef struct svc_tokens svc_tokens;

/* The memory file behind fd holds *info and then the tokenizer's files; fd stays the caller's. NULL
 * when it holds none, or on lack of memory. */
svc_tokens *svc_tokens_create(const svc_model_info *info, int fd);
void svc_tokens_destroy(svc_tokens *t);
/* From a thread. t may be NULL: then only what needs no tokenizer is looked at. negative NULL: not
 * used. A tokenizer that cannot be read refuses nothing: the worker has the last word.
 * Errors: QIE_E_INVALID with "prompt" or "negative_prompt", QIE_E_NO_MEMORY. */
qie_status svc_tokens_check(svc_tokens *t, const char *prompt, const char *negative,
                            const qie_size_plan *sizes, qie_error *err);

#endif
