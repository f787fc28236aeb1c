"""Sweeps: validation of the file, pairing of members with the same seed, and results."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from jepa_dist.config import Config, QuantizationConfig, to_dict, to_yaml
from jepa_dist.errors import UserError
from jepa_dist.monitor.evaluation_file import (
    EVALUATION,
    Evaluation,
    ProbeResult,
    QuantizedResult,
    TaskResult,
    write_evaluation,
)
from jepa_dist.monitor.history import StartRecord
from jepa_dist.monitor.metrics_file import encode
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.sweep import __main__ as sweep_main
from jepa_dist.sweep import running
from jepa_dist.sweep.members import (
    EvaluationPlan,
    Member,
    add_seed,
    read_margins,
    read_plan,
    read_sweep,
    read_widths,
)
from jepa_dist.sweep.results import read_results
from jepa_dist.sweep.running import Commands, output_of, train_all
from jepa_dist.sweep.verdicts import describe
from tests.support.commands import Command, Finished, run_command
from tests.support.patience import wait_until
from tests.support.tiny import REPOSITORY, tiny_overrides, write_corpus

SWEEP = (sys.executable, "launch/sweep.py")
SHIPPED = sorted((REPOSITORY / "configs/sweeps").glob("*.yaml"))

ARMS = {
    "control": {"jepa.lambda": 0.0},
    "full": {"jepa.lambda": 0.1},
    "delayed": {"jepa.lambda": 0.1, "jepa.start_frac": 0.3},
}


def _stem(file: Path) -> str:
    return file.stem


def write_sweep(folder: Path, **changes: Any) -> Path:
    """Write a sweep of the default configuration; None omits a key."""
    base = folder / "base.yaml"
    base.touch()
    sweep = {"config": str(base), "seeds": [1, 2], "arms": ARMS} | changes
    given = {key: value for key, value in sweep.items() if value is not None}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return file


def problems(folder: Path, *overrides: str, **changes: Any) -> list[str]:
    file = write_sweep(folder, **changes)
    with pytest.raises(UserError) as caught:
        read_sweep(file, overrides)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


# ---------------------------------------------------------------------------- the list


def test_members(tmp_path: Path) -> None:
    members = read_sweep(write_sweep(tmp_path, common={"train": {"steps": 7}}))
    assert [(m.index, m.arm, m.seed) for m in members] == [
        *[(0, "control", 1), (1, "full", 1), (2, "delayed", 1)],
        *[(3, "control", 2), (4, "full", 2), (5, "delayed", 2)],
    ]
    last = members[-1]
    assert last.arguments == [
        *(str(tmp_path / "base.yaml"), "run.dir=runs/sweep/delayed-seed2", "seed=2"),
        *("train.steps=7", "jepa.lambda=0.1", "jepa.start_frac=0.3"),
    ]
    config = last.resolve()
    assert (config.seed, config.train.steps, config.jepa.start_frac) == (2, 7, 0.3)


def test_settings_for_all(tmp_path: Path) -> None:
    members = read_sweep(
        write_sweep(tmp_path, common={"train.steps": 7}),
        ["run.dir=/scratch/my sweep", "optim.eps=1e-9", "train.steps=9", "data.train=x/*.bin"],
    )
    for member in members:
        config = member.resolve()
        assert config.run.dir == f"/scratch/my sweep/{member.arm}-seed{member.seed}"
        assert (config.optim.eps, config.train.steps) == (1e-9, 9)
        assert config.data.train == "x/*.bin"


@pytest.mark.parametrize("file", [f for f in SHIPPED if f.stem.startswith("jepa")], ids=_stem)
def test_shipped_lists(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue #1772's arms with three seeds or more, whatever the environment of the tests says."""
    monkeypatch.chdir(REPOSITORY)
    members = read_sweep(file)
    assert len({member.seed for member in members}) >= 3
    of = {member.arm: member.resolve() for member in members}
    jepa = {arm: config.jepa for arm, config in of.items()}
    assert list(of) == ["control", "full", "delayed", "mid_layer"]
    assert jepa["control"].lambda_ == 0
    full = jepa["full"]
    assert (full.lambda_, full.max_span_frac, full.start_frac) == (0.1, 0.5, 0)
    assert (jepa["delayed"].lambda_, jepa["delayed"].start_frac) == (0.05, 0.3)
    layers = of["mid_layer"].model.num_layers
    assert jepa["mid_layer"].layer == (5 if layers > 5 else layers // 2)
    assert jepa["mid_layer"].lambda_ == full.lambda_


@pytest.mark.parametrize("file", [f for f in SHIPPED if f.stem.startswith("objectives")], ids=_stem)
def test_shipped_lists_of_objectives(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    jepa = {member.arm: member.resolve().jepa for member in read_sweep(file)}
    changes = {
        arm: (config.objective, config.lambda_, config.start_frac, config.next_state.shift)
        for arm, config in jepa.items()
    }
    assert changes == {
        "control": ("span", 0, 0, 1),
        "span": ("span", 0.005, 0, 1),
        "next_state": ("next_state", 1, 0, 1),
        "same_step": ("next_state", 1, 0, 0),
        "no_stop_gradient": ("next_state", 1, 0, 1),
        "late_start": ("next_state", 1, 0.3, 1),
    }
    free = [arm for arm, config in jepa.items() if not config.next_state.stop_gradient]
    assert free == ["no_stop_gradient"]


def arms(**changes: Any) -> dict[str, Any]:
    return {**ARMS, **changes}


def of(objective: str) -> dict[str, Any]:
    return {"jepa.objective": objective, "jepa.lambda": 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": {"full": ARMS["full"], "other": None}}, "arms: 'control' is missing"),
        ({"arms": {"control": None}}, "arms: at least one besides the control"),
        ({"seeds": [1, 2, 1]}, "seeds: [1, 2, 1]: each may be given once"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        (
            {"seeds": None},
            "seeds: Field required (a sweep has config, seeds, common, arms, equivalence_margin, "
            "evaluate)",
        ),
        ({"seed": 3}, "seed: Extra inputs are not permitted"),
        ({"common": {"seed": 1}}, "common: seed: is set for each member; list it under seeds"),
        ({"arms": arms(x={"seed": 3})}, "arm x: seed: is set for each member"),
        ({"arms": arms(x={"run": {"dir": "x"}})}, "arm x: run.dir: is set for each member"),
        (
            {"arms": arms(**{"../x": {"jepa.lambda": 1.0}})},
            "arm '../x': expected a name of letters",
        ),
        ({"arms": {**ARMS, False: {"jepa.lambda": 1.0}}}, "arm False: expected a name of letters"),
        (
            {"common": {"jepa.lambda": 0.2}},
            "arm control: jepa.lambda: is set in common, too; set it in one place",
        ),
        (
            {"arms": arms(x={"jepa.lamda": 1.0})},
            "arm x: jepa.lamda: unknown key (did you mean 'jepa.lambda'?)",
        ),
        (
            {"common": {"train.stps": 1}},
            "arm control, full, delayed: train.stps: unknown key (did you mean 'train.steps'?)",
        ),
        ({"arms": arms(x={"jepa.layer": 99})}, "arm x: jepa.layer=99: must be in -1..3"),
        (
            {"arms": arms(x=ARMS["full"])},
            "arms full and x: train the same model; each must change something",
        ),
        ({"arms": arms(x=None)}, "arms control and x: train the same model"),
        (
            {"arms": arms(x={"jepa.lambda": 0.0, "jepa.layer": 2})},
            "arms control and x: train the same model",
        ),
        *(
            (
                {"arms": arms(a=of(objective), b={**of(objective), key: 2})},
                "arms a and b: train the same model",
            )
            for objective, key in (
                ("span", "jepa.next_state.shift"),
                ("span", "jepa.next_latent.kl"),
                ("next_state", "jepa.next_latent.kl"),
                ("next_state", "jepa.spans_per_sequence"),
                ("next_latent", "jepa.next_state.shift"),
                ("next_latent", "jepa.spans_per_sequence"),
                ("next_latent", "jepa.norm_floor"),
            )
        ),
        (
            {"arms": arms(control={"jepa.lambda": 0.0, "optim.eps": 1e-9})},
            "arm full: optim.eps: is 1e-08 and the control's 1e-09, without being declared",
        ),
        *(
            ({"arms": arms(x={"jepa.lambda": 0.0, key: value})}, "arms control and x: train the s")
            for key, value in (
                *(("eval.every", 7), ("monitor.jepa_every", 3), ("checkpoint.every", 9)),
                *(("data.workers", 1), ("train.log_every", 3), ("data.val", "other/*.bin")),
                *(("parallel.dp_replicate", 2), ("batch.micro", 4), ("optim.muon_nesterov", False)),
                *(("optim.head_lr", 0.5), ("train.enable_looping_at", 0.9)),
                *(("train.gc_every", 0), ("parallel.blocks_per_unit", 2)),
            )
        ),
        (
            {"arms": arms(x={"jepa.lambda": 0.1, "jepa.start_frac": 0.9999})},
            "arm x: jepa.start_frac=0.9999, jepa.ramp_frac=0.0: with train.steps=1000 the weight",
        ),
        ({"config": "nowhere.yaml"}, "arm control, full, delayed: nowhere.yaml: cannot read"),
        (
            {"common": {"train.max_wallclock_seconds": 60.0}},
            "arm control, full, delayed: train.max_wallclock_seconds: runs that end by the clock",
        ),
    ],
)
def test_refused(tmp_path: Path, changes: Mapping[str, Any], expected: str) -> None:
    messages = problems(tmp_path, **changes)
    assert any(problem.startswith(expected) for problem in messages), messages


def test_an_arm_given_twice(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    file.write_text(file.read_text() + "  full:\n    jepa.lambda: 0.3\n")
    with pytest.raises(UserError, match="key 'full' given twice"):
        read_sweep(file)


def test_overrides_cannot_undo_an_arm(tmp_path: Path) -> None:
    expected = "arm delayed: jepa.start_frac: is set in common, too; set it in one place"
    assert problems(tmp_path, "jepa.start_frac=0.5") == [expected]
    messages = problems(tmp_path, "train.steps")
    assert messages == ["command line: 'train.steps': expected KEY=VALUE, e.g. train.steps=100"]


def test_switches_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leftover JEPA_LAYER would change the arms that do not set it."""
    monkeypatch.setenv("JEPA_LAYER", "2")
    (message,) = problems(tmp_path)
    assert message == "environment JEPA_LAYER: a sweep's settings come from its file; unset it"


# ---------------------------------------------------------------------------- pairs


def test_paired_arms_draw_the_same_spans(tmp_path: Path) -> None:
    """A later start or another weight changes which steps have spans, not the spans."""

    def spans(member: Member) -> list[Any]:
        config = member.resolve()
        planner = Planner(config, TrainingClock())
        return [planner.plan(step).samples for step in range(config.train.steps)]

    changed = arms(delayed={"jepa.lambda": 0.05, "jepa.start_frac": 0.3, "jepa.layer": 2})
    sweep = write_sweep(tmp_path, arms=changed, common={"train.steps": 20})
    control, full, delayed, *_, other_seed, _ = map(spans, read_sweep(sweep))
    assert control == [None] * 20
    assert [found is None for found in delayed] == [True] * 6 + [False] * 14
    for step in range(6, 20):
        np.testing.assert_array_equal(full[step], delayed[step])
        assert not np.array_equal(full[step], other_seed[step])


# ---------------------------------------------------------------------------- results


def write_run(member: Member, final: Mapping[str, Any] | None, **changes: Any) -> None:
    """Write the files of a finished run of this member, with ``changes`` in its configuration."""
    member.run_dir.mkdir(parents=True)
    config = member.resolve()
    made_by = Config.model_validate(config.model_dump(by_alias=True) | changes)
    (member.run_dir / "config.yaml").write_text(to_yaml(made_by))
    (member.run_dir / "data.json").write_text(json.dumps({"train": "a", "val": "b"}))
    records: list[Mapping[str, Any]] = [
        {"step": 5, "val/bpb": 2.0 + member.seed / 100, "val/loss": 1.4},
        {"step": 10, "val/bpb": 9.9, "val/loss": 6.9},
    ]
    if final is not None:
        usual = {"step": 10, "val/loss": 1.0, "tokens_digest": str(member.seed), "final": True}
        records.append({**usual, "tokens_per_second": 100.0, **final})
    lines = b"".join(encode(record) for record in records)
    (member.run_dir / "metrics.jsonl").write_bytes(lines)


def write_starts(member: Member, *starts: tuple[int, Mapping[str, Any], Mapping[str, str]]) -> None:
    """Write starts at these steps, with changed settings and these facts."""
    lines = []
    for step, changes, facts in starts:
        config = Config.model_validate(member.resolve().model_dump(by_alias=True) | changes)
        start = StartRecord(1.0, step, 1, False, config=to_dict(config), facts=dict(facts))
        lines.append(json.dumps(asdict(start)) + "\n")
    (member.run_dir / "starts.jsonl").write_text("".join(lines))


def members_in(folder: Path, seeds: list[int]) -> list[Member]:
    return read_sweep(write_sweep(folder, seeds=seeds), [f"run.dir={folder / 'runs'}"])


def test_differences_are_paired(tmp_path: Path) -> None:
    """Seeds differ much more than arms: only paired differences are significant."""
    seeds = [1, 2, 3, 4]
    gain = {"control": [0.0] * 4, "full": [0.01, 0.012, 0.008, 0.01], "delayed": [-1, 2, 1, -1]}
    members = members_in(tmp_path, seeds)
    for member in members:
        value = 3.0 + member.seed + gain[member.arm][member.seed - 1]
        write_run(member, {"val/bpb": value, "val/ema_bpb": value - 0.5})
    results = read_results(members)
    assert not results.left_out
    full = results.differences("full", "val/bpb")
    assert full == pytest.approx(gain["full"])
    assert results.differences("full", "val/ema_bpb") == pytest.approx(full)

    table = describe(results)
    assert table[1].split() == ["control", "4", "5.5000", "100"]
    assert table[2].split()[:6] == ["full", "4", "5.5100", "+0.0100", "+-", "0.0008"]
    assert table[2].split()[6:9] == ["+0.0000", "+-", "0.0000"], "the best came before the end"
    assert "full: +0.0100 +- 0.0008 over 4 pairs: worse than the control" in table
    decided = "delayed: +0.2500 +- 0.7500 over 4 pairs: undecided: 280 more pairs would decide"
    assert decided in table


def test_what_is_left_out(tmp_path: Path) -> None:
    members = members_in(tmp_path, [1, 2, 3])
    by_name = {(member.arm, member.seed): member for member in members}

    def value(arm: str) -> dict[str, float]:
        return {"val/bpb": 2.0 if arm == "control" else 1.9}

    for (arm, seed), member in by_name.items():
        match arm, seed:
            case "full", 1:
                write_run(member, None)
            case "full", 2:
                write_run(member, value(arm) | {"tokens_digest": "another"})
            case "delayed", 2:
                write_run(member, value(arm), batch={"sequences": 64, "micro": 8})
            case "delayed", 3:
                pass
            case _:
                write_run(member, value(arm))
    results = read_results(members)
    runs = tmp_path / "runs"
    assert results.left_out == [
        f"{runs}/full-seed1: not finished, at step 10",
        f"{runs}/delayed-seed2: trained with other settings: batch.sequences was 64 and is 32 in "
        "the list",
        f"{runs}/delayed-seed3: not started yet",
        "full, seed 2: not the tokens of its control",
    ]
    table = describe(results)
    alone = "-0.1000 over 1 pair: undecided: one pair has no estimate of the noise"
    assert f"full: {alone}" in table
    assert f"delayed: {alone}" in table
    assert table[-4:] == [f"  {line}" for line in results.left_out]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_member_counts_against_its_arm(tmp_path: Path, value: float) -> None:
    members = members_in(tmp_path, [1, 2, 3])
    for member in members:
        gain = -0.1 if member.arm == "full" else -0.01 * member.seed
        finite = {"val/bpb": 2.0 + (gain if member.arm != "control" else 0)}
        match member.arm, member.seed:
            case "full", 2:
                write_run(member, {"val/bpb": value, "val/loss": value})
            case "delayed", 3:
                write_run(member, None)
                with (member.run_dir / "metrics.jsonl").open("ab") as file:
                    file.write(encode({"step": 10, "diverged": True, "reason": "not finite"}))
            case _:
                write_run(member, finite)
    results = read_results(members)
    assert results.left_out == []
    assert list(results.diverged) == [("full", 2), ("delayed", 3)]
    output = "\n".join(describe(results))
    assert "nan" not in output.replace("loss is nan", "")
    assert (
        "full: diverged at seed 2, where the control did not: worse than the control; the other "
        "seeds: -0.1000 +- 0.0000 over 2 pairs\n" in output
    )
    assert "2 + 1 diverged" in output
    assert f"  {tmp_path}/runs/delayed-seed3: diverged: at step 10: not finite" in output
    alone = "delayed: diverged at seed 3, where the control did not: worse than the control"
    assert alone in output


def test_one_pair_has_no_error(tmp_path: Path) -> None:
    members = members_in(tmp_path, [1])
    for member in members:
        write_run(member, {"val/bpb": 2.0})
    assert "nan" not in "\n".join(describe(read_results(members)))


FACTS = {"parallel.precision": "float32", "device": "CPU x86_64", "torch": "2.13"}


def test_runs_that_computed_differently_or_changed_are_not_paired(tmp_path: Path) -> None:
    members = members_in(tmp_path, [1, 2])
    for member in members:
        write_run(member, {"val/bpb": 2.0})
        starts = [(0, {}, FACTS), (5, {}, FACTS)]
        match member.arm, member.seed:
            case "full", 1:
                starts[1] = (5, {}, FACTS | {"parallel.precision": "bfloat16"})
            case "full", 2:
                starts = [(0, {}, FACTS | {"torch": "2.11"})]
            case "delayed", 1:
                starts[0] = (0, {"batch": {"sequences": 64, "micro": 8}}, FACTS)
            case "delayed", 2:  # no step of its first start remains
                starts = [(0, {"batch": {"sequences": 64}}, {}), (0, {}, FACTS)]
        write_starts(member, *starts)
    results = read_results(members)
    assert results.left_out == [
        f"{tmp_path}/runs/delayed-seed1: trained with other settings from step 0 on: "
        "batch.sequences was 64 and is 32 in the list",
        "full, seed 1: parallel.precision bfloat16 or float32, of its control float32",
        "full, seed 2: torch 2.11, of its control 2.13",
    ]
    assert list(results.records) == [("control", 1), ("control", 2), ("delayed", 2)]


def test_what_an_arm_declares_may_differ(tmp_path: Path) -> None:
    some = {"control": {}, "bf16": {"parallel.precision": "bfloat16"}}
    file = write_sweep(tmp_path, seeds=[1], arms=some)
    members = read_sweep(file, [f"run.dir={tmp_path / 'runs'}"])
    for member in members:
        write_run(member, {"val/bpb": 2.0})
        precision = "bfloat16" if member.arm == "bf16" else "float32"
        write_starts(member, (0, {}, FACTS | {"parallel.precision": precision}))
    assert read_results(members).left_out == []


def test_the_best_ignores_validations_on_other_data(tmp_path: Path) -> None:
    members = members_in(tmp_path, [1])
    for member in members:
        write_run(member, {"val/bpb": 2.5, "val/set": "b:0"})
    best = [record["best/val/bpb"] for record in read_results(members).records.values()]
    assert best == [2.5] * 3, "2.01 and 9.9 were measured on other data"


def test_without_bits_per_byte(tmp_path: Path) -> None:
    """Where no tokenizer counts bytes, nats per token are compared."""
    members = members_in(tmp_path, [1, 2])
    for member in members:
        write_run(member, {"val/bpb": None, "val/loss": 3.0 if member.arm == "full" else 4.0})
    results = read_results(members)
    assert results.metric == "val/loss"
    assert results.differences("full", results.metric) == (-1.0, -1.0)


def test_no_results_yet(tmp_path: Path) -> None:
    lines = describe(read_results(members_in(tmp_path, [1])))
    assert lines[0] == "no member is finished"
    assert lines[-1] == f"  {tmp_path}/runs/delayed-seed1: not started yet"


def test_added_seeds_are_members(tmp_path: Path) -> None:
    """They come last, so that indices of a job array do not change."""
    file, overrides = write_sweep(tmp_path), [f"run.dir={tmp_path / 'runs'}"]
    before = read_sweep(file, overrides)
    for _ in range(2):
        add_seed(read_sweep(file, overrides))
    members = read_sweep(file, overrides)
    assert members[: len(before)] == before
    assert [member.seed for member in members[len(before) :: len(ARMS)]] == [3, 4]
    (tmp_path / "runs/added_seeds.json").write_text('["x"]')
    with pytest.raises(UserError, match="expected a list of seeds"):
        read_sweep(file, overrides)


@pytest.mark.parametrize("margin", [0, -1, ".inf", "x"])
def test_margins(tmp_path: Path, margin: object) -> None:
    assert read_margins(write_sweep(tmp_path)) == {}
    file = write_sweep(tmp_path, equivalence_margin={"val/bpb": 0.005})
    assert read_margins(file) == {"val/bpb": 0.005}
    file.write_text(file.read_text().replace("0.005", str(margin)))
    with pytest.raises(UserError, match=r"equivalence_margin\.val/bpb"):
        read_margins(file)


def test_seeds_are_added_until_every_arm_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With written results in place of training: a clear arm, and one without an effect."""

    def train(members: Sequence[Member], plan: EvaluationPlan | None, jobs: int) -> int:
        for member in (m for m in members if not m.run_dir.exists()):
            noise = 0.001 * np.random.default_rng([member.seed, len(member.arm)]).normal()
            write_run(member, {"val/bpb": 2.0 + noise + (member.arm == "full")})
        return 0

    some = {name: ARMS[name] for name in ("control", "full", "delayed")}
    file = write_sweep(tmp_path, arms=some, equivalence_margin={"val/bpb": 0.01})
    monkeypatch.setattr(sweep_main, "train_all", train)
    run_dir = f"run.dir={tmp_path / 'runs'}"
    command = ["sweep", "run", str(file), run_dir, "--until-decided"]
    monkeypatch.setattr(sys, "argv", [*command, "--max-pairs", "3"])
    assert sweep_main.main() == 0
    assert "not decided after 3 seeds: full, delayed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command)
    assert sweep_main.main() == 0
    output = capsys.readouterr().out
    assert "delayed: " in output
    assert "equivalent to the control within 0.01" in output
    assert "worse than the control" in output
    seeds = {member.seed for member in read_sweep(file, [run_dir])}
    assert 4 < len(seeds) < 20


# ---------------------------------------------------------------------------- the command


def sweep_command(command: str, *arguments: object, **environ: object) -> Finished:
    return run_command(*SWEEP, command, *arguments, environ=environ, timeout=300)


def test_dry_run(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    environ = {"NPROC_PER_NODE": 3, "OMP_NUM_THREADS": 2}
    finished = sweep_command("run", file, "--dry-run", "train.steps=3", **environ)
    assert finished.code == 0, finished.output
    agent = f"{sys.executable} -m jepa_dist.process.agent"
    launch = f"{agent} --rdzv-backend=loopback --nproc-per-node=3"
    members = read_sweep(file, ["train.steps=3"])
    assert finished.output.splitlines() == [
        f"env OMP_NUM_THREADS=2 {launch} -m jepa_dist.train {' '.join(member.arguments)}"
        for member in members
    ]
    assert not (REPOSITORY / "runs/sweep").exists()


def test_list_and_member(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    listed = sweep_command("list", file)
    assert len(listed.output.splitlines()) == 6
    member = sweep_command("member", file, 5)
    assert member.output.splitlines() == read_sweep(file)[5].arguments
    beyond = sweep_command("member", file, 6)
    assert (beyond.code, beyond.output) == (2, "error: INDEX=6: this sweep's members are 0..5\n")


@pytest.mark.parametrize("ranks", ["0", "many"])
def test_not_a_number_of_ranks(tmp_path: Path, ranks: str) -> None:
    finished = sweep_command("run", write_sweep(tmp_path), NPROC_PER_NODE=ranks)
    assert finished.code == 2
    assert finished.output == f"error: NPROC_PER_NODE={ranks}: expected a number of ranks\n"


def test_help() -> None:
    finished = run_command(*SWEEP, "--help")
    assert finished.code == 0
    assert "jepa_dist sweep results FILE" in finished.output


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_is_stopped_and_resumed(tmp_path: Path) -> None:
    """Ctrl-C in the second member; the same command finishes the rest, and members are paired."""
    write_corpus(tmp_path)
    kept = ("run.dir", "jepa.lambda", "train.steps")
    tiny = dict(item.split("=", 1) for item in tiny_overrides(tmp_path, eval__every=6))
    common = {key: yaml.safe_load(value) for key, value in tiny.items() if key not in kept}
    some = {name: ARMS[name] for name in ("control", "delayed")}
    file = write_sweep(tmp_path, common={**common, "train.steps": 12}, arms=some)
    runs = tmp_path / "runs"
    slow = runs / "delayed-seed1"
    arguments = ["run", file, f"run.dir={runs}", "checkpoint.every=4"]
    environ = {"NPROC_PER_NODE": 1}

    with Command([*SWEEP, *arguments], environ=environ) as command:
        command.wait_for(lambda: (slow / "metrics.jsonl").exists(), 300)
        command.signal(signal.SIGINT)
        stopped = command.wait(120)
    assert "stopped; the same command resumes the sweep" in stopped.output
    assert stopped.code == 128 + signal.SIGINT
    assert "final" in records(runs / "control-seed1")[-1]
    assert not (runs / "control-seed2").exists()

    finished = run_command(*SWEEP, *arguments, "--jobs=2", environ=environ, timeout=600)
    assert finished.code == 0, finished.output
    members = read_sweep(file, [f"run.dir={runs}"])
    assert "finished already" in output_of(members[0]).read_text()
    assert "resuming from" in output_of(members[1]).read_text()
    found = read_results(members)
    assert found.left_out == []
    for seed in (1, 2):
        control, delayed = (records(runs / f"{arm}-seed{seed}") for arm in some)
        before = 4  # the objective starts at 0.3 of 12 steps
        for one, other in zip(control[:before], delayed[:before], strict=True):
            for key in ("loss/ce", "grad_norm", "tokens_digest"):
                assert one[key] == other[key], "the same weights, the same data"
        assert control[-1]["loss/ce"] != delayed[-1]["loss/ce"]
    differences = [
        records(runs / f"delayed-seed{seed}")[-1]["val/bpb"]
        - records(runs / f"control-seed{seed}")[-1]["val/bpb"]
        for seed in (1, 2)
    ]
    output = sweep_command("results", file, f"run.dir={runs}").output
    error = np.std(differences, ddof=1) / math.sqrt(2)
    assert f"delayed: {np.mean(differences):+.4f} +- {error:.4f} over 2 pairs" in output


def test_a_member_that_cannot_start(tmp_path: Path) -> None:
    """One line says why; the other members are tried; the sweep names both and exits with 1."""
    file = write_sweep(tmp_path, seeds=[1], arms={n: ARMS[n] for n in ("control", "full")})
    missing = [f"data.{split}={tmp_path}/none_*.bin" for split in ("train", "val")]
    finished = sweep_command("run", file, f"run.dir={tmp_path}/runs", *missing, NPROC_PER_NODE=1)
    assert finished.code == 1
    lines = iter(finished.output.splitlines())
    folders = [f"{tmp_path}/runs/{arm}-seed1" for arm in ("control", "full")]
    for number, folder in enumerate(folders):
        assert next(lines) == f"member {number} of 2: {folder}"
        assert next(lines).startswith("error: data.train=")
        assert next(lines).startswith("error: data.val=")
    for folder in folders:
        assert next(lines) == f"error: {folder}: not started (exit code 2); see its messages above"
    assert list(lines) == []


# In place of a member's training: records when it began and ended, and fails at seed 3.
_STAND_IN = """
import json, pathlib, signal, sys, time
run_dir, seed, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
run_dir.mkdir(parents=True)
began = time.monotonic()
print("training", run_dir.name, flush=True)
time.sleep(seconds)
(run_dir / "time.json").write_text(json.dumps([began, time.monotonic()]))
(run_dir / "status.json").write_text(json.dumps({"state": "failed" if seed == 3 else "finished"}))
"""


def stand_in(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(member: Member, ranks: int, jobs: int) -> list[str]:
        arguments = (str(member.run_dir), str(member.seed), str(seconds))
        return [sys.executable, "-c", _STAND_IN, *arguments]

    monkeypatch.setattr(running, "check_command", lambda member: [sys.executable, "-c", ""])
    monkeypatch.setattr(running, "train_command", command)
    monkeypatch.setenv("NPROC_PER_NODE", "1")


def sweep_of_six(folder: Path) -> list[Member]:
    arms = {name: ARMS[name] for name in ("control", "full")}
    file = write_sweep(folder, seeds=[1, 2, 3], arms=arms)
    return read_sweep(file, [f"run.dir={folder / 'runs'}"])


def test_several_members_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(0.5, monkeypatch)
    members = sweep_of_six(tmp_path)
    assert train_all(members, None, jobs=2) == 1
    spans = [json.loads((member.run_dir / "time.json").read_text()) for member in members]
    at_once = [sum(began <= start < end for began, end in spans) for start, _ in spans]
    assert max(at_once) == 2
    for member in members:
        assert output_of(member).read_text() == f"training {member.run_dir.name}\n"
    captured = capfd.readouterr()
    assert "training" not in captured.out
    assert f"member 5 of 6: {members[5].run_dir} (output: {output_of(members[5])})" in captured.out
    assert f"{members[3].run_dir}: done" in captured.out
    assert captured.err.splitlines() == [
        f"error: {member.run_dir}: not finished (exit code 0, state failed); "
        f"see its messages in {output_of(member)}"
        for member in members[4:]
    ]


def test_a_request_to_stop_reaches_all_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(600, monkeypatch)
    members = sweep_of_six(tmp_path)

    def stop() -> None:
        running_now = members[:3]
        wait_until(
            lambda: all(
                output_of(m).is_file() and output_of(m).stat().st_size > 0 for m in running_now
            ),
            60,
        )
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert train_all(members, None, jobs=3) == 128 + signal.SIGTERM
    thread.join()
    assert "stopped; the same command resumes the sweep" in capfd.readouterr().out
    assert [member.run_dir.exists() for member in members] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("ranks", "jobs", "visible", "expected"),
    [
        (1, 1, None, [None]),
        (1, 3, None, ["0", "1", "2"]),
        (2, 2, None, ["0,1", "2,3"]),
        (1, 6, None, ["0", "1", "2", "3", "0", "1"]),
        (1, 2, "5,7", ["5", "7"]),
        (8, 2, None, [None, None]),
    ],
)
def test_gpus_are_distributed(
    ranks: int,
    jobs: int,
    visible: str | None,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with four."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert running._devices(ranks, jobs) == expected


def test_number_of_jobs(tmp_path: Path) -> None:
    finished = sweep_command("run", write_sweep(tmp_path), "--jobs", 0)
    assert finished.code == 2
    assert "argument --jobs: '0': expected a number of members, 1 or more" in finished.output


# ---------------------------------------------------------------------------- tasks and probes


def write_results(
    member: Member, plan: EvaluationPlan, accuracy: float, *, step: int = 10, layer: int = -1
) -> None:
    """Write the evaluation.json of a member."""
    digests = plan.inputs(QuantizationConfig())
    task = TaskResult(
        **{"digest": digests["task/cloze"], "items": 100, "chance": 0.25, "cut": 0},
        **{"accuracy": accuracy, "accuracy_per_byte": accuracy},
    )
    probe = ProbeResult(
        **{"digest": digests["linear_probe/package"].split()[0], "layer": layer},
        **{"classes": 2, "train_documents": 70, "test_documents": 30, "cut": 0},
        **{"accuracy": accuracy / 2, "interval": (0.1, 0.9), "chance": 0.5},
        **{"effective_rank": 9 - accuracy, "mean_cosine": 0.1},
    )
    evaluation = Evaluation(
        step=step, weights="live", tasks={"cloze": task}, probes={"package": probe}
    )
    write_evaluation(member.run_dir / EVALUATION, evaluation)


def planned(folder: Path) -> tuple[Path, EvaluationPlan, list[Member]]:
    files = {"tasks": [str(folder / "cloze.jsonl")], "probe": [str(folder / "package.jsonl")]}
    for (file,) in files.values():
        Path(file).write_text("{}\n")
    arms = {name: ARMS[name] for name in ("control", "full")}
    file = write_sweep(folder, seeds=[1, 2, 3], arms=arms, evaluate=files)
    plan = read_plan(file)
    assert plan is not None
    return file, plan, read_sweep(file, [f"run.dir={folder / 'runs'}"])


def test_accuracies_are_paired_and_higher_is_better(tmp_path: Path) -> None:
    _, plan, members = planned(tmp_path)
    for member in members:
        gain = {"control": 0.0, "full": 0.05 + member.seed / 1000}[member.arm]
        write_run(member, {"val/bpb": 2.0 + member.seed})
        write_results(member, plan, 0.5 + member.seed / 10 + gain)
    results = read_results(members)
    states = ["states/package/effective_rank", "states/package/mean_cosine"]
    # Accuracy per byte is left out, because it is the same.
    assert results.evaluated == ["task/cloze", "linear_probe/package", *states]
    assert results.differences("full", "task/cloze") == pytest.approx((0.051, 0.052, 0.053))
    tables = "\n".join(describe(results))
    assert "\ntask/cloze " in tables
    assert tables.count("better than the control") == 2
    assert tables.count("lower than the control") == 1  # effective rank: neither is better
    assert "+0.0520 +- 0.0006" in tables


def test_accuracies_on_other_files_are_not_paired(tmp_path: Path) -> None:
    _, plan, members = planned(tmp_path)
    for member in members:
        write_run(member, {"val/bpb": 2.0})
        if member.index == 1:
            write_results(member, plan, 0.5, layer=2)
        elif member.index != 3:
            write_results(member, plan, 0.5, step=9 if member.index == 5 else 10)
    results = read_results(members)
    assert results.differences("full", "task/cloze") == (0.0,)
    (members[3].run_dir / EVALUATION).write_text('{"format": 1, "tasks": {"\x1b": 1}}')
    assert read_results(members).notes == results.notes
    assert results.differences("full", "linear_probe/package") == ()
    assert [note.split(":")[0] for note in results.notes if "sweep evaluate FILE" in note] == [
        *("full, seed 1", "full, seed 2", "full, seed 3")
    ]


def test_members_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plan, members = planned(tmp_path)
    for member in members[:2]:
        write_run(member, {"val/bpb": 2.0})
        (member.run_dir / "status.json").write_text('{"state": "finished", "step": 10}')
    write_results(members[0], plan, 0.5)
    commands: list[Sequence[str]] = []

    def run(self: Commands, command: Sequence[str], *_: object) -> int:
        commands.append(command)
        write_results(members[1], plan, 0.6)
        return 0

    monkeypatch.setattr(Commands, "run", run)
    for _ in range(2):
        arguments = ["sweep", "evaluate", str(file), f"run.dir={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert sweep_main.main() == 0
    run_dir = str(members[1].run_dir)
    assert [command[1:] for command in commands] == [
        [
            *("-m", "jepa_dist.evaluate", run_dir, "--tasks", *plan.tasks, "--probe", *plan.probe),
            *("--layer", "-1", "--json", f"{run_dir}/evaluation.json"),
        ]
    ]
    Path(plan.tasks[0]).write_text("{ }\n")
    monkeypatch.setattr(sys, "argv", [*arguments, "--dry-run"])
    assert sweep_main.main() == 0
    assert len(commands) == 1


# ---------------------------------------------------------------------------- quantization


def write_quantized(member: Member, gaps: Mapping[int, float], step: int = 10) -> None:
    """Write the evaluation.json of a member: by number of bits, what quantization costs."""
    settings = member.resolve().quantization
    results = [
        QuantizedResult(
            **{"settings": settings.with_bits(bits), "matrices": 3, "validated_on": "b:0"},
            **{"loss": 1.5 + gap, "full_loss": 1.5, "full_bits_per_byte": 2.0 + member.seed},
            bits_per_byte=2.0 + member.seed + gap,
        )
        for bits, gap in gaps.items()
    ]
    evaluation = Evaluation(step=step, weights="live", quantized=results)
    write_evaluation(member.run_dir / EVALUATION, evaluation)


def quantized_members(folder: Path, seeds: list[int]) -> tuple[Path, list[Member]]:
    arms = {name: ARMS[name] for name in ("control", "full")}
    file = write_sweep(folder, seeds=seeds, arms=arms, evaluate={"quantize": [4, 6]})
    return file, read_sweep(file, [f"run.dir={folder / 'runs'}"])


QUANTIZED = [f"quantized/{bits}_bits/{end}" for bits in (4, 6) for end in ("val/bpb", "gap")]


def test_gaps_are_paired(tmp_path: Path) -> None:
    file, members = quantized_members(tmp_path, [1, 2, 3])
    for member in members:
        shrunk = {"control": 0.0, "full": 0.01 + member.seed / 1000}[member.arm]
        write_run(member, {"val/bpb": 2.0 + member.seed})
        four = {} if member.index == 5 else {4: 0.1 + member.seed / 100 - shrunk}
        write_quantized(member, {**four, 6: 0.02})
    results = read_results(members, {}, read_widths(file))
    assert results.differences("full", "quantized/4_bits/gap") == pytest.approx((-0.011, -0.012))
    assert results.differences("full", "quantized/6_bits/gap") == pytest.approx((0.0, 0.0, 0.0))
    header, control, full, *lines = describe(results)
    columns = ["4-bit", "val/bpb", "gap", "6-bit", "val/bpb", "gap"]
    assert header.split("tokens/s")[1].split() == columns
    assert control.split()[-4:] == ["4.1200", "0.1200", "4.0200", "0.0200"]
    assert full.split()[-4:] == ["3.6035", "0.1035", "4.0200", "0.0200"]
    start = next(n for n, line in enumerate(lines) if line.startswith("quantized/4_bits/gap "))
    assert lines[start + 2].split()[:6] == ["full", "0.1035", "-0.0115", "+-", "0.0005", "2"]
    assert lines[start + 2].endswith("better than the control")
    assert [note.split(":")[0] for note in results.notes if "sweep evaluate" in note] == [
        "full, seed 3"
    ]
    assert not any("quantized" in line for line in describe(read_results(members)))


def test_gaps_of_other_settings_or_weights_are_not_known(tmp_path: Path) -> None:
    file, members = quantized_members(tmp_path, [1])
    for member in members:
        write_run(member, {"val/bpb": 2.0})
        write_quantized(member, {4: 0.1, 6: 0.02})
    changed = ["quantization.float16_elements=1000", f"run.dir={tmp_path / 'runs'}"]
    results = read_results(read_sweep(file, changed), {}, read_widths(file))
    assert results.differences("full", "quantized/4_bits/gap") == ()
    assert [note for note in results.notes if "evaluated" in note] == [
        f"{arm}, seed 1: {', '.join(QUANTIZED)}: not evaluated, or otherwise than its control; "
        "jepa_dist sweep evaluate FILE"
        for arm in ("control", "full")
    ]
    write_quantized(members[1], {4: 0.1, 6: 0.02}, step=9)
    results = read_results(members, {}, [6])
    assert results.values("control", "quantized/6_bits/gap") == pytest.approx({1: 0.02})
    assert results.values("full", "quantized/6_bits/gap") == {}


def test_members_are_quantized_again_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, members = quantized_members(tmp_path, [1])
    for member in members:
        write_run(member, {"val/bpb": 2.0})
        (member.run_dir / "status.json").write_text('{"state": "finished", "step": 10}')
    write_quantized(members[0], {4: 0.1, 6: 0.02})

    def dry_run(*changes: str) -> list[str]:
        arguments = ["evaluate", str(file), f"run.dir={tmp_path / 'runs'}", "--dry-run", *changes]
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        assert sweep_main.main() == 0
        return capsys.readouterr().out.splitlines()

    (command,) = dry_run()
    assert "/full-seed1 --quantize 4 6 quantization.embed_bits=8 " in command
    assert "matrix_bits" not in command
    commands = dry_run("quantization.float16_elements=1000")
    assert len(commands) == 2
    assert "quantization.float16_elements=1000 " in commands[0]


def test_quantized_results_need_numbers_of_bits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no numbers of bits; .*quantize: \[4, 6\]"):
        read_widths(write_sweep(tmp_path))
    (message, *_) = problems(tmp_path, evaluate={"quantize": [9]})
    assert message.startswith("evaluate.quantize.0: ")


def test_urls_of_the_sweep_are_repeated_for_the_evaluation(tmp_path: Path) -> None:
    """They are refused where only a run directory names them."""
    data = {"data.train": "s3://bucket/train_*.bin", "data.val": "s3://bucket/val_*.bin"}
    files = {"tasks": ["cloze.jsonl"]}
    member = read_sweep(write_sweep(tmp_path, common=data, evaluate=files))[0]
    given = EvaluationPlan(tasks=["cloze.jsonl"]).arguments(tmp_path, member.resolve())
    assert given[:4] == [str(tmp_path), "data.val=s3://bucket/val_*.bin", "--tasks", "cloze.jsonl"]
    given = EvaluationPlan(quantize=[4]).arguments(tmp_path, member.resolve())
    assert sorted(given[1:3]) == [
        "data.train=s3://bucket/train_*.bin",
        "data.val=s3://bucket/val_*.bin",
    ]


def test_a_plan_whose_file_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_plan(write_sweep(tmp_path, evaluate={"tasks": [str(tmp_path / "none.jsonl")]}))
    assert read_plan(write_sweep(tmp_path)) is None
