#!/usr/bin/env bash
# Train on this machine, in minutes: set-up, default corpus, two ranks.
#
#   bash launch/debug.sh [--dry-run] [KEY=VALUE ...]      e.g. train.steps=100 jepa.lambda=0.1
#
#   --dry-run          print the commands and run none
#   NPROC_PER_NODE=N   ranks (default 2)
#   OMP_NUM_THREADS=N  threads per rank (default: cores / ranks)
#   JEPA_LAMBDA=... and the other JEPA_* switches of docs/configuration.md
#   VENV=DIR, PYTHON=EXE: see launch/setup.sh
#
# The run directory is run.dir=..., by default the first of runs/debug, runs/debug-2, ... that does
# not exist. Relative paths are relative to the root of this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/debug.yaml
venv="${VENV:-.venv}"
ranks="${NPROC_PER_NODE:-2}"

dry_run=
run_dir=
overrides=()
for argument; do
    case "$argument" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/debug.sh
            exit
            ;;
        --dry-run) dry_run=yes ;;
        *)
            [[ $argument != run.dir=* ]] || run_dir="${argument#*=}"
            overrides+=("$argument")
            ;;
    esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "error: NPROC_PER_NODE=$ranks: expected a number of ranks" >&2
    exit 2
}

first_free() {
    local dir="$1" number=1
    while [[ -e $dir ]]; do
        number=$((number + 1))
        dir="$1-$number"
    done
    echo "$dir"
}

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

[[ $run_dir ]] || overrides=("run.dir=$(first_free runs/debug)" "${overrides[@]}")
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

train=(
    env OMP_NUM_THREADS="$OMP_NUM_THREADS"
    # Nothing listens beyond this machine (SECURITY.md).
    "$venv/bin/torchrun" --rdzv-backend=loopback --nproc-per-node="$ranks"
    -m jepa_dist.train "$config" "${overrides[@]}"
)

run bash launch/setup.sh
[[ -e data/stdlib/meta.json ]] || run "$venv/bin/python" -m jepa_dist.data.prepare
if [[ ! $dry_run ]]; then
    # Errors in configuration, data and run directory are one line each here, without torchrun's
    # report around them.
    WORLD_SIZE="$ranks" "$venv/bin/python" -m jepa_dist.train "$config" "${overrides[@]}" --check
    exec "${train[@]}"
fi
run "${train[@]}"
