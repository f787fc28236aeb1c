"""Objectives with parameters: next-state prediction, its golden numbers, and the contract."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_dist.checkpoint import loading as loader
from jepa_dist.checkpoint.manifest import TensorEntry
from jepa_dist.config import Config, load
from jepa_dist.errors import UserError
from jepa_dist.monitor.alarms import JepaAlarms
from jepa_dist.objectives.diagnostics import effective_rank, mean_pairwise_cosine
from jepa_dist.objectives.next_state import NextStateObjective
from jepa_dist.objectives.objective import is_objectives
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.muon import Muon, MuonSettings
from jepa_dist.optim.schedule import jepa_weight
from jepa_dist.plan import Planner, StepPlan, TrainingClock, sample_shape
from tests.support.golden_cases import Case, cases
from tests.support.tiny import tiny_config, tiny_overrides

next_state_config = functools.partial(tiny_config, jepa__objective="next_state", jepa__lambda=1.0)


def objective_for(h: Tensor, bos_id: int | None = None, **settings: object) -> NextStateObjective:
    """Return the objective for the shapes of ``h`` [B, T, D], in its dtype."""
    changes = {f"jepa__next_state__{name}": value for name, value in settings.items()}
    if "norm_floor" in settings:
        changes.pop("jepa__next_state__norm_floor")
        changes["jepa__norm_floor"] = settings["norm_floor"]
    config = next_state_config(
        Path(), model__model_dim=h.size(2), model__seq_len=h.size(1), model__num_heads=1,
        model__num_kv_heads=1, model__rope_dims=2, batch__sequences=len(h),
        batch__micro=1, **changes,
    )  # fmt: skip
    objective = NextStateObjective(config, bos_id)
    for name, parameter in objective.named_parameters():
        parameter.data = objective.initial_value(
            name, parameter.shape, seed=0, device=torch.device("cpu")
        )
    return objective.to(h.dtype)


def mean_loss(objective: NextStateObjective, h: Tensor, z: Tensor, tokens: Tensor) -> Tensor:
    return objective((h, z), tokens, torch.ones(len(h)), None).loss / len(h)


# ------------------------------------------------------------------ golden


@pytest.mark.parametrize("case", cases("nextstate"))
def test_golden_next_state(case: Case) -> None:
    golden, info = case.tensors(), case.info
    h, z = golden["h"].requires_grad_(), golden["target"].requires_grad_()
    chosen = {name: info[name] for name in ("head", "head_mult", "shift", "within_documents")}
    objective = objective_for(h, info["bos_id"], norm_floor=0, **chosen)
    objective.load_state_dict(case.tensors("param/"))
    sums = objective((h, z), golden["tokens"].long(), torch.ones(len(h)), None)
    loss = sums.loss / len(h)
    assert abs(loss.item() - golden["loss"].item()) <= 1e-10
    loss.backward()
    assert z.grad is None
    found = {name: p.grad for name, p in objective.named_parameters()} | {"h": h.grad}
    expected = case.tensors("grad/") | {"h": golden["grad_h"]}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name
    targets = golden["tokens"][:, info["shift"] :]
    counted = targets != info["bos_id"] if info["within_documents"] else targets == targets
    assert sums.parts["counted"].item() == counted.sum()
    cosines = (golden["cos"] * counted).sum().item()
    assert sums.parts["cosines"].item() == pytest.approx(cosines, rel=1e-6, abs=1e-6)


# ------------------------------------------------------------------ the loss


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("head", ["none", "linear", "swiglu"])
def test_next_state_against_a_loop(head: str, shift: int) -> None:
    h, z, tokens = states(3, 9, 8), states(3, 9, 8, seed=1), torch.randint(5, (3, 9))
    tokens[0, 4] = 2
    objective = objective_for(h, 2, head=head, shift=shift, within_documents=True, norm_floor=0)
    weights = {name: p.detach().numpy() for name, p in objective.named_parameters()}
    total = 0.0
    for b in range(3):
        for t in range(9 - shift):
            u = h[b, t].numpy() / np.sqrt(np.mean(h[b, t].numpy() ** 2) + 2.0**-23)
            if head == "linear":
                u = weights["proj.weight"] @ u
            if head == "swiglu":
                gate = weights["gate.weight"] @ u
                gate = gate / (1 + np.exp(-gate)) * (weights["up.weight"] @ u)
                u = weights["down.weight"] @ gate
            target = z[b, t + shift].numpy()
            cosine = u @ target / np.linalg.norm(u) / np.linalg.norm(target)
            total += (1 - cosine) * (tokens[b, t + shift] != 2).item()
    expected = total / (3 * (9 - shift))
    assert mean_loss(objective, h, z, tokens).item() == pytest.approx(expected, abs=1e-12)


def test_rows_of_weight_zero_do_not_count_in_next_state() -> None:
    h, tokens = states(4, 6, 8), torch.zeros(4, 6, dtype=torch.int64)
    objective, weight = objective_for(h), torch.tensor([1.0, 0.0, 1.0, 0.0])
    two = objective((h, h), tokens, weight, None)
    alone = objective((h[::2], h[::2]), tokens[::2], torch.ones(2), None)
    assert two.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)
    assert {n: v.item() for n, v in two.parts.items()} == pytest.approx(
        {n: v.item() for n, v in alone.parts.items()}
    )


def test_the_control_arm_lets_the_gradient_reach_the_target() -> None:
    h, z = states(2, 6, 8), states(2, 6, 8, seed=1).requires_grad_()
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    mean_loss(objective_for(h, stop_gradient=False), h, z, tokens).backward()
    assert z.grad[:, 1:].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_floor", [0, 0.05])
def test_next_state_extremes_stay_finite(dtype: torch.dtype, norm_floor: float) -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    for values in (torch.zeros(2, 5, 8), torch.ones(2, 5, 8), states(2, 5, 8)):
        h = values.to(dtype).requires_grad_()
        loss = mean_loss(objective_for(h, norm_floor=norm_floor), h, h.detach(), tokens)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert h.grad.isfinite().all()


def test_no_matrix_of_the_head_starts_at_zero() -> None:
    objective = objective_for(torch.zeros(2, 4, 64))
    sizes = {name: tuple(p.shape) for name, p in objective.named_parameters()}
    assert sizes == {"gate.weight": (256, 64), "up.weight": (256, 64), "down.weight": (64, 256)}
    for parameter in objective.parameters():
        bound = parameter.size(1) ** -0.5
        assert parameter.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


# ------------------------------------------------------------------ the contract


def test_parameters_are_matrices_of_the_optimizer(tmp_path: Path) -> None:
    config = next_state_config(tmp_path)
    named = {
        f"objective.{name}": p
        for name, p in objective_for(torch.zeros(6, 24, 8)).named_parameters()
    }
    (group,) = group_parameters(named.items(), config.optim, tied=True)
    assert (group.name, list(group.parameters)) == ("matrix", list(named))


def test_only_the_objective_is_not_decayed_while_it_is_off() -> None:
    idle = {n: torch.ones(2, 3, requires_grad=True) for n in ("blocks.0.w", "objective.w")}
    settings = MuonSettings(True, True, 5, False, None)
    Muon(list(idle.items()), lr=0.1, weight_decay=1.0, settings=settings).step()
    assert idle["blocks.0.w"].max().item() == pytest.approx(0.9)
    assert idle["objective.w"].min().item() == 1.0


def test_stop_frac_turns_it_off(tmp_path: Path) -> None:
    schedule = {"train__steps": 20, "jepa__start_frac": 0.25, "jepa__stop_frac": 0.75}
    config = next_state_config(tmp_path, **schedule)
    planner = Planner(config, TrainingClock())
    weights = [planner.plan(step).jepa_weight for step in range(20)]
    assert weights == [0.0] * 5 + [1.0] * 10 + [0.0] * 5
    assert sample_shape(config) is None
    plan = planner.plan(10)
    assert StepPlan.unpack(plan.pack(None), None) == plan
    assert jepa_weight(1.2, 0.5, 0.0, 0.0) == 0.5


def test_an_old_manifest_without_tensors_of_the_objective_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only tensors of the objective may be missing, or present without being requested."""
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


def test_flops_are_those_of_the_head(tmp_path: Path) -> None:
    objective = objective_for(torch.zeros(2, 10, 8), shift=2)
    assert objective.flops_per_token == 6 * 3 * 8 * 32 * 8 / 10


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["jepa.next_state.target_layer=4"], "target_layer=4: must be a block 0..3"),
        (["jepa.next_state.shift=24"], "shift=24: must be below"),
        (["jepa.within_documents=true"], "use jepa.next_state.within_documents"),
        (["jepa.stop_frac=0.2", "jepa.start_frac=0.3"], "stop_frac=0.2: must be above"),
        (["jepa.start_frac=0.51", "jepa.stop_frac=0.52"], "jepa.stop_frac=0.52: with"),
        (["jepa.objective=nothing"], "jepa.objective"),
    ],
)
def test_impossible_settings_of_next_state(
    tmp_path: Path, settings: list[str], expected: str
) -> None:
    overrides = tiny_overrides(tmp_path, jepa__objective="next_state")
    with pytest.raises(UserError) as error:
        load(None, [*overrides, *settings], {})
    assert any(expected in problem for problem in error.value.problems)


@pytest.mark.parametrize(("layers", "target"), [(1, 0), (2, 0), (4, 1), (11, 2), (28, 6)])
def test_the_default_target_is_a_fifth_of_the_depth(layers: int, target: int) -> None:
    assert Config().jepa.next_state.target(layers) == target


# ------------------------------------------------------------------ diagnostics


def test_anisotropy_by_hand() -> None:
    h = states(3, 5, 4)
    unit = F.normalize(h[:, 1:].flatten(0, 1), dim=-1)
    pairs = [(unit[i] @ unit[j]).item() for i in range(12) for j in range(12) if i != j]
    assert mean_pairwise_cosine(h).item() == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_pairwise_cosine(torch.ones(2, 4, 8)).item() == pytest.approx(1)


def test_the_probe_of_next_state_describes_both_states() -> None:
    h, z = (states(4, 12, 8, seed=seed).float() for seed in (0, 1))
    probe = objective_for(h).probe(None, torch.device("cpu"))
    probe.watch([h, z], torch.zeros(4, 12, dtype=torch.int64), 3)
    seen = probe.metrics({name: value.item() for name, value in probe.measure().items()})
    assert seen["jepa/effective_rank"] == pytest.approx(effective_rank(h[:3]).item(), rel=1e-5)
    assert seen["jepa/target_effective_rank"] == pytest.approx(
        effective_rank(z[:3]).item(), rel=1e-5
    )
    expected = mean_pairwise_cosine(z[:3]).item()
    assert seen["jepa/target_mean_cosine"] == pytest.approx(expected, abs=1e-6)


def test_the_trivial_solution_raises_an_alarm() -> None:
    alarms = JepaAlarms(dead_gradient_ratio=0, collapse_share=0)
    course = [(0.9, 50.0, 20.0), (0.01, 48.0, 19.0), (0.3, 40.0, 2.0), (0.01, 45.0, 9.0)]
    warnings = [
        alarms.observe(
            {
                "step": step,
                "jepa/relative": relative,
                "jepa/effective_rank": rank,
                "jepa/target_effective_rank": target,
            }
        )
        for step, (relative, rank, target) in enumerate(course)
    ]
    assert [len(texts) for texts in warnings] == [0, 0, 0, 1]
    assert "solved trivially" in warnings[3][0]
    assert "jepa/target_effective_rank fell to 45%" in warnings[3][0]
