#!/bin/sh
# .clang-format decides how C looks. Files made by a program are left out.
set -eu
cd "$(dirname "$0")/.."
files=$(find src include tests -name '*.[ch]' | sort)
n=$(echo "$files" | wc -l)
bad=$(echo "$files" | xargs clang-format --dry-run -Werror 2>&1 | sed -n 's/^\([^ :]*\.[ch]\):[0-9].*/\1/p' | sort | uniq -c)
[ -z "$bad" ] || printf '%s\n' "$bad (lines); clang-format -i puts it right"
echo "check_format: $n files, $(printf '%s' "$bad" | grep -c . || true) problems"
[ -z "$bad" ]
