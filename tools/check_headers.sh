#!/bin/sh
# Every header compiles alone, in C11; the public ones in C++17 too.
set -eu
cd "$(dirname "$0")/.."
n=0 bad=0
for header in include/qie/*.h $(find src -name '*.h' | sort); do
    n=$((n + 1))
    "${CC:-gcc}" -std=c11 -Wall -Wextra -Wno-unused-function -Werror -D_GNU_SOURCE -fopenmp -fsyntax-only \
        -Iinclude -Isrc -x c "$header" || bad=$((bad + 1))
done
for header in include/qie/*.h; do
    "${CXX:-g++}" -std=c++17 -Wall -Wextra -Werror -fsyntax-only -Iinclude -x c++ "$header" || bad=$((bad + 1))
done
echo "check_headers: $n headers, $bad problems"
[ "$bad" -eq 0 ]
