#!/usr/bin/env bash
# Every benchmark of a configuration, and what its presets do to the picture, into one folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

PRESETS=(reference quality balanced speed low_memory)
PARTS=(all quality reference compare roofline)
HELP="usage: scripts/run_benchmarks.sh [--quick] [--config NAME] [--model-path FOLDER] [--set KEY=VALUE]
                                 [--only PART] [--prompts FILE] [--out FOLDER] [--help]

Runs 'orchestrator bench all' over the presets (steady state, switches, throughput, starts, scaling, roofline, the
straightforward pipeline, presets in turn, ablations), then 'orchestrator quality'. Full sizes take hours.

  --quick              fewer blocks and rounds: minutes on pocket
  --config NAME        a shipped name or a YAML file (default: pocket); longlive-1.3b has random weights without
  --model-path FOLDER  the folder with the published weights
  --set KEY=VALUE      changes one key, for every part; repeatable
  --only PART          of ${PARTS[*]}; repeatable (default: all, quality, which hold the others)
  --prompts FILE       JSON lines for quality; else the stories of the embedded model
  --out FOLDER         where results go (default: out/benchmarks/CONFIG-TIME)
  --help               this

Exit code 1: a part failed, or a preset's pictures missed quality's gate; all others were still run."

main() {
    local config=pocket model_path='' prompts='' out='' part
    local -a quick=() blocks=() given=() settings=() only=() failed=()
    while (($#)); do
        case $1 in
            --quick) quick=(--quick) blocks=(--blocks 4) ;;
            --config | --model-path | --set | --only | --prompts | --out)
                (($# > 1)) || fail "$1: found nothing, expected a value"
                case $1 in
                    --config) config=$2 ;;
                    --model-path) model_path=$2 ;;
                    --set) given+=(--set "$2") ;;
                    --only) only+=("$2") ;;
                    --prompts) prompts=$2 ;;
                    --out) out=$2 ;;
                esac
                shift
                ;;
            --help | -h) printf '%s\n' "$HELP"; return ;;
            *) fail "found $1; --help lists the options" ;;
        esac
        shift
    done
    ((${#only[@]})) || only=(all quality)
    for part in "${only[@]}"; do
        [[ " ${PARTS[*]} " == *" $part "* ]] || fail "--only: found $part, expected one of ${PARTS[*]}"
    done
    if [[ -n $model_path ]]; then
        [[ -d $model_path ]] || fail "--model-path: $model_path: no such folder"
        settings=(--set "model.path=$(cd "$model_path" && pwd)")
    elif [[ $config == longlive-1.3b ]]; then
        settings=(--set model.random_weights=true)
    fi
    settings+=("${given[@]}")
    out=${out:-out/benchmarks/$(basename "$config" .yaml)-$(date -u +%Y%m%dT%H%M%SZ)}
    "$here/scripts/setup"
    mkdir -p "$out"
    for part in "${only[@]}"; do
        say "$part"
        "run_$part" || failed+=("$part")
    done
    say "results in $out"
    ((${#failed[@]} == 0)) || { say "failed: ${failed[*]}"; exit 1; }
}

say() {
    printf 'run_benchmarks: %s\n' "$1" >&2
}

fail() {
    say "$1"
    exit 2
}

bench() {
    "$here/.venv/bin/orchestrator" bench "$@" --config "$config" "${settings[@]}" "${quick[@]}" --out "$out/$part"
}

run_all() { bench all "${PRESETS[@]}" --profile; }
run_reference() { bench reference; }
run_compare() { bench compare "${PRESETS[@]}"; }
run_roofline() { bench roofline; }

# All other presets against the definition.
run_quality() {
    local -a sides=("${PRESETS[@]:1}")
    sides=("${sides[@]/#/preset=}")
    "$here/.venv/bin/orchestrator" quality "$config" "${sides[@]}" --preset-a reference "${settings[@]}" \
        "${blocks[@]}" ${prompts:+--prompts "$prompts"} --out "$out/quality"
}

main "$@"
