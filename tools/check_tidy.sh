#!/bin/sh
# clang-tidy with the checks of .clang-tidy over the sources of the program.
# usage: tools/check_tidy.sh [BUILD_FOLDER] [FILE ...]
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(find src -name '*.c' | sort)
log=$(mktemp)
trap 'rm -f "$log" "$log.new"' EXIT
# Files that this configuration does not compile (another instruction set, a plugin) are in no database.
# error.c defines what tools/analyzer.h redefines; clang 14 does not know the processor features that cpu.c asks for.
for file in "$@"; do
    case $file in src/base/error.c | src/base/cpu.c) continue ;; esac
    grep -q "/$file\"" "$build/compile_commands.json" && echo "$file"
done | xargs -P "$(nproc)" -n 4 clang-tidy --quiet -p "$build" --extra-arg=-include --extra-arg="$PWD/tools/analyzer.h" \
    >"$log" 2>/dev/null || true
# What somebody has looked at and found impossible is in tidy_reviewed.txt, without line numbers.
grep -E '(warning|error): ' "$log" | sed "s|$PWD/||" | sort -u | while IFS= read -r line; do
    known=$(printf '%s\n' "$line" | sed -E 's/:[0-9]+:[0-9]+: (warning|error): /: /; s/,-warnings-as-errors//')
    grep -qxF -e "$known" tools/tidy_reviewed.txt || printf '%s\n' "$line"
done >"$log.new"
problems=$(grep -c . "$log.new" || true)
cat "$log.new"
echo "check_tidy: $# files, $problems problems"
[ "$problems" -eq 0 ]
