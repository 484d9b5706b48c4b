#!/usr/bin/env python3
"""Docs equal the program: help texts, manual page, completions, error table, and flags used in examples.

usage: check_docs.py [--write] [PROGRAM]     (default: build/qwen-edit)
--write renews docs/CLI.md (its boxes), packaging/man and packaging/completions instead of complaining.
"""
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEGIN, END = "<!-- help texts: made by tools/check_docs.py --write -->\n", "<!-- end of the help texts -->\n"


def run(program, *args):
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run([program, *args], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"check_docs: {program} {' '.join(args)} failed: {done.stderr}")
    return done.stdout


def read(path):
    try:
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError:
        return ""


def commands_of(program):
    return re.findall(r"^  (\w+) {2,}\S", run(program, "--help"), re.M)


def help_texts(program, commands):
    text = ""
    for command in commands:
        body = run(program, "help", command)
        text += f"## `{command}`\n\n```\n{body}```\n\n"
    return text


def cli_page(program, commands):
    page = read("docs/CLI.md")
    if BEGIN not in page:
        page = page.rstrip("\n") + "\n\n" + BEGIN + END
    head, rest = page.split(BEGIN, 1)
    return head + BEGIN + "\n" + help_texts(program, commands) + END + rest.split(END, 1)[1]


def check_errors(problems):
    header = read("include/qie/error.h")
    want = re.findall(r'X\((\w+), (\d+), (\d+), "([^"]*)"\)', header)
    have = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (.*?) \|", read("docs/ERRORS.md"), re.M)
    for row in want:
        if row not in have:
            problems.append(f"docs/ERRORS.md: no row {' | '.join(row)}")
    for row in have:
        if row not in want:
            problems.append(f"docs/ERRORS.md: row {' | '.join(row)} is not in include/qie/error.h")


def check_batch_fields(problems):
    table = read("src/cli/options_table.c")
    want = {name for field in re.findall(r'\.field = "([^"]*)"', table) for name in field.split("|")}
    page = read("docs/CLI.md")
    section = page[page.find("## Batches"):page.find("## For machines")]
    have = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M)
            for name in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))}
    for name in sorted(want ^ have):
        problems.append(f"docs/CLI.md: field {name} is {'missing' if name in want else 'not known to the program'}")


def check_variables(problems):
    """Variables of our own that the program or a document names are read somewhere."""
    name = r"((?:QIE|QWEN_EDIT)_[A-Z0-9_]+)\b"
    known, table = set(), read("src/cli/options_table.c")
    for folder, _, files in os.walk(ROOT):
        parts = os.path.relpath(folder, ROOT).split(os.sep)
        for f in files if not parts[0].startswith(("build", ".git")) else []:
            path = os.path.relpath(os.path.join(folder, f), ROOT)
            if f.endswith((".c", ".h", ".cpp", ".hpp")) and path != "src/cli/options_table.c":
                text = re.sub(r"/\*.*?\*/|//[^\n]*", "", read(path), flags=re.S)
                # what a test sets is not read by that
                known |= set(re.findall(r'getenv\("' + name if parts[0] == "tests" else r"\b" + name, text))
            elif f.endswith(".py"):
                known |= set(re.findall(r"environ(?:\.get\(|\[)\W*" + name, read(path)))
            elif f.endswith((".sh", "CMakeLists.txt", ".cmake")) or path == ".ci/run":
                known |= set(re.findall(r"(?:\$\{?|option\(|set\()" + name, read(path)))
    known |= set(re.findall(r'\.env = "' + name, table))
    texts = {"src/cli/options_table.c": table}
    for f in [f for f in os.listdir(ROOT) if f.startswith("README")] + os.listdir(os.path.join(ROOT, "docs")):
        path = f if f.startswith("README") else os.path.join("docs", f)
        texts[path] = read(path) if path.endswith(".md") else ""
    for path, text in sorted(texts.items()):
        for unknown in sorted(set(re.findall(r"\b" + name, text)) - known):
            problems.append(f"{path}: nothing reads {unknown}")


def check_interface(problems):
    """Routes and metrics of the service, in both directions."""
    page, code = read("docs/API.md"), ""
    for folder, _, files in os.walk(os.path.join(ROOT, "src/service/master")):
        code += "".join(read(os.path.relpath(os.path.join(folder, f), ROOT)) for f in sorted(files) if f.endswith(".c"))
    compare = {
        "route": (set(re.findall(r'{"(GET|POST|DELETE)", "(/[^"]*)", \w+, \w+, "', code)),
                  set(re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", page[page.find("## Every route"):page.find("## Each with curl")]))),
        "metric": ({"qwen_edit_" + name for name in re.findall(r'put_head\(&?b, "([a-z_]+)"', code)},
                   set(re.findall(r"`(qwen_edit_[a-z_]+)", page))),
    }
    for what, (want, have) in compare.items():
        for name in sorted(want ^ have):
            text = " ".join(name) if isinstance(name, tuple) else name
            problems.append(f"docs/API.md: {what} {text} is {'missing' if name in want else 'not known to the service'}")


def check_examples(program, commands, problems):
    """Flags that follow "qwen-edit COMMAND" in any document must exist."""
    known = {c: set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", run(program, "help", c).replace("[no-]", "")))
             for c in commands}
    for c in known:
        if re.search(r"--\[no-\]keep-size", run(program, "help", c)):
            known[c].add("--no-keep-size")
    files = [f for f in os.listdir(ROOT) if f.startswith("README")]
    files += [os.path.join("docs", f) for f in os.listdir(os.path.join(ROOT, "docs")) if f.endswith(".md")]
    for name in sorted(files):
        for i, line in enumerate(read(name).split("\n"), 1):
            for m in re.finditer(r"qwen-edit (\w+)([^`|#]*)", line):
                command, rest = m.groups()
                if command not in known:
                    continue
                rest = re.sub(r'"[^"]*"|\'[^\']*\'', "", rest)
                for flag in re.findall(r"(?<=\s)(--?[a-zA-Z][\w-]*)", rest):
                    if flag not in known[command] and not (flag[1] != "-" and flag[:2] in known[command]):
                        problems.append(f"{name}:{i}: qwen-edit {command} has no {flag}")


def main():
    args = [a for a in sys.argv[1:] if a != "--write"]
    write = "--write" in sys.argv
    program = os.path.abspath(args[0] if args else os.path.join(ROOT, "build/qwen-edit"))
    commands = commands_of(program)
    problems = []
    made = {
        "docs/CLI.md": cli_page(program, commands),
        "packaging/man/qwen-edit.1": run(program, "help", "--man"),
        "packaging/completions/qwen-edit.bash": run(program, "help", "--completions", "bash"),
        "packaging/completions/_qwen-edit": run(program, "help", "--completions", "zsh"),
    }
    for path, text in made.items():
        if read(path) == text:
            continue
        if write:
            os.makedirs(os.path.dirname(os.path.join(ROOT, path)), exist_ok=True)
            with open(os.path.join(ROOT, path), "w", encoding="utf-8") as f:
                f.write(text)
        else:
            problems.append(f"{path} is not what the program prints: run tools/check_docs.py --write")
    check_errors(problems)
    check_batch_fields(problems)
    check_variables(problems)
    check_interface(problems)
    check_examples(program, commands, problems)
    print("\n".join(problems + [f"check_docs: {len(commands)} commands, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
