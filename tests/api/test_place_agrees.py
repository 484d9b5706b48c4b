#!/usr/bin/env python3
"""doctor, edit --dry-run and the GPU back end place the released model alike, with the same numbers, in recorded
situations: driver and runtime are replayed (fakenvml.c; tests/cuda), the weights are files of zeros that take no room.

    test_place_agrees.py PROGRAM TESTS_FOLDER SPARSE_MODEL
"""
import json
import os
import re
import subprocess
import sys
import tempfile

PROGRAM, TESTS, SPARSE = (os.path.abspath(p) for p in sys.argv[1:4])
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GIB = 1 << 30
# free GiB of each card, head-room, how it has to be placed
SITUATIONS = [
    ([79.2], 6, "resident"),
    ([79.2, 79.0], 6, "parallel"),
    ([78.5, 70.1, 70.0, 78.0], 6, "parallel"),
    ([47.4, 47.2, 9.0], 6, "sharded"),
    ([23.6, 23.2, 19.0, 12.5], 2, "sharded"),  # unequal, and not everything is held
    ([40.0, 23.6, 23.4], 6, "sharded"),
    ([23.6], 2, "streamed"),
    ([23.6], 6, "streamed"),
    ([11.4], 4, "streamed"),
    ([23.6, 9.0], 6, "streamed"),  # the second has no room
    ([9.0, 3.0], 6, None),
]


def situation(folder, cards):
    path = os.path.join(folder, "nvml.txt")
    with open(path, "w") as f:
        for i, free in enumerate(cards):
            f.write("gpu Double %d|GPU-%08x-0000-0000-0000-000000000000|%d|%d|%d|8|0|0|0\n" %
                    (i, i, 80 * GIB, int(free * GIB), int((80 - free) * GIB)))
    # the runtime sees what its own context has left
    mib = ":".join(str(int((free - 0.5) * 1024)) for free in cards)
    return {"QIE_NVML": os.path.join(TESTS, "fakenvml.so"), "FAKE_NVML": path, "HF_HUB_OFFLINE": "1",
            "QIE_CUDA_PLUGIN": os.path.join(TESTS, "qie_cuda_double.so"),
            "QIE_CUDA_DOUBLE": "devices=%d,memory=%s" % (len(cards), mib)}


def run(args, env):
    e = dict(os.environ, **env)
    for name in ("CUDA_VISIBLE_DEVICES", "QWEN_EDIT_GPU_HEADROOM_GIB", "QWEN_EDIT_2511_DIR"):
        e.pop(name, None)
    return subprocess.run([PROGRAM, *args], env=e, capture_output=True, text=True, timeout=120)


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


def words(line):
    return re.sub(r"\d+\.\d+", "#", line)


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model, picture = os.path.join(folder, "model"), os.path.join(folder, "in.png")
        subprocess.run([sys.executable, os.path.join(ROOT, "bench", "released_model.py"), model, SPARSE], check=True)
        # doctor counts with one megapixel from one reference
        subprocess.run([PROGRAM, "edit", "--model", "demo", "--device", "cpu", "-i",
                        os.path.join(ROOT, "demo", "samples", "mug.png"), "-p", "x", "-o", picture, "-s", "1"], check=True,
                       capture_output=True)
        for cards, headroom, want in SITUATIONS:
            env = situation(folder, cards)
            common = ["--model", model, "--headroom-gib", str(headroom)]
            told = json.loads(run(["doctor", "--json", *common], env).stdout)["placement"]
            r = run(["edit", "--dry-run", "--json", "--device", "cuda", "-W", "1024", "-H", "1024", "-i", picture, "-p",
                     "turn the subject purple and keep everything else as it is", "-o", os.path.join(folder, "o.png"),
                     *common], env)
            plan = json.loads(r.stdout.splitlines()[-1]).get("placement") if r.returncode == 0 else None
            assigned = told.get("assigned")
            ok = told["best"] == (want or "none")
            if want:
                ok = ok and plan and assigned and words(plan) == words(assigned) and plan.startswith(want) and all(
                    abs(a - b) < 0.15 for a, b in zip(numbers(plan), numbers(assigned)))
            else:
                ok = ok and r.returncode in (2, 5)
            failed += not ok
            print("ok  " if ok else "FAIL", cards, headroom, want)
            if not ok or "-v" in sys.argv:
                print("     doctor:", told["best"], assigned, "\n     plan:  ", plan, "\n     ", r.stderr[-600:])
    print("test_place_agrees.py: %d failed" % failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
