#!/usr/bin/env bash
# Write requirements.lock: every package of a release install, with version and hashes.
#
#   bash launch/lock.sh
#
#   UV=EXE   the uv program, which resolves for all platforms (python -m pip install uv)
#
# The extras dev and lm-eval (some forty packages) are not included. Versions are those of
# constraints.txt. Run it whenever constraints.txt or the dependencies in
# pyproject.toml change; tests/test_release.py compares them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv="${UV:-uv}"
command -v "$uv" >/dev/null || {
    echo "error: $uv: not found; python -m pip install uv, or name it (UV=...)" >&2
    exit 2
}
extras=(--extra data --extra gpu --extra hf --extra quantize --extra report)
extras+=(--extra remote --extra sentencepiece --extra tiktoken)
{
    echo "# Written by: bash launch/lock.sh. Install a release with exactly these files:"
    echo "#   python -m pip install --require-hashes -r requirements.lock"
    echo "#   python -m pip install --no-deps ."
    # Not to be taken from the machine that writes it: index addresses and paths.
    "$uv" pip compile pyproject.toml --quiet "${extras[@]}" --constraint constraints.txt \
        --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links
} >requirements.lock.partial
mv requirements.lock.partial requirements.lock
