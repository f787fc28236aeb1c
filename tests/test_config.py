"""The configuration: precedence of sources, and one clear line for every error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa_dist.config import (
    ENVIRONMENT,
    Config,
    check_world,
    flatten,
    load,
    reference_page,
    to_dict,
    to_yaml,
)
from jepa_dist.errors import UserError
from tests.support.patience import patience
from tests.support.tiny import REPOSITORY, tiny_config


def problems(
    *overrides: str, path: Path | None = None, environ: dict[str, str] | None = None
) -> tuple[str, ...]:
    """Return the problems found in a configuration; assert that each is one line."""
    with pytest.raises(UserError) as caught:
        load(path, overrides, environ or {})
    for problem in caught.value.problems:
        assert "\n" not in problem
    return caught.value.problems


def value(config: Config, key: str) -> Any:
    return dict(flatten(to_dict(config)))[key]


# ---------------------------------------------------------------------------- precedence


SWITCHES = [
    # environment, default, file, environment's value, command line
    ("JEPA_LAMBDA", 0.0, 0.01, 0.02, 0.03),
    ("JEPA_MAX_SPAN_FRAC", 0.5, 0.1, 0.2, 0.3),
    ("JEPA_START_FRAC", 0.0, 0.1, 0.2, 0.3),
    ("JEPA_LAYER", -1, 0, 1, 2),
]


def test_every_switch_is_tested() -> None:
    assert [switch[0] for switch in SWITCHES] == list(ENVIRONMENT)


@pytest.mark.parametrize(("name", "default", "in_file", "in_environment", "on_line"), SWITCHES)
def test_later_sources_win(
    tmp_path: Path, name: str, default: Any, in_file: Any, in_environment: Any, on_line: Any
) -> None:
    key = ENVIRONMENT[name]
    section, leaf = key.split(".")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({section: {leaf: in_file}}))
    environ = {name: str(in_environment)}
    expected = [
        (load(None, environ={}), default, "default"),
        (load(file, environ={}), in_file, f"file {file}"),
        (load(file, environ=environ), in_environment, f"environment {name}"),
        (load(None, environ=environ), in_environment, f"environment {name}"),
        (load(file, [f"{key}={on_line}"], environ), on_line, "command line"),
        (load(file, [f"{key}=0", f"{key}={on_line}"], environ), on_line, "command line"),
    ]
    for resolved, wanted, source in expected:
        assert value(resolved.config, key) == wanted
        assert resolved.sources.get(key, "default") == source
        assert re.search(rf"^{key}: {wanted} +# {re.escape(source)}$", resolved.describe(), re.M)


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPA_LAMBDA", "0.25")
    assert load(None).config.jepa.lambda_ == 0.25


def test_describe_shows_every_key() -> None:
    resolved = load(None, ["seed=3"], {})
    shown = [line.split(":")[0] for line in resolved.describe().splitlines()]
    assert shown == [key for key, _ in flatten(to_dict(resolved.config))]


# ---------------------------------------------------------------------------- reading values


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001", "+1e-3"])
def test_notations_of_floats(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"jepa: {{lambda: {text}}}\n")
    assert load(file, environ={}).config.jepa.lambda_ == 1e-3
    assert load(None, [f"jepa.lambda={text}"], {}).config.jepa.lambda_ == 1e-3
    assert load(None, environ={"JEPA_LAMBDA": text}).config.jepa.lambda_ == 1e-3


def test_an_integer_is_a_float_but_not_the_other_way_round() -> None:
    assert load(None, ["jepa.lambda=1"], {}).config.jepa.lambda_ == 1.0
    assert "valid integer" in problems("seed=1.5")[0]


def test_null_where_it_is_allowed() -> None:
    assert load(None, ["model.embedding_dim=null"], {}).config.model.embedding_dim is None
    assert problems("model.model_dim=null")


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "model: {}\njepa:\n"])
def test_empty_files_and_sections_mean_the_defaults(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load(file, environ={}).config == Config()


# ---------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("jepa.lamda", "jepa.lambda"),
        ("jepa.lambda_", "jepa.lambda"),
        ("lambda", "jepa.lambda"),
        ("train.lambda", "jepa.lambda"),
        ("bach.sequences", "batch.sequences"),
        ("model.n_layers", "model.num_layers"),
        ("sed", "seed"),
    ],
)
def test_unknown_key(tmp_path: Path, key: str, suggestion: str) -> None:
    (problem,) = problems(f"{key}=1")
    assert problem == f"command line: {key}: unknown key (did you mean {suggestion!r}?)"
    file = tmp_path / "config.yaml"
    section, _, leaf = key.rpartition(".")
    file.write_text(yaml.safe_dump({section: {leaf: 1}} if section else {leaf: 1}))
    (problem,) = problems(path=file)
    assert problem == f"file {file}: {key}: unknown key (did you mean {suggestion!r}?)"


def test_unknown_key_without_suggestion() -> None:
    assert problems("xyzzy=1") == ("command line: xyzzy: unknown key",)


def test_a_section_is_no_key() -> None:
    (problem,) = problems("jepa=0.1")
    assert problem == "command line: jepa: is a section; set its keys, e.g. jepa.lambda"


def test_a_key_is_no_section(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed:\n  value: 1\n")
    assert "seed.value: unknown key" in problems(path=file)[0]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed=-1", "greater than or equal to 0"),
        ("seed=one", "valid integer"),
        ("seed=true", "valid integer"),
        ("batch.sequences=0", "greater than or equal to 1"),
        ("batch.micro=[1]", "valid integer"),
        ("model.tie_embeddings=1", "valid boolean"),
        ("model.mlp_mult=.inf", "finite number"),
        ("jepa.lambda=-0.1", "greater than or equal to 0"),
        ("jepa.lambda=.nan", "finite number"),
        ("jepa.lambda=", "valid number"),
        ("jepa.max_span_frac=1.5", "less than or equal to 1"),
        ("jepa.layer=last", "valid integer"),
        ("jepa.sampler=gaussian", "'start_then_length' or 'uniform'"),
        ("model.embedding_dim=wide", "valid integer"),
        ("parallel.precision=fp8", "'bfloat16'"),
    ],
)
def test_wrong_types_and_values(override: str, complaint: str) -> None:
    (problem,) = problems(override)
    key = override.partition("=")[0]
    assert problem.startswith(f"command line: {key}=")
    assert complaint in problem


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["model.num_heads=3", "model.num_kv_heads=3"], "model.num_heads=3: must divide"),
        (["model.num_kv_heads=3"], "model.num_kv_heads=3: must divide"),
        (["model.rope_dims=5"], "model.rope_dims=5: must be even"),
        (["model.rope_dims=64"], "model.rope_dims=64: must be even and at most the head width 32"),
        (["model.model_dim=12"], "model.rope_dims=0: must be even"),
        (["model.mlp_mult=0.001"], "model.mlp_mult=0.001: leaves no hidden unit"),
        (
            ["model.num_loops=1", "model.loop_start=2", "model.loop_end=4"],
            "model.loop_start=2, model.loop_end=4: must be a range inside the blocks 0..3",
        ),
        (
            ["model.num_loops=1", "model.loop_start=2", "model.loop_end=1"],
            "model.loop_start=2, model.loop_end=1: must be a range",
        ),
        (["model.untie_loop_mlps=true"], "model.untie_loop_mlps=true: needs model.num_loops"),
        (["model.skip_gates=true"], "model.skip_gates=true: needs model.unet_skips"),
        (["model.parallel_residual_start=4"], "model.parallel_residual_start=4: must be"),
        (["jepa.layer=4"], "jepa.layer=4: must be in -1..3 (model.num_layers=4)"),
        (["jepa.layer=-2"], "jepa.layer=-2: must be in -1..3"),
        (["jepa.lambda=1", "model.seq_len=2"], "model.seq_len=2: the JEPA objective needs"),
        (["jepa.lambda=1", "jepa.max_span_frac=0"], "jepa.max_span_frac=0.0: must be above 0"),
        (["jepa.lambda=1", "jepa.start_frac=1"], "jepa.start_frac=1.0: with jepa.lambda=1.0"),
        (
            ["model.num_loops=1", "train.loop_phase2_at=0.2"],
            "train.loop_phase2_at=0.2: must not come before train.enable_looping_at=0.5",
        ),
        (["optim.beta2=1"], "optim.beta1=0.9, optim.beta2=1.0: must be below 1"),
        (["parallel.dp_shard=0"], "parallel.dp_shard=0: must be -1"),
        (
            ["parallel.deterministic=true", "parallel.attention=cudnn"],
            "parallel.attention=cudnn: its backward is not deterministic",
        ),
    ],
)
def test_impossible_combinations(overrides: list[str], start: str) -> None:
    (problem,) = problems(*overrides)
    assert problem.startswith(start)


def test_all_problems_are_reported_at_once() -> None:
    found = problems("jepa.lamda=1", "seed=x", "batch.micro=0", "model.width=1")
    assert len(found) == 4
    assert [found[0].split(":")[1], found[1].split(":")[1]] == [" jepa.lamda", " model.width"]
    assert {re.split("[:=]", problem)[1].strip() for problem in found[2:]} == {
        "seed",
        "batch.micro",
    }
    combinations = problems("model.num_kv_heads=3", "jepa.layer=9", "model.skip_gates=true")
    assert len(combinations) == 3


@pytest.mark.parametrize(
    ("overrides", "world_size", "start"),
    [
        (["batch.sequences=3"], 4, "batch.sequences=3: the global batch needs at least one"),
        (["parallel.dp_replicate=3"], 4, "parallel.dp_replicate=3, parallel.dp_shard=-1: their"),
        (["parallel.dp_shard=3"], 4, "parallel.dp_replicate=1, parallel.dp_shard=3: their"),
        (["parallel.dp_replicate=2", "parallel.dp_shard=4"], 4, "parallel.dp_replicate=2"),
    ],
)
def test_configurations_that_a_world_size_cannot_run(
    overrides: list[str], world_size: int, start: str
) -> None:
    config = load(None, overrides, {}).config
    with pytest.raises(UserError) as caught:
        check_world(config, world_size)
    (problem,) = caught.value.problems
    assert problem.startswith(start)


def test_configurations_that_a_world_size_can_run() -> None:
    check_world(load(None, ["batch.sequences=4"], {}).config, 4)
    check_world(load(None, ["parallel.dp_replicate=2", "parallel.dp_shard=2"], {}).config, 4)
    check_world(load(None, ["parallel.dp_replicate=4"], {}).config, 4)


def test_unknown_switch_in_the_environment() -> None:
    (problem,) = problems(environ={"JEPA_LAMDA": "0.1"})
    assert problem.startswith("environment JEPA_LAMDA: unknown switch (did you mean 'JEPA_LAMBDA'")
    load(None, environ={"JEPA_GOLDEN_DIR": "somewhere", "OTHER": "1"})


def test_wrong_switch_in_the_environment() -> None:
    (problem,) = problems(environ={"JEPA_LAYER": "top"})
    assert problem.startswith("environment JEPA_LAYER: jepa.layer='top': ")


def test_not_key_value() -> None:
    (problem,) = problems("jepa.lambda")
    assert "'jepa.lambda': expected KEY=VALUE" in problem


def test_not_a_value() -> None:
    (problem,) = problems("seed={")
    assert problem.startswith("command line: seed='{': not a valid value: ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' given twice"),
        ("jepa:\n  lambda: 1\n  lambda: 1\n", "key 'lambda' given twice"),
        ("jepa: {}\nseed: 1\njepa: {}\n", "key 'jepa' given twice"),
        ("seed: [1\n", "not valid YAML"),
        ("model: {[1]: 2}\n", "unhashable key"),
        ("- 1\n", "expected a mapping of sections, found list"),
        ("run: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    (problem,) = problems(path=file)
    assert problem.startswith(f"{file}: ")
    assert complaint in problem


def test_unreadable_file(tmp_path: Path) -> None:
    (problem,) = problems(path=tmp_path / "none.yaml")
    assert problem.endswith("none.yaml: cannot read the configuration: No such file or directory")
    (problem,) = problems(path=tmp_path)
    assert "cannot read the configuration" in problem
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(path=tmp_path / "binary.yaml")
    assert "not valid YAML" in problem


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().model.num_layers = 5


# ---------------------------------------------------------------------------- files and pages


@pytest.mark.parametrize("config", [Config(), tiny_config(Path("somewhere"))], ids=["", "tiny"])
def test_written_configurations_read_back_the_same(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    resolved = load(file, environ={})
    assert resolved.config == config
    assert set(resolved.sources) == {key for key, _ in flatten(to_dict(config))}


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_our_configurations_load(path: Path) -> None:
    assert load(path, environ={}).sources


def test_reference_page_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: python -m jepa_dist.config > docs/configuration.md"
    for key, _ in flatten(to_dict(Config())):
        assert f"| `{key}` |" in page


def test_every_key_has_a_meaning() -> None:
    for row in re.findall(r"^\| `[a-z0-9_.]+` \|.*$", reference_page(), re.M):
        assert len(row.split("|")[-2].strip()) > 10, row


def test_torch_is_not_needed() -> None:
    program = "import sys, jepa_dist.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=patience(60))
