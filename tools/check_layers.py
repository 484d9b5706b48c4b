#!/usr/bin/env python3
"""Who may include whom: reads every #include under src/ and include/ and fails on one that points up.

The table is the one of docs/HACKING.md (layers). It also refuses functions that cannot be used safely
(no bounds) and those that grow the stack by an amount from outside. Prints FILE:LINE: what is wrong, and a
last line "N files, N problems"; exit status 1 if there are any.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# folder -> folders it may include besides its own
MAY = {
    "base": [],
    "image": ["base"],
    "text": ["base"],
    "plan": ["base"],
    "weights": ["base", "plan"],
    "compute": ["base", "plan", "weights"],
    "compute/cpu": ["base", "plan", "weights", "compute"],
    "compute/cpu/x86": ["base", "plan", "weights", "compute", "compute/cpu"],
    "compute/cuda": ["base", "plan", "weights", "compute"],
    "model": ["base", "image", "text", "plan", "weights", "compute"],
    "hub": ["base", "plan", "weights"],
    "service/common": ["base", "plan"],
    "service/worker": ["base", "image", "text", "plan", "weights", "compute", "model", "service/common"],
    "service/master": ["base", "text", "plan", "hub", "service/common"],
    "cli": ["base", "plan", "weights", "hub", "service/common", "service/worker", "service/master"],
}
# single headers that a folder may include although it may not include the folder
MAY_HEADER = {
    ("service/master", "image/sniff.h"),
    ("cli", "compute/backend.h"),  # the command bench only, see MAY_ONLY
}
MAY_ONLY = {"compute/backend.h": r"^src/cli/bench"}

# outside library header -> the files that may include it
LIBRARY = [
    (r"^jansson\.h$", r"^src/base/json\.c$"),
    (r"^openssl/", r"^src/base/hash\.c$"),
    # oneDNN takes its number of threads from OpenMP and from nowhere else.
    (r"^omp\.h$", r"^src/(base/parallel\.[ch]|compute/cpu/onednn_[^/]*\.c)$"),
    (r"^pthread\.h$", r"^src/(base|service)/"),
    (r"^png\.h$", r"^src/image/png\.c$"),
    (r"^(jpeglib|jerror)\.h$", r"^src/image/jpeg\.c$"),
    (r"^webp/", r"^src/image/webp\.c$"),
    (r"^pcre2\.h$", r"^src/text/"),
    (r"^utf8proc\.h$", r"^src/text/"),
    (r"^(dnnl|oneapi/dnnl/)", r"^src/compute/cpu/onednn_[^/]*\.[ch]p*$"),
    (r"^cuda|^cublas|^cudnn|^nvml", r"^src/compute/cuda/"),
    (r"^curl/", r"^src/hub/http\.c$"),
    (r"^microhttpd\.h$", r"^src/service/master/http\.c$"),
    (r"^sqlite3\.h$", r"^src/service/master/queue_db\.c$"),
    (r"^seccomp\.h$", r"^src/service/worker/"),
]

BANNED = re.compile(r"\b(gets|strcpy|strcat|sprintf|vsprintf|strtok|alloca|tmpnam|mktemp|atoi|atol|atof|system)\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')


def folder_of(path):
    """Longest folder of the table that holds a header named from src/."""
    parts = path.split("/")[:-1]
    for n in range(len(parts), 0, -1):
        if "/".join(parts[:n]) in MAY:
            return "/".join(parts[:n])
    return None


def code_lines(path):
    """Lines without comments, strings and character constants (include lines stay whole)."""
    text = open(path, encoding="utf-8").read()
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)

    def blank(m):
        s = m.group(0)
        start = text.rfind("\n", 0, m.start()) + 1
        if s[0] == '"' and re.match(r"\s*#\s*include", text[start:m.start()]):
            return s
        return re.sub(r"[^\n]", " ", s)

    return pattern.sub(blank, text).split("\n")


def check_include(rel, folder, kind, name):
    if kind == '"':
        if name.startswith("qie/"):
            return None
        target = folder_of(name)
        if target is None:
            local = os.path.join(os.path.dirname(os.path.join(ROOT, rel)), name)
            if os.path.exists(local):
                return f'write "{name}" from src/'
            return f'"{name}" is in no known folder'
        if target == folder or target in MAY[folder]:
            return None
        if (folder, name) in MAY_HEADER and re.search(MAY_ONLY.get(name, ""), rel):
            return None
        return f'{folder} may not include {target} ("{name}")'
    for library, files in LIBRARY:
        if re.search(library, name) and not re.search(files, rel):
            return f"<{name}> belongs to {files.strip('^$')} only"
    return None


def main():
    problems, n_files = [], 0
    for top in ("src", "include"):
        for base, _, names in os.walk(os.path.join(ROOT, top)):
            for name in sorted(names):
                if not name.endswith((".c", ".h", ".hpp", ".cpp", ".cu", ".cuh")):
                    continue
                path = os.path.join(base, name)
                rel = os.path.relpath(path, ROOT)
                n_files += 1
                folder = folder_of(os.path.relpath(path, os.path.join(ROOT, "src"))) if top == "src" else None
                if top == "src" and folder is None:
                    problems.append(f"{rel}:1: the folder is not in the table of tools/check_layers.py")
                    continue
                for i, line in enumerate(code_lines(path), 1):
                    m = INCLUDE.match(line)
                    what = None
                    if m and top == "src":
                        what = check_include(rel, folder, m.group(1), m.group(2))
                    elif m and m.group(1) == '"' and not m.group(2).startswith("qie/"):
                        what = f'a public header includes "{m.group(2)}"'
                    elif not m and (b := BANNED.search(line)):
                        what = f"{b.group(1)}() is not used in this program"
                    if what:
                        problems.append(f"{rel}:{i}: {what}")
    print("\n".join(problems + [f"check_layers: {n_files} files, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
