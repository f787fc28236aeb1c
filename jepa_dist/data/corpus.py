"""Which files make a corpus: the default one, or what the user names."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jepa_dist.errors import UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    ``name`` identifies it whatever machine it lies on: the path below the folder that was named,
    or the bare file name. ``split`` None leaves the choice to the hash of each document.
    """

    path: Path
    name: str
    size: int
    split: Split | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document of its own."""
        return self.path.suffix == ".jsonl"


def default_corpus() -> tuple[str, list[InputFile]]:
    """The text of the running Python's standard library, one document per file: (name, files).

    Raises:
        UserError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        InputFile(path, path.relative_to(root).as_posix(), path.stat().st_size)
        for path in root.rglob("*.py")
        if path.is_file() and _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(
            f"{root}: this Python has no library sources to train on; name your own text: "
            "python -m jepa_dist.data.prepare INPUT --out DIR"
        )
    name = f"standard library of Python {platform.python_version()}"
    return name, sorted(files, key=lambda file: file.name)


def user_files(inputs: Iterable[str], split: Split | None) -> list[InputFile]:
    """The .txt and .jsonl files that the user's inputs stand for, each folder in sorted order.

    Raises:
        UserError: a missing input, one of another kind, or a folder without such files.
    """
    return [file for item in inputs for file in _expand(Path(item), split)]


def _expand(path: Path, split: Split | None) -> list[InputFile]:
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file()]
        if not found:
            raise UserError(f"{path}: found no .txt or .jsonl file in this folder")
        named = sorted((p.relative_to(path).as_posix(), p) for p in found)
        return [InputFile(p, name, p.stat().st_size, split) for name, p in named]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: expected a .txt or .jsonl file, or a folder of them")
    return [InputFile(path, path.name, path.stat().st_size, split)]


def listing(files: Sequence[InputFile]) -> dict[str, Any]:
    """What identifies files without reading them: number, bytes, digest of names and sizes."""
    text = "\n".join(f"{file.split} {file.name} {file.size}" for file in files)
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return {"files": len(files), "bytes": sum(file.size for file in files), "digest": digest}
