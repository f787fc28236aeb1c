"""The files of a corpus: the default one, or the user's."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jepa_dist.errors import UserError
from jepa_dist.files import open_regular

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
Kind = Literal["text", "lines", "json", "parquet"]
_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "lines",
    ".json": "json",
    ".parquet": "parquet",
    **{f"{inner}{outer}": "lines" for inner in (".jsonl", ".json") for outer in (".gz", ".zst")},
}
SUFFIXES = ".txt, .jsonl, .json, .jsonl.gz, .jsonl.zst and .parquet"
# Files in folders of data sets that are not data.
_NO_DATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "meta.json"),
}
_BLOCK = 1 << 20

# Encodings recognized by their first bytes, or because every other byte is 0.
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    ``name`` identifies it on any machine: the path below the folder that the user named, or the
    bare file name.
    """

    path: Path
    name: str
    size: int
    split: Split | None = None
    """The split of all its documents; None: a hash decides for each of them."""
    split_by: Literal["text", "name"] = "text"
    """The hash input: the document's text, or the file's name and the document's offset in it."""

    @property
    def kind(self) -> Kind:
        """Kind of the contents: text, JSON lines (compressed or not), or records."""
        return _kind(self.path) or "text"

    @property
    def is_compressed(self) -> bool:
        """Whether it can only be read from its start."""
        return self.path.suffix.lower() in (".gz", ".zst")

    @property
    def is_split_by_text(self) -> bool:
        """Whether the text of each document decides its split, so that equal ones share it."""
        return self.split is None and self.split_by == "text"


def _kind(path: Path) -> Kind | None:
    """Return the kind of a file by its name; None if it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return next((_KINDS[s] for s in ("".join(suffixes), path.suffix.lower()) if s in _KINDS), None)


@dataclass
class Skipped:
    """Numbers of files and folders that were found but not read, by kind."""

    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one line; empty if nothing was skipped."""
        if not self.kinds:
            return ""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common(12))
        more = f" and {len(self.kinds) - 12} more kinds" if len(self.kinds) > 12 else ""
        return f"not read: {kinds}{more} (only {SUFFIXES} files are)"


def default_corpus() -> tuple[str, list[InputFile]]:
    """Return name and files of the running Python's standard library, one document per file.

    Its documents are split by name, as they were before documents were split by text.

    Raises:
        UserError: this Python has no sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        InputFile(path, path.relative_to(root).as_posix(), path.stat().st_size, split_by="name")
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


def user_files(inputs: Iterable[str], split: Split | None, skipped: Skipped) -> list[InputFile]:
    """Return the files of the user's inputs, each folder in sorted order.

    Hidden files and linked folders are skipped like files of other kinds.

    Args:
        inputs: Files and folders.
        split: Their split, if it is known.
        skipped: Records what is not read.

    Raises:
        UserError: a missing input, one of another kind, a folder without such files or that
            cannot be listed, a link to a missing file, or text that is not in UTF-8 but in
            UTF-16 or UTF-32.
    """
    files = [file for item in inputs for file in _expand(item, split, skipped)]
    for file in files:
        if file.kind != "parquet" and not file.is_compressed:
            _check_encoding(file)
    return files


def _expand(item: str, split: Split | None, skipped: Skipped) -> list[InputFile]:
    path = Path(item)
    if "://" in item:
        raise UserError(f"{item}: is a URL; download it first: input is read from files")
    try:
        if path.is_dir():
            found = list(_walk(path, skipped))
            if not found:
                more = f" ({skipped})" if str(skipped) else ""
                raise UserError(f"{path}: found no {SUFFIXES} file in this folder{more}")
            named = sorted((p.relative_to(path).as_posix(), p) for p in found)
            return [InputFile(p, name, p.stat().st_size, split) for name, p in named]
        if not path.is_file():
            raise UserError(f"{path}: {'not a regular file' if path.exists() else _MISSING}")
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL
        raise UserError(f"{item!r}: not a file name: {error}") from None
    if _kind(path) is None:
        raise UserError(f"{path}: expected a file of {SUFFIXES}, or a folder of them")
    return [InputFile(path, path.name, path.stat().st_size, split)]


_MISSING = "no such file or folder"


def _walk(root: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the files below a folder that are read.

    Raises:
        OSError: a folder cannot be listed.
        UserError: a link to a missing file.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        for name in list(folders):
            if name.startswith("."):
                skipped.kinds["hidden"] += 1
                folders.remove(name)
            elif (Path(folder) / name).is_symlink():
                skipped.kinds["linked folders (name them as a separate INPUT)"] += 1
        for name in names:
            path = Path(folder) / name
            suffix = path.suffix.lower()
            if name.startswith("."):
                skipped.kinds["hidden"] += 1
            elif _kind(path) is None:
                skipped.kinds[suffix or "without suffix"] += 1
            elif name in _NO_DATA:
                skipped.kinds["descriptions (.json)"] += 1
            elif not path.exists():
                raise UserError(f"{path}: a link to a missing file; restore or remove it")
            elif not path.is_file():
                skipped.kinds["not regular files"] += 1
            else:
                yield path


def _check_encoding(file: InputFile) -> None:
    """Raise if a text file is not in UTF-8 (or another extension of ASCII)."""
    with _opened(file.path) as stream:
        start = stream.read(4096)
    mark = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if mark is None and len(start) >= 8 and start.count(0) > len(start) // 4:
        mark = "UTF-16 or binary"
    if mark:
        raise UserError(
            f"{file.path}: is {mark}, not UTF-8; convert it first: "
            f"iconv -f {mark.split()[0]} -t UTF-8"
        )


def _opened(path: Path) -> Any:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------------------- identity


def listing(files: Sequence[InputFile]) -> dict[str, Any]:
    """Identify files without reading them: number, bytes, digest of names and sizes."""
    text = "\n".join(f"{file.split} {file.name} {file.size}" for file in files)
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return {"files": len(files), "bytes": sum(file.size for file in files), "digest": digest}


def content_digest(files: Iterable[InputFile]) -> str:
    """Return a digest of the contents of files, in order; reads all of them.

    Raises:
        UserError: one of them cannot be read.
    """
    return hashlib.blake2b(b"".join(map(_digest, files)), digest_size=16).hexdigest()


def check_distinct(files: Sequence[InputFile]) -> None:
    """Check that no text is both trained on and validated on.

    Raises:
        UserError: a file is named twice, or files in different splits have the same contents.
    """
    by_path: dict[Path, InputFile] = {}
    by_size: dict[int, list[InputFile]] = {}
    for file in files:
        other = by_path.setdefault(file.path.resolve(), file)
        if other is not file:
            raise _twice(file, other, "the same file")
        if file.size:
            by_size.setdefault(file.size, []).append(file)
    for group in by_size.values():
        if len({file.split for file in group}) == 1:  # equal documents are in the same split
            continue
        by_digest: dict[bytes, InputFile] = {}
        for file in group:
            other = by_digest.setdefault(_digest(file), file)
            if other.split != file.split:
                raise _twice(file, other, "the same text")


def _digest(file: InputFile) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with _opened(file.path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def _twice(file: InputFile, other: InputFile, how: str) -> UserError:
    return UserError(
        f"{file.path}: {how} as {other.path}, so that text may be both trained and validated on; "
        "name every text once, and validation text (--val) that is not in the INPUT"
    )
