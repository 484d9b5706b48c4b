/* Inside the step loop nothing is taken from the heap: a request whose plan fits cannot fail half
 * way. This program's own malloc counts every call of the process between the end of the first step
 * and the last. */
#include "qtest.h"

#include <stdatomic.h>

#include "qie/edit.h"

#define MODEL QIE_SOURCE_DIR "/tests/golden/model"

static atomic_int n_calls, counting;

#ifndef __SANITIZE_ADDRESS__
#ifndef __SANITIZE_THREAD__
#define COUNTS 1
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t k, size_t n);
extern void *__libc_realloc(void *p, size_t n);

void *malloc(size_t n) {
    atomic_fetch_add(&n_calls, atomic_load(&counting));
    return __libc_malloc(n);
}
void *calloc(size_t k, size_t n) {
    atomic_fetch_add(&n_calls, atomic_load(&counting));
    return __libc_calloc(k, n);
}
void *realloc(void *p, size_t n) {
    atomic_fetch_add(&n_calls, atomic_load(&counting));
    return __libc_realloc(p, n);
}
#endif
#endif

static void on_progress(void *arg, const qie_progress *p) {
    (void)arg;
    if (!strcmp(p->stage, "denoise"))
        atomic_store(&counting, p->step >= 1 && p->step < p->total);
}

static void run(qie_precision precision) {
#ifndef COUNTS
    QTEST_SKIP("the sanitizer has its own malloc");
#endif
    qie_error e = {0};
    qie_engine_options eo = qie_engine_options_default();
    eo.model = MODEL;
    eo.precision = precision;
    eo.n_threads = 2;
    qie_engine *g;
    ASSERT_OK(qie_engine_open(&eo, &g, &e));
    qie_image *img;
    ASSERT_OK(qie_image_create(80, 64, &img, &e));
    qie_edit_options o = qie_edit_options_default();
    o.images = (const qie_image *const *)&img;
    o.n_images = 1;
    o.prompt = "make it red";
    o.num_inference_steps = 5;
    o.width = o.height = 96;
    o.ref_area = 96 * 96;
    o.progress = on_progress;
    qie_edit_result r;
    atomic_store(&n_calls, 0);
    ASSERT_OK(qie_engine_edit(g, &o, &r, &e));
    atomic_store(&counting, 0);
    ASSERT_INT(atomic_load(&n_calls), 0);
    /* the counter sees: one call of our own */
    atomic_store(&counting, 1);
    void *volatile p = malloc(10);
    atomic_store(&counting, 0);
    free(p);
    ASSERT_INT(atomic_load(&n_calls), 1);
    qie_edit_result_release(&r);
    qie_image_destroy(img);
    qie_engine_close(g);
}

QTEST(test_step_loop_f32_takes_nothing_from_the_heap) {
    run(QIE_PRECISION_F32);
}
QTEST(test_step_loop_bf16_takes_nothing_from_the_heap) {
    run(QIE_PRECISION_BF16);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
