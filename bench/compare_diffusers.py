#!/usr/bin/env python3
"""Time qwen-edit beside diffusers on the same model, pictures, steps and threads, alternating, and print ratios.

  VENV/bin/python bench/compare_diffusers.py --model DIR --image A.png [--image B.png] [--prompt TEXT] [--steps 2] [--cfg 1]
                  [--width W --height H] [--ref-area PIXELS] [--dtype bfloat16] [--threads 2] [--rounds 3]
                  [--program build/qwen-edit]

VENV holds torch, diffusers, transformers (PyPI). Per round: one whole run of the program (process start to exit) and one
warm call of diffusers' pipeline in this process; also how long a fresh Python takes to import diffusers' pipeline class.
Medians, and the ratio of each pair; times of one machine under one load only compare with each other.
"""
import argparse, json, os, statistics, subprocess, sys, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", required=True)
ap.add_argument("--image", action="append", required=True)
ap.add_argument("--prompt", default="Change the main subject's color to purple and keep the overall style consistent.")
ap.add_argument("--steps", type=int, default=2)
ap.add_argument("--cfg", type=float, default=1.0)
ap.add_argument("--width", type=int); ap.add_argument("--height", type=int)
ap.add_argument("--ref-area", type=int)
ap.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--program", default="build/qwen-edit")
a = ap.parse_args()

os.environ["OMP_NUM_THREADS"] = str(a.threads)
import_cost = []
for _ in range(2):
    t = time.perf_counter()
    subprocess.run([sys.executable, "-c", "from diffusers import QwenImageEditPlusPipeline"], check=True, capture_output=True)
    import_cost.append(time.perf_counter() - t)

import torch
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

torch.set_num_threads(a.threads)
torch.set_grad_enabled(False)
if a.ref_area:
    plus.VAE_IMAGE_SIZE = a.ref_area
pipe = QwenImageEditPlusPipeline.from_pretrained(a.model, torch_dtype=getattr(torch, a.dtype))
pipe.set_progress_bar_config(disable=True)
images = [Image.open(i).convert("RGB") for i in a.image]


def theirs():
    t = time.perf_counter()
    pipe(image=images, prompt=a.prompt, negative_prompt=" " if a.cfg > 1 else None, num_inference_steps=a.steps,
         true_cfg_scale=a.cfg, generator=torch.Generator("cpu").manual_seed(0), width=a.width, height=a.height)
    return time.perf_counter() - t


def ours():
    cmd = [a.program, "edit", "--json", "--model", a.model, "-p", a.prompt, "-s", str(a.steps), "-S", "0", "--true-cfg-scale", str(a.cfg),
           "--threads", str(a.threads), "--precision", "bf16" if a.dtype == "bfloat16" else "f32", "-o", "/tmp/compare_diffusers.png",
           "--no-keep-size"]
    for i in a.image:
        cmd += ["-i", i]
    for flag, v in (("-W", a.width), ("-H", a.height), ("--ref-area", a.ref_area)):
        if v:
            cmd += [flag, str(v)]
    t = time.perf_counter()
    out = subprocess.run(cmd, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - t
    timings = json.loads(out.stdout.strip().splitlines()[-1]).get("timings", {})
    return wall, timings


first = theirs()
ours()
rows = []
for _ in range(a.rounds):
    wall, timings = ours()
    rows.append((wall, timings.get("total_s", float("nan")), theirs(), timings))
print(f"model {a.model}, {a.dtype}, {a.threads} threads, {a.steps} steps, cfg {a.cfg}, {a.rounds} rounds")
med = lambda k: statistics.median(r[k] for r in rows)
print(f"python: import of the pipeline      {statistics.median(import_cost):8.3f} s")
print(f"diffusers: first call               {first:8.3f} s")
print(f"diffusers: warm call, median        {med(2):8.3f} s")
print(f"qwen-edit: process start to exit    {med(0):8.3f} s")
print(f"qwen-edit: the edit inside          {med(1):8.3f} s   {rows[-1][3]}")
print(f"import / our whole run              {statistics.median(import_cost) / med(0):8.2f} x")
print(f"diffusers warm / our edit, by pairs {statistics.median(r[2] / r[1] for r in rows):8.2f} x")
print(f"diffusers warm / our whole run      {statistics.median(r[2] / r[0] for r in rows):8.2f} x")
