#include "weights/tensor_file.h"

#include <stdlib.h>
#include <string.h>

#include "weights/gguf.h"
#include "weights/safetensors.h"

qie_status qie_tensor_file_parse(const void *data, size_t n, const char *label,
                                 qie_tensor_file *out, qie_error *err) {
    /* Read as the length of a safetensors header these four bytes are beyond its limit. */
    if (n >= 4 && !memcmp(data, "GGUF", 4))
        return qie_gguf_parse(data, n, label, out, err);
    return qie_safetensors_parse(data, n, label, out, err);
}

void qie_tensor_file_release(qie_tensor_file *f) {
    for (size_t i = 0; i < f->n_tensors; i++) {
        free((void *)(uintptr_t)f->tensors[i].name);
        free((void *)(uintptr_t)f->dtypes[i]);
    }
    for (size_t i = 0; i < 2 * f->n_meta; i++)
        free((void *)(uintptr_t)f->meta[i]);
    for (size_t i = 0; i < f->n_arrays; i++)
        free((void *)(uintptr_t)f->arrays[i].key);
    free(f->tensors);
    free(f->dtypes);
    free(f->meta);
    free(f->arrays);
    free(f->label);
    qie_map_close(&f->map);
    memset(f, 0, sizeof *f);
}

const char *qie_tensor_file_meta(const qie_tensor_file *f, const char *key) {
    for (size_t i = 0; i < f->n_meta; i++)
        if (!strcmp(f->meta[2 * i], key))
            return f->meta[2 * i + 1];
    return NULL;
}

const qie_meta_array *qie_tensor_file_array(const qie_tensor_file *f, const char *key) {
    for (size_t i = 0; i < f->n_arrays; i++)
        if (!strcmp(f->arrays[i].key, key))
            return &f->arrays[i];
    return NULL;
}
