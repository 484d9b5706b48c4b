"""LoRA files for tests, written with the standard library alone: random thin matrices for the demo's layers."""
import array
import json
import random
import struct

INNER, BLOCKS = 128, 6  # of the demo's transformer


def write(path, tensors, metadata=None):
    """tensors: {name: (shape, floats)}, stored as F32."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (shape, values) in tensors.items():
        raw = array.array("f", values).tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def lora(path, seed, rank=4, size=0.05, layers=("attn.to_q", "attn.to_v", "attn.to_out.0"), inner=INNER, blocks=BLOCKS,
         prefix="transformer.", metadata=None):
    """A LoRA of random pairs in the naming of PEFT. `size`: of the entries; 0.05 changes the demo's picture visibly."""
    rng, tensors = random.Random(seed), {}
    for b in range(blocks):
        for layer in layers:
            name = f"{prefix}transformer_blocks.{b}.{layer}.lora_"
            tensors[name + "A.weight"] = (rank, inner), [rng.gauss(0, size) for _ in range(rank * inner)]
            tensors[name + "B.weight"] = (inner, rank), [rng.gauss(0, size) for _ in range(rank * inner)]
    write(path, tensors, metadata)
