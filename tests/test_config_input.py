"""Parsing of the command line and files: text, numbers, hostile input."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from jepa_dist.config import Config, as_override, flatten, load, to_dict
from jepa_dist.errors import UserError


def problems(*overrides: str, path: Path | None = None) -> tuple[str, ...]:
    """Return the problems found; assert that each is one printable line of bounded length."""
    with pytest.raises(UserError) as caught:
        load(path, overrides, {})
    assert all(problem.isprintable() for problem in caught.value.problems)
    assert all(len(problem) < 2100 for problem in caught.value.problems)
    return caught.value.problems


def loaded(overrides: list[str], path: Path | None = None) -> Config | None:
    """Return the configuration, or None if it was refused with valid messages."""
    try:
        return load(path, overrides, {}).config
    except UserError as error:
        refused = error.problems
    assert refused
    assert all(problem.isprintable() for problem in refused)
    return None


def value(config: Config, key: str) -> Any:
    return dict(flatten(to_dict(config)))[key]


# ---------------------------------------------------------------------------- text and numbers


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.dir=runs/exp #2", "runs/exp #2"),
        ("run.dir=2026-11-26", "2026-11-26"),
        ("run.dir=7", "7"),
        ("run.dir=a: b", "a: b"),
        ("eval.prompt=def ", "def "),
        ("eval.prompt=yes", "yes"),
        ("eval.prompt='quoted'", "'quoted'"),
        ("eval.prompt=", ""),
        ("eval.prompt=null", "null"),
        ("data.train=*.bin", "*.bin"),
        ("data.tokenizer=null", None),
        ("parallel.precision=float32", "float32"),
        ("train.steps=010", 10),
        ("seed=1_000", 1000),
        ("monitor.profile.ranks=[0, 1]", [0, 1]),
        ("model.tie_embeddings=off", False),
    ],
)
def test_text_on_the_command_line(override: str, expected: Any) -> None:
    assert value(load(None, [override], {}).config, override.partition("=")[0]) == expected


def test_overrides_read_back_what_was_written() -> None:
    config = load(
        None, ["run.dir=runs/exp #2", "eval.prompt=' a", "data.tokenizer=null"], {}
    ).config
    written = [as_override(key, entry) for key, entry in flatten(to_dict(config))]
    assert load(None, written, {}).config == config


@pytest.mark.parametrize("text", ["0x10", "0o17", "0b1", "1:30", "2026-11-26", "9" * 5000])
def test_numbers_are_decimal(tmp_path: Path, text: str) -> None:
    problems(f"train.steps={text}")
    file = tmp_path / "config.yaml"
    file.write_text(f"train: {{steps: {text}}}\n")
    problems(path=file)


def test_text_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("run: {dir: 2026-11-26}\neval: {prompt: yes}\ntrain: {steps: 010}\n")
    config = load(file, environ={}).config
    assert (config.run.dir, config.eval.prompt, config.train.steps) == ("2026-11-26", "yes", 10)


@pytest.mark.parametrize(
    ("key", "text", "complaint"),
    [
        ("run.dir", "s3://b/run", "is a URL"),
        ("checkpoint.resume", "https://h/x", "is a URL"),
        ("run.dir", "~no_such_user/run", "no such home directory"),
        ("run.dir", "a" * 300, "has a part of 300 bytes"),
        ("run.dir", "a/" * 2100, "longer than 4000 bytes"),
        ("run.dir", "", "must not be empty"),
        ("run.dir", "a\0b", "holds a NUL character"),
        ("run.dir", "a\udcff", "is not valid UTF-8"),
        ("eval.prompt", "a\udcff", "is not valid UTF-8"),
    ],
)
def test_invalid_paths_and_text(key: str, text: str, complaint: str) -> None:
    (problem,) = problems(f"{key}={text}")
    assert complaint in problem


# ---------------------------------------------------------------------------- hostile files

_LEVELS = list(itertools.pairwise("abcdefghij"))


def _ten(name: str) -> str:
    return ", ".join([f"*{name}"] * 10)


HOSTILE = {
    "a billion laughs": "a: &a [x, x]\n"
    + "".join(f"{new}: &{new} [{_ten(old)}]\n" for old, new in _LEVELS),
    "a billion merges": "a: &a {x: 1}\n"
    + "".join(f"{new}: &{new} {{<<: [{_ten(old)}]}}\n" for old, new in _LEVELS),
    "an alias of itself": "a: &a [*a]\n",
    "a merge of itself": "a: &a {<<: *a}\n",
    "deep": "[" * 3000,
    "deep mappings": "{a: " * 3000,
    "many unknown keys": "a:\n" + "\n".join(f"  k{n}: 1" for n in range(3000)),
    "large": "x" * 2**20,
    "wrong int": "seed: !!int abc",
    "wrong float": "jepa: {lambda: !!float abc}",
    "timestamp": "seed: !!timestamp 2026-99-99",
    "binary": "seed: !!binary '@@'",
    "object": "seed: !!python/object/apply:os.system [x]",
    "huge integer": "seed: " + "9" * 5000,
    "huge float": "jepa: {lambda: 1e999}",
    "octal": "seed: 0o99",
    "key with a line break": '"a\\nb": 1',
    "unhashable key": "? {a: b}\n: 1",
    "half a character": 'eval: {prompt: "\\ud800"}',
    "not UTF-8": b"\xff\xfe",
    "NUL": b"seed: 1\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert len(problems(path=file)) <= 30


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        problems(path=path)


@pytest.mark.parametrize(
    "override",
    [
        "model.model_dim=1000000000000",
        "model.num_layers=1000000",
        "model.mlp_mult=1e308",
        "model.num_loops=1000000",
        "batch.sequences=100000000000",
        "batch.micro=100000000000",
        "jepa.spans_per_sequence=10000000000",
        "data.workers=100000",
        "data.prefetch=100000",
        "parallel.timeout_seconds=1e300",
        "checkpoint.grace_seconds=1e300",
        "optim.matrix_lr=1e300",
        "optim.muon_backend_steps=10000",
        "eval.sample_tokens=100000000",
        "train.steps=100000000000000",
        "monitor.late_seconds=1e300",
    ],
)
def test_excessive_sizes(override: str) -> None:
    assert "less than or equal to" in problems(override)[0]


def test_sizes_that_are_too_large_together() -> None:
    large = ["batch.sequences=1000000", "jepa.spans_per_sequence=4096"]
    assert "at most 16777216 spans" in problems(*large)[0]
    looped = ["model.num_layers=4096", "model.num_loops=1024", "model.loop_end=4095"]
    assert "at most 16384 blocks" in problems(*looped)[0]


# ---------------------------------------------------------------------------- any input

_KEYS = [key for key, _ in flatten(to_dict(Config()))]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(key=st.sampled_from(_KEYS), text=st.text(max_size=60))
def test_any_value_loads_or_is_one_line(key: str, text: str) -> None:
    config = loaded([f"{key}={text}"])
    if config is not None:
        written = [as_override(k, v) for k, v in flatten(to_dict(config))]
        assert load(None, written, {}).config == config


_MARKS = st.text(alphabet=st.sampled_from("{}[]&*!<>|:-?,#'\"%@ \n\tab019.e~="), max_size=80)
_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(_KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(text=_MARKS | _TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)))
def test_any_file_loads_or_is_one_line(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(text.encode(errors="surrogatepass"))
        loaded([], file)
