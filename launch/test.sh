#!/usr/bin/env bash
# Set-up and tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]          what needs no more than minutes
#   bash launch/test.sh --all [PYTEST ARGUMENTS]    the slow tests too: all but those that need a GPU
#                                                   or a CUDA build of torch (docs/performance.md)
#
#   VENV=DIR, PYTHON=EXE: see launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/test.sh
        exit
        ;;
    --all)
        shift
        set -- -m "not gpu and not cuda_build" "$@"
        ;;
esac

bash launch/setup.sh dev
# The tests start as many ranks as there are cores, and more.
OMP_NUM_THREADS=1 exec "${VENV:-.venv}/bin/python" -m pytest "$@"
