#!/bin/sh
# clang-tidy with the checks of .clang-tidy over the sources of the program.
# usage: tools/check_tidy.sh [BUILD_FOLDER] [FILE ...]
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(find src -name '*.c' | sort)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Files that this configuration does not compile (another instruction set, a plugin) are in no database.
for file in "$@"; do
    grep -q "/$file\"" "$build/compile_commands.json" && echo "$file"
done | xargs -P "$(nproc)" -n 4 clang-tidy --quiet -p "$build" >"$log" 2>/dev/null || true
problems=$(grep -cE '(warning|error): ' "$log" || true)
[ "$problems" -eq 0 ] || grep -E '(warning|error): ' "$log" | sed "s|$PWD/||" | sort -u
echo "check_tidy: $# files, $problems problems"
[ "$problems" -eq 0 ]
