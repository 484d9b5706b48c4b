#!/bin/sh
# .clang-format decides how C looks. Files made by a program are left out.
set -eu
cd "$(dirname "$0")/.."
files=$(find src include tests -name '*.[ch]' | sort)
n=$(echo "$files" | wc -l)
if echo "$files" | xargs clang-format --dry-run -Werror; then
    echo "check_format: $n files, 0 problems"
else
    echo "check_format: clang-format -i puts it right"
    exit 1
fi
