/* Events however they are cut into pieces, and what is no event. */
#include "cli/sse.h"
#include "qtest.h"

static char seen[4096];

static bool note(void *arg, const char *name, const char *data, size_t n) {
    int *left = arg;
    size_t at = strlen(seen);
    snprintf(seen + at, sizeof seen - at, "%s=%s(%zu);", name, data, n);
    return !left || --*left > 0;
}

static const char stream[] =
    "retry: 1000\n\n: wait\n\nid: 7\nevent: progress\ndata: {\"step\":1}\n\n"
    "event:x\r\ndata:a\r\ndata: b\r\n\r\nid: 9\rdata:  c\r\r"
    "event: empty\n\ndata\n\nid: 10\nevent: cut\ndata: lost";
static const char expected[] = "progress={\"step\":1}(10);x=a\nb(3);message= c(2);message=(0);";

QTEST(test_sse_pieces_of_any_size_give_the_same_events) {
    for (size_t piece = 1; piece < sizeof stream; piece++) {
        cli_sse s;
        seen[0] = 0;
        cli_sse_init(&s);
        for (size_t at = 0; at < sizeof stream - 1; at += piece) {
            size_t n = sizeof stream - 1 - at;
            ASSERT(cli_sse_feed(&s, stream + at, n < piece ? n : piece, note, NULL));
        }
        ASSERT_STR(seen, expected);
        ASSERT_STR(s.id, "9");
        cli_sse_restart(&s);
        ASSERT(cli_sse_feed(&s, "data: new\n\n", 11, note, NULL));
        ASSERT_CONTAINS(seen, ";message=new(3);"); /* nothing is left of the cut one */
        ASSERT_STR(s.id, "9");
        cli_sse_release(&s);
    }
}

QTEST(test_sse_the_reader_can_be_stopped) {
    cli_sse s;
    int left = 1;
    seen[0] = 0;
    cli_sse_init(&s);
    ASSERT(!cli_sse_feed(&s, "data: 1\n\ndata: 2\n\n", 18, note, &left));
    ASSERT_STR(seen, "message=1(1);");
    cli_sse_release(&s);
}

QTEST(test_sse_a_line_without_end_is_refused) {
    static char block[65536];
    cli_sse s;
    bool ok = true;
    memset(block, 'a', sizeof block);
    cli_sse_init(&s);
    size_t fed = 0;
    for (; ok && fed <= 2u * CLI_SSE_MAX_BYTES; fed += sizeof block)
        ok = cli_sse_feed(&s, block, sizeof block, note, NULL);
    ASSERT(!ok);
    ASSERT_LE(fed, CLI_SSE_MAX_BYTES + 2 * sizeof block);
    cli_sse_release(&s);
}

QTEST(test_sse_names_that_are_too_long_are_as_if_absent) {
    cli_sse s;
    char text[256];
    seen[0] = 0;
    cli_sse_init(&s);
    int n = snprintf(text, sizeof text, "event: %0100d\nid: %0100d\ndata: x\n\n", 1, 2);
    ASSERT(cli_sse_feed(&s, text, (size_t)n, note, NULL));
    ASSERT_STR(seen, "message=x(1);");
    ASSERT_STR(s.id, "");
    cli_sse_release(&s);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
