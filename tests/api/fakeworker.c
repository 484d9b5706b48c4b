/* A stand-in for `qwen-edit worker` that computes nothing and does what the prompt tells it, so
 * that the master can be tested with workers that hang, lie, flood, fill memory or die, and
 * measured without an engine. The first word of the prompt chooses; anything else answers with the
 * first input picture. The file named by FAKE_START says how to start: "die", "silent", "refuse",
 * "nonsense", "slow" or nothing. Its own environment goes to standard error, where the master's log
 * picks it up. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/files.h"
#include "model/demo_files.h"
#include "plan/config.h"
#include "service/common/message.h"
#include "service/worker/sandbox.h"

typedef struct order {
    svc_message message;
    svc_job_head head;
    char *prompt;
    uint8_t *picture;
    size_t n;
    int width, height;
} order;

static void pause_ms(long ms) {
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void say(const svc_message *m, int fd) {
    if (!svc_message_send(SVC_CHANNEL_FD, m, fd))
        _exit(0);
}

static void say_plain(svc_message_kind kind, uint64_t token, const char *text) {
    svc_message m;
    svc_message_init(&m, kind, token);
    m.status = QIE_E_INVALID;
    snprintf(m.text, sizeof m.text, "%s", text);
    say(&m, -1);
}

static int start_mode(char *word, size_t cap) {
    const char *path = getenv("FAKE_START");
    FILE *f = path ? fopen(path, "re") : NULL;
    size_t n = f ? fread(word, 1, cap - 1, f) : 0;
    word[n] = 0;
    word[strcspn(word, "\r\n ")] = 0;
    if (f)
        fclose(f);
    return n > 0;
}

static void tell_ready(void) {
    svc_model_info info;
    qie_files *files = NULL;
    memset(&info, 0, sizeof info);
    snprintf(info.name, sizeof info.name, "fake");
    snprintf(info.precision, sizeof info.precision, "f32");
    info.num_inference_steps = 4;
    info.true_cfg_scale = 1;
    info.keep_size = 1;
    if (qie_files_open_builtin(qie_demo_files, "the demo model", &files, NULL) != QIE_OK ||
        qie_model_config_read(files, &info.config, NULL) != QIE_OK)
        _exit(9);
    qie_files_close(files);
    svc_part part = {&info, sizeof info};
    int fd = svc_memory_file("model", &part, 1);
    svc_message m;
    svc_message_init(&m, SVC_MSG_READY, 0);
    say(&m, fd);
    close(fd);
}

/* True when the master asks to stop this job; ends the process when it has gone. */
static bool cancelled_within(const order *o, long ms) {
    struct pollfd p = {.fd = SVC_CHANNEL_FD, .events = POLLIN};
    svc_message m;
    int fd;
    if (poll(&p, 1, (int)ms) <= 0)
        return false;
    int rc = svc_message_receive(SVC_CHANNEL_FD, &m, &fd);
    if (rc < 0)
        _exit(0);
    return rc > 0 && m.kind == SVC_MSG_CANCEL && m.token == o->message.token;
}

/* The picture in the format that the job asks its result in. */
static bool as_asked(order *o) {
    qie_image_encode_options options = qie_image_encode_options_default();
    options.format = (qie_image_format)o->head.params.format;
    if (qie_image_sniff(o->picture, o->n) == options.format)
        return true;
    qie_image *image = NULL;
    uint8_t *bytes = NULL;
    bool ok = qie_image_decode(o->picture, o->n, NULL, &image, NULL) == QIE_OK &&
              qie_image_encode(image, &options, &bytes, &o->n, NULL) == QIE_OK;
    qie_image_destroy(image);
    if (ok) {
        free(o->picture);
        o->picture = bytes;
    }
    return ok;
}

static bool read_order(int fd, order *o) {
    const svc_job_head *h = &o->head;
    int64_t at = sizeof *h;
    if (!svc_read_at(fd, &o->head, sizeof o->head, 0) || h->n_images < 1)
        return false;
    o->prompt = calloc(1, (size_t)h->n_prompt + 1);
    o->n = (size_t)h->image_bytes[0];
    o->picture = malloc(o->n);
    if (!o->prompt || !o->picture || !svc_read_at(fd, o->prompt, (size_t)h->n_prompt, at))
        return false;
    at += (int64_t)(h->n_prompt + h->n_negative);
    return svc_read_at(fd, o->picture, o->n, at) &&
           qie_image_probe(o->picture, o->n, NULL, NULL, &o->width, &o->height, NULL) == QIE_OK &&
           as_asked(o);
}

/* ---------------------------------------------------------------- an honest answer */

static void result_head(const order *o, svc_result_head *h) {
    memset(h, 0, sizeof *h);
    h->seed = o->head.params.seed;
    h->width = o->width;
    h->height = o->height;
    h->num_inference_steps = 4;
    h->true_cfg_scale = 1;
    h->n_images = (uint64_t)o->head.params.num_images;
    for (uint64_t i = 0; i < h->n_images && i < SVC_MAX_RESULTS; i++)
        h->image_bytes[i] = o->n;
}

static void answer(const order *o, const svc_result_head *h, const uint8_t *bytes) {
    svc_part parts[1 + SVC_MAX_RESULTS] = {{h, sizeof *h}};
    for (uint64_t i = 0; i < h->n_images; i++)
        parts[1 + i] = (svc_part){bytes, o->n};
    int fd = svc_memory_file("result", parts, 1 + (size_t)h->n_images);
    svc_message m;
    svc_message_init(&m, SVC_MSG_DONE, o->message.token);
    say(&m, fd);
    close(fd);
}

static void answer_honestly(const order *o) {
    svc_result_head h;
    result_head(o, &h);
    answer(o, &h, o->picture);
}

/* "sleep MS": four steps that take so long together, and a cancel is obeyed. */
static void answer_slowly(const order *o) {
    long ms = strtol(o->prompt + 5, NULL, 10);
    for (int step = 0; step < 4; step++) {
        svc_message m;
        svc_message_init(&m, SVC_MSG_PROGRESS, o->message.token);
        snprintf(m.stage, sizeof m.stage, "denoise");
        m.step = step;
        m.total = 4;
        m.seconds_left = (double)ms / 1000 * (4 - step) / 4;
        say(&m, -1);
        if (cancelled_within(o, ms / 4)) {
            svc_message_init(&m, SVC_MSG_FAILED, o->message.token);
            m.status = QIE_E_CANCELLED;
            say(&m, -1);
            return;
        }
    }
    answer_honestly(o);
}

/* ---------------------------------------------------------------- misbehaviour */

static void send_raw(const void *bytes, size_t n) {
    ssize_t ignored = send(SVC_CHANNEL_FD, bytes, n, MSG_NOSIGNAL);
    (void)ignored;
}

static void garbage_message(const order *o, const char *how) {
    svc_message m;
    svc_message_init(&m, SVC_MSG_PROGRESS, o->message.token);
    if (!strcmp(how, "magic")) {
        m.magic = 7;
        send_raw(&m, sizeof m);
    } else if (!strcmp(how, "short"))
        send_raw("hello", 5);
    else if (!strcmp(how, "kind")) {
        m.kind = 99;
        send_raw(&m, sizeof m);
    } else if (!strcmp(how, "token")) {
        svc_message_init(&m, SVC_MSG_DONE, o->message.token + 1000);
        send_raw(&m, sizeof m);
    } else if (!strcmp(how, "nofile")) {
        svc_message_init(&m, SVC_MSG_DONE, o->message.token);
        send_raw(&m, sizeof m);
    } else if (!strcmp(how, "text")) {
        svc_message_init(&m, SVC_MSG_FAILED, o->message.token);
        m.status = 4711;
        memset(m.text, 0xff, sizeof m.text);
        memcpy(m.text, "a\nb\x1b[1m", 7);
        send_raw(&m, sizeof m);
    }
}

static void garbage_result(const order *o, const char *how) {
    svc_result_head h;
    uint8_t *noise = calloc(1, o->n);
    result_head(o, &h);
    if (!strcmp(how, "result")) {
        memset(&h, 0xff, sizeof h);
        svc_part part = {&h, sizeof h};
        int fd = svc_memory_file("result", &part, 1);
        svc_message m;
        svc_message_init(&m, SVC_MSG_DONE, o->message.token);
        say(&m, fd);
        close(fd);
    } else if (!strcmp(how, "size")) {
        h.width++;
        answer(o, &h, o->picture);
    } else if (!strcmp(how, "count")) {
        h.n_images = 3;
        answer(o, &h, o->picture);
    } else
        answer(o, &h, noise);
    free(noise);
}

/* Descriptors that nobody asked for, several to a message. */
static void leak_descriptors(const order *o) {
    for (int i = 0; i < 2000; i++) {
        svc_message m;
        svc_message_init(&m, SVC_MSG_PROGRESS, o->message.token);
        m.seconds_left = NAN;
        m.step = i;
        struct iovec part = {.iov_base = &m, .iov_len = sizeof m};
        union {
            struct cmsghdr align;
            char bytes[CMSG_SPACE(2 * sizeof(int))];
        } control;
        int fds[2] = {0, 0};
        memset(&control, 0, sizeof control);
        struct msghdr h = {.msg_iov = &part,
                           .msg_iovlen = 1,
                           .msg_control = control.bytes,
                           .msg_controllen = CMSG_LEN(sizeof fds)};
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fds);
        memcpy(CMSG_DATA(c), fds, sizeof fds);
        sendmsg(SVC_CHANNEL_FD, &h, MSG_NOSIGNAL);
    }
    answer_honestly(o);
}

/* Take memory until there is none; what was got goes to the log. */
static void fill_memory(void) {
    size_t mb = 0;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* no limit in these builds */
    svc_sandbox_memory(16 << 20);
    for (char *p; mb < 8192 && (p = malloc(1 << 20)) != NULL; mb++)
        memset(p, 1, 1 << 20);
#endif
    fprintf(stderr, "fake: filled %zu MB\n", mb);
    abort();
}

static void try_sandbox(const order *o) {
    char text[400], *argv[] = {"true", NULL};
    int s = socket(AF_INET, SOCK_STREAM, 0), s_errno = errno;
    int f = open("/tmp/fakeworker-was-here", O_WRONLY | O_CREAT, 0600), f_errno = errno;
    int u = unlink("/etc/hostname-none"), u_errno = errno;
    execv("/bin/true", argv);
    snprintf(text, sizeof text, "socket=%d open=%d unlink=%d exec=%d", s < 0 ? s_errno : 0,
             f < 0 ? f_errno : 0, u < 0 ? u_errno : 0, errno);
    say_plain(SVC_MSG_FAILED, o->message.token, text);
}

static void run(const order *o) {
    char word[64], *how;
    snprintf(word, sizeof word, "%s", o->prompt);
    word[strcspn(word, " ")] = 0;
    how = strchr(word, '-');
    how = how ? how + 1 : word;
    if (!strcmp(word, "sleep"))
        answer_slowly(o);
    else if (!strcmp(word, "hang") || !strcmp(word, "deaf")) {
        while (!strcmp(word, "hang")) /* not even a cancel is read */
            pause();
        for (;;) { /* alive, but a cancel is not obeyed */
            cancelled_within(o, 100);
            say_plain(SVC_MSG_BEAT, o->message.token, "");
        }
    } else if (!strncmp(word, "message-", 8)) {
        garbage_message(o, how);
        if (strcmp(how, "text"))
            pause_ms(20000); /* the master is expected to end this */
    } else if (!strncmp(word, "garbage-", 8))
        garbage_result(o, how);
    else if (!strcmp(word, "leak"))
        leak_descriptors(o);
    else if (!strcmp(word, "memory"))
        fill_memory();
    else if (!strcmp(word, "sandbox"))
        try_sandbox(o);
    else if (!strcmp(word, "exit"))
        _exit(3);
    else if (!strcmp(word, "crash")) {
        signal(SIGSEGV, SIG_DFL); /* not a sanitizer's */
        raise(SIGSEGV);
    } else if (!strcmp(word, "refuse"))
        say_plain(SVC_MSG_FAILED, o->message.token, "this picture is refused");
    else
        answer_honestly(o);
}

static void misbehave_at_start(const char *mode) {
    if (!strcmp(mode, "die"))
        _exit(5);
    if (!strcmp(mode, "refuse")) {
        say_plain(SVC_MSG_FAILED, 0, "the model is not what it should be");
        _exit(6);
    }
    if (!strcmp(mode, "nonsense"))
        send_raw("hello", 5);
    if (!strcmp(mode, "nonsense") || !strcmp(mode, "silent"))
        for (;;)
            pause();
    if (!strcmp(mode, "slow"))
        pause_ms(3000);
}

int main(int argc, char **argv) {
    char mode[32] = "";
    const char *gpu = getenv("CUDA_VISIBLE_DEVICES"), *order_by = getenv("CUDA_DEVICE_ORDER");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fprintf(stderr, "fake: gpu=%s order=%s nice=%d args=", gpu ? gpu : "-",
            order_by ? order_by : "-", getpriority(PRIO_PROCESS, 0));
    for (int i = 1; i < argc; i++)
        fprintf(stderr, "%s%s", i > 1 ? "," : "", argv[i]);
    fprintf(stderr, "\n");
    if (start_mode(mode, sizeof mode))
        misbehave_at_start(mode);
    svc_sandbox_files(false);
    svc_sandbox_calls(false);
    tell_ready();
    for (;;) {
        order o = {0};
        int fd;
        struct pollfd p = {.fd = SVC_CHANNEL_FD, .events = POLLIN};
        poll(&p, 1, -1);
        int rc = svc_message_receive(SVC_CHANNEL_FD, &o.message, &fd);
        if (rc < 0)
            return 0;
        if (rc > 0 && o.message.kind == SVC_MSG_JOB && fd >= 0) {
            if (read_order(fd, &o))
                run(&o);
            else
                say_plain(SVC_MSG_FAILED, o.message.token, "the job cannot be read");
        }
        if (fd >= 0)
            close(fd);
        free(o.prompt);
        free(o.picture);
    }
}
