/* JPEG through libjpeg(-turbo), with the settings that Pillow uses: accurate integer DCT, smooth
 * chroma upsampling. CMYK and YCCK become RGB by Pillow's own formula.
 *
 * Guarantees: data that ends early or that the library calls corrupt is refused, although it could
 * go on and fill the rest with grey. State lives in a struct of the caller, so a longjmp loses no
 * pointer. */
#define _GNU_SOURCE
#include <stdio.h>

#include <jerror.h>
#include <jpeglib.h>
#include <setjmp.h>
#include <stdbool.h>
#include <string.h>

#include "base/error.h"
#include "image/codec.h"
#include "image/image.h"
#include "image/parameters.h"

/* A file may ask for millions of passes over a large picture, a few bytes each. Encoders write 3 to
 * 10; 64 passes over 50 megapixels take some seconds. */
#define SCANS_MAX 64

typedef struct jpeg_run {
    struct jpeg_error_mgr errors; /* first: libjpeg knows only its address */
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
    bool cut, no_memory;
    struct jpeg_decompress_struct dec;
    struct jpeg_progress_mgr progress;
    const uint8_t *begin; /* of the file */
    qie_image *image;
} jpeg_run;

static void give_up(jpeg_run *run, const char *message) {
    snprintf(run->message, sizeof run->message, "%s", message);
    longjmp(run->jump, 1);
}

static void on_error(j_common_ptr cinfo) {
    jpeg_run *run = (jpeg_run *)cinfo->err;
    run->no_memory = cinfo->err->msg_code == JERR_OUT_OF_MEMORY;
    cinfo->err->format_message(cinfo, run->message);
    longjmp(run->jump, 1);
}

static void on_output(j_common_ptr cinfo) {
    (void)cinfo;
}

/* Bytes that libjpeg skipped before a marker: only padding of one value? Some phones pad before the
 * end. libjpeg's read position still is where the marker begins. */
static bool skipped_padding(const jpeg_run *run) {
    const struct jpeg_source_mgr *src = run->dec.src;
    int n = run->errors.msg_parm.i[0];
    const JOCTET *end = src->next_input_byte;
    if (n < 1 || end - run->begin < n || (end[-1] != 0 && end[-1] != 0xff))
        return false;
    for (int i = 2; i <= n; i++)
        if (end[-i] != end[-1])
            return false;
    return true;
}

static void on_message(j_common_ptr cinfo, int level) {
    if (level >= 0)
        return; /* a trace, not a warning */
    jpeg_run *run = (jpeg_run *)cinfo->err;
    switch (cinfo->err->msg_code) {
    case JWRN_ADOBE_XFORM: /* odd but complete headers */
    case JWRN_JFIF_MAJOR:
    case JWRN_BOGUS_ICC: return;
    case JWRN_EXTRANEOUS_DATA:
        if (skipped_padding(run))
            return;
        break;
    case JWRN_JPEG_EOF: run->cut = true; break;
    default: break;
    }
    cinfo->err->format_message(cinfo, run->message);
    longjmp(run->jump, 1);
}

static void on_progress(j_common_ptr cinfo) {
    if (((j_decompress_ptr)cinfo)->input_scan_number > SCANS_MAX)
        give_up((jpeg_run *)cinfo->err, "more passes over the picture than any program writes");
}

static void init_errors(jpeg_run *run) {
    jpeg_std_error(&run->errors);
    run->errors.error_exit = on_error;
    run->errors.output_message = on_output;
    run->errors.emit_message = on_message;
}

static qie_status fail_run(const jpeg_run *run, size_t n, qie_error *err) {
    QIE_FAIL_IF(run->no_memory, QIE_E_NO_MEMORY, err, "image",
                "out of memory while reading a JPEG picture");
    QIE_FAIL_IF(
        run->cut, QIE_E_INVALID, err, "image",
        "the picture is cut off: this JPEG file ends after %zu bytes, before it is complete", n);
    return qie_fail(err, QIE_E_INVALID, "image", "the picture is damaged: JPEG: %s", run->message);
}

/* a * b / 255, rounded: exact for bytes. */
static unsigned mul_div_255(unsigned a, unsigned b) {
    unsigned v = a * b + 128;
    return ((v >> 8) + v) >> 8;
}

/* Adobe writes inks inverted, and Pillow takes every four-channel JPEG as written by Adobe. */
static void cmyk_row(const uint8_t *src, uint8_t *dst, int w) {
    for (int x = 0; x < w; x++, src += 4, dst += 3) {
        unsigned light = src[3]; /* 255 - black */
        for (int c = 0; c < 3; c++)
            dst[c] = (uint8_t)(light - mul_div_255(255u - src[c], light));
    }
}

static bool decode(jpeg_run *run, const uint8_t *bytes, size_t n, int w, int h) {
    if (setjmp(run->jump))
        return false;
    j_decompress_ptr dec = &run->dec;
    jpeg_create_decompress(dec);
    run->progress.progress_monitor = on_progress;
    dec->progress = &run->progress;
    jpeg_mem_src(dec, bytes, (unsigned long)n);
    jpeg_read_header(dec, TRUE);
    if ((int)dec->image_width != w || (int)dec->image_height != h)
        give_up(run, "two frame headers of different size");
    bool cmyk = dec->num_components == 4;
    dec->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    dec->dct_method = JDCT_ISLOW;
    dec->do_fancy_upsampling = TRUE;
    if (qie_image_create(w, h, &run->image, NULL) != QIE_OK) {
        run->no_memory = true;
        give_up(run, "out of memory");
    }
    jpeg_start_decompress(dec);
    JSAMPARRAY inks = NULL;
    if (cmyk) /* released with the decoder */
        inks = dec->mem->alloc_sarray((j_common_ptr)dec, JPOOL_IMAGE, dec->output_width * 4, 1);
    while (dec->output_scanline < dec->output_height) {
        uint8_t *row = run->image->pixels + dec->output_scanline * qie_image_stride(run->image);
        jpeg_read_scanlines(dec, cmyk ? inks : &row, 1);
        if (cmyk)
            cmyk_row(inks[0], row, w);
    }
    jpeg_finish_decompress(dec);
    return true;
}

qie_status qie_jpeg_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                           qie_error *err) {
    *out = NULL;
    jpeg_run run;
    memset(&run, 0, sizeof run);
    init_errors(&run);
    run.dec.err = &run.errors;
    run.begin = bytes;
    qie_status st = QIE_OK;
    if (!decode(&run, bytes, n, w, h)) {
        st = fail_run(&run, n, err);
        qie_image_destroy(run.image);
        run.image = NULL;
    }
    jpeg_destroy_decompress(&run.dec);
    *out = run.image;
    return st;
}

typedef struct jpeg_writer {
    jpeg_run run; /* errors */
    struct jpeg_compress_struct enc;
    struct jpeg_destination_mgr dest;
    qie_strbuf *out;
    JOCTET buffer[16384];
} jpeg_writer;

static void rewind_buffer(jpeg_writer *w) {
    w->dest.next_output_byte = w->buffer;
    w->dest.free_in_buffer = sizeof w->buffer;
}
static void dest_begin(j_compress_ptr enc) {
    rewind_buffer(enc->client_data);
}
static boolean dest_full(j_compress_ptr enc) {
    jpeg_writer *w = enc->client_data;
    qie_strbuf_append(w->out, w->buffer, sizeof w->buffer);
    rewind_buffer(w);
    return TRUE;
}
static void dest_end(j_compress_ptr enc) {
    jpeg_writer *w = enc->client_data;
    qie_strbuf_append(w->out, w->buffer, sizeof w->buffer - w->dest.free_in_buffer);
}

/* A segment holds 65533 bytes; a longer text goes on in further segments, split between characters
 * so that each is valid UTF-8 for other programs. */
static void write_parameters(j_compress_ptr enc, const char *text) {
    const size_t prefix = sizeof QIE_PARAMETERS_COM - 1, room = 65533 - prefix;
    size_t left = strlen(text);
    do {
        size_t n = left < room ? left : room;
        while (n < left && ((unsigned char)text[n] & 0xc0) == 0x80)
            n--;
        jpeg_write_m_header(enc, JPEG_COM, (unsigned)(prefix + n));
        for (size_t i = 0; i < prefix; i++)
            jpeg_write_m_byte(enc, QIE_PARAMETERS_COM[i]);
        for (size_t i = 0; i < n; i++)
            jpeg_write_m_byte(enc, (unsigned char)text[i]);
        text += n;
        left -= n;
    } while (left > 0);
}

static bool encode(jpeg_writer *w, const qie_image *image, int quality, const char *parameters) {
    if (setjmp(w->run.jump))
        return false;
    j_compress_ptr enc = &w->enc;
    jpeg_create_compress(enc);
    enc->client_data = w;
    w->dest.init_destination = dest_begin;
    w->dest.empty_output_buffer = dest_full;
    w->dest.term_destination = dest_end;
    enc->dest = &w->dest;
    enc->image_width = (JDIMENSION)image->width;
    enc->image_height = (JDIMENSION)image->height;
    enc->input_components = 3;
    enc->in_color_space = JCS_RGB;
    jpeg_set_defaults(enc);
    jpeg_set_quality(enc, quality, TRUE);
    enc->optimize_coding = TRUE;
    if (quality >= 90) /* colour at full resolution */
        enc->comp_info[0].h_samp_factor = enc->comp_info[0].v_samp_factor = 1;
    jpeg_start_compress(enc, TRUE);
    if (parameters)
        write_parameters(enc, parameters);
    while (enc->next_scanline < enc->image_height) {
        JSAMPROW row = image->pixels + enc->next_scanline * qie_image_stride(image);
        jpeg_write_scanlines(enc, &row, 1);
    }
    jpeg_finish_compress(enc);
    return true;
}

qie_status qie_jpeg_encode(const qie_image *image, int quality, const char *parameters,
                           qie_strbuf *out, qie_error *err) {
    jpeg_writer w;
    memset(&w, 0, sizeof w);
    init_errors(&w.run);
    w.enc.err = &w.run.errors;
    w.out = out;
    bool ok = encode(&w, image, quality, parameters);
    jpeg_destroy_compress(&w.enc);
    if (w.run.no_memory || out->failed)
        return qie_fail(err, QIE_E_NO_MEMORY, "image",
                        "out of memory while writing a JPEG picture");
    QIE_FAIL_IF(!ok, QIE_E_INTERNAL, err, "image", "cannot write JPEG: %s", w.run.message);
    return QIE_OK;
}
