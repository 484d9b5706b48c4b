#!/bin/sh
# Time qwen-edit beside stable-diffusion.cpp: the whole command and its stages on the same files, pictures, steps and threads,
# alternating.
#
#   sh bench/compare_sdcpp.sh --checkout DIR --model FOLDER --image A.png [--prompt TEXT] [--steps 2] [--size 512] [--threads 2]
#                             [--rounds 3] [--program build/qwen-edit] [--precision bf16] [--peer-flags "--diffusion-fa"]
#                             [--transformer FILE] [--vae FILE] [--text-encoder FILE] [--mmproj FILE]
#
# DIR is a built checkout of leejet/stable-diffusion.cpp; its sd-cli is looked for in DIR/build/bin, DIR/bin and DIR. FOLDER is a
# model of one file a part (also what `qwen-edit quantize` wrote); the peer reads the same files unless others are named.
# No CFG, Euler steps, one reference of the result's size, shown to the vision tower at 384 x 384 by both. Prints seconds of
# each run (process start to exit), the medians and their ratio, and per stage the peer's seconds (loading its weights apart)
# beside the first run of each in `qwen-edit bench`. Written for that project in August 2026 (2511 needs
# --model-args qwen_image_zero_cond_t=true).
set -eu

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

checkout='' transformer='' vae='' text='' mmproj='' image='' model='' precision=bf16
prompt="Change the main subject's color to purple and keep the overall style consistent."
steps=2 size=512 threads=2 rounds=3 program=build/qwen-edit flags=--diffusion-fa
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
    --peer-flags) flags=$2 ;;
    *) usage ;;
    esac
    shift 2
done
for needed in "$checkout" "$model" "$image"; do
    [ -n "$needed" ] || usage
done

# part FOLDER: its weights in one file
part() {
    found=$(find -L "$model/$1" -name '*.safetensors' -o -name '*.gguf' | grep -v mmproj || true)
    if [ "$(echo "$found" | wc -l)" -ne 1 ] || [ -z "$found" ]; then
        echo "compare_sdcpp: not one file of weights in '$model/$1': name it" >&2
        exit 2
    fi
    echo "$found"
}
[ -n "$transformer" ] || transformer=$(part transformer)
[ -n "$vae" ] || vae=$(part vae)
[ -n "$text" ] || text=$(part text_encoder)
[ -n "$mmproj" ] || mmproj=$(find -L "$model/text_encoder" -name '*mmproj*' | head -n 1)

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
    # shellcheck disable=SC2086 # several flags
    set -- "$peer" --diffusion-model "$transformer" --vae "$vae" --llm "$text" --model-args qwen_image_zero_cond_t=true -r "$image" \
        -p "$prompt" --ref-image-args vlm_min_size=147456,vlm_max_size=147456 --cfg-scale 1 --sampling-method euler --steps "$steps" \
        -W "$size" -H "$size" --seed 0 -t "$threads" $flags -o "$work/theirs.png"
    [ -z "$mmproj" ] || set -- "$@" --llm_vision "$mmproj"
    timed sd-cli "$@"
    their_stages
}

ours() {
    timed qwen-edit "$program" edit --model "$model" -i "$image" -p "$prompt" --true-cfg-scale 1 -s "$steps" -W "$size" \
        -H "$size" --ref-area $((size * size)) -S 0 --threads "$threads" --precision "$precision" --no-keep-size -o "$work/ours.png"
}

# Of the peer's last run, a line "stage seconds" to $work/STAGE each, loading apart.
their_stages() {
    tr '\r' '\n' <"$work/sd-cli.log" | awk -v work="$work" -v steps="$steps" '
        function taken() { sub(/.*taking /, ""); return $0 + 0 }
        function stage(name, n) { t = taken(); printf "%.2f\n", (t - loading) / n >>(work "/" name); all += loading; loading = 0 }
        /loading tensors completed/ { loading += taken() }
        /encode_first_stage completed/ { stage("vae_encode", 1) }
        /get_learned_condition completed/ { stage("text", 1) }
        /sampling completed/ { stage("forward", steps) }
        /decode_first_stage completed/ { stage("vae_decode", 1) }
        END { printf "%.2f\n", all >>(work "/loading") }'
}

# The first run of each stage in a process of ours.
our_stages() {
    "$program" bench --json --model "$model" -i "$image" -p "$prompt" --true-cfg-scale 1 -s "$steps" -W "$size" -H "$size" \
        --ref-area $((size * size)) --threads "$threads" --precision "$precision" --no-ops --repeats 1 \
        --only text,vae_encode,forward,vae_decode | tr '{' '\n' | awk -v work="$work" '
        /"stage":/ && /"first_s":/ {
            name = $0; sub(/.*"stage": *"/, "", name); sub(/".*/, "", name)
            sub(/.*"first_s": */, ""); printf "%.2f\n", $0 + 0 >>(work "/ours_" name)
        }'
}

median() {
    sort -n "$work/$1" | awk '{v[NR] = $1} END {print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'
}

echo "$size x $size, $steps steps, $threads threads, $rounds rounds, ours in $precision, the peer with $flags"
i=0
while [ "$i" -lt "$rounds" ]; do
    ours
    theirs
    our_stages
    i=$((i + 1))
done
# row NAME THEIRS OURS
row() {
    echo "$2 $3" | awk -v name="$1" '{printf "%-34s %8.2f %8.2f %8.2f x\n", name, $1, $2, $1 / $2}'
}
printf '%-34s %8s %8s\n' 'medians, seconds' sd.cpp ours
row 'whole command' "$(median sd-cli)" "$(median qwen-edit)"
row 'whole command, the loading left out' "$(echo "$(median sd-cli) $(median loading)" | awk '{print $1 - $2}')" "$(median qwen-edit)"
for stage in text vae_encode forward vae_decode; do
    row "$stage" "$(median $stage)" "$(median ours_$stage)"
done
