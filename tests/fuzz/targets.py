"""The fuzzed readers, one hypothesis test each."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jepa_dist.checkpoint.manifest import MANIFEST, STATE, read_manifest, read_state
from jepa_dist.checkpoint.shard_file import ShardFiles, assemble
from jepa_dist.config import ENVIRONMENT, Config, flatten, load, to_dict, to_yaml
from jepa_dist.errors import UserError
from jepa_dist.monitor.alarms import JepaAlarms
from jepa_dist.monitor.history import lasting, read_starts
from jepa_dist.monitor.metrics_file import METRICS, encode, read_records
from jepa_dist.monitor.run_dir import read_status
from jepa_dist.monitor.watchdog import read_heartbeats
from jepa_dist.run.progress import run_state
from tests.support.crafted import (
    GOOD_STATE,
    SHARDS,
    STEP,
    body_of,
    make_checkpoint,
    seal_as_is,
)

counted: Counter[str] = Counter()
"""Outcomes of the running target's inputs, counted."""

_folder = tempfile.TemporaryDirectory(prefix="fuzz-")
_root = Path(_folder.name)
_path = make_checkpoint(_root / "checkpoints")
_body = body_of(_path)
_shard = (_path / SHARDS[0]).read_bytes()

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["F32", "F64", "../x", SHARDS[0], STATE, "model/matrix", 2**63, 2**53])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, sound: Any) -> Any:
    """Draw a valid JSON value with one to three places replaced, removed or duplicated."""
    value = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    if type(value) is int and draw(st.booleans()):  # passes type checks, to reach later ones
        return draw(st.integers(0, 6) | st.sampled_from([2**32, 2**40, 2**62, 2**63 - 1]))
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    match draw(st.sampled_from(["in", "in", "in", "remove", "add"])):
        case "in":
            value[key] = _mutate(draw, value[key])
        case "remove":
            del value[key]
        case _ if isinstance(value, dict):
            value[draw(st.text(max_size=10))] = value[key]
        case _:
            value.append(value[key])
    return value


def ends_well(call: Callable[[], object]) -> None:
    """Assert that an input is read or refused with a UserError."""
    problems: tuple[str, ...] | None = None
    try:
        call()
    except UserError as error:
        problems = error.problems
    counted["read" if problems is None else "refused"] += 1
    assert problems != ()
    for problem in problems or ():
        assert problem.isprintable(), repr(problem)
        assert len(problem) < 3000


def _read_checkpoint() -> None:
    """Read a checkpoint as ``export`` does, without writing."""
    manifest = read_manifest(_path)
    with ShardFiles(_path) as files:
        for name, entry in manifest.tensors.items():
            tensor = assemble(files, name, entry)
            # Nothing is larger than the files that it comes from.
            assert tensor.nbytes <= sum(len(data) for data in (_shard, _shard))


@given(mutated(_body))
def manifest(body: Any) -> None:
    """A mutated manifest with a valid digest of itself, and valid shards."""
    if isinstance(body, dict):
        seal_as_is(_path, {k: v for k, v in body.items() if k != "blake2b"})
    else:
        (_path / MANIFEST).write_text(json.dumps(body))
    ends_well(_read_checkpoint)


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode()))
def manifest_bytes(data: bytes) -> None:
    """Arbitrary bytes as a manifest."""
    (_path / MANIFEST).write_bytes(data)
    ends_well(_read_checkpoint)


@given(
    st.integers(0, 400),
    st.binary(max_size=12),
    st.sampled_from(["replace", "insert", "cut"]),
)
def shard(place: int, data: bytes, how: str) -> None:
    """A shard with bytes replaced, inserted or cut off, and a manifest with its digest."""
    place = min(place, len(_shard))
    match how:
        case "replace":
            spoilt = _shard[:place] + data + _shard[place + len(data) :]
        case "insert":
            spoilt = _shard[:place] + data + _shard[place:]
        case _:
            spoilt = _shard[:place]
    (_path / SHARDS[0]).write_bytes(spoilt)
    size = {"bytes": len(spoilt), "blake2b": "0" * 64}
    seal_as_is(_path, {**_body, "files": {**_body["files"], SHARDS[0]: size}})
    try:
        ends_well(_read_checkpoint)
    finally:
        (_path / SHARDS[0]).write_bytes(_shard)


@given(mutated(GOOD_STATE))
def state(value: Any) -> None:
    """A state of the wrong types and shapes."""
    (_path / STATE).write_text(json.dumps(value))
    ends_well(lambda: run_state(_path / STATE, read_state(_path)))


RECORD = {
    **{"step": STEP, "loss/ce": 2.0, "jepa/grad_ratio": 0.0, "jepa/lambda": 0.1, "val/set": "x"},
    **{"jepa/effective_rank": 3.0, "not_finite": {"grad_norm": "nan"}, "grad_norm": None},
}
START = {"time": 1.0, "step": 0, "world_size": 2, "after_failure": False, "config": {"seed": 1}}
HEARTBEAT = {
    **{"beat": 1, "count": 1, "step": 1, "phase": "forward", "seconds": 0.5},
    **{"host": "h", "pid": 1},
}


@given(st.lists(mutated(RECORD) | st.binary(max_size=60), max_size=4))
def metrics(lines: list[Any]) -> None:
    """Lines of ``metrics.jsonl``: records that are read can be written and observed by alarms."""
    _write_lines(_root / METRICS, lines)

    def read() -> None:
        for record in read_records(_root / METRICS):
            if record is not None:
                json.loads(encode(record), parse_constant=_no_json)
        JepaAlarms(1e-5, 0.25).recall(_root / METRICS)

    ends_well(read)


@given(st.lists(mutated(START) | st.binary(max_size=60), max_size=4))
def starts(lines: list[Any]) -> None:
    """Lines of ``starts.jsonl``."""
    _write_lines(_root / "starts.jsonl", lines)
    ends_well(lambda: lasting(read_starts(_root)))


@given(mutated(HEARTBEAT) | st.binary(max_size=60))
def status(value: Any) -> None:
    """Heartbeats and ``status.json``."""
    (_root / "heartbeats").mkdir(exist_ok=True)
    _write_lines(_root / "heartbeats" / "rank_0.json", [value])
    _write_lines(_root / "status.json", [value])
    ends_well(lambda: (read_heartbeats(_root / "heartbeats", 1), read_status(_root)))


_SETTINGS = to_dict(Config())
_KEYS = [key for key, _ in flatten(_SETTINGS)]
# Syntax of YAML that JSON does not have.
_YAML_TEXT = st.sampled_from(
    [
        *("&a [*a]", "!!python/object:os.system x", "!!int x", "2026-02-31", "1:30", "0o99"),
        *("010", "<<", "[" * 60, "{a: {b: {c", "\t- x", "? ?", "'", "%YAML 9.9", "---\n---"),
        *(".inf", "1e400", "~", "!!binary =", "!!timestamp 1", "!!set {x, y}", "9" * 5000),
        *("\x00", "\ud800", "\x85", "@x"),
    ]
)


@st.composite
def _yaml_of(draw: st.DrawFn) -> bytes:
    """Draw a configuration with mutated values and a mutated line."""
    text = json.dumps(draw(mutated(_SETTINGS)), indent=1)
    lines = text.split("\n")
    place = draw(st.integers(0, len(lines)))
    if draw(st.booleans()):
        lines.insert(place, draw(_YAML_TEXT | st.text(max_size=20)))
    return "\n".join(lines).encode(errors="surrogatepass")


@given(_yaml_of() | st.binary(max_size=200))
def configuration(data: bytes) -> None:
    """A configuration file: what is read round-trips through a file."""
    file = _root / "config.yaml"
    file.write_bytes(data)

    def read() -> None:
        config = load(file, [], {}).config
        file.write_text(to_yaml(config))
        assert load(file, [], {}).config == config

    ends_well(read)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(_KEYS) | st.text(max_size=20),
            _YAML_TEXT | st.text(max_size=30) | SCALARS.map(str),
        ),
        max_size=3,
    ),
    st.booleans(),
)
def overrides(settings: list[tuple[str, str]], in_environment: bool) -> None:
    """KEY=VALUE on the command line and in the environment."""
    if in_environment:
        texts = [text for _, text in settings]
        ends_well(lambda: load(None, [], dict(zip(sorted(ENVIRONMENT), texts, strict=False))))
    else:
        ends_well(lambda: load(None, [f"{key}={value}" for key, value in settings], {}))


def _write_lines(path: Path, lines: list[Any]) -> None:
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"\n".join(texts))


def _no_json(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


TARGETS: dict[str, Callable[[], None]] = {
    test.__name__: test  # type: ignore[dict-item]
    for test in (
        *(manifest, manifest_bytes, shard, state, metrics, starts, status),
        *(configuration, overrides),
    )
}
