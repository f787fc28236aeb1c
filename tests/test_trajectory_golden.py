"""Whole training runs against the reference's numbers (golden README section 4), on 1-3 ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from jepa_dist.config import Config, load, to_dict
from jepa_dist.data.loader import Batch, make_batch
from jepa_dist.data.shards import write_shard
from jepa_dist.data.sources import training_order
from jepa_dist.interop import parameter_golf
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.listeners import Silent
from jepa_dist.training.loop import Trainer
from tests.support.golden_cases import Case, cases
from tests.support.ranks import run_ranks
from tests.support.tiny import write_corpus

_OPTIM = (
    "matrix_lr", "scalar_lr", "tied_embed_lr", "embed_lr", "head_lr", "embed_wd", "adam_wd",
    "beta1", "beta2", "muon_momentum", "muon_momentum_warmup_start", "muon_momentum_warmup_steps",
    "muon_backend_steps", "muon_row_normalize", "grad_clip_norm", "warmdown_frac", "min_lr",
    "ema_decay",
)  # fmt: skip
_RENAMED = {"matrix_wd": "muon_wd", "eps": "adam_eps"}


def config_of(case: Case, corpus: Path, **changes: Any) -> Config:
    settings, run = case.info["settings"], case.info["run"]
    model = to_dict(parameter_golf.model_config(settings))
    optim = {name: settings[name] for name in _OPTIM}
    optim |= {ours: settings[theirs] for ours, theirs in _RENAMED.items()}
    values: dict[str, Any] = {
        "data.train": corpus / "train_*.bin",
        "data.val": corpus / "val_*.bin",
        "data.tokenizer": None,
        "data.workers": 0,
        "train.steps": run["steps"],
        "train.log_every": 1,
        "train.enable_looping_at": settings["enable_looping_at"],
        "train.loop_phase2_at": settings["loop_phase2_at"],
        "batch.sequences": run["grad_accum_steps"] * run["batch"],
        "batch.micro": run["batch"],
        "optim.matrix": "muon",
        "parallel.compile": False,
        "eval.sequences": 1,
        **{f"model.{name}": value for name, value in model.items()},
        **{f"optim.{name}": value for name, value in optim.items()},
        **changes,
    }
    return load(None, [f"{k}={_yaml(v)}" for k, v in values.items()], {}).config


def _yaml(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


class GoldenBatches:
    """Yields the case's tokens as this rank's micro-batches."""

    def __init__(self, trainer: Trainer, tokens: Tensor) -> None:
        self._layout = trainer.train_step.layout
        self._steps = tokens.flatten(1, 2).long().numpy()  # [steps, global batch, T+1]
        self._index = 0

    def __next__(self) -> Batch:
        step, micro = divmod(self._index, self._layout.num_micro)
        rows = self._layout.micro_rows(micro)
        self._index += 1
        return make_batch(self._steps[step][rows.start : rows.stop], rows, self._layout.micro_size)

    def close(self) -> None:
        pass


class Recorder(Silent):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def write_mixture_of(case: Case, config: Config) -> None:
    """Write the case's tokens as the samples that a mixture of two sources draws, in its order.

    A shard of T + 1 tokens is one sample.
    """
    rows = case.tensors()["tokens"].flatten(0, 2).numpy()
    order = training_order(config)
    of, _ = order.draw(np.arange(len(rows)))
    samples = order.ids(0, len(rows), config.seed) - np.array([0, order.sizes[0]])[of]
    assert len({*of.tolist()}) == 2
    for row, source, sample in zip(rows, of, samples, strict=True):
        pattern = Path(config.data.train[source].shards)
        write_shard(pattern.with_name(f"train_{sample:03}.bin"), row)


def run(
    rank: int, world_size: int, config: Config, case: Case, from_shards: bool = False
) -> dict[str, Any]:
    trainer = build_trainer(config, start_world(config.parallel))
    state = trainer.state
    average = state.ema.state_tensors()
    with torch.no_grad():
        initial = case.tensors("param/")
        for name, parameter in state.model.named_parameters():
            full = initial[parameter_golf.to_reference_name(name)].float()
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
            average[f"ema/{name}"].copy_(parameter)
    if not from_shards:
        batches = GoldenBatches(trainer, case.tensors()["tokens"])
        trainer.segment = replace(trainer.segment, batches=batches)
    recorder = Recorder()
    trainer.run(recorder)
    names = [name for name, _ in state.model.named_parameters()]
    return {
        "records": recorder.records,
        "final": {n: p.full_tensor().detach() for n, p in state.model.named_parameters()},
        "ema": {n: average[f"ema/{n}"].full_tensor().detach() for n in names},
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", cases("traj"))
def test_trajectory(case: Case, world_size: int, tmp_path: Path) -> None:
    write_corpus(tmp_path, num_ids=case.info["settings"]["vocab_size"])
    config = config_of(case, tmp_path)
    assert_equal(run_ranks(run, world_size, config, case)[0], case, config)


@pytest.mark.parametrize("case", cases("traj"))
def test_trajectory_over_a_mixture(case: Case, tmp_path: Path) -> None:
    """The same numbers from shards of two sources, by the loader's processes, on two ranks."""
    write_corpus(tmp_path, num_ids=case.info["settings"]["vocab_size"])
    count, seq_len = case.tensors()["tokens"].flatten(0, 2).shape
    sources = []
    for name, weight in (("left", 0.6), ("right", 0.4)):
        shards = tmp_path / name / "train_*.bin"
        shards.parent.mkdir()
        for sample in range(count):  # unread unless a sample of the case takes its place
            empty = np.zeros(seq_len, np.uint16)
            write_shard(shards.with_name(f"train_{sample:03}.bin"), empty)
        sources.append({"name": name, "shards": str(shards), "weight": weight})
    config = config_of(case, tmp_path, **{"data.train": json.dumps(sources), "data.workers": 1})
    write_mixture_of(case, config)
    ours = run_ranks(run, 2, config, case, True)[0]
    assert_equal(ours, case, config)
    losses = [
        [record.get(f"loss/ce/{name}") for name in ("left", "right")] for record in ours["records"]
    ]
    drawn = training_order(config).draw(np.arange(count))[0].reshape(len(losses), -1)
    for record, parts, of in zip(ours["records"], losses, drawn, strict=True):
        shares = np.bincount(of, minlength=2) / of.size
        mean = sum(s * loss for s, loss in zip(shares, parts, strict=True) if s)
        assert mean == pytest.approx(record["loss/ce"], rel=1e-6)


def assert_equal(ours: dict[str, Any], case: Case, config: Config) -> None:
    golden = case.tensors()
    for step, record in enumerate(ours["records"]):
        assert abs(record["loss/ce"] - golden["loss"][step].item()) <= 2e-5
        norm = golden["grad_norm_before_clip"][step].item()
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert record["progress"] == pytest.approx(golden["frac"][step].item(), abs=1e-7)
        assert record["phase"] == golden["loop_phase"][step].item()
        scale = record["lr/scalar"] / config.optim.scalar_lr
        assert scale == pytest.approx(golden["lr_scale"][step].item(), abs=1e-6)
    for kind, limit in (("final", 2e-4), ("ema", 1e-5)):
        for name, value in ours[kind].items():
            expected = golden[f"{kind}/{parameter_golf.to_reference_name(name)}"]
            assert (value - expected).abs().max() <= limit, f"{kind}/{name}"
