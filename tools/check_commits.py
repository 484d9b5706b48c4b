#!/usr/bin/env python3
"""First lines of commits: "area: what it does now", at most 72 characters, no full stop; a blank line after.

usage: check_commits.py [RANGE]   (default: the last commit; for more: -n20, main..HEAD)
"""
import re
import subprocess
import sys

FIRST = re.compile(r"^[a-z0-9_./-]+(, [a-z0-9_./-]+)*: \S.*[^.\s]$")


def main():
    wanted = sys.argv[1:] or ["-n1"]
    log = subprocess.run(["git", "log", "--no-merges", "--format=%h%x00%B%x01", *wanted], capture_output=True, text=True)
    if log.returncode:
        print("check_commits: skip: no git history here")
        return 0
    problems, n = [], 0
    for entry in log.stdout.split("\x01"):
        commit, _, body = entry.strip().partition("\0")
        if not commit:
            continue
        n += 1
        lines = body.split("\n")
        if len(lines[0]) > 72:
            problems.append(f"{commit}: the first line has {len(lines[0])} characters, the limit is 72")
        if not FIRST.match(lines[0]):
            problems.append(f'{commit}: "{lines[0]}" is not "area: what it does now"')
        if len(lines) > 1 and lines[1].strip():
            problems.append(f"{commit}: the second line is not blank")
    print("\n".join(problems + [f"check_commits: {n} commits, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
