/* What master and worker say to each other: one fixed-size struct per packet of a SOCK_SEQPACKET
 * pair, with a memfd attached where bytes of any length travel. Both ends are the same binary; the
 * version guards against a program replaced while the service runs. Neither side trusts the other's
 * bytes: sizes are checked before use and files are read with pread, never mapped. */
#ifndef QIE_SERVICE_MESSAGE_H
#define QIE_SERVICE_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "plan/config.h"
#include "qie/error.h"
#include "service/common/job.h"

#define SVC_MESSAGE_MAGIC 0x51455332u /* "QES2" */
#define SVC_CHANNEL_FD 3              /* the worker's end */

typedef enum svc_message_kind {
    SVC_MSG_JOB = 1, /* to the worker, with the payload */
    SVC_MSG_CANCEL,  /* stop the job `token` */
    SVC_MSG_QUIT,    /* leave when idle */
    SVC_MSG_BEAT,    /* from the worker: alive, `stage` says where; reading weights counts */
    SVC_MSG_READY,   /* with an svc_model_info */
    SVC_MSG_PROGRESS,
    SVC_MSG_PREVIEW, /* with an encoded picture */
    SVC_MSG_DONE,    /* with an svc_result_head and the encoded pictures */
    SVC_MSG_FAILED   /* the job `token`, or with token 0 the worker itself, which then ends */
} svc_message_kind;

typedef struct svc_message {
    uint32_t magic, kind;
    uint64_t token; /* one attempt at one job */
    char job_id[SVC_ID_BYTES];
    char stage[24];
    int32_t step, total, i_image, n_images;
    double seconds_left, elapsed_s;
    double stage_limit_s; /* estimate of the longest silence in this stage; 0: unknown */
    int64_t memory_used_bytes, memory_free_bytes;
    int32_t status; /* FAILED: qie_status */
    char param[64];
    char text[960];
} svc_message;

/* Files that a tokenizer may consist of; those that a model has follow svc_model_info. */
#define SVC_TOKENIZER_FILES 5
extern const char *const svc_tokenizer_files[SVC_TOKENIZER_FILES];

/* What a worker knows of its model. */
typedef struct svc_model_info {
    char model[512], name[128], precision[16], backend[16], cpu_level[24];
    char about_en[400], about_zh[400];
    int32_t n_threads, num_inference_steps, max_side, keep_size, is_demo, act_dtype;
    double true_cfg_scale;
    int64_t weights_bytes, ref_area;
    qie_model_config config;
    uint64_t tokenizer_bytes[SVC_TOKENIZER_FILES]; /* 0: there is no such file */
} svc_model_info;                                  /* followed by those files */

typedef struct svc_job_head {
    svc_params params;
    uint64_t n_prompt, n_negative;
    uint64_t n_images, image_bytes[SVC_MAX_PICTURES];
} svc_job_head; /* followed by prompt, negative prompt, pictures */

typedef struct svc_result_head {
    uint64_t seed;
    int32_t width, height, num_inference_steps, cfg, retried_f32;
    double true_cfg_scale;
    double encode_s, denoise_s, decode_s, total_s;
    uint64_t n_images, image_bytes[SVC_MAX_RESULTS];
    int32_t cache, n_skipped; /* qie_cache in force; forwards cut short by it */
    int32_t n_loras;          /* in force */
    svc_lora loras[SVC_MAX_LORAS];
    int32_t n_warnings;
    char warnings[10][256];
    char placement[512]; /* on GPUs; "" else */
} svc_result_head;       /* followed by the pictures */

void svc_message_init(svc_message *m, svc_message_kind kind, uint64_t token);
/* fd < 0: none attached. False when the other side is gone or its buffer is full (errno). */
bool svc_message_send(int channel, const svc_message *m, int fd);
#define SVC_GONE (-1)
#define SVC_NONSENSE (-2)
/* 1: a message, *fd the attached descriptor or -1; 0: nothing there now; SVC_GONE: the other side
 * is gone; SVC_NONSENSE: what came is no message. Strings are terminated, UTF-8 and without control
 * characters. */
int svc_message_receive(int channel, svc_message *m, int *fd);

/* Terminate; what is no UTF-8 or a control character becomes '?'. */
void svc_text_clean(char *text, size_t cap);

/* A new memory file with the parts one behind another; -1 with errno. */
typedef struct svc_part {
    const void *data;
    size_t n;
} svc_part;
int svc_memory_file(const char *name, const svc_part *parts, size_t n_parts);
/* Read n bytes at an offset; false when there are fewer. */
bool svc_read_at(int fd, void *out, size_t n, int64_t offset);
/* Size of a file, -1 when unknown. */
int64_t svc_file_size(int fd);

#endif
