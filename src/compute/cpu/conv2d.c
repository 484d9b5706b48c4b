#include "compute/cpu/cpu_state.h"

size_t qie_cpu_conv_bytes(int64_t max_conv_k, int64_t max_conv_n) {
    (void)max_conv_k;
    (void)max_conv_n;
    return 0;
}
