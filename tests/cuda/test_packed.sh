#!/bin/sh
# bench/gpu.sh --packed with what was built, on the CUDA double: test_packed.sh BUILD. A folder that lacks something is told so.
set -eu
cd "$(dirname "$0")/../.."
build=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export QIE_GPU_DOUBLE="$build/tests"

refused() { # refused WORDS: before anything runs
    status=0
    sh bench/gpu.sh --packed "$work/pack" "$work/out" >"$work/said" 2>&1 || status=$?
    [ "$status" -eq 4 ] && grep -q "missing: .*$1" "$work/said" || {
        echo "FAIL: status $status, not 4 with '$1':"
        cat "$work/said"
        exit 1
    }
}

mkdir -p "$work/pack" "$work/lib"
refused 'pack/qwen-edit: is this a folder'
ln -s "$build/qwen-edit" "$build/sparse_model" "$work/pack/"
: >"$work/pack/qie_cuda.so" # of the machine with the toolkit; not loaded on the double
refused 'lib.tar.xz'
: >"$work/lib/libjansson.so.4"
tar -C "$work" -cJf "$work/pack/lib.tar.xz" lib
refused 'qwen-edit needs'
rm "$work/lib/libjansson.so.4"
tar -C "$work" -cJf "$work/pack/lib.tar.xz" lib
sh bench/gpu.sh --packed "$work/pack" "$work/out"
grep -q '^0 failed' "$work/out/report.md"
