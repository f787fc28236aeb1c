"""The contract of objectives: their parameters in the optimizer and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jepa_dist.checkpoint import loader
from jepa_dist.checkpoint.manifest import TensorEntry
from jepa_dist.errors import UserError
from jepa_dist.objectives.objective import is_objectives
from jepa_dist.optim.muon import Muon, MuonSettings


def test_only_the_objective_is_not_decayed_while_it_is_off() -> None:
    idle = {n: torch.ones(2, 3, requires_grad=True) for n in ("blocks.0.w", "objective.w")}
    settings = MuonSettings(True, True, 5, False, None)
    Muon(list(idle.items()), lr=0.1, weight_decay=1.0, settings=settings).step()
    assert idle["blocks.0.w"].max().item() == pytest.approx(0.9)
    assert idle["objective.w"].min().item() == 1.0


def test_an_old_manifest_without_tensors_of_the_objective_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only tensors of the objective may be missing, or be there without being asked for."""
    entry = TensorEntry(dtype="F32", shape=(2, 3), chunks=())
    old = SimpleNamespace(tensors={"model/w": entry, "objective/old.weight": entry})
    monkeypatch.setattr(loader, "read_manifest", lambda path: old)
    monkeypatch.setattr(loader, "read_state", lambda path: {})
    new = ("objective/w", "exp_avg/objective.w", "ema/objective.w")
    tensors = {name: torch.zeros(2, 3) for name in ("model/w", *new)}
    loader._fitting(Path("old"), tensors, is_objectives)
    for strange in ("model/objective_w", "exp_avg/w", "ema/w"):
        with pytest.raises(UserError, match=strange):
            loader._fitting(Path("old"), tensors | {strange: torch.zeros(1)}, is_objectives)
    with pytest.raises(UserError, match="objective"):
        loader._fitting(Path("old"), tensors, lambda name: False)
