#!/bin/sh
# Time qwen-edit beside stable-diffusion.cpp: the whole command on the same files, pictures, steps and threads, alternating.
#
#   sh bench/compare_sdcpp.sh --checkout DIR --transformer FILE --vae FILE --text-encoder FILE [--mmproj FILE]
#                             --image A.png [--prompt TEXT] [--steps 2] [--size 512] [--threads 2] [--rounds 3]
#                             [--program build/qwen-edit] [--model DIR] [--precision bf16]
#
# DIR is a built checkout of leejet/stable-diffusion.cpp; its sd-cli is looked for in DIR/build/bin, DIR/bin and DIR. Both
# programs read the same files (safetensors or GGUF); --model names the folder that gives qwen-edit its configs and tokenizer
# when the files alone do not. No CFG, Euler steps, one reference of the result's size. Prints seconds of each run (process
# start to exit), the medians and their ratio. Written after docs/qwen_image_edit.md of that project (2511 needs
# --qwen-image-zero-cond-t).
set -eu

usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

checkout='' transformer='' vae='' text='' mmproj='' image='' model='' precision=bf16
prompt="Change the main subject's color to purple and keep the overall style consistent."
steps=2 size=512 threads=2 rounds=3 program=build/qwen-edit
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
    --checkout) checkout=$2 ;;
    --transformer) transformer=$2 ;;
    --vae) vae=$2 ;;
    --text-encoder) text=$2 ;;
    --mmproj) mmproj=$2 ;;
    --image) image=$2 ;;
    --model) model=$2 ;;
    --precision) precision=$2 ;;
    --prompt) prompt=$2 ;;
    --steps) steps=$2 ;;
    --size) size=$2 ;;
    --threads) threads=$2 ;;
    --rounds) rounds=$2 ;;
    --program) program=$2 ;;
    *) usage ;;
    esac
    shift 2
done
for needed in "$checkout" "$transformer" "$vae" "$text" "$image"; do
    [ -n "$needed" ] || usage
done

peer=''
for at in "$checkout/build/bin/sd-cli" "$checkout/bin/sd-cli" "$checkout/sd-cli"; do
    if [ -x "$at" ]; then
        peer=$at
        break
    fi
done
if [ -z "$peer" ]; then
    echo "compare_sdcpp: no sd-cli under '$checkout': build it there first" >&2
    exit 3
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
now() {
    date +%s.%N
}

# timed NAME COMMAND...: its seconds to $work/NAME, what it says to $work/NAME.log
timed() {
    name=$1
    shift
    from=$(now)
    if ! "$@" >"$work/$name.log" 2>&1; then
        echo "compare_sdcpp: $name failed:" >&2
        tail -n 20 "$work/$name.log" >&2
        exit 1
    fi
    echo "$from $(now)" | awk '{printf "%.2f\n", $2 - $1}' | tee -a "$work/$name" | sed "s/^/  $name: /; s/\$/ s/"
}

theirs() {
    set -- "$peer" --diffusion-model "$transformer" --vae "$vae" --llm "$text" --qwen-image-zero-cond-t -r "$image" -p "$prompt" \
        --cfg-scale 1 --sampling-method euler --steps "$steps" -W "$size" -H "$size" --seed 0 -t "$threads" -o "$work/theirs.png"
    [ -z "$mmproj" ] || set -- "$@" --llm_vision "$mmproj"
    timed sd-cli "$@"
}

ours() {
    set -- "$program" edit --transformer "$transformer" --vae "$vae" --text-encoder "$text" -i "$image" -p "$prompt" --true-cfg-scale 1 \
        -s "$steps" -W "$size" -H "$size" --ref-area $((size * size)) -S 0 --threads "$threads" --precision "$precision" --no-keep-size \
        -o "$work/ours.png"
    [ -z "$mmproj" ] || set -- "$@" --mmproj "$mmproj"
    [ -z "$model" ] || set -- "$@" --model "$model"
    timed qwen-edit "$@"
}

median() {
    sort -n "$work/$1" | awk '{v[NR] = $1} END {print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'
}

echo "$size x $size, $steps steps, $threads threads, $rounds rounds, ours in $precision"
i=0
while [ "$i" -lt "$rounds" ]; do
    ours
    theirs
    i=$((i + 1))
done
echo "medians: stable-diffusion.cpp $(median sd-cli) s, qwen-edit $(median qwen-edit) s"
echo "$(median sd-cli) $(median qwen-edit)" | awk '{printf "ratio: %.2f\n", $1 / $2}'
