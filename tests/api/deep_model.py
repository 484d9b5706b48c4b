"""The small model of the recordings with more blocks in its transformer: as there, one after the other, again and again.
Written with the standard library alone."""
import glob
import json
import os
import shutil
import struct

SMALL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "golden", "model")
PREFIX = "transformer_blocks."


def tensors(folder):
    """{name: (dtype, shape, bytes)} of all files."""
    out = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with open(path, "rb") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            header, data = json.loads(f.read(n)), f.read()
        for name, t in header.items():
            if name != "__metadata__":
                begin, end = t["data_offsets"]
                out[name] = t["dtype"], t["shape"], data[begin:end]
    return out


def write(path, all_of):
    header, at = {}, 0
    for name, (dtype, shape, data) in all_of.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in all_of.values()))


def make(folder, blocks, **defaults):
    """defaults: of edits, as qwen_edit.json has them."""
    shutil.copytree(SMALL, folder)
    with open(os.path.join(folder, "qwen_edit.json"), "w") as f:
        json.dump(defaults, f)
    part = os.path.join(folder, "transformer")
    with open(os.path.join(part, "config.json")) as f:
        config = json.load(f)
    few, n, deep = tensors(part), config["num_layers"], {}
    for name, t in few.items():
        if not name.startswith(PREFIX):
            deep[name] = t
            continue
        i, rest = name[len(PREFIX):].split(".", 1)
        for k in range(int(i), blocks, n):
            deep["%s%d.%s" % (PREFIX, k, rest)] = t
    for old in glob.glob(os.path.join(part, "*.safetensors*")):
        os.unlink(old)
    write(os.path.join(part, "diffusion_pytorch_model.safetensors"), deep)
    config["num_layers"] = blocks
    with open(os.path.join(part, "config.json"), "w") as f:
        json.dump(config, f)
