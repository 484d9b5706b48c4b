#!/usr/bin/env python3
"""The commands that the documents show, run as they stand against a real service: test_docs.py PROGRAM [PYTHON]

PYTHON has the package openai; without it that example is left out. Blocks marked sh of docs/API.md run in one shell,
top to bottom; the Python blocks after them.
"""
import os
import re
import subprocess
import sys
import tempfile

from service import ROOT, Service, sample

PROGRAM, PYTHON = os.path.abspath(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
ADDRESS = "http://127.0.0.1:7860"


def blocks(document, kind):
    with open(os.path.join(ROOT, document), encoding="utf-8") as f:
        return re.findall(r"^```%s\n(.*?)^```$" % kind, f.read(), re.M | re.S)


def run(what, command, text=None):
    done = subprocess.run(command, input=text, capture_output=True, timeout=300, env={
        **{k: v for k, v in os.environ.items() if not k.startswith("QWEN_EDIT_") and not k.lower().endswith("_proxy")},
        "PYTHONPATH": os.path.join(ROOT, "python"), "NO_PROXY": "*"})
    if done.returncode:
        print(f"FAIL {what}: exit status {done.returncode}\n{done.stdout.decode()[-1500:]}{done.stderr.decode()[-1500:]}")
        return 1
    print(f"ok   {what}", flush=True)
    return 0


def picture(name, kind=b"\x89PNG"):
    with open(name, "rb") as f:
        if f.read(4) != kind:
            print(f"FAIL {name} is no picture")
            return 1
    return 0


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Service(PROGRAM) as s:
        os.chdir(folder)
        for name, source in (("photo.png", "ball"), ("hat.png", "mug")):
            with open(name, "wb") as f:
                f.write(sample(source))
        shell = "set -eu\nset -o pipefail\n"
        for i, block in enumerate(blocks("docs/API.md", "sh"), 1):
            # Shown when it fails: which block it was. A pipe may be closed early by head.
            shell += f"echo '== block {i}'\n" + re.sub(r"\| (head -c \d+)", r"| { \1; cat >/dev/null; }", block)
        failed += run("docs/API.md: curl", ["bash"], shell.replace(ADDRESS, s.url).encode())
        failed += picture("out.png") + picture("input.png")
        for block in blocks("docs/API.md", "python"):
            package = "openai" if "openai" in block else ""
            if package and not (PYTHON and os.path.exists(PYTHON)):
                print("left out: the example with the package openai, which is not here")
                continue
            for name in ("out.png", "hats-2.png"):
                if os.path.exists(name):
                    os.unlink(name)
            failed += run("docs/API.md: python " + package, [PYTHON if package else sys.executable, "-"],
                          block.replace(ADDRESS, s.url).encode())
            failed += picture("out.png")
        os.chdir("/")
    print(f"test_docs: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
