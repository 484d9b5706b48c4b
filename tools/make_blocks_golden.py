#!/usr/bin/env python3
"""Random valid blocks of every GGUF type and 8-bit floats, with the values that the `gguf` package (blocks) and
torch (8-bit floats) read from them: tests/golden/blocks/blocks.safetensors. Needs: numpy, gguf, torch, safetensors.

  tools/make_blocks_golden.py tests/golden/blocks/blocks.safetensors
"""
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

# Byte offsets of the binary16 scales in a block.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}
BLOCKS = {32: 24, 256: 3}

rng = np.random.default_rng(7)
out = {}
for name, offsets in HALVES.items():
    t = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[t]
    b = rng.integers(0, 256, (BLOCKS[elements], size), dtype=np.uint8)
    for at in offsets:
        d = (rng.standard_normal(len(b)) * 0.02).astype(np.float16)
        d[0] = np.float16(6e-8)  # subnormal
        b[:, at:at + 2] = d.view(np.uint8).reshape(-1, 2)
    v = gguf.dequantize(b.reshape(-1), t).astype(np.float32).reshape(-1)
    out[name + ".blocks"], out[name + ".values"] = torch.from_numpy(b.reshape(-1)), torch.from_numpy(v)
for name, t in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
    b = torch.arange(256 + 3, dtype=torch.int32).to(torch.uint8)  # every value, and an odd end
    out[name + ".blocks"], out[name + ".values"] = b, b.view(t).float()
save_file(out, sys.argv[1])
