/* The released tokenizer for tests: unpacks tests/golden/tokenizer into a folder that is removed at
 * exit. */
#ifndef TEXT_FIXTURE_H
#define TEXT_FIXTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/files.h"
#include "base/fs.h"
#include "qtest.h"
#include "text/tokenizer.h"

#define GOLDEN QIE_SOURCE_DIR "/tests/golden/"

static const char *const RELEASED_ADDED[] = {
    "<|endoftext|>",      "<|im_start|>",     "<|im_end|>",     "<|object_ref_start|>",
    "<|object_ref_end|>", "<|box_start|>",    "<|box_end|>",    "<|quad_start|>",
    "<|quad_end|>",       "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>",      "<|video_pad|>",    "<tool_call>",    "</tool_call>",
    "<|fim_prefix|>",     "<|fim_middle|>",   "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>",      "<|file_sep|>"};
#define FIRST_ADDED 151643

static char fixture_dir[64];

static void fixture_remove(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", fixture_dir);
    if (system(command))
        fprintf(stderr, "cannot remove %s\n", fixture_dir);
}

/* Folder for files of this process; "" if it cannot be made. */
static const char *fixture_folder(void) {
    if (!fixture_dir[0]) {
        strcpy(fixture_dir, "/tmp/qie-text-XXXXXX");
        if (!mkdtemp(fixture_dir))
            fixture_dir[0] = 0;
        else
            atexit(fixture_remove);
    }
    return fixture_dir;
}

/* Unpack a .gz below tests/golden to `name` in the folder; its content, NULL if that fails. */
static char *fixture_gunzip(const char *gz, const char *name, size_t *n) {
    char command[1024], path[256];
    unsigned char *data = NULL;
    snprintf(path, sizeof path, "%s/%s", fixture_folder(), name);
    snprintf(command, sizeof command, "gzip -dc '" GOLDEN "%s' > '%s'", gz, path);
    if (system(command) || qie_file_read(path, 1u << 30, &data, n, NULL) != QIE_OK)
        return NULL;
    return (char *)data;
}

/* The released tokenizer; files are closed by the caller. */
static inline qie_status fixture_released(qie_files **files, qie_tokenizer **t, qie_error *err) {
    char path[256];
    size_t n;
    *files = NULL;
    *t = NULL;
    snprintf(path, sizeof path, "%s/processor", fixture_folder());
    if (qie_mkdirs(path, err) != QIE_OK)
        return QIE_E_IO;
    free(fixture_gunzip("tokenizer/vocab.json.gz", "processor/vocab.json", &n));
    free(fixture_gunzip("tokenizer/merges.txt.gz", "processor/merges.txt", &n));
    snprintf(path, sizeof path, "%s/processor/added_tokens.json", fixture_folder());
    FILE *f = fopen(path, "w");
    if (!f)
        return QIE_E_IO;
    for (int i = 0; i < (int)(sizeof RELEASED_ADDED / sizeof *RELEASED_ADDED); i++)
        fprintf(f, "%c\"%s\": %d", i ? ',' : '{', RELEASED_ADDED[i], FIRST_ADDED + i);
    fprintf(f, "}\n");
    fclose(f);
    qie_status st = qie_files_open_dir(fixture_folder(), files, err);
    return st == QIE_OK ? qie_tokenizer_open(*files, "processor", t, err) : st;
}

/* "9707 1879" -> ids; returns how many. */
static inline size_t fixture_ids(const char *text, int32_t *out, size_t max) {
    size_t n = 0;
    char *end;
    for (long v; n < max && (v = strtol(text, &end, 10), end != text); text = end)
        out[n++] = (int32_t)v;
    return n;
}

#endif
