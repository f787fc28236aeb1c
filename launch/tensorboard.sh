#!/usr/bin/env bash
# Start TensorBoard for the runs in a folder; reachable from this machine only, by default.
#
#   bash launch/tensorboard.sh [--dry-run] [DIR]      DIR: a folder with run directories (runs)
#
#   --dry-run   print the command and do not run it
#   PORT=N      use exactly this port (default: 6006, or the next free one)
#   HOST=ADDR   address to listen on (default: 127.0.0.1; 0.0.0.0 exposes the runs to the network)
#   VENV=DIR    see launch/setup.sh
#
# A relative DIR is relative to the root of this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VENV:-.venv}"
host="${HOST:-127.0.0.1}"
first_port=6006
most_ports=100

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run=
runs=
for argument; do
    case "$argument" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/tensorboard.sh
            exit
            ;;
        --dry-run) dry_run=yes ;;
        -*) fail "$argument: unknown option; --help shows the usage" ;;
        *)
            [[ -z $runs ]] || fail "$runs and $argument: give one folder that contains both"
            runs="$argument"
            ;;
    esac
done
runs="${runs:-runs}"
[[ -d $runs ]] || fail "$runs: no such folder; name the one that holds the run directories"
[[ -x $venv/bin/tensorboard ]] ||
    fail "$venv/bin/tensorboard: not installed; bash launch/setup.sh installs it (VENV=$venv)"

is_free() {
    "$venv/bin/python" - "$host" "$1" <<'PYTHON'
import socket
import sys

host, port = sys.argv[1], int(sys.argv[2])
try:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
except OSError as error:
    sys.exit(f"error: cannot listen at {host}:{port}: {error.strerror}")
PYTHON
}

first_free() {
    local port
    is_free 0 || fail "HOST=$host: expected an address of this machine"
    for ((port = first_port; port < first_port + most_ports; port++)); do
        if is_free "$port" 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    fail "no port from $first_port on is free on $host; name one (PORT=...)"
}

if [[ ${PORT:-} ]]; then
    [[ $PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -lt 65536 ]] || fail "PORT=$PORT: expected a port"
    is_free "$PORT" || fail "PORT=$PORT: name another port, or none to get one that is free"
    port="$PORT"
else
    port="$(first_free)"
fi

command=("$venv/bin/tensorboard" --logdir "$runs" --host "$host" --port "$port")
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
echo "runs in $runs: http://$host:$port"
if [[ $host == 127.* || $host == localhost ]]; then
    here="$(id -un)@$(hostname -f 2>/dev/null || hostname)"
    echo "from your own machine: ssh -N -L $port:$host:$port $here"
fi
exec "${command[@]}"
