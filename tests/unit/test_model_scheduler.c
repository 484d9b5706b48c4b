/* Sigmas against diffusers' recorded schedule with the released config. */
#include "qtest.h"

#include "base/json.h"
#include "model/scheduler.h"
#include "plan/preset.h"

static const qie_scheduler_config RELEASED = {.num_train_timesteps = 1000,
                                              .use_dynamic_shifting = true,
                                              .base_shift = 0.5,
                                              .max_shift = 0.9,
                                              .shift = 1.0,
                                              .base_image_seq_len = 256,
                                              .max_image_seq_len = 8192,
                                              .shift_terminal = 0.02,
                                              .exponential = true};

static void check_recording(const char *path, const qie_scheduler_config *c, size_t at_least) {
    qie_error e = {0};
    qie_json *j;
    ASSERT_OK(qie_json_parse_file(path, 1 << 20, &j, &e));
    for (size_t i = 0; i < qie_json_size(j); i++) {
        qie_json *row = qie_json_at(j, i), *sig = qie_json_member(row, "sigmas");
        qie_json *ts = qie_json_member(row, "timesteps");
        int n = (int)qie_json_integer(qie_json_member(row, "steps"));
        float s[256], t[256];
        qie_scheduler_sigmas(c, n, qie_json_integer(qie_json_member(row, "seq_len")), s, t);
        ASSERT_INT(qie_json_size(sig), n + 1);
        for (int k = 0; k <= n; k++)
            ASSERT_LE(fabs((double)s[k] - qie_json_number(qie_json_at(sig, (size_t)k))), 1e-6);
        for (int k = 0; k < n; k++)
            ASSERT_LE(fabs((double)t[k] - qie_json_number(qie_json_at(ts, (size_t)k))), 1e-3);
    }
    ASSERT(qie_json_size(j) >= at_least);
    qie_json_free(j);
}

QTEST(test_scheduler_recorded_within_1e_6) {
    check_recording(QIE_SOURCE_DIR "/tests/golden/unit/schedule.json", &RELEASED, 31);
}

QTEST(test_scheduler_lightning_recorded_within_1e_6) {
    qie_scheduler_config c = RELEASED;
    ASSERT(!qie_scheduler_is_lightning(&c));
    qie_scheduler_set_lightning(&c);
    ASSERT(qie_scheduler_is_lightning(&c));
    check_recording(QIE_SOURCE_DIR "/tests/golden/lora/schedule.json", &c, 24);
}

QTEST(test_scheduler_lightning_equals_shift_3) {
    qie_scheduler_config c = RELEASED;
    c.base_shift = c.max_shift = log(3.0);
    c.shift_terminal = 0;
    float s[9];
    for (int n = 4; n <= 8; n += 4) {
        qie_scheduler_sigmas(&c, n, 4096, s, NULL);
        for (int k = 0; k < n; k++) {
            double x = 1.0 - (double)k * (1.0 - 1.0 / n) / (n - 1);
            ASSERT_LE(fabs((double)s[k] - 3 * x / (1 + 2 * x)), 1e-6);
        }
        ASSERT_LE(fabs((double)s[n]), 0);
    }
}

QTEST(test_scheduler_one_step_is_one_to_zero) {
    float s[2];
    qie_scheduler_sigmas(&RELEASED, 1, 4096, s, NULL);
    ASSERT_LE(fabs((double)s[0] - 1), 1e-6);
    ASSERT_LE(fabs((double)s[1]), 0);
}

int main(int argc, char **argv) {
    return qtest_main(argc, argv);
}
