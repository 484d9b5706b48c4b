#!/bin/sh
# One edit with the demo model under valgrind: no error, no lost memory. Part of sh test.sh --long.
# usage: valgrind_edit.sh PROGRAM
set -eu
cd "$(dirname "$0")/../.."
command -v valgrind >/dev/null || {
    echo "skip: valgrind is not installed"
    exit 77
}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# Valgrind knows no AVX-512, so the kernels stop at AVX2. OMP_WAIT_POLICY keeps the program from starting itself
# again, outside of valgrind.
QIE_CPU=avx2 OMP_WAIT_POLICY=passive valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite \
    --suppressions=tests/lib/valgrind.supp \
    "$1" edit --model demo -i demo/samples/mug.png -p "make the subject purple" -o "$out/out.png" --threads 1 -s 2 -S 1 -W 64 -H 64 --ref-area 4096
"$1" info "$out/out.png"
