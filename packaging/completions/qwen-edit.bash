# bash completion of qwen-edit; made by: qwen-edit help --completions bash
_qwen_edit() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="edit serve worker info pull quantize verify doctor list rm prune bench help --help --version"
    else
        case $prev in
        --image|-i) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --prompt|-p) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --prompt-file) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --output|-o) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --batch) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --server) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --negative|-n) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --seed|-S) words="random"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --steps|-s) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --true-cfg-scale) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --guidance-scale) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --num-images) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --max-side) words="none"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --width|-W) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --height|-H) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --ref-area) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --output-format) words="png jpeg webp"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --quality) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --preview) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --model) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --transformer) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --text-encoder) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --mmproj) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --vae) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --variant) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --device) words="auto cpu cuda"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --precision) words="auto f32 bf16 int8"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --threads) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --nice) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --memory-limit) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --lora) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --lora-dir) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --schedule) words="auto model lightning"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --cache) words="off balanced fast"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --local-dir) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --revision) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --include) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --exclude) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --endpoint) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --cache-dir) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --jobs|-j) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --retries) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --headroom-gib) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --host) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --port) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --api-port) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --gpus) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --workers) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --state-dir) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --output-dir) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --api-key) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --api-key-file) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --cors-origin) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --trusted-proxy) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --queue-size) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --max-images) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --max-connections) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --max-body-memory) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --sync-timeout) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --keep) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --keep) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --to) words="q8_0 q6_k q5_k q4_k q4_0 int8 fp8"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --importance) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --collect-importance) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --hang-limit) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --allow-url-cidr) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --log-format) words="text json"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --worker-program) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --repeats) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --references) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --only) words=""; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --config) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --completions) words="bash zsh"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --backend) words="cpu ref onednn"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --positions) words="3d sequential"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --noise) words="auto f32 bf16"; COMPREPLY=($(compgen -W "$words" -- "$cur")); return ;;
        --inject) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        esac
        case ${COMP_WORDS[1]} in
        edit) words=" --image --prompt --prompt-file --output --batch --server --negative --seed --force-seed --steps --true-cfg-scale --guidance-scale --num-images --max-side --width --height --ref-area --keep-size --no-keep-size --output-format --quality --preview --dry-run --no-metadata --model --transformer --text-encoder --mmproj --vae --variant --device --precision --threads --nice --memory-limit --lora --schedule --cache --headroom-gib --api-key --api-key-file --collect-importance --quiet --verbose --json --config --help --version --backend --positions --noise --inject" ;;
        serve) words=" --model --transformer --text-encoder --mmproj --vae --variant --device --precision --threads --nice --memory-limit --lora --lora-dir --cache --headroom-gib --host --port --api-port --gpus --workers --state-dir --output-dir --api-key --api-key-file --cors-origin --trusted-proxy --queue-size --max-images --max-connections --max-body-memory --sync-timeout --keep --hang-limit --no-image-url --allow-url-cidr --reject-while-loading --log-format --worker-program --config --help --version --backend" ;;
        worker) words=" --model --transformer --text-encoder --mmproj --vae --variant --device --precision --threads --nice --memory-limit --lora --lora-dir --cache --help --version --backend" ;;
        info) words=" --json --help --version" ;;
        pull) words=" --dry-run --local-dir --revision --include --exclude --endpoint --cache-dir --jobs --retries --recheck --quiet --verbose --json --config --help --version" ;;
        quantize) words=" --threads --keep --to --importance --quiet --verbose --json --help --version" ;;
        verify) words=" --revision --include --exclude --cache-dir --no-hash --quiet --verbose --json --help --version" ;;
        doctor) words=" --model --endpoint --headroom-gib --json --config --help --version" ;;
        list) words=" --cache-dir --json --help --version" ;;
        rm) words=" --dry-run --revision --cache-dir --yes --quiet --json --help --version" ;;
        prune) words=" --dry-run --cache-dir --detached --quiet --json --help --version" ;;
        bench) words=" --image --prompt --negative --steps --true-cfg-scale --max-side --width --height --ref-area --model --precision --threads --nice --memory-limit --lora --schedule --cache --repeats --references --only --cold --no-ops --no-roof --quiet --json --config --help --version --backend" ;;
        help) words="edit serve worker info pull quantize verify doctor list rm prune bench help  --help --version --man --completions" ;;
        esac
    fi
    case $cur in
    -*) COMPREPLY=($(compgen -W "$words" -- "$cur")) ;;
    *)
        if [ "$COMP_CWORD" -eq 1 ] || [ "${COMP_WORDS[1]}" = help ]; then
            COMPREPLY=($(compgen -W "$words" -- "$cur"))
        else
            COMPREPLY=($(compgen -f -- "$cur"))
        fi ;;
    esac
}
complete -o filenames -F _qwen_edit qwen-edit
