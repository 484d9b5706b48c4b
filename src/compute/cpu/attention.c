#include "compute/cpu/cpu_state.h"

size_t qie_cpu_attention_bytes(int max_head_dim) {
    (void)max_head_dim;
    return 0;
}
