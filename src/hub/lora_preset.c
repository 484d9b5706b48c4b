#include "hub/lora_preset.h"

#include "weights/lora.h"

qie_preset qie_hub_lora_preset(const char *path) {
    return qie_lora_preset(path);
}
