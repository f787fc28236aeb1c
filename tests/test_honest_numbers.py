"""Edge cases of metrics: branched, idle or changed runs, records without rows, unknown devices."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jepa_dist.config import Config, load, to_dict
from jepa_dist.errors import UserError
from jepa_dist.interop.parameter_golf import export_final_model, import_final_model
from jepa_dist.interop.safetensors_io import Description, read_description, write_export
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.model.gpt import GPT
from jepa_dist.monitor.hardware import peak_flops
from jepa_dist.monitor.history import RunHistory, lasting, read_starts, young_interval
from jepa_dist.objectives.diagnostics import describe_states
from jepa_dist.objectives.span import SpanObjective
from jepa_dist.objectives.spans import max_length
from jepa_dist.optim.update_ratio import UpdateRatio
from jepa_dist.plan import StepPlan
from jepa_dist.report.compare import difference, pairing
from jepa_dist.report.runs import read_runs
from jepa_dist.run.progress import Progress, RunState
from jepa_dist.start.resume import differences
from jepa_dist.training.records import KindOfStep, losses, mean_flops
from tests.support.tiny import tiny_config

# ---------------------------------------------------------------------------- goodput


def test_a_branch_is_not_credited_with_its_parent(tmp_path: Path) -> None:
    history = RunHistory(tmp_path, 100, 1, None, train_seconds=5000.0)
    starts = tmp_path / "starts.jsonl"
    began = json.loads(starts.read_text())
    starts.write_text(json.dumps({**began, "time": began["time"] - 100}) + "\n")
    assert history.record(5000.0, None)["goodput/productive_share"] == 0
    again = RunHistory(tmp_path, 120, 1, "stopped", train_seconds=5050.0)
    share = again.record(5060.0, None)["goodput/productive_share"]
    assert share == pytest.approx(0.6, rel=0.02)


def test_idle_time_is_not_time_between_failures(tmp_path: Path) -> None:
    RunHistory(tmp_path, 0, 1, None)
    starts = tmp_path / "starts.jsonl"
    began = json.loads(starts.read_text())
    starts.write_text(json.dumps({**began, "time": time.time() - 10_000}) + "\n")
    beats = tmp_path / "heartbeats"
    beats.mkdir()
    (beats / "rank_0.json").touch()
    # It was last alive 9,000 s ago: it has run for 1,000 s, and then nobody started it again.
    os.utime(beats / "rank_0.json", (time.time() - 9000,) * 2)
    record = RunHistory(tmp_path, 5, 1, "running").record(600.0, 2.0)
    assert record["goodput/wall_seconds"] == pytest.approx(10_000, rel=0.01)
    expected = young_interval(2.0, 1000)
    assert record["checkpoint/young_interval_seconds"] == pytest.approx(expected, rel=0.01)


def test_starts_of_earlier_versions_are_read(tmp_path: Path) -> None:
    old = '{"time": 5.5, "step": 0, "world_size": 2, "after_failure": false}\n'
    (tmp_path / "starts.jsonl").write_text(old + '{"time": 17')
    RunHistory(tmp_path, 5, 2, "stopped", config={"seed": 1}, facts={"torch": "2"})
    first, second = read_starts(tmp_path)
    assert (first.config, first.facts, first.train_seconds) == (None, None, 0.0)
    assert (second.step, second.config, second.facts) == (5, {"seed": 1}, {"torch": "2"})


def test_starts_beyond_a_later_start_are_dropped(tmp_path: Path) -> None:
    for step in (0, 10, 30, 20, 40):
        RunHistory(tmp_path, step, 1, "stopped")
    assert [start.step for start in lasting(read_starts(tmp_path))] == [0, 10, 20, 40]


# ---------------------------------------------------------------------------- records


def test_without_rows_the_objective_has_no_numbers(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, jepa__within_documents=True)
    spans = np.zeros((6, 1, 2), dtype=np.int64)
    plan = replace(StepPlan.for_warm_up(0, 0.1, spans), jepa_weight=0.1)
    values = {"ce": 2.0, "jepa": 0.0, "floored": 0.0}
    objective = SpanObjective(config, bos_id=None)
    record = losses(plan, values, objective)
    assert record["loss/jepa"] is None
    assert record.keys().isdisjoint({"jepa/cos", "jepa/relative", "jepa/floored"})
    assert (record["loss/total"], record["jepa/lambda"]) == (2.0, 0.1)
    assert record["jepa/rows_without_span"] == 6
    spans[:2] = 3
    plan = replace(plan, samples=spans)
    assert losses(plan, {**values, "jepa": 1.5}, objective)["jepa/cos"] == -0.5


def test_flops_of_a_record_that_spans_phases(tmp_path: Path) -> None:
    model = tiny_config(tmp_path).model
    plain, looped = (training_flops_per_token(model, phase) for phase in (0, 2))
    off, on = KindOfStep(0, False), KindOfStep(2, True)
    assert mean_flops(model, 8.0, {off: 3, on: 1}) == pytest.approx((3 * plain + looped + 8) / 4)
    assert mean_flops(model, 0.0, {on: 5}) == looped > plain


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA RTX A1000", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA A1000", "NVIDIA H1000"),
        *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
        *("GRID A100-10C", "NVIDIA A100-2-10C", "NVIDIA GH200 480GB", "AMD A100", ""),
    ],
)
def test_devices_whose_peak_is_not_known(name: str) -> None:
    assert peak_flops(name) is None


def test_devices_whose_peak_is_known() -> None:
    assert peak_flops("A100-SXM4-40GB") == peak_flops("NVIDIA A100 80GB PCIe") == 312e12
    assert peak_flops("NVIDIA GB200") == 2500e12


@pytest.mark.parametrize("width", [512, 500, 1])
def test_the_update_ratio_sees_all_columns(width: int) -> None:
    weight = torch.ones(40_000 // width * 3, width)
    ratio = UpdateRatio({"matrix": [weight]})
    ratio.before()
    weight[:, width // 2 :] += 0.5  # half of the columns move
    sums = {name: value.item() for name, value in ratio.after().items()}
    whole = torch.where(torch.arange(width) >= width // 2, 1.5, 1.0).expand_as(weight)
    moved = (whole - 1).norm() / whole.norm()
    assert ratio.metrics(sums)["update_ratio/matrix"] == pytest.approx(moved.item(), rel=0.02)


# ---------------------------------------------------------------------------- the objective


@pytest.mark.parametrize(
    ("fraction", "length", "expected"),
    [
        *((0.29, 100, 29), (0.07, 100, 7), (0.57, 100, 57), (0.1, 30, 3), (0.5, 24, 12)),
        *((0.3, 10, 3), (1.0, 24, 22), (0.0, 24, 1), (0.299, 100, 29), (1e-9, 100, 1)),
    ],
)
def test_the_cap_of_spans_is_the_floor_of_what_was_written(
    fraction: float, length: int, expected: int
) -> None:
    assert max_length(length, fraction) == expected


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e12])
@pytest.mark.parametrize("width", [8, 96])
def test_equal_states_have_rank_one(scale: float, width: int) -> None:
    """Also if the mean is rounded, so that the centered states are noise."""
    state_D = scale * torch.randn(width, generator=torch.Generator().manual_seed(0))
    found = describe_states(state_D.expand(3, 37, width))
    assert found["effective_rank"] == pytest.approx(1.0)
    assert found["participation_ratio"] == pytest.approx(1.0)


def test_an_eigenvalue_iteration_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix_DD: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    found = describe_states(torch.randn(2, 9, 4))
    assert math.isnan(found["effective_rank"])
    assert found["std"] > 0


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        (["jepa.start_frac=0.9"], True),  # the last of ten steps begins there
        (["jepa.start_frac=0.9", "jepa.ramp_frac=0.1"], False),
        (["jepa.start_frac=0.8", "jepa.ramp_frac=0.5"], True),
        (["jepa.start_frac=0.95"], False),
        (["jepa.start_frac=0.95", "train.steps=100"], True),
        (["jepa.start_frac=0.95", "train.max_wallclock_seconds=60"], True),
        (["jepa.start_frac=0.95", "jepa.lambda=0"], True),
        (["train.steps=1"], True),
        (["train.steps=1", "jepa.ramp_frac=0.1"], False),
    ],
)
def test_an_objective_that_never_starts_is_refused(settings: list[str], starts: bool) -> None:
    overrides = ["train.steps=10", "jepa.lambda=0.1", *settings]
    if starts:
        load(None, overrides, {})
        return
    with pytest.raises(UserError, match=r"the weight would be 0 in every step; start earlier"):
        load(None, overrides, {})


# ---------------------------------------------------------------------------- reports


def write_run(folder: Path, records: list[dict[str, Any]], *starts: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "seed: 1\ntrain: {steps: 4}\nbatch: {sequences: 8}\nmodel: {seq_len: 16}\n"
    )
    (folder / "data.json").write_text('{"train": {"digest": "1"}, "val": {"digest": "2"}}')
    (folder / "status.json").write_text('{"state": "running", "step": 0, "reason": ""}')
    usual = {"world_size": 1, "after_failure": False, "time": 1.0}
    for name, rows in (("metrics", records), ("starts", [{**usual, **s} for s in starts])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_tokens_are_those_that_were_counted(tmp_path: Path) -> None:
    """The batch doubled after step 2; runs of earlier versions count by their batch."""
    counted = [{"step": s, "tokens": t, "val/loss": 1.0} for s, t in ((2, 256), (4, 768))]
    plain = [{"step": s, "val/loss": 1.0} for s in (2, 4)]
    new, old = read_runs([write_run(tmp_path / "a", counted), write_run(tmp_path / "b", plain)])
    steps = np.array([0.0, 1, 2, 3, 4])
    np.testing.assert_array_equal(new.tokens_at(steps), [0, 128, 256, 512, 768])
    np.testing.assert_array_equal(old.tokens_at(steps), [0, 128, 256, 384, 512])


def test_validations_on_other_data_are_not_part_of_the_curve(tmp_path: Path) -> None:
    records = [
        {"step": s, "loss/ce": 2.0, "val/loss": s, "val/set": "ab"[s > 2]} for s in (1, 2, 4)
    ]
    plain = [{**record, "val/set": "a"} for record in records]
    run, other = read_runs([write_run(tmp_path / "a", records), write_run(tmp_path / "b", plain)])
    assert run.series["val/loss"].steps.tolist() == [4]
    assert run.series["loss/ce"].steps.tolist() == [1, 2, 4]
    assert any("val/* up to step 2 omitted" in note for note in run.notes)
    assert len(difference(run, other, "val/loss")[0]) == 0
    assert any("validation data" in reason for reason in pairing([run, other]))


def test_runs_with_changed_settings_or_precision_are_not_paired(tmp_path: Path) -> None:
    records = [{"step": s, "loss/ce": 2.0, "tokens_digest": "a"} for s in (2, 4)]
    start = {"step": 0, "config": {"optim": {"beta1": 0.9}}, "facts": {"torch": "2.13"}}
    later = {**start, "step": 2, "config": {"optim": {"beta1": 0.8}, "run": {"dir": "x"}}}
    other = {**start, "facts": {"torch": "2.11"}}
    names = {"plain": [start], "changed": [start, later], "other": [other]}
    folders = [write_run(tmp_path / name, records, *starts) for name, starts in names.items()]
    plain, changed, unlike = read_runs(folders)
    assert pairing([plain, plain]) == []
    (reason,) = pairing([plain, changed])
    assert reason == "changed: settings changed during changed (see notes)"
    assert "optim.beta1 changed from 0.9 to 0.8 at step 2" in changed.notes
    assert pairing([plain, unlike]) == ["other: torch 2.11 against 2.13"]


def test_another_validation_set_is_reported_when_resuming(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    before = RunState(Progress(), to_dict(config), "data", "a:0")
    assert differences(tmp_path, before, config, "data", "a:0") == []
    (message,) = differences(tmp_path, before, config, "data", "a:5")
    assert message.startswith("changed since the checkpoint: the validation data (data.val,")
    old = replace(before, validation_fingerprint=None)  # a checkpoint that does not say
    assert differences(tmp_path, old, config, "data", "a:5") == []


# ---------------------------------------------------------------------------- exports


def exported(folder: Path, phase: int, value: float = 1.0) -> Path:
    config = tiny_config(folder)
    model = GPT(config.model)
    state = {name: torch.full(p.shape, value) for name, p in model.named_parameters()}
    description = Description(step=3, phase=phase, weights="live", config=config)
    return write_export(folder, state, description, allow_not_finite=True).parent


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_the_phase_survives_final_model(tmp_path: Path, phase: int) -> None:
    source = exported(tmp_path / "source", phase)
    settings = export_final_model(source, tmp_path / "final_model.pt")
    back = import_final_model(tmp_path / "final_model.pt", settings, tmp_path / "back")
    assert read_description(back).phase == phase
    named = json.loads(settings.read_text())
    del named["recurrence_phase"]  # as the script's own settings
    settings.write_text(json.dumps(named))
    back = import_final_model(tmp_path / "final_model.pt", settings, tmp_path / "again")
    assert read_description(back).phase == 2
    settings.write_text(json.dumps({**named, "recurrence_phase": 7}))
    with pytest.raises(UserError, match="recurrence_phase=7: expected 0 to 2"):
        import_final_model(tmp_path / "final_model.pt", settings, tmp_path / "never")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nonfinite_weights_are_exported_only_on_request(tmp_path: Path, value: float) -> None:
    config = tiny_config(tmp_path)
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, value])}
    description = Description(step=3, phase=0, weights="live", config=config)
    with pytest.raises(UserError, match="1 of 2 tensors are not finite, the first is b; export an"):
        write_export(tmp_path / "out", state, description)
    assert not (tmp_path / "out").exists()
    path = write_export(tmp_path / "out", state, description, allow_not_finite=True)
    assert load_file(path).keys() == state.keys()
    source = exported(tmp_path / "source", 0, value)
    with pytest.raises(UserError, match="not finite"):
        export_final_model(source, tmp_path / "final_model.pt")
    assert not (tmp_path / "final_model.pt").exists()
    export_final_model(source, tmp_path / "final_model.pt", allow_not_finite=True)


def test_the_defaults_are_valid() -> None:
    assert load(None, [], {}).config == Config()
