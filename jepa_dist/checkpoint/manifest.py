"""What a checkpoint consists of, and how to know that it is whole: ``manifest.json``.

The manifest is written last and lists every other file with its size and blake2b digest, so a
folder is a checkpoint exactly if its manifest's own digest holds and every listed file has the
listed one. Files that are not listed are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_dist.checkpoint.folder import step_of
from jepa_dist.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1

# Large enough that hashing and writing release the GIL for most of the time.
PIECE_BYTES = 8 * 2**20

# A bare name: a manifest cannot point outside its own folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Size = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """One file as the rank that wrote it knows it."""

    bytes: Size
    blake2b: str
    """Hexadecimal, 32 bytes."""


class Chunk(_Part):
    """A block of a tensor: it lies at ``offset`` in the tensor and under its name in ``file``."""

    file: FileName
    offset: tuple[Size, ...]
    shape: tuple[Size, ...]


class TensorEntry(_Part):
    """A whole tensor; its chunks cover it without overlap."""

    dtype: str
    """As safetensors calls it (F32, BF16, ...)."""
    shape: tuple[Size, ...]
    chunks: tuple[Chunk, ...]


class Manifest(_Part):
    """What ``manifest.json`` says."""

    format: Literal[1] = 1
    """Version of this layout."""
    step: Size
    saved_at: float
    """Unix time."""
    world_size: Size
    """Ranks it was saved on; it loads on any number."""
    healthy: bool
    """Whether the losses up to here were finite."""
    config_fingerprint: str
    """Digest of ``state["config"]``."""
    data_fingerprint: str
    """Digest of ``state["data_fingerprint"]``."""
    torch: str
    jepa_dist: str
    files: dict[FileName, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def bytes(self) -> int:
        """Size of everything but the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())

    def seal(self) -> str:
        """As the text of ``manifest.json``, with a digest of itself."""
        body = self.model_dump(mode="json")
        sealed = {**body, "blake2b": fingerprint(body)}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sealed.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def fingerprint(value: Any) -> str:
    """Digest of JSON data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return digest_of(text.encode()).hexdigest()


def digest_of(data: bytes = b"") -> hashlib.blake2b:
    """The digest of all files, to be updated with what else there is."""
    return hashlib.blake2b(data, digest_size=32)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``.

    Raises:
        UserError: missing, damaged, or of another format version.
    """
    file = path / MANIFEST
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        seal = body.pop("blake2b")
        version = body["format"]
    except FileNotFoundError:
        raise UserError(f"{path}: holds no {MANIFEST}: not a finished checkpoint") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: damaged: not a manifest") from None
    if version != FORMAT:
        raise UserError(
            f"{file}: format {version!r}, expected {FORMAT}; "
            "load it with the version of jepa_dist that wrote it"
        )
    if fingerprint(body) != seal:
        raise UserError(f"{file}: damaged: its own digest does not hold")
    try:
        manifest = Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise UserError(*(_explain(file, item) for item in error.errors())) from None
    if step_of(path) not in (None, manifest.step):
        raise UserError(f"{file}: is of step {manifest.step}, not of this folder's")
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint that has been verified.

    Raises:
        UserError: cannot be read, or is not what a run writes.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{file}: damaged: not the state of a run")
    return state


def verify(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint ``path``, one line each; reads all of it."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return list(error.problems)
    return check_files(path, manifest, manifest.files)


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Compare some of the files that ``manifest`` lists with what it says of them."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _check_file(path / name, manifest.files[name]), names)
        return [problem for problem in found if problem is not None]


def check_size(file: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file at first sight."""
    try:
        size = file.stat().st_size
    except OSError as error:
        return f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
    if size != entry.bytes:
        return f"{file}: damaged: {size} bytes, expected {entry.bytes}"
    return None


def looks_whole(path: Path, manifest: Manifest) -> bool:
    """Whether every file that ``manifest`` lists has its size; reads none."""
    return not any(check_size(path / name, entry) for name, entry in manifest.files.items())


def _check_file(file: Path, entry: FileEntry) -> str | None:
    problem = check_size(file, entry)
    if problem is not None:
        return problem
    digest = digest_of()
    try:
        with open(file, "rb", buffering=0) as opened:
            while piece := opened.read(PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    if digest.hexdigest() != entry.blake2b:
        return f"{file}: damaged: its digest does not hold"
    return None


def _explain(file: Path, item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "file"
    return f"{file}: {place}: {item['msg']}"
