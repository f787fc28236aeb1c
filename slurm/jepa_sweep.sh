#!/usr/bin/env bash
#SBATCH --job-name=jepa-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@360
#
# Train the members of a sweep (docs/sweeps.md) as a job array, one node each.
#
#   bash slurm/jepa_sweep.sh [SBATCH OPTIONS] [FILE] [KEY=VALUE ...]
#   sbatch --array=0-11%4 [SBATCH OPTIONS] slurm/jepa_sweep.sh [FILE] [KEY=VALUE ...]
#
# The first form checks FILE, counts its members, reads slurm/site.env and submits the second.
#
#   FILE            default: configs/sweeps/jepa_36m.yaml
#   KEY=VALUE       applied to all members; run.dir: the folder of their run directories
#   --dry-run       print the commands; submit and start nothing (before FILE)
#   MAX_RUNNING=N   maximum number of members that run at the same time (default 4)
#   NPROC_PER_NODE, MIN_NODES, VENV: see slurm/jepa_8node.sh
#
# Write SBATCH OPTIONS as --name=value. Each member is a job as in slurm/jepa_8node.sh: it is saved
# and requeued before the time limit and when preempted, and resumes by itself. The same command,
# run again, resumes the members that are not finished.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# SLURM runs a copy of this script; the job remembers where it was submitted from.
find_checkout() {
    local command folder
    folder="$(dirname "${BASH_SOURCE[0]}")/.."
    if [[ ! -e $folder/launch/sweep.py && ${SLURM_JOB_ID:-} ]]; then
        command="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)"
        folder="${command%%/slurm/jepa_sweep.sh*}"
        [[ -e $folder/launch/sweep.py ]] || folder="${SLURM_SUBMIT_DIR:-}"
    fi
    [[ -e $folder/launch/sweep.py ]] ||
        fail "no checkout found around slurm/jepa_sweep.sh on $(hostname): submit the script where" \
            "it is (no copy of it, not through stdin), on a file system that the nodes share"
    (cd "$folder" && pwd)
}

read_site_file() {
    [[ -e slurm/site.env ]] || return 0
    # The shell functions of "module" fail under set -eu; -a exports the settings to the ranks.
    set +eu -a
    # shellcheck source=/dev/null
    source slurm/site.env
    set -eu +a
}

checkout="$(find_checkout)"
submitted_from="$PWD"
cd "$checkout"
SRUN_ARGS=() CONTAINER=()
read_site_file

options=() dry_run=''
while [[ ${1:-} == -* ]]; do
    case "$1" in
        -h | --help)
            sed -n '/^# Train/,/^set /{/^#/s/^# \{0,1\}//p}' slurm/jepa_sweep.sh
            exit
            ;;
        --dry-run) dry_run=yes ;;
        *) options+=("$1") ;;
    esac
    shift
done
file=configs/sweeps/jepa_36m.yaml
if [[ $# -gt 0 && $1 != *=* ]]; then
    file="$1"
    shift
fi
sweep() {
    local command="$1"
    shift
    "${on_node[@]}" ${CONTAINER[@]+"${CONTAINER[@]}"} "${VENV:-.venv}/bin/python" \
        launch/sweep.py "$command" "$file" "$@"
}

# ---------------------------------------------------------------- in the job: one member

if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    [[ ${#options[@]} == 0 ]] ||
        fail "${options[*]}: options must come before slurm/jepa_sweep.sh"
    on_node=(srun --nodes=1 --ntasks=1 ${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"})
    member="$(sweep member "$SLURM_ARRAY_TASK_ID" "$@")" || exit 2
    readarray -t arguments <<<"$member"
    # Sourced, so that it is read at once: bash reads a script while it runs, and the checkout may
    # change in the meantime.
    source slurm/jepa_8node.sh "${arguments[@]}"
    exit
fi

# ---------------------------------------------------------------- outside of a job: submit all

[[ ${MAX_RUNNING:-4} =~ ^[1-9][0-9]{0,5}$ ]] ||
    fail "MAX_RUNNING=$MAX_RUNNING: expected a number of members"
on_node=(env)
members="$(sweep list "$@")" || exit 2
count="$(wc -l <<<"$members")"
submit=(
    sbatch --array="0-$((count - 1))%${MAX_RUNNING:-4}" ${options[@]+"${options[@]}"}
    "$checkout/slurm/jepa_sweep.sh" "$file" "$@"
)
if [[ ${SLURM_JOB_ID:-} ]]; then
    fail "this is a job array, one task for each of $count members: $(printf '%q ' "${submit[@]}")"
fi
if [[ $dry_run ]]; then
    env | grep '^SBATCH_' || true
    printf '%q ' "${submit[@]}"
    printf '\n# in the jobs, by array index:\n'
    sed 's/^\([0-9]*\) */\1  bash slurm\/jepa_8node.sh /' <<<"$members"
    exit
fi
cd "$submitted_from" # where sbatch puts the output
"${submit[@]}"
printf 'results so far: python launch/sweep.py results '
printf '%q ' "$file" "$@"
echo
