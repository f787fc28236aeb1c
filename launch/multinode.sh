#!/usr/bin/env bash
# Train on several hosts: the same command on every one of them.
#
#   bash launch/multinode.sh --nodes 8 --head HOST [OPTIONS] CONFIG [KEY=VALUE ...]
#
#   --nodes N         hosts that take part
#   --head HOST       name or address of one of them, where all meet: as the others reach it
#   --min-nodes N     go on with as few as these when hosts are lost, and with all again when they
#                     are back (default: all)
#   --port PORT       on the head (default 29500)
#   --id NAME         the same on all hosts, another one for every job (default: jepa)
#   --node-rank N     this host's number, from 0, the head (default: found by its name)
#   --same-machine    the "hosts" are one machine: a rehearsal, the only case for a loopback address
#   --dry-run         print the command and run nothing
#
#   NPROC_PER_NODE=N   ranks on this host (default: its GPUs, or 1 if it has none)
#   OMP_NUM_THREADS=N  threads per rank (default: the cores, shared out)
#   VENV=DIR           virtual environment (default: .venv of this checkout)
#
# Relative paths are seen from the top folder of this checkout, which must be the same on all hosts,
# as must be run.dir: on a shared file system. Ctrl-C on one host saves and stops the ranks of all
# (where it was not pressed, torchrun ends within five minutes); the same command goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

nodes='' head='' min_nodes='' port=29500 id=jepa node_rank='' same_machine='' dry_run=''
while (($#)); do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/multinode.sh
            exit
            ;;
        --same-machine) same_machine=yes ;;
        --dry-run) dry_run=yes ;;
        --nodes | --head | --min-nodes | --port | --id | --node-rank)
            (($# > 1)) || fail "$1: a value is missing"
            name="${1#--}"
            printf -v "${name//-/_}" %s "$2"
            shift
            ;;
        -*) fail "$1: unknown option; --help lists them" ;;
        *) break ;;
    esac
    shift
done

is_count() {
    [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]
}

count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

[[ $nodes ]] || fail "--nodes: how many hosts take part?"
[[ $head ]] || fail "--head: on which host do they meet?"
[[ $# -gt 0 && $1 != *=* ]] || fail "which configuration? e.g. configs/debug.yaml"
min_nodes="${min_nodes:-$nodes}"
is_count "$nodes" || fail "--nodes $nodes: expected a number of hosts"
is_count "$min_nodes" || fail "--min-nodes $min_nodes: expected a number of hosts"
is_count "$port" || fail "--port $port: expected a port"
((min_nodes <= nodes)) || fail "--min-nodes $min_nodes: more than --nodes $nodes"
[[ ! $node_rank || $node_rank =~ ^[0-9]+$ ]] || fail "--node-rank $node_rank: expected a number"
if [[ $nodes != 1 && ! $same_machine ]]; then
    case "$head" in
        localhost* | 127.* | ::1) fail "--head $head: only this host itself reaches that address;" \
            "give the name or address that the others use" ;;
    esac
fi

ranks="${NPROC_PER_NODE:-$(count_gpus)}"
[[ $ranks != 0 || ${NPROC_PER_NODE:-} ]] || ranks=1
is_count "$ranks" || fail "NPROC_PER_NODE=$ranks: expected a number of ranks"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
venv="${VENV:-.venv}"
[[ $dry_run || -x $venv/bin/python ]] ||
    fail "$venv is no virtual environment on $(hostname): bash launch/setup.sh makes .venv" \
        "(or set VENV)"

# The address of this host on the way to the head: what other ranks are told to connect to. Host
# names that do not resolve, or that resolve to loopback, are common on clusters.
own_address() {
    "$venv/bin/python" - "$head" "$port" <<'PYTHON'
import socket
import sys

try:
    family, kind, _, _, address = socket.getaddrinfo(*sys.argv[1:], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: chooses a route, sends nothing
        print(probe.getsockname()[0])
except OSError as error:
    sys.exit(f"error: --head {sys.argv[1]}: not reachable from this host: {error}")
PYTHON
}
if [[ $dry_run ]]; then address=ADDRESS; else address="$(own_address)" || exit 2; fi

# torchrun would wait a minute for whatever listens there. (On one machine that plays several hosts
# it is the first of them.)
port_is_free() {
    "$venv/bin/python" - "$address" "$port" <<'PYTHON'
import errno
import socket
import sys

family, kind, _, _, address = socket.getaddrinfo(*sys.argv[1:], type=socket.SOCK_STREAM)[0]
with socket.socket(family, kind) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(address)
        probe.listen()
    except OSError as error:
        sys.exit(error.errno == errno.EADDRINUSE)
PYTHON
}
is_head() {
    [[ $node_rank ]] && ((node_rank == 0)) && return
    [[ ! $node_rank ]] && "$venv/bin/python" -c '
import socket, sys
head = {found[4][0] for found in socket.getaddrinfo(sys.argv[1], None)}
sys.exit(sys.argv[2] not in head)' "$head" "$address"
}
if [[ ! $dry_run && ! $same_machine ]] && is_head; then
    port_is_free || fail "--port $port: is in use on this host, perhaps by another job; end that" \
        "one, or give --port another number on all hosts"
fi

# A host that was not heard of for 5 s x 3 takes no part in the next meeting; those that remain wait
# last_call_timeout for late ones. read_timeout is above the 30 s that torchrun gives a rank to end.
rendezvous=(
    join_timeout=600 last_call_timeout=15 close_timeout=10 read_timeout=60
    keep_alive_interval=5 keep_alive_max_attempt=3
)
case "$node_rank" in
    "") ;;
    0) rendezvous+=(is_host=1) ;;
    *) rendezvous+=(is_host=0) ;;
esac
agent=(
    env
    OMP_NUM_THREADS="$OMP_NUM_THREADS"
    PYTHONUNBUFFERED=1
    # torchrun kills ranks this long after a stop signal (torch 2.11: always after 30 s). They leave
    # before, by checkpoint.grace_seconds.
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-330}"
    "$venv/bin/python" -m jepa_dist.agent
    --nnodes="$min_nodes:$nodes"
    --nproc-per-node="$ranks"
    --rdzv-backend=c10d
    --rdzv-endpoint="$head:$port"
    --rdzv-id="$id"
    --rdzv-conf="$(IFS=, && echo "${rendezvous[*]}")"
    --local-addr="$address"
    --max-restarts=3
    --monitor-interval=0.5
    # All of them make the ranks save and stop; without SIGUSR1 in the list torchrun dies of it.
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    -m jepa_dist.train "$@"
)

if [[ $dry_run ]]; then
    printf '%q ' "${agent[@]}"
    echo
    exit
fi
exec "${agent[@]}"
