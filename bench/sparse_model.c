/* The weights of a model as files of zeros that take no room on the disk: all tensors that the
 * configs in a folder imply, in bf16. For measurements, which do not depend on values, and for
 * placement, which reads headers only.
 *
 *     sparse_model FOLDER [fp8]   writes FOLDER/{transformer,text_encoder,vae}/....safetensors
 *
 * fp8: the matrices of the transformer's blocks in F8_E4M3 without a scale, but for modulation. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/files.h"
#include "base/strbuf.h"
#include "plan/config.h"
#include "plan/tensors.h"

typedef struct header {
    qie_strbuf text;
    int64_t at;
    bool fp8;
} header;

static bool add_tensor(void *arg, const qie_tensor_spec *spec) {
    header *h = arg;
    bool fp8 = h->fp8 && spec->n_dims == 2 && strstr(spec->name, "transformer_blocks.") &&
               !strstr(spec->name, "_mod.");
    int64_t n = fp8 ? 1 : 2;
    qie_strbuf_printf(&h->text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", h->at ? "," : "{",
                      spec->name, fp8 ? "F8_E4M3" : "BF16");
    for (int i = 0; i < spec->n_dims; i++) {
        qie_strbuf_printf(&h->text, "%s%lld", i ? "," : "", (long long)spec->shape[i]);
        n *= spec->shape[i];
    }
    qie_strbuf_printf(&h->text, "],\"data_offsets\":[%lld,%lld]}", (long long)h->at,
                      (long long)(h->at + n));
    h->at += n;
    return true;
}

static bool write_file(const char *folder, const char *name, header *h) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    qie_strbuf_printf(&h->text, "}");
    while (h->text.len % 64 != 56) /* tensors begin at a multiple of 64 */
        qie_strbuf_printf(&h->text, " ");
    uint64_t n = h->text.len;
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
    bool ok = fd >= 0 && write(fd, &n, 8) == 8 && write(fd, h->text.data, n) == (ssize_t)n &&
              !ftruncate(fd, (off_t)(8 + n) + (off_t)h->at);
    if (fd >= 0)
        close(fd);
    if (!ok)
        perror(path);
    qie_strbuf_release(&h->text);
    return ok;
}

int main(int argc, char **argv) {
    qie_files *files;
    qie_error e = {0};
    static qie_model_config c;
    bool fp8 = argc == 3 && !strcmp(argv[2], "fp8");
    if (argc != (fp8 ? 3 : 2)) {
        fprintf(stderr, "usage: sparse_model FOLDER [fp8]\n");
        return 2;
    }
    if (qie_files_open_dir(argv[1], &files, &e) != QIE_OK ||
        qie_model_config_read(files, &c, &e) != QIE_OK) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    header h[3] = {{.fp8 = fp8}, {.at = 0}, {.at = 0}};
    for (int i = 0; i < 3; i++)
        qie_strbuf_init(&h[i].text, 64u << 20);
    qie_tensors_transformer(&c.transformer, add_tensor, &h[0]);
    qie_tensors_text_encoder(&c.text, &c.vision, add_tensor, &h[1]);
    qie_tensors_vae(&c.vae, add_tensor, &h[2]);
    bool ok = write_file(argv[1], "transformer/diffusion_pytorch_model.safetensors", &h[0]) &&
              write_file(argv[1], "text_encoder/model.safetensors", &h[1]) &&
              write_file(argv[1], "vae/diffusion_pytorch_model.safetensors", &h[2]);
    printf("%.2f GB of weights\n", (double)(h[0].at + h[1].at + h[2].at) / 1e9);
    qie_files_close(files);
    return ok ? 0 : 1;
}
