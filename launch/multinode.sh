#!/usr/bin/env bash
# Train on several hosts: the same command on every one of them.
#
#   bash launch/multinode.sh --nodes 8 --head HOST [OPTIONS] CONFIG [KEY=VALUE ...]
#
#   --nodes N         hosts that take part
#   --head HOST       name or address of one of them, for the rendezvous; as the others reach it
#   --min-nodes N     continue on N or more hosts when some are lost; lost hosts may rejoin
#                     (default: all)
#   --port PORT       on the head (default 29500)
#   --id NAME         job id: the same on all hosts, different for every job (default: jepa)
#   --node-rank N     this host's number; the head is 0 (default: derived from its address)
#   --same-machine    all "hosts" are this machine (for tests), where loopback addresses are valid
#   --dry-run         print the command and run nothing
#
#   NPROC_PER_NODE=N   ranks on this host (default: its GPUs, or 1 if it has none)
#   OMP_NUM_THREADS=N  threads per rank (default: cores / ranks)
#   VENV=DIR           virtual environment (default: .venv of this checkout)
#
# Relative paths are relative to the root of this checkout, which must have the same path on all
# hosts. run.dir must be on a shared file system. Ctrl-C on one host makes the ranks of all hosts
# save and stop (on the other hosts, torchrun exits within five minutes); the same command resumes
# the run.
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

[[ $nodes ]] || fail "--nodes: missing; expected the number of hosts"
[[ $head ]] || fail "--head: missing; expected the name or address of the rendezvous host"
[[ $# -gt 0 && $1 != *=* ]] || fail "CONFIG: missing; expected e.g. configs/debug.yaml"
min_nodes="${min_nodes:-$nodes}"
is_count "$nodes" || fail "--nodes $nodes: expected a number of hosts"
is_count "$min_nodes" || fail "--min-nodes $min_nodes: expected a number of hosts"
is_count "$port" || fail "--port $port: expected a port"
((min_nodes <= nodes)) || fail "--min-nodes $min_nodes: more than --nodes $nodes"
[[ ! $node_rank || $node_rank =~ ^[0-9]+$ ]] || fail "--node-rank $node_rank: expected a number"
if [[ $nodes != 1 && ! $same_machine ]]; then
    case "$head" in
        localhost* | 127.* | ::1) fail "--head $head: other hosts cannot reach this address;" \
            "use the name or address that they use" ;;
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
    fail "$venv: not a virtual environment on $(hostname); create .venv by bash launch/setup.sh" \
        "(or set VENV)"

# The address of this host's interface towards the head, to which other ranks connect. On clusters,
# host names often do not resolve, or resolve to loopback.
own_address() {
    "$venv/bin/python" - "$head" "$port" <<'PYTHON'
import socket
import sys

try:
    family, kind, _, _, address = socket.getaddrinfo(*sys.argv[1:], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # on a datagram socket: selects a route, sends nothing
        print(probe.getsockname()[0])
except OSError as error:
    sys.exit(f"error: --head {sys.argv[1]}: not reachable from this host: {error}")
PYTHON
}
if [[ $dry_run ]]; then address=ADDRESS; else address="$(own_address)" || exit 2; fi
if [[ $nodes != 1 && ! $same_machine && $address == 127.* ]]; then
    fail "--head $head: resolves to a loopback address on this host, which other hosts cannot" \
        "reach; use this host's address in the network"
fi

# If another process listens on the port, torchrun would wait for it for a minute. (Not checked with
# --same-machine, where that process may be the agent of the first host.)
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
    port_is_free || fail "--port $port: is in use on this host, perhaps by another job; stop that" \
        "job, or use another --port on all hosts"
fi

# A host without keep-alive for 3 x 5 s is excluded from the next rendezvous; the others wait
# last_call_timeout for late hosts. read_timeout exceeds the 30 s that a rank has to exit.
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
    # torchrun kills ranks this long after a stop signal (torch 2.11: always after 30 s). Ranks exit
    # earlier, within checkpoint.grace_seconds.
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-330}"
    "$venv/bin/python" -m jepa_dist.process.agent
    --nnodes="$min_nodes:$nodes"
    --nproc-per-node="$ranks"
    # c10d's rendezvous, listening at --local-addr only (SECURITY.md).
    --rdzv-backend=bound
    --rdzv-endpoint="$head:$port"
    --rdzv-id="$id"
    --rdzv-conf="$(IFS=, && echo "${rendezvous[*]}")"
    --local-addr="$address"
    --max-restarts=3
    --monitor-interval=0.5
    # All of them make the ranks save and stop; SIGUSR1 would kill torchrun if it were not listed.
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    -m jepa_dist.train "$@"
)

if [[ $dry_run ]]; then
    printf '%q ' "${agent[@]}"
    echo
    exit
fi
exec "${agent[@]}"
