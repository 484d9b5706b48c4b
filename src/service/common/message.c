#define _GNU_SOURCE
#include "service/common/message.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fs.h"
#include "base/strbuf.h"

void svc_text_clean(char *text, size_t cap) {
    size_t n = strnlen(text, cap - 1);
    memset(text + n, 0, cap - n);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < 32 || text[i] == 127)
            text[i] = '?';
    if (!qie_utf8_valid(text, n))
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)text[i] > 127)
                text[i] = '?';
}

const char *const svc_tokenizer_files[SVC_TOKENIZER_FILES] = {
    "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "tokenizer.json"};

void svc_message_init(svc_message *m, svc_message_kind kind, uint64_t token) {
    memset(m, 0, sizeof *m);
    m->magic = SVC_MESSAGE_MAGIC;
    m->kind = kind;
    m->token = token;
}

bool svc_message_send(int channel, const svc_message *m, int fd) {
    svc_message copy = *m;
    struct iovec part = {.iov_base = &copy, .iov_len = sizeof copy};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr h = {.msg_iov = &part, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (fd >= 0) {
        h.msg_control = control.bytes;
        h.msg_controllen = sizeof control.bytes;
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    ssize_t n;
    do
        n = sendmsg(channel, &h, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)sizeof *m;
}

int svc_message_receive(int channel, svc_message *m, int *fd) {
    struct iovec part = {.iov_base = m, .iov_len = sizeof *m};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr h = {.msg_iov = &part,
                       .msg_iovlen = 1,
                       .msg_control = control.bytes,
                       .msg_controllen = sizeof control.bytes};
    *fd = -1;
    ssize_t n;
    do
        n = recvmsg(channel, &h, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : SVC_GONE;
    if (n == 0)
        return SVC_GONE;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            for (size_t at = CMSG_LEN(0); at + sizeof(int) <= c->cmsg_len; at += sizeof(int)) {
                if (*fd >= 0)
                    close(*fd); /* more than one was sent: the last one counts */
                memcpy(fd, (const char *)c + at, sizeof *fd);
            }
    if (n != (ssize_t)sizeof *m || m->magic != SVC_MESSAGE_MAGIC ||
        h.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
        return SVC_NONSENSE;
    }
    svc_text_clean(m->job_id, sizeof m->job_id);
    svc_text_clean(m->stage, sizeof m->stage);
    svc_text_clean(m->param, sizeof m->param);
    svc_text_clean(m->text, sizeof m->text);
    return 1;
}

int svc_memory_file(const char *name, const svc_part *parts, size_t n_parts) {
    int fd = memfd_create(name, MFD_CLOEXEC), cause = fd < 0 ? errno : 0;
    for (size_t i = 0; !cause && i < n_parts; i++)
        cause = qie_write_all(fd, parts[i].data, parts[i].n);
    if (cause && fd >= 0)
        close(fd);
    errno = cause;
    return cause ? -1 : fd;
}

bool svc_read_at(int fd, void *out, size_t n, int64_t offset) {
    char *p = out;
    while (n) {
        ssize_t done = pread(fd, p, n, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return false;
        p += done;
        offset += done;
        n -= (size_t)done;
    }
    return true;
}

int64_t svc_file_size(int fd) {
    struct stat s;
    return fstat(fd, &s) ? -1 : (int64_t)s.st_size;
}
