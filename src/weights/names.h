/* Names of tensors: from those that files use to those of the released model (plan/tensors.h).
 *
 * Known are: diffusers and transformers (both prefixes of the text encoder), prefixes of single
 * files and of files that hold a whole model, the VAE's original names, llama.cpp's for the
 * language model and its vision tower. Pure text, no files. */
#ifndef QIE_WEIGHTS_NAMES_H
#define QIE_WEIGHTS_NAMES_H

#include "weights/weights.h"

#define QIE_NAME_BYTES 256

typedef enum qie_name_kind {
    QIE_NAME_TENSOR = 0, /* out: the released name; unknown names pass without their prefix */
    QIE_NAME_SCALE,      /* out: the weight that it belongs to */
    QIE_NAME_MARKER,     /* says something about the file, holds no weights */
    QIE_NAME_OTHER       /* of another part of a file that holds several */
} qie_name_kind;

/* up_period: modules in one level of the VAE's decoder in its original naming (resnets and one
 * upsampler); see qie_name_up_period. */
qie_name_kind qie_name_map(qie_part part, const char *name, int up_period,
                           char out[QIE_NAME_BYTES]);
/* Index of the first upsampler of the VAE's decoder that this original name tells, plus one; 0 if
 * it tells none. */
int qie_name_up_period(const char *name);
/* Whether s ends with `end`. */
bool qie_name_ends_with(const char *s, const char *end);

#endif
