#!/usr/bin/env python3
"""A model folder of the released shapes without its weights: configs and a small tokenizer, and weight files of zeros
that take no room on the disk (bench/sparse_model.c). For measurements and for placement.

    released_model.py FOLDER SPARSE_MODEL [--blocks 60] [--layers 28]
"""
import argparse
import json
import os
import shutil
import subprocess

SMALL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "golden", "model")
TRANSFORMER = dict(attention_head_dim=128, axes_dims_rope=[16, 56, 56], joint_attention_dim=3584, num_attention_heads=24)
LANGUAGE = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)
VISION = dict(depth=32, fullatt_block_indexes=[7, 15, 23, 31], hidden_size=1280, intermediate_size=3420, num_heads=16,
              out_hidden_size=3584, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112)


def change(path, edit):
    with open(path) as f:
        config = json.load(f)
    edit(config)
    with open(path, "w") as f:
        json.dump(config, f, indent=1)


def make(folder, blocks=60, layers=28):
    def language(c):
        for part in (c, c.get("text_config", {})):
            part.update(LANGUAGE, num_hidden_layers=layers)
            part["rope_scaling"]["mrope_section"] = [16, 24, 24]
        c["vision_config"].update(VISION)
    shutil.copytree(SMALL, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    change(os.path.join(folder, "transformer", "config.json"), lambda c: c.update(TRANSFORMER, num_layers=blocks))
    change(os.path.join(folder, "vae", "config.json"), lambda c: c.update(base_dim=96))
    change(os.path.join(folder, "text_encoder", "config.json"), language)
    processor = os.path.join(folder, "processor", "preprocessor_config.json")
    if os.path.exists(processor):
        change(processor, lambda c: c.update(patch_size=14, merge_size=2, temporal_patch_size=2))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("folder")
    p.add_argument("sparse_model")
    p.add_argument("--blocks", type=int, default=60)
    p.add_argument("--layers", type=int, default=28)
    a = p.parse_args()
    make(a.folder, a.blocks, a.layers)
    subprocess.run([a.sparse_model, a.folder], check=True)


if __name__ == "__main__":
    main()
