#!/usr/bin/env bash
# Set-up: a virtual environment with this package in it.  bash launch/setup.sh [EXTRA]
#
#   EXTRA       dev: what tests and linters need as well
#   VENV=DIR    where (default: .venv of this checkout)
#   PYTHON=EXE  the Python to start from, 3.11 or later (default: python3)
#
# Does nothing when nothing changed since the last call. Two calls at once wait for each other; an
# environment whose installation was interrupted is made anew.
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

# What a finished installation is known by. It begins with the place, because the programs in a
# virtual environment stop working when it is moved.
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
        fail "needs Python 3.11 or later, and '$python' is none; name one: PYTHON=python3.12 bash ..."
    [[ ! -e $venv || -f $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
        fail "$venv exists and is no virtual environment; move it away or name another place (VENV)"
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
        fail "the installation failed; pip says why above, and the next call starts anew"
    echo "$wanted${extra:+ $extra}" >"$state"
    echo "set-up: done"
}

[[ -z $extra || $extra == dev ]] || fail "unknown extra '$extra'; the only one is dev"
if is_done; then exit; fi
# The lock is on a file that exists anyway, and is gone with the subshell (and all that it started).
(
    ! command -v flock >/dev/null || flock 9
    if ! is_done; then install; fi
) 9>>constraints.txt
