"""Crafted checkpoints and run directories, as an attacker could write them.

``CHECKPOINTS`` and ``RUN_FILES`` map a name to a function that damages a valid folder. The digests
are valid: anyone who can write a manifest can compute them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jepa_dist.checkpoint.manifest import MANIFEST, STATE, digest_of, fingerprint
from jepa_dist.checkpoint.shard_file import Part, write_shard
from jepa_dist.config import Config, to_dict

STEP = 8
GOOD_STATE: dict[str, Any] = {
    "step": STEP,
    "samples_consumed": 256,
    "phase": 0,
    "seconds": 1.5,
    "tokens_digest": "ab" * 16,
    "spans_digest": "",
    "skip_start": 0,
    "skip_count": 0,
    "healthy": True,
    "config": to_dict(Config()),
    "data_fingerprint": "data",
}
SHARDS = ("shard_00000.safetensors", "shard_00001.safetensors")

Body = dict[str, Any]


def make_checkpoint(checkpoints: Path, step: int = STEP) -> Path:
    """Write a valid checkpoint of two ranks: a matrix in two halves, a vector, and a scalar."""
    path = checkpoints / f"step_{step:08d}"
    path.mkdir(parents=True)
    matrix = torch.arange(12.0).reshape(4, 3) + step
    parts: list[dict[str, Part]] = [
        {
            "model/matrix": Part(matrix[:2].contiguous(), (0, 0)),
            "model/vector": Part(torch.ones(5), (0,)),
        },
        {
            "model/matrix": Part(matrix[2:].contiguous(), (2, 0)),
            "adam_step/matrix": Part(torch.tensor(3.0), ()),
        },
    ]
    for name, held in zip(SHARDS, parts, strict=True):
        write_shard(path / name, held)
    write_state(path, {**GOOD_STATE, "step": step})
    body = {
        "format": 1,
        "step": step,
        "saved_at": 1.7e9,
        "world_size": 2,
        "healthy": True,
        "config_fingerprint": "",
        "data_fingerprint": "",
        "torch": "2",
        "jepa_dist": "0",
        "files": {},
        "tensors": {
            "model/matrix": {
                "dtype": "F32",
                "shape": [4, 3],
                "chunks": [
                    {"file": SHARDS[0], "offset": [0, 0], "shape": [2, 3]},
                    {"file": SHARDS[1], "offset": [2, 0], "shape": [2, 3]},
                ],
            },
            "model/vector": {
                "dtype": "F32",
                "shape": [5],
                "chunks": [{"file": SHARDS[0], "offset": [0], "shape": [5]}],
            },
            "adam_step/matrix": {
                "dtype": "F32",
                "shape": [],
                "chunks": [{"file": SHARDS[1], "offset": [], "shape": []}],
            },
        },
    }
    seal(path, body)
    return path


def write_state(path: Path, state: Any) -> None:
    (path / STATE).write_text(state if isinstance(state, str) else json.dumps(state))


def seal(path: Path, body: Body) -> None:
    """Write a manifest with the digests of the files in the folder, and its own."""
    body["files"] = {
        name: {
            "bytes": (path / name).stat().st_size,
            "blake2b": digest_of((path / name).read_bytes()).hexdigest(),
        }
        for name in (*SHARDS, STATE)
        if (path / name).is_file()
    } | {k: v for k, v in body["files"].items() if k not in (*SHARDS, STATE)}
    seal_as_is(path, body)


def seal_as_is(path: Path, body: Body) -> None:
    (path / MANIFEST).write_text(json.dumps({**body, "blake2b": fingerprint(body)}))


def body_of(path: Path) -> Body:
    body = json.loads((path / MANIFEST).read_text())
    del body["blake2b"]
    return body


# ---------------------------------------------------------------------------- manifests

Spoil = Callable[[Path], object]


def manifest(change: Callable[[Body], object]) -> Spoil:
    def spoil(path: Path) -> None:
        body = body_of(path)
        change(body)
        seal_as_is(path, body)

    return spoil


def tensor(**changes: Any) -> Spoil:
    return manifest(lambda body: body["tensors"]["model/matrix"].update(changes))


def chunk(**changes: Any) -> Spoil:
    return manifest(lambda body: body["tensors"]["model/matrix"]["chunks"][0].update(changes))


def raw_manifest(data: bytes) -> Spoil:
    return lambda path: (path / MANIFEST).write_bytes(data)


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Return a function that replaces the regular file ``name``."""

    def spoil(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return spoil


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def sparse(size: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


SURPRISES: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "device": link_to("/dev/zero"),
    "file of /proc": link_to("/proc/self/mem"),
    "folder": Path.mkdir,
    "dangling link": link_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "terabyte": sparse(2**40),
}


def many_tensors(body: Body) -> None:
    one = body["tensors"]["model/vector"]
    body["tensors"] = {f"model/{i}": one for i in range(20_000)}


def overlapping(body: Body) -> None:
    matrix = body["tensors"]["model/matrix"]
    matrix["chunks"][1]["offset"] = [1, 0]


def shard_header(header: Any, size: int | None = None) -> Spoil:
    """Return a function that writes this safetensors header into a shard, with a valid digest."""

    def spoil(path: Path) -> None:
        text = json.dumps(header).encode() if not isinstance(header, bytes) else header
        length = len(text) if size is None else size
        (path / SHARDS[0]).write_bytes(length.to_bytes(8, "little") + text + bytes(44))
        seal(path, body_of(path))

    return spoil


def header_of(**changes: Any) -> dict[str, Any]:
    matrix = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    vector = {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]}
    return {"model/matrix": {**matrix, **changes}, "model/vector": vector}


MANIFESTS: dict[str, Spoil] = {
    "a name that leads out": manifest(lambda b: b["files"].update({"../../x": b["files"][STATE]})),
    "an absolute name": manifest(lambda b: b["files"].update({"/etc/passwd": b["files"][STATE]})),
    "a hidden name": manifest(lambda b: b["files"].update({".x": b["files"][STATE]})),
    "a chunk in a file that leads out": chunk(file="../x"),
    "a chunk in a file not listed": chunk(file="other.safetensors"),
    "no state": manifest(lambda b: b["files"].pop(STATE)),
    "a shape of 2^40": tensor(shape=[2**40, 3]),
    "a shape that overflows": tensor(shape=[2**62, 2**62]),
    "a shape beyond 2^63": tensor(shape=[2**70, 3]),
    "many dimensions": tensor(shape=[1] * 1000),
    "a negative shape": tensor(shape=[-4, 3]),
    "huge shape in one consistent chunk": manifest(
        lambda b: b["tensors"].update(
            x={
                "dtype": "F64",
                "shape": [2**50],
                "chunks": [{"file": SHARDS[0], "offset": [0], "shape": [2**50]}],
            }
        )
    ),
    "a chunk out of range": chunk(offset=[3, 0]),
    "a chunk of the wrong rank": chunk(offset=[0]),
    "a chunk whose shape is wrong": chunk(shape=[1, 3]),
    "overlapping chunks": manifest(overlapping),
    "no chunks": tensor(chunks=[]),
    "two chunks in one file": manifest(
        lambda b: b["tensors"]["model/matrix"]["chunks"][1].update(file=SHARDS[0])
    ),
    "an unknown dtype": tensor(dtype="F128"),
    "another dtype": tensor(dtype="F16"),
    "a dtype that is no text": tensor(dtype=7),
    "a tensor that no file holds": manifest(
        lambda b: b["tensors"].update({"model/other": b["tensors"]["model/vector"]})
    ),
    "twenty thousand tensors": manifest(many_tensors),
    "a digest that is not hexadecimal": manifest(
        lambda b: b["files"][STATE].update(blake2b="z" * 64)
    ),
    "a negative size": manifest(lambda b: b["files"][STATE].update(bytes=-1)),
    "a huge size": manifest(lambda b: b["files"][SHARDS[0]].update(bytes=2**62)),
    "another step": manifest(lambda b: b.update(step=9)),
    "a step of 1e30": manifest(lambda b: b.update(step=1e30)),
    "a time that is no number": manifest(lambda b: b.update(saved_at=float("nan"))),
    "a time beyond the calendar": manifest(lambda b: b.update(saved_at=1e300)),
    "a surrogate in a name": manifest(
        lambda b: b["tensors"].update({"\ud800": b["tensors"]["model/vector"]})
    ),
    "a newline and an escape in a name": manifest(
        lambda b: b["tensors"].update({"model/a\nb\x1b[2J": b["tensors"]["model/vector"]})
    ),
    "files as a list": manifest(lambda b: b.update(files=[])),
    "an unknown format": manifest(lambda b: b.update(format="x" * 10_000)),
    "not JSON": raw_manifest(b"\x80\x04K\x01."),
    "not UTF-8": raw_manifest(b'{"format": 1, "blake2b": "\xff"}'),
    "nested deep": raw_manifest(b"[" * 900_000),
    "nested deep inside": raw_manifest(b'{"format": 1, "blake2b": ' + b"[" * 900 + b"]" * 900),
    "an integer of 5000 digits": raw_manifest(b'{"format": 1, "step": ' + b"9" * 5000 + b"}"),
    "a list": raw_manifest(b"[1]"),
    "null": raw_manifest(b"null"),
    "ten million lists": raw_manifest(b"[" + b"[]," * 10_000_000 + b"[]]"),
    **{f"{kind} as manifest": instead(MANIFEST, make) for kind, make in SURPRISES.items()},
    **{f"{kind} as state": instead(STATE, make) for kind, make in SURPRISES.items()},
    **{f"{kind} as shard": instead(SHARDS[0], make) for kind, make in SURPRISES.items()},
    "a link out of the folder": instead(STATE, link_to("/etc/hostname")),
    "a header of another dtype": shard_header(header_of(dtype="F64", shape=[3])),
    "a header of another shape": shard_header(header_of(shape=[3, 2])),
    "a header of a huge shape": shard_header(header_of(shape=[2**40, 2**40])),
    "a header that points past the end": shard_header(header_of(data_offsets=[0, 2**40])),
    "a header that points backwards": shard_header(header_of(data_offsets=[24, 0])),
    "a header without the tensor": shard_header({"x": header_of()["model/vector"]}),
    "a header of an unknown dtype": shard_header(header_of(dtype="F4_E9")),
    "a header of 2^60 bytes": shard_header(b"{}", size=2**60),
    "a header that is no JSON": shard_header(b"[[[[[["),
    "a header nested deep": shard_header(b"[" * 100_000),
}

# ---------------------------------------------------------------------------- states


def state(**changes: Any) -> Spoil:
    return raw_state(json.dumps({**GOOD_STATE, **changes}))


def raw_state(data: str | bytes) -> Spoil:
    def spoil(path: Path) -> None:
        (path / STATE).write_bytes(data.encode() if isinstance(data, str) else data)
        seal(path, body_of(path))

    return spoil


def without(key: str) -> Spoil:
    return raw_state(json.dumps({k: v for k, v in GOOD_STATE.items() if k != key}))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


# Name: content, and a word of the expected message.
STATES: dict[str, tuple[Spoil, str]] = {
    **{f"step {v!r}": (state(step=v), "step") for v in ("abc", None, 1e30, -1, True, [8], 2**70)},
    "another step": (state(step=7), "differs from the manifest's"),
    **{f"no {key}": (without(key), key) for key in ("step", "seconds", "config", "phase")},
    "no samples": (without("samples_consumed"), "samples_consumed"),
    "samples 2^70": (state(samples_consumed=2**70), "samples_consumed"),
    "phase 9": (state(phase=9), "phase"),
    "seconds as text": (state(seconds="1"), "seconds"),
    "seconds of infinity": (raw_state(json.dumps({**GOOD_STATE, "seconds": 1e999})), "seconds"),
    "negative seconds": (state(seconds=-1.0), "seconds"),
    "digest not hexadecimal": (state(tokens_digest="zz" * 16), "tokens_digest"),
    "digest too long": (state(tokens_digest="ab" * 10_000), "tokens_digest"),
    "spans digest a number": (state(spans_digest=7), "spans_digest"),
    "negative skip": (state(skip_count=-1), "skip_count"),
    "config a list": (state(config=[1]), "config"),
    "config null": (state(config=None), "config"),
    "config nested 150 deep": (state(config=nested(150)), "config"),
    "nested 900 deep": (state(config=nested(900)), "state"),
    "a key with a newline": (state(config={"a\nb\x1b[2J": 1, "seed": 5}), "config"),
    "a lone surrogate": (state(config={"seed": "\ud800"}), "state"),
    "not UTF-8": (raw_state(b'{"step": "\xff"}'), "state"),
    "a list": (raw_state("[]"), "state"),
    "empty": (raw_state(""), "state"),
    "5000 digits": (raw_state('{"step": ' + "9" * 5000 + "}"), "state"),
    "8 MiB": (raw_state(b'{"a": "' + b"x" * 8 * 2**20 + b'"}'), "state"),
    "bad_in_row as text": (state(bad_in_row="x"), "bad_in_row"),
    "data_fingerprint a number": (state(data_fingerprint=1), "data_fingerprint"),
}

# ---------------------------------------------------------------------------- run directories

RUN_FILES = (
    *("metrics.jsonl", "starts.jsonl", "status.json", "config.yaml", "data.json"),
    "heartbeats/rank_0.json",
)

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(1000),
    "not UTF-8": b"\xff\xfe{}\n",
    "null": b"null\n",
    "a list": b"[1]\n",
    "a number": b"3\n",
    "a text": b'"x"\n',
    "an object without keys": b"{}\n",
    "of the wrong types": (
        b'{"step": "x", "time": "x", "world_size": [], "after_failure": 3, "state": 5, "seed": '
        b'"x", "train": 4, "beat": null, "saved": "x", "reason": 3}\n'
    ),
    "keys that are missing": b'{"step": 3}\n{"step": 3, "final": true}\n',
    "numbers that are texts": (
        b'{"step": 3, "jepa/grad_ratio": "x", "jepa/effective_rank": [], "val/loss": {}, '
        b'"val/bpb": "x", "train_seconds": "y", "tokens": "z", "mfu": "m"}\n'
        b'{"step": 4, "final": true, "val/loss": "x", "baseline/bigram_bpb": "x"}\n'
    ),
    "an alarm without its lambda": b'{"step": 3, "jepa/grad_ratio": 0.0}\n',
    "huge numbers": (
        b'{"step": 9007199254740993, "loss/ce": 1e999}\n{"step": 3, "loss/ce": 1'
        + b"0" * 400
        + b', "time": 1e300}\n{"time": 1e18, "step": 1, "world_size": 1, "after_failure": true}\n'
    ),
    "nested deep": b"[" * 100_000 + b"\n" + b'{"step": 1, "a": ' + b"[" * 900 + b"\n",
    "a long line": b'{"step": 1, "a": "' + b"x" * 6_000_000 + b'"}\n',
    "an integer of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "a table of many places": (
        b'{"step": 1, "jepa/cos_table": {"lengths": [1], "cos": [[' + b"0," * 50_000 + b"0]]}}\n"
    ),
    "escapes": b'{"step": 1, "a\\u001b[2J\\n": 1, "b": 2}\n{"state": "\\u001b[2J"}\n',
    "a surrogate": b'{"step": 1, "b": "\\ud800"}\n',
}
