#!/bin/sh
# Proof and measurement on a GPU, unattended: packages, build for this card alone, recordings of diffusers on the card, then
# the released shapes with 60 blocks of random weights made on the card: seconds a forward and an edit, peak memory, the
# same streamed at an artificial limit of 20 GB, the five dearest operations, and a table against the figures to beat.
#   sh bench/gpu.sh [OUT]            writes OUT/report.md (gpu-report/ by default); ends within 10 minutes
#   sh bench/gpu.sh --double [OUT]   the same steps on the CPU double of the runtime and a tiny model: tests this script
# For a card on a machine without network or packages, two steps more, the first one elsewhere, with the toolkit:
#   sh bench/gpu.sh --pack FOLDER 90a        builds for this architecture; program, plugin and their libraries in FOLDER
#   sh bench/gpu.sh --packed FOLDER [OUT]    measures with them; the machine's own are python3, the C library (as new as where
#                                            it was packed) and cuBLASLt. QIE_GPU_DOUBLE=BUILD/tests: on the double there,
#                                            which tries a packed folder without a card
# What is missing on the machine is named, and the exit status is 4.
set -eu
cd "$(dirname "$0")/.."
. tools/packages.sh
double=0 packed= pack=
case ${1:-} in
--double)
    double=1
    shift
    ;;
--packed)
    packed=$2
    shift 2
    ;;
--pack)
    pack=$2 arch=$3
    shift 3
    ;;
esac
build=${QIE_GPU_BUILD:-build-gpu}
out=${1:-gpu-report}
[ -z "$pack" ] || out=$build # logs alone
mkdir -p "$out"
start=$(date +%s)
missing() {
    echo "missing: $*" >&2
    exit 4
}
need_commands() {
    for c in "$@"; do
        command -v "$c" >/dev/null || none="${none:-} $c"
    done
    [ -z "${none:-}" ] || missing "the command$none"
}
say() { printf '== %s s: %s\n' "$(($(date +%s) - start))" "$*"; }

if [ -n "$pack" ]; then
    cuda="-DQIE_CUDA=ON -DQIE_CUDA_ARCHS=$arch"
    targets="qwen-edit qie_cuda sparse_model"
    PATH=$PATH:/usr/local/cuda/bin
    need_commands nvcc strip ldd tar xz
elif [ "$double" -eq 0 ] && [ -z "${QIE_GPU_DOUBLE:-}" ]; then
    command -v nvidia-smi >/dev/null ||
        missing "an NVIDIA driver (nvidia-smi); sh bench/gpu.sh --double tries the script itself"
    nvidia-smi --query-gpu=index,name,compute_cap,memory.total,memory.free,driver_version --format=csv | tee "$out/cards.csv"
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    [ "$arch" = 90 ] && arch=90a
    PATH=$PATH:/usr/local/cuda/bin
    [ -n "$packed" ] || command -v nvcc >/dev/null ||
        missing "nvcc 12.8 or newer: the packages cuda-nvcc-12-8 cuda-cudart-dev-12-8 libcublas-dev-12-8"
    cuda="-DQIE_CUDA=ON -DQIE_CUDA_ARCHS=$arch"
    targets="qwen-edit qie_cuda sparse_model"
else
    cuda="-DQIE_CUDA=OFF"
    targets="qwen-edit qie_cuda_double sparse_model fakenvml"
fi
if [ -n "$packed" ]; then
    need_commands python3
    for f in qwen-edit qie_cuda.so sparse_model lib.tar.xz; do
        [ -e "$packed/$f" ] || missing "$packed/$f: is this a folder of bench/gpu.sh --pack?"
    done
    build=$packed
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    python3 -m tarfile -e "$packed/lib.tar.xz" "$unpacked"
    cublas=$(ls -d /usr/local/cuda*/lib64/libcublasLt.so.1* /usr/lib/*/libcublasLt.so.1* 2>/dev/null | tail -n 1 || true)
    # for the program alone: python3 and nvidia-smi have their own
    libs="$unpacked/lib:${cublas:+${cublas%/*}:}${LD_LIBRARY_PATH:-}"
    # all that the loader does not find, the C library's newer symbols among it
    set -- "$packed/qwen-edit" "$packed/sparse_model"
    [ -n "${QIE_GPU_DOUBLE:-}" ] || set -- "$@" "$packed/qie_cuda.so"
    absent=$(LD_LIBRARY_PATH=$libs ldd "$@" 2>&1 | grep 'not found' | sort -u || true)
    [ -z "$absent" ] || missing "$absent"
    LD_LIBRARY_PATH=$libs "$packed/qwen-edit" --version >/dev/null || missing "what $packed/qwen-edit needs"
    say "measuring with what is in $packed"
    python3 bench/gpu.py --build "$build" --out "$out" --libs "$libs" --deadline "$((start + ${QIE_GPU_SECONDS:-570}))" \
        ${QIE_GPU_DOUBLE:+--double --tests "$QIE_GPU_DOUBLE"}
    say "done: $out/report.md"
    exit 0
fi
say "packages"
# Ubuntu has no libjpeg62-turbo-dev; libjpeg-dev is the same on both
need_packages $(echo $BUILD_PACKAGES | sed 's/libjpeg62-turbo-dev/libjpeg-dev/') python3
need_commands cmake ninja cc c++ pkg-config python3
if ! cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25) }'; then
    say "cmake 3.25 from PyPI: the system's is older"
    need_packages python3-venv
    python3 -m venv "$out/cmake" && "$out/cmake/bin/pip" -q install 'cmake>=3.25'
    PATH=$PWD/$out/cmake/bin:$PATH
fi
say "building $targets"
cmake -S . -B "$build" -G Ninja -DQIE_TESTS=ON $cuda >"$out/cmake.log" 2>&1 || {
    tail -n 20 "$out/cmake.log" >&2
    exit 1
}
cmake --build "$build" --target $targets >"$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log" >&2
    exit 1
}
if [ -n "$pack" ]; then
    rm -rf "$pack/lib" "$pack/lib.tar.xz"
    mkdir -p "$pack/lib"
    for f in qwen-edit qie_cuda.so sparse_model; do
        strip -o "$pack/$f" "$build/$f"
        ldd "$build/$f" | awk '$3 ~ /^\// { print $3 }' | while read -r lib; do
            case $lib in
            */libc.so* | */libm.so* | */libdl.so* | */librt.so* | */libpthread.so* | */ld-linux* | */libcublas* | */libcuda*) ;;
            *) cp -L "$lib" "$pack/lib/" ;;
            esac
        done
    done
    # a folder to carry: xz makes a fifth of oneDNN
    tar -C "$pack" -cJf "$pack/lib.tar.xz" lib
    rm -r "$pack/lib"
    du -sm "$pack" | awk '{ print "packed: " $1 " MiB" }'
    exit 0
fi
say "measuring"
if [ "$double" -eq 1 ]; then
    python3 bench/gpu.py --build "$build" --out "$out" --double
else
    python3 bench/gpu.py --build "$build" --out "$out" --deadline "$((start + ${QIE_GPU_SECONDS:-570}))"
fi
say "done: $out/report.md"
