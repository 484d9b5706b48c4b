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


def lightning_shaped(path, inner=INNER, blocks=BLOCKS):
    """As the released Lightning LoRAs are: plain names, rank 64, alpha 8, twelve layers of each block; of small numbers."""
    tensors = {}
    for b in range(blocks):
        for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
                      "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"):
            n, k = {"net.0.proj": (4, 1), "net.2": (1, 4)}.get(layer.split("_mlp.")[-1], (1, 1))
            name = f"transformer_blocks.{b}.{layer}."
            tensors[name + "lora_down.weight"] = (64, k * inner), [0.001] * (64 * k * inner)
            tensors[name + "lora_up.weight"] = (n * inner, 64), [0.001] * (64 * n * inner)
            tensors[name + "alpha"] = (), [8.0]
    write(path, tensors)
