#!/usr/bin/env python3
"""Time qwen-edit beside diffusers on the same model, pictures, steps and threads, alternating, and print ratios.

  VENV/bin/python bench/compare_diffusers.py --model DIR --image A.png [--image B.png] [--prompt TEXT] [--steps 2] [--cfg 1]
                  [--width W --height H] [--ref-area PIXELS] [--dtype bfloat16] [--precision bf16|int8|f32] [--threads 2] [--rounds 3]
                  [--program build/qwen-edit] [--stages text,vae_encode,forward,vae_decode] [--json FILE]

With --stages the stages of one edit instead of the whole: diffusers' own calls (encode_prompt, vae.encode, transformer,
vae.decode) beside `qwen-edit bench` at the same sizes, first and next call, one after the other in every round. The
pictures may then be left out: they are made up. Of a model with fewer layers than the released one the whole edit at
the released depth is also given, from the time of one more layer on either side. Ours "next" repeats all of a stage's work
in one process; of the text stage there is beside it what later edits of one process need: text_next (other pictures and
prompts came before: the template is known) and text_again (these pictures came before, with another prompt). Beside
the times the largest anonymous memory (RssAnon) of either process is given, sampled while it ran.

VENV holds torch, diffusers, transformers (PyPI). Per round: one whole run of the program (process start to exit) and one
warm call of diffusers' pipeline in this process; also how long a fresh Python takes to import diffusers' pipeline class.
Medians, and the ratio of each pair; times of one machine under one load only compare with each other.
"""
import argparse, json, os, statistics, subprocess, sys, threading, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", required=True)
ap.add_argument("--image", action="append", default=[])
ap.add_argument("--prompt", default="Change the main subject's color to purple and keep the overall style consistent.")
ap.add_argument("--steps", type=int, default=2)
ap.add_argument("--cfg", type=float, default=1.0)
ap.add_argument("--width", type=int); ap.add_argument("--height", type=int)
ap.add_argument("--ref-area", type=int)
ap.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
ap.add_argument("--precision", choices=("bf16", "int8", "f32"), help="of qwen-edit; as --dtype if not given")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--program", default="build/qwen-edit")
ap.add_argument("--stages", help="comma-separated: text, vae_encode, forward, vae_decode")
ap.add_argument("--references", type=int, default=1, help="pictures to make up for --stages")
ap.add_argument("--json", help="also write the numbers of --stages to this file")
a = ap.parse_args()
a.precision = a.precision or ("bf16" if a.dtype == "bfloat16" else "f32")
if not a.image and not a.stages:
    ap.error("--image is needed")

os.environ["OMP_NUM_THREADS"] = str(a.threads)
import_cost = []
for _ in range(0 if a.stages else 2):
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


class AnonymousPeak(threading.Thread):
    """Largest RssAnon of a process while in a with statement, in MiB."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.mib, self.done = pid, 0.0, threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            try:
                with open(f"/proc/{self.pid}/status", encoding="ascii") as f:
                    kib = next((int(line.split()[1]) for line in f if line.startswith("RssAnon:")), 0)
            except OSError:
                return
            self.mib = max(self.mib, kib / 1024)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


anonymous = {"diffusers": 0.0, "ours": 0.0}


def run_theirs(function):
    with AnonymousPeak(os.getpid()) as peak:
        t = time.perf_counter()
        function()
        end = time.perf_counter()
    anonymous["diffusers"] = max(anonymous["diffusers"], peak.mib)
    return t, end


def run_ours(cmd):
    """Standard output of the program."""
    with subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as p:
        with AnonymousPeak(p.pid) as peak:
            out = p.communicate()[0]
    if p.returncode:
        sys.exit(f"{cmd[0]} failed: {p.returncode}")
    anonymous["ours"] = max(anonymous["ours"], peak.mib)
    return out


def print_anonymous():
    print(f"largest anonymous memory: diffusers {anonymous['diffusers']:.0f} MiB, ours {anonymous['ours']:.0f} MiB")


# ---------------------------------------------------------------- stage by stage

RELEASED = {"blocks": 60, "language": 28, "vision": 32}


class Layers:
    """Seconds from the start of each layer of a list to the start of the next: what one more would cost."""

    def __init__(self, layers):
        self.n, self.at = len(layers), []
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.at.append(time.perf_counter()))

    def one_more(self, end):
        at, self.at = self.at[-self.n:], []
        if len(at) < self.n:
            return 0.0
        return (at[-1] - at[0]) / (self.n - 1) if self.n > 1 else end - at[0]


def their_stages(width, height, ref_area):
    """name -> (function that runs the stage once, {layers: hooks})."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
    dtype = getattr(torch, a.dtype)
    g = torch.Generator("cpu").manual_seed(0)
    pictures = [Image.open(i).convert("RGB") for i in a.image] or [
        Image.fromarray((torch.rand(height, width, 3, generator=g) * 255).byte().numpy()) for _ in range(a.references)]
    cond = [pipe.image_processor.resize(p, *reversed(calculate_dimensions(384 * 384, p.width / p.height))) for p in pictures]
    sizes = [calculate_dimensions(ref_area, p.width / p.height) for p in pictures]
    pixels = [pipe.image_processor.preprocess(p, h, w).unsqueeze(2).to(dtype) for p, (w, h) in zip(pictures, sizes)]
    rows = lambda w, h: (h // 16) * (w // 16)
    shapes = [[(1, height // 16, width // 16)] + [(1, h // 16, w // 16) for w, h in sizes]]
    n_rows = rows(width, height) + sum(rows(w, h) for w, h in sizes)
    config = pipe.transformer.config
    embeds, mask = pipe.encode_prompt(image=cond, prompt=a.prompt, device="cpu")
    text = embeds.shape[1]
    hidden = torch.randn(1, n_rows, config.in_channels, generator=g).to(dtype)
    latents = torch.randn(1, pipe.vae.config.z_dim, 1, height // 8, width // 8, generator=g).to(dtype)
    print(f"result {width}x{height}, references {sizes}; {n_rows} image rows, {text} text rows")

    def forward():
        pipe.transformer(hidden_states=hidden, timestep=torch.tensor([0.7], dtype=dtype), encoder_hidden_states=embeds,
                         encoder_hidden_states_mask=mask, img_shapes=shapes, guidance=None, return_dict=False)

    model = pipe.text_encoder.model
    return {
        "text": (lambda: pipe.encode_prompt(image=cond, prompt=a.prompt, device="cpu"),
                 {"vision": Layers(model.visual.blocks), "language": Layers(model.language_model.layers)}),
        "vae_encode": (lambda: [pipe.vae.encode(p).latent_dist.mode() for p in pixels], {}),
        "forward": (forward, {"blocks": Layers(pipe.transformer.transformer_blocks)}),
        "vae_decode": (lambda: pipe.vae.decode(latents, return_dict=False), {}),
    }


def our_stage(stage, width, height, ref_area):
    cmd = [a.program, "bench", "--json", "--model", a.model, "-p", a.prompt, "-s", str(a.steps), "--true-cfg-scale", "1",
           "--threads", str(a.threads), "--precision", a.precision, "-W", str(width),
           "-H", str(height), "--ref-area", str(ref_area), "--repeats", "1", "--no-ops", "--only",
           "text,text_next,text_again" if stage == "text" else stage]
    for i in a.image:
        cmd += ["-i", i]
    if not a.image:
        cmd += ["--references", str(a.references)]
    return json.loads(run_ours(cmd).strip().splitlines()[-1])["stages"]


def compare_stages():
    width, height = a.width or 512, a.height or 512
    ref_area = a.ref_area or width * height
    stages = a.stages.split(",")
    theirs = their_stages(width, height, ref_area)
    med = statistics.median
    table, numbers = [], {}
    for stage in stages:
        run, layers = theirs[stage]
        pairs = []  # (their seconds, their time of one more layer by name, our stages)
        for _ in range(a.rounds):
            t, end = run_theirs(run)
            more = {k: l.one_more(end) for k, l in layers.items()}
            pairs.append((end - t, more, our_stage(stage, width, height, ref_area)))
        next_ = pairs[1:] or pairs
        for i, name in enumerate(o["stage"] for o in pairs[0][2]):
            deep = [med(p[0] for p in next_), med(p[2][i]["fastest_s"] for p in next_)]
            for k in layers:
                ours = [{l["name"]: l for l in p[2][i]["layers"]} for p in next_]
                deep[0] += max(0, RELEASED[k] - layers[k].n) * med(p[1][k] for p in next_)
                if k in ours[0]:
                    deep[1] += max(0, RELEASED[k] - layers[k].n) * med(o[k]["layer_s"] for o in ours)
            n = {"diffusers_first_s": pairs[0][0], "diffusers_next_s": med(p[0] for p in next_), "ours_first_s": pairs[0][2][i]["first_s"],
                 "ours_next_s": med(p[2][i]["fastest_s"] for p in next_), "ratio": med(p[0] / p[2][i]["fastest_s"] for p in next_),
                 "diffusers_released_s": deep[0], "ours_released_s": deep[1]}
            numbers[name] = n
            print(f"{name:<11} diffusers first {n['diffusers_first_s']:8.2f} next {n['diffusers_next_s']:8.2f} s | ours first "
                  f"{n['ours_first_s']:8.2f} next {n['ours_next_s']:8.2f} s | {n['ratio']:6.2f} x | at the released depth "
                  f"{deep[0]:9.1f} and {deep[1]:8.1f} s: {deep[0] / deep[1]:6.2f} x", flush=True)
    if {"text", "vae_encode", "forward", "vae_decode"} <= set(stages):
        edit = [sum(numbers[s][k] * (a.steps if s == "forward" else 1) for s in stages)
                for k in ("diffusers_released_s", "ours_released_s")]
        numbers["edit"] = {"steps": a.steps, "diffusers_released_s": edit[0], "ours_released_s": edit[1]}
        print(f"an edit of {a.steps} steps at the released depth, from the stages (ours without the modulation, which diffusers "
              f"computes in each forward): {edit[0]:.1f} and {edit[1]:.1f} s: {edit[0] / edit[1]:.2f} x")
    print_anonymous()
    numbers["anonymous_mib"] = anonymous
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump(numbers, f, indent=1)


if a.stages:
    print(f"model {a.model}, {a.dtype} and our {a.precision}, {a.threads} threads, {a.rounds} rounds; torch {torch.__version__}")
    compare_stages()
    sys.exit(0)

images = [Image.open(i).convert("RGB") for i in a.image]


def theirs():
    t, end = run_theirs(lambda: pipe(
        image=images, prompt=a.prompt, negative_prompt=" " if a.cfg > 1 else None, num_inference_steps=a.steps,
        true_cfg_scale=a.cfg, generator=torch.Generator("cpu").manual_seed(0), width=a.width, height=a.height))
    return end - t


def ours():
    cmd = [a.program, "edit", "--json", "--model", a.model, "-p", a.prompt, "-s", str(a.steps), "-S", "0", "--true-cfg-scale", str(a.cfg),
           "--threads", str(a.threads), "--precision", a.precision, "-o", "/tmp/compare_diffusers.png",
           "--no-keep-size"]
    for i in a.image:
        cmd += ["-i", i]
    for flag, v in (("-W", a.width), ("-H", a.height), ("--ref-area", a.ref_area)):
        if v:
            cmd += [flag, str(v)]
    t = time.perf_counter()
    out = run_ours(cmd)
    wall = time.perf_counter() - t
    timings = json.loads(out.strip().splitlines()[-1]).get("timings", {})
    return wall, timings


first = theirs()
ours()
rows = []
for _ in range(a.rounds):
    wall, timings = ours()
    rows.append((wall, timings.get("total_s", float("nan")), theirs(), timings))
print(f"model {a.model}, {a.dtype} and our {a.precision}, {a.threads} threads, {a.steps} steps, cfg {a.cfg}, {a.rounds} rounds")
med = lambda k: statistics.median(r[k] for r in rows)
print(f"python: import of the pipeline      {statistics.median(import_cost):8.3f} s")
print(f"diffusers: first call               {first:8.3f} s")
print(f"diffusers: warm call, median        {med(2):8.3f} s")
print(f"qwen-edit: process start to exit    {med(0):8.3f} s")
print(f"qwen-edit: the edit inside          {med(1):8.3f} s   {rows[-1][3]}")
print(f"import / our whole run              {statistics.median(import_cost) / med(0):8.2f} x")
print(f"diffusers warm / our edit, by pairs {statistics.median(r[2] / r[1] for r in rows):8.2f} x")
print(f"diffusers warm / our whole run      {statistics.median(r[2] / r[0] for r in rows):8.2f} x")
print_anonymous()
