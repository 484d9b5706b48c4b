#!/usr/bin/env python3
"""The unmodified `openai` package (PyPI) against a real service with the demo model: test_openai.py PROGRAM [FOLDER]

FOLDER keeps the virtual environment between runs. Exit status 77 when the package cannot be installed here.
"""
import os
import subprocess
import sys
import tempfile

from service import ROOT, Service

HERE = os.path.dirname(os.path.abspath(__file__))


def environment(folder):
    """Path of a Python that has the package, or None."""
    python = os.path.join(folder, "bin", "python")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([python, "-c", "import openai"], **quiet).returncode == 0 if os.path.exists(python) else False:
        return python
    for command in ([sys.executable, "-m", "venv", "--clear", folder],
                    [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--timeout", "10", "--retries", "1", "openai"]):
        try:
            if subprocess.run(command, timeout=180, **quiet).returncode:
                return None
        except (OSError, subprocess.TimeoutExpired):
            return None
    return python


def main():
    python = environment(os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="qe-openai-"))
    if not python:
        print("skip: the package openai cannot be installed here (no python3-venv, or no package index)")
        return 77
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_") and not k.lower().endswith("_proxy")}
    samples = [os.path.join(ROOT, "demo", "samples", name + ".png") for name in ("ball", "mug")]
    with Service(sys.argv[1], "--api-key", "sesame-open", key="sesame-open") as s:
        return subprocess.run([python, os.path.join(HERE, "openai_client.py"), s.url, "sesame-open", *samples], env=clean,
                              timeout=400).returncode


if __name__ == "__main__":
    sys.exit(main())
