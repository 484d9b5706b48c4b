#include "model/importance.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fs.h"
#include "weights/file_layout.h"

static qie_status add_part(qie_op_inputs *p, const qie_weights *w, qie_error *err) {
    for (size_t i = 0; i < qie_weights_count(w); i++) {
        const qie_tensor *t = qie_weights_at(w, i);
        if (t->n_dims >= 2 && t->shape[0] > 0 && t->n_elements > 0)
            QIE_TRY(qie_op_inputs_add(p, t->data, t->name, t->n_elements / t->shape[0], err));
    }
    return QIE_OK;
}

qie_status qie_importance_begin(qie_compute *c, const qie_weights *transformer,
                                const qie_weights *text_encoder, qie_op_inputs **out,
                                qie_error *err) {
    qie_status st;
    QIE_TRY(qie_op_inputs_create(qie_weights_count(transformer) + qie_weights_count(text_encoder),
                                 out, err));
    QIE_TRY_GOTO(add_part(*out, transformer, err));
    QIE_TRY_GOTO(add_part(*out, text_encoder, err));
    qie_op_inputs_begin(c, *out);
    return QIE_OK;
fail:
    qie_op_inputs_destroy(*out);
    *out = NULL;
    return st;
}

static void fill(const qie_op_input *in, unsigned char *to) {
    for (int64_t i = 0; i < in->k; i++) {
        float mean = (float)(in->sums[i] / (double)in->rows);
        memcpy(to + 4 * i, &mean, 4);
    }
}

qie_status qie_importance_save(const qie_op_inputs *p, const char *path, qie_error *err) {
    static const qie_meta_pair META[] = {{"format", "qwen_edit.importance", 0}};
    qie_layout l = {0};
    unsigned char *file = NULL;
    size_t n = 0;
    qie_status st = QIE_OK;
    qie_layout_tensor *t = calloc(p->n + 1, sizeof *t);
    const qie_op_input **from = calloc(p->n + 1, sizeof *from);
    if (!t || !from) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    for (size_t i = 0; i < p->n; i++)
        if (p->list[i].rows > 0) {
            from[n] = &p->list[i];
            t[n++] = (qie_layout_tensor){
                .name = p->list[i].name, .dtype = QIE_F32, .n_dims = 1, .shape = {p->list[i].k}};
        }
    if (!n) {
        st = qie_fail(err, QIE_E_CONFLICT, NULL, "no edit ran: there is nothing to write to '%s'",
                      path);
        goto fail;
    }
    QIE_TRY_GOTO(qie_layout_make(QIE_FORMAT_SAFETENSORS, t, n, META, 1, &l, err));
    file = malloc((size_t)l.n_file);
    if (!file) {
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
        goto fail;
    }
    memcpy(file, l.head, l.n_head);
    for (size_t i = 0; i < n; i++)
        fill(from[i], file + t[i].offset);
    st = qie_file_write_atomic(path, file, (size_t)l.n_file, err);
fail:
    qie_layout_release(&l);
    free(file);
    free(from);
    free(t);
    return st;
}
