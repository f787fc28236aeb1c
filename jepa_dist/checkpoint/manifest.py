"""``manifest.json``: the contents of a checkpoint, and the digests that verify it.

The manifest is written last and lists every other file with its size and blake2b digest. A folder
is an intact checkpoint if and only if the manifest matches its own digest and every listed file
matches the listed one. Files that are not listed are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_dist.checkpoint.folder import step_of
from jepa_dist.errors import UserError, invalid_fields, one_line
from jepa_dist.files import MIB, check_regular, open_regular, read_json
from jepa_dist.interop.tensor_file import TensorFile
from jepa_dist.interop.verify import Signature, mismatches

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1

# Large enough that hashing and writing release the GIL most of the time.
PIECE_BYTES = 8 * MIB
_STATE_BYTES = 4 * MIB
# Every chunk in the manifest has a header entry of about the same size in its shard file, so a
# manifest much larger than the files of its folder is invalid.
_LEAST_MANIFEST_BYTES, _MOST_MANIFEST_BYTES = MIB, 512 * MIB
_MANIFEST_TO_FILES = 4

# Bytes per element of the dtypes that a run saves, by their safetensors names.
DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "BF16": 2, "F16": 2},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}

# A bare name: a manifest cannot point outside its own folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
# More dimensions than any parameter has.
Dimensions = Annotated[tuple[Size, ...], Field(max_length=16)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """Size and digest of one file, computed by the rank that wrote it."""

    bytes: Size
    blake2b: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Hexadecimal, 32 bytes."""


class Chunk(_Part):
    """A block of a tensor: at ``offset`` in the tensor, stored under the tensor's name in
    ``file``."""

    file: FileName
    offset: Dimensions
    shape: Dimensions


class TensorEntry(_Part):
    """A full tensor; its chunks cover it without overlap, each in a different file."""

    dtype: str
    """Safetensors name (F32, BF16, ...)."""
    shape: Dimensions
    chunks: tuple[Chunk, ...]


class Manifest(_Part):
    """Contents of ``manifest.json``."""

    format: Literal[1] = 1
    """Version of the format."""
    step: Size
    saved_at: Annotated[float, Field(ge=0, lt=2**40, allow_inf_nan=False)]
    """Unix time."""
    world_size: Size
    """Number of ranks that saved it; it loads on any number."""
    healthy: bool
    """Whether the losses up to this step were finite."""
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
        """Total size of all files but the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())

    def seal(self) -> str:
        """Return the text of ``manifest.json``, including its own digest."""
        body = self.model_dump(mode="json")
        sealed = {**body, "blake2b": fingerprint(body)}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sealed.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def fingerprint(value: Any) -> str:
    """Return a digest of JSON data that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return digest_of(text.encode()).hexdigest()


def digest_of(data: bytes = b"") -> hashlib.blake2b:
    """Return the hash object used for all files, updated with ``data``."""
    return hashlib.blake2b(data, digest_size=32)


def read_manifest(path: Path, *, is_partial: bool = False) -> Manifest:
    """Read the manifest of the checkpoint ``path``.

    Args:
        path: The checkpoint.
        is_partial: Files that it lists may be missing still, so its size says nothing.

    Raises:
        UserError: missing, damaged, of another format version, or inconsistent.
    """
    file = path / MANIFEST
    try:
        most = _MOST_MANIFEST_BYTES if is_partial else _most_manifest_bytes(path)
        body = read_json(file, most)
        seal = body.pop("blake2b")
        version = body["format"]
    except FileNotFoundError:
        raise UserError(f"{path}: has no {MANIFEST}: not a finished checkpoint") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: damaged: not a manifest") from None
    if version != FORMAT:
        raise UserError(
            f"{file}: format {version!r:.40}, expected {FORMAT}; "
            "load it with the version of jepa_dist that wrote it"
        )
    if fingerprint(body) != seal:
        raise UserError(f"{file}: damaged: its own digest does not match")
    try:
        manifest = Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise UserError(*_first(f"{file}: {field}" for field in invalid_fields(error))) from None
    if step_of(path) not in (None, manifest.step):
        raise UserError(f"{file}: step {manifest.step} differs from the folder's name")
    problems = _first(f"{file}: {problem}" for problem in _contradictions(manifest))
    if problems:
        raise UserError(*problems)
    return manifest


def _most_manifest_bytes(path: Path) -> int:
    """Return the maximum size at which the manifest of this folder is read."""
    with os.scandir(path) as entries:
        files = sum(e.stat().st_size for e in entries if e.name != MANIFEST and e.is_file())
    return max(_LEAST_MANIFEST_BYTES, min(_MOST_MANIFEST_BYTES, _MANIFEST_TO_FILES * files))


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield inconsistencies between tensors and files, so that readers of a valid manifest never
    allocate more than the files hold."""
    if STATE not in manifest.files:
        yield f"files: {STATE} is missing"
    stored = dict.fromkeys(manifest.files, 0)
    for name, entry in manifest.tensors.items():
        problem = _tensor_problem(entry, manifest.files)
        if problem is not None:
            yield f"tensors.{name:.80}: {problem}"
            continue
        for chunk in entry.chunks:
            stored[chunk.file] += math.prod(chunk.shape) * DTYPE_BYTES[entry.dtype]
    for file, size in stored.items():
        if size > manifest.files[file].bytes:
            yield f"files.{file}: {manifest.files[file].bytes} bytes cannot hold tensors of {size}"


def _tensor_problem(entry: TensorEntry, files: Iterable[str]) -> str | None:
    """Return the first inconsistency in the chunks of a tensor; None if there is none."""
    if entry.dtype not in DTYPE_BYTES:
        return f"dtype {entry.dtype!r:.20}: expected one of {', '.join(DTYPE_BYTES)}"
    for chunk in entry.chunks:
        if chunk.file not in files:
            return f"{chunk.file:.80}: not a file of this checkpoint"
        if not len(chunk.offset) == len(chunk.shape) == len(entry.shape) or any(
            start + size > full
            for start, size, full in zip(chunk.offset, chunk.shape, entry.shape, strict=True)
        ):
            return f"a chunk at {chunk.offset} of shape {chunk.shape} is not in {entry.shape}"
    if len({chunk.file for chunk in entry.chunks}) < len(entry.chunks):
        return "two of its chunks are in the same file"
    chunks = [chunk for chunk in entry.chunks if 0 not in chunk.shape]
    # Chunks within the tensor that do not overlap cover it if their sizes add up to its size.
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(entry.shape):
        return f"its chunks do not cover the shape {entry.shape}"
    if _any_overlap(chunks):
        return "its chunks overlap"
    return None


def _any_overlap(chunks: list[Chunk]) -> bool:
    """Return whether two of the non-empty blocks overlap."""
    if len(chunks) < 2:
        return False
    starts_ND = np.array([chunk.offset for chunk in chunks], dtype=np.int64)
    ends_ND = starts_ND + np.array([chunk.shape for chunk in chunks], dtype=np.int64)
    order_N = starts_ND[:, 0].argsort()
    starts_ND, ends_ND = starts_ND[order_N], ends_ND[order_N]
    if (starts_ND[1:, 0] >= ends_ND[:-1, 0]).all():  # as FSDP2 shards: by rows
        return False
    return any(
        ((starts_ND[i + 1 :] < ends_ND[i]) & (ends_ND[i + 1 :] > starts_ND[i])).all(1).any()
        for i in range(len(chunks))
    )


def _first(problems: Iterable[str], most: int = 10) -> list[str]:
    """Return the first few problems: a crafted manifest may have a million."""
    found = list(problems)
    return found if len(found) <= most else [*found[:most], f"(and {len(found) - most} more)"]


def read_state(path: Path) -> dict[str, Any]:
    """Read the JSON state of a checkpoint that has been verified.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    file = path / STATE
    try:
        state = read_json(file, _STATE_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{file}: damaged: not the state of a run")
    return state


def verify(path: Path) -> list[str]:
    """Return one printable line for each problem of a checkpoint; reads all its files."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return list(error.problems)
    return [one_line(problem) for problem in check_files(path, manifest, manifest.files)]


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Compare the files ``names`` with ``manifest``: sizes, digests, and headers of files with
    tensors; return one line for each problem."""
    held: dict[str, dict[str, Signature]] = {name: {} for name in manifest.files}
    for tensor, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            held[chunk.file][tensor] = Signature(chunk.shape, entry.dtype)

    def check(name: str) -> list[str]:
        problem = _check_file(path / name, manifest.files[name])
        if problem is not None:
            return [problem]
        return _check_header(path / name, held[name]) if name != STATE else []

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [problem for problems in pool.map(check, names) for problem in problems]


def _check_header(file: Path, expected: Mapping[str, Signature]) -> list[str]:
    """Compare the tensors in a file's header with the manifest's chunks in that file."""
    try:
        with TensorFile(file) as opened:
            found = opened.signatures()
    except UserError as error:
        return list(error.problems)
    return _first(
        f"{problem} according to the manifest"
        for problem in mismatches(f"{file}: damaged", expected, found)
    )


def check_size(file: Path, entry: FileEntry) -> str | None:
    """Return a problem that shows without reading the file: its type, location or size; else None.

    A link that leads out of the checkpoint's folder is one: it could point to any file of the host.
    """
    try:
        check_regular(file)
        if file.resolve().parent != file.parent.resolve():
            return f"{file}: a link that leads out of the checkpoint; replace it by the file"
        size = file.stat().st_size
    except OSError as error:
        return f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
    if size != entry.bytes:
        return f"{file}: damaged: {size} bytes, expected {entry.bytes}"
    return None


def sizes_match(path: Path, manifest: Manifest) -> bool:
    """Return whether every file that ``manifest`` lists has its size; reads no contents."""
    return not any(check_size(path / name, entry) for name, entry in manifest.files.items())


def _check_file(file: Path, entry: FileEntry) -> str | None:
    problem = check_size(file, entry)
    if problem is not None:
        return problem
    digest = digest_of()
    try:
        with open_regular(file) as opened:
            while piece := opened.read(PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    if digest.hexdigest() != entry.blake2b:
        return f"{file}: damaged: its digest does not match"
    return None
