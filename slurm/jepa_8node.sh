#!/usr/bin/env bash
#SBATCH --job-name=jepa
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@360
#
# Train on the nodes of a SLURM cluster (docs/slurm.md).
#
#   sbatch [SBATCH OPTIONS] slurm/jepa_8node.sh [CONFIG] [KEY=VALUE ...]
#   bash slurm/jepa_8node.sh [SBATCH OPTIONS] [CONFIG] [KEY=VALUE ...]
#
# The second form reads slurm/site.env before it submits: partition, account, time limit. Both forms
# read it in the job: modules, container, network interface. See slurm/site.env.example.
#
#   CONFIG             default: configs/debug.yaml
#   --dry-run          print the commands; submit and start nothing (before CONFIG)
#   MIN_NODES=N        continue on N or more nodes when some are lost (default: half of them)
#   NPROC_PER_NODE=N   ranks per node (default: its GPUs, or 1 if it has none)
#   VENV=DIR           virtual environment (default: .venv of this checkout, created if missing)
#   JEPA_LAMBDA=... and the other JEPA_* switches of docs/configuration.md
#
# Write SBATCH OPTIONS as --name=value. The run directory is run.dir=..., by default
# runs/<CONFIG>-<job id>. Before the time limit, and when it is preempted, the job saves a
# checkpoint and is requeued; it then resumes by itself. To stop a job, with a checkpoint:
# scancel --signal=USR1 JOB
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# ---------------------------------------------------------------- checkout and arguments

# For an array: this task only. (SLURM_JOB_ID of its last task would address the whole array.)
job="${SLURM_JOB_ID:-JOB}"
[[ ! ${SLURM_ARRAY_JOB_ID:-} ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

job_line() {
    scontrol show job "$job" | sed -n "s/^ *$1=//p"
}

job_word() {
    scontrol show job "$job" | grep -o "$1=[^ ]*" | cut -d= -f2-
}

# SLURM runs a copy of this script; the job remembers where it was submitted from.
find_checkout() {
    local command folder
    folder="$(dirname "${BASH_SOURCE[0]}")/.."
    if [[ ! -e $folder/launch/multinode.sh && ${SLURM_JOB_ID:-} ]]; then
        command="$(job_line Command)"
        folder="${command%%/slurm/jepa_8node.sh*}"
        [[ -e $folder/launch/multinode.sh ]] || folder="${SLURM_SUBMIT_DIR:-}"
    fi
    [[ -e $folder/launch/multinode.sh ]] ||
        fail "no checkout found around slurm/jepa_8node.sh on $(hostname): submit the script where" \
            "it is (no copy of it, not through stdin), on a file system that the nodes share"
    (cd "$folder" && pwd)
}

read_site_file() {
    [[ -e $checkout/slurm/site.env ]] || return 0
    # The shell functions of "module" fail under set -eu; -a exports the settings to the ranks.
    set +eu -a
    # shellcheck source=/dev/null
    source "$checkout/slurm/site.env"
    set -eu +a
}

checkout="$(find_checkout)"
SRUN_ARGS=() CONTAINER=()
read_site_file

options=() dry_run=''
while [[ ${1:-} == -* ]]; do
    case "$1" in
        -h | --help)
            sed -n '/^# Train/,/^set /{/^#/s/^# \{0,1\}//p}' "$checkout/slurm/jepa_8node.sh"
            exit
            ;;
        --dry-run) dry_run=yes ;;
        *)
            options+=("$1")
            [[ $1 != --nodes=* ]] || SLURM_JOB_NUM_NODES="${SLURM_JOB_NUM_NODES:-${1#--nodes=}}"
            ;;
    esac
    shift
done
config=configs/debug.yaml
if [[ $# -gt 0 && $1 != *=* ]]; then
    config="$1"
    shift
fi
overrides=("$@")

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# ---------------------------------------------------------------- outside of a job: submit

if [[ ! ${SLURM_JOB_ID:-} ]]; then
    if [[ $dry_run ]]; then
        env | grep '^SBATCH_' || true
    else
        command -v sbatch >/dev/null ||
            fail "no sbatch on $(hostname); without SLURM use launch/multinode.sh"
    fi
    script="$checkout/slurm/jepa_8node.sh"
    run sbatch ${options[@]+"${options[@]}"} "$script" "$config" ${overrides[@]+"${overrides[@]}"}
    [[ $dry_run ]] || exit 0
    echo "# in the job, where SLURM sets JOB, HEAD and the nodes:"
fi

# ---------------------------------------------------------------- in the job: nodes and commands

cd "$checkout"
[[ ! ${SLURM_JOB_ID:-} || ${#options[@]} == 0 ]] ||
    fail "${options[*]}: options of sbatch must come before slurm/jepa_8node.sh"
start="${SLURM_RESTART_COUNT:-0}"
nodes="${SLURM_JOB_NUM_NODES:-8}"
min_nodes="${MIN_NODES:-$(((nodes + 1) / 2))}"
ranks="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
python="${VENV:-.venv}/bin/python"
[[ $min_nodes =~ ^[1-9][0-9]{0,5}$ ]] || fail "MIN_NODES=$min_nodes: expected a number of nodes"
((min_nodes <= nodes)) || fail "MIN_NODES=$min_nodes: more than the $nodes nodes of this job"
[[ ! $ranks || $ranks =~ ^[1-9][0-9]{0,5}$ ]] ||
    fail "NPROC_PER_NODE=$ranks: expected a number of ranks"

run_dir=''
for override in ${overrides[@]+"${overrides[@]}"}; do
    [[ $override != run.dir=* ]] || run_dir="${override#run.dir=}"
done
if [[ ! $run_dir ]]; then
    run_dir="runs/$(basename "${config%.*}")-$job"
    overrides=("run.dir=$run_dir" ${overrides[@]+"${overrides[@]}"})
fi
run_path="${run_dir/#\~\//$HOME/}"
[[ $run_path == /* ]] || run_path="$PWD/$run_path"

node_fields() {
    scontrol show node --oneliner "$SLURM_JOB_NODELIST" | grep -o " $1=[^ ]*" | cut -d= -f2-
}

head=HEAD names=() same_machine=()
if [[ ${SLURM_JOB_ID:-} ]]; then
    readarray -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Use the address: the node's name may not be resolvable.
    head="$(SLURM_JOB_NODELIST="${names[0]}" node_fields NodeAddr)"
    if ((nodes > 1)) && [[ $(node_fields NodeHostName | sort -u | wc -l) == 1 ]]; then
        same_machine=(--same-machine)
    fi
    if [[ ! $ranks ]] && node_fields Gres | grep -q gpu; then
        fail "the nodes have GPUs and this job got none: sbatch --gpus-per-node=N, or" \
            "SBATCH_GPUS_PER_NODE=N in slurm/site.env (or NPROC_PER_NODE=N to do without)"
    fi
fi

# A step of a job with --exclusive gets only the GPUs that it requests.
gpus=()
[[ ! ${SLURM_GPUS_ON_NODE:-} ]] || gpus=("--gpus-per-node=$SLURM_GPUS_ON_NODE")
on_nodes() {
    local count="$1"
    shift
    run srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --no-kill --wait=0 ${gpus[@]+"${gpus[@]}"} \
        ${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} "$@"
}

# shellcheck disable=SC2016  # SLURM_NODEID is expanded on the node
agents=(
    "$nodes" bash -c 'exec bash launch/multinode.sh --node-rank "$SLURM_NODEID" "$@"' agent
    --nodes "$nodes" --min-nodes "$min_nodes" ${same_machine[@]+"${same_machine[@]}"}
    # Jobs on the same node need different ports; the kernel assigns those from 32768.
    --head "$head" --port "$((10000 + ${SLURM_JOB_ID:-0} % 20000))" --id "$job.$start"
    "$config" "${overrides[@]}"
)
[[ ! $ranks ]] || export NPROC_PER_NODE="$ranks"

# ---------------------------------------------------------------- checks before the start

warned='' ended_by_slurm=''
trap 'warned=yes' USR1
trap 'ended_by_slurm=yes' TERM
if [[ ! ${VENV:-} && ! -x $python && ${#CONTAINER[@]} == 0 ]]; then run bash launch/setup.sh; fi
if [[ $config == configs/debug.yaml && ! -e data/stdlib/meta.json ]]; then
    on_nodes 1 "$python" -m jepa_dist.data.prepare
fi
world=()
[[ ! $ranks ]] || world=("WORLD_SIZE=$((nodes * ranks))")
on_nodes 1 env ${world[@]+"${world[@]}"} "$python" -m jepa_dist.train "$config" "${overrides[@]}" \
    --check || exit 2
if [[ $dry_run ]]; then
    on_nodes "${agents[@]}"
    exit
fi

# ---------------------------------------------------------------- train

status() {
    sed -n "s/.*\"$1\": \"\{0,1\}\([^\",}]*\).*/\1/p" "$run_path/status.json" 2>/dev/null || true
}

status_version() {
    stat --format='%i %Y' "$run_path/status.json" 2>/dev/null || true
}

again() {
    local switches
    readarray -t switches < <(env | grep '^JEPA_' || true)
    printf '    cd %q && ' "$PWD"
    printf '%q ' ${switches[@]+"${switches[@]}"} sbatch "--nodes=$nodes" slurm/jepa_8node.sh \
        "$config" "${overrides[@]}"
    echo
}

say() {
    echo "[job $job, $(date '+%F %T')] $*"
}

say "start $((start + 1))"
cat <<TEXT
    config    $config ${overrides[*]}
    nodes     $nodes (continues on $min_nodes or more): ${names[*]}
    ranks     ${ranks:-as many as GPUs, or 1,} on each node; rendezvous at $head (${names[0]})
    run       $run_path
    watch     tail -f $(job_line StdOut)
              bash launch/tensorboard.sh $(dirname "$run_path")
    stop      scancel --signal=USR1 $job     (saves first)
TEXT

warn() {
    warned=yes
    say "approaching the time limit: the ranks save and stop"
    scancel --signal=USR1 "$job"
}
trap warn USR1
trap 'ended_by_slurm=yes' TERM
[[ ! $warned && ! $ended_by_slurm ]] || fail "the time limit (--time) left no time to start"

newest() {
    cat "$run_path/checkpoints/latest" 2>/dev/null || true
}

before="$(status_version)" newest_before="$(newest)"
on_nodes "${agents[@]}" &
agents_pid=$!
code=0
while kill -0 "$agents_pid" 2>/dev/null; do
    # wait also returns on every signal.
    wait "$agents_pid" && code=0 || code=$?
done

# ---------------------------------------------------------------- how it ended, how to resume

if [[ $ended_by_slurm ]]; then
    # srun has ended, but the ranks have SLURM's KillWait (by default 30 s) to save.
    for ((second = 0; second < 25; second++)); do
        [[ $(status state) == running ]] || break
        sleep 1
    done
fi
state="$(status state)" step="$(status step)"
[[ $code == 0 || $(status_version) != "$before" ]] || state=''
where="after step ${step:-0}"
[[ $(status saved) == true ]] || where+=", without a checkpoint of this step"
[[ $(status saved) == true || ! $(status checkpoint) =~ ^[0-9]+ ]] ||
    where+=" (newest checkpoint: step $(status checkpoint))"

requeue() {
    say "$1: $2 $where; requeued, resumes by itself"
    scontrol requeue "$job" || {
        say "SLURM does not requeue it; resume with"
        again
        exit 1
    }
    sleep 60 # SLURM kills this script
    exit
}

if [[ $state == finished ]]; then
    say "finished $where: $run_path"
elif [[ $(job_word JobState) != RUNNING ]]; then
    say "ended by SLURM, ${state:-not started}, $where; if it was not requeued, resume with"
    again
elif [[ $(job_word PreemptTime) == [0-9]* ]]; then
    requeue "preempted" "${state:-not started}"
elif [[ $warned && $(newest) != "$newest_before" ]]; then
    requeue "time limit" "${state:-not started}"
elif [[ $state == stopped && ! $warned ]]; then
    say "stopped $where ($(status reason)); resume with"
    again
else
    [[ ! $warned ]] || say "the time limit (--time) left no time for a single step"
    say "failed (exit code $code), ${state:-not started}, $where: $(status reason)"
    echo "    see the first error above, and $run_path/logs; then resume with"
    again
    exit 1
fi
