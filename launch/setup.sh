#!/usr/bin/env bash
# Set-up: a virtual environment with this package in it.  bash launch/setup.sh [EXTRA]
#
#   EXTRA       dev: also install what tests and linters need
#   VENV=DIR    the virtual environment (default: .venv of this checkout)
#   PYTHON=EXE  the base Python, 3.11 or later (default: python3)
#
# Does nothing if nothing has changed since the last call. Concurrent calls wait for each other; an
# interrupted installation is completed by the next call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
venv="${VENV:-$PWD/.venv}"
[[ $venv == /* ]] || venv="$PWD/$venv"
python="${PYTHON:-python3}"

fail() {
    echo "set-up: $1" >&2
    exit 1
}

# Identifies a complete installation. It includes the path, because the programs in a virtual
# environment stop working when it is moved.
state="$venv/.jepa_dist"
wanted="$venv $(cat pyproject.toml constraints.txt | cksum)"

is_done() {
    local found=""
    [[ -f $state && -x $venv/bin/python ]] && found="$(<"$state")"
    [[ $found == "$wanted dev" || ($found == "$wanted" && -z $extra) ]]
}

is_broken() {
    [[ -f $state && $(<"$state") != "$venv "* ]] || ! "$venv/bin/python" -m pip --version
} &>/dev/null

create() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "'$python': expected Python 3.11 or later; fix: PYTHON=python3.12 bash ..."
    [[ ! -e $venv || -f $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
        fail "$venv exists and is not a virtual environment; move it away or change VENV"
    echo "set-up: creating $venv"
    "$python" -m venv --clear "$venv" ||
        fail "'$python' cannot create $venv (on Debian: apt-get install python3-venv)"
}

install() {
    if is_broken; then create; fi
    echo "set-up: installing jepa_dist${extra:+ [$extra]} (the first time this takes minutes)"
    echo interrupted >"$state"
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet)
    "$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extra:+[$extra]}" ||
        fail "the installation failed; see pip's message above; the next call tries again"
    echo "$wanted${extra:+ $extra}" >"$state"
    echo "set-up: done"
}

[[ -z $extra || $extra == dev ]] || fail "unknown extra '$extra'; expected dev"
if is_done; then exit; fi
# Locks a file that always exists; the lock is released when the subshell and its children exit.
(
    ! command -v flock >/dev/null || flock 9
    if ! is_done; then install; fi
) 9>>constraints.txt
