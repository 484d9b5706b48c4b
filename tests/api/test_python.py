#!/usr/bin/env python3
"""python/qwen_edit over libqie: test_python.py PROGRAM LIBQIE INCLUDE_FOLDER"""
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from service import ROOT

PROGRAM, LIBRARY, INCLUDE = map(os.path.abspath, sys.argv[1:4])
os.environ["QWEN_EDIT_LIBRARY"] = LIBRARY
sys.path.insert(0, os.path.join(ROOT, "python"))
import qwen_edit  # noqa: E402
from qwen_edit import EditError, Engine, Image, _native  # noqa: E402

BALL, PURPLE = os.path.join(ROOT, "demo", "samples", "ball.png"), "turn the subject purple"


def refused(call, kind, param=None, says=""):
    try:
        call()
    except EditError as e:
        assert e.type == kind and e.param == param and says in str(e), (e.type, e.param, str(e))
        return
    raise AssertionError("not refused")


def case_layout(folder):
    """Every structure has the size, and every field the offset and size, that the C compiler gives it."""
    lines, mine = [], []
    for s in _native.STRUCTURES:
        lines.append('printf("%s %%zu\\n", sizeof(%s));' % (s.C_NAME, s.C_NAME))
        mine.append("%s %d" % (s.C_NAME, ctypes.sizeof(s)))
        for name, _ in s._fields_:
            field = "%s.%s" % (s.C_NAME, name)
            lines.append('printf("%s %%zu %%zu\\n", offsetof(%s, %s), sizeof(((%s *)0)->%s));'
                         % (field, s.C_NAME, name, s.C_NAME, name))
            mine.append("%s %d %d" % (field, getattr(s, name).offset, getattr(s, name).size))
    for name, value in (("QIE_MAX_LORAS", _native.MAX_LORAS), ("QIE_MAX_IMAGES", _native.MAX_IMAGES),
                        ("QIE_MAX_WARNINGS", _native.MAX_WARNINGS), ("QIE_CACHE_COUNT", len(_native.CACHES)),
                        ("QIE_PRECISION_INT8", len(_native.PRECISIONS) - 1), ("QIE_SCHEDULE_LIGHTNING", len(_native.SCHEDULES) - 1),
                        ("QIE_IMAGE_WEBP", _native.WEBP)):
        lines.append('printf("%s %%d\\n", (int)%s);' % (name, name))
        mine.append("%s %d" % (name, value))
    source = os.path.join(folder, "layout.c")
    with open(source, "w") as f:
        f.write('#include <qie/edit.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n%s\nreturn 0;\n}\n'
                % "\n".join(lines))
    subprocess.run([os.environ.get("CC", "cc"), "-I", INCLUDE, source, "-o", source[:-2]], check=True)
    theirs = subprocess.run([source[:-2]], check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[:-1]
    assert mine == theirs, [pair for pair in zip(mine, theirs) if pair[0] != pair[1]]


def case_same_picture_as_the_program(folder):
    ours, cli = os.path.join(folder, "ours.png"), os.path.join(folder, "cli.png")
    subprocess.run([PROGRAM, "edit", "--quiet", "--model", "demo", "-i", BALL, "-p", PURPLE, "-S", "7", "-o", cli], check=True,
                   stdout=subprocess.DEVNULL)
    seen = []
    with Engine("demo") as engine:
        result = engine.edit([BALL], PURPLE, lambda *p: seen.append(p), seed=7)
        assert result.save(ours) == [ours] and result.seed == 7 and result.warnings == []
        with open(BALL, "rb") as f:
            assert engine.edit(f.read(), PURPLE, seed=7).images[0].tobytes() == result.images[0].tobytes()
        upright = Image.open(BALL)
        again = Image.from_rgb(*upright.size, upright.tobytes())
        assert engine.edit(again, PURPLE, seed=7).images[0].tobytes() == result.images[0].tobytes()
    assert Image.open(ours).tobytes() == Image.open(cli).tobytes(), "another picture than the program's"
    steps = [p[1] for p in seen if p[0] == "denoise"]
    assert steps[-1] == 4 and steps == sorted(steps) and seen[-1][0] == "decode", seen
    about = [subprocess.run([PROGRAM, "info", "--json", p], check=True, stdout=subprocess.PIPE).stdout for p in (ours, cli)]
    about = [json.loads(a.decode().replace(p, "")) for a, p in zip(about, (ours, cli))]
    assert about[0] == about[1], about


def case_plan_and_info(folder):
    with Engine("demo", n_threads=1, precision="f32") as engine:
        assert engine.info["is_demo"] and engine.info["precision"] == "f32" and engine.info["n_threads"] == 1
        plan = engine.plan([BALL, BALL], PURPLE, width=100, height=64, keep_size=False)
        assert (plan["width"], plan["height"]) == (96, 64) and len(plan["images"]) == 2, plan
        assert plan["warnings"] and "96x64" in plan["warnings"][0], plan["warnings"]
        assert engine.plan(BALL, PURPLE, probe=True)["seconds_estimate"] > 0
        result = engine.edit(BALL, PURPLE, num_images=2, num_inference_steps=1)
        paths = result.save(os.path.join(folder, "two.jpg"), quality=80)
        assert [os.path.basename(p) for p in paths] == ["two-1.jpg", "two-2.jpg"]
        assert all(Image.open(p).size == (256, 256) for p in paths)
        assert [p["i_image"] for p in result.parameters] == [0, 1] and result.images[0].tobytes() != result.images[1].tobytes()
        assert engine.edit(BALL, PURPLE, num_inference_steps=1).seed != result.seed, "a random seed"
    kept = result.images[0].tobytes()
    del engine
    gc.collect()
    assert result.images[0].tobytes() == kept, "pictures outlive the engine"


def case_refusals(folder):
    refused(lambda: Engine(os.path.join(folder, "nothing")), "NOT_FOUND", "model", "nothing")
    refused(lambda: Engine("demo", speed=3), "INVALID", "speed")
    refused(lambda: Engine("demo", n_threads="two"), "INVALID", "n_threads")
    refused(lambda: Engine("demo", precision="f33"), "INVALID", "precision")
    refused(lambda: Image.open(b"no picture"), "UNSUPPORTED", "image")
    refused(lambda: Image.from_rgb(4, 4, b"123"), "INVALID", "pixels")
    engine = Engine()
    try:
        refused(lambda: engine.edit([], PURPLE), "INVALID", "image")
        refused(lambda: engine.edit(BALL, ""), "INVALID", "prompt")
        refused(lambda: engine.edit(BALL, "a\0b"), "INVALID")
        refused(lambda: engine.edit(BALL, PURPLE, steps=3), "INVALID", "steps")
        refused(lambda: engine.edit(BALL, PURPLE, num_inference_steps=201), "INVALID", "num_inference_steps")
        refused(lambda: engine.edit(BALL, PURPLE, seed=-1), "INVALID", "seed", "range")
        refused(lambda: engine.edit(BALL, PURPLE, seed=1 << 60), "INVALID", "seed")
        refused(lambda: engine.edit(BALL, PURPLE, cache="best"), "INVALID", "cache")
        refused(lambda: engine.edit(BALL, PURPLE, loras=[os.path.join(folder, "no.safetensors")]), "NOT_FOUND", "lora")
        missing = os.path.join(folder, "no.png")
        refused(lambda: engine.edit(missing, PURPLE), "NOT_FOUND", missing[:63])
        refused(lambda: engine.edit(BALL, PURPLE, num_inference_steps=1).save("out.gif"), "INVALID", "path")
    finally:
        engine.close()
        engine.close()
    refused(lambda: engine.edit(BALL, PURPLE), "CONFLICT")


def case_stop(folder):
    """What progress raises, and Ctrl-C, end the edit soon; the engine goes on afterwards."""
    class Enough(Exception):
        pass

    def enough(stage, step, total, left):
        if stage == "denoise" and step >= 1:
            raise Enough

    with Engine("demo") as engine:
        try:
            engine.edit(BALL, PURPLE, enough, num_inference_steps=100)
            raise AssertionError("the exception is lost")
        except Enough:
            pass
        started = threading.Event()
        threading.Thread(target=lambda: (started.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
        steps = []

        def note(stage, step, total, left):
            steps.append(step if stage == "denoise" else 0)
            started.set()

        try:
            engine.edit(BALL, PURPLE, note, num_inference_steps=200)
            raise AssertionError("Ctrl-C is lost")
        except KeyboardInterrupt:
            pass
        assert max(steps) < 200, "the edit went on to its end"
        assert engine.edit(BALL, PURPLE, num_inference_steps=1).images[0].size == (256, 256)


def case_documented_example(folder):
    with open(os.path.join(ROOT, "docs", "PYTHON.md"), encoding="utf-8") as f:
        code = re.search(r"^```python\n(.*?)^```$", f.read(), re.M | re.S).group(1)
    shutil.copy(BALL, os.path.join(folder, "photo.png"))
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env=dict(os.environ, PYTHONPATH=os.path.join(ROOT, "python")))
    assert Image.open(os.path.join(folder, "out.png")).size == (256, 256)


def main():
    with open(LIBRARY, "rb") as f:
        code = f.read()
    if b"__asan_init" in code or b"__tsan_init" in code:
        print("a library with sanitizers cannot be loaded by this Python")
        return 77
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                case(folder)
            print("%-40s %.1f s" % (name[5:], time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
