#!/usr/bin/env python3
"""A LoRA on quantised weights and in 8-bit arithmetic: as near to the full base with it as without it.

    test_lora_base.py PROGRAM
The demo's first velocity, dumped: normalised error of each base against f32 on the released weights, without a LoRA and
with one. Also what `info` says of the file.
"""
import array
import json
import os
import struct
import subprocess
import sys
import tempfile

import lora_files

PROGRAM = os.path.abspath(sys.argv[1])
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# With a LoRA the numbers are others, and so is their rounding: twice the base's own error is the same error.
SAME = 2.0


def run(*args, **env):
    done = subprocess.run([PROGRAM, *args], capture_output=True, text=True, timeout=120, env={
        **{k: v for k, v in os.environ.items() if not k.startswith(("QWEN_EDIT_", "QIE_D"))}, **env})
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout


def velocity(folder, model, precision, *more):
    dump = os.path.join(folder, "dump.safetensors")
    run("edit", "--model", model, "--precision", precision, "--threads", "2", "-i", os.path.join(ROOT, "demo/samples/ball.png"), "-p",
        "turn the subject purple", "-o", os.path.join(folder, "out.png"), "-S", "5", "-s", "1", *more,
        QIE_DUMP=dump, QIE_DUMP_NAMES="dit.0.cond")
    with open(dump, "rb") as f:
        data = f.read()
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])["dit.0.cond"]
    assert header["dtype"] == "F32"
    begin, end = header["data_offsets"]
    values = array.array("f")
    values.frombytes(data[8 + n + begin:8 + n + end])
    return values


def error(got, want):
    assert len(got) == len(want)
    return sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want)


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lora = os.path.join(folder, "one.safetensors")
        lora_files.lora(lora, 1, size=0.15)
        q8 = os.path.join(folder, "q8")
        run("quantize", os.path.join(ROOT, "demo/model"), q8, "--to", "q8_0")
        plain, styled = velocity(folder, "demo", "f32"), velocity(folder, "demo", "f32", "--lora", lora)
        effect = error(styled, plain)
        print(f"effect of the LoRA: {effect:.3g}")
        failed += not effect > 0.01
        for name, model, precision in (("Q8_0 GGUF", q8, "f32"), ("int8", "demo", "int8"), ("Q8_0 GGUF in int8", q8, "int8")):
            own = error(velocity(folder, model, precision), plain)
            both = error(velocity(folder, model, precision, "--lora", lora), styled)
            ok = 0 < own < 0.1 * effect and both <= SAME * own
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {own:.3g} without, {both:.3g} with the LoRA")
            failed += not ok
        said = run("info", lora)
        told = json.loads(run("info", lora, "--json"))
        ok = told["kind"] == "lora" and told["n_modules"] == 18 and {m["rank"] for m in told["modules"]} == {4} and all(
            m["name"] in said for m in told["modules"])
        print("ok   info" if ok else f"FAIL info: {said[:500]} {told}")
        failed += not ok
        picture = os.path.join(folder, "out.png")
        run("edit", "--model", "demo", "--threads", "2", "-i", os.path.join(ROOT, "demo/samples/ball.png"), "-p", "make it red", "-o", picture,
            "-s", "9", "--lora", lora + ":0.5", "--cache", "fast")
        said = run("info", picture)
        ok = "one" in said and "0.5" in said and "cache: fast" in said
        print("ok   info of a picture" if ok else f"FAIL info of a picture: {said}")
        failed += not ok
    print(f"test_lora_base: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
