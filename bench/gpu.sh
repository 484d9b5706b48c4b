#!/bin/sh
# Proof and measurement on a GPU, unattended: packages, build for this card alone, recordings of diffusers on the card, then
# the released shapes with 60 blocks of random weights made on the card: seconds a forward and an edit, peak memory, the
# same streamed at an artificial limit of 20 GB, the five dearest operations, and a table against the figures to beat.
#   sh bench/gpu.sh [OUT]            writes OUT/report.md (gpu-report/ by default); ends within 10 minutes
#   sh bench/gpu.sh --double [OUT]   the same steps on the CPU double of the runtime and a tiny model: tests this script
# For a card on a machine without network or packages, two steps more, the first one elsewhere, with the toolkit:
#   sh bench/gpu.sh --pack FOLDER 90a        builds for this architecture; program, plugin and their libraries in FOLDER
#   sh bench/gpu.sh --packed FOLDER [OUT]    measures with them; cuBLASLt is the machine's own. QIE_GPU_DOUBLE=BUILD/tests: on
#                                            the double there, which tries a packed folder without a card
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
out=${1:-gpu-report}
build=${QIE_GPU_BUILD:-build-gpu}
mkdir -p "$out"
start=$(date +%s)
say() { printf '== %s s: %s\n' "$(($(date +%s) - start))" "$*"; }

if [ -n "$pack" ]; then
    cuda="-DQIE_CUDA=ON -DQIE_CUDA_ARCHS=$arch"
    targets="qwen-edit qie_cuda sparse_model"
elif [ "$double" -eq 0 ] && [ -z "${QIE_GPU_DOUBLE:-}" ]; then
    command -v nvidia-smi >/dev/null || {
        echo "no NVIDIA driver: sh bench/gpu.sh --double tries the script itself" >&2
        exit 4
    }
    nvidia-smi --query-gpu=index,name,compute_cap,memory.total,memory.free,driver_version --format=csv | tee "$out/cards.csv"
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    [ "$arch" = 90 ] && arch=90a
    PATH=$PATH:/usr/local/cuda/bin
    [ -n "$packed" ] || command -v nvcc >/dev/null || {
        echo "nvcc 12.8 or newer is not here: the packages cuda-nvcc-12-8 cuda-cudart-dev-12-8 libcublas-dev-12-8" >&2
        exit 4
    }
    cuda="-DQIE_CUDA=ON -DQIE_CUDA_ARCHS=$arch"
    targets="qwen-edit qie_cuda sparse_model"
else
    cuda="-DQIE_CUDA=OFF"
    targets="qwen-edit qie_cuda_double sparse_model fakenvml"
fi
if [ -n "$packed" ]; then
    build=$packed
    libs=$(dirname "$(ls -d /usr/local/cuda*/lib64/libcublasLt.so.1* /usr/lib/*/libcublasLt.so.1* 2>/dev/null | tail -n 1)")
    export LD_LIBRARY_PATH="$PWD/$packed/lib:$packed/lib:$libs:${LD_LIBRARY_PATH:-}"
    say "measuring with what is in $packed"
    python3 bench/gpu.py --build "$build" --out "$out" --deadline "$((start + ${QIE_GPU_SECONDS:-570}))" \
        ${QIE_GPU_DOUBLE:+--double --tests "$QIE_GPU_DOUBLE"}
    say "done: $out/report.md"
    exit 0
fi
say "packages"
# Ubuntu has no libjpeg62-turbo-dev; libjpeg-dev is the same on both
need_packages $(echo $BUILD_PACKAGES | sed 's/libjpeg62-turbo-dev/libjpeg-dev/') python3
if ! cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25) }'; then
    say "cmake 3.25 from PyPI: the system's is older"
    need_packages python3-venv
    python3 -m venv "$out/cmake" && "$out/cmake/bin/pip" -q install 'cmake>=3.25'
    PATH=$PWD/$out/cmake/bin:$PATH
fi
say "building $targets"
[ -e "$build/build.ninja" ] || cmake -S . -B "$build" -G Ninja -DQIE_TESTS=ON $cuda >"$out/cmake.log" 2>&1 || {
    tail -n 20 "$out/cmake.log" >&2
    exit 1
}
cmake --build "$build" --target $targets >"$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log" >&2
    exit 1
}
if [ -n "$pack" ]; then
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
