#!/usr/bin/env python3
"""What the program says, and does, when a GPU fails or has too little room: provoked on the double of the CUDA runtime.

    test_gpu_faults.py PROGRAM TESTS_FOLDER [CASE ...]
"""
import json
import os
import subprocess
import sys
import tempfile

from gpu_double import cards
from service import ROOT
from servicelib import run_cases

sys.path.insert(0, os.path.join(ROOT, "bench"))
from gpu import psnr  # noqa: E402

PROGRAM, TESTS = (os.path.abspath(p) for p in sys.argv[1:3])
FOLDER = tempfile.TemporaryDirectory()
OUT = os.path.join(FOLDER.name, "out.png")
UNAVAILABLE, NO_MEMORY = 4, 5


def run(*args, double="", frees=(2048,), cc=(8, 0), env=None, out=OUT):
    """A quick edit on these cards."""
    e, _script = cards(TESTS, frees, double, cc)
    return subprocess.run([PROGRAM, "edit", "--model", os.path.join(ROOT, "tests", "golden", "model"), "--precision", "f32", "-i",
                           os.path.join(ROOT, "demo", "samples", "ball.png"), "-p", "purple", "-o", out, "-s", "3", "-S", "1", "-W",
                           "64", "-H", "64", "--ref-area", "4096", "--headroom-gib", "0", "--device", "cuda", *args],
                          capture_output=True, text=True, env=dict(os.environ, **e, **(env or {})), timeout=60)


def edit(double="", *args, **more):
    """Exit status, answer, messages."""
    r = run("--json", *args, double=double, **more)
    lines = r.stdout.splitlines()
    return r.returncode, json.loads(lines[-1]) if lines else None, r.stderr


def fails(status, words, *args, **more):
    code, answer, said = edit(*args, **more)
    message = answer["error"]["message"] if code else ""
    assert code == status and words in message, (status, words, code, answer, said)
    assert not os.path.exists(OUT), "a picture of a failed edit"


def case_driver():
    fails(UNAVAILABLE, "the driver speaks CUDA 12.4, 12.8 is needed: install driver 570 or newer", ",driver=12040")
    fails(UNAVAILABLE, "no NVIDIA driver is loaded", ",driver=0")
    fails(UNAVAILABLE, "cudaErrorInsufficientDriver: provoked: install driver 570 or newer", ",error=35,fail_call=1")
    fails(UNAVAILABLE, "driver library and kernel module differ, reboot", ",error=803,fail_call=1")


def case_architecture():
    fails(UNAVAILABLE, "compute capability 7.5, 8.0 is the least", ",cc=75")
    fails(UNAVAILABLE, "compute capability 7.5", ",cc=75", cc=(7, 5))  # as the driver knows it before
    for when in (1, 60, 600):  # shows with the first launch; later ones are of no other kind
        fails(UNAVAILABLE, "generation that the kernels are not built for", ",error=209,fail_call=%d" % when)


def case_failures_with_their_xid():
    for error, words in ((214, "(ECC error, Xid 48): the card needs a reset"), (226, "(contained ECC error, Xid 94)"),
                         (700, "(Xid 31): a fault of this program or of the card"), (719, "(Xid 13): see dmesg"),
                         (714, "(Xid 13)"), (46, "in use exclusively by another process, or lost")):
        fails(UNAVAILABLE, words, ",error=%d,fail_call=900" % error)
        fails(UNAVAILABLE, "GPU 0 (Double 0): cudaError", ",error=%d,lose_at=400" % error)
        fails(UNAVAILABLE, words, ",error=%d,lose_at=400" % error)


def case_the_lost_card_is_the_one_that_is_named():
    with tempfile.TemporaryDirectory() as d:
        open(os.path.join(d, "card.1"), "w").close()
        fails(UNAVAILABLE, "GPU 1 (Double 1): the device was lost", frees=(2048, 2048),
              env={"QIE_CUDA_DOUBLE_LOST": os.path.join(d, "card")})


def case_a_refused_allocation_falls_back():
    """One placement lower and on, with the same picture; what is said is in the answer, and in words on the terminal."""
    whole, lower = (os.path.join(FOLDER.name, name) for name in ("whole.png", "lower.png"))
    code, answer, said = edit(out=whole)
    assert code == 0 and not any("no room" in w for w in answer["warnings"]), (code, answer, said)
    for frees, form in (((2048,), "resident"), ((2048, 2048), "parallel")):
        code, answer, said = edit(",fail_alloc=1", frees=frees, out=lower)
        words = [w for w in answer["warnings"] if "the GPU has no room for the %s placement" % form in w]
        assert code == 0 and len(words) == 1 and "trying the next smaller" in words[0], (code, answer, said)
        assert psnr(lower, whole) == 99
    r = run(double=",fail_alloc=1", out=lower)
    assert r.returncode == 0 and "warning: device: the GPU has no room for the resident placement" in r.stderr, r


def case_too_large_is_refused_before_it_starts():
    report = os.path.join(FOLDER.name, "report")
    code, answer, said = edit("", "-W", "4096", "-H", "4096", frees=(1000,), env={"QIE_CUDA_DOUBLE_REPORT": report})
    assert code == NO_MEMORY and "working memory" in answer["error"]["message"], (code, answer, said)
    with open(report) as f:
        assert f.read().split()[-1] == "works=0"
    print("     ", answer["error"]["message"])
    assert edit(frees=(1000,), out=os.path.join(FOLDER.name, "small.png"))[0] == 0  # a smaller one runs there


if __name__ == "__main__":
    sys.exit(1 if run_cases([(name, f) for name, f in sorted(globals().items()) if name.startswith("case_")]) else 0)
