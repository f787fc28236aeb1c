#!/usr/bin/env bash
# Set up and run the tests (docs/testing.md).
#
#   bash launch/test.sh [PYTEST ARGUMENTS]          the default tier: minutes
#   bash launch/test.sh --all [PYTEST ARGUMENTS]    slow and SLURM tiers too: all but those that
#                                                   need a GPU or a CUDA build of torch
#
#   VENV=DIR, PYTHON=EXE: see launch/setup.sh
#
# Four workers run one test file each; -n 0 runs one test after the other in this process.
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
# Else each of the hundred started ranks would compile the sources of this package again.
unset PYTHONDONTWRITEBYTECODE
# More workers than cores, because many tests wait: for SLURM, for restarts, for time limits. The
# tests start as many ranks as there are cores, and more, so each process gets one thread.
OMP_NUM_THREADS=1 exec "${VENV:-.venv}/bin/python" -m pytest \
    -n 4 --dist loadfile --no-loadscope-reorder --durations 25 "$@"
