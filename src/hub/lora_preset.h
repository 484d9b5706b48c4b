/* What a LoRA's file asks for, for those who hold no model: the service's master. Reads the header
 * and the factors, never the matrices. */
#ifndef QIE_HUB_LORA_PRESET_H
#define QIE_HUB_LORA_PRESET_H

#include "plan/preset.h"

/* By metadata, name or shape, as the engine finds it; none for a file that is no LoRA. */
qie_preset qie_hub_lora_preset(const char *path);

#endif
