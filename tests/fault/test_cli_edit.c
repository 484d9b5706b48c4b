/* The program as its users meet it: each wrong input with its message and exit code and nothing
 * written, interrupts, full disks, batches. Runs the built binary with the built-in demo model on
 * pictures made here. */
#define _GNU_SOURCE
#include <dirent.h>
#include <sys/stat.h>

#include "base/fs.h"
#include "base/json.h"
#include "qie/edit.h"
#include "qie/image.h"
#include "qtest.h"
#include "run.h"

#define PROGRAM QIE_BINARY_DIR "/qwen-edit"

static char folder[64]; /* working folder of the test, also its current one */
static run_result r;

/* ---------------------------------------------------------------- fixtures */

static void write_file(const char *name, const void *bytes, size_t n) {
    qie_error e;
    if (qie_file_write_atomic(name, bytes, n, &e) != QIE_OK) {
        fprintf(stderr, "cannot prepare the test: %s\n", e.message);
        exit(1);
    }
}

/* A disc on a plain ground, which the demo model understands. */
static void make_picture(const char *name, int width, int height) {
    qie_image *image;
    qie_image_encode_options o = qie_image_encode_options_default();
    uint8_t *bytes, *p;
    size_t n;
    if (qie_image_create(width, height, &image, NULL) != QIE_OK)
        exit(1);
    p = qie_image_pixels(image);
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++, p += 3) {
            int dx = 2 * x - width, dy = 2 * y - height,
                inside = dx * dx + dy * dy < width * height / 4;
            p[0] = inside ? 220 : 235;
            p[1] = inside ? 40 : 235;
            p[2] = inside ? 40 : 225;
        }
    o.format = qie_image_format_from_path(name);
    if (qie_image_encode(image, &o, &bytes, &n, NULL) != QIE_OK)
        exit(1);
    write_file(name, bytes, n);
    free(bytes);
    qie_image_destroy(image);
}

static int count_files(const char *dir) {
    DIR *d = opendir(dir);
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));)
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

static void prepare(void) {
    snprintf(folder, sizeof folder, "/tmp/qie-test-XXXXXX");
    if (!mkdtemp(folder) || chmod(folder, 0755) || chdir(folder))
        exit(1);
    setenv("HOME", folder, 1); /* no config file and no cache of whoever runs the test */
    setenv("QIE_NVML", "/nonexistent/libnvidia-ml.so.1", 1); /* as on a machine without a GPU */
    setenv("ASAN_OPTIONS", "exitcode=99", 1);
    static const char *const names[] = {
        "QWEN_EDIT_2511_DIR",    "QWEN_EDIT_INPUT", "QWEN_EDIT_OUTPUT",
        "QWEN_EDIT_PROMPT",      "HF_HOME",         "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME",  "XDG_CONFIG_HOME",
        "OMP_NUM_THREADS",       "QIE_LOG",         "LANG"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    make_picture("in.png", 64, 64);
    make_picture("in.jpg", 64, 48);
    make_picture("in.webp", 48, 64);
}

static void clean_up(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    if (chdir("/") || system(command))
        fprintf(stderr, "%s stays\n", folder);
}

#define RUN(options, ...) \
    run_program(PROGRAM, (const char *const[]){__VA_ARGS__, NULL}, options, &r)
#define EDIT(options, ...) RUN(options, "edit", __VA_ARGS__)

/* The program fails with this code, says `part`, prints no path and leaves the folder as it was. */
#define ASSERT_REFUSED(expected_code, part, options, ...)                                       \
    do {                                                                                        \
        int files_before_ = count_files(".");                                                   \
        EDIT(options, __VA_ARGS__);                                                             \
        if (r.code != (expected_code))                                                          \
            QTEST_FAIL("exit code %d, expected %d; it said: %s", r.code, expected_code, r.err); \
        ASSERT_CONTAINS(r.err, part);                                                           \
        ASSERT_CONTAINS(r.err, "qwen-edit: error: ");                                           \
        ASSERT_STR(r.out, "");                                                                  \
        ASSERT_INT(count_files("."), files_before_);                                            \
    } while (0)

/* ---------------------------------------------------------------- it works */

QTEST(test_edit_writes_a_picture_and_prints_its_path_last) {
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "change the color of the subject to purple", "-o",
                    "ok.png", "-S", "3"),
               0);
    ASSERT_STR(r.out, "ok.png\n");
    ASSERT_CONTAINS(r.err, "built-in demo model");
    ASSERT_CONTAINS(r.err, "seed 3");
    ASSERT_INT(RUN(NULL, "info", "ok.png"), 0);
    ASSERT_CONTAINS(r.out, "seed: 3\n");
    ASSERT_CONTAINS(r.out, "prompt: change the color of the subject to purple\n");
    ASSERT_INT(RUN(NULL, "info", "--json", "ok.png"), 0);
    qie_error e;
    qie_json *o;
    ASSERT_OK(qie_json_parse(r.out, strlen(r.out), "info", &o, &e));
    ASSERT_INT(qie_json_integer(qie_json_member(qie_json_member(o, "parameters"), "seed")), 3);
    qie_json_free(o);
}

QTEST(test_edit_every_format_in_and_out) {
    ASSERT_INT(EDIT(NULL, "-i", "in.jpg", "-p", "red", "-o", "f.jpeg", "-s", "2", "-q"), 0);
    ASSERT_STR(r.err, "");
    ASSERT_INT(EDIT(NULL, "-i", "in.webp", "-p", "red", "-o", "f.WEBP", "-s", "2", "-q"), 0);
    ASSERT_INT(EDIT(NULL, "-i", "in.webp", "-i", "in.png", "-p", "red", "-o", "f.jpg", "-s", "2",
                    "-q", "--quality", "50"),
               0);
    ASSERT_INT(RUN(NULL, "info", "f.WEBP"), 0);
    ASSERT_CONTAINS(r.out, "format: webp\nwidth: 48\nheight: 64\n"); /* the demo keeps the size */
    ASSERT_CONTAINS(r.out, "num_inference_steps: 2\n");
    ASSERT_INT(RUN(NULL, "info", "f.jpg"), 0);
    ASSERT_CONTAINS(r.out, "format: jpeg\nwidth: 64\nheight: 64\n"); /* of the last input */
}

QTEST(test_edit_several_images_are_numbered) {
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "n.png", "-s", "1", "--num-images",
                    "2", "--no-metadata"),
               0);
    ASSERT_STR(r.out, "n-1.png\nn-2.png\n");
    ASSERT(qie_file_exists("n-1.png") && qie_file_exists("n-2.png") && !qie_file_exists("n.png"));
    ASSERT_INT(RUN(NULL, "info", "n-1.png"), 0);
    ASSERT_CONTAINS(r.out, "parameters: null");
}

QTEST(test_edit_same_seed_same_bytes_for_any_number_of_threads) {
    unsigned char *a, *b;
    size_t n, m;
    qie_error e;
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "t.png", "-S", "11", "--threads", "1",
                    "-s", "2"),
               0);
    ASSERT_OK(qie_file_read("t.png", 1u << 24, &a, &n, &e));
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "t.png", "-S", "11", "--threads", "3",
                    "-s", "2"),
               0);
    ASSERT_OK(qie_file_read("t.png", 1u << 24, &b, &m, &e));
    ASSERT_INT(m, n);
    ASSERT(memcmp(a, b, n) == 0);
    free(a);
    free(b);
}

QTEST(test_edit_json_last_line_is_the_result) {
    qie_error e;
    qie_json *o;
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "j.png", "-s", "2", "--json",
                    "--guidance-scale", "2"),
               0);
    ASSERT_OK(qie_json_parse(r.out, strlen(r.out), "result", &o, &e));
    ASSERT_STR(qie_json_string(qie_json_member(o, "output_path"), NULL), "j.png");
    ASSERT_INT(qie_json_integer(qie_json_member(o, "num_inference_steps")), 2);
    ASSERT_CONTAINS(r.out, "guidance_scale");
    qie_json_free(o);
    int n_progress = 0;
    for (char *line = strtok(r.err, "\n"); line; line = strtok(NULL, "\n")) {
        ASSERT_OK(qie_json_parse(line, strlen(line), "event", &o, &e));
        const char *kind = qie_json_string(qie_json_member(o, "event"), NULL);
        ASSERT(kind);
        n_progress += !strcmp(kind, "progress");
        qie_json_free(o);
    }
    ASSERT(n_progress >= 3);
}

QTEST(test_edit_dry_run_writes_nothing) {
    int before = count_files(".");
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "--dry-run"), 0);
    ASSERT_CONTAINS(r.out, "\ntokens ");
    ASSERT_CONTAINS(r.out, "\ntime ");
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "--dry-run", "-o", "dry.png", "--json"), 0);
    ASSERT_CONTAINS(r.out, "\"seconds_estimate\":");
    ASSERT_INT(count_files("."), before);
}

QTEST(test_edit_preview_is_written) {
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "p.png", "-s", "2", "--preview",
                    "preview.png"),
               0);
    ASSERT_INT(RUN(NULL, "info", "preview.png"), 0);
    ASSERT_CONTAINS(r.out, "format: png");
}

QTEST(test_edit_environment_gives_the_defaults) {
    const run_options o = {.variables = {"QWEN_EDIT_INPUT=in.png", "QWEN_EDIT_OUTPUT=env.png",
                                         "QWEN_EDIT_PROMPT=red", "QWEN_EDIT_FORCE_CPU=1",
                                         "QWEN_EDIT_NICE=5", "LANG=zh_CN.UTF-8"}};
    ASSERT_INT(EDIT(&o, "-s", "1"), 0);
    ASSERT_STR(r.out, "env.png\n");
    ASSERT_CONTAINS(
        r.err, "\xe6\xa8\xa1\xe5\x9e\x8b"); /* "model" in Chinese: what the demo says of itself */
}

/* Number of spans of this category, and their time within [from, to] summed. */
static int spans_of(const qie_json *events, const char *category, double from, double to,
                    double *sum) {
    int n = 0;
    *sum = 0;
    for (size_t i = 0; i < qie_json_size(events); i++) {
        const qie_json *e = qie_json_at(events, i);
        size_t len;
        const char *cat = qie_json_string(qie_json_member(e, "cat"), &len);
        double ts = qie_json_number(qie_json_member(e, "ts")),
               dur = qie_json_number(qie_json_member(e, "dur"));
        if (!cat || strcmp(cat, category) != 0 || ts < from || ts + dur > to)
            continue;
        n++;
        *sum += dur;
    }
    return n;
}

QTEST(test_edit_trace_holds_stages_steps_and_operations) {
    static const char *const stages[] = {"text", "reference", "denoise", "decode"};
    const run_options on = {.variables = {"QIE_TRACE=trace.json"}};
    make_picture("in.png", 96, 80);
    ASSERT_INT(EDIT(&on, "-i", "in.png", "-p", "make it blue", "-o", "t.png", "--steps", "3",
                    "--threads", "2"),
               0);
    qie_json *root;
    qie_error e = {0};
    ASSERT_OK(qie_json_parse_file("trace.json", 64 << 20, &root, &e));
    const qie_json *events = qie_json_member(root, "traceEvents");
    double ends = 0, from = 0, to = 0, sum, busy;
    int n_stages = 0;
    for (size_t i = 0; i < qie_json_size(events); i++) {
        const qie_json *v = qie_json_at(events, i);
        size_t len;
        const char *cat = qie_json_string(qie_json_member(v, "cat"), &len);
        if (!cat || strcmp(cat, "stage") != 0)
            continue;
        ASSERT(n_stages < 4);
        ASSERT_STR(qie_json_string(qie_json_member(v, "name"), &len), stages[n_stages]);
        double ts = qie_json_number(qie_json_member(v, "ts"));
        ASSERT(ts + 1 >= ends); /* one after the other */
        ends = ts + qie_json_number(qie_json_member(v, "dur"));
        if (n_stages++ == 2) {
            from = ts - 1;
            to = ends + 1;
        }
    }
    ASSERT_INT(n_stages, 4);
    ASSERT_INT(spans_of(events, "step", from, to, &sum), 3);
    ASSERT(sum > 0 && sum <= to - from);
    int blocks = spans_of(events, "block", from, to, &sum);
    ASSERT(blocks > 0 && blocks % 3 == 0 && sum <= to - from);
    int operations = spans_of(events, "operation", from, to, &sum);
    ASSERT(operations > 10 * blocks && sum > 0 && sum <= to - from);
    /* two threads work within the operations, so at most twice their time */
    ASSERT(spans_of(events, "thread", from, to, &busy) > 0 && busy > 0 && busy <= 2 * sum);
    qie_json_free(root);
    /* a trace that cannot be written costs no picture */
    ASSERT_INT(EDIT((&(run_options){.variables = {"QIE_TRACE=/nonexistent/t"}}), "-i", "in.png",
                    "-p", "make it blue", "-o", "u.png"),
               0);
    ASSERT_CONTAINS(r.err, "cannot write '/nonexistent/t'");
    ASSERT_INT(RUN(NULL, "info", "u.png"), 0);
}

QTEST(test_edit_chained_with_one_seed_takes_another) {
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "c1.png", "-s", "1", "-S", "42"), 0);
    ASSERT_INT(EDIT(NULL, "-i", "c1.png", "-p", "red", "-o", "c2.png", "-s", "1", "-S", "42"), 0);
    ASSERT_CONTAINS(r.err, "was made with seed 42");
    ASSERT(!strstr(r.err, ", seed 42\n"));
    ASSERT_INT(EDIT(NULL, "-i", "c1.png", "-p", "red", "-o", "c2.png", "-s", "1", "-S", "42",
                    "--force-seed"),
               0);
    ASSERT_CONTAINS(r.err, ", seed 42\n");
}

/* ---------------------------------------------------------------- wrong arguments */

QTEST(test_edit_wrong_arguments_are_named) {
    static const struct {
        const char *args[10];
        int code;
        const char *message;
    } cases[] = {
        {{"-i", "in.png", "-o", "x.png"}, 2, "no instruction"},
        {{"-p", "red", "-o", "x.png"}, 2, "no picture"},
        {{"-i", "in.png", "-p", "red"}, 2, "no output"},
        {{"-i", "in.png", "-p", "", "-o", "x.png"}, 2, "the instruction is empty"},
        {{"-i", "in.png", "-p", "a\xff", "-o", "x.png"}, 2, "not valid UTF-8"},
        {{"-i", "in.png", "-p", "red", "-n", "\xc0\x80", "-o", "x.png"}, 2, "not valid UTF-8"},
        {{"-i", "in.png", "-p", "red", "-o", "x.gif"}, 2, "must end in .png"},
        {{"-i", "in.png", "-p", "red", "-o", "x"}, 2, "must end in .png"},
        {{"-i", "in.png", "-p", "red", "-o", ""}, 2, "the path is empty"},
        {{"-i", "in.png", "-p", "red", "-o", "none/x.png"}, 6, "folder 'none'"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--preview", "x.png"},
         2,
         "is the output itself"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--steps", "201"},
         2,
         "--steps: 201 is not within 1..200"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--device", "cuda"}, 4, "no NVIDIA driver"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--keep-size", "-W", "64"}, 2, "contradicts"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--inject", "noise"}, 2, "NAME=FILE"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--inject", "noise=none.safetensors"},
         3,
         "none.safetensors"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--model", "/none"},
         3,
         "'/none' does not exist"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--config", "none.conf"}, 3, "none.conf"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--colour", "x"},
         2,
         "unknown flag '--colour'"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--lora", "none.safetensors"}, 3, "lora"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "more"}, 2, "unexpected argument 'more'"},
        {{"-i", "none.png", "-p", "red", "-o", "x.png"}, 3, "none.png"},
        {{"-i", "/", "-p", "red", "-o", "x.png"}, 2, "is a folder"},
        {{"-i", "in.png", "-p", "red", "-o", "x.png", "--memory-limit", "0.001"}, 5, "memory"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *args[RUN_MAX_ARGS] = {"edit"};
        int before = count_files(".");
        for (int k = 0; cases[i].args[k]; k++)
            args[k + 1] = cases[i].args[k];
        run_program(PROGRAM, args, NULL, &r);
        if (r.code != cases[i].code || !strstr(r.err, cases[i].message))
            QTEST_FAIL("case %zu: exit code %d (expected %d), \"%s\" (expected \"%s\")", i, r.code,
                       cases[i].code, r.err, cases[i].message);
        ASSERT_STR(r.out, "");
        ASSERT_INT(count_files("."), before);
    }
}

QTEST(test_edit_very_long_prompts_are_refused) {
    static char text[100001];
    memset(text, 'a', sizeof text - 1);
    ASSERT_REFUSED(2, "100000 characters, the limit is 32000", NULL, "-i", "in.png", "-p", text,
                   "-o", "x.png");
    /* Within the limit of characters, beyond that of the model's positions: every character its own
     * token. */
    for (int i = 0; i < 30000; i++)
        text[i] = (char)(33 + (i * 7919) % 90);
    text[30000] = 0;
    ASSERT_REFUSED(2, "tokens", NULL, "-i", "in.png", "-p", text, "-o", "x.png");
}

QTEST(test_edit_too_many_pictures_are_refused) {
    const char *args[RUN_MAX_ARGS] = {"edit", "-p", "red", "-o", "x.png"};
    for (int i = 0; i < 17; i++) {
        args[5 + 2 * i] = "-i";
        args[6 + 2 * i] = "in.png";
    }
    run_program(PROGRAM, args, NULL, &r);
    ASSERT_INT(r.code, 2);
    ASSERT_CONTAINS(r.err, "17 pictures, the limit is 16");
}

/* ---------------------------------------------------------------- damaged pictures */

static void big_endian(unsigned char *p, unsigned v) {
    for (int i = 0; i < 4; i++)
        p[i] = (unsigned char)(v >> (24 - 8 * i));
}

static unsigned crc_of(const unsigned char *p, size_t n) {
    unsigned c = ~0u;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++)
            c = (c >> 1) ^ (0xedb88320u & (0u - (c & 1)));
    }
    return ~c;
}

QTEST(test_edit_damaged_pictures_are_refused) {
    static const char *const names[] = {"in.png", "in.jpg", "in.webp"};
    qie_error e;
    for (size_t i = 0; i < 3; i++) {
        unsigned char *bytes;
        size_t n;
        ASSERT_OK(qie_file_read(names[i], 1u << 24, &bytes, &n, &e));
        const size_t cuts[] = {0, 1, 11, n / 4, n / 2, n - 20};
        for (size_t k = 0; k < sizeof cuts / sizeof *cuts; k++) {
            write_file("cut", bytes, cuts[k]);
            ASSERT_REFUSED(2, "'cut'", NULL, "-i", "cut", "-p", "red", "-o", "x.png");
        }
        free(bytes);
    }
    write_file("cut", "GIF89a\1\0\1\0", 10);
    ASSERT_REFUSED(2, "'cut'", NULL, "-i", "cut", "-p", "red", "-o", "x.png");
}

QTEST(test_edit_pictures_of_absurd_size_are_refused) {
    qie_error e;
    unsigned char *bytes;
    size_t n;
    ASSERT_OK(qie_file_read("in.png", 1u << 24, &bytes, &n, &e));
    static const struct {
        unsigned width, height;
    } sizes[] = {{1, 1}, {15, 64}, {30000, 30000}, {0x7fffffff, 0x7fffffff}, {0, 64}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        big_endian(bytes + 16, sizes[i].width);
        big_endian(bytes + 20, sizes[i].height);
        big_endian(bytes + 29, crc_of(bytes + 12, 17));
        write_file("huge.png", bytes, n);
        ASSERT_REFUSED(2, "'huge.png'", NULL, "-i", "huge.png", "-p", "red", "-o", "x.png");
    }
    free(bytes);
}

/* ---------------------------------------------------------------- damaged models */

/* The demo's folder with links to its files; whoever damages a file replaces the link. */
static void copy_model(const char *to) {
    char command[512];
    snprintf(command, sizeof command, "rm -rf '%s' && cp -r '%s/demo/model' '%s'", to,
             QIE_SOURCE_DIR, to);
    if (system(command))
        exit(1);
}

#define ASSERT_MODEL_REFUSED(code, part) \
    ASSERT_REFUSED(code, part, NULL, "-i", "in.png", "-p", "red", "-o", "x.png", "--model", "m")

QTEST(test_edit_model_folder_lacking_files_is_refused) {
    static const char *const names[] = {"model_index.json",
                                        "transformer/config.json",
                                        "transformer/diffusion_pytorch_model.safetensors",
                                        "text_encoder/model.safetensors",
                                        "vae/config.json",
                                        "scheduler/scheduler_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[256];
        copy_model("m");
        snprintf(path, sizeof path, "m/%s", names[i]);
        ASSERT_INT(unlink(path), 0);
        EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "x.png", "--model", "m");
        if (r.code != 3)
            QTEST_FAIL("without %s: exit code %d, \"%s\"", names[i], r.code, r.err);
        ASSERT_CONTAINS(r.err, "qwen-edit: error: ");
        ASSERT(!qie_file_exists("x.png"));
    }
}

QTEST(test_edit_model_index_naming_a_missing_shard_is_refused) {
    static const char index[] =
        "{\"metadata\":{},\"weight_map\":{\"conv_in.weight\":\"model-00001-of-00002.safetensors\","
        "\"conv_out.weight\":\"model-00002-of-00002.safetensors\"}}";
    copy_model("m");
    ASSERT_INT(rename("m/text_encoder/model.safetensors",
                      "m/text_encoder/model-00001-of-00002.safetensors"),
               0);
    write_file("m/text_encoder/model.safetensors.index.json", index, sizeof index - 1);
    ASSERT_MODEL_REFUSED(3, "model-00002-of-00002.safetensors");
}

static void damage_file(const char *name, const char *find, const char *replace) {
    unsigned char *bytes;
    size_t n;
    qie_error e;
    if (qie_file_read(name, 1u << 28, &bytes, &n, &e) != QIE_OK)
        exit(1);
    unsigned char *at = memmem(bytes, n, find, strlen(find));
    if (!at) {
        fprintf(stderr, "%s does not contain %s\n", name, find);
        exit(1);
    }
    memcpy(at, replace, strlen(replace));
    write_file(name, bytes, n);
    free(bytes);
}

QTEST(test_edit_damaged_weights_are_refused) {
    const char *const name = "m/transformer/diffusion_pytorch_model.safetensors";
    copy_model("m");
    ASSERT_INT(truncate(name, 100000), 0);
    ASSERT_MODEL_REFUSED(6, "diffusion_pytorch_model.safetensors");
    copy_model("m");
    ASSERT_INT(truncate(name, 4), 0);
    ASSERT_MODEL_REFUSED(6, "diffusion_pytorch_model.safetensors");
    copy_model("m");
    damage_file(name, "\"data_offsets\":[0,", "\"data_offsets\":[9,");
    ASSERT_MODEL_REFUSED(6, "diffusion_pytorch_model.safetensors");
    copy_model("m");
    damage_file(name, "\"dtype\":\"BF16\"", "\"dtype\":\"F8_9\"");
    ASSERT_MODEL_REFUSED(6, "diffusion_pytorch_model.safetensors");
    copy_model("m");
    damage_file(name, "\"shape\":[", "\"shape\":9");
    ASSERT_MODEL_REFUSED(6, "diffusion_pytorch_model.safetensors");
}

QTEST(test_edit_absurd_configs_are_refused) {
    static const struct {
        const char *file, *text;
    } cases[] = {
        {"m/transformer/config.json",
         "{\"num_layers\":1000000000,\"attention_head_dim\":128,\"num_attention_heads\":24}"},
        {"m/transformer/config.json", "{\"num_layers\":-1}"},
        {"m/transformer/config.json",
         "{\"num_layers\":5,\"attention_head_dim\":0,\"num_attention_heads\":0}"},
        {"m/transformer/config.json", "{"},
        {"m/transformer/config.json", "[]"},
        {"m/vae/config.json", "{\"base_dim\":4000000000,\"z_dim\":16}"},
        {"m/vae/config.json", "{\"z_dim\":\"many\"}"},
        {"m/text_encoder/config.json", "{\"hidden_size\":1e300}"},
        {"m/text_encoder/config.json", ""},
        {"m/model_index.json", "null"},
        {"m/scheduler/scheduler_config.json", "{\"num_train_timesteps\":-5}"},
        {"m/processor/tokenizer.json", "{\"a\":99999999999}"},
        {"m/qwen_edit.json", "{\"num_inference_steps\":1000000}"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        copy_model("m");
        write_file(cases[i].file, cases[i].text, strlen(cases[i].text));
        EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "x.png", "--model", "m");
        if (r.code != 6 && r.code != 2)
            QTEST_FAIL("%s %s: exit code %d, \"%s\"", cases[i].file, cases[i].text, r.code, r.err);
        ASSERT_CONTAINS(r.err, "qwen-edit: error: ");
        ASSERT(!qie_file_exists("x.png"));
    }
}

/* ---------------------------------------------------------------- the file system */

QTEST(test_edit_full_disk_keeps_the_old_file) {
    write_file("old.png", "old", 3);
    const run_options small = {.max_file_bytes = 1000};
    ASSERT_REFUSED(6, "old.png", &small, "-i", "in.png", "-p", "red", "-o", "old.png", "-s", "1");
    unsigned char *bytes;
    size_t n;
    qie_error e;
    ASSERT_OK(qie_file_read("old.png", 100, &bytes, &n, &e));
    ASSERT_STR((char *)bytes, "old");
    free(bytes);
    ASSERT_INT(symlink("/dev/full", "full.png"), 0);
    ASSERT_REFUSED(6, "full.png", NULL, "-i", "in.png", "-p", "red", "-o", "full.png", "-s", "1");
}

QTEST(test_edit_folder_not_writable_is_found_before_the_model_is_opened) {
    if (getuid() != 0)
        QTEST_SKIP("needs root to become somebody else");
    const run_options nobody = {.uid = 65534};
    ASSERT_INT(mkdir("closed", 0755), 0);
    ASSERT_REFUSED(6, "closed/x.png", &nobody, "-i", "in.png", "-p", "red", "-o", "closed/x.png",
                   "--model", "/none");
    ASSERT_INT(count_files("closed"), 0);
}

QTEST(test_edit_replaces_an_existing_file_and_keeps_its_mode) {
    struct stat st;
    write_file("mode.png", "old", 3);
    ASSERT_INT(chmod("mode.png", 0600), 0);
    ASSERT_INT(symlink("mode.png", "link.png"), 0);
    ASSERT_INT(EDIT(NULL, "-i", "in.png", "-p", "red", "-o", "link.png", "-s", "1"), 0);
    ASSERT_INT(lstat("link.png", &st), 0);
    ASSERT(S_ISLNK(st.st_mode));
    ASSERT_INT(stat("mode.png", &st), 0);
    ASSERT_INT(st.st_mode & 07777, 0600);
    ASSERT(st.st_size > 100);
}

QTEST(test_edit_standard_output_that_is_full_is_an_error) {
    const char *const args[] = {"-c", "exec \"$0\" edit -i in.png -p red -o so.png -s 1 >/dev/full",
                                PROGRAM, NULL};
    run_program("/bin/sh", args, NULL, &r);
    ASSERT_INT(r.code, 6);
    ASSERT_CONTAINS(r.err, "standard output");
}

/* ---------------------------------------------------------------- interrupts */

QTEST(test_edit_interrupted_during_steps_leaves_nothing) {
    static const int signals[] = {SIGINT, SIGTERM};
    for (size_t i = 0; i < 2; i++) {
        const run_options o = {.signal_number = signals[i], .signal_after = "step 1/200"};
        ASSERT_REFUSED(130, "cancelled", &o, "-i", "in.png", "-p", "red", "-o", "sig.png", "-s",
                       "200");
    }
}

QTEST(test_batch_interrupted_ends_the_batch) {
    static const char jobs[] =
        "{\"prompt\":\"a\",\"image\":\"in.png\",\"output_path\":\"i1.png\"}\n"
        "{\"prompt\":\"b\",\"image\":\"in.png\",\"output_path\":\"i2.png\"}\n";
    write_file("jobs.jsonl", jobs, sizeof jobs - 1);
    const run_options o = {.signal_number = SIGINT, .signal_after = "step 1/200"};
    ASSERT_REFUSED(130, "interrupted", &o, "--batch", "jobs.jsonl", "-s", "200");
    ASSERT(!strstr(r.err, "line 2"));
}

/* ---------------------------------------------------------------- batch */

QTEST(test_batch_goes_on_after_a_failed_line) {
    const run_options o = {
        .input = "{\"prompt\":\"a\",\"image\":\"in.png\",\"output_path\":\"b1.png\",\"seed\":5}\n"
                 "\n"
                 "{\"prompt\":\"b\",\"image\":\"none.png\",\"output_path\":\"b2.png\"}\n"
                 "{\"prompt\":\"c\",\"images\":[\"in.png\",\"in.jpg\"],\"output_path\":\"b3.jpg\","
                 "\"num_images\":2}\n"
                 "{\"prompt\":\"d\",\"image\":\"in.png\",\"output_path\":\"b4.png\",\"sed\":1}\n"
                 "{broken\n"
                 "{\"prompt\":\"e\",\"image\":\"b1.png\",\"output_path\":\"b5.webp\"}"};
    ASSERT_INT(EDIT(&o, "--batch", "-", "-s", "1"), 3); /* that of the first failure */
    ASSERT_STR(r.out, "b1.png\nb3-1.jpg\nb3-2.jpg\nb5.webp\n");
    ASSERT_CONTAINS(r.err, "line 3: error: cannot open 'none.png'");
    ASSERT_CONTAINS(r.err, "line 5: error: unknown field 'sed'");
    ASSERT_CONTAINS(r.err, "line 6: error: ");
    ASSERT_CONTAINS(r.err, "3 edits done, 3 failed");
    ASSERT(!qie_file_exists("b2.png") && !qie_file_exists("b4.png"));
    ASSERT_INT(EDIT(&o, "--batch", "-", "-s", "1", "--json", "-q"), 3);
    int n_lines = 0, n_errors = 0;
    for (char *line = strtok(r.out, "\n"); line; line = strtok(NULL, "\n")) {
        qie_error e;
        qie_json *result;
        ASSERT_OK(qie_json_parse(line, strlen(line), "line", &result, &e));
        ASSERT(qie_json_member(result, "line"));
        n_errors += qie_json_member(result, "error") != NULL;
        n_lines++;
        qie_json_free(result);
    }
    ASSERT_INT(n_lines, 6);
    ASSERT_INT(n_errors, 3);
}

QTEST(test_batch_without_lines_is_an_error) {
    ASSERT_REFUSED(2, "holds no line", NULL, "--batch", "/dev/null");
    ASSERT_REFUSED(3, "none.jsonl", NULL, "--batch", "none.jsonl");
    ASSERT_REFUSED(2, "--output has no place", NULL, "--batch", "none.jsonl", "-o", "x.png");
}

int main(int argc, char **argv) {
    prepare();
    int code = qtest_main(argc, argv);
    clean_up();
    return code;
}
