"""LoRA files in every naming that the program reads, and what diffusers makes of them.

  python make_lora_goldens.py MODEL_DIR IMAGE OUT_DIR

MODEL_DIR is the tiny model of tests/golden/model. OUT_DIR gets the LoRA files, request.json and
expected.safetensors: for each case in CASES the velocity of the first step (CASE/dit.0.cond), of the last one's
unconditional pass (CASE/dit.1.uncond) and the final latents (CASE/latents.1), float32, from
`load_lora_weights` + `set_adapters` of diffusers (text: from hooks on the text encoder's layers, with its
prompt_embeds). schedule.json has sigmas and timesteps of FlowMatchEulerDiscreteScheduler with Lightning's config. Seeds are fixed: the same command gives the same values.
Needs: torch torchvision diffusers transformers peft safetensors (PyPI).
"""
import json, math, pathlib, sys
import numpy as np
import torch
import make_goldens
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift, retrieve_timesteps
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLImageProcessorPil

REQUEST = dict(prompt="make the ball blue", negative_prompt=" ", steps=2, true_cfg_scale=4.0, seed=11, width=96,
               height=64, ref_area=9216, images=["../edit/one-image-cfg/input0.png"])
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
             "attn.add_v_proj", "attn.to_add_out"]
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
OUTER = ["img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1",
         "time_text_embed.timestep_embedder.linear_2"]


def pairs(transformer, names, rank, generator, dtype):
    """(module, down, up) with random values; rank: a function of the running number."""
    modules = dict(transformer.named_modules())
    for i, name in enumerate(names):
        m, r = modules[name], rank(i)
        down = torch.randn(r, m.in_features, generator=generator) / m.in_features ** 0.5
        up = torch.randn(m.out_features, r, generator=generator) * 0.3
        yield name, down.to(dtype), up.to(dtype)


def in_blocks(transformer, names):
    return [f"transformer_blocks.{b}.{n}" for b in range(len(transformer.transformer_blocks)) for n in names]


def write_peft(pipe, path, seed):
    """By PEFT and diffusers themselves: alpha and ranks are in the metadata."""
    t = pipe.transformer
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[n.split(".", 2)[-1] if n.startswith("transformer_blocks") else n
                                                           for n in in_blocks(t, ATTENTION + MLP)[:12]] + ["img_mod.1"],
                        rank_pattern={"attn.to_k": 2}, alpha_pattern={"attn.to_k": 3, "transformer_blocks.1.img_mlp.net.2": 1},
                        init_lora_weights=False)
    torch.manual_seed(seed)
    t.add_adapter(config, "made")
    QwenImageEditPlusPipeline.save_lora_weights(
        path.parent, transformer_lora_layers=get_peft_model_state_dict(t, adapter_name="made"), weight_name=path.name,
        transformer_lora_adapter_metadata=config.to_dict())
    t.delete_adapters("made")


def write_kohya(pipe, path, seed):
    g, out = torch.Generator().manual_seed(seed), {}
    names = in_blocks(pipe.transformer, ATTENTION + MLP + ["img_mod.1", "txt_mod.1"]) + OUTER
    for i, (name, down, up) in enumerate(pairs(pipe.transformer, names, lambda i: 1 + i % 5, g, torch.bfloat16)):
        key = "lora_unet_" + name.replace(".", "_")
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0 + i % 3)}
    save_file(out, path, {"ss_network_module": "networks.lora_qwen_image"})


def write_comfy(pipe, path, seed):
    g, out = torch.Generator().manual_seed(seed), {}
    for name, down, up in pairs(pipe.transformer, in_blocks(pipe.transformer, ATTENTION + MLP), lambda i: 3, g, torch.float16):
        out |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(out, path, {"format": "pt"})


def write_plain(pipe, path, seed):
    """As lightx2v's: module names without prefix, alpha beside them."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, down, up in pairs(pipe.transformer, in_blocks(pipe.transformer, ATTENTION + MLP), lambda i: 8, g, torch.bfloat16):
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(out, path)


def write_adapter_name(pipe, path, seed):
    """As DiffSynth-Studio's: plain names, the adapter's name inside."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, down, up in pairs(pipe.transformer, in_blocks(pipe.transformer, ATTENTION), lambda i: 2, g, torch.float32):
        out |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    save_file(out, path)


def write_text(pipe, path, seed):
    """For the text encoder, both towers; diffusers has no reader for it, so main() injects it with PEFT."""
    g, out = torch.Generator().manual_seed(seed), {}
    wanted = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv", "merger.mlp.0")
    names = [n for n, m in pipe.text_encoder.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(wanted)]
    for name, down, up in pairs(pipe.text_encoder, names, lambda i: 2 + i % 2, g, torch.float32):
        out |= {f"text_encoder.{name}.lora_A.weight": down, f"text_encoder.{name}.lora_B.weight": up}
    save_file(out, path)


def inject_text(pipe, path):
    tensors = load_file(path)
    modules = dict(pipe.text_encoder.named_modules())
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("text_encoder.").removesuffix(".lora_A.weight")
        modules[name].register_forward_hook(lambda m, i, o, down=down, up=up: o + (i[0] @ down.T) @ up.T)


def write_schedule(path):
    """Lightning's: base_shift = max_shift = ln 3, no terminal shift."""
    rows, shift = [], math.log(3)
    sch = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=shift,
                                          max_shift=shift, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=None,
                                          time_shift_type="exponential")
    for steps in (1, 2, 3, 4, 6, 8, 16, 40):
        for seq in (24, 4096, 9216):
            mu = calculate_shift(seq, 256, 8192, shift, shift)
            ts, _ = retrieve_timesteps(sch, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            rows.append(dict(steps=steps, seq_len=seq, sigmas=sch.sigmas.tolist(), timesteps=ts.tolist()))
    path.write_text(json.dumps(rows))


FILES = dict(peft=write_peft, kohya=write_kohya, comfy=write_comfy, plain=write_plain, named=write_adapter_name,
             text=write_text)
CASES = {"none": {}, "peft": {"peft": 1.0}, "kohya": {"kohya": 1.0}, "comfy": {"comfy": 1.0}, "plain": {"plain": 1.0},
         "named": {"named": 1.0}, "two": {"peft": 0.7, "kohya": -0.4}, "text": {"text": 1.0}}


def load(model):
    pipe = QwenImageEditPlusPipeline.from_pretrained(model, torch_dtype=torch.float32)
    ip = pipe.processor.image_processor
    pipe.processor.image_processor = Qwen2VLImageProcessorPil(
        min_pixels=ip.size["shortest_edge"], max_pixels=ip.size["longest_edge"], patch_size=ip.patch_size, merge_size=ip.merge_size,
        temporal_patch_size=ip.temporal_patch_size, image_mean=ip.image_mean, image_std=ip.image_std)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(model, image, out):
    torch.set_grad_enabled(False)
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, write) in enumerate(FILES.items()):
        write(load(model), out / f"{name}.safetensors", 100 + i)
    expected = {}
    for case, use in CASES.items():
        pipe = load(model)
        for name in use:
            if name == "text":
                inject_text(pipe, out / "text.safetensors")
                use = {}
                continue
            pipe.load_lora_weights(out, weight_name=f"{name}.safetensors", adapter_name=name)
        if use:
            pipe.set_adapters(list(use), list(use.values()))
        req = dict(image=[Image.open(image).convert("RGB")], prompt=REQUEST["prompt"], negative_prompt=REQUEST["negative_prompt"],
                   num_inference_steps=REQUEST["steps"], true_cfg_scale=REQUEST["true_cfg_scale"],
                   generator=torch.Generator("cpu").manual_seed(REQUEST["seed"]), width=REQUEST["width"], height=REQUEST["height"])
        seen, _ = make_goldens.record(pipe, req, REQUEST["ref_area"], "3d")
        if case == "text":
            expected["text/prompt_embeds"] = seen["prompt_embeds"]
        for stage in ("dit.0.cond", "dit.1.uncond", "latents.1"):
            expected[f"{case}/{stage}"] = seen[stage]
        base = expected["none/latents.1"]
        print(case, "NMSE to no LoRA", ((seen["latents.1"] - base) ** 2).sum().item() / (base ** 2).sum().item())
    write_schedule(out / "schedule.json")
    save_file(expected, out / "expected.safetensors")
    (out / "request.json").write_text(json.dumps(REQUEST | {"cases": CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:4]))
