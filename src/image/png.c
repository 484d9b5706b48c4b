/* PNG through libpng: decode to RGB, encode with a text chunk, read one text chunk.
 *
 * Guarantees: every checksum is verified, nothing but the header, palette and pixels is interpreted
 * while decoding (so profiles and compressed texts cannot be used as bombs), and a picture is
 * returned only after its last chunk was read. Each libpng run is one function whose state lives in
 * a struct of its caller: a longjmp out of libpng then loses no pointer. */
#define _GNU_SOURCE
#include <png.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "image/codec.h"
#include "image/image.h"
#include "image/sniff.h"

#define TEXT_MAX ((png_alloc_size_t)4 << 20)

typedef struct png_run {
    png_structp png;
    png_infop info;
    qie_image *image;
    bool cut;         /* ran out of bytes */
    bool low_memory;  /* libpng did without something */
    bool no_memory;   /* our own allocation failed */
    char message[96]; /* libpng's, when it gave up */
    /* What libpng reads: pieces one after the other. */
    struct {
        const uint8_t *data;
        size_t n;
    } piece[3];
    int i_piece;
    size_t pos;
    jmp_buf jump;
} png_run;

/* libpng tells lack of memory in words only; "too many" is what it says when a list of one cannot
 * grow. */
static bool about_memory(const char *message) {
    return strstr(message, "emory") || strstr(message, "too many text");
}

static void on_error(png_structp png, png_const_charp message) {
    png_run *run = png_get_error_ptr(png);
    strncpy(run->message, message, sizeof run->message - 1);
    longjmp(run->jump, 1);
}

/* libpng warns about ancillary data and repairs that do not touch the pixels that we take; lost or
 * damaged pixels are errors. */
static void on_warning(png_structp png, png_const_charp message) {
    png_run *run = png_get_error_ptr(png);
    run->low_memory = run->low_memory || about_memory(message);
}

static void on_read(png_structp png, png_bytep to, size_t n) {
    png_run *run = png_get_io_ptr(png);
    while (n > 0) {
        if (run->i_piece >= 3) {
            run->cut = true;
            png_error(png, "end of file");
        }
        size_t left = run->piece[run->i_piece].n - run->pos;
        size_t take = n < left ? n : left;
        if (take)
            memcpy(to, run->piece[run->i_piece].data + run->pos, take);
        to += take;
        n -= take;
        run->pos += take;
        if (take == left) {
            run->i_piece++;
            run->pos = 0;
        }
    }
}

/* Report why a run ended early. */
static qie_status fail_run(const png_run *run, const char *what, size_t n, qie_error *err) {
    QIE_FAIL_IF(run->no_memory || run->low_memory || about_memory(run->message), QIE_E_NO_MEMORY,
                err, "image", "out of memory while %s a PNG picture", what);
    QIE_FAIL_IF(run->cut, QIE_E_INVALID, err, "image",
                "the picture is cut off: this PNG file ends after %zu bytes, before it is complete",
                n);
    return qie_fail(err, QIE_E_INVALID, "image", "the picture is damaged: PNG: %s", run->message);
}

static void start_read(png_run *run) {
    run->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, run, on_error, on_warning);
    run->info = run->png ? png_create_info_struct(run->png) : NULL;
    if (!run->info) {
        run->no_memory = true;
        longjmp(run->jump, 1);
    }
    png_set_read_fn(run->png, run, on_read);
    png_set_crc_action(run->png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    png_set_chunk_malloc_max(run->png, TEXT_MAX);
}

static bool decode(png_run *run, int w, int h) {
    if (setjmp(run->jump))
        return false;
    start_read(run);
    png_structp png = run->png;
    png_set_user_limits(png, (png_uint_32)w, (png_uint_32)h);
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, NULL, -1);
    /* tRNS as well, since its alpha would be dropped again: palette entries count without it. */
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, (png_const_bytep) "tRNS", 1);
    png_read_info(png, run->info);
    if ((int)png_get_image_width(png, run->info) != w ||
        (int)png_get_image_height(png, run->info) != h)
        png_error(png, "two headers of different size");
    int colour = png_get_color_type(png, run->info);
    png_set_strip_16(png); /* the high byte, not a rounded value: what Pillow's RGB;16B takes */
    png_set_packing(png);
    if (colour == PNG_COLOR_TYPE_PALETTE)
        png_set_palette_to_rgb(png);
    if (colour == PNG_COLOR_TYPE_GRAY)
        png_set_expand_gray_1_2_4_to_8(png);
    if (!(colour & PNG_COLOR_MASK_COLOR))
        png_set_gray_to_rgb(png);
    if (colour & PNG_COLOR_MASK_ALPHA)
        png_set_strip_alpha(png);
    int passes = png_set_interlace_handling(png);
    png_read_update_info(png, run->info);
    if (png_get_rowbytes(png, run->info) != (size_t)w * 3)
        png_error(png, "unexpected kind of pixels");
    if (qie_image_create(w, h, &run->image, NULL) != QIE_OK) {
        run->no_memory = true;
        png_error(png, "out of memory");
    }
    for (int pass = 0; pass < passes; pass++)
        for (int y = 0; y < h; y++)
            png_read_row(png, run->image->pixels + (size_t)y * qie_image_stride(run->image), NULL);
    png_read_end(png, NULL);
    return true;
}

qie_status qie_png_decode(const uint8_t *bytes, size_t n, int w, int h, qie_image **out,
                          qie_error *err) {
    *out = NULL;
    png_run run = {0};
    run.piece[0].data = bytes;
    run.piece[0].n = n;
    qie_status st = QIE_OK;
    if (!decode(&run, w, h)) {
        st = fail_run(&run, "reading", n, err);
        qie_image_destroy(run.image);
        run.image = NULL;
    }
    png_destroy_read_struct(&run.png, &run.info, NULL);
    *out = run.image;
    return st;
}

static bool read_text(png_run *run, char **out, size_t *out_n) {
    if (setjmp(run->jump))
        return false;
    start_read(run);
    png_read_info(run->png, run->info);
    png_textp text;
    if (png_get_text(run->png, run->info, &text, NULL) < 1)
        png_error(run->png, "text too long or damaged");
    size_t n = text[0].compression >= PNG_ITXT_COMPRESSION_NONE ? text[0].itxt_length
                                                                : text[0].text_length;
    char *copy = malloc(n + 1);
    if (!copy) {
        run->no_memory = true;
        png_error(run->png, "out of memory");
    }
    memcpy(copy, text[0].text, n);
    copy[n] = 0;
    *out = copy;
    *out_n = n;
    return true;
}

qie_status qie_png_text(const uint8_t *bytes, size_t n, const char *keyword, char **out,
                        size_t *out_n, qie_error *err) {
    *out = NULL;
    *out_n = 0;
    size_t key = strlen(keyword) + 1;
    qie_image_part part, found = {0};
    for (size_t pos = 0; qie_png_next(bytes, n, &pos, &part);) {
        bool text = part.type == QIE_FOURCC('t', 'E', 'X', 't') ||
                    part.type == QIE_FOURCC('z', 'T', 'X', 't') ||
                    part.type == QIE_FOURCC('i', 'T', 'X', 't');
        if (text && part.n >= key && !memcmp(part.data, keyword, key))
            found = part;
    }
    if (!found.whole)
        return QIE_OK;
    /* Show libpng a file that consists of this chunk alone, up to where it would begin to read
     * pixels: the chunk may stand behind them in the real file, and nothing else there is of
     * interest. */
    static const uint8_t BEGIN[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n', 0,    0,    0,
                                    13,   'I', 'H', 'D', 'R',  0,    0,    0,    1,    0,    0,
                                    0,    1,   8,   0,   0,    0,    0,    0x3a, 0x7e, 0x9b, 0x55};
    static const uint8_t END[] = {0, 0, 0, 0, 'I', 'D', 'A', 'T'};
    png_run run = {0};
    run.piece[0].data = BEGIN;
    run.piece[0].n = sizeof BEGIN;
    run.piece[1].data = found.whole;
    run.piece[1].n = found.n + 12;
    run.piece[2].data = END;
    run.piece[2].n = sizeof END;
    qie_status st = QIE_OK;
    if (!read_text(&run, out, out_n))
        st = fail_run(&run, "reading", n, err);
    png_destroy_read_struct(&run.png, &run.info, NULL);
    return st;
}

static void on_write(png_structp png, png_bytep from, size_t n) {
    qie_strbuf *out = png_get_io_ptr(png);
    qie_strbuf_append(out, from, n);
    if (out->failed)
        png_error(png, "out of memory");
}

static void on_flush(png_structp png) {
    (void)png;
}

static bool encode(png_run *run, const qie_image *image, int compression, const char *parameters,
                   qie_strbuf *out) {
    if (setjmp(run->jump))
        return false;
    run->png = png_create_write_struct(PNG_LIBPNG_VER_STRING, run, on_error, on_warning);
    run->info = run->png ? png_create_info_struct(run->png) : NULL;
    if (!run->info) {
        run->no_memory = true;
        return false;
    }
    png_structp png = run->png;
    png_set_write_fn(png, out, on_write, on_flush);
    png_set_compression_level(png, compression);
    png_set_user_limits(png, (png_uint_32)image->width, (png_uint_32)image->height);
    png_set_IHDR(png, run->info, (png_uint_32)image->width, (png_uint_32)image->height, 8,
                 PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                 PNG_FILTER_TYPE_DEFAULT);
    if (parameters) {
        png_text text = {0};
        text.compression = PNG_ITXT_COMPRESSION_NONE; /* readable with any tool, even `strings` */
        text.key = (png_charp) "qwen-edit";
        text.text = (png_charp)parameters;
        png_set_text(png, run->info, &text, 1);
    }
    png_write_info(png, run->info);
    for (int y = 0; y < image->height; y++)
        png_write_row(png, image->pixels + (size_t)y * qie_image_stride(image));
    png_write_end(png, NULL);
    return true;
}

qie_status qie_png_encode(const qie_image *image, int compression, const char *parameters,
                          qie_strbuf *out, qie_error *err) {
    png_run run = {0};
    bool ok = encode(&run, image, compression, parameters, out);
    png_destroy_write_struct(&run.png, &run.info);
    if (!ok && (run.no_memory || out->failed || about_memory(run.message)))
        return qie_fail(err, QIE_E_NO_MEMORY, "image", "out of memory while writing a PNG picture");
    QIE_FAIL_IF(!ok, QIE_E_INTERNAL, err, "image", "cannot write PNG: %s", run.message);
    return QIE_OK;
}
