#!/usr/bin/env python3
"""What a precision costs: the error of the velocity and of the picture against f32, beside what the measure sees.

  VENV/bin/python bench/precision_error.py --model DIR --image A.png --other-image B.png [--steps 1] [--width 256 --height 256]
                  [--ref-area 65536] [--program build/qwen-edit] [--threads 2] [--work DIR] [--others DIR ...]

VENV holds numpy, safetensors, Pillow (PyPI). Runs the program in f32, bf16 and int8 from the same noise and prints the
normalised mean square error of the first step's velocity and the PSNR of the picture. A measure that cannot see is worth
nothing: the same figures for another prompt, another picture, and for a model whose blocks add nothing (output projections
zeroed in a copy of the transformer under --work, which is removed again) come first. Each precision is shown twice: the
whole edit, and the transformer alone on the f32 run's conditioning and reference latents (a text encoder of random weights
multiplies the rounding of its inputs by thousands: transformers' own bf16 does the same). --others: conversions of the same
model (`qwen-edit quantize`), each in bf16 and in int8.
"""
import argparse, glob, json, os, shutil, struct, subprocess, tempfile

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", required=True)
ap.add_argument("--image", required=True)
ap.add_argument("--other-image", required=True)
ap.add_argument("--prompt", default="make the mug red")
ap.add_argument("--other-prompt", default="turn the background into a snowy forest at night")
ap.add_argument("--steps", type=int, default=1)
ap.add_argument("--width", type=int); ap.add_argument("--height", type=int)
ap.add_argument("--ref-area", type=int)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--program", default="build/qwen-edit")
ap.add_argument("--work", default=None)
ap.add_argument("--others", nargs="*", default=[])
a = ap.parse_args()
work = tempfile.mkdtemp(dir=a.work)


INPUTS = "prompt_embeds", "image_latents"


def run(precision, prompt=a.prompt, image=a.image, model=a.model, inputs=None, keep=None):
    dump, out = os.path.join(work, "dump.safetensors"), os.path.join(work, "out.png")
    cmd = [a.program, "edit", "--model", model, "-i", image, "-p", prompt, "-o", out, "-S", "1", "-s", str(a.steps),
           "--true-cfg-scale", "1", "--noise", "f32", "--precision", precision, "--threads", str(a.threads), "--quiet"]
    for flag, v in (("-W", a.width), ("-H", a.height), ("--ref-area", a.ref_area)):
        if v:
            cmd += [flag, str(v)]
    for name in INPUTS if inputs else ():
        cmd += ["--inject", name + "=" + inputs]
    names = ",".join(("dit.0.cond", *INPUTS))
    subprocess.run(cmd, check=True, capture_output=True, env=dict(os.environ, QIE_DUMP=dump, QIE_DUMP_NAMES=names))
    if keep:
        shutil.copy(dump, keep)
    return load_file(dump)["dit.0.cond"].astype(np.float64), np.asarray(Image.open(out).convert("RGB"), dtype=np.float64)


def without_blocks():
    """The model with to_out, to_add_out and the second linear layer of both MLPs zeroed, weights and biases."""
    model = os.path.join(work, "model")
    os.mkdir(model)
    for entry in os.listdir(a.model):
        if entry != "transformer":
            os.symlink(os.path.abspath(os.path.join(a.model, entry)), os.path.join(model, entry))
    shutil.copytree(os.path.join(a.model, "transformer"), os.path.join(model, "transformer"))
    for path in glob.glob(os.path.join(model, "transformer", "*.safetensors")):
        with open(path, "r+b") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(n))
            for name, t in header.items():
                if any(part in name for part in (".attn.to_out.", ".attn.to_add_out.", "_mlp.net.2.")):
                    start, end = t["data_offsets"]
                    f.seek(8 + n + start)
                    f.write(bytes(end - start))
    return model


def line(what, got, want):
    nmse = ((got[0] - want[0]) ** 2).sum() / (want[0] ** 2).sum()
    mse = ((got[1] - want[1]) ** 2).mean() if got[1].shape == want[1].shape else float("nan")
    psnr = 10 * np.log10(255 ** 2 / mse) if mse > 0 else float("inf")
    print(f"{what:28s} {nmse:10.2e} {psnr:9.1f}", flush=True)


try:
    print(f"{'against f32':28s} {'NMSE':>10s} {'PSNR, dB':>9s}")
    inputs = os.path.join(work, "inputs.safetensors")
    exact = run("f32", keep=inputs)
    line("another prompt", run("f32", prompt=a.other_prompt), exact)
    line("another picture", run("f32", image=a.other_image), exact)
    line("blocks that add nothing", run("f32", model=without_blocks()), exact)
    shutil.rmtree(os.path.join(work, "model"))
    for precision in "bf16", "int8":
        line(precision + ", transformer alone", run(precision, inputs=inputs), exact)
        line(precision + ", whole edit", run(precision), exact)
    for other in a.others:
        for precision in "bf16", "int8":
            name = os.path.basename(other.rstrip("/")) + " in " + precision
            line(name + ", alone", run(precision, model=other, inputs=inputs), exact)
finally:
    shutil.rmtree(work)
